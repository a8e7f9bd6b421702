"""The callbacks inside of the real trainers, against a watch of one's own around the training."""

import os
import sys
import types
import warnings

import pandas
import pytest
import torch
from torch import nn

from relubook.integrations import callbacks
from relubook.units.watch import Watch

pytestmark = pytest.mark.slow  # both libraries take seconds to import

WORDS = ("units/dead_fraction", "units/deaths", "units/revivals")


class Net(nn.Module):
    """Returns a loss, as models of transformers do; unit 0 dies and comes back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        self.calls = 0
        with torch.no_grad():
            self.net[0].bias.fill_(99.0)

    def forward(self, x, labels):
        with torch.no_grad():
            self.net[0].bias[0] = -99.0 if 4 <= self.calls < 8 else 99.0
        self.calls += self.training and torch.is_grad_enabled()
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


class Writer:
    """Takes numbers as a ``SummaryWriter`` does."""

    def __init__(self):
        self.written = []

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))


def batches(seed=0):
    torch.manual_seed(seed)
    return [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(48)]


def hugging_face(path, callback, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 3} | options
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = transformers.TrainingArguments(
        str(path), per_device_train_batch_size=4, learning_rate=0.01, **quiet, **options
    )
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return transformers.Trainer(
        model, args, train_dataset=batches(), callbacks=[callback], optimizers=(optimizer, schedule)
    )


def test_hugging_face_trainer(tmp_path):
    writer = Writer()
    callback = callbacks.hugging_face_callback(writer=writer, window=2)
    trainer = hugging_face(tmp_path, callback)
    with Watch(trainer.model, window=2, optimizer=trainer.optimizer) as watch:
        trainer.train()
    assert callback.watch.history == watch.history
    assert [(e.until, e.unit, e.kind) for e in watch.history] == [
        (4, 0, "death"),
        (6, 0, "revival"),
    ]
    report = callback.watch.compute()
    assert (report.step, report.inputs) == (6, 2 * 2 * 4)  # accumulation makes no steps
    whole = [(value, step) for name, value, step in writer.written if name == WORDS[0]]
    assert whole == [(0, 2), (0.25, 4), (0, 6)]
    assert {name for name, _, _ in writer.written} == {*WORDS, "units/dead_fraction/net.1"}
    first, second, last = trainer.state.log_history
    assert [first[name] for name in WORDS] == [0, 0, 0]
    assert [second[name] for name in WORDS] == [0, 0, 1]
    assert "loss" in first
    assert not set(WORDS) & set(last)  # the summary of the run
    assert not trainer.model._forward_hooks


def test_hugging_face_trainer_that_failed(tmp_path):
    callback = callbacks.hugging_face_callback(window=1)
    trainer = hugging_face(tmp_path, callback)

    def fail(*_):
        assert trainer.model.calls < 9

    bad = trainer.model.net.register_forward_hook(fail)
    with pytest.raises(AssertionError):
        trainer.train()
    bad.remove()
    old = callback.watch
    assert old.step == 4
    trainer.train()
    assert callback.watch is not old
    assert callback.watch.step == 6
    assert not trainer.model._forward_hooks


def logged(trainer):
    """Return the dead share that Lightning's logger kept, by its step, and the columns."""
    table = pandas.read_csv(f"{trainer.logger.log_dir}/metrics.csv")
    table = table[["step", *[name for name in table if name.startswith("units/")]]].dropna()
    return dict(zip(table.step, table[WORDS[0]], strict=True)), set(table) - {"step"}


def lightning(path, callback, whole=False, **options):
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.part = Net()

        def forward(self, batch):
            return self.part(**batch)["loss"]

        def training_step(self, batch, index):
            return self(batch) if whole else self.part(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    quiet = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    own = {"max_steps": 6, "accumulate_grad_batches": 2} | options
    trainer = pl.Trainer(
        callbacks=[callback],
        logger=pl.loggers.CSVLogger(path),
        accelerator="cpu",
        default_root_dir=path,
        **quiet,
        **own,
    )
    loader = torch.utils.data.DataLoader(batches(), batch_size=4)
    return trainer, Module(), loader


@pytest.mark.filterwarnings("ignore")  # its advice on workers of loaders
@pytest.mark.parametrize("whole", [False, True])
def test_lightning_trainer(tmp_path, whole):
    callback = callbacks.lightning_callback("" if whole else "part", window=2)
    trainer, module, loader = lightning(tmp_path, callback, whole)
    trainer.fit(module, loader)
    history = callback.watch.history
    assert [(e.until, e.unit, e.kind) for e in history] == [(4, 0, "death"), (6, 0, "revival")]
    assert callback.watch.compute().inputs == 2 * 2 * 4
    shares, names = logged(trainer)
    assert shares == {2: 0, 4: 0.25, 6: 0}
    site = "units/dead_fraction/part.net.1" if whole else "units/dead_fraction/net.1"
    assert names == {*WORDS, site}
    assert not module.part._forward_hooks
    assert not module._forward_hooks


@pytest.mark.filterwarnings("ignore")
def test_lightning_trainer_that_failed(tmp_path):
    callback = callbacks.lightning_callback("part", window=1)
    trainer, module, loader = lightning(tmp_path, callback)
    module.part.net.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader)
    assert not module.part._forward_hooks
    trainer, module, loader = lightning(tmp_path, callbacks.lightning_callback("prat"))
    with pytest.raises(AttributeError, match="prat"):
        trainer.fit(module, loader)


@pytest.mark.parametrize(
    ("make", "library", "extra"),
    [
        (callbacks.hugging_face_callback, "transformers", "hugging-face"),
        (callbacks.lightning_callback, "pytorch_lightning", "lightning"),
    ],
)
def test_wrong_options_and_a_missing_library(monkeypatch, make, library, extra):
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)
    pytest.importorskip(library)
    with pytest.raises(ValueError, match="window must be"):
        make(window=0)
    with pytest.raises(TypeError, match="optimizer"):
        make(optimizer=torch.optim.SGD([torch.zeros(1)], 0.1))
    with pytest.raises(TypeError, match="a SummaryWriter or a run of W&B, not a str"):
        callbacks.hugging_face_callback(writer="runs")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'pip install "relubook\[{extra}\]"'):
        make()


def test_either_package_of_lightning(monkeypatch):
    class Callback:
        pass

    stub = types.SimpleNamespace(Callback=Callback)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", stub)
    assert isinstance(callbacks.lightning_callback(), Callback)


def _worker(rank, path, kind):
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, 0, 2, 2)), strict=True))
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    warnings.simplefilter("ignore")
    writer = Writer()
    if kind == "hugging_face":
        callback = callbacks.hugging_face_callback(writer=writer, window=2)
        trainer = hugging_face(path, callback, ddp_backend="gloo")
        trainer.train()
        written = {step: value for name, value, step in writer.written if name == WORDS[0]}
    else:
        whole = callbacks.lightning_callback(window=2)
        trainer, module, loader = lightning(path, whole, strategy="ddp", devices=2)
        with pytest.raises(ValueError, match="the part that training_step calls, .* one of part"):
            trainer.fit(module, loader)
        callback = callbacks.lightning_callback("part", window=2)
        trainer, module, loader = lightning(path, callback, strategy="ddp", devices=2)
        trainer.fit(module, loader)
        written = logged(trainer)[0] if rank == 0 else {}
    report = callback.watch.compute()
    torch.save((callback.watch.history, report.inputs, written), f"{path}/{rank}")


@pytest.mark.parametrize("kind", ["hugging_face", "lightning"])
def test_two_processes(tmp_path, two_processes, kind):
    two_processes(_worker, str(tmp_path), kind)
    results = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(2)]
    for history, inputs, _ in results:
        assert [(e.until, e.unit, e.kind) for e in history] == [(4, 0, "death"), (6, 0, "revival")]
        assert inputs == 2 * 2 * 2 * 4
    assert [written for _, _, written in results] == [{2: 0, 4: 0.25, 6: 0}, {}]
