"""Bring dead units back to life without changing what the network computes.

A dead unit receives no gradient, so none can repair it. :func:`revive_` gives it fresh incoming
weights, so that it fires again, and outgoing weights of 0, so that nobody notices at first:

>>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(256, 4)
>>> _ = model[0].bias.data[:3].fill_(-100.0)
>>> before = model(x)
>>> revival = revive_(model, diagnose(model, [x]), x)
>>> revival.total, revival.silent
(3, 0)
>>> bool(torch.equal(before, model(x)))
True
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from relubook.units._kinds import Activations
from relubook.units._numbers import unit_dim
from relubook.units.readers import TRANSPOSED, Plan, Tracer, find_readers, run, turned
from relubook.units.report import Report, plain_table
from relubook.units.sites import tensors_in, undisturbed, unwrapped

__all__ = ["Change", "Left", "Revival", "revive_"]

# Optimizer state that holds a running size of the gradient; the rest of the state starts at zero.
_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance", "sum", "exp_inf"}
_MOVED = (
    "its repair moves the outputs on the batch, so it was put back: a hook changes what a layer "
    "gets or returns, or the units are not silent on the batch"
)
_IDLE = "its pieces that never win are no dead units, and to let one win would change its unit"


@dataclass(frozen=True)
class Change:
    """What was changed for one site; all modules are given by name.

    Attributes:
        producer: The layer whose units were re-initialized.
        units: Indices of the revived units, ``(revived,)``, int64.
        before: The batch norm in front of the rectifier that was reset, or None.
        consumers: The layers whose weights for these units are now zero.
        folded: Those of the consumers whose bias took over the unit's constant.
        silent: How many of the revived units are silent on the batch all the same.
    """

    site: str
    producer: str
    units: Tensor
    before: str | None
    consumers: tuple[str, ...]
    folded: tuple[str, ...]
    silent: int = 0


@dataclass(frozen=True)
class Left:
    """A site whose units were left, their number, and why, and what would help."""

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
            rows.append((change.site, str(len(change.units)), fresh, ", ".join(cut)))
        left = sum(entry.units for entry in self.left)
        silent = f" ({self.silent} silent on the batch)" if self.silent else ""
        lines = [f"Revival: {self.total} units revived{silent}, {left} left"]
        lines += plain_table(rows, words=4) if self.changes else []
        lines += [f"left: {x.site}, {x.units} units: {x.reason}" for x in self.left]
        return "\n".join(lines)


def revive_(
    model: nn.Module,
    report: Report,
    batch: Any = None,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    tau: float | None = None,
    activations: Activations = None,
    generator: torch.Generator | None = None,
    init: Callable[..., Any] = nn.init.kaiming_normal_,
) -> Revival:
    """Re-initialize a model's dead units in place, leaving its function on the data as it is.

    Incoming weights are drawn afresh and centered on the batch, so that the unit fires on about
    half of it: its bias becomes minus the mean pre-activation; a batch norm in front of the
    rectifier gets scale 1, shift 0 and the batch's mean and variance; without a bias, weights whose
    mean is negative are negated. Outgoing weights become 0. This is the repair of ReDo (Sokar et
    al. 2023, arXiv 2302.12902), for dead units and, if asked to, dormant ones.

    **What stays.** In evaluation mode the output is the same on every input on which all revived
    units were silent: bit for bit, or up to rounding where a batch norm behind the rectifier turns
    the unit's 0 into a constant, whose part the next layer's bias takes over. In training mode it
    can change by what running and batch mean differ. A site whose repair moves outputs is put back.

    **Which layers come next** is observed in evaluation and in training mode, on the path that the
    batch takes. Left and listed with the reason: sums (residual connections), layer norm and what
    else may mix units; a norm's constant before zero padding or a layer without bias; layers that
    are not linear or convolutions, called more than once, parametrized, frozen, or share a weight.

    **How they learn.** In the first step only the outgoing weights get a gradient, from the second
    on the incoming ones too. The optimizer's running averages become 0 in the changed entries, but
    second moments of outgoing weights the mean over the tensor's other entries; other state returns
    to its start, and Adam's step count stays. With second moments of 0, Adam's updates rise from
    3.2 to 6.6 times the rate (RMSprop: 10): good for incoming weights, too much for outgoing ones.

    Args:
        model: The model. Its mode, hooks and gradients stay; the passes run its hooks.
        report: What :func:`relubook.units.diagnosis.diagnose` returned for this model.
        batch: A batch of the data that the report rests on: a tensor, a tuple whose first element
            is the input, or a dict of keyword arguments; by default the report's ``example``.
        optimizer: The optimizer, or a list of all, whose moments would push the fresh weights on.
        tau: Revive dormant units too: those whose ``score`` in a report of ``family="all"`` is at
            most this (0.025 in the paper). They are not silent, so that the function moves a bit.
        activations: As given to ``diagnose``, which raises the same. Those that may mix units are
            left: their operators must act on each number alone (a top-k does not).
        generator: Source of the weights; default: a new one, of the global state, which stays.
        init: Fills a weight ``(units, in, ...)`` in place, called with ``generator=``.

    Raises TypeError if ``model``, ``report`` or ``optimizer`` is something else, or scripted;
    ValueError if there is no batch; if the report belongs to another model, or ``tau`` is no score,
    or has none there; if the optimizer is L-BFGS, or lacks a changed parameter; or if a layer gets
    what is not finite. Model and optimizer then are as before.
    """
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is scripted, its layers cannot be read: revive the model it is from")
    if not isinstance(report, Report):
        raise TypeError(f"report is a {type(report).__name__}; it must be what diagnose returns")
    batch = report.example if batch is None else batch
    if batch is None:
        raise ValueError("the report holds no example of the data: pass a batch of inputs")
    optimizers, chosen = listed(optimizer), {site.name: site.dead for site in report.sites}
    if tau is not None:
        scores = {site.name: site.score for site in report.sites if site.score is not None}
        if not tau >= 0 or not scores:
            raise ValueError(f"tau={tau} must be a score from 0 on, of diagnose(..., family='all')")
        chosen |= {name: chosen[name] | (score <= tau) for name, score in scores.items()}
    smooth = any(not site.silences and bool(chosen[site.name].any()) for site in report.sites)
    options: dict[str, Any] = {"smooth": smooth, "activations": activations}
    plans, reasons = find_readers(model, report.sites, batch, chosen, **options)
    held = {p for one in optimizers for group in one.param_groups for p in group["params"]}
    missing = {repr(n) for plan in plans for n, p in plan.parameters() if p not in held}
    if missing and optimizers:
        whose = "optimizer does" if len(optimizers) == 1 else "optimizers do"
        raise ValueError(f"the {whose} not hold {', '.join(sorted(missing))}")
    if generator is None:  # the global random state gives the seed and stays where it is
        with torch.random.fork_rng([]):
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    changes, fresh = [], dict[Tensor, Tensor]()
    with torch.no_grad(), ExitStack() as undo:  # puts all back, unless it is emptied
        before = _outputs(model, batch)
        for plan in plans:
            repair = _Repair(plan, fresh)
            with repair.undo:
                repair.undo.callback(generator.set_state, generator.get_state())
                repair.cut()
                repair.draw(init, generator)
                silent = repair.center(*_outputs(model, batch, plan.layer))
                after = _outputs(model, batch)
                same = len(before) == len(after) and all(map(_is_same, before, after))
                if not same and not plan.alive:
                    reasons[plan.site] = _MOVED
                    continue
                before = after if plan.alive else before
                undo.enter_context(repair.undo.pop_all())
            cut = tuple(sink.name for sink in plan.sinks)
            folded = tuple(sink.name for sink in plan.sinks if sink.is_folded)
            norm = plan.before[0] if plan.before else None
            changes.append(Change(plan.site, plan.producer, plan.units, norm, cut, folded, silent))
        if changes and activations:  # an own activation may be silent above 0
            tracer = Tracer(model, **options)
            tracer.trace(model, batch)
            for k, change in enumerate(changes):
                for fires in tracer.ways[change.producer].fires.values():
                    changes[k] = replace(change, silent=int((~fires[change.units]).sum()))
        for one in optimizers:
            _reset_state(one, fresh, undo)
        undo.pop_all()
    left = [Left(s, int(units.sum()), reasons[s]) for s, units in chosen.items() if s in reasons]
    left += [Left(site.name, 0, _IDLE) for site in report if site.never_wins.any()]
    return Revival(tuple(changes), tuple(left))


def _outputs(model: nn.Module, batch: Any, layer: nn.Module | None = None) -> list[Tensor]:
    """Run the model on the batch in evaluation mode: what it returns, or what a layer does."""
    seen: list[Tensor] = []
    with undisturbed(model), ExitStack() as stack:
        model.eval()
        if layer is not None:
            stack.enter_context(layer.register_forward_hook(lambda *call: seen.append(call[-1])))
        out = run(model, batch)
    return seen or list(tensors_in(out))


class _Repair:
    """The repair of one site; what ``undo`` holds puts it back."""

    def __init__(self, plan: Plan, fresh: dict[Tensor, Tensor]) -> None:
        self.plan, self.norm = plan, plan.before[1] if plan.before else None
        self.undo, self.fresh = ExitStack(), fresh

    def write(self, layer: Any, tensor: Tensor, at: Tensor, value: Any, cut: bool = False) -> None:
        """Set entries, and mark that they start anew: by 2 if outgoing weights, else by 1."""
        mark = self.fresh.setdefault(tensor, torch.zeros_like(tensor, dtype=torch.uint8))
        new = torch.as_tensor(value).to(tensor)
        for changed, entries in ((tensor, new), (mark, 1 + cut)):
            self.undo.callback(changed.copy_, changed.clone())
            turned(layer, changed)[at.to(tensor.device)] = entries

    def cut(self) -> None:
        for sink in self.plan.sinks:
            module, columns, constant = sink.module, sink.columns, sink.constant
            if not isinstance(module, TRANSPOSED):
                weight = turned(module, module.weight)
                outputs, inputs = weight.shape[:2]  # inputs of one group
                rows = outputs // getattr(module, "groups", 1)  # of one group
                columns = columns.view(-1, inputs).repeat_interleave(rows, 0)
                constant = constant.view(-1, inputs).repeat_interleave(rows, 0).to(weight.device)
                if sink.is_folded:
                    weight = weight.double().reshape(outputs, inputs, -1).sum(2)
                    bias = module.bias.double() + (weight * constant).sum(1)
                    self.undo.callback(module.bias.copy_, module.bias.clone())
                    module.bias.copy_(bias)
            self.write(module, module.weight, columns, 0.0, cut=True)

    def draw(self, init: Callable[..., Any], generator: torch.Generator) -> None:
        layer, units = self.plan.layer, self.plan.units
        exact = torch.promote_types(layer.weight.dtype, torch.float32)
        shape = (len(units), *turned(layer, layer.weight).shape[1:])
        fresh = torch.empty(shape, dtype=exact, device=generator.device)
        init(fresh, generator=generator)
        if not bool(fresh.isfinite().all()):
            raise ValueError("init returned weights that are not finite")
        resets = [(layer, layer.weight, fresh), (layer, layer.bias, 0.0)]
        if self.norm is not None:
            resets += [(self.norm, self.norm.weight, 1.0), (self.norm, self.norm.bias, 0.0)]
        for owner, parameter, value in resets:
            if parameter is not None:
                self.write(owner, parameter, units, value)

    def center(self, out: Tensor) -> int:
        """Give the fresh units mean 0 on the batch, and return how many are silent on it still."""
        layer, units = self.plan.layer, self.plan.units
        values = out.movedim(unit_dim(layer, out), -1)[..., units.to(out.device)]
        values = values.double().reshape(-1, len(units))
        variance, mean = torch.var_mean(values, dim=0, correction=0)
        if self.norm is not None:
            for name, value in (("running_mean", mean), ("running_var", variance)):
                if (buffer := getattr(self.norm, name)) is not None:
                    self.write(self.norm, buffer, units, value)
        elif layer.bias is not None:
            self.write(layer, layer.bias, units, -mean)
        else:
            sign = torch.where(mean < 0, -1.0, 1.0)
            weight = layer.weight[units.to(out.device)]
            self.write(layer, layer.weight, units, (weight.movedim(0, -1) * sign).movedim(-1, 0))
            values, mean = values * sign, torch.zeros_like(mean)
        return int((values.amax(0) <= mean).sum())


def _reset_state(optimizer: Any, fresh: dict[Tensor, Tensor], undo: ExitStack) -> None:
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for parameter in fresh.keys() & groups.keys():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            undo.callback(value.copy_, value.clone())
            mark = fresh[parameter].to(value.device)
            at, others = mark > 0, value[mark == 0]
            begin = "lr" if key == "step_size" else "initial_accumulator_value"
            start = float(groups[parameter].get(begin, 0.0))
            value[at] = parameter.to(value)[at] if key == "ax" else start
            if key in _SECOND_MOMENTS and len(others):
                value[mark == 2] = others.mean()


def _is_same(before: Tensor, after: Tensor) -> bool:
    """Whether two outputs are equal up to what rounding in a bias may do to them."""
    if before.shape != after.shape or not before.is_floating_point():
        return torch.equal(before, after)
    size = float(before.double().nan_to_num(0.0, 0.0, 0.0).abs().amax()) if before.numel() else 0.0
    tolerance = torch.finfo(before.dtype).eps ** 0.5 * size
    return torch.allclose(before, after, rtol=0.0, atol=tolerance, equal_nan=True)


def listed(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers as a list: of None none, else one or several."""
    if optimizer is None:
        return []
    optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(one).__name__}, not a torch.optim.Optimizer")
        if isinstance(one, torch.optim.LBFGS):
            raise ValueError("L-BFGS keeps no state per entry: make a new one afterwards")
    return optimizers
