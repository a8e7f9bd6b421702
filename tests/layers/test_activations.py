"""The registry against autograd, torch's own functions and the formulas."""

import copy
import functools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import relubook.layers.initializers
from relubook.layers.activations import (
    MODULES,
    REGISTRY,
    Elementwise,
    activation,
    registered,
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
    assert list(REGISTRY) == EXPECTED


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


class Swish(nn.Module):
    def __init__(self, beta=1.0):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta))

    def forward(self, input):
        return input * torch.sigmoid(self.beta * input)


def halved(input, factor=0.5):
    return factor * input


LEAKY = nn.LeakyReLU(0.3)
SPELLED = [
    *[(spelling, {}, F.leaky_relu, "leaky_relu") for spelling in ("leaky_relu", "LeakyReLU")],
    *[(spelling, {}, F.leaky_relu, "leaky_relu") for spelling in ("Leaky-ReLU", nn.LeakyReLU)],
    ("ReLU", {}, F.relu, "relu"),
    (nn.ReLU(), {}, F.relu, "relu"),
    (torch.relu, {}, F.relu, "relu"),
    (F.relu, {}, F.relu, "relu"),
    (torch.Tensor.relu, {}, F.relu, "relu"),
    (F.gelu, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh"), "gelu"),
    ("GELU", {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh"), "gelu"),
    (F.leaky_relu, {"negative_slope": 0.3}, LEAKY, "leaky_relu"),
    (nn.LeakyReLU, {"negative_slope": 0.3}, LEAKY, "leaky_relu"),
    (LEAKY, {}, LEAKY, "leaky_relu"),
    (torch.selu, {}, F.selu, "selu"),
    (torch.abs, {}, torch.abs, "absolute"),
    ("abs", {}, torch.abs, "absolute"),
    (step, {}, step, "step"),
    ("swish", {}, F.silu, "silu"),
    ("Hardtanh", {}, F.hardtanh, None),
    ("maxout", {"pieces": 3}, lambda x: x.view(2, 2, 3).amax(-1), None),
    (Swish, {"beta": 2.0}, lambda x: x * torch.sigmoid(2 * x), None),
    (Swish(2.0), {}, lambda x: x * torch.sigmoid(2 * x), None),
    (halved, {"factor": 0.25}, lambda x: x / 4, None),
    (functools.partial(halved, factor=0.25), {}, lambda x: x / 4, None),
    (torch.sin, {}, torch.sin, None),
]


@pytest.mark.parametrize(("what", "options", "oracle", "name"), SPELLED)
def test_every_spelling_is_the_function_it_names(what, options, oracle, name):
    x = torch.linspace(-3, 3, 12).view(2, 6)
    module = activation(what, **options)
    assert isinstance(module, nn.Module)
    torch.testing.assert_close(module(x), oracle(x))
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(copied(x), module(x))
    entry = registered(what)
    assert (entry and entry.name) == name
    assert registered(module) is entry


def test_a_users_own_function_is_not_taken_for_the_registry_s():
    def relu(x):
        return x

    assert registered(relu) is registered("unheard of") is None


def test_modules_tell_activations_from_other_modules():
    for what, options, _, _ in SPELLED:
        if what is not Swish and not isinstance(what, Swish):
            assert isinstance(activation(what, **options), MODULES)
    for name in REGISTRY:
        assert isinstance(activation(name), MODULES)
    others = nn.Linear(2, 2), nn.Softmax(-1), nn.Dropout(), nn.LayerNorm(2), nn.Sequential()
    assert not any(isinstance(module, MODULES) for module in others)


def test_a_function_shows_its_name():
    assert repr(activation(torch.relu)) == "Elementwise(relu)"
    shown = repr(activation(F.leaky_relu, negative_slope=0.3))
    assert shown == "Elementwise(leaky_relu, negative_slope=0.3)"


def test_a_function_may_be_traced():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), Elementwise(torch.relu)))
    assert "relu" in traced.code


def test_layers_share_no_parameters():
    shared = nn.PReLU(init=0.7)
    first, second = activation(shared), activation(shared)
    assert first.weight.item() == second.weight.item() == shared.weight.item()
    assert len({id(module.weight) for module in (shared, first, second)}) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: activation("leeky_relu"), ValueError, "'leeky_relu'.*leaky_relu"),
        (lambda: activation("Hardtan"), ValueError, "'Hardtan'.*Hardtanh"),
        (lambda: activation(3), TypeError, "a name, a module or a function, not 3"),
        (lambda: activation(None), TypeError, "a name, a module or a function, not None"),
        (lambda: activation(int), TypeError, "a name, a module or a function, not.*int"),
        (lambda: activation(nn.ReLU(), slope=1), TypeError, r"ReLU\(\) is built.*slope"),
        (lambda: activation(halved, slope=1.0), TypeError, "halved.*'slope'.*factor"),
        (lambda: activation(nn.Threshold), TypeError, "Threshold.*'threshold'"),
        (lambda: activation(relu_with_derivative_at_zero), TypeError, "missing.*'value'"),
        (lambda: activation(halved, factor=math.inf), ValueError, "factor of halved.*finite.*inf"),
    ],
)
def test_what_is_no_activation_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_unknown_parameter_is_named_with_its_neighbors():
    with pytest.raises(TypeError, match="'slope'.*negative_slope"):
        activation("leaky_relu", slope=0.1)
    with pytest.raises(TypeError, match="Tanh.*'gain'"):
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
    with pytest.raises(RuntimeError, match=r"sizes: \[2, 3\].*sizes: \[4\]"):
        relu_with_derivative_at_zero(x, torch.zeros(4))
    with pytest.raises(RuntimeError, match="expand"):
        relu_with_derivative_at_zero(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="floating point, not torch.int64"):
        relu_with_derivative_at_zero(torch.zeros(2, dtype=torch.int64), 0.5)
