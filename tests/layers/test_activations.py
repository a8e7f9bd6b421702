"""The registry against autograd, torch's own functions and the formulas."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import relubook.layers.initializers
from relubook.layers.activations import (
    REGISTRY,
    activation,
    activation_names,
    relu_with_derivative_at_zero,
    squared_relu,
    step,
)

EXPECTED = [
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "rrelu",
    "elu",
    "celu",
    "selu",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "softplus",
    "squared_relu",
    "absolute",
    "sigmoid",
    "tanh",
    "softsign",
    "step",
]
finite = st.floats(-1e6, 1e6, allow_nan=False)


def built(name):
    return activation(name).double().eval()


def test_the_family_is_complete():
    assert list(activation_names()) == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_derivative_at_zero_is_what_autograd_returns(name):
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    built(name)(zero).sum().backward()
    assert zero.grad.item() == pytest.approx(REGISTRY[name].derivative_at_zero, abs=1e-15)


@pytest.mark.parametrize("name", EXPECTED)
def test_limits(name):
    ends = torch.tensor([-1e8, 1e8], dtype=torch.float64)
    with torch.no_grad():
        values = built(name)(ends).tolist()
    for value, limit in zip(values, REGISTRY[name].limits, strict=True):
        if math.isinf(limit):
            assert math.copysign(1, value) == math.copysign(1, limit)
            assert abs(value) > 1e5
        else:
            assert value == pytest.approx(limit, abs=1e-6)
    assert REGISTRY[name].bounded == all(map(math.isfinite, REGISTRY[name].limits))


@pytest.mark.parametrize("name", EXPECTED)
def test_parameters_are_the_modules_own_defaults(name):
    signature = inspect.signature(REGISTRY[name].module)
    for key, value in REGISTRY[name].parameters.items():
        assert signature.parameters[key].default == pytest.approx(value)
    activation(name, **REGISTRY[name].parameters)


@pytest.mark.parametrize("name", EXPECTED)
def test_entry_names_its_paper_and_an_initializer_that_exists(name):
    entry = REGISTRY[name]
    assert entry.url.startswith("https://")
    assert any(character.isdigit() for character in entry.paper)
    home = (
        relubook.layers.initializers
        if hasattr(relubook.layers.initializers, entry.initializer)
        else torch.nn.init
    )
    assert callable(getattr(home, entry.initializer))


FORMULAS = {
    "relu": lambda x: max(0.0, x),
    "relu6": lambda x: min(max(0.0, x), 6.0),
    "leaky_relu": lambda x: max(0.0, x) + 0.01 * min(0.0, x),
    "prelu": lambda x: max(0.0, x) + 0.25 * min(0.0, x),
    "rrelu": lambda x: max(0.0, x) + 11 / 48 * min(0.0, x),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "celu": lambda x: max(0.0, x) + min(0.0, math.expm1(x)),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "hardswish": lambda x: x * min(max(0.0, x + 3), 6) / 6,
    "softplus": lambda x: math.log1p(math.exp(x)),
    "squared_relu": lambda x: max(0.0, x) ** 2,
    "absolute": abs,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "softsign": lambda x: x / (1 + abs(x)),
    "step": lambda x: 1.0 if x > 0 else 0.0,
}


@pytest.mark.parametrize("name", EXPECTED)
@given(x=st.floats(-15, 15))
def test_values_follow_the_formula(name, x):
    with torch.no_grad():
        value = built(name)(torch.tensor([x], dtype=torch.float64)).item()
    assert value == pytest.approx(FORMULAS[name](x), rel=1e-6, abs=1e-9)


@given(x=finite)
def test_squared_relu_equals_its_composition(x):
    value = torch.tensor([x], dtype=torch.float64)
    assert torch.equal(squared_relu(value), F.relu(value) ** 2)


def test_derivatives_pass_gradcheck():
    x = torch.tensor([-2.0, -0.3, 0.4, 3.3], dtype=torch.float64, requires_grad=True)
    for name in EXPECTED:
        assert torch.autograd.gradcheck(built(name), (x,)), name


def test_step_has_a_gradient_of_zero_and_keeps_nan():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    y = step(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.0, 1.0]
    assert x.grad.tolist() == [0.0, 0.0, 0.0]
    assert step(torch.tensor([math.nan])).isnan().all()
    assert step(torch.tensor([-math.inf, math.inf, 1e-45])).tolist() == [0.0, 1.0, 1.0]


def test_unknown_name_is_named_with_its_neighbors():
    with pytest.raises(ValueError, match="'leeky_relu'.*leaky_relu"):
        activation("leeky_relu")


def test_unknown_parameter_is_named_with_its_neighbors():
    with pytest.raises(TypeError, match="'slope'.*negative_slope"):
        activation("leaky_relu", slope=0.1)
    with pytest.raises(TypeError, match="'tanh' has no parameter 'gain'"):
        activation("tanh", gain=2.0)


def test_parameter_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="negative_slope of 'leaky_relu' must be a finite"):
        activation("leaky_relu", negative_slope=math.nan)


SPELLINGS = [
    (0.0, torch.relu),
    (0.5, lambda x: torch.maximum(x, torch.zeros_like(x))),
    (1.0, lambda x: x.clamp(min=0)),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("value", "oracle"), SPELLINGS)
def test_chosen_derivative_at_zero_equals_torchs_three_spellings(value, oracle, dtype):
    numbers = [-3.0, -0.0, 0.0, 0.5, 2.0, -math.inf, math.inf]
    x = torch.tensor(numbers, dtype=dtype).repeat(2, 1)
    incoming = torch.linspace(-2, 5, 14, dtype=dtype).view(2, 7)
    results = []
    for f in (oracle, lambda z: relu_with_derivative_at_zero(z, value)):
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        out.backward(incoming)
        results.append((out.detach(), leaf.grad))
    (expected, expected_grad), (out, grad) = results
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert torch.equal(grad, expected_grad)


@given(value=st.floats(-100, 100), incoming=st.floats(-100, 100))
def test_chosen_derivative_multiplies_the_incoming_gradient(value, incoming):
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    relu_with_derivative_at_zero(x, value).backward(torch.full_like(x, incoming))
    assert x.grad.tolist() == [0.0, value * incoming, incoming]


def test_chosen_derivative_may_differ_by_member_and_gets_no_gradient_itself():
    x = torch.zeros(3, 2, 4, requires_grad=True)
    value = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    relu_with_derivative_at_zero(x, value[:, None, None]).sum().backward()
    assert x.grad[:, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert value.grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_chosen_derivative_under_function_transforms():
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    f = lambda z: relu_with_derivative_at_zero(z, 0.25)  # noqa: E731
    slopes = torch.func.vmap(torch.func.grad(f))(x)
    assert slopes.tolist() == [0.0, 0.25, 1.0]
    _, forward = torch.func.jvp(f, (x,), (torch.full_like(x, 3.0),))
    assert forward.tolist() == [0.0, 0.75, 3.0]
    away = torch.tensor([-1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (away,))
    assert torch.autograd.gradgradcheck(f, (away,))
    assert f(torch.tensor([math.nan])).isnan().all()


def test_chosen_derivative_refuses_what_makes_no_sense():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="value must be finite, not nan"):
        relu_with_derivative_at_zero(x, math.nan)
    with pytest.raises(ValueError, match="value must be finite"):
        relu_with_derivative_at_zero(x, torch.tensor([0.0, math.inf, 1.0]))
    with pytest.raises(ValueError, match=r"\(4,\) cannot be expanded to the input's \(2, 3\)"):
        relu_with_derivative_at_zero(x, torch.zeros(4))
    with pytest.raises(ValueError, match="cannot be expanded"):
        relu_with_derivative_at_zero(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="floating point, not torch.int64"):
        relu_with_derivative_at_zero(torch.zeros(2, dtype=torch.int64), 0.5)
