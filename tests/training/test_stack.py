import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_kinds import KINDS
from torch import nn
from torch.nn.utils import parameters_to_vector

from relubook.layers.activations import activation_names
from relubook.layers.initializers import initializer_names
from relubook.layers.maxout import Maxout
from relubook.training.stack import (
    RESIDUALS,
    Recipe,
    StackedBatchNorm,
    StackedDropout,
    StackedLayerNorm,
    StackedLinear,
    StackedPReLU,
    StackedRReLU,
    keyed_uniform,
)

RECIPES = KINDS | {
    "narrow": {"widths": 2, "depth": 10},
    "constant bias": {"bias": 0.1},
}


def recipe(**changes):
    return Recipe(**{"inputs": 3, "widths": (6, 6, 6), "outputs": 4} | changes)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", RECIPES)
def test_member_equals_the_single_network_of_its_seed(name):
    made = recipe(**RECIPES[name])
    seeds = [3, 0, 2**40 + 1]
    stack = made.stack(seeds, dtype=torch.float64)
    x = torch.randn(9, 3, generator=gen(0), dtype=torch.float64)
    stack.eval()
    out = stack(x)
    for i, seed in enumerate(seeds):
        single = made.single(seed, dtype=torch.float64).eval()
        taken = stack.member(i)
        assert not taken.training
        assert list(single.state_dict()) == list(taken.state_dict())
        for key, value in single.state_dict().items():
            assert torch.equal(value, taken.state_dict()[key]), key
        vector = parameters_to_vector(single.parameters())
        assert torch.equal(vector, stack.parameter_vectors()[i])
        assert len(vector) == made.parameter_count
        torch.testing.assert_close(out[i], single(x), rtol=1e-12, atol=1e-14)
    each = torch.stack([x, x + 1, -x])
    torch.testing.assert_close(stack(each)[1], stack.member(1)(x + 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [*activation_names()])
def test_every_activation(name):
    made = recipe(activation=name)
    stack = made.stack(2, dtype=torch.float64).eval()
    x = torch.randn(9, 3, generator=gen(0), dtype=torch.float64)
    torch.testing.assert_close(stack(x)[1], made.single(1, dtype=torch.float64).eval()(x))
    assert type(stack.member(0).act1) is type(made._activation())


@pytest.mark.parametrize("name", initializer_names())
def test_every_initializer(name):
    made = recipe(initializer=name)
    assert torch.equal(
        made.stack([5]).parameter_vectors()[0], parameters_to_vector(made.single(5).parameters())
    )


def test_default_draw_equals_a_sequential_of_nn_linear():
    made = recipe(initializer="torch")
    with torch.random.fork_rng():
        torch.manual_seed(8)
        oracle = nn.Sequential(
            nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(),
            nn.Linear(6, 4),
        )  # fmt: skip
    member = made.stack([1, 8]).member(1)
    assert torch.equal(
        parameters_to_vector(member.parameters()), parameters_to_vector(oracle.parameters())
    )


def test_residual_forms_by_hand():
    x = torch.randn(5, 3, generator=gen(1), dtype=torch.float64)
    for form in RESIDUALS[1:]:
        net = recipe(residual=form, widths=(6, 6)).single(0, dtype=torch.float64)
        if form == "pre-activation":
            h = net.linear1(x)
            h = (h + net.linear2(h.relu())).relu()
        else:
            h = net.linear1(x).relu()
            f = net.linear2(h)
            h = f.relu() + h if form == "relu(f)+x" else (f + h).relu()
        torch.testing.assert_close(net(x), net.linear3(h))


def test_maxout_member_is_the_maxout_layer():
    made = recipe(activation="maxout", widths=(4,))
    member = made.stack(1).member(0)
    layer = Maxout(3, 4, 2, generator=gen(0))
    assert torch.equal(member.linear1.weight, layer.weight)
    x = torch.randn(5, 3, generator=gen(1))
    assert torch.equal(member.act1(member.linear1(x)), layer(x))


def test_stack_is_differentiable_and_members_are_apart():
    stack = recipe().stack(3)
    stack(torch.ones(2, 3))[1].sum().backward()
    grad = stack.linear1.weight.grad
    assert grad[1].abs().sum() > 0
    assert grad[0].abs().sum() == grad[2].abs().sum() == 0
    taken = stack.member(1)
    taken.linear1.weight.data.zero_()
    assert stack.linear1.weight[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("stacked", "plain"),
    [
        (StackedBatchNorm(3, 5, dtype=torch.float64), nn.BatchNorm1d),
        (StackedLayerNorm(3, 5, dtype=torch.float64), nn.LayerNorm),
    ],
)
def test_normalization_equals_torch_member_by_member(stacked, plain):
    x = 2 * torch.randn(3, 8, 5, generator=gen(0), dtype=torch.float64) + 1
    with torch.no_grad():
        stacked.weight.uniform_(0.5, 2, generator=gen(1))
        stacked.bias.uniform_(-1, 1, generator=gen(2))
    for mode in (True, True, False):
        for i in range(3):
            oracle = plain(5, dtype=torch.float64)
            oracle.load_state_dict(
                {k: v[i] if v.dim() else v for k, v in stacked.state_dict().items()}
            )
            want = oracle.train(mode)(x[i])
            if i == 0:
                # All members at once; keep what the oracle starts from for the others.
                before = {k: v.clone() for k, v in stacked.state_dict().items()}
                got = stacked.train(mode)(x)
                after = stacked.state_dict()
                new = {k: v.clone() for k, v in after.items()}
                stacked.load_state_dict(before)
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-13)
            for key, value in oracle.state_dict().items():
                state = new[key][i] if new[key].dim() else new[key]
                torch.testing.assert_close(state, value, rtol=1e-12, atol=1e-14)
        stacked.load_state_dict(new)


def test_prelu_and_rrelu_equal_torch():
    x = torch.randn(2, 7, 5, generator=gen(0), dtype=torch.float64)
    prelu = StackedPReLU(2, 5, 0.3, dtype=torch.float64)
    oracle = nn.PReLU(5, 0.3, dtype=torch.float64)
    assert torch.equal(prelu(x)[1], oracle(x[1]))
    rrelu = StackedRReLU([0, 1])
    assert torch.equal(rrelu.eval()(x), nn.RReLU().eval()(x))
    slopes = rrelu.train()(x) / x
    negative = slopes[x < 0]
    assert (slopes[x > 0] == 1).all()
    assert negative.min() >= 1 / 8
    assert negative.max() <= 1 / 3
    assert negative.std() > 0.04


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


def test_keyed_draws_are_uniform_and_independent():
    import scipy.stats

    u = keyed_uniform(range(20), 3, 1, 5000)
    assert scipy.stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    others = [
        keyed_uniform(range(1, 21), 3, 1, 5000),
        keyed_uniform(range(20), 4, 1, 5000),
        keyed_uniform(range(20), 3, 2, 5000),
        u.roll(1, 1),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 0.013
    dropout = StackedDropout([4], 0.5)
    first, second = (dropout(torch.ones(1, 10, 10)) for _ in range(2))
    assert not torch.equal(first, second)


def test_stack_pickles_and_leaves_the_random_state():
    before = torch.get_rng_state()
    made = recipe(normalization="batch", dropout=0.5, activation="rrelu")
    stack = made.stack(2)
    made.single(0)
    stack(torch.ones(4, 3))
    assert torch.equal(before, torch.get_rng_state())
    again = pickle.loads(pickle.dumps(stack))
    assert torch.equal(again.parameter_vectors(), stack.parameter_vectors())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": 0}, "inputs.*0"),
        ({"outputs": 0}, "outputs.*0"),
        ({"widths": (4, 0)}, r"width.*\(4, 0\)"),
        ({"widths": 4}, "depth="),
        ({"depth": 7}, "3 widths make depth 4, not 7"),
        ({"activation": "rellu"}, "unknown activation 'rellu'"),
        ({"initializer": "he"}, "unknown initializer 'he'"),
        ({"normalization": "group"}, "unknown normalization 'group'"),
        ({"residual": "dense"}, "unknown residual 'dense'"),
        ({"residual": "relu(f)+x", "widths": (4, 5)}, r"equal widths, not \(4, 5\)"),
        ({"residual": "relu(f+x)", "activation": "maxout"}, "does not fit maxout"),
        ({"dropout": 1.0}, "dropout.*1.0"),
        ({"bias": float("nan")}, "bias.*nan"),
        ({"bias": (1.0, 0.0)}, "low < high"),
        ({"bias": False, "initializer": "rai"}, "bias is False"),
        ({"activation": "maxout", "activation_options": {"pieces": 0}}, "pieces.*0"),
        (
            {"activation": "prelu", "activation_options": {"num_parameters": 5}},
            "num_parameters=5 does not fit",
        ),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_unknown_options():
    with pytest.raises(TypeError, match="slope"):
        recipe(activation="leaky_relu", activation_options={"slope": 0.1})
    with pytest.raises(TypeError, match="'slope'"):
        recipe(activation="maxout", activation_options={"slope": 0.1})
    with pytest.raises(TypeError, match="'gain'"):
        recipe(initializer_options={"gain": 2.0})


def test_bad_stacks():
    with pytest.raises(ValueError, match="at least one member"):
        recipe().stack(0)
    stack = recipe().stack(2)
    for shape in ((5, 4), (3,), (3, 5, 3)):
        with pytest.raises(ValueError, match=r"\(batch, 3\) or \(2, batch, 3\)"):
            stack(torch.ones(shape))
    with pytest.raises(IndexError, match="no member 2"):
        stack.member(2)
    with pytest.raises(ValueError, match="members must be at least 1"):
        StackedLinear(0, 2, 2)
