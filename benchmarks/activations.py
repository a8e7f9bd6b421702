"""Costs of the family's members, next to ReLU: alone and inside a training step."""

import torch
from torch import nn
from torch.nn import functional as F

from relubook.activations import activation
from relubook.timing import interleaved_seconds, ratio_interval

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


def benchmarks() -> list[dict]:
    torch.set_num_threads(1)
    x = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    names = ("relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "squared_relu")
    modules = {name: activation(name) for name in names}
    alone = interleaved_seconds({n: lambda m=m: m(x) for n, m in modules.items()}, calls=50)
    steps = interleaved_seconds({n: _step(n) for n in ("relu", "sigmoid", "tanh")}, calls=5)
    entries = [
        {
            "name": f"{name} over relu, alone ({NUMBERS} numbers)",
            "ratio": ratio_interval(alone[name], alone["relu"]).value,
            "bar": None,
            "holds": None,
        }
        for name in names[1:]
    ]
    for name in ("sigmoid", "tanh"):
        entries.append(
            {
                "name": f"{name} over relu, training step 64-256-256-10",
                "ratio": ratio_interval(steps[name], steps["relu"]).value,
                "bar": None,
                "holds": None,
            }
        )
    return entries
