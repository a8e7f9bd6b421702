"""Format the code cells of the notebooks, at a width that fits the site's column.

Run by `make format`, which takes NAMES too; a test compares.
"""

import re
import subprocess
import sys

from notebooks import chosen

WIDTH = 76
CELL = re.compile(r"(```\{code-cell\} ipython3\n)(.*?)(\n```)", re.S)
OPTIONS = re.compile(r"(?:---\n.*?\n---\n|(?::[^\n]*\n)+\n?)?", re.S)
MAGIC = re.compile(r"^(\s*)([%!].*)$", re.M)


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
    shown = re.sub(r"_magic_(\d+)\(\)", lambda match: hidden[int(match[1])], result.stdout)
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
