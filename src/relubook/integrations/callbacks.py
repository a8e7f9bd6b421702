"""Watch the units of a model that a trainer of Hugging Face or Lightning trains."""

import sys
from typing import Any

from torch import nn

from relubook._optional import require
from relubook.integrations.scalars import check, log_scalars, scalars
from relubook.units.watch import Watch, WatchReport

__all__ = ["hugging_face_callback", "lightning_callback"]


def hugging_face_callback(*, writer: Any = None, **options: Any) -> Any:
    """Return a callback for transformers' ``Trainer``; its ``watch`` counts optimizer steps.

    Dead share, deaths and revivals of the last window join what is logged with the loss: printed,
    and in ``trainer.state.log_history``. A ``writer`` (a ``SummaryWriter``, or a run of W&B) gets
    those of all sites after each window, from the first of several processes. ``options`` are those
    of ``Watch``; wrong ones raise TypeError or ValueError. ImportError without transformers. If
    training fails, ``callback.watch.close()`` removes the hooks.
    """
    if writer is not None:
        check(writer)
    transformers = require("transformers", "its callback", "hugging-face")
    return type("WatchCallback", (_HuggingFace, transformers.TrainerCallback), {})(options, writer)


def lightning_callback(module: str = "", **options: Any) -> Any:
    """Return a callback for Lightning's ``Trainer``; its ``watch`` counts optimizer steps.

    After each window all loggers of the trainer get :func:`relubook.integrations.scalars.scalars`,
    from the first of several processes. ``module`` names the part that ``training_step`` calls,
    such as ``"net"``. The default is the ``LightningModule`` itself, for ``self(x)`` on one device;
    under a strategy that wraps it, ValueError when training starts. With several optimizers, passes
    are counted. ``options`` are those of ``Watch``; wrong ones raise TypeError or ValueError at
    once. ImportError without Lightning.
    """
    homes = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
    lightning = require((*homes, "pytorch_lightning")[0], "its callback", "lightning")
    return type("WatchCallback", (_Lightning, lightning.Callback), {})(options, module)


class _Callback:
    watch: Watch | None = None
    report: WatchReport | None = None

    def __init__(self, options: dict[str, Any], other: Any) -> None:
        Watch(nn.Identity(), optimizer=None, **options)  # raises if one is wrong
        self.options, self.other = options, other

    def follow(self, model: nn.Module, optimizer: Any) -> None:
        self.on_train_end()
        self.report, self.watch = None, Watch(model, optimizer=optimizer, **self.options).attach()

    def news(self) -> WatchReport | None:
        before, self.report = self.report, self.watch._report if self.watch else None
        return None if self.report is before else self.report

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.watch is not None:
            self.watch.close()


class _HuggingFace(_Callback):
    def on_train_begin(self, *_: Any, model: Any, optimizer: Any = None, **__: Any) -> None:
        self.follow(model, optimizer)

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if (report := self.news()) and self.other and state.is_world_process_zero:
            log_scalars(report, self.other, step=state.global_step)

    def on_log(self, args: Any, state: Any, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if self.report and "loss" in logs:
            numbers = {k: v for k, v in scalars(self.report).items() if k.count("/") == 1}
            logs |= numbers
            state.log_history[-1] |= numbers


class _Lightning(_Callback):
    on_exception = _Callback.on_train_end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        model = pl_module.get_submodule(self.other)
        if model is pl_module is not trainer.strategy.model:  # which takes its forward
            parts = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"name the part that training_step calls, module=: one of {parts}")
        self.follow(model, trainer.optimizers[0] if len(trainer.optimizers) == 1 else None)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if report := self.news():
            for logger in trainer.loggers:
                logger.log_metrics(scalars(report), trainer.global_step)
