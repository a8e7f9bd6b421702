"""What every chapter calls: fixed seeds, one thread, the house style, figures with their words."""

import base64
import io
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from relubook._optional import require
from relubook.evidence.statistics import FEW, base_seed, common_value, interval

__all__ = ["COLORS", "LINE_STYLES", "describe", "dots", "headline", "percent", "running_time"]
__all__ += ["setup", "show", "use_style"]

_started: float | None = None


def setup() -> int:
    """Prepare a notebook: figures in the house style, seeds fixed, torch on one thread.

    Python's, NumPy's and torch's global generators get the seed; one thread makes sums repeatable.
    Returns the seed, from which a notebook draws all its networks and batches: 0 unless the
    environment variable ``RELUBOOK_SEED`` moves the whole book to another.
    """
    seed = base_seed()
    global _started
    _started = time.process_time()
    np = require("numpy", "seeding")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    use_style()
    return seed


def running_time() -> float:
    """Return the seconds of processor time since :func:`setup`; RuntimeError without it."""
    if _started is None:
        raise RuntimeError("call relubook.setup() first: running time counts from there")
    return time.process_time() - _started


COLORS = ("#0072B2", "#D55E00", "#009E73", "#C6619A", "#882255", "#B8860B", "#000000")
"""Colors after Okabe and Ito, darkened where faint, that color-blind readers tell apart."""

LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
"""One line style for each color, so that figures work in gray."""

WIDTH = 5.2
"""Width of a figure in inches: its text is still legible when a phone shows it at 340 pixels."""


def use_style() -> None:
    """Set matplotlib's defaults: colors with line styles, large text, a light background."""
    matplotlib = require("matplotlib", "figures")
    cycler = require("cycler", "figures").cycler
    colors = cycler(color=COLORS) + cycler(linestyle=LINE_STYLES)
    matplotlib.rc("axes", axisbelow=True, grid=True, prop_cycle=colors)
    matplotlib.rc("axes", titlelocation="left", titlesize=12, titleweight="bold")
    matplotlib.rc("axes.formatter", use_mathtext=True)
    matplotlib.rc("axes.spines", right=False, top=False)
    matplotlib.rc("figure", dpi=100, facecolor="white", figsize=(WIDTH, 3.3))
    matplotlib.rc("figure.constrained_layout", use=True)
    matplotlib.rc("font", size=12)
    matplotlib.rc("grid", color="#dddddd")
    matplotlib.rc("legend", fontsize=11, frameon=False)
    matplotlib.rc("lines", linewidth=2)
    matplotlib.rc("savefig", dpi=220, facecolor="white")


def describe(figure: Any) -> str:
    """Return the words of a figure, one line a panel: titles, axis labels and legends.

    They stand beside the stored picture, so that a comparison of outputs notices a changed label.
    """
    lines = []
    for axes in figure.axes:
        title = axes.get_title(loc="left") or axes.get_title()
        words = [title, axes.get_xlabel(), axes.get_ylabel(), *_legend_words(axes.get_legend())]
        lines.append(" | ".join(word.replace("\n", " ") for word in words if word))
    overall = figure.get_suptitle()
    lines += [" | ".join(_legend_words(legend)) for legend in figure.legends]
    return "\n".join(["Figure" + (f": {overall}" if overall else ""), *filter(None, lines)])


def _legend_words(legend: Any) -> list[str]:
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def show(figure: Any) -> None:
    """Display a matplotlib figure as PNG (128 colors) with its words, and close it."""
    display = require("IPython.display", "figures").display
    pyplot = require("matplotlib.pyplot", "figures")
    image = require("PIL.Image", "figures")
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    # A palette makes the picture, and so the page, several times smaller.
    image.open(buffer).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    picture = base64.b64encode(small.getvalue()).decode("ascii")
    display({"image/png": picture, "text/plain": describe(figure)}, raw=True)


def percent(shares: Sequence[Any] | Any) -> str:
    """Return the mean of some shares with its 95% interval, such as ``"64% [58%, 70%]"``.

    Shares or truth values have shape (n,), one a network, n >= 1; NaN and infinity, which
    overflowed, are left out, and the text says how many. Where fewer than five networks differ,
    ``"0.2% (28 of 30 at 0%)"`` says how many agree, instead of an interval.
    """
    values = [float(share) for share in shares]
    finite = [value for value in values if math.isfinite(value)]
    lost = len(values) - len(finite)
    note = f" ({lost} of {len(values)} overflowed)" if lost else ""
    if len(finite) < 2:
        return f"unknown{note}"
    mean, low, high = interval(finite, confidence=0.95)
    digits = 1 if 0.0005 < mean < 0.095 or 0.985 < mean < 0.9995 else 0
    common, differ = common_value(finite)
    if differ < FEW:
        agree = f"{len(finite) - differ} of {len(finite)} at {common:.0%}"
        agree = agree if differ else f"all {len(finite)}"
        return f"{mean:.{digits}%} ({agree}){note}"
    return f"{mean:.{digits}%} [{low:.{digits}%}, {high:.{digits}%}]{note}"


def headline(figure: Any, words: str) -> None:
    """Write the message of a matplotlib figure, one sentence, above it, from its left edge.

    Break it where a line would hold more than 45 characters.
    """
    figure.suptitle(words, x=0.01, ha="left", fontsize=12.5, fontweight="bold")


def dots(
    axes: Any,
    places: Sequence[float],
    samples: Sequence[Any],
    color: str,
    *,
    shift: float = 0.0,
    marker: str = "o",
    label: str = "",
    at: tuple[float, float] = (0.0, 0.0),
    within: tuple[float, float] | None = (0, 1),
    line: str = "-",
) -> None:
    """Draw every network as a dot, the means with 95% intervals, and a line through the means.

    Where fewer than five networks differ, dots say all and there is no interval.

    Args:
        axes: A matplotlib ``Axes``.
        places: Where each group stands on the x axis; 0, 1, 2, ... for groups with names.
        samples: For each group one number a network, shape (n,); NaN and infinity are left out.
        color, marker: Of the dots and all else; with both, series differ without color too.
        shift: How far to the right of its place each group is drawn, beside other series.
        label, at: Words in the series' color, and where they start in the data's coordinates.
        within: The least and the greatest value possible; None if unbounded.
        line: Style of the line through the means; an empty string draws none.
    """
    middles, means = [], []
    for place, sample in zip(places, samples, strict=True):
        values = sorted(v for v in map(float, sample) if math.isfinite(v))
        if len(values) < 2:
            continue
        middle = place + shift
        # Steps of the golden ratio spread neighbors apart, the same way on every run.
        spread = [middle + 0.2 * ((0.618034 * k) % 1 - 0.5) for k in range(len(values))]
        each = {"markersize": 4.5, "markeredgewidth": 0, "alpha": 0.4, "clip_on": False}
        axes.plot(spread, values, color=color, linestyle="none", marker=marker, **each)
        mean, low, high = interval(values, confidence=0.95, within=within)
        if common_value(values)[1] >= FEW:
            ends = {"marker": "_", "markersize": 11, "markeredgewidth": 2, "linewidth": 2}
            axes.plot([middle] * 2, [low, high], "-", color=color, zorder=4, clip_on=False, **ends)
        middles.append(middle)
        means.append(mean)
    style = {"linestyle": line or "none", "linewidth": 1.4, "markeredgecolor": "white"}
    style |= {"marker": marker, "markersize": 7, "clip_on": False, "zorder": 5}
    axes.plot(middles, means, color=color, **style)
    axes.grid(visible=False, axis="x")
    if label:
        axes.text(*at, label, color=color, fontweight="bold", va="center")
