"""Bring dead units back to life without changing what the network computes.

A dead unit contributes nothing and receives no gradient, so no gradient method can repair it.
:func:`revive_` gives it fresh incoming weights, so that it fires again, and cuts its outgoing
weights to zero, so that nobody notices until they have learned what to do with it:

>>> import torch
>>> from torch import nn
>>> from relubook.units.diagnosis import diagnose
>>> from relubook.units.revival import revive_
>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
>>> with torch.no_grad():
...     _ = model[0].bias[:3].fill_(-100.0)
>>> x = torch.randn(256, 4)
>>> before = model(x)
>>> revival = revive_(model, diagnose(model, [x]), x)
>>> revival.total, revival.silent
(3, 0)
>>> bool(torch.equal(before, model(x)))
True
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from relubook.units.passes import TRANSPOSED, Plan, run, unit_dim
from relubook.units.readers import find_readers
from relubook.units.report import plain_table
from relubook.units.sites import tensors_in, undisturbed, unwrapped

__all__ = ["Change", "Left", "Revival", "revive_"]

OptimizerState = Literal["mixed", "zero", "mean"]

# Optimizer state that holds a running size of the gradient; the rest of the state starts at zero.
_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance", "sum", "exp_inf"}
_MOVED = (
    "its repair moves the outputs on the batch, so it was put back: a hook changes what a layer "
    "gets or returns, or the units are not silent on the batch"
)


@dataclass(frozen=True)
class Change:
    """What was changed for one site.

    Attributes:
        site: Name of the site in the report.
        producer: Name of the layer whose units were re-initialized.
        units: Indices of the revived units, ``(revived,)``, int64.
        before: Name of the batch norm in front of the rectifier that was reset, or None.
        consumers: Names of the layers whose weights for these units are now zero.
        folded: Those of the consumers whose bias took over the unit's constant.
        gates: Names of the batch norms whose scale is zero instead, see :func:`revive_`.
        silent: How many of the revived units are silent on the batch all the same.
    """

    site: str
    producer: str
    units: Tensor
    before: str | None
    consumers: tuple[str, ...]
    folded: tuple[str, ...]
    gates: tuple[str, ...]
    silent: int = 0


@dataclass(frozen=True)
class Left:
    """A site whose dead units were left, their number, and why, and what would help."""

    site: str
    units: int
    reason: str


@dataclass(frozen=True)
class Revival:
    """What :func:`revive_` changed and what it left, by sites in execution order."""

    changes: tuple[Change, ...]
    left: tuple[Left, ...]

    @property
    def total(self) -> int:
        """Number of revived units."""
        return sum(len(change.units) for change in self.changes)

    @property
    def silent(self) -> int:
        """Number of revived units that are silent on the batch all the same."""
        return sum(change.silent for change in self.changes)

    def __repr__(self) -> str:
        rows = [("site", "units", "re-initialized", "set to zero")]
        for change in self.changes:
            fresh = change.producer + (f" + {change.before}" if change.before else "")
            folded = {name: f"{name} (bias took the rest)" for name in change.folded}
            cut = [folded.get(name, name) for name in change.consumers]
            cut += [f"scale of {name}" for name in change.gates]
            rows.append((change.site, str(len(change.units)), fresh, ", ".join(cut)))
        left = sum(entry.units for entry in self.left)
        silent = f" ({self.silent} silent on the batch)" if self.silent else ""
        lines = [f"Revival: {self.total} units revived{silent}, {left} left"]
        lines += plain_table(rows, words=4) if self.changes else []
        lines += [f"left: {x.site}, {x.units} dead: {x.reason}" for x in self.left]
        return "\n".join(lines)


def revive_(
    model: nn.Module,
    report: Any,
    batch: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: OptimizerState = "mixed",
    generator: torch.Generator | None = None,
    init: Callable[..., Any] = nn.init.kaiming_normal_,
) -> Revival:
    """Re-initialize a model's dead units in place, leaving its function on the data as it is.

    Incoming weights are drawn afresh and centered on the batch, so that the unit fires on about
    half of it: its bias becomes minus the mean pre-activation; a batch norm in front of the
    rectifier gets scale 1, shift 0 and the batch's mean and variance; without a bias, weights whose
    mean is negative are negated. Outgoing weights become 0. This is the repair of ReDo (Sokar et
    al. 2023, arXiv 2302.12902), applied to dead instead of dormant units.

    **What stays.** In evaluation mode the output is the same on every input on which all revived
    units were silent: bit for bit, or up to rounding where a batch norm stands behind the
    rectifier. Such a norm turns the unit's 0 into a constant c, and the next layer's bias takes
    over c times the outgoing weights. Where that would be inexact (zero padding, no bias), the
    norm's scale becomes 0 and its shift c instead, and the outgoing weights stay. In training mode
    the function can change by what running and batch mean differ. The outputs on the batch are
    compared, with the model's own hooks; a site whose repair moves them is put back and listed.

    **Which layers come next** is observed in passes with noise in place of the layers' outputs, on
    the path that the batch takes. Left and listed with the reason: sums (residual connections),
    layer norm and whatever else mixes units; layers that are neither linear nor convolutions, are
    called more than once, share a weight, carry a parametrization, or are frozen.

    **How they learn.** In the first step only the outgoing weights (or the scale) get a gradient
    that is not zero, from the second step on the incoming ones too. The optimizer's running
    averages become 0 in the changed entries, other state returns to its start, and Adam's step
    count is kept. With second moments of 0 too, Adam's first update is (1 - beta1) /
    sqrt(1 - beta2) = 3.2 times the learning rate, and rises to 6.6 times for a steady gradient (10
    times for RMSprop): incoming weights learn soon by that, outgoing ones disturb the function.

    Args:
        model: The model. Its mode, hooks and gradients stay; the passes run its hooks.
        report: What :func:`relubook.units.diagnosis.diagnose` returned for this model.
        batch: A batch of the data that the report rests on: a tensor, a tuple whose first element
            is the input, or a dict of keyword arguments; by default the report's ``example``.
        optimizer: The optimizer whose moments would go on to push the fresh weights.
        optimizer_state: Second moments (``exp_avg_sq``, Adagrad's ``sum``, ...) become the mean
            over the tensor's other entries in outgoing entries and 0 in incoming ones ("mixed"), 0
            in all ("zero") or the mean in all ("mean": slow for 1 / (1 - beta2) steps).
        generator: Source of the fresh weights; by default a new one, seeded from the global random
            state, which is not advanced.
        init: Fills a weight ``(units, in, ...)`` in place, called with ``generator=``.

    Raises:
        TypeError: If ``model``, ``report`` or ``optimizer`` is something else, or scripted.
        ValueError: If there is no batch, the report belongs to another model, the optimizer does
            not hold a parameter that is to be changed or is L-BFGS, or an option is unknown.
            Whatever is raised, model and optimizer are as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is scripted, its layers cannot be read: revive the model it is from")
    if not hasattr(report, "sites"):
        raise TypeError(f"report is a {type(report).__name__}; it must be what diagnose returns")
    if optimizer_state not in (choices := get_args(OptimizerState)):
        raise ValueError(f"optimizer_state is {optimizer_state!r}; it must be one of {choices}")
    batch = getattr(report, "example", None) if batch is None else batch
    if batch is None:
        raise ValueError("the report holds no example of the data: pass a batch of inputs")
    plans, reasons = find_readers(model, report.sites, batch)
    if optimizer is not None:
        _check_optimizer(model, optimizer, plans)
    if generator is None:  # the global random state gives the seed and stays where it is
        state = bytes(torch.get_rng_state().tolist())
        seed = int.from_bytes(hashlib.sha256(state).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
    repair = partial(_Repair, model, batch, init, generator, optimizer, optimizer_state)
    changes = repair().attempt(plans)
    if changes is None:
        kept: list[Plan] = []
        for plan in plans:
            if repair().attempt([*kept, plan], keep=False) is None:
                reasons[plan.site] = _MOVED
            else:
                kept.append(plan)
        changes = repair().attempt(kept) or []
    dead = {site.name: int(site.dead.sum()) for site in report.sites if site.name in reasons}
    left = tuple(Left(name, units, reasons[name]) for name, units in dead.items())
    return Revival(tuple(changes), left)


@dataclass(frozen=True)
class _Repair:
    """One repair of some sites, all at once or not at all.

    Attributes:
        saved: Every tensor before its first change, by id.
        fresh: Parameters, by id, with the entries that start anew, and the outgoing ones of these.
        statistics: Buffers, and what they become.
        silent: How many units of a site are silent on the batch all the same.
    """

    model: nn.Module
    batch: Any
    init: Callable[..., Any]
    generator: torch.Generator
    optimizer: torch.optim.Optimizer | None
    optimizer_state: OptimizerState
    saved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fresh: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    silent: dict[str, int] = field(default_factory=dict)

    def attempt(self, plans: Sequence[Plan], keep: bool = True) -> list[Change] | None:
        """Repair sites and say what changed; put all back, None, if the outputs move."""
        start, done = self.generator.get_state(), False
        with torch.no_grad():
            try:
                before = self.outputs()
                for step in (self.cut, self.draw):
                    for plan in plans:
                        step(plan)
                # Layer after layer in one pass, and buffers at its end: the pass restores them.
                self.outputs([(plan.layer, partial(self.center, plan)) for plan in plans])
                for buffer, value in self.statistics:
                    self.touch(buffer).copy_(value)
                after = self.outputs()
                if len(before) != len(after) or not all(map(_is_same, before, after)):
                    return None
                if keep and self.optimizer is not None:
                    self.reset_state(self.optimizer)
                done = keep
                return list(map(self.change, plans))
            finally:
                if not done:
                    for tensor, value in self.saved.values():
                        tensor.copy_(value)
                    self.generator.set_state(start)

    def outputs(self, hooks: Sequence[tuple[nn.Module, Callable[..., Any]]] = ()) -> list[Tensor]:
        """Run the model on the batch in evaluation mode."""
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
            self.model.eval()
            return list(tensors_in(run(self.model, self.batch)))

    def touch(self, tensor: Tensor) -> Tensor:
        self.saved.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        return tensor

    def write(self, parameter: Tensor, index: Any, value: Any, outgoing: bool = False) -> None:
        """Set entries, and note that they start anew and on which side of the unit they are."""
        self.touch(parameter)[index] = torch.as_tensor(value).to(parameter)
        none = torch.zeros_like(parameter, dtype=torch.bool)
        _, fresh, out = self.fresh.setdefault(id(parameter), (parameter, none, none.clone()))
        fresh[index], out[index] = True, outgoing

    def cut(self, plan: Plan) -> None:
        """Set the outgoing weights to zero, or shut the gates."""
        for sink in plan.sinks:
            module, weight = sink.module, sink.module.weight
            columns, constant = sink.columns.to(weight.device), sink.constant.to(weight.device)
            if sink.is_gate:
                self.write(module.bias, columns, constant[columns], outgoing=True)
            elif not isinstance(module, TRANSPOSED):
                outputs, per_group = weight.shape[:2]
                rows = outputs // getattr(module, "groups", 1)
                columns, constant = (
                    x.view(-1, 1, per_group).expand(-1, rows, -1).reshape(outputs, per_group)
                    for x in (columns, constant)
                )
                if sink.is_folded:
                    sums = weight.double().reshape(outputs, per_group, -1).sum(2)
                    bias = self.touch(module.bias)
                    bias.copy_(bias.double() + (sums * constant).sum(1))
            self.write(weight, columns, 0.0, outgoing=True)

    def draw(self, plan: Plan) -> None:
        """Draw the incoming weights."""
        layer, index = plan.layer, _incoming(plan.layer, plan.units)
        exact = torch.promote_types(layer.weight.dtype, torch.float32)
        fresh = torch.empty(layer.weight[index].shape, dtype=exact, device=self.generator.device)
        self.init(fresh, generator=self.generator)
        if isinstance(layer, TRANSPOSED):
            # One tap in `stride` reaches an output position, so the fan-in is that much smaller.
            fresh *= prod(layer.stride) ** 0.5
        if not bool(fresh.isfinite().all()):
            raise ValueError("init returned weights that are not finite")
        self.write(layer.weight, index, fresh)
        resets = [(layer.bias, 0.0)]
        if plan.before is not None:
            resets += [(plan.before[1].weight, 1.0), (plan.before[1].bias, 0.0)]
        for parameter, value in resets:
            if parameter is not None:
                self.write(parameter, plan.units.to(parameter.device), value)

    def center(self, plan: Plan, layer: Any, args: Any, output: Tensor) -> Tensor | None:
        """Give the fresh units mean 0 on the batch; a forward hook that returns what follows."""
        at, dim = plan.units.to(output.device), unit_dim(layer)
        values = output.index_select(dim, at).movedim(dim, -1)
        variance, mean = torch.var_mean(values.double().reshape(-1, len(at)), dim=0, correction=0)
        if not bool(mean.isfinite().all()):
            what = f"the pre-activations of {plan.producer!r}"
            raise ValueError(f"on the batch {what} are not finite")
        centered = values - mean.to(values.dtype)
        if plan.before is not None:
            norm = plan.before[1]
            for buffer, value in ((norm.running_mean, mean), (norm.running_var, variance)):
                if buffer is not None:
                    buffer[at] = value.to(buffer.dtype)
                    self.statistics.append((buffer, buffer.clone()))
        elif layer.bias is not None:
            self.write(layer.bias, at, -mean)
        else:
            sign = torch.where(mean < 0, -1.0, 1.0).to(values.dtype)
            index = _incoming(layer, plan.units)
            signs = sign.reshape(-1, *[1] * (layer.weight.dim() - 1))
            self.write(layer.weight, index, layer.weight[index] * signs)
            centered = values * sign
        self.silent[plan.site] = int((centered.reshape(-1, len(at)).amax(0) <= 0).sum())
        return None if plan.before else output.index_copy(dim, at, centered.movedim(-1, dim))

    def change(self, plan: Plan) -> Change:
        gates = tuple(sink.name for sink in plan.sinks if sink.is_gate)
        consumers = tuple(sink.name for sink in plan.sinks if not sink.is_gate)
        folded = tuple(sink.name for sink in plan.sinks if sink.is_folded)
        what = plan.site, plan.producer, plan.units, plan.before[0] if plan.before else None
        return Change(*what, consumers, folded, gates, self.silent[plan.site])

    def reset_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer's state of the changed entries start anew."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for parameter, fresh, outgoing in self.fresh.values():
            averaged = {"mixed": outgoing, "zero": fresh & False, "mean": fresh}
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.shape != parameter.shape:
                    continue
                at = fresh.to(value.device)
                others = self.touch(value)[~at]
                begin = "lr" if key == "step_size" else "initial_accumulator_value"
                anew = groups[id(parameter)].get(begin, 0.0)
                value[at] = parameter.to(value)[at] if key == "ax" else float(anew)
                if key in _SECOND_MOMENTS and len(others):
                    value[averaged[self.optimizer_state].to(value.device)] = others.mean()


def _incoming(layer: Any, units: Tensor) -> Any:
    """The index of the weights of some units, ``(units, in, ...)``."""
    units = units.to(layer.weight.device)
    if not isinstance(layer, TRANSPOSED):
        return units
    inputs, per_group = layer.weight.shape[:2]
    rows = inputs // layer.groups
    at = units[:, None] // per_group * rows + torch.arange(rows, device=units.device)
    return at, (units % per_group)[:, None]


def _is_same(before: Tensor, after: Tensor) -> bool:
    """Whether two outputs are equal up to what rounding in a bias may do to them."""
    if before.shape != after.shape or not before.is_floating_point():
        return torch.equal(before, after)
    size = float(before.double().nan_to_num(0.0, 0.0, 0.0).abs().amax()) if before.numel() else 0.0
    tolerance = torch.finfo(before.dtype).eps ** 0.5 * size
    return torch.allclose(before, after, rtol=0.0, atol=tolerance, equal_nan=True)


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, plans: list[Plan]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("L-BFGS keeps no state per entry: pass a new one after revive_ instead")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError("the optimizer holds none of the model's parameters")
    missing = {repr(n) for plan in plans for n, p in plan.parameters() if id(p) not in held}
    if missing:
        raise ValueError(f"the optimizer does not hold {', '.join(sorted(missing))}")
