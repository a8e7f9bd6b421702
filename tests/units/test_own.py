"""Activations of the user's own, against brute force on each call's output."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from relubook.layers.maxout import maxout
from relubook.units.diagnosis import diagnose
from relubook.units.watch import Watch

ZERO = "silent where 0"


class JumpReLU(nn.Module):
    """Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold)


class TopK(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(x).topk(2)
        return torch.zeros_like(x).scatter_(-1, top.indices, top.values)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x *= x > 0
        return x


class Gate(nn.Module):
    """Of half the width, as a gated linear unit."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return left * (right > 0)


class Coder(nn.Module):
    """A layer and its activation in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.fc(x)
        return torch.where(x > 0.2, x, 0), None


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, level: float) -> Tensor:
        return x * (x > level)


def masked(x: Tensor) -> Tensor:
    return x * (x > 0)


frozen = torch.no_grad()(masked)
detached = torch.no_grad()(lambda x: x)


class Calls(nn.Module):
    """A linear layer, then what is called as a function."""

    def __init__(self, function, features: int = 6) -> None:
        super().__init__()
        self.fc, self.function, self.out = nn.Linear(5, features), function, nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.fc(x)))


def outputs_of(module, model, batches):
    """Return all outputs of a module, by a hook."""
    seen = []
    hook = lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(batch.clone())
    handle.remove()
    return torch.cat([out.clone() for out in seen])


def check(site, out):
    """Compare a site with its outputs, inputs first and units last, one number at a time."""
    fired, by_input = [0] * out.shape[-1], [0] * out.shape[-1]
    for one in out.flatten(1, -2).tolist() if out.ndim > 2 else out[:, None].tolist():
        for unit in range(out.shape[-1]):
            count = sum(row[unit] != 0 for row in one)
            fired[unit] += count
            by_input[unit] += count > 0
    assert (site.fired.tolist(), site.fired_inputs.tolist()) == (fired, by_input)
    assert (site.inputs, site.observations) == (len(out), out.numel() // out.shape[-1])


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("kind", [JumpReLU, TopK, InPlace, Gate])
@pytest.mark.parametrize("key", ["class", "instance", "name", "pattern"])
def test_modules_by_what_names_them(kind, key, shape):
    model = nn.Sequential(
        nn.Linear(5, 6), kind(), nn.Linear(3 if kind is Gate else 6, 4), nn.ReLU()
    )
    with torch.no_grad():
        model[0].bias[0] = -9.0
    batches = [torch.randn(size, *shape) for size in (4, 3)]
    keys = {"class": kind, "instance": model[1], "name": "1", "pattern": "[1]"}
    report = diagnose(model, batches, activations={keys[key]: ZERO})
    assert kind is Gate or report["1"].dead[0]
    assert [(site.name, site.kind) for site in report] == [("1", kind.__name__), ("3", "relu")]
    check(report["1"], outputs_of(model[1], model, batches))
    check(report["3"], outputs_of(model[3], model, batches))
    assert report["1"].producer == (None if kind is Gate else "0")
    if kind is not Gate:
        peak = model[0](torch.cat(batches)).flatten(0, -2).amax(0)
        assert torch.equal(report["1"].peak, peak)


def test_units_are_followed_behind_it():
    model, x = nn.Sequential(nn.Linear(5, 6), TopK(), nn.ReLU()), torch.randn(4, 3, 5)
    report = diagnose(model, [x], activations={TopK: ZERO})
    assert [site.unit_dim for site in report] == [2, 2]
    check(report["2"], model(x))


def test_a_module_with_its_layer_inside():
    model, batches = nn.Sequential(Coder()), [torch.randn(4, 6) for _ in range(3)]
    site = diagnose(model, batches, activations={Coder: ZERO})["0"]
    out = outputs_of(model[0], model, batches)
    check(site, out)
    assert torch.equal(site.peak, out.amax(0))
    site = diagnose(Coder(), batches, activations={Coder: ZERO})[0]
    assert site.name == "Coder()"


@pytest.mark.parametrize(
    ("function", "key"),
    [
        (masked, masked),
        (lambda x: Step.apply(x, 0.1), Step),
        (lambda x: detached(frozen(x)) * 1, frozen),
    ],
)
def test_functions(function, key):
    model, batches = Calls(function), [torch.randn(size, 3, 5) for size in (4, 3)]
    (site,) = diagnose(model, batches, activations={key: ZERO})
    with torch.no_grad():
        check(site, torch.cat([function(model.fc(batch)) for batch in batches]))
    assert site.producer == "fc"
    assert site.name == f"{key.__name__}()"
    assert site.location.startswith("test_own.py")
    assert sys.getprofile() is None


def test_inside_another_activation_nothing_is_a_site():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.relu = JumpReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return masked(maxout(self.relu(self.inner(x)), 1))

    model, x = nn.Sequential(nn.Linear(5, 6), Outer()), torch.randn(7, 5)
    rules = {Outer: ZERO, JumpReLU: ZERO, masked: ZERO}
    with pytest.raises(ValueError, match="JumpReLU.*masked.*which the model did not call"):
        diagnose(model, [x], activations=rules)
    (site,) = diagnose(model, [x], activations={Outer: ZERO})
    check(site, model(x))
    report = diagnose(model, [x], activations={JumpReLU: ZERO, masked: ZERO})
    names = ["1.inner", "1.relu", "1.maxout()", "1.masked()"]
    assert [site.name for site in report] == names


def test_a_rule_of_the_users_own():
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid()), torch.randn(40, 5)
    site = diagnose(model, [x], activations={nn.Sigmoid: lambda out: out < 0.6})[0]
    assert site.fired.tolist() == (model(x) >= 0.6).sum(0).tolist()
    assert 0 < int(site.fired.sum()) < 240


def test_smooth_ones_are_listed_with_their_family_only():
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Sigmoid()), torch.randn(40, 5)
    report = diagnose(model, [x], activations={"2": "never silent"})
    assert [site.name for site in report] == ["1"]
    assert "Sigmoid (1 calls)" in repr(report)
    site = diagnose(model, [x], activations={"2": "never silent"}, family="all")["2"]
    torch.testing.assert_close(site.magnitude, model(x).double().sum(0))
    assert not site.dead.any()


def test_what_is_not_finite_is_no_silence():
    model, x = nn.Sequential(nn.Identity(), Hides()), torch.randn(4, 3)
    x[0] = torch.tensor([torch.nan, -torch.inf, -1.0])
    forward = lambda model, x: model(x)  # noqa: E731
    site = diagnose(model, [x], forward=forward, activations={Hides: ZERO}, count=len)[0]
    assert site.nonfinite.tolist() == [True, True, False]
    model, x = nn.Sequential(nn.Identity(), JumpReLU(3)), torch.full((4, 3), torch.nan)
    site = diagnose(model, [x], forward=forward, activations={JumpReLU: ZERO}, count=len)[0]
    assert site.fired.tolist() == [0, 0, 0]
    assert site.nonfinite.all()


class Hides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.0)


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    level=st.sampled_from([0.0, 0.4]),
)
def test_at_level_0_it_is_relu(width, sizes, level):
    layer, act = nn.Linear(3, width), JumpReLU(width)
    nn.init.constant_(act.threshold, level)
    batches = [torch.randn(size, 2, 3) for size in sizes]
    own = diagnose(nn.Sequential(layer, act), batches, activations={JumpReLU: ZERO})[0]
    relu = diagnose(nn.Sequential(layer, nn.Threshold(level, 0.0)), batches)[0]
    for name in ("fired", "fired_inputs", "peak", "state"):
        assert torch.equal(getattr(own, name), getattr(relu, name))
    assert (own.inputs, own.observations) == (relu.inputs, relu.observations)
    assert (own.producer, own.unit_dim, own.shape) == (relu.producer, relu.unit_dim, relu.shape)


@pytest.mark.parametrize(
    ("activations", "error", "words"),
    [
        ([JumpReLU], TypeError, "must be a mapping, not a list"),
        ({JumpReLU: "zero"}, ValueError, "must be in .*never silent.*or be a function of the out"),
        ({JumpReLU: None}, ValueError, "'silent where 0'"),
        ({torch.relu: ZERO}, TypeError, "built-in.*none of: a module"),
        ({3: ZERO}, TypeError, "names 3, which is none of: a module"),
        ({int: ZERO}, TypeError, "class 'int'.*none of: a module"),
        ({"5": ZERO}, ValueError, "names .'5'.*which the model did not call"),
        ({TopK(): ZERO}, ValueError, "TopK.*which the model did not call"),
        ({masked: ZERO}, ValueError, "masked.*which the model did not call"),
        ({JumpReLU: lambda out: out}, ValueError, r"JumpReLU must.*bool tensor.*\(4, 6\)"),
        ({JumpReLU: lambda out: 0}, ValueError, "JumpReLU must return a bool tensor"),
        ({JumpReLU: lambda out: out.any(1) > 0}, ValueError, "JumpReLU must return a bool"),
        ({"0": lambda out: 1 / 0}, ZeroDivisionError, "division"),
    ],
)
def test_bad_activations_leave_no_trace(activations, error, words):
    model, x = nn.Sequential(nn.Linear(5, 6), JumpReLU(), nn.ReLU()), torch.randn(4, 5)
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        diagnose(model, [x], activations=activations)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.getprofile() is None
    diagnose(model, [x])


def test_what_returns_no_numbers_is_no_activation():
    model, x = Calls(lambda x: positive(x) * x), torch.randn(4, 5)
    with pytest.raises(TypeError, match=r"positive returned torch\.bool"):
        diagnose(model, [x], activations={positive: ZERO})
    assert sys.getprofile() is None


def positive(x: Tensor) -> Tensor:
    return x > 0


def test_under_vmap_it_is_said_not_to_be_seen():
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.randn(3, 6, 5)), JumpReLU()

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda weight: self.act(x @ weight.T))(self.weight).relu()

    report = diagnose(Ensemble(), [torch.randn(4, 5)], activations={JumpReLU: ZERO})
    assert [site.name for site in report] == ["relu()"]
    assert "NOT SEEN: JumpReLU runs under vmap" in repr(report)


@pytest.mark.slow
def test_functions_that_torch_compiles():
    model, x = Calls(torch.compile(masked, backend="eager")), torch.randn(4, 5)
    (site,) = diagnose(model, [x], activations={model.function: ZERO})
    check(site, masked(model.fc(x)))


def test_a_call_that_fails():
    def fails(x: Tensor) -> Tensor:
        raise ArithmeticError

    def forward(x: Tensor) -> Tensor:
        with contextlib.suppress(ArithmeticError):
            fails(x)
        return masked(x)

    model, x = Calls(forward), torch.randn(4, 5)
    report = diagnose(model, [x], activations={fails: ZERO, masked: ZERO})
    assert [site.name for site in report] == ["masked()"]
    with pytest.raises(ArithmeticError):
        diagnose(Calls(fails), [x], activations={fails: ZERO})
    assert sys.getprofile() is None


def test_a_profiler_of_the_user():
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(frame))
    try:
        with pytest.raises(
            RuntimeError, match="a running profiler hides: stop it, or name the mod"
        ):
            diagnose(Calls(masked), [torch.randn(4, 5)], activations={masked: ZERO})
        before = len(seen)
        model = nn.Sequential(nn.Linear(5, 6), JumpReLU())
        diagnose(model, [torch.randn(4, 5)], activations={JumpReLU: ZERO})
        assert len(seen) > before
    finally:
        sys.setprofile(None)


# The models of transformers


def small(kind, **options):
    """Return a small language model of transformers."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def generate(model, batch):
    model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def by_hooks(model, kind, batches, run):
    """Count on how many tokens each output of the modules of a kind is not 0."""
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_hook(
                lambda module, args, out, name=name: counts.setdefault(name, []).append(
                    (out.detach() != 0).flatten(0, -2).long()
                )
            )
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    return {name: torch.cat(fires) for name, fires in counts.items()}


def tokens(*sizes):
    batches = [torch.randint(3, 50, (size, 6)) for size in sizes]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", [lambda model, batch: model(**batch), generate])
@pytest.mark.parametrize("kind", [JumpReLU, TopK, nn.ReLU])
def test_own_activations_of_a_language_model(kind, run):
    model = small("OPT", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32).eval()
    for layer in model.model.decoder.layers:
        layer.activation_fn = JumpReLU(24) if kind is JumpReLU else kind()
    batches = tokens(3, 2)
    rules = {kind: ZERO} if kind is not nn.ReLU else None
    report = diagnose(model, batches, forward=run, activations=rules)
    expected = by_hooks(model, kind, batches, run)
    assert len(expected) == 2
    assert [site.name for site in report] == list(expected)
    for site in report:
        assert site.fired.tolist() == expected[site.name].sum(0).tolist()
        assert (site.inputs, site.observations) == (5, len(expected[site.name]))
        assert site.calls == (8 if run is generate else 2)
        assert site.producer.endswith("fc1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_layers_in_chunks_and_shared_layers(kind):
    transformers = pytest.importorskip("transformers")
    config, model = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "albert": (transformers.AlbertConfig, transformers.AlbertModel),
    }[kind]
    options = {"embedding_size": 8} if kind == "albert" else {"chunk_size_feed_forward": 2}
    model = model(
        config(
            vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=24, hidden_act="relu", **options,
        )
    ).eval()  # fmt: skip
    batches, run = tokens(3, 2), lambda model, batch: model(**batch)
    report = diagnose(model, batches)
    expected = by_hooks(model, nn.ReLU, batches, run)
    assert [site.name for site in report] == list(expected)
    assert len(report) == (1 if kind == "albert" else 3)
    for site in report:
        assert site.fired.tolist() == expected[site.name].sum(0).tolist()
        assert (site.inputs, site.calls) == (5, 2 * 3)
        assert site.observations == 30 * (3 if kind == "albert" else 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["NewGELUActivation", "QuickGELUActivation"])
def test_smooth_activations_of_transformers(name):
    activations = pytest.importorskip("transformers.activations")
    kind = getattr(activations, name)
    model, x = nn.Sequential(nn.Linear(5, 6), kind()), torch.randn(9, 5)
    with torch.no_grad():
        model[0].bias[2] = -200.0
    rules = {kind: "never silent"}
    site = diagnose(model, [x], activations=rules, family="all")["1"]
    assert site.kind == name
    torch.testing.assert_close(site.magnitude, model(x).abs().double().sum(0))
    assert site.dormant.tolist() == [False, False, True, False, False, False]


# Watch


class Above(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


@pytest.mark.parametrize(
    ("key", "function"),
    [
        (JumpReLU, JumpReLU()),
        (masked, masked),
        (Step, lambda x: Step.apply(x, 0.1)),
        (None, nn.Hardshrink(9.0)),
        (Above, Above()),
    ],
)
def test_watch_reads_the_outputs(key, function):
    model, rules = Calls(function), {key: ZERO} if key else None
    if key is Above:
        rules = {Above: lambda out: out < 0.6}
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([-7.0, -7.0, -7.0, -30.0, 0.0, 0.0]))
    batches = [torch.randn(8, 3, 5) for _ in range(6)]
    with Watch(model, window=3, activations=rules) as watch:
        for step, batch in enumerate(batches):
            model(batch)
            if step == 2:
                first = watch.compute()[0].dead
                with torch.no_grad():
                    model.fc.bias[:2] = 20.0
    (site,) = watch.compute()
    (expected,) = diagnose(model, batches[3:], activations=rules)
    assert torch.equal(site.dead, expected.dead)
    assert site.name == expected.name
    out = model.function(model.fc(torch.cat(batches[3:]))).abs().amax((0, 1))
    assert (site.peak > 0).tolist() == (~expected.dead).tolist()
    torch.testing.assert_close(site.peak[~site.dead], out[~site.dead])
    alive = [3] if key is None else [4, 5]
    assert first.tolist() == [unit not in alive for unit in range(6)]
    assert [e.unit for e in watch.history if e.kind == "revival"] == [0, 1]


@pytest.mark.parametrize("then", [lambda x: x + 1, lambda x: x.add_(1)])
def test_watch_says_what_it_cannot_read(then):
    model, x = Calls(lambda x: then(masked(x))), torch.randn(8, 5)
    with (
        pytest.warns(UserWarning, match=r"cannot follow 0\.masked\(\): no module gets"),
        Watch(
            nn.Sequential(model, nn.Linear(2, 2), nn.ReLU()), activations={masked: ZERO}
        ) as watch,
    ):
        watch._model(x)
    assert watch.unfollowed == ["0.masked()"]
    with pytest.raises(ValueError, match="must be in"):
        Watch(model, activations={masked: 0})
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    with (
        pytest.warns(UserWarning, match="JumpReLU: activations names them"),
        Watch(model, activations={JumpReLU: ZERO}),
    ):
        model(x)
