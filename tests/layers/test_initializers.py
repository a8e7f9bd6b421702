import functools
import math

import pytest
import scipy.stats
import torch
from torch import nn

from relubook.layers import initializers as init


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


@pytest.mark.parametrize("bias", [True, False])
def test_torch_default_equals_nn_linear(bias):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        layer = nn.Linear(6, 4, bias)
    weight, row = torch.empty(4, 6), torch.empty(4) if bias else None
    init.initialize_("torch", weight, row, generator=gen(11))
    assert torch.equal(weight, layer.weight)
    assert row is None or torch.equal(row, layer.bias)


def drawn(what, shape=(9, 5), seed=2, **options):
    weight, bias, generator = torch.full(shape, 7.0), torch.full(shape[:1], 7.0), gen(seed)
    init.initialize_(what, weight, bias, generator=generator, **options)
    return weight, bias, torch.rand(1, generator=generator)


def alike(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def by_hand(weight, bias, generator):
    weight.normal_(generator=generator)
    bias.uniform_(generator=generator)


SPELLED = [
    ("he_normal", ["he_normal_", "HeNormal", "kaiming_normal", nn.init.kaiming_normal_]),
    ("he_uniform", ["kaiming_uniform_", nn.init.kaiming_uniform_]),
    ("xavier_normal", ["glorot_normal", "xavier-normal", nn.init.xavier_normal_]),
    ("xavier_uniform", ["glorot_uniform", nn.init.xavier_uniform_]),
    ("lecun_normal", [init.lecun_normal_, init.initializer("lecun_normal")]),
    ("truncated_normal", [init.truncated_normal_]),
    ("orthogonal", [nn.init.orthogonal_, functools.partial(nn.init.orthogonal_, gain=1.0)]),
    ("rai", [init.rai_]),
    ("torch", [init.initializer("torch")]),
    (by_hand, [lambda w, b, g: by_hand(w, b, g)]),
]


@pytest.mark.parametrize(("name", "others"), SPELLED)
def test_spellings_draw_the_same_numbers(name, others):
    for other in others:
        assert alike(drawn(name), drawn(other)), other
    assert not torch.equal(drawn(name)[0], drawn(name, seed=3)[0])


@pytest.mark.parametrize("name", init._TABLE)
def test_weights_are_drawn_then_the_bias_is_zero_if_it_is_not_drawn(name):
    weight, bias, _ = drawn(name)
    assert (weight != 7).all()
    assert (bias == 0).all() != (name in ("rai", "torch"))


@pytest.mark.parametrize("name", init._TABLE)
def test_a_network_inside_a_stack_gets_the_numbers_of_a_network_alone(name):
    """The maps of a stack lie as (members, in, out), so that each is a strided view."""
    stack, biases, generators = torch.empty(3, 8, 9), torch.empty(3, 9), [gen(s) for s in (4, 9, 1)]
    for weight, bias, generator in zip(stack, biases, generators, strict=True):
        init.initialize_(name, weight.T, bias, generator=generator)
    for index, seed in enumerate((4, 9, 1)):
        assert alike((stack[index].T, biases[index]), drawn(name, (9, 8), seed)[:2])


def test_options_reach_the_function():
    weight, _, _ = drawn("kaiming_normal", a=0.2, mode="fan_out")
    assert torch.equal(
        weight, nn.init.kaiming_normal_(weight.clone(), 0.2, "fan_out", generator=gen(2))
    )
    constant, bias, _ = drawn(nn.init.constant_, val=3.0)
    assert (constant == 3).all()
    assert (bias == 0).all()


@pytest.mark.parametrize("own", [lambda weight: weight.normal_(), torch.Tensor.normal_])
def test_a_function_without_a_generator_is_seeded_by_it(own):
    before = torch.get_rng_state()
    first, second = drawn(own), drawn(own)
    assert alike(first, second)
    assert (first[1] == 0).all()
    weight, other, generator = torch.empty(9, 5), torch.empty(9, 5), gen(2)
    init.initialize_(own, weight, generator=generator)
    init.initialize_(own, other, generator=generator)
    assert torch.equal(weight, first[0])
    assert not torch.equal(weight, other)
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        init.initialize_(own, weight)
        torch.manual_seed(0)
        assert torch.equal(weight, torch.empty(9, 5).normal_())


def test_parameters_are_filled_in_place():
    layer = nn.Linear(3, 4)
    for what in ("rai", "torch", "he_normal", lambda weight: weight.normal_()):
        before = layer.weight.clone()
        init.initialize_(what, layer.weight, layer.bias, generator=gen(0))
        assert layer.weight.grad_fn is None
        assert layer.weight.requires_grad
        assert (layer.weight != before).all()


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    for name in init._TABLE:
        init.initialize_(name, torch.empty(4, 3), torch.empty(4), generator=gen(0))
    assert torch.equal(before, torch.get_rng_state())


def fill(what, *shape, bias=None, **options):
    return lambda: init.initialize_(what, torch.empty(shape), bias, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (fill("he_normal", 3), ValueError, r"\(out, in, \.\.\.\).*\(3,\)"),
        (fill("he_normal", 0, 2), ValueError, r"none 0, not \(0, 2\)"),
        (fill("he_normal", 3, 2, mode="fan"), ValueError, "[Mm]ode fan"),
        (fill("uniform", 3, 2, bound=-1.0), ValueError, "bound.*-1.0"),
        (fill("truncated_normal", 3, 2, std=0.0), ValueError, "std.*0.0"),
        (fill("truncated_normal", 3, 2, cut=-2.0), ValueError, "cut.*-2.0"),
        (fill("he_normal", 3, 2, a=math.nan), ValueError, "a of 'he_normal' must be a finite.*nan"),
        (fill("he_normal", 3, 2, bias=torch.empty(2)), ValueError, r"shape \(3,\), not \(2,\)"),
        (fill("rai", 3, 2), ValueError, "bias must not be None"),
        (fill("he", 3, 2), ValueError, "unknown initializer 'he'.*he_normal"),
        (fill("kaiming", 3, 2), ValueError, "unknown initializer 'kaiming'.*kaiming_normal"),
        (fill(lambda w: torch.randn(3, 2), 3, 2), ValueError, "must fill the weight in place"),
        (fill(None, 3, 2), TypeError, "a name or a function, not None"),
        (fill("he_normal", 3, 2, slope=0.1), TypeError, "'he_normal'.*'slope'.*it takes a, mode"),
        (fill(nn.init.sparse_, 3, 2), TypeError, "'sparse_'.*missing.*'sparsity'"),
        (fill(lambda w, b: None, 3, 2), TypeError, "missing.*'b'"),
    ],
)
def test_named_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("what", ["he_normal", "torch", lambda w: w.normal_()])
def test_bad_shapes_leave_everything_as_it_was(what):
    weight, bias, generator = torch.ones(3, 2), torch.ones(2), gen(0)
    with pytest.raises(ValueError, match="bias"):
        init.initialize_(what, weight, bias, generator=generator)
    assert (weight == 1).all()
    assert (bias == 1).all()
    assert torch.equal(generator.get_state(), gen(0).get_state())
