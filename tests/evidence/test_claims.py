"""The ledger: judgments, records, and what happens when a verdict changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relubook.evidence import claims
from relubook.evidence.claims import (
    LedgerMismatchError,
    at_least,
    at_most,
    between,
    claim,
    combine,
    equals,
    holds,
    ledger,
    part,
)
from relubook.evidence.statistics import Estimate


def estimate(low, high, n=30):
    return Estimate((low + high) / 2, low, high, n)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Let the ledger keep its records in a file of the test's own, and check against them."""
    path = tmp_path / "verdicts.json"
    monkeypatch.setattr(claims, "_RECORD", path)
    monkeypatch.setenv("RELUBOOK_LEDGER", "record")
    return path


@pytest.mark.parametrize(
    ("criterion", "measured", "verdict"),
    [
        (at_least(2), estimate(2.1, 3), "confirmed"),
        (at_least(2), estimate(1.9, 3), "undecided"),
        (at_least(2), estimate(1, 1.9), "refuted"),
        (at_most(2), estimate(1, 2), "confirmed"),
        (at_most(2), estimate(2.1, 3), "refuted"),
        (between(-1, 1), estimate(-0.5, 0.5), "confirmed"),
        (between(-1, 1), estimate(-1.5, 0.5), "undecided"),
        (between(-1, 1), estimate(1.5, 2.5), "refuted"),
        (equals(0), 0.0, "confirmed"),
        (equals(0), 1e-9, "refuted"),
        (equals(1, tolerance=0.1), 1.05, "confirmed"),
        (holds(), True, "confirmed"),
        (holds(), False, "refuted"),
    ],
)
def test_criteria(criterion, measured, verdict):
    assert criterion.judge(measured) == verdict


@given(st.floats(-10, 10), st.floats(0, 5), st.floats(-10, 10))
def test_interval_and_its_opposite_never_agree(low, width, threshold):
    measured = estimate(low, low + width)
    verdicts = {at_least(threshold).judge(measured), at_most(threshold).judge(measured)}
    assert verdicts != {"refuted"}
    if "confirmed" in verdicts and len(verdicts) == 1:
        assert low == low + width == threshold


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (["confirmed", "confirmed"], "confirmed"),
        (["refuted"], "refuted"),
        (["confirmed", "refuted"], "depends"),
        (["confirmed", "refuted", "undecided"], "depends"),
        (["confirmed", "undecided"], "undecided"),
        (["refuted", "undecided"], "undecided"),
    ],
)
def test_parts_combine(verdicts, whole):
    assert combine(verdicts) == whole


def test_unknown_claim_is_named_with_its_neighbors():
    with pytest.raises(ValueError, match="'irreversable'.*irreversible"):
        claim("irreversable")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_no_evidence_are_refused(number):
    with pytest.raises(ValueError, match="finite evidence"):
        part("a", "b", number, at_least(0))
    with pytest.raises(ValueError, match="must be a finite number"):
        at_least(number)


def test_small_samples_are_refused():
    with pytest.raises(ValueError, match="rests on 3 independent samples"):
        part("a", "b", estimate(0, 1, n=3), at_least(0))


@pytest.mark.parametrize(
    ("test", "criterion"),
    [
        ({"at_least": 2}, at_least(2)),
        ({"at_most": 3}, at_most(3)),
        ({"between": (1, 3)}, between(1, 3)),
        ({"equals": 2}, equals(2)),
        ({"equals": 2, "tolerance": 0.5}, equals(2, tolerance=0.5)),
    ],
)
def test_a_test_is_declared_as_a_keyword(test, criterion):
    assert part("a", "b", 2.0, **test) == part("a", "b", 2.0, criterion)


def test_a_truth_value_must_hold():
    assert part("a", "b", True) == part("a", "b", True, holds())
    assert part("a", "b", False).verdict == "refuted"


@pytest.mark.parametrize(
    ("test", "named"),
    [
        ({}, "none"),
        ({"at_leats": 2}, "at_leats"),
        ({"at_least": 2, "at_most": 3}, "at_least, at_most"),
        ({"criterion": holds(), "at_most": 3}, "at_most"),
        ({"at_least": 2, "tolerance": 1}, "at_least, tolerance"),
    ],
)
def test_one_test_must_be_declared(test, named):
    with pytest.raises(TypeError, match=f"'a' must declare one test: .*; not {named}"):
        part("a", "b", 2.0, **test)


def test_what_is_no_measurement_is_refused():
    with pytest.raises(TypeError, match="measured a str"):
        part("a", "b", "large", at_least(0))


def test_check_needs_distinct_parts_and_a_condition():
    yes, no = part("a", "x", True, holds()), part("b", "y", False, holds())
    with pytest.raises(ValueError, match="at least one part"):
        claim("cheap").check()
    with pytest.raises(ValueError, match=r"name of its own: \['a'\]"):
        claim("cheap").check(yes, yes)
    with pytest.raises(ValueError, match="depends_on= must say on what"):
        claim("cheap").check(yes, no)


def test_cite_needs_full_addresses():
    with pytest.raises(ValueError, match="at least one source"):
        claim("history").cite(finding="so it was")
    with pytest.raises(ValueError, match="full https address"):
        claim("history").cite(("Somebody", "a book"), finding="so it was")


def test_recorded_verdict_is_checked_again(record, monkeypatch):
    claim("cheap").check(part("a", "x", 3.0, at_least(2)))
    assert json.loads(record.read_text())["cheap"]["verdict"] == "confirmed"
    monkeypatch.setenv("RELUBOOK_LEDGER", "check")
    claim("cheap").check(part("a", "x", 2.5, at_least(2)))
    with pytest.raises(LedgerMismatchError, match="recorded as confirmed, but here it is refuted"):
        claim("cheap").check(part("a", "x", 1.0, at_least(2)))
    with pytest.raises(LedgerMismatchError):
        claim("cheap").check(part("a", "x", 3.0, at_least(1)))
    with pytest.raises(LedgerMismatchError, match="no recorded verdict"):
        claim("nonlinear").check(part("a", "x", True, holds()))


def test_elsewhere_a_changed_verdict_is_a_notice(record, monkeypatch):
    claim("cheap").check(part("a", "x", 3.0, at_least(2)))
    monkeypatch.delenv("RELUBOOK_LEDGER")
    monkeypatch.delenv("CI", raising=False)
    with pytest.warns(UserWarning, match="here it is refuted"):
        verdict = claim("cheap").check(part("a", "x", 1.0, at_least(2)))
    assert verdict.verdict == "refuted"
    monkeypatch.setenv("CI", "true")
    with pytest.raises(LedgerMismatchError):
        claim("cheap").check(part("a", "x", 1.0, at_least(2)))


def test_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("RELUBOOK_LEDGER", "loud")
    with pytest.raises(ValueError, match="RELUBOOK_LEDGER must be one of"):
        claim("cheap").check(part("a", "x", 3.0, at_least(2)))


def test_full_disk_leaves_the_record(record, monkeypatch):
    claim("cheap").check(part("a", "x", 3.0, at_least(2)))
    before = record.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        claim("cheap").check(part("a", "x", 1.0, at_least(2)))
    assert record.read_bytes() == before
    assert [p.name for p in record.parent.iterdir()] == [record.name]


def test_plain_text_is_stable_and_the_card_shows_the_evidence(record):
    first = claim("cheap").check(part("speed", "faster", estimate(3.0, 3.5), at_least(2)))
    second = claim("cheap").check(part("speed", "faster", estimate(4.0, 4.5), at_least(2)))
    assert repr(first) == repr(second)
    assert "Verdict: confirmed" in repr(first)
    assert "at least 2" in repr(first)
    assert first._repr_html_() != second._repr_html_()
    assert "3.25 [3, 3.5] (n = 30)" in first._repr_html_()


def test_card_escapes_its_text(record):
    card = claim("cheap").check(part("a", "x < y & z", True, holds()))._repr_html_()
    assert "x &lt; y &amp; z" in card


def test_ledger_lists_every_claim_with_its_facts():
    rows = ledger()
    assert len(rows) == len({row["id"] for row in rows}) == 87
    for row in rows:
        assert row["statement"].endswith((".", "!"))
        assert row["whose"]
        assert row["verdict"] in (*claims._MARKS, None)
        assert bool(row["evidence"]) == (row["verdict"] is not None)


def test_source_notes_are_named():
    notes = claims.source_notes()
    assert set(notes) == {"N1", "N2", "N3", "N4", "N5"}
    used = {note for row in ledger() for note in claim(row["id"]).notes}
    assert used == set(notes)


def test_command_line(capsys):
    claims.main([])
    table = capsys.readouterr().out
    assert "one-sided" in table
    assert "claims have a verdict" in table
    claims.main(["--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {"id", "statement", "chapter", "verdict", "evidence"} <= set(rows[0])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["relubook.claims", "relubook claims"])
def test_module_runs(module):
    command = [sys.executable, "-m", *module.split(), "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(json.loads(output)) == 87


def test_data_ships_with_the_package():
    assert Path(claims.__file__).with_name("claims.toml").exists()
