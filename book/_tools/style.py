"""Format the code cells of the notebooks, at a width that fits the site's column.

Run by `make format`, which takes NAMES too; a test compares.
"""

import ast
import re
import subprocess
import sys

from notebooks import chosen

WIDTH = 76
CELL = re.compile(r"(```\{code-cell\} ipython3\n)(.*?)(\n```)", re.S)
OPTIONS = re.compile(r"(?:---\n.*?\n---\n|(?::[^\n]*\n)+\n?)?", re.S)
STRING = re.compile(r'( +)((?:\w+=)?)(f?")((?:[^"\\]|\\.)+)"(,?)')
DOCSTRING = re.compile(r'( +)("""|)(\w.*)"""')
MAGIC = re.compile(r"^(\s*)([%!].*)$", re.M)


def break_strings(code: str) -> str:
    """Return code in which lines that are one long string, as a figure's title, are two or more."""
    lines, waiting = [], code.splitlines()[::-1]
    while waiting:
        line = waiting.pop()
        if len(line) > WIDTH and (match := STRING.fullmatch(line)):
            indent, name, quote, text, comma = match.groups()
            place = _break(text, WIDTH - len(indent + name + quote) - 1)
            if 0 < place < len(text):
                line = f'{indent}{name}{quote}{text[:place]}"'
                waiting.append(f'{indent}{quote}{text[place:]}"{comma}')
        elif len(line) > WIDTH and (match := DOCSTRING.fullmatch(line)):
            indent, quote, text = match.groups()
            place = _break(text, WIDTH - len(indent + quote))
            if 0 < place < len(text):
                line = indent + quote + text[:place].rstrip()
                waiting.append(f'{indent}{text[place:]}"""')
        lines.append(line)
    broken = "\n".join(lines)
    return broken if _meaning(broken) == _meaning(code) else code


def _break(text: str, room: int) -> int:
    """Return where a string is broken: at the end of a line in it, else at a space."""
    place = text.rfind("\\n", 0, room) + 2
    return place if place > 1 else text.rfind(" ", 0, room) + 1


def _meaning(code: str) -> str:
    """Return what a cell does, whatever its layout; empty if it is not Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = " ".join(str(node.value.value).split())
    return ast.dump(tree)


def format_code(code: str) -> str:
    """Return a cell's code as ruff formats it; IPython's magics stay as they are.

    Raises:
        ValueError: If the code is not Python.
    """
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[2])
        return f"{match[1]}_magic_{len(hidden) - 1}()"

    command = [sys.executable, "-m", "ruff", "format", f"--line-length={WIDTH}", "-"]
    result = subprocess.run(
        command, input=MAGIC.sub(hide, code), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise ValueError(f"{result.stderr}\n{code}")
    broken = break_strings(result.stdout)
    shown = re.sub(r"_magic_(\d+)\(\)", lambda match: hidden[int(match[1])], broken)
    return shown.rstrip()


def format_notebook(text: str) -> str:
    """Return a notebook's text with every code cell formatted."""

    def replace(match: re.Match[str]) -> str:
        options = OPTIONS.match(match[2])
        head = options[0] if options else ""
        return match[1] + head + format_code(match[2][len(head) :]) + match[3]

    return CELL.sub(replace, text)


def main() -> None:
    """Format the notebooks named, such as evidence/properties, or all of them, in place."""
    for name, path in chosen(sys.argv[1:]).items():
        text = path.read_text(encoding="utf-8")
        if (formatted := format_notebook(text)) != text:
            path.write_text(formatted, encoding="utf-8", newline="\n")
            print(f"{name}: formatted")


if __name__ == "__main__":
    main()
