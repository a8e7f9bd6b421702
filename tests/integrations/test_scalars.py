"""The numbers of reports, read back from what TensorBoard and W&B wrote."""

import pytest
import torch
from torch import nn

from relubook.integrations.scalars import log_scalars, scalars
from relubook.units.diagnosis import diagnose
from relubook.units.watch import Watch


def net():
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([99.0, 99.0, 99.0, -99.0]))
        model[2].weight.zero_()
        model[2].bias.fill_(1.0)
    return model


def reports():
    """Yield a report after each of three windows: a death, nothing, two deaths and a revival."""
    model = net()
    with Watch(model, window=2) as watch:
        for unit, bias in ((0, 99.0), (0, 99.0), (3, 99.0)):
            with torch.no_grad():
                model[0].bias[unit] = bias
                model[2].bias.fill_(-1.0 if unit == 3 else 1.0)
            for _ in range(2):
                model(torch.randn(5, 3))
            yield watch.compute()


NAMES = ("dead_fraction", "deaths", "revivals", "dead_fraction/1", "dead_fraction/3")
VALUES = [(1 / 6, 1, 0, 0.25, 0), (1 / 6, 0, 0, 0.25, 0), (2 / 6, 2, 1, 0, 1)]
NAMED = [{f"units/{n}": v for n, v in zip(NAMES, row, strict=True)} for row in VALUES]


def test_numbers_of_each_window():
    assert [scalars(report) for report in reports()] == NAMED


def test_numbers_of_diagnose():
    report = diagnose(nn.Sequential(net(), nn.GELU()), torch.randn(9, 3), family="all")
    assert scalars(report) == {
        "units/dead_fraction": 1 / 6,
        "units/dead_fraction/0.1": 0.25,
        "units/dead_fraction/0.3": 0.0,
    }


def test_tensorboard_reads_what_was_written(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(tmp_path) as writer:
        for report in reports():
            log_scalars(report, writer)
        log_scalars(diagnose(net(), torch.randn(9, 3)), writer, step=7)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(NAMED[0])
    for name in NAMED[0]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(2 * k + 2, numbers[name]) for k, numbers in enumerate(NAMED)]
        if "dead_fraction" in name:
            expected.append((7, NAMED[0][name]))
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])


@pytest.mark.slow
def test_wandb_keeps_what_was_logged(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    private = {f"WANDB_{name}_DIR": str(tmp_path) for name in ("CACHE", "CONFIG", "DATA")}
    private |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    for name, value in private.items():
        monkeypatch.setenv(name, value)
    quiet = wandb.Settings(silent=True, console="off", disable_git=True)
    kept = []
    with wandb.init(dir=tmp_path, settings=quiet) as run:
        for k, report in enumerate(reports()):
            log_scalars(report, run if k else wandb)  # the module logs to its current run
            kept.append(dict(run.summary))
    for k, (row, numbers) in enumerate(zip(kept, NAMED, strict=True)):
        assert {name: row[name] for name in numbers} == numbers
        assert row["units/step"] == 2 * k + 2
    assert list(tmp_path.rglob("*.wandb"))


def test_another_writer_is_refused():
    (report, *_) = reports()
    with pytest.raises(TypeError, match="a SummaryWriter or a run of W&B, not a list"):
        log_scalars(report, [])
