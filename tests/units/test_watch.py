"""`Watch`: exact dates against `diagnose` step by step, no influence on training, no leftovers."""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relubook.units.diagnosis import AmbiguousUnitsError, diagnose
from relubook.units.watch import Event, Watch, channel_peak


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


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


@pytest.mark.parametrize("functional", ["ignore", "follow"])
@pytest.mark.parametrize("build", [Mixed, lambda: mlp(5, 8, 8, 1)])
def test_training_is_bit_identical(build, functional):
    shape = (2, 5, 5) if build is Mixed else (5,)
    plain = build()
    watched = copy.deepcopy(plain)
    state = torch.get_rng_state()
    train(plain, shape, 10)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    with Watch(watched, window=3, functional=functional):
        train(watched, shape, 10)
    assert same(plain, watched)
    assert torch.equal(torch.get_rng_state(), expected)


def test_peaks_and_dates_agree_with_diagnose_of_each_step():
    """Record each step's own batch with the model as it was then, and replay the rules."""
    window, steps = 4, 24
    model = mlp(5, 12, 12, 1)
    shadow = copy.deepcopy(model)
    peaks: list[dict[str, Tensor]] = []
    history: list[Event] = []
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.6, momentum=0.9)
    with Watch(model, window=window) as watch:
        for _ in range(steps):
            x = torch.randn(3, 5)
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
            site.peak, torch.stack([step[site.name] for step in peaks[-window:]]).amax(0)
        )
    assert (report.step, report.window, report.inputs) == (steps, window, 12)
    assert report.dead_fraction == sum(int(mask.sum()) for mask in dead.values()) / 24
    assert f"Steps {steps - window + 1} to {steps}, n = 12 inputs" in repr(report)


def test_every_site_is_followed_with_the_names_of_diagnose():
    model = Mixed()
    x = torch.randn(8, 2, 5, 5)
    with Watch(model, window=1, functional="follow") as watch:
        model(x)
    report = watch.compute()
    expected = diagnose(model, [x])
    assert watch.unfollowed == []
    assert {site.name for site in report} == {site.name for site in expected}
    for site in report:
        if "#2" not in site.name and "()" not in site.name:
            continue
        assert site.units == expected[site.name].units
    model = Mixed()
    model.drop.p = 0.0
    model.bn.momentum = 0.0
    with Watch(model, window=1, functional="follow") as watch:
        model(x)
    for site in watch.compute():
        torch.testing.assert_close(site.peak, diagnose(model, [x])[site.name].peak)


def test_sites_that_hooks_cannot_follow_are_named():
    x = torch.randn(8, 2, 5, 5)
    with (
        Watch(Mixed()) as watch,
        pytest.warns(UserWarning, match=r"cannot follow relu\(\)#2; functional='follow'"),
    ):
        watch._model(x)
    assert watch.unfollowed == ["relu()#2"]
    model = Mixed()
    with (
        pytest.raises(RuntimeError, match=r"cannot follow relu\(\)#2"),
        Watch(model, functional="raise"),
    ):
        model(x)
    assert not model._forward_pre_hooks
    with Watch(Mixed(), window=1, functional="ignore") as watch:
        watch._model(x)
    assert "Not followed: relu()#2" in repr(watch.compute())


def test_recurrent_sites_are_named_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.RNN(3, 4, nonlinearity="relu"))
    with Watch(model, functional="follow") as watch, pytest.warns(UserWarning, match=r"2\.l0"):
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


def test_compute_and_reset():
    model = mlp(3, 4, 1)
    watch = Watch(model, window=2)
    with watch:
        model(torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="no window of 2 steps is complete: 1 steps"):
            watch.compute()
        model(torch.randn(2, 3))
        assert watch.compute().step == 2
        watch.reset()
        assert (watch.step, watch.history) == (0, [])
        with pytest.raises(RuntimeError, match="0 steps were seen"):
            watch.compute()
        with pytest.raises(RuntimeError, match="attached already"):
            watch.attach()
        model(torch.randn(2, 3))
        model(torch.randn(2, 3))
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("functional", ["ignore", "follow"])
def test_hooks_are_removed_after_an_exception(error, functional):
    model = Mixed()

    def fail_later() -> None:
        with Watch(model, functional=functional):
            model(torch.randn(8, 2, 5, 5))
            raise error

    with pytest.raises(error):
        fail_later()
    assert no_hooks(model)

    def fail(module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            raise error

    handle = model.fc2.register_forward_pre_hook(fail)  # in the middle of a forward pass
    with pytest.raises(error), Watch(model, functional=functional):
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
    with pytest.raises(ValueError, match="functional is 'warn'"):
        Watch(model, functional="maybe")
    with pytest.raises(ValueError, match="called no rectifier"), Watch(nn.Linear(3, 2)) as watch:
        watch._model(torch.randn(2, 3))
    lone = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 1))
    with pytest.raises(AmbiguousUnitsError, match="unit_dim="), Watch(lone):
        lone(torch.randn(2, 3, 4, 4))
    with Watch(lone, unit_dim={"0": 1}, window=1) as watch:
        lone(torch.randn(2, 3, 4, 4))
    assert watch.compute()["0"].units == 3


def test_a_new_call_leads_to_another_audit():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu, self.twice = nn.Linear(3, 3), nn.ReLU(), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.fc(x))
            return self.relu(self.fc(x)) if self.twice else x

    model = Late()
    x = torch.randn(4, 3)
    with Watch(model, window=1) as watch:
        model(x)
        model.twice = True
        model(x)
        assert [site.name for site in watch.compute()] == ["relu"]
        model(x)
    assert [site.name for site in watch.compute()] == ["relu#1", "relu#2"]


def test_a_call_by_keyword_is_named():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu = nn.Linear(3, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(input=self.fc(x))

    model = Keyword()
    with Watch(model, window=1), pytest.warns(UserWarning, match="cannot follow relu"):
        model(torch.randn(2, 3))


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
        with Watch(two, window=2, functional="follow") as watch:
            run(two)
        assert same(one, two)
        assert len(watch.compute()) == 4
        units = sum(site.units for site in watch.compute())
        assert watch.nbytes() <= 16 * units


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, while tracing
@pytest.mark.parametrize(
    ("backend", "order"),
    [
        ("eager", "called first"),
        *(
            pytest.param(backend, order, marks=pytest.mark.slow)
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
    with Watch(expected, window=2, functional="ignore") as reference:
        train(expected, (2, 5, 5), 6)
    if order == "attached first":
        watch = Watch(model, window=2, functional="ignore").attach()
        compiled = torch.compile(model, backend=backend)
    elif order == "in place":
        model.compile(backend=backend)
        compiled = model
        watch = Watch(model, window=2, functional="ignore").attach()
    else:
        compiled = torch.compile(model, backend=backend)
        if order == "called first":
            compiled(torch.randn(8, 2, 5, 5))
            model.load_state_dict(plain.state_dict())
        watch = Watch(compiled, window=2, functional="ignore").attach()
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
def test_channel_peak_is_amax(shape, dim, last):
    if -dim > len(shape):
        dim = -len(shape)
    x = torch.randn(shape)
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    rest = [d for d in range(len(shape)) if d != dim + len(shape)]
    assert torch.equal(channel_peak(x, dim), x.amax(rest) if rest else x)
    x[(0,) * x.ndim] = torch.nan
    assert int(channel_peak(x, dim).isnan().sum()) == 1


@pytest.mark.parametrize("shape", [(32, 16, 28, 28), (4, 100, 3, 3), (4, 8, 9), (2, 3, 4, 5, 6)])
def test_channel_peak_of_convolutions(shape):
    x = torch.randn(shape)
    rest = [d for d in range(len(shape)) if d != 1]
    for y in (x, x.transpose(1, -1).contiguous().transpose(1, -1), x.transpose(0, 1)):
        kept = [d for d in range(len(shape)) if d != 1]
        assert torch.equal(channel_peak(y, 1 - len(shape)), y.amax(kept))
    assert rest


def test_memory_is_at_most_sixteen_bytes_a_unit():
    for model, x in ((mlp(5, 64, 64, 1), torch.randn(4, 5)), (Mixed(), torch.randn(4, 2, 5, 5))):
        with Watch(model, window=1, functional="follow") as watch:
            model(x)
        assert watch.nbytes() <= 16 * sum(site.units for site in watch.compute())


def _worker(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2
    )
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
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_merge_by_their_maximum(tmp_path):
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
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
