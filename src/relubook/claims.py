"""The ledger, as ``python -m relubook.claims [--json]``."""

from relubook.evidence.claims import main

if __name__ == "__main__":
    raise SystemExit(main())
