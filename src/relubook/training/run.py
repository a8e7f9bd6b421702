"""What a training run measured, and runs cut into ranges of members or put together."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from relubook._optional import require
from relubook.training.stack import Stack, member_seeds

__all__ = ["TrainingRun", "concatenate", "crossed", "seed_ranges"]


@dataclass
class TrainingRun:
    """What :func:`relubook.training.train.train` measured; the network is the sample.

    Attributes:
        network: The trained stack.
        lr: The members' learning rates, shape (M,).
        steps: Steps at which was measured, R of them, 0 being where the run began.
        loss: On the whole training set in evaluation mode, (R, M); not finite after an overflow.
        accuracy: Share of the training set classified rightly, (R, M); NaN without labels.
        validation_loss, validation_accuracy: Likewise, NaN without a validation set.
        dead: Share of the units of each activation that output 0 on the whole training set,
            (R, M, activations). NaN once a member has overflowed.
        died: For each activation the measured step since which a unit has been dead, (M, units),
            int64: 0 if from the start, -1 if it fires at the end; overflowed: as seen before that.
        gradient_norm: Norm of the gradient of the last step before the measurement, over the
            whole network and before clipping, (R, M); NaN at step 0.
        diverged: First measured step with a non-finite loss or parameter, (M,), int64, else -1.
        interrupted: Whether Ctrl-C stopped the run; it then holds what there is.
    """

    network: Stack = field(repr=False)
    seeds: tuple[int, ...]
    lr: Tensor
    steps: tuple[int, ...]
    loss: Tensor
    accuracy: Tensor
    validation_loss: Tensor
    validation_accuracy: Tensor
    dead: Tensor
    died: list[Tensor]
    gradient_norm: Tensor
    diverged: Tensor
    interrupted: bool = False

    def __len__(self) -> int:
        return len(self.seeds)

    def __repr__(self) -> str:
        last = self.loss[-1][self.diverged < 0]
        loss = f"{last.mean():.4g}" if len(last) else "none finite"
        state = f"{len(self) - len(last)} diverged" + ", interrupted" * self.interrupted
        size = f"{len(self)} members, {self.steps[-1]} steps"
        return f"TrainingRun({size}, mean loss {loss}, {state})"

    def member(self, index: int) -> nn.Module:
        """Take one trained member out as a plain module in evaluation mode."""
        return self.network.member(index).eval()

    def dead_share(self, at: int | slice = -1) -> Tensor:
        """Return each member's share of dead units among all, (M,), at a measurement."""
        units = self.dead.new_tensor([since.shape[1] for since in self.died])
        return (self.dead[at] * units).sum(-1) / max(1.0, float(units.sum()))

    def to_frame(self, by: str = "member") -> Any:
        """Return the measurements as a tidy ``pandas.DataFrame``.

        ``by="member"`` has one row a member and step; ``by="layer"`` one a member, step and
        activation (counted from 1). ``dead`` is the share among all units, or the layer's.
        """
        if by not in ("member", "layer"):
            raise ValueError(f"by must be 'member' or 'layer', not {by!r}")
        pd = require("pandas", "tables of results")
        table = pd.DataFrame(
            [(step, *of) for step in self.steps for of in enumerate(self.seeds)],
            columns=["step", "member", "seed"],
        )
        table["lr"] = self.lr.tolist() * len(self.steps)
        if by == "layer":
            layers = pd.DataFrame({"layer": range(1, self.dead.shape[2] + 1)})
            return table.merge(layers, "cross").assign(dead=self.dead.flatten().tolist())
        names = ("loss", "accuracy", "validation_loss", "validation_accuracy", "gradient_norm")
        for name in names:
            table[name] = getattr(self, name).flatten().tolist()
        table["dead"] = self.dead_share(slice(None)).flatten().tolist()
        since = self.diverged.repeat(len(self.steps)).numpy()
        table["diverged"] = (since >= 0) & (since <= table["step"].to_numpy())
        return table


def crossed(seeds: int | Iterable[int], lr: Iterable[float]) -> tuple[list[int], list[float]]:
    """Cross seeds with learning rates, so that a whole grid is one stack.

    Returns seeds s and rates r for ``train(recipe.stack(s), ..., lr=r)``; m is ``range(m)``.

    >>> crossed(2, [0.1, 0.2])
    ([0, 1, 0, 1], [0.1, 0.1, 0.2, 0.2])
    """
    chosen, rates = member_seeds(seeds), list(lr)
    return list(chosen) * len(rates), [rate for rate in rates for _ in chosen]


def seed_ranges(members: int, parts: int) -> list[range]:
    """Cut ``range(members)`` into at most ``parts`` ranges of nearly equal length.

    >>> seed_ranges(10, 3)
    [range(0, 4), range(4, 7), range(7, 10)]
    """
    if members < 1 or parts < 1:
        raise ValueError(f"members and parts must be at least 1, not {members} and {parts}")
    cut = torch.arange(members).tensor_split(min(parts, members))
    return [range(int(part[0]), int(part[-1]) + 1) for part in cut]


def concatenate(runs: Iterable[TrainingRun]) -> TrainingRun:
    """Put runs over disjoint ranges of members together.

    The runs are of stacks of one kind, measured at the same steps, in the order of the members.
    Raises ValueError if there is none, or networks or steps differ.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("runs is empty: there is nothing to concatenate")
    states = [(run.steps, run.network.state_dict()) for run in runs]
    if len({(at, *((k, v.shape[1:]) for k, v in state.items())) for at, state in states}) > 1:
        raise ValueError("runs must have networks of the same shapes and the same steps")
    merged: dict[str, Any] = {"interrupted": any(run.interrupted for run in runs)}
    for entry in fields(TrainingRun):
        values = [getattr(run, entry.name) for run in runs]
        if entry.name == "died":
            merged[entry.name] = [torch.cat(layer) for layer in zip(*values, strict=True)]
        elif isinstance(values[0], Tensor):
            merged[entry.name] = torch.cat(values, min(1, values[0].dim() - 1))
    merged["seeds"] = tuple(seed for run in runs for seed in run.seeds)
    merged["network"] = Stack.join([run.network for run in runs])
    return replace(runs[0], **merged)
