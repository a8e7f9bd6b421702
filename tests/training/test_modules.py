import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_kinds import Shifted, gen
from torch import nn

from relubook.training.modules import (
    StackedDropout,
    StackedLinear,
    StackedModule,
    StackedRReLU,
    stream,
)


@pytest.mark.parametrize("sizes", [(2, 2), (16, 1), (5, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("members_last", [True, False])
def test_linear_equals_torch(sizes, bias, members_last):
    stacked = StackedLinear(3, *sizes, bias, dtype=torch.float64)
    if members_last:
        turned = torch.zeros(*sizes, 3, dtype=torch.float64).movedim(-1, 0)
        stacked.weight = nn.Parameter(turned)
    for parameter in stacked.parameters():
        nn.init.normal_(parameter, generator=gen(1))
    x = torch.randn(3, 8, sizes[0], generator=gen(0), dtype=torch.float64)
    for i in range(3):
        want = x[i] @ stacked.weight[i] + (stacked.bias[i] if bias else 0)
        torch.testing.assert_close(stacked(x)[i], want)
        want = x[0] @ stacked.weight[i] + (stacked.bias[i] if bias else 0)
        torch.testing.assert_close(stacked(x[0])[i], want)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.BatchNorm1d(5, dtype=torch.float64),
        lambda: nn.LayerNorm(5, dtype=torch.float64),
        lambda: nn.PReLU(5, dtype=torch.float64),
        lambda: nn.Sequential(nn.BatchNorm1d(5), Shifted()).double(),
    ],
)
def test_a_stacked_module_equals_its_members(build):
    x = 2 * torch.randn(3, 8, 5, generator=gen(0), dtype=torch.float64) + 1
    members = [build() for _ in range(3)]
    for i, member in enumerate(members):
        for parameter in member.parameters():
            nn.init.uniform_(parameter, 0.5, 2, generator=gen(i))
    stacked = StackedModule(members)
    for mode in (True, True, False):
        got = stacked.train(mode)(x)
        # torch 2.13 cannot map prelu over weights alone.
        prelu = isinstance(stacked.module, nn.PReLU)
        shared = stacked.eval()(x[0].expand(3, -1, -1) if prelu else x[0], shared=not prelu)
        for i, member in enumerate(members):
            torch.testing.assert_close(got[i], member.train(mode)(x[i]), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(shared[i], member.eval()(x[0]), rtol=1e-12, atol=1e-13)
            for ours, theirs in zip(
                stacked.state_dict().values(), member.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(ours[i], theirs, rtol=1e-12, atol=1e-14)


def test_rrelu_equals_torch():
    x = torch.randn(2, 700, 5, generator=gen(0), dtype=torch.float64)
    rrelu = StackedRReLU([0, 1])
    assert torch.equal(rrelu.eval()(x), nn.RReLU().eval()(x))
    slopes = rrelu.train()(x) / x
    negative = slopes[x < 0]
    assert (slopes[x > 0] == 1).all()
    assert 1 / 8 <= negative.min() < 0.127
    assert 0.33 < negative.max() <= 1 / 3
    assert negative.std().item() == pytest.approx((1 / 3 - 1 / 8) / 12**0.5, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(p=st.floats(0, 0.9), seed=st.integers(0, 10**6))
def test_dropout_is_zero_or_rescaled_whoever_stands_beside(p, seed):
    x = torch.rand(2, 30, 20, generator=gen(seed), dtype=torch.float64) + 0.5
    out = StackedDropout([seed, seed + 1], p)(x)
    kept = out != 0
    torch.testing.assert_close(out[kept], (x / (1 - p))[kept])
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / 1200) ** 0.5 + 1e-9
    assert torch.equal(StackedDropout([seed + 1], p)(x[1:]), out[1:])
    assert torch.equal(StackedDropout([seed], p).eval()(x[:1]), x[:1])


def test_draws_differ_between_passes_layers_and_members():
    x = torch.ones(2, 10, 10)
    dropout = StackedDropout([4, 5], 0.5, layer=1)
    first, second = dropout(x), dropout(x)
    other = StackedDropout([4, 5], 0.5, layer=2)(x)
    for a, b in ((first, second), (first, other), (first[0], first[1])):
        assert 0.3 < (a == b).double().mean() < 0.7
    assert len({stream(seed, use) for seed in range(9) for use in ("batches", "dropout 1")}) == 18
