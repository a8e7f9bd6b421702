"""What every chapter calls: set-up, house style, and the words beside a stored picture."""

import base64
import math
import random

import matplotlib as mpl
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import colors
from matplotlib import pyplot as plt

from relubook import book
from relubook.evidence.statistics import interval


@pytest.fixture(autouse=True)
def _restored():
    python, numpy = random.getstate(), np.random.get_state()
    with mpl.rc_context():
        mpl.use("agg")
        book.use_style()
        yield
    plt.close("all")
    random.setstate(python)
    np.random.set_state(numpy)


def test_setup_fixes_seeds_threads_and_style():
    draws = []
    for _ in range(2):
        book.setup()
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert torch.get_num_threads() == 1
    assert mpl.rcParams["figure.facecolor"] == "white"


def test_a_bad_seed_leaves_the_random_state(monkeypatch):
    monkeypatch.setenv("RELUBOOK_SEED", "-1")
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="RELUBOOK_SEED must be"):
        book.setup()
    assert torch.equal(before, torch.random.get_rng_state())


def test_running_time_counts_from_setup(monkeypatch):
    monkeypatch.setattr(book, "_started", None)
    with pytest.raises(RuntimeError, match="call relubook.setup"):
        book.running_time()
    book.setup()
    assert 0 <= book.running_time() < 60


@pytest.fixture
def figure():
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], label="line")
    axes.set(title="A title", xlabel="across", ylabel="up")
    axes.legend()
    return figure


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_differ_in_color_and_in_style():
    assert len(set(book.COLORS)) == len(set(book.LINE_STYLES)) == len(book.COLORS)
    _, axes = plt.subplots()
    lines = [axes.plot([0, 1])[0] for _ in book.COLORS]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)


def test_colors_stand_out_from_the_ground():
    """Graphical objects need a contrast of 3 (WCAG 1.4.11)."""
    for color in book.COLORS:
        assert 1.05 / (luminance(colors.to_rgb(color)) + 0.05) >= 3, color


def test_text_is_legible_on_a_phone():
    """A figure shown 340 pixels wide keeps its text at about 10 pixels."""
    width = mpl.rcParams["figure.figsize"][0]
    smallest = min(mpl.rcParams["font.size"], mpl.rcParams["legend.fontsize"])
    assert smallest / 72 / width * 340 >= 9.9


def test_words_of_a_figure(figure):
    assert book.describe(figure) == "Figure\nA title | across | up | line"
    figure.suptitle("All")
    assert book.describe(figure).startswith("Figure: All\n")


def test_show_gives_picture_and_words_and_closes(figure, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append((data, raw)))
    book.show(figure)
    ((data, raw),) = shown
    assert raw
    assert data["text/plain"].endswith("A title | across | up | line")
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)
    assert not InteractiveShell.initialized()


def test_same_figure_gives_the_same_bytes(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, raw: shown.append(data["image/png"])
    )
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([0, 1], [0, 1])
        book.show(figure)
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ([0.5, 0.6] * 15, "55% [53%, 57%]"),
        ([0.0] * 30, "0% (all 30)"),
        ([0.0] * 28 + [0.03, 0.06], "0.3% (28 of 30 at 0%)"),
        ([True] * 15 + [False] * 15, "50% [31%, 69%]"),
        (torch.tensor([math.nan] * 3 + [0.2, 0.4] * 10), "30% [25%, 35%] (3 of 23 overflowed)"),
        ([math.inf, 0.5], "unknown (1 of 2 overflowed)"),
    ],
)
def test_shares_are_written_for_readers(shares, words):
    assert book.percent(shares) == words


def test_every_network_is_a_dot_and_spread_gets_an_interval():
    figure, axes = plt.subplots()
    book.headline(figure, "Some die")
    spread, same = torch.linspace(0.2, 0.4, 30), torch.zeros(30)
    book.dots(axes, [0, 1], [spread, same], book.COLORS[0], label="networks", at=(0, 0.5))
    drawn = [line.get_xydata() for line in axes.lines]
    assert [len(points) for points in drawn] == [30, 2, 30, 2]  # dots, interval, dots, means
    assert np.allclose(np.sort(drawn[0][:, 1]), spread)
    assert np.allclose(drawn[1][:, 1], interval(spread)[1:])
    assert drawn[3][:, 1].tolist() == pytest.approx([0.3, 0])
    assert axes.texts[0].get_text() == "networks"
    assert figure.get_suptitle() == "Some die"


def test_overflowed_networks_are_no_dots():
    _, axes = plt.subplots()
    book.dots(axes, [0], [[0.1, math.nan, 0.3, math.inf]], book.COLORS[0])
    assert len(axes.lines[0].get_xydata()) == 2


def test_setup_returns_the_seed_of_the_book(monkeypatch):
    monkeypatch.delenv("RELUBOOK_SEED", raising=False)
    assert book.setup() == 0
    monkeypatch.setenv("RELUBOOK_SEED", "1000000")
    assert book.setup() == 1_000_000
