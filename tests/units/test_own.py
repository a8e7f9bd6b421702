"""Activations of the user's own, against brute force on each call's output."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relubook.units.diagnosis import diagnose

ZERO = "silent where 0"


class JumpReLU(nn.Module):
    """Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold)


class TopK(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(x).topk(2)
        return torch.zeros_like(x).scatter_(-1, top.indices, top.values)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x *= x > 0
        return x


class Gate(nn.Module):
    """Of half the width, as a gated linear unit."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return left * (right > 0)


class Coder(nn.Module):
    """A layer and its activation in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.fc(x)
        return torch.where(x > 0.2, x, 0), None


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, level: float) -> Tensor:
        return x * (x > level)


def masked(x: Tensor) -> Tensor:
    return x * (x > 0)


class Calls(nn.Module):
    """A linear layer, then what is called as a function."""

    def __init__(self, function, features: int = 6) -> None:
        super().__init__()
        self.fc, self.function, self.out = nn.Linear(5, features), function, nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.fc(x)))


def outputs_of(module, model, batches):
    """Return all outputs of a module, by a hook."""
    seen = []
    hook = lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(batch.clone())
    handle.remove()
    return torch.cat([out.clone() for out in seen])


def check(site, out):
    """Compare a site with its outputs, inputs first and units last, one number at a time."""
    fired, by_input = [0] * out.shape[-1], [0] * out.shape[-1]
    for one in out.flatten(1, -2).tolist() if out.ndim > 2 else out[:, None].tolist():
        for unit in range(out.shape[-1]):
            count = sum(row[unit] != 0 for row in one)
            fired[unit] += count
            by_input[unit] += count > 0
    assert (site.fired.tolist(), site.fired_inputs.tolist()) == (fired, by_input)
    assert (site.inputs, site.observations) == (len(out), out.numel() // out.shape[-1])


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("kind", [JumpReLU, TopK, InPlace, Gate])
@pytest.mark.parametrize("key", ["class", "instance", "name", "pattern"])
def test_modules_by_what_names_them(kind, key, shape):
    model = nn.Sequential(
        nn.Linear(5, 6), kind(), nn.Linear(3 if kind is Gate else 6, 4), nn.ReLU()
    )
    batches = [torch.randn(size, *shape) for size in (4, 3)]
    keys = {"class": kind, "instance": model[1], "name": "1", "pattern": "[1]"}
    report = diagnose(model, batches, activations={keys[key]: ZERO})
    assert [(site.name, site.kind) for site in report] == [("1", kind.__name__), ("3", "relu")]
    check(report["1"], outputs_of(model[1], model, batches))
    check(report["3"], outputs_of(model[3], model, batches))
    assert report["1"].producer == (None if kind is Gate else "0")
    if kind is not Gate:
        peak = model[0](torch.cat(batches)).flatten(0, -2).amax(0)
        assert torch.equal(report["1"].peak, peak)


def test_a_module_with_its_layer_inside():
    model, batches = nn.Sequential(Coder()), [torch.randn(4, 6) for _ in range(3)]
    site = diagnose(model, batches, activations={Coder: ZERO})["0"]
    out = outputs_of(model[0], model, batches)
    check(site, out)
    assert torch.equal(site.peak, out.amax(0))
    site = diagnose(Coder(), batches, activations={Coder: ZERO})[0]
    assert site.name == "Coder()"


@pytest.mark.parametrize(
    ("function", "key"),
    [
        (masked, masked),
        (lambda x: Step.apply(x, 0.1), Step),
        (torch.no_grad()(masked), torch.no_grad()(masked)),
    ],
)
def test_functions(function, key):
    model, batches = Calls(function), [torch.randn(size, 3, 5) for size in (4, 3)]
    (site,) = diagnose(model, batches, activations={key: ZERO})
    with torch.no_grad():
        check(site, torch.cat([function(model.fc(batch)) for batch in batches]))
    assert site.producer == "fc"
    assert site.name == f"{key.__name__}()"
    assert site.location.startswith("test_own.py")
    assert sys.getprofile() is None
