"""What a training run measured, and runs cut into ranges of members or put together."""

import itertools
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
    """What :func:`train` measured; the network is the sample.

    Attributes:
        network: The trained stack.
        seeds: The members' seeds.
        lr: Their learning rates, shape (M,).
        steps: Steps at which was measured, R of them, 0 being where the run began.
        loss: On the whole training set in evaluation mode, shape (R, M). NaN or infinite once a
            member has overflowed.
        accuracy: Share of the training set classified rightly, (R, M); NaN without labels.
        validation_loss: The same on the validation set, (R, M); NaN without one.
        validation_accuracy: Likewise.
        dead: Share of the units of each activation that output 0 on the whole training set,
            (R, M, activations). NaN once a member has overflowed: non-finite is a state of its
            own.
        died: For each activation the measured step since which a unit has been dead without
            interruption, (M, units), int64: 0 when dead at the start, -1 when it fires at the end.
            Of an overflowed member it holds what was last seen before.
        gradient_norm: Norm of the gradient of the last step before the measurement, over the
            whole network and before clipping, (R, M); NaN at step 0.
        diverged: First measured step with a non-finite loss or parameter, (M,), int64; -1 for
            none.
        interrupted: Whether the run was stopped by Ctrl-C; it then holds what there is.
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
        state = ", interrupted" if self.interrupted else ""
        return (
            f"TrainingRun({len(self)} members, {self.steps[-1]} steps, mean loss {loss}, "
            f"{int((self.diverged >= 0).sum())} diverged{state})"
        )

    def member(self, index: int) -> nn.Module:
        """Take one trained member out as a plain module in evaluation mode."""
        return self.network.member(index).eval()

    def dead_share(self, at: int = -1) -> Tensor:
        """Return each member's share of dead units among all, (M,), at a measurement."""
        units = self.dead.new_tensor([since.shape[1] for since in self.died])
        return (self.dead[at] * units).sum(-1) / max(1.0, float(units.sum()))

    def to_frame(self, by: str = "member") -> Any:
        """Return the measurements as a tidy table.

        Args:
            by: ``"member"`` for one row a member and step; ``"layer"`` for one row a member, step
                and activation (counted from 1), with its share of dead units.

        Returns:
            A ``pandas.DataFrame``; ``dead`` is the share among all units by member, that among
            the layer's by layer.

        Raises:
            ValueError: If ``by`` is neither.
        """
        if by not in ("member", "layer"):
            raise ValueError(f"by must be 'member' or 'layer', not {by!r}")
        pd = require("pandas", "tables of results")
        index = pd.MultiIndex.from_product([self.steps, range(len(self))], names=["step", "member"])
        table = pd.DataFrame(index=index).reset_index()
        table["seed"] = [self.seeds[i] for i in table["member"]]
        table["lr"] = self.lr[table["member"].tolist()].tolist()
        if by == "layer":
            layers = pd.DataFrame({"layer": range(1, self.dead.shape[2] + 1)})
            return table.merge(layers, "cross").assign(dead=self.dead.flatten().tolist())
        names = ("loss", "accuracy", "validation_loss", "validation_accuracy", "gradient_norm")
        for name in names:
            table[name] = getattr(self, name).flatten().tolist()
        shares = [self.dead_share(place) for place in range(len(self.steps))]
        table["dead"] = torch.stack(shares).flatten().tolist()
        since = self.diverged[table["member"].tolist()].numpy()
        table["diverged"] = (since >= 0) & (since <= table["step"].to_numpy())
        return table


def crossed(seeds: int | Iterable[int], lr: Iterable[float]) -> tuple[list[int], list[float]]:
    """Cross seeds with learning rates, so that a whole grid is one stack.

    Args:
        seeds: The seeds; a number m stands for ``range(m)``.
        lr: The rates.

    Returns:
        Seeds and rates of the members, rate by rate: ``train(recipe.stack(s), ..., lr=r)``.

    Example:
        >>> crossed(2, [0.1, 0.2])
        ([0, 1, 0, 1], [0.1, 0.1, 0.2, 0.2])
    """
    chosen, rates = member_seeds(seeds), list(lr)
    return list(chosen) * len(rates), [rate for rate in rates for _ in chosen]


def seed_ranges(members: int, parts: int) -> list[range]:
    """Cut ``range(members)`` into at most ``parts`` ranges of nearly equal length.

    Example:
        >>> seed_ranges(10, 3)
        [range(0, 4), range(4, 7), range(7, 10)]
    """
    if members < 1 or parts < 1:
        raise ValueError(f"members and parts must be at least 1, not {members} and {parts}")
    size, more = divmod(members, min(parts, members))
    cuts = [part * size + min(part, more) for part in range(min(parts, members) + 1)]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def concatenate(runs: Iterable[TrainingRun]) -> TrainingRun:
    """Put runs over disjoint ranges of members together.

    Args:
        runs: Runs of stacks of one kind, measured at the same steps, in the order of the members.

    Returns:
        The run of all members.

    Raises:
        ValueError: If there is none, or networks or steps differ.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("runs is empty: there is nothing to concatenate")
    first = runs[0]

    def shapes(run: TrainingRun) -> list[Any]:
        return [(k, v.shape[1:]) for k, v in run.network.state_dict().items()]

    if any(run.steps != first.steps or shapes(run) != shapes(first) for run in runs):
        raise ValueError("runs must have networks of the same shapes and the same steps")
    merged: dict[str, Any] = {"interrupted": any(run.interrupted for run in runs)}
    for entry in fields(TrainingRun):
        values = [getattr(run, entry.name) for run in runs]
        if entry.name in ("lr", "diverged"):
            merged[entry.name] = torch.cat(values)
        elif entry.name == "died":
            merged[entry.name] = [torch.cat(layer) for layer in zip(*values, strict=True)]
        elif isinstance(values[0], Tensor):
            merged[entry.name] = torch.cat(values, 1)
    merged["seeds"] = tuple(seed for run in runs for seed in run.seeds)
    merged["network"] = Stack.join([run.network for run in runs])
    return replace(first, **merged)
