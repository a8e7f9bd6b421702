"""The package's command: ``python -m relubook claims``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "claims": ("relubook.evidence.claims", "print the ledger of claims"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the package's commands; each says by ``--help`` what it takes."""
    parser = argparse.ArgumentParser(
        prog="python -m relubook",
        description=main.__doc__,
        epilog="; ".join(f"{name}: {purpose}" for name, (_, purpose) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(given[:1]).command
    return importlib.import_module(COMMANDS[command][0]).main(given[1:])


if __name__ == "__main__":
    raise SystemExit(main())
