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
>>> revival = revive_(model, diagnose(model, [x]))
>>> revival.total
3
>>> bool(torch.equal(before, model(x)))
True

The proof that a unit is silent on a whole box of inputs is in :mod:`relubook.units.certificate`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from relubook.layers.initializers import he_normal_
from relubook.units._paths import TRANSPOSED, Left, Pair, Plan, Report, inputs_of, plan_repairs
from relubook.units.sites import undisturbed, unwrapped

__all__ = ["Change", "Left", "Pair", "Revival", "revive_"]

OptimizerState = Literal["mixed", "zero", "mean"]

# Optimizer state that holds a running size of the gradient; the rest of the state starts at zero.
_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance", "sum", "exp_inf"}


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
        gates: Names of the batch norms whose scale for these units is now zero, which stands in
            for zero outgoing weights where the constant does not fit into a bias.
    """

    site: str
    producer: str
    units: Tensor
    before: str | None
    consumers: tuple[str, ...]
    folded: tuple[str, ...]
    gates: tuple[str, ...]


@dataclass(frozen=True)
class Revival:
    """What :func:`revive_` changed and what it left; its text is a table.

    Attributes:
        changes: One entry for each repaired site, in execution order.
        left: One entry for each site whose dead units were left untouched.
    """

    changes: tuple[Change, ...]
    left: tuple[Left, ...]

    @property
    def total(self) -> int:
        """Number of revived units."""
        return sum(len(change.units) for change in self.changes)

    def __repr__(self) -> str:
        rows = [("site", "units", "re-initialized", "set to zero")]
        for change in self.changes:
            fresh = change.producer + (f" + {change.before}" if change.before else "")
            cut = [
                n + (" (bias took the rest)" if n in change.folded else "")
                for n in change.consumers
            ] + [f"scale of {n}" for n in change.gates]
            rows.append((change.site, str(len(change.units)), fresh, ", ".join(cut)))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"Revival: {self.total} units revived, {sum(x.units for x in self.left)} left"]
        if self.changes:
            for site, units, fresh, cut_text in rows:
                lines.append(
                    f"  {site:<{widths[0]}}  {units:>{widths[1]}}  {fresh:<{widths[2]}}  {cut_text}"
                )
        lines += [f"  left: {x.site}, {x.units} dead: {x.reason}" for x in self.left]
        return "\n".join(lines)


def revive_(
    model: nn.Module,
    report: Report,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: OptimizerState = "mixed",
    generator: torch.Generator | None = None,
    pairs: Mapping[str, str | Sequence[str] | Pair] | None = None,
    init: Callable[..., Any] = he_normal_,
    batch: Any = None,
) -> Revival:
    """Re-initialize a model's dead units in place, leaving its function on the data as it is.

    For every unit that the report calls dead: its incoming weights are drawn afresh, its bias
    becomes 0, a batch norm in front of the rectifier is reset for it (scale 1, shift 0, running
    mean 0, running variance 1), and its outgoing weights become 0. This is the repair of ReDo
    (Sokar et al. 2023, arXiv 2302.12902), applied to dead instead of dormant units.

    **What stays.** With the model in evaluation mode its output is the same on every input on
    which all revived units were silent, so on all of the data the report rests on; on an input
    where one of them fired, that unit's contribution is lost. The same means bit for bit, or up to
    rounding where a batch norm stands behind the rectifier. Such a norm turns the silent unit's 0
    into a constant c, and the next layer's bias takes over c times the outgoing weights. Where
    that would be inexact (a zero-padded convolution sees no c at the border, a layer has no bias)
    the norm's scale is set to 0 and its shift to c instead, and the outgoing weights stay: the
    repr lists it as "scale of". In training mode a batch norm behind the rectifier uses the
    batch's statistics, and there the function can change by what running and batch mean differ.

    **How they learn.** With zero outgoing weights the fresh incoming ones get a gradient of
    exactly zero in the first step, while the outgoing ones (or the scale) do not; from the second
    step on both learn. Call it between steps: gradients stored from before are not touched.

    **The optimizer.** For the fresh and the zeroed entries, and for no others, the state starts
    anew: running averages of the gradient (``momentum_buffer``, ``exp_avg``, ...) become 0. Adam's
    step count belongs to the whole tensor and is kept, so its bias correction no longer acts: with
    second moments of 0 too, the first update is (1 - beta1) / sqrt(1 - beta2) = 3.2 times the
    learning rate, and it rises to 6.6 times for a steady gradient (10 times for RMSprop). On
    outgoing weights such steps disturb the function; on incoming ones, whose gradients start near
    zero, they are what makes the unit learn soon. Hence the choice for the second moments
    (``exp_avg_sq``, ``max_exp_avg_sq``, ``square_avg``, ``exp_inf``, Adagrad's ``sum``):

    - "mixed": outgoing entries get the mean over the other entries of the same tensor, so that
      they move like their neighbors; incoming entries start at 0.
    - "zero": all start at 0. "mean": all get the mean; the unit then hardly learns for about
      1 / (1 - beta2) steps.

    Rprop's step sizes and Adagrad's initial accumulator return to the optimizer's own start,
    ASGD's average to the new value. State that is not kept per entry (Adafactor's rows and
    columns) is not touched.

    **Which layer comes next** is read from the model's graph (``torch.fx``), traced in evaluation
    and in training mode; where the whole model cannot be traced, from that of the largest part
    around the layer that can (what happens to this part's layers outside of it is then not seen).
    A path that depends on optional arguments is read as if these were not given. Linear and
    convolution layers (1-D to 3-D, transposed, grouped) follow each other directly, through
    dropout, pooling, flattening (a channel then has one column for each position), batch or
    instance norm, concatenation, and into several branches. Left untouched, and listed with the
    reason: sums (residual connections), layer norm and everything else that mixes units; layers
    that are called more than once, share a weight with another layer, carry a parametrization
    (weight norm, pruning), or are frozen (``requires_grad`` False).

    Args:
        model: The model, changed in place. Its mode, hooks and gradients stay as they are.
        report: What :func:`relubook.units.diagnosis.diagnose` returned for this model.
        optimizer: The optimizer that trains the model. Without it, its old moments go on to push
            the fresh weights.
        optimizer_state: What the second moments of these entries become; see above.
        generator: Source of the fresh weights. By default a new one whose seed is derived from the
            global random state, which is read but not advanced.
        pairs: For layers whose successor cannot be found: the producer's name (or the site's) and
            the name or names of the layers that read it, or a :class:`Pair` if a batch norm stands
            in between. Takes precedence over the graph.
        init: Fills a weight ``(units, in, ...)`` in place, called with ``generator=``.
        batch: A batch of inputs (a tensor, a tuple whose first element is the input, or a dict of
            keyword arguments). If given, the fresh units are centered on it by one forward pass in
            evaluation mode: the bias becomes minus the mean pre-activation (a batch norm in front
            takes over mean and variance; a unit without bias whose mean is negative has its
            weights' sign flipped), so that they fire on about half of the batch. Without it, a
            fresh unit may be born dead if the spread of its inputs is small beside their mean; to
            make that rare, weights that read a rectifier's output (which is never negative) and
            have no norm behind them get the sign that makes their sum positive.

    Returns:
        A :class:`Revival`.

    Raises:
        TypeError: If ``model`` is no module or a scripted one, ``report`` is no report,
            ``optimizer`` no optimizer, or a pair names a module that is neither a linear layer nor
            a convolution.
        KeyError: If a pair names a module that the model does not have.
        ValueError: If the report belongs to another model, the optimizer does not hold a parameter
            that is to be changed or keeps no state per entry (L-BFGS), a pair's widths do not fit,
            or an option is unknown. Whatever is raised, model and optimizer are as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is scripted, its layers cannot be read: revive the model it is from")
    if not hasattr(report, "sites"):
        raise TypeError(
            f"report is a {type(report).__name__}; pass what relubook.units.diagnosis.diagnose returns"
        )
    if optimizer_state not in get_args(OptimizerState):
        raise ValueError(f'optimizer_state is {optimizer_state!r}; it is "mixed", "zero" or "mean"')
    plans, left = plan_repairs(model, report, pairs)
    if optimizer is not None:
        _check_optimizer(model, optimizer, plans)
    transaction = _Transaction()
    with torch.no_grad(), transaction:
        for plan in plans:
            _cut_outgoing(plan, transaction)
        generator = _generator() if generator is None else generator
        for plan in plans:
            _draw_incoming(plan, transaction, init, generator)
        if batch is not None and plans:
            _center(model, plans, batch, transaction)
        if optimizer is not None:
            _reset_state(optimizer, optimizer_state, transaction)
    return Revival(tuple(_change(plan) for plan in plans), tuple(left))


# --- doing it ---------------------------------------------------------------------------------


def _change(plan: Plan) -> Change:
    return Change(
        plan.site,
        plan.producer,
        plan.units,
        plan.before[0] if plan.before else None,
        tuple(s.name for s in plan.sinks if not s.is_gate),
        tuple(s.name for s in plan.sinks if s.is_folded),
        tuple(s.name for s in plan.sinks if s.is_gate),
    )


class _Transaction:
    """Remembers every tensor before its first change and puts all back if anything is raised."""

    def __init__(self) -> None:
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}
        self.fresh: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __enter__(self) -> "_Transaction":
        return self

    def touch(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.saved:
            self.saved[id(tensor)] = (tensor, tensor.detach().clone())
        return tensor

    def write(self, parameter: Tensor, index: Any, value: Tensor | float, outgoing: bool) -> None:
        """Set entries, and note that they start anew and on which side of the unit they are."""
        if isinstance(value, Tensor):
            value = value.to(parameter.device, parameter.dtype)
        self.touch(parameter)[index] = value
        if id(parameter) not in self.fresh:
            none = torch.zeros_like(parameter, dtype=torch.bool)
            self.fresh[id(parameter)] = (parameter, none, none.clone())
        _, fresh, out = self.fresh[id(parameter)]
        fresh[index] = True
        out[index] = outgoing

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            for tensor, before in self.saved.values():
                tensor.copy_(before)


def _cut_outgoing(plan: Plan, transaction: _Transaction) -> None:
    for sink in plan.sinks:
        module: Any = sink.module
        stream = sink.stream
        if sink.is_gate:
            at = stream.columns(module.num_features)
            transaction.write(module.weight, at, 0.0, outgoing=True)
            transaction.write(module.bias, at, stream.constant.expand(at.shape), outgoing=True)
            continue
        at = stream.columns(inputs_of(module))
        constant = stream.constant.expand(at.shape).flatten().to(module.weight.device)
        at = at.flatten().to(module.weight.device)
        if isinstance(module, TRANSPOSED):
            transaction.write(module.weight, at, 0.0, outgoing=True)
            continue
        per_group = module.weight.shape[1]
        rows = module.weight.shape[0] * per_group // inputs_of(module)
        if bool((constant != 0).any()):
            transaction.touch(module.bias)
            shift = torch.zeros(module.bias.shape, dtype=torch.float64, device=at.device)
            for group in range(inputs_of(module) // per_group):
                here = at // per_group == group
                block = module.weight[group * rows : (group + 1) * rows, at[here] % per_group]
                sums = block.double().flatten(2).sum(2) if block.dim() > 2 else block.double()
                shift[group * rows : (group + 1) * rows] += sums @ constant[here]
            module.bias.copy_(module.bias.double() + shift)
        groups = at // per_group
        reading = groups[:, None] * rows + torch.arange(rows, device=at.device)
        transaction.write(module.weight, (reading, (at % per_group)[:, None]), 0.0, outgoing=True)


def _draw_incoming(
    plan: Plan,
    transaction: _Transaction,
    init: Callable[..., Any],
    generator: torch.Generator,
) -> None:
    layer, units = plan.layer, plan.units
    weight = layer.weight
    exact = weight.dtype if weight.dtype == torch.float64 else torch.float32
    if isinstance(layer, TRANSPOSED):
        inputs, per_group, *kernel = weight.shape
        rows = inputs // layer.groups
        fresh = torch.empty(len(units), rows, *kernel, dtype=exact, device=generator.device)
        init(fresh, generator=generator)
        # An output position is reached by one tap in `stride`, so the fan-in is that much smaller.
        fresh *= prod(layer.stride) ** 0.5
        at = units[:, None] // per_group * rows + torch.arange(rows)
        index: Any = (at.to(weight.device), (units % per_group)[:, None].to(weight.device))
    else:
        fresh = torch.empty(len(units), *weight.shape[1:], dtype=exact, device=generator.device)
        init(fresh, generator=generator)
        index = units.to(weight.device)
    if not bool(fresh.isfinite().all()):
        raise ValueError("init returned weights that are not finite")
    if plan.reads_rectifier and plan.before is None:
        flat = fresh.flatten(1)
        flat *= torch.where(flat.sum(1, keepdim=True) < 0, -1.0, 1.0)
    transaction.write(weight, index, fresh, outgoing=False)
    at = units.to(weight.device)
    if layer.bias is not None:
        transaction.write(layer.bias, at, 0.0, outgoing=False)
    if plan.before is not None:
        norm = plan.before[1]
        if norm.affine:
            transaction.write(norm.weight, at, 1.0, outgoing=False)
            transaction.write(norm.bias, at, 0.0, outgoing=False)
        if norm.running_mean is not None:
            transaction.touch(norm.running_mean)[at] = 0.0
            transaction.touch(norm.running_var)[at] = 1.0


def _generator() -> torch.Generator:
    """A generator seeded from the global random state, which stays where it is."""
    state = bytes(torch.random.get_rng_state().tolist())
    seed = int.from_bytes(hashlib.sha256(state).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def _center(model: nn.Module, plans: list[Plan], batch: Any, transaction: _Transaction) -> None:
    """Give the fresh units mean 0 on a batch, layer after layer in one pass."""
    statistics: list[tuple[Tensor, Tensor]] = []
    handles = []
    for plan in plans:
        if plan.before is None:
            handles.append(plan.layer.register_forward_hook(_layer_centering(plan, transaction)))
        elif plan.before[1].running_mean is not None:
            hook = _norm_centering(plan, statistics)
            handles.append(plan.before[1].register_forward_pre_hook(hook))
    try:
        with undisturbed(model):
            model.eval()
            device = next(model.parameters()).device
            if isinstance(batch, Mapping):
                model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            else:
                inputs = batch[0] if isinstance(batch, tuple | list) else batch
                model(inputs.to(device) if isinstance(inputs, Tensor) else inputs)
    finally:
        for handle in handles:
            handle.remove()
    for buffer, value in statistics:
        transaction.touch(buffer).copy_(value)


def _norm_centering(plan: Plan, statistics: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        at = plan.units.to(args[0].device)
        values = args[0].index_select(1, at).double().transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        _check_finite(plan, mean)
        for buffer, value in ((module.running_mean, mean), (module.running_var, variance)):
            buffer[at] = value.to(buffer.dtype)
            statistics.append((buffer, buffer.clone()))  # the pass itself leaves buffers alone

    return hook


def _layer_centering(plan: Plan, transaction: _Transaction) -> Callable[..., Tensor]:
    dim = -1 if isinstance(plan.layer, nn.Linear) else 1

    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        at = plan.units.to(output.device)
        values = output.index_select(dim, at)
        mean = values.double().transpose(0, dim).flatten(1).mean(1)
        _check_finite(plan, mean)
        shape = [1] * values.dim()
        shape[dim] = -1
        if module.bias is not None:
            transaction.write(module.bias, at, -mean, outgoing=False)
            values = values - mean.to(values.dtype).reshape(shape)
        else:
            sign = torch.where(mean < 0, -1.0, 1.0)
            weight, per_group = module.weight, module.weight.shape[1]
            if isinstance(module, TRANSPOSED):
                rows = weight.shape[0] // module.groups
                reading = at[:, None] // per_group * rows + torch.arange(rows, device=at.device)
                index: Any = (reading, (at % per_group)[:, None])
                signs = sign.reshape(-1, 1, *[1] * (weight.dim() - 2))
            else:
                index = at
                signs = sign.reshape(-1, *[1] * (weight.dim() - 1))
            transaction.write(weight, index, weight[index] * signs.to(weight.dtype), outgoing=False)
            values = values * sign.to(values.dtype).reshape(shape)
        return output.index_copy(dim, at, values)

    return hook


def _check_finite(plan: Plan, mean: Tensor) -> None:
    if not bool(mean.isfinite().all()):
        raise ValueError(f"on the batch the pre-activations of {plan.producer!r} are not finite")


# --- the optimizer ----------------------------------------------------------------------------


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, plans: list[Plan]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("L-BFGS keeps no state per entry: pass a new one after revive_ instead")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError("the optimizer holds none of the model's parameters")
    missing = {n for plan in plans for n, p in plan.parameters() if id(p) not in held}
    if missing:
        raise ValueError(
            "the optimizer does not hold " + ", ".join(repr(n) for n in sorted(missing))
        )


def _reset_state(
    optimizer: torch.optim.Optimizer, second: OptimizerState, transaction: _Transaction
) -> None:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter, fresh, outgoing in transaction.fresh.values():
        if parameter not in optimizer.state:
            continue
        group = groups[id(parameter)]
        averaged = {"mixed": outgoing, "zero": fresh & False, "mean": fresh}[second]
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            at = fresh.to(value.device)
            others = transaction.touch(value)[~at]
            if key == "ax":
                value[at] = parameter.detach().to(value)[at]
            elif key == "step_size":
                value[at] = float(group["lr"])
            else:
                value[at] = float(group.get("initial_accumulator_value", 0.0))
            if key in _SECOND_MOMENTS and len(others):
                value[averaged.to(value.device)] = others.mean()
