"""House style and the words that stand beside a stored picture."""

import base64

import matplotlib as mpl
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import colors
from matplotlib import pyplot as plt

from relubook import book as plots


@pytest.fixture(autouse=True)
def _restored_style():
    with mpl.rc_context():
        mpl.use("agg")
        plots.use_style()
        yield
    plt.close("all")


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
    assert len(set(plots.COLORS)) == len(set(plots.LINE_STYLES)) == len(plots.COLORS)
    _, axes = plt.subplots()
    lines = [axes.plot([0, 1])[0] for _ in plots.COLORS]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)


def test_colors_stand_out_from_the_ground():
    """Graphical objects need a contrast of 3 (WCAG 1.4.11)."""
    for color in plots.COLORS:
        assert 1.05 / (luminance(colors.to_rgb(color)) + 0.05) >= 3, color


def test_text_is_legible_on_a_phone():
    """A figure shown 340 pixels wide keeps its text at about 10 pixels."""
    width = mpl.rcParams["figure.figsize"][0]
    smallest = min(mpl.rcParams["font.size"], mpl.rcParams["legend.fontsize"])
    assert smallest / 72 / width * 340 >= 9.9


def test_words_of_a_figure(figure):
    assert plots.describe(figure) == "Figure\nA title | across | up | line"
    figure.suptitle("All")
    assert plots.describe(figure).startswith("Figure: All\n")


def test_show_gives_picture_and_words_and_closes(figure, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append((data, raw)))
    plots.show(figure)
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
        plots.show(figure)
    assert shown[0] == shown[1]
