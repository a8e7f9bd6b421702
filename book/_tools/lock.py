"""Write the locks and the pinned part of environment.yml from pyproject.toml.

Run by `make lock`.  requirements.lock holds everything; requirements-site.lock holds the part of it
that builds the site from stored outputs.  Both are universal: one file for Linux, macOS and Windows
and for Python 3.11 to 3.13.  Two things are taken out of uv's answer: the local tag of a CPU build
(`+cpu`), which nobody else could install, and the CUDA packages that torch asks for on Linux; pip
adds those itself where the torch at hand needs them.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import install

ROOT = Path(__file__).resolve().parents[2]
LOCK = install.LOCK
SITE_LOCK = ROOT / "requirements-site.lock"
ENVIRONMENT = ROOT / "environment.yml"
TORCH = "2.13.0"
EXTRAS = ("figures", "site", "notebooks", "test")
CUDA = re.compile(r"^(nvidia|cuda|triton|cu\d)[\w-]*==")
HEADER = """\
# Exact versions of everything that builds and tests the book, for Linux, macOS and Windows and for
# Python 3.11 to 3.13.  Written by `make lock`; do not edit.  Newer releases of torch have no wheel
# for Intel Macs: there, read the built book or use Colab.
"""
SITE_HEADER = """\
# The part of requirements.lock that builds the site from stored outputs: all that `make book`
# installs.  Written by `make lock`; do not edit.
"""


def extras() -> dict[str, list[str]]:
    """Return the requirements of each extra of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"core": project["dependencies"], **project["optional-dependencies"]}


def resolve(requirements: list[str], pins: list[str]) -> list[str]:
    """Return pinned requirements, one a line, as uv resolves them for every platform.

    Args:
        requirements: What is wanted.
        pins: Versions to keep to.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "pins.txt"
        constraints.write_text("\n".join(pins))
        command = [
            *(*install.UV, "compile", "-", "--universal", "--python-version", "3.11"),
            *("--no-header", "--no-annotate", "--quiet", "--constraints", str(constraints)),
        ]
        answer = subprocess.run(
            command,
            cwd=ROOT,
            env=install.environment(),
            input="\n".join(requirements),
            text=True,
            capture_output=True,
            check=False,
        )
    if answer.returncode:
        sys.exit(answer.stderr)
    # Where a folder of wheels has a CPU build, uv splits torch's line by platform.
    lines = (re.sub(r"^torch==.*", f"torch=={TORCH}", s) for s in answer.stdout.splitlines())
    return [line for line in dict.fromkeys(lines) if line and not CUDA.match(line)]


def direct_requirements() -> list[str]:
    """Return the names that pyproject.toml asks for itself, without versions."""
    wanted = [line for extra in ("core", *EXTRAS[:-1]) for line in extras()[extra]]
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
    """Write the three files."""
    wanted = extras()
    pins = resolve([line for e in ("core", *EXTRAS) for line in wanted[e]], [f"torch=={TORCH}"])
    site = resolve(wanted["site"], pins)
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    SITE_LOCK.write_text(SITE_HEADER + "\n".join(site) + "\n")
    ENVIRONMENT.write_text(environment(pins))
    print(f"{LOCK.name}: {len(pins)} packages, {len(site)} of them for the site")


if __name__ == "__main__":
    main()
