import pickle

import pytest
import torch
from recipe_kinds import gen, make
from torch import nn
from torch.nn.utils import parameters_to_vector

from relubook.layers.activations import REGISTRY
from relubook.layers.initializers import _TABLE
from relubook.layers.maxout import Maxout
from relubook.training.recipe import RESIDUALS


@pytest.mark.parametrize("name", REGISTRY)
def test_every_activation(name):
    made = make(activation=name)
    stack = made.stack(2, dtype=torch.float64).eval()
    x = torch.randn(9, 3, generator=gen(0), dtype=torch.float64)
    torch.testing.assert_close(stack(x)[1], made.single(1, dtype=torch.float64).eval()(x))
    assert type(stack.member(0).act1) is type(made.single(0).act1)


@pytest.mark.parametrize("name", _TABLE)
def test_every_initializer(name):
    made = make(initializer=name)
    vector = parameters_to_vector(made.single(5).parameters())
    assert torch.equal(made.stack([5]).parameter_vectors()[0], vector)


def test_default_draw_equals_a_sequential_of_nn_linear():
    made = make(initializer="torch")
    torch.manual_seed(8)
    oracle = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(),
        nn.Linear(6, 4),
    )  # fmt: skip
    member = made.stack([1, 8]).member(1)
    assert torch.equal(
        parameters_to_vector(member.parameters()), parameters_to_vector(oracle.parameters())
    )


@pytest.mark.parametrize(
    ("activation", "std"),
    [("relu", 2), (torch.relu, 2), (lambda x: x, 2), ("tanh", 1), (torch.tanh, 1), ("maxout", 1)],
)
def test_default_initializer_goes_with_the_activation(activation, std):
    pieces = 2 if activation == "maxout" else 1
    weight = make(inputs=300, widths=300 // pieces, activation=activation).single(0).linear1.weight
    assert weight.shape == (300, 300)
    assert weight.std().item() == pytest.approx((std / 300) ** 0.5, rel=0.02)


def test_residual_forms_by_hand():
    x = torch.randn(5, 3, generator=gen(1), dtype=torch.float64)
    for form in RESIDUALS[1:]:
        net = make(residual=form, widths=(6, 6)).single(0, dtype=torch.float64)
        if form == "pre-activation":
            h = net.linear1(x)
            h = (h + net.linear2(h.relu())).relu()
        else:
            h = net.linear1(x).relu()
            f = net.linear2(h)
            h = f.relu() + h if form == "relu(f)+x" else (f + h).relu()
        torch.testing.assert_close(net(x), net.linear3(h))


def test_maxout_member_is_the_maxout_layer():
    made = make(activation="maxout", widths=(4,))
    member = made.stack(1).member(0)
    layer = Maxout(3, 4, 2, generator=gen(0))
    assert torch.equal(member.linear1.weight, layer.weight)
    x = torch.randn(5, 3, generator=gen(1))
    assert torch.equal(member.act1(member.linear1(x)), layer(x))


def test_each_layer_has_an_activation_of_its_own():
    shared = nn.PReLU()
    net = make(activation=shared).single(0)
    assert len({id(p) for p in (shared.weight, net.act1.weight, net.act2.weight)}) == 3


def test_hidden_widths():
    assert make(widths=4).widths == (4,)
    assert make(widths=4, hidden=3).widths == (4, 4, 4)
    assert make(widths=4, hidden=0).hidden == 0
    assert make(widths=(4, 5)).hidden == 2
    assert make(widths=(4, 5)).parameter_count == 3 * 4 + 4 + 4 * 5 + 5 + 5 * 4 + 4
    assert make() == pickle.loads(pickle.dumps(make()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": 0}, "inputs must be.*0"),
        ({"outputs": 0}, "outputs must be.*0"),
        ({"widths": (4, 0)}, "every width must be.*0"),
        ({"widths": 4, "hidden": -1}, "hidden must be at least 0, not -1"),
        ({"hidden": 7}, "hidden must be 3, the number of widths, not 7"),
        ({"activation": "rellu"}, "unknown activation 'rellu'.*relu"),
        ({"activation": lambda x: x.sum()}, r"activation must return the shape.*\(2, 6\)"),
        ({"activation": nn.GLU()}, r"activation must return the shape.*not \(2, 3\)"),
        ({"initializer": "heh"}, "unknown initializer 'heh'"),
        ({"normalization": "group"}, "unknown normalization 'group'; known: none, batch, layer"),
        ({"normalization": lambda n: nn.LayerNorm(n + 1)}, "normalization does not fit the width"),
        ({"residual": "dense"}, "unknown residual 'dense'"),
        ({"residual": "relu(f)+x", "widths": (4, 5)}, r"widths must be equal.*\(4, 5\)"),
        ({"residual": "relu(f+x)", "activation": "maxout"}, "does not fit maxout"),
        ({"dropout": 1.0}, "dropout must be.*1.0"),
        ({"bias": float("nan")}, "bias must be.*nan"),
        ({"bias": True}, "bias must be.*True"),
        ({"bias": (1.0, 0.0)}, "low < high"),
        ({"bias": False, "initializer": "rai"}, "bias must not be None"),
        ({"activation": "maxout", "activation_options": {"pieces": 0}}, "pieces.*0"),
        (
            {"activation": "prelu", "activation_options": {"num_parameters": 5}},
            "activation does not fit the width 6",
        ),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "leaky_relu", "activation_options": {"slope": 0.1}}, "slope"),
        ({"activation": "maxout", "activation_options": {"slope": 0.1}}, "'slope'"),
        ({"activation": 3}, "activation must be"),
        ({"initializer_options": {"gain": 2.0}}, "'gain'"),
        ({"normalization": lambda n: n}, "normalization must make a module, not 6"),
    ],
)
def test_bad_types(changes, message):
    with pytest.raises(TypeError, match=message):
        make(**changes)
