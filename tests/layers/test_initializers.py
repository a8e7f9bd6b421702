import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relubook.layers import initializers as init

FILLS = {
    "he_normal": init.he_normal_,
    "he_uniform": init.he_uniform_,
    "lecun_normal": init.lecun_normal_,
    "lecun_uniform": init.lecun_uniform_,
    "uniform": init.uniform_,
    "truncated_normal": init.truncated_normal_,
}


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(7, 5), (40, 40), (6, 3, 3, 3)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda t, g: init.he_normal_(t, generator=g),
            lambda t, g: nn.init.kaiming_normal_(t, nonlinearity="relu", generator=g),
        ),
        (
            lambda t, g: init.he_normal_(t, 0.2, "fan_out", generator=g),
            lambda t, g: nn.init.kaiming_normal_(t, 0.2, "fan_out", generator=g),
        ),
        (
            lambda t, g: init.he_uniform_(t, generator=g),
            lambda t, g: nn.init.kaiming_uniform_(t, nonlinearity="relu", generator=g),
        ),
        (
            lambda t, g: init.uniform_(t, 0.3, generator=g),
            lambda t, g: nn.init.uniform_(t, -0.3, 0.3, generator=g),
        ),
        (
            lambda t, g: init.uniform_(t, generator=g),
            lambda t, g: nn.init.kaiming_uniform_(t, math.sqrt(5), generator=g),
        ),
    ],
)
def test_equals_torch_nn_init(ours, theirs, shape):
    got, want = ours(torch.empty(shape), gen(3)), theirs(torch.empty(shape), gen(3))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("fill", "law"),
    [
        (init.he_normal_, lambda n: scipy.stats.norm(0, math.sqrt(2 / n))),
        (
            init.he_uniform_,
            lambda n: scipy.stats.uniform(-math.sqrt(6 / n), 2 * math.sqrt(6 / n)),
        ),
        (init.lecun_normal_, lambda n: scipy.stats.norm(0, math.sqrt(1 / n))),
        (
            init.lecun_uniform_,
            lambda n: scipy.stats.uniform(-math.sqrt(3 / n), 2 * math.sqrt(3 / n)),
        ),
        (init.uniform_, lambda n: scipy.stats.uniform(-1 / math.sqrt(n), 2 / math.sqrt(n))),
        (
            init.truncated_normal_,
            lambda n: scipy.stats.truncnorm(
                -2, 2, scale=math.sqrt(2 / n) / scipy.stats.truncnorm(-2, 2).std()
            ),
        ),
    ],
)
def test_law_of_the_draws(fill, law):
    fan_in = 20
    values = fill(torch.empty(2000, fan_in, dtype=torch.float64), generator=gen(0)).flatten()
    assert scipy.stats.kstest(values.numpy(), law(fan_in).cdf).pvalue > 1e-3
    assert abs(values.mean()) < 5 * law(fan_in).std() / math.sqrt(len(values))
    assert values.std().item() == pytest.approx(law(fan_in).std(), rel=0.02)


def test_rai_is_a_normal_draw_with_one_beta_draw_a_unit():
    fan_in = 9
    weight, bias = torch.empty(40000, fan_in, dtype=torch.float64), torch.empty(40000).double()
    init.rai_(weight, bias, generator=gen(1))
    values = torch.cat([weight, bias[:, None]], 1)
    scale = 0.6007 / math.sqrt(fan_in)

    def cdf(x):
        beta = scipy.stats.beta(2, 1).cdf(x)
        return (fan_in * scipy.stats.norm(0, scale).cdf(x) + beta) / (fan_in + 1)

    assert scipy.stats.kstest(values.flatten().numpy(), cdf).pvalue > 1e-3
    # Every place, the bias's too, is as likely to hold the Beta draw.
    for column in values.T:
        assert scipy.stats.kstest(column.numpy(), cdf).pvalue > 1e-4
    # 0.6007 keeps the second moment on the inputs of the paper's derivation.
    assert 0.6007**2 / 2 + 4 / 3 * 0.6007 / math.sqrt(2 * math.pi) + 0.5 == pytest.approx(
        1, abs=1e-4
    )


@pytest.mark.parametrize("name", init.initializer_names())
def test_member_equals_the_plain_layer_of_its_seed(name):
    seeds = [4, 9, 1]
    weight, bias = torch.empty(3, 5, 8), torch.full((3, 8), 7.0)
    init.initialize_(name, weight, bias, generator=[gen(s) for s in seeds], stacked=True)
    for i, seed in enumerate(seeds):
        w, b = torch.empty(8, 5), torch.full((8,), 7.0)
        init.initialize_(name, w, b, generator=gen(seed))
        assert torch.equal(weight[i].T, w)
        assert torch.equal(bias[i], b)
    assert not torch.equal(weight[0], weight[1])


def test_torch_default_equals_nn_linear():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        layer = nn.Linear(6, 4)
    weight, bias = torch.empty(1, 6, 4), torch.empty(1, 4)
    init.initialize_("torch", weight, bias, generator=gen(11), stacked=True)
    assert torch.equal(weight[0].T, layer.weight)
    assert torch.equal(bias[0], layer.bias)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(FILLS)),
    members=st.integers(1, 4),
    fan_in=st.integers(1, 30),
    out=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
def test_stacked_with_one_generator_draws_members_in_turn(name, members, fan_in, out, seed):
    stack = FILLS[name](torch.empty(members, fan_in, out), generator=gen(seed), stacked=True)
    g = gen(seed)
    loop = torch.stack(
        [FILLS[name](torch.empty(out, fan_in), generator=g).T for _ in range(members)]
    )
    assert torch.equal(stack, loop)


def test_parameters_and_strided_views_are_filled_in_place():
    weight = nn.Parameter(torch.zeros(4, 3))
    assert init.he_normal_(weight, generator=gen(0)) is weight
    assert weight.grad_fn is None
    assert weight.abs().min() > 0
    flat = torch.zeros(2, 3, 5).permute(2, 0, 1)
    init.he_normal_(flat, generator=gen(0), stacked=True)
    assert (flat != 0).all()


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    for name in init.initializer_names():
        init.initialize_(name, torch.empty(4, 3), torch.empty(4), generator=gen(0))
    assert torch.equal(before, torch.get_rng_state())


def test_positive_bias():
    assert torch.equal(init.positive_bias_(torch.empty(3)), torch.full((3,), 0.1))
    drawn = init.positive_bias_(torch.empty(2, 50), 0.1, 0.3, generator=gen(0), stacked=True)
    assert drawn.min() >= 0.1
    assert drawn.max() <= 0.3
    g = gen(0)
    assert torch.equal(drawn[0], init.positive_bias_(torch.empty(50), 0.1, 0.3, generator=g))
    assert torch.equal(drawn[1], init.positive_bias_(torch.empty(50), 0.1, 0.3, generator=g))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init.he_normal_(torch.empty(3)), r"\(out, in, \.\.\.\).*\(3,\)"),
        (lambda: init.he_normal_(torch.empty(3, 2), mode="fan"), "mode.*'fan'"),
        (lambda: init.he_normal_(torch.empty(3, 2), stacked=True), "members, in, out"),
        (lambda: init.he_normal_(torch.empty(0, 2, 2), stacked=True), "none of them 0"),
        (
            lambda: init.he_normal_(torch.empty(3, 2, 2), generator=[gen(0)], stacked=True),
            "3 generators, got 1",
        ),
        (lambda: init.he_normal_(torch.empty(2, 2), generator=[gen(0)]), "stacked=True"),
        (lambda: init.uniform_(torch.empty(2, 2), -1.0), "bound.*-1.0"),
        (lambda: init.truncated_normal_(torch.empty(2, 2), 0.0), "std.*0.0"),
        (lambda: init.positive_bias_(torch.empty(2), -0.1), "value.*-0.1"),
        (lambda: init.positive_bias_(torch.empty(2), 0.2, 0.1), "high.*0.1"),
        (lambda: init.positive_bias_(torch.empty(2, 2)), r"\(out,\)"),
        (lambda: init.rai_(torch.empty(3, 2), torch.empty(2)), r"bias of shape \(3,\)"),
        (lambda: init.initialize_("rai", torch.empty(3, 2)), "bias is None"),
    ],
)
def test_named_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_initializer():
    with pytest.raises(ValueError, match="unknown initializer 'he'"):
        init.initialize_("he", torch.empty(2, 2))
