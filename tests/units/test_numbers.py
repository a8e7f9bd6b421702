"""What a pass remembers of the one before, and what is counted in floats, changes no result."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relubook.units import diagnosis
from relubook.units._numbers import Numbering
from relubook.units.diagnosis import Report, diagnose


class Wandering(nn.Module):
    """Takes another way with each batch, which holds the way in its first numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.left, self.right = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.conv, self.act = nn.Conv1d(3, 3, 1), nn.ReLU()
        self.heads = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        swap, loops, pick, made, batched = (int(way) for way in x[0, :5])
        x = torch.relu(x @ (self.left if batched else self.right))
        if swap:
            b = self.two(x)
            a = self.one(x)
        else:
            a = self.one(x)
            b = self.two(x)
        x = F.relu(a + b)
        for _ in range(loops):
            x = self.act(self.third(x))
            if pick:  # moves inputs by numbers that no shape tells
                x = x[x[:, 0].argsort(stable=True)]
            if made:
                x = nn.Linear(6, 6)(x).relu_()
        x = self.act(self.conv(x.view(-1, 3, 2)))
        if batched:
            x = torch.relu(torch.bmm(self.heads, x[:2]))
        return x


def told(report: Report) -> list[dict]:
    """Everything in a report, as plain numbers."""
    values = [dict(vars(site)) for site in report]
    for value in values:
        value.pop("location")
    return [{k: v.tolist() if isinstance(v, Tensor) else v for k, v in x.items()} for x in values]


@pytest.mark.parametrize("seed", range(6))
def test_a_pass_that_leaves_the_way_of_the_last_gets_what_a_fresh_one_does(seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model, batches, way = Wandering(), list[Tensor](), [0, 1, 0, 0, 0]
    for _ in range(40):  # each batch goes the way of the last, but for one turn
        turn = draw.randrange(6)
        if turn < 5:
            way[turn] = draw.randrange(3 if turn == 1 else 2)
        x = torch.randn(3 if turn == 5 else 5, 6)
        x[0, :5] = torch.tensor(way)
        batches.append(x)
    with pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(seed)
        remembered = diagnose(model, batches)
        patch.setattr(Numbering, "step", lambda self, given, find: find())
        torch.manual_seed(seed)
        fresh = diagnose(model, batches)
    assert told(remembered) == told(fresh)
    assert remembered.notes == fresh.notes


def test_a_pass_that_goes_on_where_the_last_one_ended():
    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x[0, 0])):
                torch.manual_seed(0)
                x = nn.Linear(3, 3)(x).relu()
            return x

    report = diagnose(Made(), [torch.full((4, 3), calls) for calls in (1.0, 2.0, 3.0)])
    assert [site.calls for site in report] == [3, 2, 1]


def test_what_is_remembered_does_not_grow_with_the_batches():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    counter = diagnosis._Counter(model)
    sizes = []
    with counter.attached(model):
        for length in range(1, 30):
            x = torch.randn(2, length, 3)
            counter.begin(2, x)
            with counter:
                model(x)
            counter.end()
            sizes.append(len(counter._numbers._steps))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("exact", [1, 7, 40])
@pytest.mark.parametrize("family", ["rectifiers", "all"])
def test_counts_beyond_what_floats_hold_are_integers(monkeypatch, exact, family):
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 3, 1), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + torch.relu(self.conv(x)).mean(1, keepdim=True)
            x = F.hardswish(self.fc(x.flatten(1)))
            return torch.relu(self.fc.weight @ x.T)  # inputs along the other dimension

    torch.manual_seed(0)
    model, batches = Calls(), [torch.randn(5, 2, 1, 3), torch.randn(2, 2, 1, 3)]
    expected = told(diagnose(model, batches, family=family))
    monkeypatch.setattr(diagnosis, "EXACT", exact)
    assert told(diagnose(model, batches, family=family)) == expected


def test_a_count_that_no_float_holds():
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for part in (x, x[:, :1]):
                out = torch.relu(part)
            return out

    site = diagnose(Calls(), [torch.ones(1, 2**24, 1)], unit_dim=-1)[0]
    assert site.fired.tolist() == [site.observations] == [2**24 + 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_counts_in_other_dtypes(dtype):
    x = torch.randn(3, 300, 2, dtype=dtype)
    site = diagnose(nn.Sequential(nn.Identity(), nn.ReLU()), [x], unit_dim=-1)[0]
    assert site.fired.tolist() == (x > 0).sum((0, 1)).tolist()
    assert site.fired_inputs.tolist() == (x > 0).any(1).sum(0).tolist()


def test_data_whose_sum_overflows_are_finite():
    x = torch.full((4, 3), 3e38)
    report = diagnose(nn.Sequential(nn.Identity(), nn.ReLU()), [x, -x], unit_dim=-1)
    assert report[0].fired.tolist() == [4, 4, 4]
    assert not report[0].nonfinite.any()
    x[1, 2] = -torch.inf
    seen = diagnose(
        nn.Sequential(nn.Identity(), nn.ReLU()), [x], unit_dim=-1, forward=lambda model, x: model(x)
    )
    assert seen[0].nonfinite.tolist() == [False, False, True]
