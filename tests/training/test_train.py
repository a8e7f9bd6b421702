import signal
import warnings
from functools import partial

import pytest
import torch
from recipe_kinds import (
    KINDS,
    SEEDS,
    assert_same,
    examples,
    gen,
    loop,
    make,
    train_many,
)
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from relubook.layers.activations import MODULES, REGISTRY
from relubook.training.recipe import Recipe
from relubook.training.run import concatenate
from relubook.training.stack import stack_of
from relubook.training.train import train
from relubook.units.diagnosis import diagnose

RECIPES = KINDS | {
    "narrow": {"widths": (2, 2, 2, 2), "inputs": 1, "outputs": 1},
    "narrow, classes": {"widths": (3, 3), "outputs": 4},
    "uneven": {"widths": (9, 4, 17)},
    "narrow maxout": {"activation": "maxout", "widths": (2, 2), "inputs": 2},
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


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_equals_the_loop(name):
    recipe = make(**RECIPES[name])
    x, y = examples(recipe)
    run = train_many(recipe, x, y, seeds=SEEDS, steps=30, lr=0.01, batch_size=13)
    nets, norms = zip(*(loop(recipe, x, y, s, 30, 0.01, batch_size=13) for s in SEEDS), strict=True)
    assert_same(run, nets)
    for i, net in enumerate(nets):
        member = run.member(i)
        torch.testing.assert_close(member(x), net(x), rtol=1e-6, atol=1e-8)
        compare = F.mse_loss if y.is_floating_point() else F.cross_entropy
        torch.testing.assert_close(run.loss[-1, i], compare(net(x), y).detach())
        assert run.gradient_norm[-1, i].item() == pytest.approx(norms[i][-1], rel=1e-7)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_activation_equals_the_loop(name):
    for widths in ((5, 5), (2, 2)):
        recipe = make(activation=name, widths=widths)
        x, y = examples(recipe)
        run = train_many(recipe, x, y, seeds=[1, 2], steps=5, lr=0.02)
        assert_same(run, [loop(recipe, x, y, s, 5, 0.02)[0] for s in (1, 2)])


@pytest.mark.parametrize("widths", [(6, 6), (2, 2)])
@pytest.mark.parametrize("clip", [0.05, 0.6])
@pytest.mark.parametrize(
    "scheduler",
    [
        partial(lr_scheduler.CosineAnnealingLR, T_max=30),
        partial(lr_scheduler.LambdaLR, lr_lambda=lambda t: 1 - t / 30),
        partial(lr_scheduler.StepLR, step_size=10, gamma=0.5),
        partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=31, cycle_momentum=False),
        lambda opt: lr_scheduler.ChainedScheduler(
            [lr_scheduler.LinearLR(opt, 0.1, total_iters=5), lr_scheduler.ExponentialLR(opt, 0.9)]
        ),
    ],
)
def test_clipping_and_schedulers_equal_torch(widths, clip, scheduler):
    recipe = make(widths=widths)
    x, y = examples(recipe)
    settings = {"optimizer": torch.optim.SGD, "clip": clip, "scheduler": scheduler}
    run = train_many(recipe, x, y, seeds=SEEDS, steps=30, lr=[0.1, 0.1, 0.2], **settings)
    rates = zip(SEEDS, [0.1, 0.1, 0.2], strict=True)
    assert_same(run, [loop(recipe, x, y, s, 30, r, **settings)[0] for s, r in rates])


@pytest.mark.parametrize("widths", [(6, 6), (2, 2)])
def test_losses_shared_batches_and_own_data(widths):
    recipe = make(widths=widths, outputs=2)
    x, y = examples(recipe, regression=True)
    settings = {"steps": 15, "lr": 0.01, "batch_size": 10}

    def nets(x=(x, x, x), y=(y, y, y), **changes):
        given = settings | changes
        return [loop(recipe, x[i], y[i], seed=s, **given)[0] for i, s in enumerate(SEEDS)]

    mae = train_many(recipe, x, y, seeds=SEEDS, loss="mae", batch_seed=9, **settings)
    assert_same(mae, nets(loss=F.l1_loss, order_seed=9))

    def quartic(out, target):
        return ((out - target) ** 4).mean()

    for loss, theirs in (
        ("huber", F.huber_loss),
        (nn.SmoothL1Loss(beta=0.3), nn.SmoothL1Loss(beta=0.3)),
        ("MSELoss", F.mse_loss),
        (nn.L1Loss, F.l1_loss),
        (quartic, quartic),
    ):
        run = train_many(recipe, x, y, seeds=SEEDS, loss=loss, **settings)
        made = nets(loss=theirs)
        assert_same(run, made)
        torch.testing.assert_close(run.loss[-1, 0], theirs(made[0](x), y).detach())

    own_x, own_y = torch.stack([x, x + 1, 2 * x]), torch.stack([y, -y, y**2])
    for size in (None, 10):
        changes = {"batch_size": size}
        run = train_many(recipe, own_x, own_y, seeds=SEEDS, **settings | changes)
        made = nets(own_x, own_y, **changes)
        assert_same(run, made)
        torch.testing.assert_close(
            run.loss[-1, 2], F.mse_loss(made[2](own_x[2]), own_y[2]).detach()
        )
    labels = torch.stack([torch.randint(2, (40,), generator=gen(s)) for s in range(3)])
    for loss in (None, nn.CrossEntropyLoss(label_smoothing=0.2)):
        run = train_many(recipe, x, labels, seeds=SEEDS, loss=loss, **settings)
        assert_same(run, nets(y=labels, loss=loss))
    shares = torch.rand(40, 2, generator=gen(5), dtype=torch.float64)
    run = train_many(recipe, x, shares, seeds=SEEDS, loss="cross_entropy", **settings)
    assert_same(run, nets(y=[shares] * 3, loss=F.cross_entropy))


@pytest.mark.parametrize("widths", [(16, 16), (2, 2, 2), (7, 5)])
def test_record_equals_the_members_own_figures(widths):
    """More than two blocks of rows, of unequal length."""
    recipe = make(widths=widths)
    x, y = examples(recipe, n=600)
    valid = examples(recipe, n=50)
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
        right = (member(valid[0]).argmax(1) == valid[1]).double().mean()
        assert run.validation_accuracy[-1, i].item() == pytest.approx(right)
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
    ],
)
def test_dead_counts_equal_diagnose(changes):
    recipe = make(**changes)
    x, y = examples(recipe, n=200)
    stack = recipe.stack(6, dtype=torch.float64)
    start = [stack.member(i) for i in range(6)]
    run = train(stack, x, y, steps=15, lr=1.0, optimizer="sgd", record=5, batch_size=50)
    end = [run.member(i) for i in range(6)]
    for step, members in ((0, start), (15, end)):
        for i in range(6):
            if run.diverged[i] >= 0 and step:
                continue
            report = diagnose(members[i].eval(), x.split(64))
            for layer, width in enumerate(recipe.hidden_widths):
                dead = report[f"act{layer + 1}"].dead
                share = run.dead[run.steps.index(step), i, layer].item()
                assert share * width == pytest.approx(int(dead.sum()))
                if step:
                    assert torch.equal(run.died[layer][i] >= 0, dead)
    if not changes or "inputs" in changes:
        assert run.dead.nansum() > 0


def test_dates_of_death():
    """Units without a positive weight are born dead; others are killed on the way."""
    recipe = Recipe(1, 3, 1, bias=0.0)
    x = torch.linspace(0.5, 1, 16, dtype=torch.float64)[:, None]
    stack = recipe.stack(200, dtype=torch.float64)
    born_dead = stack.linear1.weight.detach()[:, 0] <= 0
    shares = []

    def watch(step, stack, optimizer):
        assert not stack.training
        assert not torch.is_grad_enabled()
        shares.append((stack.hidden(x)[0][1] == 0).all(1))

    run = train(
        stack, x, torch.zeros(16, 1).double(), steps=20, lr=0.3, optimizer="sgd", record=1,
        each_step=watch,
    )  # fmt: skip
    died = run.died[0]
    assert torch.equal(died == 0, born_dead)
    assert ((died > 0).sum(1) > 0).any()
    dead = torch.stack([born_dead, *shares])
    assert torch.equal(run.dead[..., 0], dead.double().mean(-1))
    for member, unit in (died > 0).nonzero().tolist():
        date = died[member, unit]
        assert dead[date:, member, unit].all()
        assert not dead[date - 1, member, unit]
    assert not dead[-1][died < 0].any()


@pytest.mark.parametrize("widths", [(20, 20), (2, 2)])
def test_an_overflowing_member_stays_alone(widths):
    recipe = make(widths=widths)
    x, y = examples(recipe, dtype=torch.float32)
    rates = [0.01, 1e30, 0.01]
    for clip in (None, 5.0):
        settings = {"steps": 12, "record": 3, "optimizer": "sgd", "clip": clip}
        run = train_many(recipe, x, y, seeds=SEEDS, lr=rates, **settings)
        alone = train_many(recipe, x, y, seeds=[SEEDS[0], SEEDS[2]], lr=0.01, **settings)
        assert run.diverged.tolist() == [-1, 3, -1]
        torch.testing.assert_close(
            run.network.parameter_vectors()[[0, 2]], alone.network.parameter_vectors()
        )
        torch.testing.assert_close(run.loss[:, [0, 2]], alone.loss)
        assert run.dead[1:, 1].isnan().all()
        assert run.dead[:, [0, 2]].isfinite().all()
        frame = run.to_frame()
        assert frame[frame["member"] == 1]["diverged"].tolist() == [False, True, True, True, True]


def assert_same_runs(one, other):
    assert one.seeds == other.seeds
    assert one.steps == other.steps
    for key, value in one.network.state_dict().items():
        torch.testing.assert_close(value, other.network.state_dict()[key], msg=key)
    for name in ("loss", "accuracy", "dead", "diverged", "lr", "gradient_norm"):
        ours, theirs = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(one.died, other.died, strict=True))


@pytest.mark.parametrize(
    ("widths", "batch", "dtype"),
    [((2,) * 9, 32, torch.float64), ((7, 5), 13, torch.float64), ((7, 5), None, torch.float32)],
)
@pytest.mark.parametrize("changes", [{}, {"normalization": "batch", "activation": "rrelu"}])
def test_a_member_does_not_depend_on_its_neighbors(widths, batch, dtype, changes):
    recipe = make(widths=widths, dropout=0.1, **changes)
    x, y = examples(recipe, n=150, dtype=dtype)
    rates = [0.01 * (1 + s % 3) for s in range(30)]
    settings = {"steps": 6, "batch_size": batch, "record": 4, "clip": 1.0, "optimizer": "sgd"}
    whole = train_many(recipe, x, y, seeds=30, lr=rates, **settings)
    parts = [
        train_many(recipe, x, y, seeds=part, lr=[rates[s] for s in part], **settings)
        for part in (range(1), range(1, 8), range(8, 30))
    ]
    assert_same_runs(concatenate(parts), whole)


def jobs_equal_one():
    recipe = make(activation=torch.relu, dropout=0.2, normalization="batch")
    x, y = examples(recipe)
    y = torch.stack([y.roll(i) for i in range(5)])
    settings = {
        "steps": 8, "lr": [0.01, 0.02, 0.01, 0.01, 0.03], "batch_size": 16, "validation": (x, y),
        "record": (mark for mark in (3, 5)), "loss": lambda out, y: F.cross_entropy(out, y) * 2,
        "optimizer": partial(torch.optim.SGD, momentum=0.5),
        "scheduler": lambda opt: lr_scheduler.StepLR(opt, 3),
    }  # fmt: skip
    stack = recipe.stack(5, dtype=x.dtype)
    threads = torch.get_num_threads()
    run = train(stack, x, y, jobs=2, **settings)
    assert run.network is stack
    assert torch.get_num_threads() == threads
    one = train_many(recipe, x, y, seeds=5, **settings | {"record": [3, 5]})
    assert_same_runs(run, one)
    # The stack goes on as if it had been trained here, dropout's draws included.
    again = [train(r.network, x, y, steps=2, lr=0.01) for r in (run, one)]
    assert_same_runs(*again)


def test_jobs_on_threads_equal_one():
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config("threading"):
        jobs_equal_one()


@pytest.mark.slow
def test_jobs_in_processes_equal_one():
    pytest.importorskip("joblib")
    jobs_equal_one()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jobs_on_a_cluster_equal_one():
    joblib = pytest.importorskip("joblib")
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        jobs_equal_one()


def test_training_goes_on_where_the_stack_stands():
    recipe = make()
    x, y = examples(recipe)
    settings = {"lr": 0.05, "optimizer": "sgd"}
    stack = recipe.stack(SEEDS, dtype=x.dtype)
    held = stack.linear1.weight
    for steps in (4, 6):
        run = train(stack, x, y, steps=steps, **settings)
    assert stack.linear1.weight is held
    assert held.is_contiguous()
    assert held.grad is None
    assert_same(run, [loop(recipe, x, y, s, 10, 0.05, optimizer=torch.optim.SGD)[0] for s in SEEDS])
    before = stack.parameter_vectors()
    run = train(stack, x, y, steps=0, lr=0.1)
    assert run.steps == (0,)
    assert torch.equal(before, stack.parameter_vectors())


@pytest.mark.parametrize("widths", [(16, 16), (3, 3)])
def test_each_step_may_revive_units_and_end_the_run(widths):
    recipe = make(widths=widths, dropout=0.5, normalization="batch")
    x, y = examples(recipe)
    stack = recipe.stack(SEEDS, dtype=x.dtype)
    calls = []

    def revive(step, given, optimizer):
        assert given is stack
        assert isinstance(optimizer, torch.optim.Adam)
        calls.append(step)
        given(x)  # in evaluation mode: draws nothing, changes no running statistics
        given.linear2.bias[0] = step
        given.linear2.weight[0] = 0
        return False if step == 7 else None

    run = train(stack, x, y, steps=20, lr=0.01, record=5, each_step=revive)
    assert calls == list(range(1, 8))
    assert run.steps == (0, 5, 7)
    assert not run.interrupted
    assert stack.training
    assert (stack.linear2.bias[0] == 7).all()
    assert (stack.linear2.weight[0] == 0).all()
    other = train_many(recipe, x, y, seeds=SEEDS, steps=7, lr=0.01, record=5)
    torch.testing.assert_close(
        run.network.parameter_vectors()[1:], other.network.parameter_vectors()[1:]
    )
    assert run.gradient_norm[-1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_single(dtype):
    recipe = make(widths=(16, 16), outputs=3)
    x, y = examples(recipe, n=700, dtype=dtype)
    run = train_many(recipe, x, y, seeds=3, steps=10, lr=0.01, optimizer="sgd", batch_size=100)
    assert run.network.linear1.weight.dtype == dtype
    for name in ("loss", "gradient_norm", "dead"):
        assert getattr(run, name).dtype == torch.float32
    for i in range(3):
        want = F.cross_entropy(run.member(i)(x).float(), y)
        torch.testing.assert_close(run.loss[-1, i], want.detach(), rtol=1e-4, atol=0)
    big = torch.full((40, 4), 300.0, dtype=dtype)  # its square overflows 16 bits
    run = train_many(make(), x[:40], big, seeds=2, steps=1, lr=1e-6)
    assert run.loss.isfinite().all()


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_returns_what_there_is():
    recipe = make()
    x, y = examples(recipe)
    settings = {"lr": 0.01, "record": 4}
    with pytest.warns(RuntimeWarning, match="stopped after 6 of 100 steps"):
        run = train_many(
            recipe, x, y, seeds=SEEDS, steps=100,
            each_step=lambda step, *_: interrupt() if step == 6 else None, **settings,
        )  # fmt: skip
    assert run.interrupted
    assert run.steps == (0, 4, 6)
    assert "interrupted" in repr(run)
    whole = train_many(recipe, x, y, seeds=SEEDS, steps=6, **settings)
    assert torch.equal(run.network.parameter_vectors(), whole.network.parameter_vectors())
    assert torch.equal(run.loss, whole.loss)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # In the last step there is nothing left to stop.
    run = train_many(
        recipe,
        x,
        y,
        seeds=2,
        steps=3,
        each_step=lambda t, *_: interrupt() if t == 3 else None,
        **settings,
    )
    assert (run.steps, run.interrupted) == ((0, 3), False)
    # The second Ctrl-C is not caught.
    with pytest.raises(KeyboardInterrupt):
        train_many(
            recipe, x, y, seeds=2, steps=3, each_step=lambda *_: interrupt() or interrupt(),
            **settings,
        )  # fmt: skip


def test_nothing_global_changes(capsys, monkeypatch):
    monkeypatch.delenv("RELUBOOK_PROGRESS", raising=False)
    recipe = make(dropout=0.2, normalization="batch")
    x, y = examples(recipe)
    before = torch.get_rng_state()
    stack = recipe.stack(2, dtype=x.dtype)
    stack.norm2.eval()
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(
            stack, x, y, steps=2, lr=0.01, batch_size=5,
            scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=2),
        )  # fmt: skip
        assert not torch.is_grad_enabled()
    assert not seen
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert stack.training
    assert not stack.norm2.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.modules())
    assert capsys.readouterr() == ("", "")


def test_progress_bar(capsys, monkeypatch):
    recipe = make()
    x, y = examples(recipe)
    monkeypatch.setenv("RELUBOOK_PROGRESS", "1")
    train_many(recipe, x, y, seeds=2, steps=3, lr=0.01)
    shown = capsys.readouterr().err
    for part in ("2 members x 3 steps", "6.00/6.00", "loss=", "dead="):
        assert part in shown
    train_many(recipe, x, y, seeds=2, steps=3, lr=0.01, progress=False)
    assert capsys.readouterr().err == ""


def test_every_module_counts_as_an_activation():
    stack = stack_of(lambda: nn.Sequential(nn.Linear(3, 4), nn.Threshold(0.5, 0.0)), 2)
    assert nn.Threshold in MODULES
    run = train(stack, *examples(make(), dtype=torch.float32), steps=1, lr=0.1)
    assert run.dead.shape == (2, 2, 1)
