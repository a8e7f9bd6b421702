"""The package's commands, ``python -m relubook claims`` and ``python -m relubook diagnose``."""

import argparse
import json
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


def claims(options: argparse.Namespace) -> int:
    """Print the ledger of claims as a table, or with ``--json`` as a list for programs."""
    from relubook.evidence.claims import ledger

    rows = ledger()
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    for row in rows:
        print(f"{row['id']:<25}  {row['chapter']:<27}  {row['verdict']:<9}  {row['statement']}")
    tested = sum(row["verdict"] != "untested" for row in rows)
    print(f"{tested} of {len(rows)} claims have a verdict")
    return 0


def diagnosis(options: argparse.Namespace) -> int:
    """Print which units of a model are dead; exit with 0 if every site is alive, else with 1.

    A site is alive unless more of its units than --max-dead are dead, or one saw NaN or infinity.
    The code is 2 if nothing could be diagnosed or written.
    """
    from relubook.units.diagnosis import Report, diagnose

    try:
        Report([]).assert_alive(options.max_dead)  # is it a share?
        for path in filter(None, (options.html, options.save)):
            path.parent.resolve(strict=True)
        report = pkgutil.resolve_name(options.function)()
        if isinstance(report, tuple) and len(report) == 2:
            report = diagnose(*report)
        if not isinstance(report, Report):
            raise TypeError(f"{options.function} returns neither (model, data) nor a Report")
        print(report)
        if options.html:
            report.write_html(options.html, f"Dead units: {options.function}")
        if options.save:
            report.save(options.save)
    except (Exception, SystemExit):
        traceback.print_exc()
        return 2
    try:
        report.assert_alive(options.max_dead)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m relubook")
    commands = parser.add_subparsers(required=True, metavar="{claims,diagnose}")
    ledger = commands.add_parser("claims", description=claims.__doc__)
    ledger.add_argument("--json", action="store_true", help="print JSON")
    ledger.set_defaults(run=claims)
    check = commands.add_parser("diagnose", description=diagnosis.__doc__)
    check.add_argument("function", help="module:function, returns (model, data), or a Report")
    check.add_argument("--max-dead", type=float, default=0.0, help="0 to 1; default: 0")
    check.add_argument("--html", type=Path, help="file for the report as a page")
    check.add_argument("--save", type=Path, help="file for the report, see Report.load")
    check.set_defaults(run=diagnosis)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    raise SystemExit(main())
