"""Intervals, paired comparisons and the size of an experiment: the network is the sample."""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from relubook._optional import require

__all__ = [
    "Comparison",
    "Comparisons",
    "Equivalence",
    "Estimate",
    "bootstrap_interval",
    "compare_paired",
    "equivalence",
    "mean_difference",
    "mean_interval",
    "median_interval",
    "paired_interval",
    "proportion_difference",
    "proportion_interval",
    "scale",
]

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
        coverage = "" if self.confidence == 0.95 else f", {100 * self.confidence:.4g}%"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n = {self.n}{coverage})"


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
    low, high = (
        (mean, mean)
        if error == 0
        else stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error)
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


def median_interval(samples: Sequence[float] | Any, *, confidence: float = 0.95) -> Estimate:
    """Return the median of independent samples with an interval that assumes no distribution.

    Args:
        samples: One number a network, shape (n,), n >= 6 at 95%.
        confidence: Coverage, strictly between 0 and 1; the interval's is this or more.

    Returns:
        The estimate; its ends are two of the samples.

    Raises:
        ValueError: If there are too few samples for that coverage, or one is NaN or infinite.

    Source:
        The sign test turned round, through ``scipy.stats.quantile_test``.
    """
    _confidence(confidence)
    np = require("numpy", "intervals")
    stats = require("scipy.stats", "intervals")
    values = _samples(samples, 2)
    middle = float(np.median(values))
    interval = stats.quantile_test(values, q=middle, p=0.5).confidence_interval(confidence)
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        raise ValueError(
            f"{len(values)} samples are too few for an interval of the median at {confidence:g}"
        )
    return Estimate(middle, float(interval.low), float(interval.high), len(values), confidence)


def paired_interval(
    first: Sequence[float] | Any, second: Sequence[float] | Any, *, confidence: float = 0.95
) -> Estimate:
    """Return the mean difference of two remedies tried on the same seeds.

    Truth values (collapsed or not) give the difference of the two shares with the adjusted
    interval of Bonett and Price, which holds its level for few samples and shares near 0 too;
    numbers give Student's interval of the differences.

    Args:
        first: One number or truth value a network, shape (n,), n >= 2.
        second: The same networks (seeds) under the other remedy, shape (n,).
        confidence: Coverage, strictly between 0 and 1.

    Returns:
        The estimate of ``first - second``.

    Raises:
        ValueError: If the lengths differ, there are fewer than two, or one is NaN or infinite.

    Source:
        Bonett and Price 2012, https://doi.org/10.3102/1076998611411915
    """
    _confidence(confidence)
    a, b, truths = _pair(first, second)
    if not truths:
        return mean_interval(a - b, confidence=confidence)
    stats = require("scipy.stats", "intervals")
    n = len(a)
    only_a, only_b = float(((a == 1) & (b == 0)).sum()), float(((a == 0) & (b == 1)).sum())
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    reach = stats.norm.ppf((1 + confidence) / 2) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = max(-1.0, p - q - reach), min(1.0, p - q + reach)
    return Estimate((only_a - only_b) / n, float(low), float(high), n, confidence)


def mean_difference(
    first: Sequence[float] | Any, second: Sequence[float] | Any, *, confidence: float = 0.95
) -> Estimate:
    """Return the difference of two means from independent groups, with Welch's interval.

    For groups that chance has formed, such as networks that rest at a kink and networks that do
    not. Where the same seeds stand behind both, :func:`paired_interval` is the sharper one.

    Args:
        first: One number a network, shape (n,), n >= 2.
        second: One number a network of the other group, shape (m,), m >= 2.
        confidence: Coverage, strictly between 0 and 1.

    Returns:
        The estimate of first minus second; its ``n`` is the smaller of n and m.

    Raises:
        ValueError: If a group has fewer than two samples, or one is NaN or infinite.

    Source:
        Welch 1947, through ``statsmodels``.
    """
    _confidence(confidence)
    weighted = require("statsmodels.stats.weightstats", "intervals of differences")
    a, b = _samples(first, 2), _samples(second, 2)
    value = float(a.mean() - b.mean())
    low = high = value
    if a.std() or b.std():
        both = weighted.CompareMeans.from_data(a, b)
        low, high = both.tconfint_diff(alpha=1 - confidence, usevar="unequal")
    return Estimate(value, float(low), float(high), min(len(a), len(b)), confidence)


def proportion_difference(
    successes: int, n: int, other_successes: int, other_n: int, *, confidence: float = 0.95
) -> Estimate:
    """Return the difference of two shares from independent samples, with Newcombe's interval.

    Where the same seeds stand behind both shares, :func:`paired_interval` is the sharper one.

    Args:
        successes: How many of the first n trials succeeded.
        n: Number of trials of the first kind, at least 1.
        other_successes: How many of the second kind succeeded.
        other_n: Number of trials of the second kind, at least 1.
        confidence: Coverage, strictly between 0 and 1.

    Returns:
        The estimate of first minus second; its ``n`` is the smaller of the two.

    Raises:
        ValueError: If a count does not lie between 0 and its number of trials.

    Source:
        Newcombe 1998, through ``statsmodels``.
    """
    for k, trials in ((successes, n), (other_successes, other_n)):
        proportion_interval(k, trials, confidence=confidence)
    proportion = require("statsmodels.stats.proportion", "intervals of proportions")
    low, high = proportion.confint_proportions_2indep(
        successes, n, other_successes, other_n, method="newcomb", alpha=1 - confidence
    )
    value = successes / n - other_successes / other_n
    return Estimate(value, float(low), float(high), min(n, other_n), confidence)


@dataclass(frozen=True)
class Comparison:
    """Two remedies on the same seeds.

    Attributes:
        first: Name of the one.
        second: Name of the other.
        difference: Of the means, ``first - second``, with an interval that holds for all
            comparisons of the family at once.
        p_value: Probability of a difference this large if there is none, corrected for the
            number of comparisons.
        verdict: ``"larger"``, ``"smaller"`` (first than second) or ``"undecided"``.
    """

    first: str
    second: str
    difference: Estimate
    p_value: float
    verdict: str


@dataclass(frozen=True)
class Comparisons:
    """A family of comparisons, corrected together; shows itself as a table.

    Attributes:
        rows: The comparisons.
        correction: Name of the correction of the p-values.
        confidence: Coverage of all intervals together.
    """

    rows: tuple[Comparison, ...]
    correction: str
    confidence: float

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pair: tuple[str, str]) -> Comparison:
        """Return the comparison of two names, turned round if need be."""
        for row in self.rows:
            if (row.first, row.second) == pair:
                return row
            if (row.second, row.first) == pair:
                d = row.difference
                turned = Estimate(-d.value, -d.high, -d.low, d.n, d.confidence)
                verdict = {"larger": "smaller", "smaller": "larger"}.get(row.verdict, row.verdict)
                return Comparison(row.second, row.first, turned, row.p_value, verdict)
        raise KeyError(f"{pair[0]!r} and {pair[1]!r} were not compared")

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame``, one row a comparison."""
        pd = require("pandas", "tables of results")
        return pd.DataFrame(
            {
                "first": row.first,
                "second": row.second,
                "difference": row.difference.value,
                "low": row.difference.low,
                "high": row.difference.high,
                "n": row.difference.n,
                "p_value": row.p_value,
                "verdict": row.verdict,
            }
            for row in self.rows
        )

    def __repr__(self) -> str:
        head = f"{len(self)} paired comparisons, {self.correction} correction"
        lines = [
            f"  {r.first} - {r.second}: {r.difference}, p = {r.p_value:.2g}: {r.verdict}"
            for r in self.rows
        ]
        return "\n".join([head, *lines])


def compare_paired(
    samples: Mapping[str, Sequence[float] | Any],
    *,
    baseline: str | None = None,
    confidence: float = 0.95,
    test: str = "t",
    correction: str = "holm",
) -> Comparisons:
    """Compare remedies tried on the same seeds, corrected for the number of comparisons.

    A difference counts only if the corrected p-value is below ``1 - confidence`` and the
    interval, widened to hold for all comparisons at once (Bonferroni), leaves out 0.

    Args:
        samples: For each remedy one number or truth value a network, shape (n,), the seeds in the
            same order. Say beforehand how diverged networks count: NaN is refused.
        baseline: Compare all others with this one; each with each by default.
        confidence: Coverage of the whole family.
        test: ``"t"`` (paired) or ``"wilcoxon"`` (signed ranks) for numbers; truth values take
            McNemar's exact test.
        correction: ``"holm"`` or another method of ``statsmodels`` ``multipletests``.

    Returns:
        The comparisons.

    Raises:
        ValueError: If there are fewer than two remedies, the lengths differ, a sample is not
            finite, the baseline is unknown, or the test is.

    Example:
        >>> runs = {"relu": [0.9, 0.8, 0.7, 0.8], "leaky": [0.1, 0.2, 0.1, 0.3]}
        >>> compare_paired(runs)["leaky", "relu"].verdict
        'smaller'
    """
    _confidence(confidence)
    if test not in ("t", "wilcoxon"):
        raise ValueError(f"test must be 't' or 'wilcoxon', not {test!r}")
    if len(samples) < 2:
        raise ValueError(f"a comparison needs at least two remedies, not {list(samples)}")
    if baseline is not None and baseline not in samples:
        raise ValueError(f"the baseline {baseline!r} is none of {', '.join(samples)}")
    multitest = require("statsmodels.stats.multitest", "corrections")
    if baseline is None:
        pairs = list(itertools.combinations(samples, 2))
    else:
        pairs = [(name, baseline) for name in samples if name != baseline]
    alpha = 1 - confidence
    raw = [_p_value(samples[one], samples[two], test) for one, two in pairs]
    corrected = multitest.multipletests(raw, alpha=alpha, method=correction)[1]
    rows = []
    for (one, two), p in zip(pairs, corrected, strict=True):
        wide = paired_interval(samples[one], samples[two], confidence=1 - alpha / len(pairs))
        verdict = "undecided"
        if p < alpha and (wide.low > 0 or wide.high < 0):
            verdict = "larger" if wide.low > 0 else "smaller"
        rows.append(Comparison(one, two, wide, float(p), verdict))
    return Comparisons(tuple(rows), correction, confidence)


@dataclass(frozen=True)
class Equivalence:
    """Whether a difference is negligible.

    Attributes:
        difference: The mean difference; its interval is the one that decides (90% for two
            one-sided tests at 5%).
        margin: Largest difference that does not matter, named beforehand.
        p_value: Of the two one-sided tests; small when the two are equivalent.
        verdict: ``"equivalent"`` when the interval lies within the margin, ``"different"`` when
            it lies wholly beyond, ``"undecided"`` otherwise.
    """

    difference: Estimate
    margin: float
    p_value: float
    verdict: str


def equivalence(
    first: Sequence[float] | Any,
    second: Sequence[float] | Any,
    *,
    margin: float,
    confidence: float = 0.95,
) -> Equivalence:
    """Test whether two remedies on the same seeds differ by less than a margin.

    "No effect" is a claim that needs evidence of its own: an interval that includes 0 does not
    give it, one that lies within the margin does.

    Args:
        first: One number a network, shape (n,), n >= 2.
        second: The same networks (seeds) under the other remedy, shape (n,).
        margin: Largest difference that does not matter, in the unit of the samples, above 0.
        confidence: One minus the level of each one-sided test.

    Returns:
        The verdict with its interval.

    Raises:
        ValueError: If the margin is not positive and finite, the lengths differ, there are fewer
            than two samples, or one is not finite.

    Source:
        Schuirmann 1987, two one-sided tests, https://doi.org/10.1007/BF01068419
    """
    _confidence(confidence)
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin must be a positive finite number, not {margin!r}")
    stats = require("scipy.stats", "intervals")
    a, b, _ = _pair(first, second)
    estimate = mean_interval(a - b, confidence=1 - 2 * (1 - confidence))
    error = float(stats.sem(a - b))
    if error == 0:
        p = 0.0 if abs(estimate.value) < margin else 1.0
    else:
        degrees = len(a) - 1
        p = float(
            max(
                stats.t.sf((estimate.value + margin) / error, degrees),
                stats.t.cdf((estimate.value - margin) / error, degrees),
            )
        )
    verdict = "undecided"
    if -margin < estimate.low and estimate.high < margin:
        verdict = "equivalent"
    elif estimate.low > margin or estimate.high < -margin:
        verdict = "different"
    return Equivalence(estimate, margin, p, verdict)


def _pair(first: Any, second: Any) -> tuple[Any, Any, bool]:
    """Return two samples of one length as numbers, and whether both hold truth values."""
    np = require("numpy", "intervals")
    truths = all(np.asarray(sample).dtype == bool for sample in (first, second))
    a, b = _samples(first, 2), _samples(second, 2)
    if len(a) != len(b):
        raise ValueError(f"paired samples must have one length, not {len(a)} and {len(b)}")
    return a, b, truths


def _p_value(first: Any, second: Any, test: str) -> float:
    stats = require("scipy.stats", "tests")
    a, b, truths = _pair(first, second)
    difference = a - b
    if not difference.any():
        return 1.0
    if truths:
        more, less = int((difference > 0).sum()), int((difference < 0).sum())
        return float(stats.binomtest(more, more + less, 0.5).pvalue)
    if (difference == difference[0]).all():
        return 0.0
    if test == "wilcoxon":
        return float(stats.wilcoxon(difference, zero_method="pratt").pvalue)
    return float(stats.ttest_rel(a, b).pvalue)
