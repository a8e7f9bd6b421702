"""The ledger: verdicts follow from intervals, and a verdict that changes is noticed."""

import json
import math
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relubook.evidence import claims
from relubook.evidence.claims import claim, ledger, part
from relubook.evidence.statistics import interval

LOW, HIGH = np.full(200, 0.0), np.tile([0.5, 0.7], 100)
WIDE = np.tile([0.0, 0.6], 20)


@pytest.fixture(autouse=True)
def record(monkeypatch, tmp_path):
    """Let the ledger keep its records in a file of the test's own."""
    monkeypatch.setenv("RELUBOOK_VERDICTS", str(tmp_path / "verdicts.json"))
    monkeypatch.setenv("RELUBOOK_LEDGER", "record")
    return tmp_path / "verdicts.json"


def mains(samples):
    return [part(f"part {i}", x, at_least=0.3) for i, x in enumerate(samples)]


def limit(samples, **criterion):
    return part("a limit", samples, but="not there", **criterion)


@pytest.mark.parametrize(
    ("main", "limits", "word", "condition"),
    [
        ([HIGH], [], "true", ""),
        ([HIGH], [HIGH], "true", ""),
        ([HIGH], [LOW], "true, but", "not there"),
        ([HIGH], [WIDE], "true, but", "perhaps not there"),
        ([WIDE], [LOW], "undecided", "not settled: part 0"),
        ([LOW], [HIGH], "false", "not so: part 0"),
        ([WIDE, LOW], [HIGH], "false", "not so: part 1"),
        ([HIGH, WIDE], [], "undecided", "not settled: part 1"),
    ],
)
def test_word_follows_from_the_parts(main, limits, word, condition):
    verdict = claim("cheap").check(mains(main), [limit(x, at_least=0.3) for x in limits])
    assert (verdict.word, verdict.condition) == (word, condition)


def test_a_failed_limit_is_named_before_an_open_one():
    limits = [
        part("open", WIDE, at_least=0.3, but="not a"),
        part("fails", LOW, at_least=0.3, but="not b"),
    ]
    assert claim("cheap").check(mains([HIGH]), limits).condition == "not b"


def test_a_main_part_that_fails_may_say_so_in_its_own_words():
    wrong = part("it is so", LOW, at_least=0.3, but="it is otherwise")
    assert claim("cheap").check(wrong).condition == "it is otherwise"


@pytest.mark.parametrize(
    ("criterion", "verdict"),
    [
        ({"at_least": 0.5}, "holds"),
        ({"at_least": 0.6}, "open"),
        ({"at_least": 0.7}, "fails"),
        ({"at_most": 0.7}, "holds"),
        ({"at_most": 0.5}, "fails"),
        ({"between": (0.5, 0.7)}, "holds"),
        ({"between": (0.6, 0.7)}, "open"),
        ({"between": (0.7, 0.9)}, "fails"),
        ({"between": (0.1, 0.2)}, "fails"),
    ],
)
def test_an_interval_inside_holds_outside_fails_and_else_is_open(criterion, verdict):
    assert claim("cheap").check(part("a", HIGH, **criterion)).parts[0].verdict == verdict


@given(st.integers(1, 6))
def test_all_intervals_of_a_card_hold_together(count):
    parts = claim("cheap").check(mains([WIDE] * count)).parts
    expected = interval(WIDE, confidence=1 - 0.01 / count)
    assert all(p.value == pytest.approx(expected) for p in parts)


def test_theorems_and_code_facts_take_nothing_from_the_confidence():
    fact = part("a fact", holds=True, kind="code")
    alone, beside = (claim("cheap").check([*mains([WIDE]), *more]) for more in ([], [fact]))
    assert alone.parts[0].value == beside.parts[0].value


def test_no_event_in_n_networks_is_no_certainty():
    """0 of 200: below 5% it is, below 2% it may not be."""
    verdict = claim("cheap").check(
        [part("a", LOW, at_most=0.05), part("b", np.zeros(200, bool), at_most=0.02)]
    )
    assert [p.verdict for p in verdict.parts] == ["holds", "open"]


def test_equal_samples_without_bounds_settle_nothing():
    assert claim("cheap").check(part("a", np.ones(40), at_least=0, within=None)).word == "undecided"


def test_overflow_is_never_silent():
    x = torch.tensor([*HIGH, math.nan])
    with pytest.raises(ValueError, match="1 of 201 samples are not finite"):
        part("a part", x, at_least=0.3)
    assert part("a part", x, at_least=0.3, nonfinite="omit").n == 200
    assert part("a", x, at_least=0.3, nonfinite=1).note == "1 without a finite value, counted as 1"


def test_with_most_left_out_a_part_stays_open():
    x = np.where(np.arange(60) < 29, 0.9, math.nan)
    x[:3] = 0.8
    for samples in (x, np.full(60, math.nan)):
        claimed = part("a", samples, at_least=0.1, nonfinite="omit")
        assert claim("cheap").check(claimed).word == "undecided"


def test_a_part_may_bring_its_own_interval():
    seen = []

    def median(confidence):
        seen.append(confidence)
        return 3.0, 2.5, 3.5, 40

    verdict = claim("cheap").check(part("a", median, at_least=2, within=None))
    assert verdict.word == "true"
    assert verdict.parts[0].n == 40
    assert seen[-1] == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": np.ones(29), "at_least": 0}, "rests on 29 networks; it needs 30"),
        ({"samples": HIGH, "at_least": 0, "at_most": 1}, "needs one criterion"),
        ({"samples": HIGH, "equals": 0.6}, "a sample has an interval"),
        ({"holds": True}, "a sample has an interval"),
        ({"samples": HIGH}, "needs one criterion"),
        ({"at_least": 1}, "must say what it is judged on"),
        ({"samples": HIGH, "at_least": 1, "kind": "guess"}, "a kind of measured, theorem, code"),
        ({"samples": HIGH, "between": (0.7, 0.5)}, "leaves nothing that could pass"),
        ({"samples": 3 * HIGH, "at_least": 0}, "lie outside within"),
        ({"samples": HIGH[:, None], "at_least": 0}, r"shape \(n,\), not \(200, 1\)"),
    ],
)
def test_wrong_parts_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        part("a part", **wrong)


def test_a_check_needs_a_main_part_words_for_limits_and_distinct_sentences():
    for main, limits in (
        ([], []),
        (mains([HIGH]), [part("a limit", HIGH, at_least=0)]),
        (mains([HIGH]) * 2, []),
    ):
        with pytest.raises(ValueError, match="needs a main part, each limit its but="):
            claim("cheap").check(main, limits)


def test_a_theorem_that_fails_makes_the_claim_false():
    assert claim("cheap").check(part("a", holds=False, kind="theorem")).word == "false"
    assert claim("cheap").check(part("a", 1, equals=1, kind="code")).word == "true"
    assert claim("cheap").check(part("a", 1 + 1e-9, equals=1, kind="code")).word == "false"


def test_cite_needs_full_addresses():
    with pytest.raises(ValueError, match="at least one source"):
        claim("history").cite(finding="so it was")
    with pytest.raises(ValueError, match="full https address"):
        claim("history").cite(("Somebody", "a book"), finding="so it was")
    verdict = claim("history").cite(("Somebody", "https://a.example"), finding="so it was")
    assert verdict.word == "cited"
    assert "https://a.example" in verdict._repr_html_()


def test_recorded_verdict_is_checked_again(record, monkeypatch):
    first = claim("cheap").check(part("a", HIGH, at_least=0.3))
    monkeypatch.setenv("RELUBOOK_LEDGER", "check")
    again = claim("cheap").check(part("a", HIGH + 0.01, at_least=0.3))
    assert repr(first) == repr(again)
    assert json.loads(record.read_text())["cheap"]["verdict"] == "true"
    with pytest.raises(AssertionError, match="recorded as true, but here it is false"):
        claim("cheap").check(part("a", LOW, at_least=0.3))
    with pytest.raises(AssertionError, match="recorded as"):
        claim("cheap").check(part("a", HIGH, at_least=0.2))
    with pytest.raises(AssertionError, match="no recorded verdict"):
        claim("nonlinear").check(part("a", HIGH, at_least=0.3))


def test_a_limit_left_open_by_chance_contradicts_nothing(monkeypatch):
    claim("cheap").check(mains([HIGH]), [limit(HIGH, at_least=0.3)])
    monkeypatch.setenv("RELUBOOK_LEDGER", "check")
    assert claim("cheap").check(mains([HIGH]), [limit(WIDE, at_least=0.3)]).word == "true, but"
    with pytest.raises(AssertionError, match="recorded as"):
        claim("cheap").check(mains([HIGH]), [limit(LOW, at_least=0.3)])


def test_elsewhere_a_changed_verdict_is_a_notice(monkeypatch):
    claim("cheap").check(mains([HIGH]))
    monkeypatch.delenv("RELUBOOK_LEDGER")
    monkeypatch.delenv("CI", raising=False)
    with pytest.warns(UserWarning, match="here it is false"):
        assert claim("cheap").check(mains([LOW])).word == "false"
    monkeypatch.setenv("CI", "true")
    with pytest.raises(AssertionError, match="recorded as"):
        claim("cheap").check(mains([LOW]))


def test_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("RELUBOOK_LEDGER", "loud")
    with pytest.raises(ValueError, match="RELUBOOK_LEDGER must be one of"):
        claim("cheap").check(mains([HIGH]))


def test_full_disk_leaves_the_record(record, monkeypatch):
    claim("cheap").check(mains([HIGH]))
    before = record.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        claim("cheap").check(mains([LOW]))
    assert record.read_bytes() == before
    assert [p.name for p in record.parent.iterdir()] == [record.name]


def test_card_says_verdict_first_and_escapes_its_text():
    text = (
        claim("cheap")
        .check(part("x < y & z", HIGH, at_least=0.3), [limit(LOW, at_least=0.05)])
        ._repr_html_()
    )
    assert text.index("True, but") < text.index("not there") < text.index("x &lt; y &amp; z")
    _, low, high = interval(HIGH, confidence=0.995)
    assert f"60.0% ({100 * low:.1f} to {100 * high:.1f}), needs at least 30%" in text
    assert "200 networks" in text
    assert text.count("<svg") == 2
    assert text.endswith("<!--card-->")


def test_card_says_what_its_samples_are_and_never_that_they_have_no_width():
    few = [1e-7 * k for k in range(1, 41)]
    verdict = claim("cheap").check(part("a", few, at_least=1e-9, within=None, each="rounds"))
    assert "40 rounds" in verdict._repr_html_()
    assert verdict.parts[0].numbers.startswith("2.05e\u221206 (1.")


def test_card_of_a_theorem_has_no_interval():
    verdict = claim("cheap").check(part("a", holds=True, kind="theorem"))
    assert "<svg" not in verdict._repr_html_()
    assert "theorem, checked" in verdict._repr_html_()


@pytest.mark.parametrize(
    ("value", "unit", "digits", "text"),
    [
        (0.0813, "%", 1, "8.1"),
        (-0.05, " points", 0, "\u22125"),
        (-0.0001, "%", 0, "0"),
        (math.inf, "", 1, "\u221e"),
        (2.0, "", None, "2"),
        (0.03125, "%", None, "3.12"),
    ],
)
def test_numbers_are_written_for_readers(value, unit, digits, text):
    assert claims.number(value, unit, digits) == text


@pytest.fixture
def shipped(monkeypatch):
    monkeypatch.delenv("RELUBOOK_VERDICTS")


@pytest.mark.usefixtures("shipped")
def test_ledger_lists_every_claim_with_its_facts():
    rows = ledger()
    assert len(rows) == len({row["id"] for row in rows})
    ours = [row["id"] for row in rows if row["whose"] == "this book"]
    assert len(rows) - len(ours) == 87
    assert all(name.startswith(("spine-", "tool-")) for name in ours)
    for row in rows:
        assert row["statement"].endswith((".", "!"))
        assert row["whose"]
        assert row["verdict"] in claims.WORDS
        assert bool(row["parts"] or row["sources"]) == (row["verdict"] != "untested")


def test_source_notes_are_named():
    notes = tomllib.loads(Path(claims.__file__).with_name("claims.toml").read_text("utf-8"))[
        "notes"
    ]
    assert set(notes) == {"N1", "N2", "N3", "N4", "N5"}
    used = {note for row in ledger() for note in claim(row["id"]).notes}
    assert used == set(notes)


def test_unknown_claim_names_the_nearest():
    with pytest.raises(ValueError, match="nearest are .*cheap"):
        claim("cheep")


def test_data_ships_with_the_package():
    assert Path(claims.__file__).with_name("claims.toml").exists()
