"""What counts as one site, which calls are rectifiers, and what data `diagnose` takes."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from relubook.units.diagnosis import AmbiguousUnitsError, diagnose


class Call(nn.Module):
    """A linear layer, then a function."""

    def __init__(self, function, width=4):
        super().__init__()
        self.fc, self.function = nn.Linear(5, width), function

    def forward(self, x: Tensor, **rest) -> Tensor:
        return self.function(self.fc(x))


# One site, or several


def test_modules_made_in_the_pass_do_not_split_a_site():
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            keep = [nn.ReLU(), nn.ReLU()]  # so that no address is used twice
            x = keep[0](self.fc(x))
            return keep[1](copy.deepcopy(self.inner)(x))

    model, batches = Made(), [torch.randn(4, 5) for _ in range(6)]
    report = diagnose(model, batches)
    assert [site.name for site in report] == ["relu()#1", "inner.1", "relu()#2"]
    hidden = model.fc(torch.cat(batches)).relu()
    assert report[0].fired.tolist() == (hidden > 0).sum(0).tolist()
    fired = (model.inner(hidden) > 0).sum(0).tolist()
    assert report[1].fired.tolist() == report[2].fired.tolist() == fired


def test_calls_in_a_loop_are_one_site_and_other_layers_another():
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.shared = nn.ReLU(), nn.Linear(5, 5)
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.act(layer(x))
            parts = [F.relu(self.shared(part)) for part in x.split(2)]
            return torch.cat(parts)

    report = diagnose(Loops(), [torch.randn(6, 5), torch.randn(3, 5)])
    assert [site.name for site in report] == ["act#1", "act#2", "act#3", "relu()"]
    assert [site.producer for site in report] == ["layers.0", "layers.1", "layers.2", "shared"]
    assert [site.calls for site in report] == [2, 2, 2, 3 + 2]
    assert all((site.inputs, site.observations) == (9, 9) for site in report)
    assert all(torch.equal(site.fired, site.fired_inputs) for site in report)


def test_a_rectifier_shared_by_residual_blocks_is_a_site_of_each():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.act(x + layer(x))
            return x

    model, x = Blocks(), torch.randn(6, 5)
    report = diagnose(model, [x])
    assert [site.name for site in report] == ["act#1", "act#2", "act#3"]
    for site, layer in zip(report, model.layers, strict=True):
        x = (x + layer(x)).relu()
        assert site.fired.tolist() == (x > 0).sum(0).tolist()


def test_calls_of_a_shared_module_are_one_site_whoever_makes_them():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), Call(F.relu, 3))
            self.cell, self.act = nn.RNNCell(3, 4, nonlinearity="relu"), nn.ReLU()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            one = self.tower(x)
            two = self.tower(y.reshape(-1, 5))
            h = self.cell(one)
            h = self.cell(two.view(len(x), 2, 3)[:, 0], h)
            return self.act(h) + self.act(-h)  # which one unit of the cell fires differs

    model, seen = Twins(), dict[str, list[Tensor]]()
    layers = {"tower.1": model.tower[0], "tower.2": model.tower[2].fc, "cell": model.cell}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda module, args, out, name=name: seen.setdefault(name, []).append(out)
        )
    batches = [{"x": torch.randn(n, 5), "y": torch.randn(n, 2, 5)} for n in (4, 3)]
    report = diagnose(model, batches)
    fired = {name: (torch.cat(out) > 0).sum(0).tolist() for name, out in seen.items()}
    fired["tower.2.relu()"], fired["cell.relu()"] = fired.pop("tower.2"), fired.pop("cell")
    assert [site.name for site in report] == [*fired, "act#1", "act#2"]
    for name, counts in fired.items():
        assert report[name].fired.tolist() == counts
        assert (report[name].inputs, report[name].calls) == (7, 4)
    assert report["tower.1"].observations == 7 + 14
    assert report["act#2"].dead.all()


def test_a_shared_module_fed_from_elsewhere_is_another_site():
    """Concatenated ReLU, and pre-activation: what differs is not who calls, but what is fed."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.two = nn.Linear(5, 5), Call(F.relu, 5)
            self.act = nn.Sequential(nn.ReLU(), nn.Linear(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return self.act(x) + self.act(-x) + self.act(self.two(x))

    model, x = Shared(), torch.randn(6, 5)
    report = diagnose(model, [x])
    y = model.fc(x)
    expected = [y, -y, model.two.fc(y), model.two(y)]
    assert [site.name for site in report] == ["act.0#1", "act.0#2", "two.relu()", "act.0#3"]
    for site, z in zip(report, expected, strict=True):
        assert site.fired.tolist() == (z > 0).sum(0).tolist()


def test_units_that_meet_in_different_dimensions_are_unknown():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.one(x)[:, :, None] + self.two(x)[:, None, :])

    with pytest.raises(AmbiguousUnitsError, match="units in different dimensions met"):
        diagnose(Outer(), [torch.randn(6, 5)])


def test_sites_of_one_name_are_listed_in_order():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            if x[0, 0] > 0:
                x = F.relu(self.fc(x))
            return F.relu(self.fc(x))

    x = torch.randn(4, 5)
    x[0, 0] = -1
    y = x.clone()
    y[0, 0] = 1
    report = diagnose(Branch(), [x, y])
    assert [site.name for site in report] == ["relu()#1", "relu()#2"]


def test_inputs_are_told_apart_through_indexing():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            up = self.up(x)
            return F.relu(up[x[..., 0] > 0])

    x = torch.randn(6, 5, 4)
    model = Experts()
    site = diagnose(model, [x])[0]
    chosen, fires = x[..., :1] > 0, model.up(x) > 0
    assert site.inputs == int(chosen.any((1, 2)).sum())
    assert site.fired_inputs.tolist() == (fires & chosen).any(1).sum(0).tolist()


def test_a_site_that_depends_on_no_input_has_one():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.mix = nn.Linear(1, 6), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(len(x)).float()[:, None]
            return F.relu(self.mix(x)) + F.relu(self.fc(places))

    report = diagnose(Table(), [torch.randn(7, 5)] * 3)
    assert [site.inputs for site in report] == [21, 1]
    assert report[1].observations == 21
    assert int(report[1].fired_inputs.max()) == 1


def test_constants_in_front_of_data_do_not_hide_it():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.fc = nn.Embedding(2, 4), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            places = self.places(torch.arange(2)).expand(len(x), 2, 4)
            return F.relu(torch.cat([places, self.fc(x)[:, None]], 1))

    site = diagnose(Joined(), [torch.randn(6, 5)])[0]
    assert (site.inputs, site.observations, site.units) == (6, 18, 4)


# Which calls are rectifiers


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.fmax(x, torch.zeros(())),
        lambda x: torch.fmax(torch.zeros_like(x), x),
        lambda x: F.leaky_relu(x, 0),
        nn.LeakyReLU(0),
    ],
)
def test_other_spellings_of_the_rectifier(function):
    model, x = Call(function), torch.randn(9, 5)
    site = diagnose(model, [x])[0]
    assert site.kind == "relu"
    assert site.fired.tolist() == (model.fc(x) > 0).sum(0).tolist()


@pytest.mark.parametrize(
    ("kind", "function", "reference"),
    [
        ("hardsigmoid", F.hardsigmoid, lambda x: min(max(x + 3, 0), 6) / 6),
        ("hardshrink", F.hardshrink, lambda x: x if abs(x) > 0.5 else 0),
        ("softshrink", nn.Softshrink(), lambda x: math.copysign(max(abs(x) - 0.5, 0), x)),
    ],
)
def test_other_kinds_are_silent_where_their_output_is_zero(kind, function, reference):
    model, x = Call(function), 4 * torch.randn(40, 5)
    site = diagnose(model, [x])[0]
    expected = [sum(reference(v) != 0 for v in unit) for unit in model.fc(x).T.tolist()]
    assert (site.kind, site.fired.tolist()) == (kind, expected)
    assert 0 < sum(expected) < site.observations * site.units


def test_operators_of_other_libraries_are_not_taken_for_torchs():
    with torch.library._scoped_library("relubook_test", "FRAGMENT") as library:
        library.define("relu(Tensor x, float scale) -> Tensor")
        library.define("permute(Tensor x) -> Tensor")
        library.impl("relu", lambda x, scale: scale * x, "CPU")
        library.impl("permute", lambda x: x.flip(0), "CPU")
        ours = torch.ops.relubook_test
        model = nn.Sequential(Call(lambda x: ours.permute(ours.relu(x, 2.0))), nn.ReLU())
        report = diagnose(model, [torch.randn(6, 5)])
    assert [site.name for site in report] == ["1"]
    assert report[0].units == 4


# Data


def test_data_that_would_be_miscounted_are_refused():
    model, x, y = Call(F.relu), torch.randn(6, 5), torch.randn(6, 5)
    with pytest.raises(TypeError, match="wrap it in a DataLoader"):
        diagnose(model, TensorDataset(x, y))
    assert diagnose(model, DataLoader(TensorDataset(x, y), batch_size=4)).inputs == 6
    for data in ((x, y), (x, torch.zeros(6).long()), [x, torch.zeros(6)]):
        with pytest.raises(TypeError, match=r"wrap it: \[\(x, y\)\]"):
            diagnose(model, data)
    assert diagnose(model, [(x, y)]).inputs == 6
    assert diagnose(model, x.split(2)).inputs == diagnose(model, [x[:3], x[3:]]).inputs == 6


def test_arrays_and_tensors_without_values_are_refused():
    model, x = Call(F.relu), torch.randn(6, 5)
    for data in (x.numpy(), [np.zeros((2, 5))]):
        with pytest.raises(TypeError, match="ndarray, not a tensor or a mapping.*convert it"):
            diagnose(model, data)
    with pytest.raises(ValueError, match="batch 1 holds NaN, infinity or a meta tensor"):
        diagnose(model, [x, x.to("meta")])
    with pytest.raises(ValueError, match=r"fc\.weight has no values yet"):
        diagnose(copy.deepcopy(model).to("meta"), [x])


def test_a_key_that_the_model_does_not_take_is_named():
    model, x = nn.Sequential(Call(F.relu), nn.Identity()), torch.randn(6, 5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'") as caught:
        diagnose(model, [{"input": x, "label": torch.zeros(6)}])
    assert any("batch 0; forward=lambda" in note for note in caught.value.__notes__)


def test_a_row_for_all_inputs_does_not_hide_their_number():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def forward(self, ids: Tensor, places: Tensor) -> Tensor:
            return F.relu(self.words(ids) + self.places(places))

    batch = {"ids": torch.randint(9, (6, 3)), "places": torch.arange(3)[None]}
    site = diagnose(Positions(), [batch])[0]
    assert (site.inputs, site.observations, site.units) == (6, 18, 4)
    assert site.fired_inputs is not None


def test_sparse_tensors_in_a_batch():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
            return F.relu(torch.sparse.mm(edges, self.fc(nodes)))

    dense = (torch.rand(6, 6) > 0.5).float()
    nodes, model = torch.randn(6, 5), Graph()
    site = diagnose(model, [{"nodes": nodes, "edges": dense.to_sparse()}])[0]
    assert site.fired.tolist() == (dense @ model.fc(nodes) > 0).sum(0).tolist()
    dense[0, 0] = torch.nan
    with pytest.raises(ValueError, match="batch 0 holds NaN"):
        diagnose(model, [{"nodes": nodes, "edges": dense.to_sparse()}])


def test_sites_by_place():
    report = diagnose(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.ReLU6()), [torch.randn(2, 5)])
    assert report[0] is report["1"]
    assert report[-1] is report["2"]
    with pytest.raises(IndexError):
        report[2]


@pytest.mark.slow
def test_the_first_call_does_not_load_the_compiler():
    code = (
        "import sys, torch; from torch import nn; from relubook import diagnose;"
        "diagnose(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [torch.zeros(1, 2)]);"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
