"""The ledger: what is claimed, how each claim is put to the test, and the verdict re-checked.

An evidence notebook hands in raw samples, one number a network, and gets a verdict and its card::

    claim("outlier-kills").check(
        main=part("an outlier kills a unit in 32", shares, at_least=1 / 32),
        limits=[part("centered too", centered, at_least=1 / 32, but="not on centered data")],
    )

*Main* is the claim at its author's own strength, *limits* are what a reader should know besides.
All intervals of a card hold together with 99% confidence (Bonferroni), and so do its words.
"""

import difflib
import functools
import json
import math
import os
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from relubook._files import write_whole
from relubook._optional import require
from relubook.evidence.statistics import Range, finite_samples, interval

__all__ = ["WORDS", "Claim", "Part", "Verdict", "claim", "ledger", "part"]

WORDS = ("true", "true, but", "false", "undecided", "cited", "untested")
CONFIDENCE = 0.99
LEAST_SAMPLES = 30

KINDS = {"measured": "measured", "theorem": "theorem, checked", "code": "code fact"}
_MARKS = {"holds": "\u2713", "fails": "\u2717", "open": "?"}
_DATA = Path(__file__).with_name("claims.toml")
_RECORD = _DATA.with_name("verdicts.json")


@dataclass(frozen=True)
class Part:
    """One condition of a claim, and how it came out; see :func:`part`.

    ``low`` to ``high`` is what passes; ``samples`` are what ``n`` counts; ``value`` is estimate,
    lower and upper end; ``role`` is main or limit, ``verdict`` holds, fails or open.
    """

    sentence: str
    needs: str
    low: float
    high: float
    kind: str
    but: str
    unit: str
    sample: Callable[[float], tuple[float, float, float]] | None
    n: int
    note: str
    samples: str = "networks"
    value: tuple[float, float, float] = (math.nan,) * 3
    role: str = ""
    verdict: str = ""

    def judged(self, role: str, confidence: float) -> "Part":
        """Return the part with its interval at the corrected level, and its verdict."""
        value = self.sample(confidence) if self.sample else self.value
        _, low, high = value
        verdict = "open"
        if self.sample is None or self.n >= LEAST_SAMPLES:
            if self.low <= low and high <= self.high:
                verdict = "holds"
            elif high < self.low or low > self.high:
                verdict = "fails"
        return replace(self, role=role, value=value, verdict=verdict)

    @property
    def numbers(self) -> str:
        """What was found, for a reader: 8.1% (6.8 to 9.5), needs at least 5%."""
        if not self.sample:
            return KINDS[self.kind] + (f", {self.needs}" if self.needs != "holds" else "")
        spread = (self.value[2] - self.value[1]) * (100 if self.unit in ("%", " points") else 1)
        digits: int | None = None  # significant ones
        if spread >= 8:
            digits = 0
        elif spread >= 0.2:
            digits = 1
        elif spread >= 0.02:
            digits = 2
        elif spread >= 0.0002:
            digits = 4
        value, low, high = (number(v, self.unit, digits) for v in self.value)
        return f"{value}{self.unit} ({low} to {high}), {self.needs}"


def part(
    sentence: str,
    samples: Any = None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    between: tuple[float, float] | None = None,
    equals: float | None = None,
    holds: bool | None = None,
    kind: str = "measured",
    but: str = "",
    within: Range = (0, 1),
    nonfinite: float | str | None = None,
    unit: str | None = None,
    each: str = "networks",
) -> Part:
    """State one condition of a claim: what it is judged on, and exactly one criterion.

    Args:
        sentence: What is so if the part holds.
        samples: If measured: one number or truth value a network, n >= 30, or a function from the
            confidence to estimate, low, high and n. Else the number to compare.
        at_least, at_most, between, equals, holds: The criterion, ends included. ``holds`` takes a
            truth itself; it and ``equals`` are for theorems and code facts.
        kind: "measured", "theorem" (proved in the text, checked here) or "code" (what software
            returns). Only measured parts have intervals and count as evidence about training.
        but: What the verdict says if this limit does not hold: "not on centered data".
        within: The values that a sample can have: (0, 1) for shares, (-1, 1) for differences of
            shares, None if unbounded; without bounds, samples that are all alike settle nothing.
        nonfinite: How NaN and infinity count, decided before the run: "omit" or a number.
        unit: By default "%" for shares, " points" for their differences, none without bounds.
        each: What the samples are, in the plural, where these are no networks: "rounds".

    Raises ValueError unless there is one criterion that suits the kind, at least 30 samples, one
    number each, within their bounds, and a stated role for those that are not finite.
    """
    criteria: dict[str, Any] = {"at least": at_least, "at most": at_most, "between": between}
    criteria |= {"exactly": equals, "holds": holds}
    given = [pair for pair in criteria.items() if pair[1] is not None]
    if len(given) != 1 or kind not in KINDS:
        raise ValueError(f"{sentence!r} needs one criterion, and a kind of {', '.join(KINDS)}")
    [(name, limit)] = given
    measured = kind == "measured"
    if measured and name in ("holds", "exactly"):
        raise ValueError(f"{sentence!r}: a sample has an interval; give a range, or another kind")
    if samples is None and name != "holds":
        raise ValueError(f"{sentence!r} must say what it is judged on")
    passes = {"at least": (limit, math.inf), "at most": (-math.inf, limit), "between": limit}
    passes |= {"exactly": (limit, limit), "holds": (1, 1)}
    low, high = map(float, passes[name])
    if not low <= high:
        raise ValueError(f"{sentence!r}: {name} {limit} leaves nothing that could pass")
    if unit is None:
        unit = ""
        if measured and within is not None:
            unit = "%" if within[0] >= 0 else " points"
    shown = " and ".join(number(v, unit) for v in dict.fromkeys((low, high)) if math.isfinite(v))
    needs = "holds" if name == "holds" else f"needs {name} {shown}{'%' * (unit == '%')}"
    state = functools.partial(Part, sentence, needs, low, high, kind, but, unit)
    if not measured:
        value = float(bool(limit) if name == "holds" else samples)
        return state(None, 1, "", each, (value, value, value))
    if callable(samples):
        return state(lambda level: samples(level)[:3], int(samples(0.95)[3]), "", each)
    if (count := len(require("numpy", "intervals").asarray(samples))) < LEAST_SAMPLES:
        raise ValueError(f"{sentence!r} rests on {count} {each}; it needs {LEAST_SAMPLES}")
    x, bad = finite_samples(samples, nonfinite)

    def sample(level: float) -> tuple[float, float, float]:
        nothing = (math.nan, -math.inf, math.inf)
        return interval(x, confidence=level, within=within) if len(x) else nothing

    sample(0.95)  # raises if one lies outside of the bounds
    how = "left out" if nonfinite == "omit" else f"counted as {nonfinite}"
    return state(sample, len(x), f"{bad} without a finite value, {how}" if bad else "", each)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: a card in a notebook, and text that is the same on every machine."""

    claim: "Claim"
    word: str
    condition: str = ""
    parts: tuple[Part, ...] = ()
    confidence: float = CONFIDENCE
    sources: tuple[tuple[str, str], ...] = ()
    finding: str = ""

    def __repr__(self) -> str:
        lines = [f"{self.claim.id}: {self.word.upper()}{self.condition and '; '}{self.condition}"]
        for p in self.parts:
            lines.append(f"  {p.role} {p.verdict}: {p.sentence}; {p.needs} ({KINDS[p.kind]})")
        lines += [f"  source: {label}, {address}" for label, address in self.sources]
        return "\n".join(lines + [f"  {self.finding}"] * bool(self.finding))

    def _repr_html_(self) -> str:
        """Return the card, with or without the site's colors: verdict first, a row a part."""
        body = ""
        for role, head in (("main", ""), ("limit", '<p class="ev-role">Limits</p>')):
            if rows := "".join(_row(part) for part in self.parts if part.role == role):
                body += f'{head}<ul class="ev-parts">{rows}</ul>'
        if self.sources:
            links = [f'<li><a href="{escape(a)}">{escape(b)}</a></li>' for b, a in self.sources]
            body += f"<p>{escape(self.finding)}</p><ul>{''.join(links)}</ul>"
        return (
            f'<div class="ev-card ev-{self.word.replace(", ", "-")}" id="claim-{self.claim.id}">'
            f'<p class="ev-head"><b class="ev-badge">{self.word.capitalize()}</b> '
            f'{escape(self.condition)}</p><p class="ev-claim">{escape(self.claim.statement)} '
            f'<span class="ev-notes">{escape(self.claim.whose)}</span></p>'
            f"{body}{_fold(self)}</div><!--card-->"
        )

    def record(self) -> dict[str, Any]:
        """Return what the ledger keeps: word, condition, and how each part came out."""
        facts = ("role", "verdict", "kind", "sentence", "needs", "numbers", "n", "note")
        parts = [{key: getattr(p, key) for key in facts} for p in self.parts]
        cited = {"sources": [list(pair) for pair in self.sources], "finding": self.finding}
        evidence = {"parts": parts} if parts else cited
        return {"verdict": self.word, "condition": self.condition, **evidence}


@dataclass(frozen=True)
class Claim:
    """One claim of the ledger; ``id`` never changes, ``chapter`` is a file name without ending.

    ``notes`` are those of N1 to N5 that make it; if none does, ``source`` and its URL say who does.
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

    def check(self, main: Part | Sequence[Part], limits: Sequence[Part] = ()) -> Verdict:
        """Judge the claim, and compare the verdict with the recorded one.

        A main part that fails makes the claim *false*, one that is open *undecided*. If all hold it
        is *true*, or *true, but* as long as a limit does not hold. The verdict is shown as a card.

        Args:
            main: The claim at its own strength; of several parts all are needed.
            limits: What a reader should know besides, each with the ``but=`` of its failure.

        Raises ValueError if there is no main part, a limit lacks its ``but=``, or a sentence
        repeats; AssertionError in CI and under ``make notebooks`` (else a warning) if the verdict
        or a part that was decided is not as recorded (in ``RELUBOOK_VERDICTS``, if set).
        """
        main = [main] if isinstance(main, Part) else list(main)
        sentences = [p.sentence for p in (*main, *limits)]
        if not main or not all(p.but for p in limits) or len(set(sentences)) < len(sentences):
            needs = "a main part, each limit its but=, each part its own sentence"
            raise ValueError(f"{self.id!r} needs {needs}")
        measured = sum(p.sample is not None for p in (*main, *limits))
        level = 1 - (1 - CONFIDENCE) / max(measured, 1)
        main = [p.judged("main", level) for p in main]
        limits = [p.judged("limit", level) for p in limits]
        failed = [p.but or f"not so: {p.sentence}" for p in main if p.verdict == "fails"]
        unsettled = [f"not settled: {p.sentence}" for p in main if p.verdict == "open"]
        buts = [p.but for p in limits if p.verdict == "fails"]
        buts = buts or [f"perhaps {p.but}" for p in limits if p.verdict == "open"]
        outcomes = {"false": failed, "undecided": unsettled, "true, but": buts}
        word = next((word for word, reasons in outcomes.items() if reasons), "true")
        condition = "; ".join(outcomes.get(word, []))
        return self._settle(Verdict(self, word, condition, (*main, *limits), level))

    def cite(self, *sources: tuple[str, str], finding: str) -> Verdict:
        """Settle a claim by sources and what they found, in a sentence or two: it is *cited*.

        Sources are pairs of a label and a full https address, at least one; else ValueError.
        """
        if not sources:
            raise ValueError(f"claim {self.id!r} must have at least one source to cite")
        for label, address in sources:
            if not address.startswith("https://"):
                raise ValueError(f"source {label!r} must be a full https address, not {address!r}")
        return self._settle(Verdict(self, "cited", sources=sources, finding=finding))

    def _settle(self, verdict: Verdict) -> Verdict:
        default = "check" if os.environ.get("CI", "").lower() in ("1", "true", "yes") else "notice"
        mode = os.environ.get("RELUBOOK_LEDGER", default)
        if mode not in ("check", "record", "notice"):
            raise ValueError(f"RELUBOOK_LEDGER must be one of check, record, notice, not {mode!r}")
        path, records = _records()
        old, new = records.get(self.id), verdict.record()
        if mode == "record":
            records[self.id] = new
            ordered = {known: records[known] for known in _claims() if known in records}
            write_whole(path, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
            return verdict
        if old and not _contradicts(old, new):
            return verdict
        before = f"is recorded as {old['verdict']}, but" if old else "has no recorded verdict;"
        message = f"claim {self.id!r} {before} here it is {verdict.word}"
        details = "; ".join(f"{p.verdict}: {p.sentence}, {p.numbers}" for p in verdict.parts)
        if mode == "check":
            raise AssertionError(f"{message}. {details}")
        warnings.warn(f"{message} (other versions or hardware?). {details}", stacklevel=3)
        return verdict


def _contradicts(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a verdict is another one; a limit that chance leaves open here or there is none."""

    def stated(record: Mapping[str, Any]) -> list[Any]:
        parts = [[p[key] for key in ("role", "sentence", "needs")] for p in record.get("parts", [])]
        return [parts, record.get("sources")]

    pairs = zip(old.get("parts", []), new.get("parts", []), strict=False)
    flipped = any({a["verdict"], b["verdict"]} == {"holds", "fails"} for a, b in pairs)
    words = old["verdict"].partition(",")[0] != new["verdict"].partition(",")[0]
    return words or flipped or stated(old) != stated(new)


def _records() -> tuple[Path, dict[str, Any]]:
    path = Path(os.environ.get("RELUBOOK_VERDICTS") or _RECORD)
    return path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@functools.cache
def _claims() -> dict[str, Claim]:
    data = tomllib.loads(_DATA.read_text(encoding="utf-8"))["claims"]
    claims = (Claim(**entry | {"notes": tuple(entry["notes"])}) for entry in data)
    return {entry.id: entry for entry in claims}


def claim(claim_id: str) -> Claim:
    """Return a claim by its id; ValueError names the nearest ids if there is none."""
    known = _claims()
    if claim_id not in known:
        close = ", ".join(difflib.get_close_matches(str(claim_id), known, cutoff=0.4)) or "none"
        raise ValueError(f"no claim has the id {claim_id!r}; the nearest are {close}")
    return known[claim_id]


def ledger() -> list[dict[str, Any]]:
    """Return every claim with its facts, its verdict (*untested* without any) and its parts."""
    empty = {"verdict": "untested", "condition": "", "parts": [], "sources": [], "finding": ""}
    _, records = _records()
    rows = []
    for entry in _claims().values():
        facts = {k: getattr(entry, k) for k in ("id", "statement", "chapter", "whose")}
        rows.append(facts | {"notes": list(entry.notes)} | empty | records.get(entry.id, {}))
    return rows


def number(value: float, unit: str, digits: int | None = None) -> str:
    """Write a number for a reader, also infinity: a real minus sign, and no minus zero.

    Three or four significant digits, or ``digits`` after the point; hundredths for % and points.
    """
    value *= 100 if unit in ("%", " points") else 1
    if digits is not None:
        text = f"{value:.{digits}f}"
    else:
        text = f"{value:.3g}" if abs(value) < 10 else f"{value:.4g}"
    if not text.strip("-0."):
        text = text.removeprefix("-")
    return text.replace("-", "\u2212").replace("inf", "\u221e")


def _row(part: Part) -> str:
    return (
        f'<li class="ev-{part.verdict}"><span class="ev-mark" role="img" '
        f'aria-label="{part.verdict}">{_MARKS[part.verdict]}</span>'
        f'<span class="ev-says">{escape(part.sentence)}<small>{escape(part.numbers)}</small>'
        f"</span>{_picture(part)}</li>"
    )


def _fold(verdict: Verdict) -> str:
    measured = [part for part in verdict.parts if part.sample]
    if not measured:
        return ""
    each = f", each with {100 * verdict.confidence:.4g}% (Bonferroni)" * (len(measured) > 1)
    facts = [f"{p.sentence}: {p.n} {p.samples}" + f" ({p.note})" * bool(p.note) for p in measured]
    return (
        "<details><summary>Samples and confidence</summary><p>The intervals of this card hold "
        f"together with {100 * CONFIDENCE:g}% confidence{each}.</p><ul>"
        f"{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul></details>"
    )


def _picture(part: Part) -> str:
    """Draw the interval over the range that passes, from 0 if the unit has one."""
    if not part.sample:
        return ""
    value, low, high = part.value
    ends = (low, high, part.low, part.high, 0 if part.unit else value)
    shown = [end for end in ends if math.isfinite(end)]
    room = 0.12 * (max(shown) - min(shown) or 1)
    left = min(shown) - room * (part.unit != "%" or min(shown) != 0)
    right = min(max(shown) + room, 1.0 if part.unit == "%" else math.inf)

    def x(v: float) -> float:
        return round(4 + 152 * (min(max(v, left), right) - left) / (right - left), 1)

    edges = "".join(f"M{x(v)} 0V22" for v in (part.low, part.high) if math.isfinite(v))
    zero = f"M{x(0)} 16V22" if left <= 0 <= right else ""
    return (
        '<svg class="ev-svg" viewBox="0 0 160 22" width="160" height="22" aria-hidden="true">'
        f'<rect class="ev-pass" fill="#009e73" fill-opacity=".2" x="{x(part.low)}" '
        f'width="{x(part.high) - x(part.low):.1f}" height="22"/>'
        f'<path class="ev-edge" stroke="#00735a" stroke-dasharray="2 2" d="{edges}"/>'
        f'<path class="ev-axis" stroke="#999" d="M4 21.5H156{zero}"/>'
        f'<path class="ev-bar" stroke="#222" stroke-width="3" '
        f'd="M{x(low)} 10H{max(x(high), x(low) + 1)}"/>'
        f'<circle class="ev-dot" fill="#222" cx="{x(value)}" cy="10" r="4.5"/></svg>'
    )
