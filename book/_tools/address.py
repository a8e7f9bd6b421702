"""Change the repository's address everywhere: `make address URL=https://github.com/OWNER/NAME`.

The address stands in _config.yml. The files that must spell it out (notebooks, README, ...) are
rewritten from there, and what they say about an address that is not set yet is taken out.
"""

import re
import subprocess
import sys
from pathlib import Path

import notebooks
import yaml

ROOT = Path(__file__).resolve().parents[2]
FORM = re.compile(r"https://github\.com/[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_.-]+")
MENTION = re.compile(r"(?:https://)?(github\.com|gh|github)/([A-Za-z0-9-]+/relubook)\b")
UNSET = "https://github.com/set--me/relubook"
UNSET_NOTICE = re.compile(r"<!-- address unset -->\n[\s\S]*?<!-- /address unset -->\n")
SKIPPED = (".lock", ".png", ".svg", ".json")


def current() -> str:
    """Return the address in _config.yml."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return config["repository"]["url"]


def files() -> list[Path]:
    """Return the tracked text files that may spell the address out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (ROOT / line for line in listed.stdout.splitlines())
    return [p for p in paths if p.is_file() and p.suffix not in SKIPPED]


def mentions(path: Path) -> list[str]:
    """Return every owner/name that a file gives this project."""
    return [m[2] for m in MENTION.finditer(path.read_text(encoding="utf-8"))]


def main() -> None:
    """Rewrite the address everywhere."""
    if len(sys.argv) != 2 or not FORM.fullmatch(sys.argv[1].removesuffix(".git")):
        sys.exit("say: make address URL=https://github.com/OWNER/NAME")
    old, new = current(), sys.argv[1].removesuffix(".git")
    old_name, new_name = (url.removeprefix("https://github.com/") for url in (old, new))
    for path in files():
        text = path.read_text(encoding="utf-8")
        if path.resolve() != Path(__file__).resolve() and old_name in text:
            text = text.replace(old_name, new_name)
            if new != UNSET and path.suffix == ".md":
                text = UNSET_NOTICE.sub("", text)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(path.relative_to(ROOT))
    for text in notebooks.texts().values():
        stamp = notebooks.read_notebook(text).metadata.relubook
        merged = notebooks.normalize(notebooks.merge(text), stamp)
        notebooks.write(merged, notebooks.notebook_of(text))


if __name__ == "__main__":
    main()
