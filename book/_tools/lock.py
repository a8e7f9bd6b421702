"""Write requirements.lock and the pinned part of environment.yml from pyproject.toml.

Run by `make lock`.  The lock is universal: one file for Linux, macOS and Windows and for Python
3.11 to 3.13.  Two things are taken out of uv's answer: the local tag of a CPU build (`+cpu`), which
nobody else could install, and the CUDA packages that torch asks for on Linux; pip adds those itself
where the torch at hand needs them.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
ENVIRONMENT = ROOT / "environment.yml"
TORCH = "2.13.0"
EXTRAS = ("figures", "build", "test")
CUDA = re.compile(r"^(nvidia|cuda|triton|cu\d)[\w-]*==")
HEADER = """\
# Exact versions of everything that builds and tests the book, for Linux, macOS and Windows and for
# Python 3.11 to 3.13.  Written by `make lock`; do not edit.  Newer releases of torch have no wheel
# for Intel Macs: there, read the built book or use Colab.
"""


def resolve() -> list[str]:
    """Return the pinned requirements, one a line, as uv resolves them for every platform."""
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--universal"),
        *("--python-version", "3.11", "--no-header", "--no-annotate", "--quiet"),
        *("--constraint", "-"),
        *(f"--extra={name}" for name in EXTRAS),
    ]
    answer = subprocess.run(
        command, cwd=ROOT, input=f"torch=={TORCH}\n", text=True, capture_output=True, check=False
    )
    if answer.returncode:
        sys.exit(answer.stderr)
    lines = (re.sub(r"\+cpu\b", "", line) for line in answer.stdout.splitlines())
    return [line for line in lines if line and not CUDA.match(line)]


def direct_requirements() -> list[str]:
    """Return the names that pyproject.toml asks for itself, without versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in ("figures", "build"):
        wanted += project["optional-dependencies"][extra]
    return sorted(re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in wanted)


def environment(pins: list[str]) -> str:
    """Return environment.yml: Python from conda, and the same pins as the lock for the rest."""
    wanted = direct_requirements()
    chosen = "".join(f"      - {pin}\n" for pin in pins if pin.partition("==")[0] in wanted)
    return (
        "# For conda and Binder, with the versions of requirements.lock; written by `make lock`.\n"
        "name: relubook\n"
        "channels:\n  - conda-forge\n  - nodefaults\n"
        "dependencies:\n  - python=3.11\n  - pip\n  - jupyterlab=4\n  - pip:\n"
        f"{chosen}      - -e .\n"
    )


def main() -> None:
    """Write both files."""
    pins = resolve()
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    ENVIRONMENT.write_text(environment(pins))
    print(f"{LOCK.name}: {len(pins)} packages; {ENVIRONMENT.name} follows it")


if __name__ == "__main__":
    main()
