"""Costs of the family's members, next to ReLU: alone and inside a training step."""

import torch
from torch import nn
from torch.nn import functional as F

from relubook.evidence.statistics import median_interval
from relubook.evidence.timing import interleaved_seconds
from relubook.layers.activations import activation
from relubook.layers.maxout import Maxout

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


def _maxout_passes(width: int = 256, batch: int = 128, pieces: int = 2):
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(0))
    layer, linear = Maxout(width, width, pieces), nn.Linear(width, width * pieces)

    def passes(forward):
        return lambda: forward(x).sum().backward()

    by_hand = passes(lambda x: linear(x).view(batch, width, pieces).max(2).values)
    return {"maxout": passes(layer), "linear and maximum": by_hand}


def _at_most(name: str, ratio: float, bar: float) -> dict:
    return {"name": f"{name} (at most)", "ratio": ratio, "bar": bar, "holds": ratio <= bar}


def benchmarks() -> list[dict]:
    torch.set_num_threads(1)
    x = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    bars = {"leaky_relu": 2.0, "squared_relu": 3.0, "elu": 15.0, "gelu": 15.0, "silu": 10.0}
    modules = {name: activation(name) for name in ("relu", *bars)}
    alone = interleaved_seconds({n: lambda m=m: m(x) for n, m in modules.items()}, calls=50)
    steps = interleaved_seconds({n: _step(n) for n in ("relu", "sigmoid", "tanh")}, calls=5)

    maxout = interleaved_seconds(_maxout_passes(), calls=5)

    def ratio(seconds: dict[str, list[float]], name: str, rival: str = "relu") -> float:
        pairs = zip(seconds[name], seconds[rival], strict=True)
        return median_interval([a / b for a, b in pairs])[0]

    rival = "linear and maximum"
    return [
        _at_most(f"maxout / {rival}, both passes", ratio(maxout, "maxout", rival), 1.2),
        *(_at_most(f"{n} / relu, alone", ratio(alone, n), bar) for n, bar in bars.items()),
        *(
            _at_most(f"{n} / relu, training step", ratio(steps, n), 2.0)
            for n in ("sigmoid", "tanh")
        ),
    ]
