"""Revive a model's units every so many steps of its training."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from relubook.units.diagnosis import diagnose
from relubook.units.report import DORMANT
from relubook.units.revival import Revival, listed, revive_
from relubook.units.sites import tensors_in, undisturbed, unwrapped

__all__ = ["Reviver"]


class Reviver:
    """Revives dead or dormant units every so many steps, as a scheduler changes the rate.

    With ``what="dormant"`` it is ReDo (Sokar et al. 2023, https://arxiv.org/abs/2302.12902): units
    whose mean absolute output is at most ``tau`` times their layer's mean get fresh incoming
    weights, outgoing weights of 0 and a fresh optimizer state. ``revive_`` says how, and what
    it leaves. Under ``torch.distributed`` all processes must step, and take over the first's state.

    Args:
        model, optimizer, generator: As in ``revive_``.
        every: Steps from one revival to the next.
        what: ``"dead"``, which leaves the function on the batch as it is, or ``"dormant"``.
        tau: Largest score of a dormant unit.
        options: Those of :func:`relubook.units.diagnosis.diagnose`, such as ``unit_dim``.

    Attributes:
        steps: Number of steps so far; set it when a run is resumed.
        history: A pair ``(steps, revival)`` for each time it was due.

    Raises TypeError or ValueError if an argument is none such. A step that is due raises what
    ``diagnose`` and ``revive_`` do; then nothing is revived.

    >>> reviver = Reviver(model, optimizer, every=1000, what="dormant")
    >>> for x, y in loader:
    ...     train(x, y)  # with optimizer.step()
    ...     reviver.step(x)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        every: int = 1000,
        what: Literal["dead", "dormant"] = "dead",
        tau: float = DORMANT,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of steps, at least 1, not {every!r}")
        if what not in ("dead", "dormant") or not tau >= 0:
            raise ValueError(f"what={what!r}, tau={tau}: say 'dead' or 'dormant', tau from 0 on")
        self._model, self._options = unwrapped(model), options
        options["family"] = "all" if what == "dormant" else "rectifiers"
        inspect.signature(diagnose).bind(model, [], **options)
        self._repair: dict[str, Any] = {"optimizer": listed(optimizer), "generator": generator}
        self._repair["tau"] = tau if what == "dormant" else None
        self._repair["activations"] = options.get("activations")
        self.every, self.steps, self.history = every, 0, list[tuple[int, Revival]]()

    def step(self, batch: Any) -> Revival | None:
        """Count a step of the optimizer, just made; when due, revive and return what was done.

        ``batch`` is as in ``revive_``. The verdict rests on it alone, in evaluation mode: a
        unit that fires on other data only loses what it did there, so let it be a large one.
        """
        self.steps += 1
        if self.steps % self.every:
            return None
        with undisturbed(self._model):
            self._model.eval()
            report = diagnose(self._model, [batch], **self._options)
        done = [revive_(self._model, report, batch, **self._repair)]
        if distributed.is_available() and distributed.is_initialized():
            states = [part.state_dict() for part in (self._model, *self._repair["optimizer"])]
            for tensor in filter(Tensor.dim, tensors_in(states)):
                distributed.broadcast(tensor, 0)
            distributed.broadcast_object_list(done, 0)
        self.history.append((self.steps, done[0]))
        return done[0]
