"""The package's command: ``python -m relubook claims`` prints the ledger."""

import argparse
import json
from collections.abc import Sequence

from relubook.evidence.claims import ledger


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ledger of claims as a table, or with ``--json`` as a list for programs."""
    parser = argparse.ArgumentParser(prog="python -m relubook", description=main.__doc__)
    parser.add_argument("command", choices=["claims"])
    parser.add_argument("--json", action="store_true", help="print JSON")
    rows, options = ledger(), parser.parse_args(arguments)
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    for row in rows:
        print(f"{row['id']:<25}  {row['chapter']:<27}  {row['verdict']:<9}  {row['statement']}")
    tested = sum(row["verdict"] != "untested" for row in rows)
    print(f"{tested} of {len(rows)} claims have a verdict")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
