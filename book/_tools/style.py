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
STRING = re.compile(r'( +)(f?")((?:[^"\\]|\\.)+)"(,?)')
MAGIC = re.compile(r"^(\s*)([%!].*)$", re.M)


def break_strings(code: str) -> str:
    """Return code in which lines that are one long string, as a figure's title, are two strings."""
    lines = []
    for line in code.splitlines():
        match = STRING.fullmatch(line)
        if match is None or len(line) <= WIDTH:
            lines.append(line)
            continue
        indent, quote, text, comma = match.groups()
        room = WIDTH - len(indent) - len(quote) - 1
        place = text.rfind("\\n", 0, room - 1) + 2
        place = place if place > 1 else text.rfind(" ", 0, room) + 1
        lines += [f'{indent}{quote}{text[:place]}"', f'{indent}{quote}{text[place:]}"{comma}']
    broken = "\n".join(lines)
    try:
        same = ast.dump(ast.parse(broken)) == ast.dump(ast.parse(code))
    except SyntaxError:
        same = False
    return broken if same else code


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
