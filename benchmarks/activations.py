"""Costs of the family's members, next to ReLU: alone and inside a training step."""

import torch
from torch import nn
from torch.nn import functional as F

from relubook.evidence.timing import interleaved_seconds, ratio_interval
from relubook.layers.activations import activation

NUMBERS = 10_000


def _step(name: str, width: int = 256, batch: int = 128):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, width), activation(name), nn.Linear(width, width), activation(name),
        nn.Linear(width, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x = torch.randn(batch, 64, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def _entry(name: str, ratio: float, *, low: float | None = None, high: float | None = None) -> dict:
    holds = ratio >= low if low is not None else high is not None and ratio <= high
    return {"name": name, "ratio": ratio, "bar": high if low is None else low, "holds": holds}


def benchmarks() -> list[dict]:
    torch.set_num_threads(1)
    x = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    names = ("relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "squared_relu")
    modules = {name: activation(name) for name in names}
    alone = interleaved_seconds({n: lambda m=m: m(x) for n, m in modules.items()}, calls=50)
    steps = interleaved_seconds({n: _step(n) for n in ("relu", "sigmoid", "tanh")}, calls=5)
    alone_ratio = {n: ratio_interval(alone[n], alone["relu"]).value for n in names[1:]}
    step_ratio = {n: ratio_interval(steps[n], steps["relu"]).value for n in ("sigmoid", "tanh")}
    slow = [("sigmoid", 2.0), ("tanh", 2.0)]
    fast = [
        ("leaky_relu", 2.0),
        ("squared_relu", 3.0),
        ("elu", 15.0),
        ("gelu", 15.0),
        ("silu", 10.0),
    ]
    return [
        *(_entry(f"{n} / relu, alone (at most)", alone_ratio[n], high=bar) for n, bar in fast),
        *(_entry(f"{n} / relu, training step (at most)", step_ratio[n], high=2.0) for n, _ in slow),
    ]
