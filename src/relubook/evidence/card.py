"""The card of a claim, with or without the site's colors: verdict first, a row a part."""

import math
from html import escape
from typing import Any

__all__ = ["KINDS", "card", "number"]

KINDS = {"measured": "measured", "theorem": "theorem, checked", "code": "code fact"}
_MARKS = {"holds": "\u2713", "fails": "\u2717", "open": "?"}


def number(value: float, unit: str, digits: int | None = None) -> str:
    """Write a number for a reader, also infinity: a real minus sign, and no minus zero.

    Three or four significant digits, or ``digits`` after the point; hundredths for % and points.
    """
    value *= 100 if unit in ("%", " points") else 1
    if digits is not None and math.isfinite(value):
        text = f"{value:.{digits}f}"
    else:
        text = f"{value:.3g}" if abs(value) < 10 else f"{value:.4g}"
    if not text.strip("-0."):
        text = text.removeprefix("-")
    return text.replace("-", "\u2212").replace("inf", "\u221e")


def card(verdict: Any, confidence: float) -> str:
    """Return a ``Verdict`` as HTML; the confidence is that of all its intervals together."""
    claim, word = verdict.claim, verdict.word
    body = ""
    for role, head in (("main", ""), ("limit", '<p class="ev-role">Limits</p>')):
        if rows := "".join(_row(part) for part in verdict.parts if part.role == role):
            body += f'{head}<ul class="ev-parts">{rows}</ul>'
    if verdict.sources:
        links = [f'<li><a href="{escape(a)}">{escape(b)}</a></li>' for b, a in verdict.sources]
        body += f"<p>{escape(verdict.finding)}</p><ul>{''.join(links)}</ul>"
    return (
        f'<div class="ev-card ev-{word.replace(", ", "-")}" id="claim-{claim.id}">'
        f'<p class="ev-head"><b class="ev-badge">{word.capitalize()}</b> '
        f'{escape(verdict.condition)}</p><p class="ev-claim">{escape(claim.statement)} '
        f'<span class="ev-notes">{escape(claim.whose)}</span></p>'
        f"{body}{_fold(verdict, confidence)}</div><!--card-->"
    )


def _row(part: Any) -> str:
    return (
        f'<li class="ev-{part.verdict}"><span class="ev-mark" role="img" '
        f'aria-label="{part.verdict}">{_MARKS[part.verdict]}</span>'
        f'<span class="ev-says">{escape(part.sentence)}<small>{escape(part.numbers)}</small>'
        f"</span>{_picture(part)}</li>"
    )


def _fold(verdict: Any, confidence: float) -> str:
    measured = [part for part in verdict.parts if part.sample]
    if not measured:
        return ""
    each = f", each with {100 * verdict.confidence:.4g}% (Bonferroni)" * (len(measured) > 1)
    facts = [f"{p.sentence}: {p.n} networks" + f" ({p.note})" * bool(p.note) for p in measured]
    return (
        "<details><summary>Networks and confidence</summary><p>The intervals of this card hold "
        f"together with {100 * confidence:g}% confidence{each}.</p><ul>"
        f"{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul></details>"
    )


def _picture(part: Any) -> str:
    """Draw the interval over the range that passes, from 0 if the unit has one."""
    if not part.sample:
        return ""
    value, low, high = part.value
    ends = (low, high, part.low, part.high, 0 if part.unit else value)
    shown = [end for end in ends if math.isfinite(end)]
    room = 0.12 * (max(shown) - min(shown) or 1)
    left = min(shown) - room * (part.unit != "%" or min(shown) != 0)
    right = max(shown) + room
    right = min(right, 1.0) if part.unit == "%" else right

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
