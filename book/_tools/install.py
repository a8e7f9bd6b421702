"""Install what a lock names, by uv from the sources that pip is set to, or else by pip.

Run by make with the environment's own Python: `install.py requirements.lock --project` installs
every pin and this project on top.  uv takes a tenth of pip's time, but does not read pip's
configuration, so its sources are read here.
"""

import argparse
import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
PIP = [sys.executable, "-m", "pip"]
UV = [sys.executable, "-m", "uv", "pip"]
VARIABLES = {  # which variable of uv stands for a setting of pip
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}
SECTIONS = ("global", "install", ":env:")  # later ones win


def pip_settings(listed: str) -> dict[str, str]:
    """Return pip's settings by name, from what ``pip config list`` prints.

    The list has a line such as ``global.index-url='https://...'`` a setting; those of the
    variables ``PIP_...`` are listed under ``:env:``.
    """
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in found and value:
            found[section][name] = str(ast.literal_eval(value))
    return {name: value for section in SECTIONS for name, value in found[section].items()}


def uv_variables(settings: dict[str, str]) -> dict[str, str]:
    """Return the environment variables that give uv the settings of pip.

    Like pip, uv then takes the best version of all sources, not those of the first alone.
    """
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for name, variable in VARIABLES.items():
        if name in settings:
            separator = "," if name == "find-links" else " "
            found[variable] = separator.join(settings[name].split())
    return found


def environment() -> dict[str, str]:
    """Return the variables for a run of uv; what the user set for uv itself comes first."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=False)
    return uv_variables(pip_settings(listed.stdout)) | os.environ


def install(arguments: list[str]) -> int:
    """Install by uv, or by pip where uv is missing or fails; return the exit status."""
    if importlib.util.find_spec("uv") is None:
        command = [*PIP, "install", "--quiet", f"--constraint={LOCK}", "uv"]
        subprocess.run(command, cwd=ROOT, check=False)
    command = [*UV, "install", "--quiet", f"--python={sys.executable}", *arguments]
    if not subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode:
        return 0
    print("uv did not install it; pip does, which takes a minute or two", flush=True)
    return subprocess.run(
        [*PIP, "install", "--quiet", *arguments], cwd=ROOT, check=False
    ).returncode


def main() -> None:
    """Install a lock, and the project if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", help="a file of pinned requirements")
    parser.add_argument("--project", action="store_true", help="and this project, editable")
    options = parser.parse_args()
    if status := install([f"--requirement={options.lock}"]):
        sys.exit(status)
    if options.project:
        sys.exit(install(["--no-deps", "--editable=."]))


if __name__ == "__main__":
    main()
