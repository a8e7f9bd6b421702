import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from relubook.layers.maxout import (
    Maxout,
    MaxPieces,
    maxout,
    maxout_leaky_relu,
)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 6), units=st.integers(1, 6), pieces=st.integers(1, 5), bias=st.booleans()
)
def test_is_the_maximum_over_linear_maps(inputs, units, pieces, bias):
    layer = Maxout(inputs, units, pieces, bias=bias, generator=gen(1), dtype=torch.float64)
    x = torch.randn(7, inputs, generator=gen(2), dtype=torch.float64)
    maps = []
    for j in range(pieces):
        b = layer.bias[j::pieces] if bias else None
        maps.append(F.linear(x, layer.weight[j::pieces], b))
    torch.testing.assert_close(layer(x), torch.stack(maps).amax(0))
    assert torch.equal(MaxPieces(pieces)(F.linear(x, layer.weight, layer.bias)), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("build", "oracle"),
    [
        (lambda m: maxout_leaky_relu(m, 0.0), F.relu),
        (lambda m: maxout_leaky_relu(m, -1.0), torch.abs),
        (maxout_leaky_relu, F.leaky_relu),
        (lambda m: maxout_leaky_relu(m, 0.3), lambda x: F.leaky_relu(x, 0.3)),
        (lambda m: maxout_leaky_relu(m, -2.0), lambda x: F.leaky_relu(x, -2.0)),
    ],
)
def test_exact_forms(build, oracle, bias):
    linear = nn.Linear(5, 3, bias=bias, dtype=torch.float64)
    x = 3 * torch.randn(50, 5, generator=gen(0), dtype=torch.float64)
    torch.testing.assert_close(build(linear)(x), oracle(linear(x)), rtol=1e-12, atol=1e-14)
    layer = build(linear)
    layer.weight.data.zero_()
    assert linear.weight.abs().sum() > 0


def test_gradient_reaches_the_largest_piece_alone():
    x = torch.tensor([[1.0, 3.0, 2.0, -1.0]], requires_grad=True)
    maxout(x, 2).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert maxout(torch.arange(12.0).reshape(6, 2), 3, dim=0).tolist() == [[4.0, 5.0], [10.0, 11.0]]


def test_two_pieces_keep_the_second_moment():
    layer = Maxout(200, 5000, 2, generator=gen(0))
    x = torch.randn(50, 200, generator=gen(1))
    assert (layer(x) ** 2).mean().item() == pytest.approx((x**2).mean().item(), rel=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Maxout(2, 3, 0), "pieces.*0"),
        (lambda: Maxout(0, 3), "in_features.*0"),
        (lambda: Maxout(2, 0), "out_features.*0"),
        (lambda: maxout(torch.ones(2, 5), 2), "size 5 is no multiple"),
        (lambda: maxout_leaky_relu(nn.Linear(2, 2), 1.5), "negative_slope.*1.5"),
    ],
)
def test_named_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
