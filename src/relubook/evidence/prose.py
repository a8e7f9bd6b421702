"""Stated numbers, on any machine: a text is contradicted by an interval, never by last digits."""

import math

from relubook.evidence.statistics import Range, Samples, finite_samples, interval

__all__ = ["says"]


def says(
    samples: Samples,
    words: str,
    low: float,
    high: float,
    *,
    within: Range = (0, 1),
    nonfinite: float | str | None = None,
) -> None:
    """Let samples contradict what a text says of their mean, and nothing less than contradict it.

    A statement about a median is one about a share: ``says(x < 0.2, "most below 0.2", 0.5, 1)``;
    one about two ways of training is one about the differences of twins, within=(-1, 1).
    AssertionError only if the whole 99.9% interval of the mean lies outside ``low`` to ``high``.

    Args:
        samples, within: As for :func:`~relubook.evidence.statistics.interval`.
        words, low, high: What the text says, such as ``"about half"``, and the least and greatest
            mean that a reader understands by it; ValueError if nothing could contradict them.
        nonfinite: The number that NaN and infinity count as, or ``"omit"``; None refuses them.
    """
    least, most = within or (-math.inf, math.inf)
    if not low <= high or (low <= least and most <= high):
        raise ValueError(f"{words!r} must leave out something of {within}, not say {low} to {high}")
    x, _ = finite_samples(samples, nonfinite)
    mean, a, b = interval(x, confidence=0.999, within=within)
    if b < low or a > high:
        found = f"the mean is {mean:.3g}, its 99.9% interval {a:.3g} to {b:.3g}"
        raise AssertionError(f"the text says {words!r}, {low:g} to {high:g}; {found}")
