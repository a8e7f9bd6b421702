"""Which pieces of maxout win: `diagnose` against brute force, and what others make of them."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from relubook.layers.maxout import Maxout, MaxoutConv2d, MaxPieces, as_maxout, maxout
from relubook.training.recipe import Recipe
from relubook.units.diagnosis import diagnose, silence_bound
from relubook.units.revival import revive_
from relubook.units.watch import Watch


def whole_numbers(model: nn.Module) -> nn.Module:
    """Give a model small whole weights, so that sums are exact and ties are common."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    return model


def with_lines(weight: list[float], bias: list[float]) -> Maxout:
    """Return one maxout unit of one input, with these lines."""
    layer = Maxout(1, 1, len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight)[:, None])
        layer.bias.copy_(torch.tensor(bias))  # type: ignore[union-attr]
    return layer


LINES = with_lines([-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.9, -5.0])
X = torch.linspace(-1, 1, 1001)[:, None]


def brute_force(values: list[Tensor], pieces: int) -> tuple[list[int], list[int]]:
    """Count wins of the rows of (inputs, rows, places), one number at a time."""
    rows = values[0].shape[1]
    wins, inputs = [0] * rows, [0] * rows
    for batch in values:
        for example in batch.tolist():
            for row in range(rows):
                mine = row // pieces * pieces
                best = [max(example[mine + k][place] for k in range(pieces))
                        for place in range(len(example[row]))]  # fmt: skip
                won = sum(own == top for own, top in zip(example[row], best, strict=True))
                wins[row] += won
                inputs[row] += won > 0
    return wins, inputs


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["dense", "sequence", "module", "convolution", "unbatched"]),
    units=st.integers(1, 4),
    pieces=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_wins_agree_with_brute_force(kind, units, pieces, sizes, seed):
    torch.manual_seed(seed)
    if kind == "convolution":
        model = whole_numbers(MaxoutConv2d(2, units, 2, pieces))
        batches = [torch.randint(-2, 3, (size, 2, 4, 3)).float() for size in sizes]
        values = [model.convolution(x).flatten(2) for x in batches]
    else:
        layer = nn.Linear(3, units * pieces)
        model = whole_numbers(Maxout(3, units, pieces))
        if kind == "module":
            model = nn.Sequential(whole_numbers(layer), MaxPieces(pieces))
        steps = (4,) if kind == "sequence" else ()
        batches = [torch.randint(-2, 3, (size, *steps, 3)).float() for size in sizes]
        linear = model[0] if kind == "module" else None
        rows = [linear(x) if linear else x @ model.weight.T + model.bias for x in batches]
        values = [own.view(len(own), -1, units * pieces).transpose(1, 2) for own in rows]
    (site,) = diagnose(model, batches)
    wins, inputs = brute_force(values, pieces)
    assert (site.kind, site.units, site.inputs) == ("maxout piece", units * pieces, sum(sizes))
    assert site.observations == sum(own.shape[0] * own.shape[2] for own in values)
    assert site.fired.tolist() == wins
    assert site.fired_inputs is not None
    assert site.fired_inputs.tolist() == inputs
    assert site.peak.tolist() == [max(own[:, k].max().item() for own in values)
                                  for k in range(units * pieces)]  # fmt: skip
    assert site.never_wins.tolist() == [count == 0 for count in wins]
    assert site.always_on.tolist() == [count == site.observations for count in wins]
    assert sum(site.counts().values()) == site.units


@settings(max_examples=30, deadline=None)
@given(pieces=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_those_win_among_which_autograd_shares_the_gradient(pieces, seed):
    torch.manual_seed(seed)
    model = whole_numbers(nn.Sequential(nn.Linear(2, 3 * pieces), MaxPieces(pieces)))
    x = torch.randint(-2, 3, (20, 2)).float()
    values = model[0](x).detach().requires_grad_()
    model[1](values).sum().backward()
    assert values.grad is not None
    assert diagnose(model, [x])["1"].fired.tolist() == (values.grad > 0).sum(0).tolist()


def test_states():
    (site,) = diagnose(LINES, X)
    assert site.counts() == {
        "dead": 0, "rare": 0, "mixed": 3, "always on": 0, "non-finite": 0, "never wins": 1,
    }  # fmt: skip
    assert site.never_wins.tolist() == [False, False, False, True]
    assert site.upper_bound[3] == silence_bound(1001)
    assert site.upper_bound[:3].isnan().all()
    assert site.rate.sum() == pytest.approx(1.0, abs=3 / 1001)  # each input has a winner
    assert diagnose(with_lines([-1.0, 1.0], [0.0, -1.99]), X)[0].rare.tolist() == [False, True]
    assert diagnose(with_lines([-1.0, 1.0], [0.0, -1.95]), X)[0].rare.tolist() == [False, False]
    assert diagnose(with_lines([0.0, 0.0], [1.0, 0.0]), X)[0].always_on.tolist() == [True, False]


def test_a_piece_that_never_wins_is_no_dead_unit():
    unit = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
    with torch.no_grad():
        unit[0].bias.copy_(torch.tensor([-9.0, 9.0, 9.0, 9.0]))
    report = diagnose(nn.Sequential(with_lines([0.0, 0.0, 0.0], [1.0, 0.0, -1.0]), *unit), X)
    pieces, relu = report
    assert not pieces.dead.any()
    assert not relu.never_wins.any()
    assert report.dead_fraction == 0.25
    assert report.dead_layers == []
    report.assert_alive(max_dead=0.25)
    alone = diagnose(with_lines([0.0, 0.0], [1.0, 0.0]), X)
    assert alone.dead_fraction == 0
    alone.assert_alive()


def test_report():
    torch.manual_seed(0)
    model = nn.Sequential(LINES, nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 6), MaxPieces(3))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([-99.0, 9, 9, 9]))
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([0.0, 0, 0, 0, -1, -1]))  # a tie, and one that wins
    report = diagnose(model, X)
    lines = [re.split(r"\s{2,}", line) for line in repr(report).splitlines()]
    names = ["site", "kind", "units", "dead", "rare", "always on", "never wins"]
    assert lines[0] == [*names, "median rate", "n"]
    assert lines[2][:7] == ["0.maxout()", "maxout piece", "4 pieces", "-", "0", "0", "1"]
    assert lines[3][:4] == ["2", "relu", "4", str(int(report["2"].dead.sum()))]
    assert lines[3][6] == "-"
    assert lines[4][:7] == ["4", "maxout piece", "6 pieces", "-", "0", "4", "2"]
    text = repr(report)
    assert "1 dead unit (25.0%). Silence on n = 1,001 inputs, if independent and not" in text
    assert "3 maxout pieces without a win, which kills no unit. Losing on n = 1,001" in text
    assert f"bounds a piece's winning rate by {silence_bound(1001):.2%} (95%)" in text
    assert "<td>4 pieces</td><td>-</td>" in report._repr_html_()
    assert repr(report[0]).startswith("0.maxout() (maxout piece): 4 pieces, 3 mixed, 1 never wins;")
    assert "never wins" not in repr(diagnose(model[1:3], X))
    frame = report.to_frame()
    assert frame.state.tolist().count("never wins") == 3
    figure = report.plot()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0.maxout() (4 pieces)", "2 (4)", "4 (6 pieces)"]
    assert "never wins" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_loss(value):
    model = nn.Sequential(nn.Linear(1, 4), MaxPieces(2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([value, 0.0, 1.0, 0.0]))
    report = diagnose(model, X)
    # NaN hides whether the other piece would have lost; to infinity it does lose.
    expected = ["non-finite", "non-finite" if math.isnan(value) else "never wins"]
    states = report.to_frame().state.tolist()
    assert states == [*expected, "always on", "never wins"]
    assert re.search(r"NON-FINITE: \d pieces of 1 saw NaN", repr(report))
    with pytest.raises(AssertionError, match="non-finite"):
        report.assert_alive()


class Mixed(nn.Module):
    """Maxout as a module, as a function in a loop, and by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.loop = Maxout(3, 4, 2), nn.Linear(4, 8)
        self.conv, self.hand = MaxoutConv2d(1, 2, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = maxout(self.loop(x), 2)
        x = self.conv(x.view(-1, 1, 2, 2)).flatten(1)
        return self.hand(x).view(-1, 2, 2).amax(2)


def test_every_call_of_maxout_is_a_site():
    report = diagnose(Mixed(), [torch.randn(5, 3), torch.randn(4, 3)])
    found = [(site.name, site.producer, site.units, site.calls) for site in report]
    assert found == [
        ("first.maxout()", "first", 8, 2),
        ("maxout()", "loop", 8, 6),
        ("conv.maxout()", "conv.convolution", 4, 2),
    ]
    assert [site.observations for site in report] == [9, 27, 36]
    assert [site.inputs for site in report] == [9, 9, 9]
    assert [site.unit_dim for site in report] == [(1, 2)] * 3
    first = Mixed.forward.__code__.co_firstlineno
    lines = [f"test_pieces.py:{first + row}" for row in (1, 3, 4)]
    assert [site.location for site in report] == lines
    network = Recipe(3, (4,), 1, activation="maxout").single(0)
    assert [site.units for site in diagnose(network, torch.randn(5, 3))] == [8]


def test_options():
    model, x = nn.Sequential(Mixed(), nn.Linear(2, 3), nn.ReLU()), torch.randn(5, 3)
    report = diagnose(model, x, family="all")
    assert all(site.score is None for site in list(report)[:3])
    assert report["2"].score is not None
    known = [site.fired.tolist() for site in report]
    every = diagnose(model, x, unit_dim=1)  # of rectifiers; which the pieces are is known
    assert [site.fired.tolist() for site in every] == known
    some = diagnose(model, x, unit_dim={"0.first.maxout()": None, "0.conv*": 2})
    assert [site.name for site in some] == ["0.maxout()", "0.conv.maxout()", "2"]
    assert [site.fired.tolist() for site in some] == known[1:]


def test_a_rectifier_as_maxout_shows_the_same_dead_units():
    linear, x = nn.Linear(3, 6).double(), torch.randn(500, 3).double()
    with torch.no_grad():
        linear.bias[0] = -99
    relu = diagnose(nn.Sequential(linear, nn.ReLU()), x)["1"]
    pieces = diagnose(as_maxout(linear), x)["maxout()"]
    linear_wins, zero_wins = pieces.fired.view(6, 2).T
    assert torch.equal(linear_wins, relu.fired)
    assert torch.equal(zero_wins, 500 - relu.fired)
    assert torch.equal(pieces.never_wins.view(6, 2)[:, 0], relu.dead)


def test_revive_leaves_pieces_and_says_so():
    model = nn.Sequential(Maxout(3, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad():
        model[0].bias[0], model[1].bias[0] = -99, -99
    x = torch.randn(200, 3)
    weights, before = model[0].weight.clone(), model(x)
    report = diagnose(model, x)
    revival = revive_(model, report, x)
    assert revival.total == report["2"].dead.sum() > 0
    assert torch.equal(model[0].weight, weights)
    assert torch.equal(model(x), before)
    (left,) = revival.left
    assert (left.site, left.units) == ("0.maxout()", 0)
    assert "left: 0.maxout(), 0 units: its pieces that never win are no dead units" in repr(revival)
    assert not revive_(LINES, diagnose(with_lines([1.0, -1.0], [0.0, 0.0]), X), X).left


def test_watch_follows_rectifiers_only():
    model = nn.Sequential(Maxout(3, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    with Watch(model, window=1) as watch:
        model(torch.randn(4, 3))
    assert [site.name for site in watch.compute()] == ["2"]
    assert watch.unfollowed == []
    assert watch.notes == ["Which pieces of maxout win is not followed: diagnose counts it."]
    with (
        pytest.raises(ValueError, match=r"no rectifier; Which pieces of maxout win .* diagnose"),
        Watch(model[0], window=1),
    ):
        model[0](torch.randn(4, 3))
