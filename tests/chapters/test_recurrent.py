"""Stacked recurrent networks against torch's own, and the task that needs memory."""

import math

import pytest
import torch
from torch import nn

from relubook.chapters.recurrent import (
    CELLS,
    Cell,
    draw_cells,
    memory_task,
    norms_through_time,
    unroll,
)

INPUTS, UNITS, STEPS, BATCH = 3, 5, 7, 2


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def reference(cell, weight, bias):
    """Return torch's module with one member's parameters."""
    if cell.kind == "lstm":
        net = nn.LSTM(INPUTS, UNITS, dtype=torch.float64)
    else:
        net = nn.RNN(INPUTS, UNITS, nonlinearity=cell.kind, dtype=torch.float64)
    with torch.no_grad():
        net.weight_ih_l0.copy_(weight[:INPUTS].T)
        net.weight_hh_l0.copy_(weight[INPUTS:].T)
        net.bias_ih_l0.copy_(bias[0])
        net.bias_hh_l0.zero_()
    return net


@pytest.mark.parametrize("name", CELLS)
def test_unroll_is_what_torch_computes(name):
    cell = CELLS[name]
    weight, bias = draw_cells(cell, INPUTS, UNITS, generators(0, 1, 2), dtype=torch.float64)
    x = torch.randn(
        3, STEPS, BATCH, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    states, h = unroll(cell, x, weight, bias)
    assert len(states) == STEPS
    for i in range(3):
        outputs, last = reference(cell, weight[i], bias[i])(x[i])
        torch.testing.assert_close(h[i], outputs[-1])
        state = last[1] if cell.kind == "lstm" else last
        torch.testing.assert_close(states[-1][i], state[0])


@pytest.mark.parametrize(
    ("name", "recurrent_gain"), [(n, 1.0) for n in CELLS] + [("ReLU", 6**0.5), ("tanh", 3**0.5)]
)
def test_norms_are_those_of_autograd_through_torch(name, recurrent_gain):
    cell = CELLS[name]
    (g,) = generators(4)
    weight, bias = draw_cells(cell, INPUTS, UNITS, [g], dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, generator=g)
    readout = torch.randn(1, UNITS, dtype=torch.float64, generator=g)
    sizes = {"units": UNITS, "steps": STEPS, "batch": BATCH, "inputs": INPUTS}
    norms = norms_through_time(name, [4], recurrent_gain=recurrent_gain, **sizes)
    weight[:, INPUTS:] *= recurrent_gain
    net = reference(cell, weight[0], bias[0])
    for t in range(STEPS):
        zero = torch.zeros(1, BATCH, UNITS, dtype=torch.float64)
        _, last = net(x[: t + 1], (zero, zero) if cell.kind == "lstm" else zero)
        if cell.kind == "lstm":
            # h is a function of c, through the output gate: rebuild it so that c is the root.
            c = last[1].detach().requires_grad_()
            before = net(x[:t], (zero, zero))[1][0] if t else zero
            z = x[t] @ weight[0, :INPUTS] + before[0] @ weight[0, INPUTS:] + bias[0]
            root, h = c, z.chunk(4, dim=-1)[3].sigmoid() * c.tanh()
        else:
            root = h = last.detach().requires_grad_()
        if t + 1 < STEPS:
            h = net(x[t + 1 :], (h, root) if cell.kind == "lstm" else root)[0][-1]
        (gradient,) = torch.autograd.grad((h * readout).sum(), root)
        torch.testing.assert_close(norms[0, t], gradient.norm())


def test_draws_are_torchs_and_biases_zero():
    weight, bias = draw_cells(Cell("relu"), 8, 400, generators(0))
    assert weight.abs().max() <= 400**-0.5
    assert weight.var().item() == pytest.approx(1 / (3 * 400), rel=0.02)
    assert not bias.any()


def test_identity_and_open_gate():
    weight, _ = draw_cells(CELLS["ReLU, identity"], INPUTS, UNITS, generators(0))
    assert torch.equal(weight[0, INPUTS:], torch.eye(UNITS))
    _, bias = draw_cells(CELLS["LSTM, open gate"], INPUTS, UNITS, generators(0))
    gates = bias.view(4, UNITS)
    assert (gates[1] == 100).all()
    assert not gates[[0, 2, 3]].any()
    assert torch.equal(gates[1].sigmoid(), torch.ones(UNITS))


def test_a_member_does_not_depend_on_its_neighbors():
    together = norms_through_time("LSTM", [1, 2, 3], units=UNITS, steps=STEPS)
    alone = norms_through_time("LSTM", [2], units=UNITS, steps=STEPS)
    torch.testing.assert_close(together[1:2], alone)


def test_memory_is_learned_over_a_short_time_and_reported_by_network():
    run = memory_task("ReLU, identity", [0, 1, 2], 0.01, steps=4, updates=60)
    assert run["learned"] == [1.0, 1.0, 1.0]
    assert all(0 < loss < math.log(2) / 2 for loss in run["loss"])


def test_memory_of_a_member_is_its_own():
    """Long sequences give gradients that have to be clipped, each member's by its own norm."""
    both, alone = (
        memory_task("ReLU, identity", seeds, 0.01, steps=30, updates=12)["loss"]
        for seeds in ([5, 6], [6])
    )
    assert both[1] == pytest.approx(alone[0], abs=1e-4)


def test_a_diverged_network_has_not_learned():
    run = memory_task("ReLU, identity", [0], 1e30, steps=4, updates=12)
    assert run["learned"] == [0.0]


def test_no_global_randomness_is_used():
    before = torch.get_rng_state()
    norms_through_time("tanh", [0], units=UNITS, steps=STEPS)
    memory_task("tanh", [0], 0.01, steps=3, updates=10)
    assert torch.equal(before, torch.get_rng_state())
