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
__all__ += ["between", "claim", "equals", "holds", "ledger", "part"]

LEAST_SAMPLES = 30

_DATA = Path(__file__).with_name("claims.toml")
_RECORD = _DATA.with_name("verdicts.json")
_MARKS = {"confirmed": "✓", "refuted": "✗", "depends": "±", "undecided": "?", "cited": "❝"}
_COLORS = {"confirmed": "#0072B2", "refuted": "#D55E00", "depends": "#CC79A7"}
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
        """Return ``"confirmed"``, ``"refuted"`` or, of an interval, perhaps ``"undecided"``.

        An interval confirms when all of it lies inside the range, and refutes when all of it lies
        outside on one side. ValueError if the measured quantity is not finite.
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
        measured: An ``Estimate`` where chance plays a part, of 30 independent samples or more (else
            ValueError), or a number or a truth value; it must be finite.
        criterion: The declared test, such as ``at_least(0.05)``; TypeError unless there is one.
        **test: The same as a keyword: ``at_least=``, ``at_most=``, ``between=(low, high)`` or
            ``equals=``, the last perhaps with ``tolerance=``. Without any, a truth value must hold.
    """
    measured = measured.item() if hasattr(measured, "item") else measured
    if not isinstance(measured, Measured):
        wrong = type(measured).__name__
        raise TypeError(f"part {name!r} measured a {wrong}, not an Estimate, number or truth value")
    if isinstance(measured, Estimate) and measured.n < LEAST_SAMPLES:
        few = f"part {name!r} rests on {measured.n} independent samples"
        raise ValueError(f"{few}; it must rest on at least {LEAST_SAMPLES}")
    options = {"tolerance": test.pop("tolerance")} if {"equals", "tolerance"} <= set(test) else {}
    tests = [criterion] if criterion else []
    if not (test or tests) and isinstance(measured, bool):
        tests = [holds()]
    if len(test) + len(tests) != 1 or set(test) - set(_CRITERIA):
        known, given = "=, ".join([*_CRITERIA, "criterion"]), ", ".join(test) or "none"
        raise TypeError(f"part {name!r} must declare one test: {known}=; not {given}")
    tests += [_CRITERIA[key](value, **options) for key, value in test.items()]
    tests[0].judge(measured)
    return Part(name, prediction, measured, tests[0])


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
        names = ("Prediction", "Test", "Evidence", "Verdict")
        heads = "".join(f'<th scope="col" {cell}>{name}</th>' for name in names)
        rows = "".join(
            f"<tr><td {cell}><b>{safe(p.name)}</b>: {safe(p.prediction)}</td>"
            f'<td {cell}>{safe(p.criterion.wording)}</td><td class="evidence" {cell}>'
            f'{safe(p.evidence)}</td><td {cell}><span style="white-space: nowrap">'
            f"{_MARKS[p.verdict]} {p.verdict}</span></td></tr>"
            for p in self.parts
        )
        links = "".join(f'<li><a href="{safe(a)}">{safe(b)}</a></li>' for b, a in self.sources)
        table = (
            '<div style="overflow-x: auto" tabindex="0" role="region" '
            f'aria-label="Tests of the claim {self.claim.id}">'
            f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
        return (
            f'<div class="claim" style="border: 1px solid {_COLORS.get(self.verdict, "#999999")}; '
            'border-left-width: .4em; padding: .4em .8em; margin: .6em 0">'
            f"<p><b>Claim</b> <code>{self.claim.id}</code> · {safe(self.claim.whose)}<br>"
            f"{safe(self.claim.statement)}</p>"
            f"{table if rows else ''}{f'<ul>{links}</ul>' if links else ''}"
            f"{f'<p>{safe(self.finding)}</p>' if self.finding else ''}"
            f"<p><b>Verdict: {_MARKS[self.verdict]} {self.verdict}</b>"
            f"{safe(self._condition)}</p></div>"
        )

    def as_record(self) -> dict[str, Any]:
        """Return what the ledger keeps: verdict, condition, and the evidence of each part."""
        evidence = [{"source": label, "url": url} for label, url in self.sources]
        for p in self.parts:
            facts = {"part": p.name, "prediction": p.prediction, "test": p.criterion.wording}
            evidence.append(facts | {"measured": p.evidence, "verdict": p.verdict})
        record = {"verdict": self.verdict, "depends_on": self.depends_on, "evidence": evidence}
        return {key: fact for key, fact in (record | {"finding": self.finding}).items() if fact}


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

    def check(self, *parts: Part, depends_on: str = "") -> Verdict:
        """Judge the claim by its declared tests and compare with the recorded verdict.

        Args:
            *parts: One or more :func:`part`, each with a name of its own; ValueError otherwise.
            depends_on: On what the verdict depends; ValueError if it is missing and parts disagree.

        Returns:
            The verdict, which shows itself as a card when it ends a cell. If it is not the recorded
            one, or a part's is not, LedgerMismatchError is raised in CI and under
            ``make notebooks``; elsewhere a warning says so.
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
            *sources: Pairs of a label and the full https address (DOI or arXiv); else ValueError.
            finding: What the sources say about the claim, in one or two sentences.
        """
        if not sources:
            raise ValueError(f"claim {self.id!r} must have at least one source to cite")
        for label, address in sources:
            if not address.startswith("https://"):
                raise ValueError(f"source {label!r} must be a full https address, not {address!r}")
        return self._settle(Verdict(self, "cited", sources=sources, finding=finding))

    def _settle(self, verdict: Verdict) -> Verdict:
        default = "check" if os.environ.get("CI", "").lower() in ("1", "true", "yes") else "notice"
        mode, records = os.environ.get("RELUBOOK_LEDGER", default), _records()
        if mode not in ("check", "record", "notice"):
            raise ValueError(f"RELUBOOK_LEDGER must be one of check, record, notice, not {mode!r}")
        old, new = records.get(self.id), verdict.as_record()
        if mode == "record":
            records[self.id] = new
            ordered = {known: records[known] for known in _data()[0] if known in records}
            write_whole(_RECORD, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
            return verdict
        if old and _checked(old) == _checked(new):
            return verdict
        before = f"is recorded as {old['verdict']}, but" if old else "has no recorded verdict;"
        details = "; ".join(f"{p.name}: {p.verdict} ({p.evidence})" for p in verdict.parts)
        message = f"claim {self.id!r} {before} here it is {verdict.verdict}"
        if mode == "check":
            raise LedgerMismatchError(f"{message}. {details}")
        warnings.warn(f"{message} (other versions or hardware?). {details}", stacklevel=3)
        return verdict


def _checked(record: Mapping[str, Any]) -> list[Any]:
    """Return what must stay of a record: the verdict, and of each part test and verdict."""
    keys = ("part", "test", "verdict", "url")
    return [record["verdict"], *([p.get(k) for k in keys] for p in record.get("evidence", []))]


def _records() -> dict[str, Any]:
    return json.loads(_RECORD.read_text(encoding="utf-8")) if _RECORD.exists() else {}


@functools.cache
def _data() -> tuple[dict[str, Claim], dict[str, dict[str, str]]]:
    data = tomllib.loads(_DATA.read_text(encoding="utf-8"))
    claims = (Claim(**entry | {"notes": tuple(entry["notes"])}) for entry in data["claims"])
    return {entry.id: entry for entry in claims}, data["notes"]


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
