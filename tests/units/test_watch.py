"""`Watch`: exact dates against `diagnose` step by step, no influence on training, no leftovers."""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relubook.units._kinds import by_unit
from relubook.units.diagnosis import AmbiguousUnitsError, diagnose
from relubook.units.watch import Event, Watch

sum_is_left_out = pytest.mark.filterwarnings(r"ignore:Watch. hooks cannot follow relu\(\)#2")

torchs_own = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # while tracing


def bytes_a_unit(watch):
    """Return the bytes held for each unit, without the history."""
    report = watch.compute()
    held = sum(s.peak.nbytes + s.dead.nbytes for s in (*watch._sites.values(), *report))
    held += sum(latest.nbytes for _, latest in watch._peaks.rows)
    return held / sum(site.units for site in report)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Mixed(nn.Module):
    """Modules, in place and reused; functions of a module's output; one of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.relu = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.fc1, self.fc2, self.drop = nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        x = self.relu(x + self.conv2(x))
        x = x.mean((2, 3))
        x = F.relu(self.fc1(x))
        return F.relu(x + self.drop(self.fc2(x)))


def train(
    model: nn.Module,
    shape: tuple[int, ...],
    steps: int,
    *,
    run: Callable[[Tensor], Tensor] | None = None,
    rate: float = 0.05,
) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        x = torch.randn(8, *shape)
        optimizer.zero_grad()
        (model if run is None else run)(x).square().mean().backward()
        optimizer.step()


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@sum_is_left_out
@pytest.mark.parametrize("build", [Mixed, lambda: mlp(5, 8, 8, 1)])
def test_training_is_bit_identical(build):
    shape = (2, 5, 5) if build is Mixed else (5,)
    plain = build()
    watched = copy.deepcopy(plain)
    state = torch.get_rng_state()
    train(plain, shape, 10)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    with Watch(watched, window=3):
        train(watched, shape, 10)
    assert same(plain, watched)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peaks_and_dates_agree_with_diagnose_of_each_step(dtype):
    """Record each step's own batch with the model as it was then, and replay the rules."""
    window, steps = 4, 24
    model = mlp(5, 12, 12, 1).to(dtype)
    shadow = copy.deepcopy(model)
    peaks: list[dict[str, Tensor]] = []
    history: list[Event] = []
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.6, momentum=0.9)
    with Watch(model, window=window) as watch:
        for _ in range(steps):
            x = torch.randn(3, 5).to(dtype)
            shadow.load_state_dict(model.state_dict())
            peaks.append({site.name: site.peak for site in diagnose(shadow, [x])})
            optimizer.zero_grad()
            (model(x) - 3 * x[:, :1]).abs().mean().backward()
            optimizer.step()
    dead = {name: torch.zeros_like(peak, dtype=torch.bool) for name, peak in peaks[0].items()}
    for start in range(0, steps, window):
        for name in peaks[0]:
            peak = torch.stack([step[name] for step in peaks[start : start + window]]).amax(0)
            for kind, mask in (
                ("death", (peak <= 0) & ~dead[name]),
                ("revival", (peak > 0) & dead[name]),
            ):
                for unit in mask.nonzero().flatten().tolist():
                    history.append(Event(start + 1, start + window, name, unit, kind))
            dead[name] = peak <= 0
    report = watch.compute()
    assert {event.kind for event in history} == {"death", "revival"}
    assert watch.history == history
    for site in report:
        assert torch.equal(site.dead, dead[site.name])
        assert torch.equal(
            site.peak, torch.stack([step[site.name] for step in peaks[-window:]]).amax(0).float()
        )
    assert (report.step, report.window, report.inputs) == (steps, window, 12)
    assert report.dead_fraction == sum(int(mask.sum()) for mask in dead.values()) / 24
    assert f"Steps {steps - window + 1} to {steps}, n = 12 inputs" in repr(report)


def test_sites_have_the_names_and_peaks_of_diagnose():
    model = Mixed()
    model.drop.p = 0.0
    model.bn.momentum = 0.0
    x = torch.randn(8, 2, 5, 5)
    cannot = pytest.warns(UserWarning, match=r"cannot follow relu\(\)#2: no module")
    with Watch(model, window=1) as watch, cannot:
        model(x)
    expected = diagnose(model, [x])
    assert {site.name for site in expected} - {site.name for site in watch.compute()} == {
        "relu()#2"
    }
    assert watch.unfollowed == ["relu()#2"]
    assert "Not followed: relu()#2." in repr(watch.compute())
    for site in watch.compute():
        torch.testing.assert_close(site.peak, expected[site.name].peak)


class Views(nn.Module):
    """Functions of what a module gets or returns, seen otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.own, self.out = nn.Linear(3, 4), Own(), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc(x).transpose(1, 2)).transpose(1, 2)
        h = F.relu6(self.out(h).flatten(0, 1)) + torch.relu(self.norm(h)).flatten(0, 1)
        left = self.fc(x)
        left.add_(1.0)
        return self.own(h) + F.relu(left).flatten(0, 1)


class Own(nn.Module):
    """A rectifier written by oneself, behind another in place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.hardtanh(x + 0.0, 0.0, 3.0, inplace=True) - 0.1)


def test_functions_of_a_view_are_followed_and_of_a_changed_tensor_are_not():
    model, x = Views(), torch.randn(2, 5, 3)
    expected = diagnose(model, [x])
    with Watch(model, window=1) as watch, pytest.warns(UserWarning, match="cannot follow"):
        model(x)
    names = [site.name for site in expected]
    assert len(names) == 6
    followed = [site.name for site in watch.compute()]
    assert followed == ["relu()#1", "relu6()", "relu()#2"]
    assert sorted(watch.unfollowed) == sorted(set(names) - set(followed))
    for site in watch.compute():
        torch.testing.assert_close(site.peak, expected[site.name].peak)


class Heads(nn.Module):
    """A rectifier per head and feature, and a convolution's behind a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 2), nn.Linear(12, 4)
        self.flat, self.heads = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.flat(self.conv(x).flatten(1)))
        return self.heads(x.unflatten(1, (2, -1)))


def test_units_over_several_dimensions_or_places_are_named():
    model, x = Heads(), torch.randn(5, 1, 3, 3)
    with Watch(model, window=1) as watch, pytest.warns(UserWarning, match="flat, heads: no module"):
        model(x)
    assert watch.unfollowed == ["flat", "heads"]


def test_recurrent_sites_are_named_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.RNN(3, 4, nonlinearity="relu"))
    with Watch(model) as watch, pytest.warns(UserWarning, match=r"2\.l0"):
        model(torch.randn(5, 2, 3))
    assert watch.unfollowed == ["2.l0"]


def test_a_death_and_a_revival():
    model = mlp(3, 4, 1)
    x = torch.rand(6, 3) + 0.1
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    with Watch(model, window=2) as watch:
        for step in range(12):
            with torch.no_grad():
                model[0].bias[1] = -100 if 4 <= step < 8 else 0
                model[0].bias[2] = -100
                model[0].bias[3] = torch.nan if step >= 10 else 0
            model(x)
    assert watch.history == [
        Event(1, 2, "1", 2, "death"),
        Event(5, 6, "1", 1, "death"),
        Event(9, 10, "1", 1, "revival"),
    ]
    site = watch.compute()["1"]
    assert site.dead.tolist() == [False, False, True, False]
    assert site.nonfinite.tolist() == [False, False, False, True]
    with pytest.raises(KeyError, match="the sites are 1"):
        watch.compute()["2"]


def test_sites_that_a_window_does_not_reach_stay_as_they_were():
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.which = mlp(2, 2, 2), mlp(2, 2, 2), "both"

        def forward(self, x: Tensor) -> Tensor:
            one = self.one(x) if self.which in ("both", "one") else x
            return one + (self.two(x) if self.which in ("both", "two") else x)

    model = Either()
    x = torch.rand(3, 2)
    with torch.no_grad():
        for part in (model.one[0], model.two[0]):
            part.weight.fill_(1.0)
            part.bias.copy_(torch.tensor([0.0, -100.0]))
    with Watch(model, window=1) as watch:
        model(x)
        first = watch.history
        model.which = "one"
        model(x)
        assert watch.history == first  # neither a death nor a revival in the other branch
        report = watch.compute()
        assert report["two.1"].dead.tolist() == [False, True]
        assert report["two.1"].peak.tolist() == [-torch.inf] * 2
        model.which = "two"
        model(x)
        assert watch.history == first
        with torch.no_grad():
            model.two[0].bias.fill_(-100)
        model(x)
        assert watch.history[len(first) :] == [Event(4, 4, "two.1", 0, "death")]


def test_dead_layer_is_called_out():
    model = mlp(3, 4, 1)
    nn.init.constant_(model[0].bias, -100)
    with Watch(model, window=1) as watch:
        model(torch.randn(2, 3))
    assert "DEAD LAYER: all 4 units of 1" in repr(watch.compute())


def test_levels_of_other_rectifiers():
    """Hardswish is silent up to -3, a threshold up to its own."""
    acts = [nn.Hardswish(), nn.Threshold(2.0, 0.0), nn.ReLU6(), nn.Hardtanh(0.0, 3.0)]
    for act, level in zip(acts, (-3.0, 2.0, 0.0, 0.0), strict=True):
        model = nn.Sequential(nn.Linear(2, 2), act)
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.copy_(torch.tensor([level, level + 0.1]))
        with Watch(model, window=1) as watch:
            model(torch.randn(3, 2))
        assert watch.compute()["1"].dead.tolist() == [True, False]
        assert diagnose(model, [torch.randn(3, 2)])["1"].dead.tolist() == [True, False]


def test_what_counts_as_a_step():
    model = mlp(3, 4, 1)
    x = torch.randn(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, window=1) as watch:
        model(x)
        with torch.no_grad():
            model(x)
        model.eval()
        model(x)
        model.train()
        model(x)
    assert watch.step == 2
    with Watch(model, window=2, optimizer=optimizer) as watch:
        for _ in range(4):
            for _ in range(3):  # gradient accumulation
                model(x).sum().backward()
            optimizer.step()
    assert (watch.step, watch.compute().inputs) == (4, 12)
    assert not optimizer._optimizer_step_post_hooks


def test_compute_and_attach():
    model = mlp(3, 4, 1)
    watch = Watch(model, window=2)
    with watch:
        model(torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="no window of 2 steps is complete: 1 steps"):
            watch.compute()
        model(torch.randn(2, 3))
        assert watch.compute().step == 2
        with pytest.raises(RuntimeError, match="attached already"):
            watch.attach()
    assert watch.compute().step == 2
    watch.attach()  # goes on where it was
    model(torch.randn(2, 3))
    model(torch.randn(2, 3))
    watch.close()
    watch.close()
    assert watch.compute().step == 4


def no_hooks(model: nn.Module) -> bool:
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._forward_hooks_always_called
        for module in model.modules()
    )


@sum_is_left_out
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_are_removed_after_an_exception(error):
    model = Mixed()

    def fail_later() -> None:
        with Watch(model):
            model(torch.randn(8, 2, 5, 5))
            raise error

    with pytest.raises(error):
        fail_later()
    assert no_hooks(model)

    def fail(module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            raise error

    handle = model.fc2.register_forward_pre_hook(fail)  # in the middle of a forward pass
    with pytest.raises(error), Watch(model):
        model(torch.randn(8, 2, 5, 5))
    handle.remove()
    assert no_hooks(model)
    assert torch.overrides._len_torch_function_stack() == 0


def test_the_audit_leaves_no_trace_when_it_fails():
    model = Mixed()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError), Watch(model):
        model(torch.randn(8, 3, 5, 5))  # the wrong number of channels
    assert no_hooks(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert model.training
    assert torch.is_grad_enabled()


def test_inputs_changed_in_place_are_audited_on_a_copy():
    model = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(2, 4)
    before = x.clone()
    with Watch(model, window=1) as watch:
        model(x)
    assert torch.equal(watch.compute()["1"].peak, before.amax(0))


def test_bad_arguments():
    model = mlp(3, 4, 1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        Watch(lambda x: x)
    with pytest.raises(ValueError, match="at least 1"):
        Watch(model, window=0)
    with pytest.raises(ValueError, match="at least 1"):
        Watch(model, window=2.5)
    with pytest.raises(TypeError, match="optimizer must be"):
        Watch(model, optimizer=model)
    with pytest.raises(ValueError, match="called no rectifier"), Watch(nn.Linear(3, 2)) as watch:
        watch._model(torch.randn(2, 3))
    lone = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 1))
    with pytest.raises(AmbiguousUnitsError, match="unit_dim="), Watch(lone):
        lone(torch.randn(2, 3, 4, 4))
    with Watch(lone, unit_dim={"0": 1}, window=1) as watch:
        lone(torch.randn(2, 3, 4, 4))
    assert watch.compute()["0"].units == 3


def test_a_site_with_unclear_units_is_named_beside_others():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU())
    with (
        Watch(model, window=1) as watch,
        pytest.warns(UserWarning, match=r"(?s)follow 0.*unit_dim="),
    ):
        model(torch.randn(2, 3, 4, 4))
    assert [site.name for site in watch.compute()] == ["2"]
    assert [name.partition("#")[0] for name in watch.unfollowed] == ["0"]


class Often(nn.Module):
    """One rectifier that serves as many calls as asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu, self.second = nn.Linear(3, 3), nn.ReLU(), True

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.fc(x))
        return self.relu(self.fc(x)) if self.second else x


@pytest.mark.parametrize("second", [True, False])
def test_a_module_called_more_or_less_often_is_named(second):
    """Nothing tells which of its calls was left out or added."""
    model, x = Often(), torch.randn(4, 3)
    model.second = second
    names = ["relu#1", "relu#2"] if second else ["relu"]
    with Watch(model, window=1) as watch:
        model(x)
        assert [site.name for site in watch.compute()] == names
        model.second = not second
        with pytest.warns(UserWarning, match="more or less often"):
            model(x)
        model(x)
    assert watch.compute().sites == []
    assert watch.unfollowed == names


def test_a_call_by_keyword_is_read_from_what_came_before():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu = nn.Linear(3, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(input=self.fc(x))

    model, x = Keyword(), torch.randn(2, 3)
    with Watch(model, window=1) as watch:
        model(x)
    assert torch.equal(watch.compute()["relu"].peak, model.fc(x).amax(0))


def test_checkpointed_parts_are_not_counted_twice():
    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.out = mlp(3, 4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(checkpoint(self.part, x, use_reentrant=False))

    model = Saved()
    with Watch(model, window=1) as watch:
        for _ in range(3):
            model(torch.randn(4, 3)).sum().backward()
    assert [site.name for site in watch.compute()] == ["part.1", "out"]
    assert watch.step == 3


@sum_is_left_out
def test_autocast_and_double():
    plain = Mixed()
    for kind in ("autocast", "double"):
        one, two = copy.deepcopy(plain), copy.deepcopy(plain)
        dtype = torch.float64 if kind == "double" else torch.float32
        one, two = one.to(dtype), two.to(dtype)

        def run(model: nn.Module, kind: str = kind, dtype: torch.dtype = dtype) -> None:
            def forward(x: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                    return model(x.to(dtype)).to(dtype)

            train(model, (2, 5, 5), 6, run=forward)

        run(one)
        with Watch(two, window=2) as watch:
            run(two)
            assert bytes_a_unit(watch) <= 16
        assert same(one, two)
        assert len(watch.compute()) == 3


@pytest.mark.slow
@sum_is_left_out
@torchs_own
@pytest.mark.parametrize(
    ("backend", "order"),
    [
        ("eager", "called first"),
        *(
            (backend, order)
            for backend in ("eager", "aot_eager")
            for order in ("attached first", "compiled first", "in place")
        ),
    ],
)
def test_compiled_models(backend, order):
    torch._dynamo.reset()
    plain = Mixed()
    model = copy.deepcopy(plain)
    model.drop.p = plain.drop.p = 0.0
    expected = copy.deepcopy(plain)
    with Watch(expected, window=2) as reference:
        train(expected, (2, 5, 5), 6)
    if order == "attached first":
        watch = Watch(model, window=2).attach()
        compiled = torch.compile(model, backend=backend)
    elif order == "in place":
        model.compile(backend=backend)
        compiled = model
        watch = Watch(model, window=2).attach()
    else:
        compiled = torch.compile(model, backend=backend)
        if order == "called first":
            compiled(torch.randn(8, 2, 5, 5))
            model.load_state_dict(plain.state_dict())
        watch = Watch(compiled, window=2).attach()
    train(model, (2, 5, 5), 6, run=compiled)
    watch.close()
    assert watch.step == 6
    assert same(model, expected)
    assert [site.name for site in watch.compute()] == [site.name for site in reference.compute()]
    for site in watch.compute():
        assert torch.equal(site.peak, reference.compute()[site.name].peak)
    assert no_hooks(model)
    compiled(torch.randn(8, 2, 5, 5))  # compiled code that still calls a removed hook
    assert watch.step == 6
    torch._dynamo.reset()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    dim=st.integers(-5, -1),
    last=st.booleans(),
)
def test_by_unit_is_amax(shape, dim, last):
    if -dim > len(shape):
        dim = -len(shape)
    x = torch.randn(shape)
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    rest = [d for d in range(len(shape)) if d != dim + len(shape)]
    assert torch.equal(by_unit(x, dim), x.amax(rest) if rest else x)
    x[(0,) * x.ndim] = torch.nan
    assert int(by_unit(x, dim).isnan().sum()) == 1


@pytest.mark.parametrize("shape", [(32, 16, 28, 28), (4, 100, 3, 3), (4, 8, 9), (2, 3, 4, 5, 6)])
def test_by_unit_of_convolutions(shape):
    x = torch.randn(shape)
    rest = [d for d in range(len(shape)) if d != 1]
    for y in (x, x.transpose(1, -1).contiguous().transpose(1, -1), x.transpose(0, 1)):
        kept = [d for d in range(len(shape)) if d != 1]
        assert torch.equal(by_unit(y, 1 - len(shape)), y.amax(kept))
    assert rest


@pytest.mark.parametrize(
    ("build", "shape"),
    [(lambda: nn.Linear(5, 6), (4, 5)), (lambda: nn.Conv2d(5, 6, 1), (4, 5, 8, 9))],
    ids=["linear", "convolution"],
)
def test_passes_of_other_kinds_are_read_into_the_same_window(build, shape):
    """The usual pass has a way of its own; every other must meet it in the window's peaks."""
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.ReLU(), nn.Identity())
    seen: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().float()))

    def fail(*_: Any) -> None:
        raise ValueError("in the middle of a pass")

    def batch(size: int = 4) -> Tensor:
        return torch.randn(size, *shape[1:])

    with Watch(model, window=9) as watch:
        model(batch())
        seen.clear()  # the audit's and the first pass's, which was read twice
        watch._sites["1"].peak.fill_(-torch.inf)
        watch._sites["1"].latest.fill_(-torch.inf)
        large = 1000 * batch(2)
        model(torch.cat([large, -large]))  # the largest, read in the usual way
        with torch.autocast("cpu", torch.bfloat16):
            model(20 * batch())
        model(batch(9))
        model(batch(9).to(memory_format=torch.channels_last) if len(shape) == 4 else batch(9))
        model(batch(0))
        handle = model[2].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="in the middle"):
            model(30 * batch(9))
        handle.remove()
        if len(shape) == 2:
            model(torch.randn(2, 3, 5))
        while watch.step < 9:
            model(batch(9))
    peaks = [x.movedim(-1 if len(shape) == 2 else 1, -1).flatten(0, -2) for x in seen]
    assert len(seen) == 9 - 1 + 1  # all steps but the first, and the pass that failed
    assert torch.equal(watch.compute().sites[0].peak, torch.cat(peaks).amax(0))
    assert torch.equal(torch.cat(peaks).amax(0), peaks[0].amax(0))
    assert watch.unfollowed == []


@sum_is_left_out
def test_memory_is_at_most_sixteen_bytes_a_unit():
    for model, x in ((mlp(5, 64, 64, 1), torch.randn(4, 5)), (Mixed(), torch.randn(4, 2, 5, 5))):
        with Watch(model, window=1) as watch:
            model(x)
            assert bytes_a_unit(watch) <= 16


def _worker(rank: int, path: str) -> None:
    torch.manual_seed(0)
    model = mlp(2, 4, 1)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [-1.0, 0], [1.0, 0], [0.0, 0]]))
        model[0].bias.copy_(torch.tensor([0.0, 0, 0, -1]))
    parallel = nn.parallel.DistributedDataParallel(model)
    sign = 1.0 if rank == 0 else -3.0
    with Watch(parallel, window=2) as watch:
        for step in range(4):
            x = torch.full((3 + rank, 2), sign * (step + 1.0))
            if rank == 1 and step == 3:
                x[0, 0] = torch.nan
            parallel(x).sum().backward()
    first = [event for event in watch.history if event.until == 2]
    torch.save((watch.compute(), first), f"{path}/{rank}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_merge_by_their_maximum(tmp_path, two_processes):
    two_processes(_worker, str(tmp_path))
    reports = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(2)]
    for report, first in reports:
        # Each of units 0 and 1 fires in one process only; unit 3 in none.
        assert first == [Event(1, 2, "1", 3, "death")]
        assert report.inputs == 2 * 3 + 2 * 4
        assert report.sites[0].nonfinite.any()  # one process's NaN reaches both
    one, two = (report.sites[0] for report, _ in reports)
    assert torch.equal(one.dead, two.dead)
    assert torch.equal(one.peak, two.peak)


def test_no_warning_in_the_usual_case():
    model = mlp(3, 4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Watch(model, window=1):
            model(torch.randn(2, 3)).sum().backward()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    torch.use_deterministic_algorithms(True, warn_only=True)
    plain = mlp(5, 8, 8, 1).cuda()
    watched = copy.deepcopy(plain)
    train(plain, (5,), 6, run=lambda x: plain(x.cuda()))
    with Watch(watched, window=2) as watch:
        train(watched, (5,), 6, run=lambda x: watched(x.cuda()))
    torch.use_deterministic_algorithms(False)
    assert same(plain, watched)
    assert watch.compute().sites[0].dead.device.type == "cpu"


# Copies, compiled code, late parts, wrapped optimizers, nested watches.


def test_a_copy_of_a_watched_model_is_not_watched(tmp_path):
    model, x = mlp(3, 4, 1), torch.randn(5, 3)
    with Watch(model, window=1) as watch:
        model(x)
        before = watch.compute()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.fill_(1.0)
        twin(x)
        assert watch.compute() is before
        assert watch.step == 1
        torch.save(model, tmp_path / "watched.pt")
        torch.save(twin, tmp_path / "twin.pt")
        model(x)
        assert watch.step == 2
        assert torch.equal(watch.compute()["1"].peak, before["1"].peak)
    for name in ("watched.pt", "twin.pt"):
        loaded = torch.load(tmp_path / name, weights_only=False)
        loaded(x).sum().backward()
        assert watch.step == 2
    assert b"relubook" not in (tmp_path / "watched.pt").read_bytes()  # loads without this package
    with Watch(twin, window=1) as other:
        twin(x)
    assert other.step == 1


@pytest.mark.slow
@torchs_own
@pytest.mark.parametrize("known", ["wrapper", "architecture", "step"])
def test_code_that_was_compiled_before(known):
    """The watched module is not compiled itself, as far as it can tell."""
    torch._dynamo.reset()
    model, x = mlp(3, 4, 1), torch.randn(5, 3)
    call: Callable[[Tensor], Tensor] = torch.compile(model, backend="eager")
    if known == "architecture":
        other = torch.compile(copy.deepcopy(model), backend="eager")
        other(x)
    elif known == "step":

        @torch.compile(backend="eager")
        def call(x: Tensor) -> Tensor:
            return model(2 * x).square()

    if known != "architecture":
        call(x)
    with Watch(model, window=1) as watch:
        call(x)
        call(x)
    assert watch.step == 2
    seen = 2 * x if known == "step" else x
    assert torch.equal(watch.compute()["1"].peak, model[0](seen).amax(0))
    torch._dynamo.reset()


def test_a_watch_that_saw_no_step_says_why():
    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 4, 1)

        def training_step(self, x: Tensor) -> Tensor:
            return self.net(x)

    model, x = Lightning(), torch.randn(2, 3)
    not_called = r"saw no step: Lightning itself was not called.*training_step"
    no_training = "Sequential itself was not called in training mode with gradients on, or the opt"
    with pytest.warns(UserWarning, match=not_called), Watch(model):
        model.training_step(x)
    with pytest.warns(UserWarning, match=no_training), Watch(model.net):
        model.net.eval()(x)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.warns(UserWarning, match=no_training),
        Watch(model.net, optimizer=optimizer),
    ):
        model.net(x)
    with pytest.warns(UserWarning, match=not_called), Watch(model, optimizer=optimizer):
        optimizer.step()
    watch = Watch(model).attach()
    with pytest.warns(UserWarning, match="saw no step"):
        watch.close()
    watch.close()  # once is enough
    with pytest.raises(KeyboardInterrupt), Watch(model):  # the error says it all
        raise KeyboardInterrupt


class Experts(nn.Module):
    """Each input goes to one expert; a pass calls those that get some."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 4), act or nn.ReLU(inplace=True), nn.Linear(4, 1))
            for _ in range(3)
        )

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 1)
        for number, expert in enumerate(self.experts):
            mine = which == number
            if bool(mine.any()):
                out[mine] = expert(x[mine])
        return out


def test_parts_that_the_audit_did_not_reach_are_named_when_they_are_called():
    model, x = Experts(), torch.randn(6, 3)
    with Watch(model, window=1) as watch:
        model(x, torch.tensor([0, 0, 0, 0, 0, 0]))
        assert watch.unfollowed == []
        with pytest.warns(UserWarning, match=r"follow experts\.2: the audit did not") as caught:
            model(x, torch.tensor([0, 0, 0, 2, 2, 2]))
        assert len(caught) == 1
        model(x, torch.tensor([0, 0, 0, 2, 2, 2]))  # once is enough
        assert [site.name for site in watch.compute()] == ["experts.0.1"]
        assert watch.compute().unfollowed == ["experts.2"]
    assert no_hooks(model)


@pytest.mark.filterwarnings("ignore:Watch. hooks cannot follow")
def test_a_rectifier_shared_by_late_parts_is_named():
    model, x = Experts(nn.ReLU()), torch.randn(6, 3)
    with Watch(model, window=1) as watch:
        model(x, torch.tensor([0, 0, 0, 2, 2, 2]))
        assert len(watch.compute()) == 2
        with pytest.warns(UserWarning, match="more or less often than in the audit"):
            model(x, torch.tensor([0, 0, 1, 2, 2, 2]))
    assert watch.compute().sites == []
    assert len(watch.unfollowed) == 3


@pytest.mark.filterwarnings("ignore:Watch. hooks cannot follow")
def test_training_with_late_parts_is_bit_identical():
    plain = Experts()
    watched = copy.deepcopy(plain)
    for model in (plain, watched):
        with Watch(model) if model is watched else contextlib.nullcontext():
            drawn = torch.Generator().manual_seed(0)
            route = lambda x, model=model, drawn=drawn: model(  # noqa: E731
                x, torch.randint(3, (1,), generator=drawn).expand(len(x))
            )
            train(model, (3,), 8, run=route)
    assert same(plain, watched)


def test_optimizers_that_wrap_another():
    """As Accelerate's does: an ``Optimizer`` in name, which never initialized its own hooks."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

    model = mlp(3, 4, 1)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = Wrapper(inner)
    with Watch(model, window=1, optimizer=wrapper) as watch:
        for _ in range(2):
            model(torch.randn(2, 3)).sum().backward()
            wrapper.step()
    assert watch.step == 2
    assert not inner._optimizer_step_post_hooks


def test_nested_watches_agree():
    model, x = nn.Sequential(mlp(3, 4, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(5, 3)
    with Watch(model, window=1) as outer, Watch(model, window=1) as inner:
        for step in range(6):
            with Watch(model[0], window=1) as part:  # audits in the midst of the others' pass
                model(x)
                assert (outer.step, inner.step, part.step) == (step + 1, step + 1, 1)
    assert outer.unfollowed == inner.unfollowed == part.unfollowed == []
    expected = diagnose(model, [x])
    for watch, prefix in ((outer, ""), (inner, ""), (part, "0.")):
        for site in watch.compute():
            torch.testing.assert_close(site.peak, expected[prefix + site.name].peak)
    assert no_hooks(model)
