"""What every chapter calls: fixed seeds, one thread, the house style, figures with their words."""

import base64
import io
import random
import time
from typing import Any

import torch

from relubook._optional import require

__all__ = ["COLORS", "LINE_STYLES", "describe", "running_time", "setup", "show", "use_style"]

_started: float | None = None


def setup(*, seed: int = 0, threads: int = 1) -> None:
    """Prepare a notebook: figures in the house style, seeds fixed, threads limited.

    Args:
        seed: Seeds Python's, NumPy's and torch's global generators, not the book's experiments.
        threads: Threads for torch. With one, sums come out the same on every run.

    Raises:
        ValueError: If ``seed`` is negative or ``threads`` is below 1.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    global _started
    _started = time.process_time()
    np = require("numpy", "seeding")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    use_style()


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
    matplotlib.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.formatter.use_mathtext": True,
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=LINE_STYLES),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.figsize": (WIDTH, 3.3),
            "font.size": 12,
            "grid.color": "#dddddd",
            "legend.fontsize": 11,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "savefig.dpi": 150,
            "savefig.facecolor": "white",
        }
    )


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
