"""Recurrent networks, many at once: gradients through time, and a task that needs memory."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from relubook.evidence.results import computation


class Cell(NamedTuple):
    """What a recurrent network computes at a step, and how it starts.

    ``"tanh"`` and ``"relu"`` are ``h = f(x W + h U + b)``, perhaps from ``U = 1``; the bias of an
    LSTM's forget gate holds it open at 100.
    """

    kind: str
    identity: bool = False
    forget_bias: float = 0.0

    @property
    def gates(self) -> int:
        """Linear maps a step, 4 for an LSTM, else 1."""
        return 4 if self.kind == "lstm" else 1


CELLS = {
    "tanh": Cell("tanh"),
    "tanh, identity": Cell("tanh", identity=True),
    "ReLU": Cell("relu"),
    "ReLU, identity": Cell("relu", identity=True),
    "LSTM": Cell("lstm"),
    "LSTM, open gate": Cell("lstm", forget_bias=100.0),
}
"""The cells that the book compares."""


def draw_cells(
    cell: Cell,
    inputs: int,
    units: int,
    generators: Sequence[torch.Generator],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one network a generator, as ``nn.RNN`` and ``nn.LSTM`` do, but with biases 0.

    Returns weight (members, inputs + units, gates * units), the inputs' rows first, and bias
    (members, 1, gates * units); gates in torch's order: input, forget, cell, output.
    """
    bound = units**-0.5
    shape = (inputs + units, cell.gates * units)
    weight = torch.stack(
        [torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=g) for g in generators]
    )
    bias = torch.zeros(len(generators), 1, cell.gates * units, dtype=dtype)
    if cell.identity:
        weight[:, inputs:] = torch.eye(units, dtype=dtype)
    if cell.kind == "lstm":
        bias[..., units : 2 * units] = cell.forget_bias
    return weight, bias


def unroll(cell: Cell, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run all members over sequences (members, steps, batch, inputs), from a state of 0.

    Returns the states after each step, (members, batch, units): the sum c of an LSTM, the output h
    of a plain network; and the last h. The equations are those of ``nn.RNN`` and ``nn.LSTM``.
    """
    members, steps, batch, inputs = x.shape
    units = weight.shape[1] - inputs
    h = c = x.new_zeros(members, batch, units)
    states = []
    for t in range(steps):
        z = torch.baddbmm(bias, torch.cat([x[:, t], h], dim=-1), weight)
        if cell.kind == "lstm":
            i, f, candidate, o = z.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * candidate.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            h = c = z.tanh() if cell.kind == "tanh" else z.relu()
        states.append(c)
    return states, h


def norms_through_time(
    name: str,
    seeds: Iterable[int],
    *,
    units: int = 64,
    steps: int = 100,
    batch: int = 16,
    inputs: int = 8,
    recurrent_gain: float = 1.0,
) -> Tensor:
    """Return the gradient's norm at the state of every time step, float64 (networks, steps).

    The loss is a random linear function of the last output; the inputs are standard normal. The
    gain is a factor on the weights between states; 6**0.5 gives a plain ReLU cell the variance
    2 / units of He, 3**0.5 a tanh cell 1 / units.
    """
    cell, dtype = CELLS[name], torch.float64
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    weight, bias = draw_cells(cell, inputs, units, generators, dtype=dtype)
    weight[:, inputs:] *= recurrent_gain
    x = torch.stack(
        [torch.randn(steps, batch, inputs, dtype=dtype, generator=g) for g in generators]
    )
    readout = torch.stack([torch.randn(1, units, dtype=dtype, generator=g) for g in generators])
    states, h = unroll(cell, x, weight.requires_grad_(), bias)
    gradients = torch.autograd.grad((h * readout).sum(), states)
    return torch.stack([g.flatten(1).norm(dim=1) for g in gradients], dim=1)


def memory_task(
    name: str,
    seeds: Iterable[int],
    lr: float,
    *,
    units: int = 16,
    steps: int = 50,
    batch: int = 16,
    updates: int = 150,
) -> dict[str, list[float]]:
    """Train networks to remember one bit that only the first of many inputs shows.

    Inputs have two features: noise of standard deviation 1/2 at every step, and the bit, as 1 or
    -1, at the first step alone; the last output is to tell it. Adam, every member's gradient
    clipped to norm 1, fresh sequences at every update. Returns by network the mean cross-entropy of
    the last ten updates (``loss``) and whether it is below half of ln 2, guessing's (``learned``).
    """
    chosen = CELLS[name]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    members, bound = len(generators), units**-0.5
    weight, bias = draw_cells(chosen, 2, units, generators)
    readout = torch.stack(
        [torch.empty(units, 1).uniform_(-bound, bound, generator=g) for g in generators]
    )
    parameters = [p.requires_grad_() for p in (weight, bias, readout)]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for _ in range(updates):
        x = torch.zeros(members, steps, batch, 2)
        for member, g in zip(x, generators, strict=True):
            member[..., 0] = 0.5 * torch.randn(steps, batch, generator=g)
            member[0, :, 1] = 2.0 * torch.randint(2, (batch,), generator=g) - 1
        outputs = unroll(chosen, x, weight, bias)[1] @ readout
        target = (x[:, 0, :, 1:] + 1) / 2
        each = F.binary_cross_entropy_with_logits(outputs, target, reduction="none").mean((1, 2))
        optimizer.zero_grad()
        each.sum().backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.stack([part.flatten(1).norm(dim=1) for part in gradients]).norm(dim=0)
        for part in gradients:
            part /= norm.clamp(min=1)[:, None, None]
        optimizer.step()
        losses.append(each.detach())
    loss = torch.stack(losses[-10:]).mean(dim=0)
    learned = loss < math.log(2) / 2
    return {"loss": loss.tolist(), "learned": learned.double().tolist()}


@computation("memory", grid={"cell": list(CELLS), "lr": [0.001, 0.003, 0.01, 0.03, 0.1]}, seeds=70)
def memory(seeds: Sequence[int], *, cell: str, lr: float) -> Mapping[str, list[float]]:
    """Run :func:`memory_task` over 50 steps."""
    return memory_task(cell, seeds, lr)
