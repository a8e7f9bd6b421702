import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from relubook.layers.maxout import (
    Maxout,
    MaxoutConv2d,
    MaxPieces,
    as_maxout,
    maxout,
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
    ("slope", "oracle"),
    [
        (0.0, F.relu),
        (-1.0, torch.abs),
        (0.01, F.leaky_relu),
        (-2.0, lambda x: F.leaky_relu(x, -2.0)),
        (torch.tensor([0.25]), lambda x: F.leaky_relu(x, 0.25)),
        (nn.Parameter(torch.tensor([0.1, -1.0, 1.0])), None),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "convolution", "groups"])
def test_rectifiers_as_maxout(kind, slope, oracle, bias):
    if kind == "linear":
        layer, shape = nn.Linear(5, 3, bias=bias), (50, 5)
    else:
        groups = 3 if kind == "groups" else 1
        options = {"stride": 2, "padding": 1, "padding_mode": "reflect", "groups": groups}
        layer, shape = nn.Conv2d(3, 3, (3, 2), bias=bias, **options), (4, 3, 8, 7)
    layer.double()
    x = 3 * torch.randn(shape, generator=gen(0), dtype=torch.float64)
    if oracle is None:
        oracle = lambda z: F.prelu(z, slope.double())  # noqa: E731
    state = torch.get_rng_state()
    twin = as_maxout(layer, slope)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(twin(x), oracle(layer(x)), rtol=1e-12, atol=1e-14)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert layer.weight.abs().sum() > 0


@settings(max_examples=15, deadline=None)
@given(channels=st.integers(1, 4), pieces=st.integers(1, 4), bias=st.booleans())
def test_convolutional_form_is_the_maximum_over_filters(channels, pieces, bias):
    layer = MaxoutConv2d(2, channels, 3, pieces, bias=bias, padding=1, generator=gen(0))
    x = torch.randn(2, 2, 6, 5, generator=gen(1))
    weight = layer.convolution.weight
    for j in range(channels):
        own = slice(j * pieces, (j + 1) * pieces)
        b = layer.convolution.bias[own] if bias else None
        maps = F.conv2d(x, weight[own], b, padding=1)
        torch.testing.assert_close(layer(x)[:, j], maps.amax(1))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    again = MaxoutConv2d(2, channels, 3, pieces, bias=bias, padding=1, generator=gen(0))
    assert torch.equal(again.convolution.weight, weight)


def test_max_pooling_is_maxout_over_space():
    x = torch.randn(4, 3, 12, generator=gen(0))
    assert torch.equal(maxout(x, 3), F.max_pool1d(x, 3))


def test_norms_of_pieces_can_be_bounded():
    layer = Maxout(20, 4, 3, initializer="he_normal", generator=gen(0))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.renorm_(2, 0, 1.2)
    norms, bounded = before.norm(dim=1), layer.weight.norm(dim=1)
    torch.testing.assert_close(bounded, norms.clamp(max=1.2))
    assert (norms > 1.2).any()
    assert (norms < 1.2).any()


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
        (lambda: MaxoutConv2d(0, 2, 3), "in_channels.*0"),
        (lambda: MaxoutConv2d(2, 2, 3, 0), "pieces.*0"),
        (lambda: as_maxout(nn.Linear(2, 2), 1.5), "negative_slope.*1.5"),
        (lambda: as_maxout(nn.Linear(2, 2), float("nan")), "negative_slope.*nan"),
        (lambda: as_maxout(nn.Linear(2, 2), torch.zeros(3)), r"one a unit \(2\), not \(3,\)"),
    ],
)
def test_named_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_linear_maps_become_maxout():
    with pytest.raises(TypeError, match="layer must be nn.Linear or nn.Conv2d, not ReLU"):
        as_maxout(nn.ReLU())
