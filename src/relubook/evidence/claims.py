"""The ledger: what the notes claim, each claim's test, and the verdict that the build re-checks.

A chapter states a claim, declares its tests, measures, and ends with one cell::

    claim("cheap").check(part("elementwise", "sigmoid takes twice as long", ratio, at_least=2.0))
"""

import argparse
import difflib
import functools
import html
import json
import math
import os
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relubook.evidence._files import write_whole
from relubook.evidence.statistics import Estimate

__all__ = ["Claim", "Criterion", "LedgerMismatchError", "Part", "Verdict", "at_least", "at_most"]
__all__ += ["between", "claim", "claim_ids", "equals", "holds", "ledger", "part"]

VERDICTS = ("confirmed", "refuted", "depends", "undecided", "cited")
LEAST_SAMPLES = 30
MODES = ("check", "record", "notice")
_CHECKED = ("part", "test", "verdict", "url")  # what an entry of the evidence must keep

_DATA = Path(__file__).with_name("claims.toml")
_RECORD = _DATA.with_name("verdicts.json")
_MARKS = dict(zip(VERDICTS, "✓✗±?❝", strict=True))
_COLORS = dict(zip(VERDICTS, ("#0072B2", "#D55E00", "#CC79A7", "#999999", "#999999"), strict=True))

_CELL = 'style="text-align: left; padding: .2em .6em; vertical-align: top"'

Measured = Estimate | float | int | bool


class LedgerMismatchError(AssertionError):
    """A measured verdict differs from the recorded one."""


@dataclass(frozen=True)
class Criterion:
    """A test declared before the run: a range with both ends included, and how a card words it."""

    low: float
    high: float
    wording: str

    def __post_init__(self) -> None:
        if not (self.low <= self.high and (math.isfinite(self.low) or math.isfinite(self.high))):
            raise ValueError(f"a test must be a finite number or low <= high, not {self.wording}")

    def judge(self, measured: Measured) -> str:
        """Return ``"confirmed"``, ``"refuted"`` or ``"undecided"``.

        An :class:`~relubook.evidence.statistics.Estimate` passes when its whole interval lies
        inside the range, fails when all of it lies outside on one side, and settles nothing
        otherwise. An exact number passes or fails. ValueError if it is not finite.
        """
        ends = ("low", "high") if isinstance(measured, Estimate) else ("real", "real")
        low, high = (float(getattr(measured, end)) for end in ends)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"what is measured must be finite evidence, not [{low}, {high}]")
        if self.low <= low and high <= self.high:
            return "confirmed"
        return "refuted" if high < self.low or low > self.high else "undecided"


def at_least(threshold: float) -> Criterion:
    """Test that a quantity is ``threshold`` or more."""
    return Criterion(threshold, math.inf, f"at least {threshold:g}")


def at_most(threshold: float) -> Criterion:
    """Test that a quantity is ``threshold`` or less."""
    return Criterion(-math.inf, threshold, f"at most {threshold:g}")


def between(low: float, high: float) -> Criterion:
    """Test that a quantity lies in ``[low, high]``: an equivalence test when given an interval."""
    return Criterion(low, high, f"between {low:g} and {high:g}")


def equals(value: float, *, tolerance: float = 0.0) -> Criterion:
    """Test that a quantity equals ``value`` up to an absolute ``tolerance``."""
    within = f" within {tolerance:g}" if tolerance else ""
    return Criterion(value - tolerance, value + tolerance, f"equal to {value:g}{within}")


def holds() -> Criterion:
    """Test that a statement is true."""
    return Criterion(1, 1, "true")


@dataclass(frozen=True)
class Part:
    """One prediction of a claim with its test and what was measured; see :func:`part`."""

    name: str
    prediction: str
    measured: Measured
    criterion: Criterion

    @property
    def verdict(self) -> str:
        """``"confirmed"``, ``"refuted"`` or ``"undecided"``."""
        return self.criterion.judge(self.measured)

    @property
    def evidence(self) -> str:
        """The measured quantity in words, with its interval and the number of samples."""
        if isinstance(self.measured, bool | Estimate):
            return str(self.measured).lower()
        return f"{self.measured:.4g}"

    @property
    def stable_evidence(self) -> str:
        """The part of the evidence that is the same on every machine."""
        if isinstance(self.measured, Estimate):
            share = f"{100 * self.measured.confidence:g}%"
            return f"{share} interval from {self.measured.n} independent samples"
        return self.evidence if isinstance(self.measured, bool | int) else "a computed number"


_CRITERIA: Mapping[str, Callable[..., Criterion]] = {
    "at_least": at_least, "at_most": at_most, "between": lambda ends: between(*ends),
    "equals": equals,
}  # fmt: skip


def part(
    name: str, prediction: str, measured: Any, criterion: Criterion | None = None, **test: Any
) -> Part:
    """State one prediction of a claim.

    Args:
        name: A short name, unique within the claim, such as ``"elementwise"``.
        prediction: What the claim implies here, as a sentence.
        measured: An ``Estimate`` where chance plays a part, else a number or a truth value.
        criterion: The declared test as an object, such as ``at_least(0.05)``.
        **test: The same as a keyword: ``at_least=``, ``at_most=``, ``between=(low, high)`` or
            ``equals=``, the last perhaps with ``tolerance=``. Without any, a truth value must hold.

    Raises:
        TypeError: If the measured quantity is none of these, or not exactly one test is declared.
        ValueError: If an estimate rests on fewer than 30 independent samples, or is not finite.
    """
    measured = measured.item() if hasattr(measured, "item") else measured
    if not isinstance(measured, Measured):
        words = f"part {name!r} measured a {type(measured).__name__}"
        raise TypeError(f"{words}; it must be an Estimate, a number or a truth value")
    if isinstance(measured, Estimate) and measured.n < LEAST_SAMPLES:
        few = f"part {name!r} rests on {measured.n} independent samples"
        raise ValueError(f"{few}; it must rest on at least {LEAST_SAMPLES}")
    options = {"tolerance": test.pop("tolerance")} if {"equals", "tolerance"} <= set(test) else {}
    if criterion is None and not test and isinstance(measured, bool):
        criterion = holds()
    if len(test) + (criterion is not None) != 1 or set(test) - set(_CRITERIA):
        known, given = "=, ".join(_CRITERIA), ", ".join(test) or "none"
        raise TypeError(
            f"part {name!r} must declare one test: {known}= or a criterion; not {given}"
        )
    for key, value in test.items():
        criterion = _CRITERIA[key](value, **options)
    assert criterion is not None
    result = Part(name, prediction, measured, criterion)
    _ = result.verdict
    return result


def combine(verdicts: list[str]) -> str:
    """Return the one verdict of all parts, else ``"depends"`` if some confirm and some refute."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "depends" if {"confirmed", "refuted"} <= set(verdicts) else "undecided"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: a card in a notebook, stable text elsewhere."""

    claim: "Claim"
    verdict: str
    parts: tuple[Part, ...] = ()
    depends_on: str = ""
    sources: tuple[tuple[str, str], ...] = ()
    finding: str = ""

    def __repr__(self) -> str:
        lines = [f"Claim {self.claim.id} ({self.claim.whose})", f"  {self.claim.statement}"]
        lines += [
            f"  {p.verdict:<9}  {p.name}: {p.prediction}. Test: {p.criterion.wording}; "
            f"evidence: {p.stable_evidence}."
            for p in self.parts
        ]
        lines += [f"  source: {label}, {address}" for label, address in self.sources]
        lines += [f"  {self.finding}"] * bool(self.finding)
        return "\n".join([*lines, f"  Verdict: {self.verdict}{self._condition}"])

    @property
    def _condition(self) -> str:
        return f" on {self.depends_on}" if self.depends_on else ""

    def _repr_html_(self) -> str:
        safe, cell = html.escape, _CELL
        rows = "".join(
            f"<tr><td {cell}><b>{safe(p.name)}</b>: {safe(p.prediction)}</td>"
            f'<td {cell}>{safe(p.criterion.wording)}</td><td class="evidence" {cell}>'
            f'{safe(p.evidence)}</td><td {cell}><span style="white-space: nowrap">'
            f"{_MARKS[p.verdict]} {p.verdict}</span></td></tr>"
            for p in self.parts
        )
        names = ("Prediction", "Test", "Evidence", "Verdict")
        heads = "".join(f'<th scope="col" {cell}>{name}</th>' for name in names)
        table = (
            '<div style="overflow-x: auto" tabindex="0" role="region" '
            f'aria-label="Tests of the claim {self.claim.id}">'
            f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
        links = "".join(f'<li><a href="{safe(a)}">{safe(b)}</a></li>' for b, a in self.sources)
        return (
            f'<div class="claim" style="border: 1px solid {_COLORS[self.verdict]}; '
            'border-left-width: .4em; padding: .4em .8em; margin: .6em 0">'
            f"<p><b>Claim</b> <code>{self.claim.id}</code> · {safe(self.claim.whose)}<br>"
            f"{safe(self.claim.statement)}</p>"
            + table * bool(rows)
            + f"<ul>{links}</ul>" * bool(links)
            + f"<p>{safe(self.finding)}</p>" * bool(self.finding)
            + f"<p><b>Verdict: {_MARKS[self.verdict]} {self.verdict}</b>"
            f"{safe(self._condition)}</p></div>"
        )

    def as_record(self) -> dict[str, Any]:
        """Return what the ledger keeps: verdict, condition, and the evidence of each part."""
        record: dict[str, Any] = {"verdict": self.verdict}
        record |= {"depends_on": self.depends_on} if self.depends_on else {}
        if not self.parts:
            evidence = [{"source": label, "url": url} for label, url in self.sources]
            return record | {"evidence": evidence, "finding": self.finding}
        heads = ("part", "prediction", "test", "measured", "verdict")
        rows = (
            (p.name, p.prediction, p.criterion.wording, p.evidence, p.verdict) for p in self.parts
        )
        return record | {"evidence": [dict(zip(heads, row, strict=True)) for row in rows]}

    def agrees_with(self, record: Mapping[str, Any]) -> bool:
        """Whether verdict and the parts' verdicts are the recorded ones."""
        mine, theirs = (
            [e["verdict"], *([p.get(k) for k in _CHECKED] for p in e.get("evidence", []))]
            for e in (self.as_record(), record)
        )
        return mine == theirs


@dataclass(frozen=True)
class Claim:
    """One claim of the ledger; ``id`` never changes, ``chapter`` is a file name without ending.

    ``notes`` are those of the source notes N1 to N5 that make it. When none does, ``source`` says
    whose claim it is, and ``source_url`` where to read it.
    """

    id: str
    chapter: str
    statement: str
    notes: tuple[str, ...] = ()
    source: str = ""
    source_url: str = ""

    @property
    def whose(self) -> str:
        """Who makes the claim, in words."""
        label = "note" if len(self.notes) == 1 else "notes"
        return f"{label} {', '.join(self.notes)}" if self.notes else self.source

    @property
    def recorded(self) -> Mapping[str, Any] | None:
        """The recorded verdict and evidence, or None while the claim is untested."""
        return _records().get(self.id)

    def check(self, *parts: Part, depends_on: str = "") -> Verdict:
        """Judge the claim by its declared tests and compare with the recorded verdict.

        Args:
            *parts: One or more :func:`part`.
            depends_on: On what the verdict depends; needed exactly when parts disagree.

        Returns:
            The verdict, which shows itself as a card when it ends a cell.

        Raises:
            ValueError: If there is no part, two share a name, or ``depends_on`` is missing.
            LedgerMismatchError: In CI and under ``make notebooks``, if the verdict on the claim or
                a part is not the recorded one. Elsewhere a warning says so.
        """
        if not parts:
            raise ValueError(f"claim {self.id!r} must have at least one part to check")
        names = [p.name for p in parts]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each part of {self.id!r} must have a name of its own: {repeated}")
        verdict = combine([p.verdict for p in parts])
        if verdict == "depends" and not depends_on:
            raise ValueError(f"the verdict on {self.id!r} depends: depends_on= must say on what")
        return self._settle(Verdict(self, verdict, parts, depends_on * (verdict == "depends")))

    def cite(self, *sources: tuple[str, str], finding: str) -> Verdict:
        """Settle a claim of history or biology by its sources; the verdict is ``"cited"``.

        Args:
            *sources: Pairs of a label and the full address (DOI or arXiv).
            finding: What the sources say about the claim, in one or two sentences.

        Raises:
            ValueError: If there is no source, or an address is not a full https address.
            LedgerMismatchError: As for :meth:`check`.
        """
        if not sources:
            raise ValueError(f"claim {self.id!r} must have at least one source to cite")
        for label, address in sources:
            if not address.startswith("https://"):
                raise ValueError(f"source {label!r} must be a full https address, not {address!r}")
        return self._settle(Verdict(self, "cited", sources=sources, finding=finding))

    def _settle(self, verdict: Verdict) -> Verdict:
        mode, recorded = _mode(), self.recorded
        if mode == "record":
            records = _records() | {self.id: verdict.as_record()}
            ordered = {known: records[known] for known in claim_ids() if known in records}
            write_whole(_RECORD, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
            return verdict
        if recorded is not None and verdict.agrees_with(recorded):
            return verdict
        known = recorded and f"is recorded as {recorded['verdict']}, but"
        before = known or "has no recorded verdict;"
        message = f"claim {self.id!r} {before} here it is {verdict.verdict}"
        details = "; ".join(f"{p.name}: {p.verdict} ({p.evidence})" for p in verdict.parts)
        if mode == "check":
            raise LedgerMismatchError(f"{message}. {details}")
        warnings.warn(f"{message} (other versions or hardware?). {details}", stacklevel=3)
        return verdict


def _mode() -> str:
    default = "check" if os.environ.get("CI", "").lower() in ("1", "true", "yes") else "notice"
    mode = os.environ.get("RELUBOOK_LEDGER", default)
    if mode not in MODES:
        raise ValueError(f"RELUBOOK_LEDGER must be one of {', '.join(MODES)}, not {mode!r}")
    return mode


def _records() -> dict[str, Any]:
    return json.loads(_RECORD.read_text(encoding="utf-8")) if _RECORD.exists() else {}


@functools.cache
def _data() -> tuple[dict[str, Claim], dict[str, dict[str, str]]]:
    data = tomllib.loads(_DATA.read_text(encoding="utf-8"))
    claims = (Claim(**entry | {"notes": tuple(entry["notes"])}) for entry in data["claims"])
    return {entry.id: entry for entry in claims}, data["notes"]


def claim_ids() -> tuple[str, ...]:
    """Return the ids of all claims, in the ledger's order."""
    return tuple(_data()[0])


def source_notes() -> Mapping[str, Mapping[str, str]]:
    """Return title, English title, author and date of the source notes by label (N1 to N5)."""
    return _data()[1]


def claim(claim_id: str) -> Claim:
    """Return a claim by its id; ValueError names the nearest ids if there is none."""
    known = _data()[0]
    if claim_id not in known:
        close = ", ".join(difflib.get_close_matches(str(claim_id), known, cutoff=0.4)) or "none"
        raise ValueError(f"no claim has the id {claim_id!r}; the nearest are {close}")
    return known[claim_id]


def ledger() -> list[dict[str, Any]]:
    """Return every claim with its facts and its verdict and evidence, None and [] if untested."""
    empty: dict[str, Any] = {"verdict": None, "depends_on": None, "evidence": [], "finding": None}
    records, facts = _records(), ("id", "statement", "chapter", "whose")
    return [
        {fact: getattr(entry, fact) for fact in facts} | empty | records.get(entry.id, {})
        for entry in _data()[0].values()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ledger as a table, or with ``--json`` as a list for programs."""
    parser = argparse.ArgumentParser(prog="python -m relubook claims", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    rows = ledger()
    if parser.parse_args(arguments).json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    print(f"{'id':<25}  {'chapter':<27}  verdict")
    for row in rows:
        print(f"{row['id']:<25}  {row['chapter']:<27}  {row['verdict'] or 'untested':<9}  ", end="")
        print(row["statement"])
    tested = sum(row["verdict"] is not None for row in rows)
    print(f"{tested} of {len(rows)} claims have a verdict")
    return 0
