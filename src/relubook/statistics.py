"""Intervals, paired comparisons and the size of an experiment: the network is the sample."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from relubook._optional import require

__all__ = ["Estimate", "bootstrap_interval", "mean_interval", "proportion_interval", "scale"]

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A measured quantity with its interval.

    Attributes:
        value: The point estimate, in the unit of the samples.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of independent samples (networks, not units or epochs) behind it.
        confidence: Coverage of the interval, 0.95 unless said otherwise.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n = {self.n})"


def scale(*, quick: T, full: T) -> T:
    """Choose the size of an experiment: ``quick`` in a notebook, ``full`` under ``make full``.

    Args:
        quick: Returned unless the environment variable ``RELUBOOK_SCALE`` is ``full``.
        full: Returned if it is.

    Returns:
        One of the two.

    Raises:
        ValueError: If ``RELUBOOK_SCALE`` is neither ``quick`` nor ``full``.
    """
    wanted = os.environ.get("RELUBOOK_SCALE", "quick")
    if wanted not in ("quick", "full"):
        raise ValueError(f"RELUBOOK_SCALE must be 'quick' or 'full', not {wanted!r}")
    return full if wanted == "full" else quick


def _samples(samples: Sequence[float] | Any, least: int) -> Any:
    np = require("numpy", "intervals")
    values = np.asarray(samples, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"samples must be one-dimensional, not of shape {values.shape}")
    if len(values) < least:
        raise ValueError(f"an interval needs at least {least} samples, not {len(values)}")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{(~np.isfinite(values)).sum()} of {len(values)} samples are not finite: decide how "
            "diverged networks count before asking for an interval"
        )
    return values


def _confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, not {confidence!r}")


def mean_interval(samples: Sequence[float] | Any, *, confidence: float = 0.95) -> Estimate:
    """Return the mean of independent samples with Student's interval.

    Args:
        samples: One number a network, shape (n,), n >= 2.
        confidence: Coverage, strictly between 0 and 1.

    Returns:
        The estimate, in the unit of the samples.

    Raises:
        ValueError: If there are fewer than two samples, or one is NaN or infinite.

    Source:
        ``scipy.stats.t``; exact for normal samples.
    """
    _confidence(confidence)
    stats = require("scipy.stats", "intervals")
    values = _samples(samples, 2)
    mean, error = values.mean(), stats.sem(values)
    low, high = (mean, mean) if error == 0 else stats.t.interval(
        confidence, len(values) - 1, loc=mean, scale=error
    )
    return Estimate(float(mean), float(low), float(high), len(values), confidence)


def proportion_interval(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Return a share with Clopper and Pearson's exact interval.

    Args:
        successes: How many of the independent trials succeeded.
        n: Number of independent trials, at least 1.
        confidence: Coverage, strictly between 0 and 1.

    Returns:
        The estimate; after 0 successes its upper end is about ``3.7 / n`` (two-sided).

    Raises:
        ValueError: If not ``0 <= successes <= n`` with ``n >= 1``.

    Source:
        Clopper and Pearson 1934, through ``statsmodels``.
    """
    _confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, not {successes} of {n}")
    proportion = require("statsmodels.stats.proportion", "intervals of proportions")
    low, high = proportion.proportion_confint(successes, n, 1 - confidence, method="beta")
    return Estimate(successes / n, float(low), float(high), n, confidence)


def bootstrap_interval(
    samples: Sequence[float] | Any,
    statistic: Callable[..., Any] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Estimate:
    """Return a statistic of independent samples with a percentile bootstrap interval.

    Args:
        samples: One number a network or repeat, shape (n,), n >= 2.
        statistic: Takes an array and ``axis=``; the median if None.
        confidence: Coverage, strictly between 0 and 1.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The estimate, in the unit of the statistic.

    Raises:
        ValueError: If there are fewer than two samples, or one is NaN or infinite.

    Source:
        Efron 1979, through ``scipy.stats.bootstrap``.
    """
    _confidence(confidence)
    np = require("numpy", "intervals")
    stats = require("scipy.stats", "intervals")
    values = _samples(samples, 2)
    statistic = np.median if statistic is None else statistic
    result = stats.bootstrap(
        (values,),
        statistic,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    center = float(statistic(values, axis=0))
    return Estimate(center, float(interval.low), float(interval.high), len(values), confidence)
