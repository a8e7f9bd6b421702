import math
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from recipe_kinds import KINDS
from torch import nn
from torch.nn import functional as F

from relubook.layers.activations import activation_names
from relubook.training.stack import Recipe, keyed_uniform
from relubook.training.train import (
    OPTIMIZERS,
    batch_order,
    concatenate,
    crossed,
    memory_needed,
    seed_ranges,
    train_many,
)
from relubook.units.diagnosis import diagnose

SEEDS = [3, 11, 4]

RECIPES = KINDS | {
    "narrow": {"widths": (2, 2, 2, 2), "inputs": 1, "outputs": 1},
    "narrow, classes": {"widths": (3, 3), "outputs": 4},
    "uneven": {"widths": (9, 4, 17)},
    "narrow maxout": {"activation": "maxout", "widths": (2, 2), "inputs": 2},
    "rrelu": {"activation": "rrelu"},
    "narrow, no bias": {"bias": False, "widths": (2, 2), "inputs": 2, "outputs": 1},
    "narrow, all": {
        "residual": "relu(f+x)",
        "normalization": "layer",
        "dropout": 0.2,
        "activation": "rrelu",
        "widths": (3, 3, 3),
        "outputs": 2,
    },
    "narrow batch": {"normalization": "batch", "widths": (3, 3), "outputs": 2},
    "narrow prelu": {
        "activation": "prelu",
        "activation_options": {"num_parameters": 3},
        "widths": (3, 3),
        "outputs": 2,
    },
    "softplus in blocks": {"activation": "softplus", "residual": "relu(f)+x"},
}

OPTIMIZER_CASES = {
    "sgd": ("sgd", {}),
    "momentum": ("sgd", {"momentum": 0.9, "weight_decay": 1e-3}),
    "nesterov": ("sgd", {"momentum": 0.8, "nesterov": True}),
    "adam": ("adam", {"betas": (0.8, 0.99), "weight_decay": 1e-3}),
    "adamw": ("adamw", {"weight_decay": 0.1, "eps": 1e-6}),
    "adamax": ("adamax", {"weight_decay": 1e-3}),
    "adadelta": ("adadelta", {"rho": 0.8, "weight_decay": 1e-3}),
    "rmsprop": ("rmsprop", {"alpha": 0.9, "weight_decay": 1e-3}),
    "rmsprop momentum": ("rmsprop", {"momentum": 0.5}),
}

TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**changes):
    return Recipe(**{"inputs": 3, "widths": (6, 6, 6), "outputs": 4} | changes)


def data(recipe, n=40, dtype=torch.float64, regression=None):
    x = torch.randn(n, recipe.inputs, generator=gen(0), dtype=dtype)
    if regression or (regression is None and recipe.outputs == 1):
        return x, torch.randn(n, recipe.outputs, generator=gen(1), dtype=dtype)
    return x, torch.randint(recipe.outputs, (n,), generator=gen(1))


class Keyed(nn.Module):
    """Dropout or randomized slopes from the documented draws, one network at a time."""

    def __init__(self, module, seed, site):
        super().__init__()
        self.module, self.seed, self.site, self.step = module, seed, site, 0

    def forward(self, x):
        if not self.training:
            return self.module(x)
        u = keyed_uniform([self.seed], self.step, self.site, x.numel()).view(x.shape)
        self.step += 1
        if isinstance(self.module, nn.Dropout):
            return x * (u >= self.module.p) / (1 - self.module.p)
        low, high = self.module.lower, self.module.upper
        return torch.where(x > 0, x, (low + (high - low) * u) * x)


def loop(
    recipe, x, y, seed, steps, lr, optimizer="adam", batch_size=None, clip=None, factor=None,
    loss=None, order_seed=None, **options,
):  # fmt: skip
    """Train one plain network with torch's own layers, autograd and optimizer."""
    net = recipe.single(seed, dtype=x.dtype)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Dropout | nn.RReLU):
            layer = int("".join(filter(str.isdigit, name)))
            site = 2 * layer + isinstance(module, nn.Dropout)
            setattr(net, name, Keyed(module, seed, site))
    opt = TORCH[optimizer](net.parameters(), lr=lr, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, factor or (lambda t: 1.0))
    order = None
    if batch_size is not None:
        order = batch_order(seed if order_seed is None else order_seed, len(x), batch_size, steps)
    compare = loss or (F.mse_loss if y.is_floating_point() else F.cross_entropy)
    norms = []
    for t in range(steps):
        xb, yb = (x, y) if order is None else (x[order[t]], y[order[t]])
        opt.zero_grad()
        compare(net(xb), yb).backward()
        norms.append(
            nn.utils.clip_grad_norm_(net.parameters(), math.inf if clip is None else clip).item()
        )
        opt.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()
    return net.eval(), norms


def assert_same(run, nets, tolerance=1e-9, without=()):
    """Compare whole parameter vectors, but for the parameters named in ``without``."""
    for i, net in enumerate(nets):
        ours, theirs = run.member(i).state_dict(), dict(net.named_parameters())
        names = [name for name in theirs if name not in without]
        got, want = (torch.cat([d[n].detach().flatten() for n in names]) for d in (ours, theirs))
        if not without:
            assert torch.equal(got, run.network.parameter_vectors()[i])
        assert (got - want).norm() / want.norm() < tolerance, i


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_equals_the_loop(name):
    recipe = make(**RECIPES[name])
    x, y = data(recipe)
    run = train_many(recipe, x, y, seeds=SEEDS, steps=50, lr=0.01, batch_size=13)
    nets, norms = zip(*(loop(recipe, x, y, s, 50, 0.01, batch_size=13) for s in SEEDS), strict=True)
    assert_same(run, nets)
    for i, net in enumerate(nets):
        member = run.member(i)
        torch.testing.assert_close(member(x), net(x), rtol=1e-6, atol=1e-8)
        compare = F.mse_loss if y.is_floating_point() else F.cross_entropy
        torch.testing.assert_close(run.loss[-1, i], compare(net(x), y).detach())
        assert run.gradient_norm[-1, i].item() == pytest.approx(norms[i][-1], rel=1e-7)


@pytest.mark.parametrize("widths", [(6, 6), (2, 2)])
@pytest.mark.parametrize("name", OPTIMIZER_CASES)
def test_every_optimizer_equals_the_loop(name, widths):
    optimizer, options = OPTIMIZER_CASES[name]
    recipe = make(widths=widths)
    x, y = data(recipe)
    rates = [0.03, 0.01, 0.02]
    run = train_many(
        recipe, x, y, seeds=SEEDS, steps=50, lr=rates, optimizer=optimizer, batch_size=16, **options
    )
    nets = [
        loop(recipe, x, y, s, 50, r, optimizer, batch_size=16, **options)[0]
        for s, r in zip(SEEDS, rates, strict=True)
    ]
    assert_same(run, nets)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("rates", [[0.01] * 3, [0.01, 0.01, 0.03], [0.03, 0.02, 0.01]])
def test_fused_updates_equal_the_loop(name, rates):
    recipe = make(widths=(70, 60))
    x, y = data(recipe)
    settings = {"weight_decay": 0.01, "batch_size": 16, "optimizer": name}
    run = train_many(
        recipe, x, y, seeds=SEEDS, steps=20, lr=rates, schedule=lambda t: 0.9**t, **settings
    )
    nets = [
        loop(recipe, x, y, s, 20, r, factor=lambda t: 0.9**t, **settings)[0]
        for s, r in zip(SEEDS, rates, strict=True)
    ]
    assert_same(run, nets)
    alone = train_many(
        recipe, x, y, seeds=SEEDS[1:], steps=20, lr=rates[1:], schedule=lambda t: 0.9**t, **settings
    )
    assert torch.equal(alone.network.parameter_vectors(), run.network.parameter_vectors()[1:])


STRUCTURES = [
    "plain",
    "narrow",
    "maxout block",
    "prelu, one slope a unit",
    "batch",
    "all",
    "narrow, all",
    "softplus in blocks",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("case", OPTIMIZER_CASES)
def test_every_optimizer_on_every_recipe_equals_the_loop(name, case):
    recipe = make(**RECIPES[name])
    x, y = data(recipe)
    optimizer, options = OPTIMIZER_CASES[case]
    arguments = {"batch_size": 13, "clip": 1.0} | options
    run = train_many(recipe, x, y, seeds=[5], steps=50, lr=0.01, optimizer=optimizer, **arguments)
    without = set()
    if recipe.normalization == "batch" and optimizer in ("adam", "adamax", "rmsprop"):
        # The true gradient of a bias in front of batch normalization is 0. What rounding leaves
        # of it makes the bias move by a trifle, of which weight decay makes a gradient that the
        # optimizer scales up to a full step: its sign is chance, and the network does not see it.
        without = {f"linear{layer}.bias" for layer in range(1, recipe.hidden + 1)}
    net, _ = loop(recipe, x, y, 5, 50, 0.01, optimizer, **arguments)
    assert_same(run, [net], without=without)


@pytest.mark.parametrize("name", activation_names())
def test_every_activation_equals_the_loop(name):
    for widths in ((5, 5), (2, 2)):
        recipe = make(activation=name, widths=widths)
        x, y = data(recipe)
        run = train_many(recipe, x, y, seeds=[1, 2], steps=5, lr=0.02)
        assert_same(run, [loop(recipe, x, y, s, 5, 0.02)[0] for s in (1, 2)])


@pytest.mark.parametrize("widths", [(6, 6), (2, 2)])
@pytest.mark.parametrize("clip", [0.05, 0.6])
def test_clipping_and_schedules_equal_torch(widths, clip):
    recipe = make(widths=widths)
    x, y = data(recipe)
    steps = 30

    def cosine(t):
        return min(1.0, (t + 1) / 5) * (1 + math.cos(math.pi * t / steps)) / 2

    def stairs(t):
        return 0.5 ** (t // 10)

    for ours, theirs in (
        ({"schedule": "cosine", "warmup": 5}, cosine),
        ({"schedule": "linear"}, lambda t: 1 - t / steps),
        ({"schedule": stairs}, stairs),
    ):
        run = train_many(
            recipe, x, y, seeds=SEEDS, steps=steps, lr=0.1, optimizer="sgd", clip=clip, **ours
        )
        nets = [loop(recipe, x, y, s, steps, 0.1, "sgd", clip=clip, factor=theirs) for s in SEEDS]
        assert_same(run, [net for net, _ in nets])


@pytest.mark.parametrize("widths", [(6, 6), (2, 2)])
def test_losses_shared_batches_and_own_data(widths):
    recipe = make(widths=widths, outputs=2)
    x, y = data(recipe, regression=True)
    mae = train_many(
        recipe, x, y, seeds=SEEDS, steps=20, lr=0.01, loss="mae", batch_size=10, batch_seed=9
    )
    nets = [
        loop(recipe, x, y, s, 20, 0.01, batch_size=10, loss=F.l1_loss, order_seed=9)[0]
        for s in SEEDS
    ]
    assert_same(mae, nets)

    def huber(out, target):
        return F.huber_loss(out, target, reduction="none").mean((1, 2))

    run = train_many(recipe, x, y, seeds=SEEDS, steps=20, lr=0.01, loss=huber, batch_size=10)
    assert_same(
        run, [loop(recipe, x, y, s, 20, 0.01, batch_size=10, loss=F.huber_loss)[0] for s in SEEDS]
    )
    torch.testing.assert_close(
        run.loss[-1, 0], F.huber_loss(run.member(0)(x), y).detach(), rtol=1e-9, atol=0
    )

    own_x, own_y = torch.stack([x, x + 1, 2 * x]), torch.stack([y, -y, y**2])
    for size in (None, 10):
        run = train_many(recipe, own_x, own_y, seeds=SEEDS, steps=20, lr=0.01, batch_size=size)
        nets = [
            loop(recipe, own_x[i], own_y[i], s, 20, 0.01, batch_size=size)[0]
            for i, s in enumerate(SEEDS)
        ]
        assert_same(run, nets)
        torch.testing.assert_close(
            run.loss[-1, 2], F.mse_loss(nets[2](own_x[2]), own_y[2]).detach()
        )
    labels = torch.stack([torch.randint(2, (40,), generator=gen(s)) for s in range(3)])
    run = train_many(recipe, x, labels, seeds=SEEDS, steps=20, lr=0.01, batch_size=10)
    assert_same(
        run,
        [loop(recipe, x, labels[i], s, 20, 0.01, batch_size=10)[0] for i, s in enumerate(SEEDS)],
    )


def test_batches_are_permutations():
    order = batch_order(5, 10, 3, 7)
    assert order.shape == (7, 3)
    for epoch in (order[:3], order[3:6]):
        assert len(epoch.unique()) == 9
    assert batch_order(5, 10, 3, 0).shape == (0, 3)
    assert not torch.equal(order, batch_order(6, 10, 3, 7))


@pytest.mark.parametrize("widths", [(16, 16), (2, 2, 2), (7, 5)])
def test_record_equals_the_members_own_figures(widths):
    recipe = make(widths=widths)
    x, y = data(recipe, n=300)
    valid = data(recipe, n=50)
    run = train_many(
        recipe, x, y, seeds=20, steps=30, lr=0.5, optimizer="sgd", record=7, validation=valid,
        batch_size=30,
    )  # fmt: skip
    assert run.steps == (0, 7, 14, 21, 28, 30)
    assert run.gradient_norm[0].isnan().all()
    assert run.gradient_norm[1:].isfinite().all()
    counted = 0
    for i in range(20):
        member = run.member(i)
        out = member(x)
        torch.testing.assert_close(run.loss[-1, i], F.cross_entropy(out, y).detach())
        assert run.accuracy[-1, i].item() == pytest.approx((out.argmax(1) == y).double().mean())
        torch.testing.assert_close(
            run.validation_loss[-1, i], F.cross_entropy(member(valid[0]), valid[1]).detach()
        )
        h = x
        for layer in range(1, len(widths) + 1):
            h = getattr(member, f"act{layer}")(getattr(member, f"linear{layer}")(h))
            dead = (h == 0).all(0)
            assert torch.equal(dead, run.died[layer - 1][i] >= 0)
            assert run.dead[-1, i, layer - 1].item() == pytest.approx(dead.double().mean().item())
            counted += int(dead.sum())
    if max(widths) < 16:
        assert counted > 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"widths": (2,) * 6, "inputs": 1},
        {"normalization": "batch"},
        {"residual": "relu(f+x)"},
        {"residual": "pre-activation", "normalization": "layer"},
        {"activation": "relu6", "dropout": 0.2},
        {"activation": "hardswish"},
        {"activation": "gelu"},
    ],
)
def test_dead_counts_equal_diagnose(changes):
    recipe = make(**changes)
    x, y = data(recipe, n=200)
    run = train_many(
        recipe, x, y, seeds=6, steps=15, lr=1.0, optimizer="sgd", record=5, batch_size=50
    )
    family = "all" if recipe.activation == "gelu" else "rectifiers"
    for step, part in ((0, recipe.stack(6, dtype=torch.float64)), (15, run.network)):
        for i in range(6):
            if run.diverged[i] >= 0 and step:
                continue
            report = diagnose(part.member(i), x.split(64), mode="eval", family=family)
            for layer, width in enumerate(recipe.hidden_widths):
                dead = report[f"act{layer + 1}"].dead
                share = run.dead[run.steps.index(step), i, layer].item()
                assert share * width == pytest.approx(int(dead.sum()))
                if step:
                    assert torch.equal(run.died[layer][i] >= 0, dead)
    if not changes or "inputs" in changes:
        assert run.dead.nansum() > 0


def test_dates_of_death():
    """One unit is born dead, one is killed by a step of known size, one lives."""
    recipe = Recipe(1, 3, 1, depth=2, bias=0.0)
    x = torch.linspace(0.5, 1, 16, dtype=torch.float64)[:, None]
    run = train_many(
        recipe, x, torch.zeros(16, 1).double(), seeds=200, steps=20, lr=0.3, optimizer="sgd",
        record=1,
    )  # fmt: skip
    start = recipe.stack(200, dtype=torch.float64)
    born_dead = start.linear1.weight.detach()[:, 0] <= 0
    died = run.died[0]
    assert torch.equal(died == 0, born_dead)
    assert ((died > 0).sum(1) > 0).any()
    # The share at a step counts those who died by then and did not come back.
    late = (died >= 0) & (died <= 10)
    assert (run.dead[10, :, 0] * 3 + 0.5 >= late.sum(1)).all()
    assert torch.equal((died >= 0).sum(1), (run.dead[-1, :, 0] * 3).round().long())


@pytest.mark.parametrize("widths", [(20, 20), (2, 2)])
def test_an_overflowing_member_stays_alone(widths):
    recipe = make(widths=widths)
    x, y = data(recipe, dtype=torch.float32)
    rates = [0.01, 1e30, 0.01]
    for clip in (None, 5.0):
        settings = {"steps": 12, "record": 3, "optimizer": "sgd", "clip": clip}
        run = train_many(recipe, x, y, seeds=SEEDS, lr=rates, **settings)
        alone = train_many(recipe, x, y, seeds=[SEEDS[0], SEEDS[2]], lr=0.01, **settings)
        assert run.diverged.tolist() == [-1, 3, -1]
        assert torch.equal(
            run.network.parameter_vectors()[[0, 2]], alone.network.parameter_vectors()
        )
        assert torch.equal(run.loss[:, [0, 2]], alone.loss)
        assert run.dead[1:, 1].isnan().all()
        assert run.dead[:, [0, 2]].isfinite().all()
        frame = run.to_frame()
        assert frame[frame["member"] == 1]["diverged"].tolist() == [False, True, True, True, True]
        summary = run.summary()
        assert summary.loc[(0.01, "loss"), "n"] == 2
        assert summary.loc[(1e30, "loss"), "diverged"] == 1


@pytest.mark.parametrize(
    ("widths", "batch", "dtype"),
    [
        ((2,) * 9, 32, torch.float32),
        ((2, 2), 13, torch.float64),
        ((16, 16), 32, torch.float32),
        ((7, 5), 13, torch.float32),
        ((7, 5), None, torch.float64),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"normalization": "batch", "activation": "mish"}])
def test_ranges_of_members_concatenate_to_one_run_bit_for_bit(widths, batch, dtype, changes):
    recipe = make(widths=widths, dropout=0.1, **changes)
    x, y = data(recipe, n=150, dtype=dtype)
    rates = [0.01 * (1 + s % 3) for s in range(90)]
    settings = {"steps": 8, "batch_size": batch, "record": 4, "clip": 1.0}
    whole = train_many(recipe, x, y, seeds=90, lr=rates, **settings)
    chunked = train_many(recipe, x, y, seeds=90, lr=rates, chunk=40, **settings)
    parts = [
        train_many(recipe, x, y, seeds=part, lr=[rates[s] for s in part], **settings)
        for part in (range(1), range(1, 18), range(18, 90))
    ]
    for other in (chunked, concatenate(parts)):
        assert other.seeds == whole.seeds
        for key, value in whole.network.state_dict().items():
            assert torch.equal(value, other.network.state_dict()[key]), key
        for name in ("loss", "accuracy", "dead", "diverged", "lr"):
            assert torch.equal(getattr(whole, name), getattr(other, name)), name
        assert torch.equal(whole.gradient_norm[1:], other.gradient_norm[1:])
        assert all(torch.equal(a, b) for a, b in zip(whole.died, other.died, strict=True))


@pytest.mark.slow
def test_two_processes_equal_one():
    joblib = pytest.importorskip("joblib")
    recipe = Recipe(1, 2, 1, depth=10)
    x = torch.linspace(-1, 1, 200)[:, None]
    settings = {"steps": 20, "lr": 0.01, "batch_size": 32}
    one = train_many(recipe, x, x.abs(), seeds=100, **settings)
    with warnings.catch_warnings(), joblib.parallel_config("loky", inner_max_num_threads=1):
        warnings.simplefilter("ignore")
        parts = joblib.Parallel(n_jobs=2)(
            joblib.delayed(train_many)(recipe, x, x.abs(), seeds=part, **settings)
            for part in seed_ranges(100, 2)
        )
    run = concatenate(parts)
    assert torch.equal(run.network.parameter_vectors(), one.network.parameter_vectors())
    assert torch.equal(run.loss, one.loss)
    assert run.to_frame().equals(one.to_frame())


def test_ctrl_c_returns_what_there_is():
    recipe = make()
    x, y = data(recipe)

    def schedule(t):
        if t == 5:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    settings = {"lr": 0.01, "record": 4}
    with pytest.warns(RuntimeWarning, match="stopped after 6 of 100 steps"):
        run = train_many(recipe, x, y, seeds=SEEDS, steps=100, schedule=schedule, **settings)
    assert run.interrupted
    assert run.steps == (0, 4, 6)
    whole = train_many(recipe, x, y, seeds=SEEDS, steps=6, **settings)
    assert torch.equal(run.network.parameter_vectors(), whole.network.parameter_vectors())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    calls = iter(range(10**6))

    def late(t):
        if next(calls) == 15:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    with pytest.warns(RuntimeWarning, match="with 1 of 3 members"):
        run = train_many(recipe, x, y, seeds=SEEDS, steps=10, schedule=late, chunk=1, **settings)
    assert (len(run), run.interrupted) == (1, True)


def test_frames_and_summary():
    recipe = make(widths=(4, 5))
    x, y = data(recipe)
    seeds, rates = crossed(4, [0.1, 0.01])
    run = train_many(recipe, x, y, seeds=seeds, steps=4, lr=rates, record=2)
    frame = run.to_frame()
    assert len(frame) == 3 * 8
    row = frame[(frame["member"] == 5) & (frame["step"] == 2)].iloc[0]
    assert (row["seed"], row["lr"]) == (1, 0.01)
    assert row["loss"] == run.loss[1, 5]
    assert row["dead"] == pytest.approx((run.dead[1, 5] @ torch.tensor([4.0, 5]).double()) / 9)
    layers = run.to_frame(by="layer")
    assert len(layers) == 3 * 8 * 2
    pick = layers[(layers["member"] == 5) & (layers["step"] == 2) & (layers["layer"] == 2)]
    assert pick["dead"].item() == run.dead[1, 5, 1]
    summary = run.summary()
    values = run.loss[-1, :4]
    assert summary.loc[(0.1, "loss"), "mean"] == pytest.approx(values.mean().item())
    assert summary.loc[(0.1, "loss"), "low"] < values.mean() < summary.loc[(0.1, "loss"), "high"]
    assert "validation_loss" not in summary.index.get_level_values("quantity")
    with pytest.raises(ValueError, match="step 3 was not measured"):
        run.summary(3)
    with pytest.raises(ValueError, match="'member' or 'layer'"):
        run.to_frame(by="unit")
    assert "8 members" in repr(run)


def test_nothing_global_changes(capsys, monkeypatch):
    monkeypatch.delenv("RELUBOOK_PROGRESS", raising=False)
    recipe = make(dropout=0.2)
    x, y = data(recipe)
    before = torch.get_rng_state()
    train_many(recipe, x, y, seeds=2, steps=2, lr=0.01, batch_size=5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert capsys.readouterr() == ("", "")


def test_progress_bar(capsys, monkeypatch):
    recipe = make()
    x, y = data(recipe)
    monkeypatch.setenv("RELUBOOK_PROGRESS", "1")
    train_many(recipe, x, y, seeds=2, steps=3, lr=0.01)
    shown = capsys.readouterr().err
    for part in ("2 members x 3 steps", "6.00/6.00", "loss=", "dead="):
        assert part in shown
    train_many(recipe, x, y, seeds=2, steps=3, lr=0.01, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RELUBOOK_PROGRESS", "yes")
    with pytest.raises(ValueError, match="RELUBOOK_PROGRESS"):
        train_many(recipe, x, y, seeds=2, steps=3, lr=0.01)


def test_memory_is_named_before_it_is_taken():
    recipe = Recipe(64, 64, 10, depth=10)
    x, y = data(recipe, n=100, dtype=torch.float32)
    need = memory_needed(recipe, 50, 100)
    with pytest.raises(MemoryError, match=r"50 members.*GiB.*chunk=\d+ would do") as error:
        train_many(recipe, x, y, seeds=50, steps=1, lr=0.1, memory_limit=need / 4)
    chunk = int(str(error.value).split("chunk=")[1].split()[0])
    assert 8 <= chunk <= 13
    train_many(recipe, x, y, seeds=50, steps=1, lr=0.1, memory_limit=need / 4, chunk=chunk)
    with pytest.raises(MemoryError, match="not even one member"):
        train_many(recipe, x, y, seeds=50, steps=1, lr=0.1, memory_limit=1000)
    with pytest.raises(MemoryError, match="chunk="):
        train_many(recipe, x, y, seeds=range(10**6), steps=1, lr=0.1)


MEASURE = """
import torch
from pathlib import Path
from relubook.training.stack import Recipe
from relubook.training.train import memory_needed, train_many

def high_water():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmHWM:")[1].split()[0])

torch.set_num_threads(1)
recipe, batch, members = {case}
x, y = torch.randn(1000, recipe.inputs), torch.randn(1000, recipe.outputs)
train_many(recipe, x, y, seeds=1, steps=1, lr=0.01, batch_size=batch)
before = high_water()
train_many(recipe, x, y, seeds=members, steps=3, lr=0.01, batch_size=batch)
print(memory_needed(recipe, members, 1000, batch_size=batch) / (high_water() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "case",
    [
        "Recipe(1, 2, 1, depth=10), 128, 3000",
        "Recipe(64, 64, 10, depth=10), None, 100",
        'Recipe(64, 64, 10, depth=7, normalization="batch"), 256, 100',
        'Recipe(64, 64, 10, depth=7, residual="relu(f)+x", activation="gelu"), 256, 100',
        'Recipe(64, 64, 10, depth=7, dropout=0.2, activation="prelu"), 256, 100',
    ],
)
def test_memory_estimate_is_close(case):
    code = MEASURE.replace("{case}", case)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 2


X, Y = torch.randn(40, 3), torch.randint(4, (40,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "at least one member"),
        ({"seeds": []}, "at least one member"),
        ({"x": torch.randn(40, 2)}, "x has 2 features, the recipe takes 3"),
        ({"x": torch.randn(40)}, r"x must have the shape"),
        ({"x": torch.randn(3, 40, 3)}, r"\(2, n, inputs\)"),
        ({"x": X.clone().index_fill_(0, torch.tensor([1]), math.nan)}, "x has 3 non-finite"),
        ({"y": Y + 1}, r"labels of y must be in 0\.\.3, not 1\.\.4"),
        ({"y": Y - 1}, r"labels of y must be in 0\.\.3, not -1\.\.2"),
        ({"y": Y[:-1]}, r"y must have the shape \(40,\)"),
        ({"y": Y.float()}, r"y must have the shape \(40, 4\)"),
        ({"y": torch.full((40, 4), math.inf)}, "y has 160 non-finite"),
        ({"y": Y.float(), "loss": "cross_entropy"}, "integers"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"lr": [0.1, 0.1, 0.1]}, r"one a member \(2\).*\(3,\)"),
        ({"lr": [0.1, -0.1]}, "member 1 has -0.1"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"steps": -1}, "steps.*-1"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'; the nearest known: adam"),
        ({"optimizer": "sgd", "nesterov": True}, "nesterov"),
        ({"eps": 0}, "eps must be above 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"batch_size": 41}, r"1\.\.40"),
        ({"batch_size": 0}, r"1\.\.40"),
        ({"schedule": "stairs"}, "unknown schedule 'stairs'"),
        ({"warmup": -1}, "warmup"),
        ({"clip": 0.0}, "clip"),
        ({"record": 0}, "record"),
        ({"record": [0, 9]}, r"step 9, outside 0\.\.5"),
        ({"chunk": 0}, "chunk"),
        ({"validation": (X, Y + 9)}, "labels of validation y"),
        ({"loss": lambda out, y: out.mean()}, "one number a member"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"x": X, "y": Y, "seeds": 2, "steps": 5, "lr": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        train_many(make(), arguments.pop("x"), arguments.pop("y"), **arguments)


def test_bad_types():
    with pytest.raises(TypeError, match="'adam' has no option 'momentum'"):
        train_many(make(), X, Y, seeds=2, steps=5, lr=0.1, momentum=0.9)
    with pytest.raises(TypeError, match="recipe must be"):
        train_many({"widths": 3}, X, Y, seeds=2, steps=5, lr=0.1)
    with pytest.raises(ValueError, match="batch normalization wants"):
        train_many(make(normalization="batch"), X, Y, seeds=2, steps=5, lr=0.1, batch_size=1)


def test_bad_concatenation():
    one = train_many(make(), X, Y, seeds=1, steps=2, lr=0.1)
    other = train_many(make(), X, Y, seeds=1, steps=2, lr=0.1, record=[])
    assert concatenate([one]) is one
    with pytest.raises(ValueError, match="different recipes or steps"):
        concatenate([one, train_many(make(), X, Y, seeds=1, steps=3, lr=0.1)])
    with pytest.raises(ValueError, match="nothing"):
        concatenate([])
    assert other.steps == (0, 2)
    with pytest.raises(ValueError, match="at least 1"):
        seed_ranges(0, 2)


def test_every_optimizer_is_documented():
    assert set(OPTIMIZERS) == set(TORCH)
    for name, options in OPTIMIZERS.items():
        defaults = TORCH[name]([nn.Parameter(torch.zeros(1))]).defaults
        for key, value in options.items():
            assert defaults[key] == value, (name, key)
