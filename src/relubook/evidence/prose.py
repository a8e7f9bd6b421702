"""Stated numbers, on any machine: a text is contradicted by an interval, never by last digits.

Training is chaotic, so that another processor gives other networks.
"""

import math

from relubook._optional import require
from relubook.evidence.statistics import Samples, check_confidence

__all__ = ["interval", "says"]

CONFIDENCE = 0.999
Range = tuple[float, float] | None
FEW = 5  # fewer networks than this differ from a common value: only an exact bound will do


def interval(
    samples: Samples, *, confidence: float = CONFIDENCE, within: Range = (0, 1)
) -> tuple[float, float, float]:
    """Return the mean of independent samples and both ends of its interval.

    Truth values get Clopper and Pearson's exact interval, numbers Student's, corrected by Hall's
    cubic transformation: shares of dead units are skewed, and Student's alone misses their mean
    up to 20 times too often. Where fewer than 5 samples differ from a common value c, Student's
    may have no width. The mean then lies at most P(X != c) of the way from c to an end of the
    range, and P has an exact bound: with 0 of n it is ``1 - (1 - confidence) ** (1 / n)``.

    Args:
        samples: One finite number or truth value a network, shape (n,), n >= 1; else ValueError.
        confidence: Coverage, strictly between 0 and 1; else ValueError.
        within: The least and the greatest value possible, else ValueError; None if unbounded.

    Returns mean, lower and upper end; the ends are infinite where nothing is known.

    Source: Hall 1992, https://doi.org/10.1111/j.2517-6161.1992.tb01872.x
    """
    np, stats = require("numpy", "intervals"), require("scipy.stats", "intervals")
    x, alpha = np.asarray(samples), 1 - confidence
    if x.ndim != 1 or not len(x):
        raise ValueError(f"samples must be one value a network, shape (n,), not {x.shape}")
    check_confidence(confidence)
    truths, x, n = x.dtype == bool, x.astype(float), len(x)
    if bad := int((~np.isfinite(x)).sum()):
        raise ValueError(f"{bad} of {n} samples are not finite: say by nonfinite= how they count")
    low, high = within or (-math.inf, math.inf)
    if x.min() < low or x.max() > high:
        raise ValueError(f"samples from {x.min():g} to {x.max():g} lie outside within={within}")
    mean = float(x.mean())
    if truths:
        exact = stats.binomtest(int(x.sum()), n).proportion_ci(confidence, method="exact")
        return mean, float(exact.low), float(exact.high)
    values, counts = np.unique(x.astype("float32"), return_counts=True)  # last digits aside
    common, differ = float(values[counts.argmax()]), n - int(counts.max())
    if differ < FEW:
        most = float(stats.beta.ppf(confidence, differ + 1, n - differ))
        return mean, common + most * (low - common), common + most * (high - common)
    skew = float(stats.skew(x, bias=False)) / math.sqrt(n)
    t = stats.t.ppf([1 - alpha / 2, alpha / 2], n - 1)
    if abs(skew) > 1e-9:
        t = 3 / skew * (np.cbrt(1 + skew * (t - skew / 6)) - 1)
    ends = mean - float(stats.sem(x)) * t
    return mean, max(low, float(ends[0])), min(high, float(ends[1]))


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
        samples, within: As for :func:`interval`.
        words: What the text says, such as ``"about half"``.
        low, high: Least and greatest mean that a reader understands by it; may be infinite, but
            ValueError if nothing could contradict them.
        nonfinite: The number that NaN and infinity count as, or ``"omit"``; None refuses them.
    """
    np = require("numpy", "intervals")
    least, most = within or (-math.inf, math.inf)
    if not low <= high or (low <= least and most <= high):
        raise ValueError(f"{words!r} must leave out something of {within}, not say {low} to {high}")
    x = np.asarray(samples)
    if nonfinite is not None and not (finite := np.isfinite(x)).all():
        x = x[finite] if nonfinite == "omit" else np.where(finite, x, float(nonfinite))
    mean, a, b = interval(x, within=within)
    if b < low or a > high:
        found = f"the mean is {mean:.3g}, its 99.9% interval {a:.3g} to {b:.3g}"
        raise AssertionError(f"the text says {words!r}, {low:g} to {high:g}; {found}")
