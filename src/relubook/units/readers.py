"""Find the layers that read a layer's units, by changing the units and watching what changes.

Every layer is made to return noise, so that what one layer passes on reaches its readers and nobody
else. Where switching the dead units on changes an input column of a layer, that layer reads them
there; where other noise changes the same column, the units are mixed with something else.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from relubook.units.sites import undisturbed

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.SyncBatchNorm,
)
_SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub"}
_SUM = "a sum (a residual connection)"


class Unpaired(Exception):  # noqa: N818  (a finding, not an error)
    """A site cannot be repaired; the text is the reason that the reader sees."""


@dataclass
class Sink:
    """A layer whose weights, or a norm whose scale, for some input columns is to become zero.

    ``columns`` are bool, ``constant`` float64, both ``(inputs,)``: which columns the silent units
    reach, and what these hold then (for a norm: what it returns then).
    """

    name: str
    module: Any
    columns: Tensor
    constant: Tensor

    @property
    def is_gate(self) -> bool:
        """Whether it is a norm, not a layer."""
        return isinstance(self.module, _NORMS)

    @property
    def is_folded(self) -> bool:
        """Whether the silent units' constants go into the layer's bias."""
        return not self.is_gate and bool((self.constant != 0).any())


@dataclass
class Plan:
    """One site's repair: the layer and norm that start anew, and the sinks that are cut."""

    site: str
    producer: str
    layer: Any
    units: Tensor
    before: tuple[str, Any] | None = None
    sinks: list[Sink] = field(default_factory=list)

    @property
    def source(self) -> tuple[str, Any]:
        """The module whose output reaches the rectifier."""
        return self.before or (self.producer, self.layer)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the parameters that the repair changes."""
        for kind in ("weight", "bias"):
            owners = [(self.producer, self.layer), *filter(None, [self.before])]
            owners += [
                (s.name, s.module)
                for s in self.sinks
                if kind == "weight" or s.is_gate or s.is_folded
            ]
            for name, module in owners:
                parameter = module._parameters.get(kind)
                if parameter is not None:
                    yield f"{name}.{kind}" if name else kind, parameter


def run(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, a tuple that starts with one, or keyword arguments."""
    inputs = batch[0] if type(batch) in (tuple, list) else batch
    device = next((p.device for p in model.parameters()), None)
    if isinstance(inputs, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return model(inputs.to(device) if hasattr(inputs, "to") else inputs)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and data classes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    return [t for v in value for t in tensors_of(v)] if isinstance(value, list | tuple) else []


def unit_dim(module: Any) -> int:
    """The dimension of a module's output along which its units lie."""
    if isinstance(module, nn.Linear):
        return -1
    return 1 if isinstance(module, _NORMS) else -1 - len(module.kernel_size)


def find_readers(
    model: nn.Module, sites: Sequence[Any], batch: Any
) -> tuple[list[Plan], dict[str, str]]:
    """Say for every site with dead units how to repair it, or why not.

    Args:
        model: The model; nothing of it is changed.
        sites: The sites of a report.
        batch: A batch, see :func:`run`.

    Returns:
        The plans, and for each site that is left the reason, by its name.

    Raises:
        ValueError: If a site names a layer that the model does not have.
    """
    producers = [site.producer for site in sites]
    names = {name for name, _ in model.named_modules()}
    for site in sites:
        if site.producer not in {None, *names}:
            raise ValueError(
                f"the report's site {site.name!r} names the layer {site.producer!r}, which the "
                "model does not have: diagnose this model"
            )
    plans: list[Plan] = []
    reasons: dict[str, str] = {}
    dead = [site for site in sites if bool(site.dead.any())]
    probe = _Probe(model, batch) if dead else None
    if probe is None:
        return plans, reasons
    for site in dead:
        try:
            plans.append(probe.plan(site, producers.count(site.producer)))
        except Unpaired as reason:
            reasons[site.name] = str(reason)
    for step in (probe.find_sinks, probe.check_training):
        reasons |= {plan.site: reason for plan, reason in step(plans)} if plans else {}
        plans = [plan for plan in plans if plan.site not in reasons]
    return plans, reasons


# --- passes with noise ------------------------------------------------------------------------


@dataclass
class _Pass:
    """What one pass saw: a digest of each read and each norm's result, by module and call.

    The model's output is what the module named None reads.
    """

    reads: dict[tuple[str | None, int], Tensor] = field(default_factory=dict)
    returns: dict[str, Tensor] = field(default_factory=dict)
    functions: list[tuple[str, Tensor]] = field(default_factory=list)

    def changed(self, other: "_Pass") -> dict[tuple[str | None, int], Tensor]:
        """Which columns of which reads differ from another pass's; all, where it has none."""
        found = {}
        for key in dict.fromkeys([*self.reads, *other.reads]):
            mine, its = self.reads.get(key), other.reads.get(key)
            if mine is None or its is None or mine.shape != its.shape:
                found[key] = torch.ones_like((its if mine is None else mine)[0]).bool()
            elif bool((mine != its).any()):
                found[key] = (mine != its).any(0)
        return found


def _digest(x: Tensor, dim: int | None = None) -> Tensor:
    """Digest, minimum and maximum of every slice along a dimension, ``(3, slices)``, float64.

    The digest sums a function of each element, so that changes of two different elements add up
    in it, and changes of the same element do not.
    """
    x = x.detach().double()
    x = x.reshape(1, -1) if dim is None else x.movedim(dim, 0).flatten(1)
    if not x.numel():
        return torch.zeros(3, len(x), dtype=x.dtype)
    weights = torch.linspace(1, 2, x.shape[1], dtype=x.dtype, device=x.device)
    return torch.stack([(x.sin() * weights).sum(1), x.amin(1), x.amax(1)]).cpu()


class _Functions(TorchFunctionMode):
    """Tell of every torch function that returns tensors."""

    def __init__(self, tell: Callable[[str, list[Tensor], list[Tensor]], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = tensors_of(out)
        if results:
            self.tell(func.__name__.strip("_"), tensors_of([args, kwargs or {}]), results)
        return out


class _Probe:
    """Runs a model with noise in place of its layers' outputs."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model = model
        self.batches = (batch, tree_map_only(Tensor, _jittered, batch))
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.names = {id(module): name for name, module in self.modules.items()}
        self.inside: list[str] = []
        self.plans: list[Plan] = []
        self.calls: Counter[str] = Counter()
        self.feeds: dict[str, str] = {}
        self.between: dict[str, str] = {}
        self.outside: set[int] = set()
        self.nonfinite: set[str] = set()
        self._run_as_it_is()

    def _run(
        self,
        enter: Callable[[str, Any, list[Tensor]], None],
        leave: Callable[[str, Any, Any], Any],
        tell: Callable[[str, list[Tensor], list[Tensor]], None] | None = None,
        noise: int = 0,
        training: bool = False,
    ) -> Any:
        """Run the model with hooks on either side of every module; ``tell`` hears no hook."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inside.append(self.names[id(module)])
            with torch._C.DisableTorchFunction():
                enter(self.inside[-1], module, tensors_of([args, kwargs]))

        def after(module: nn.Module, args: Any, out: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return leave(self.inside.pop(), module, out)

        self.inside = []
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            for module in self.modules.values():
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            self.model.train(training)
            if tell is not None:
                stack.enter_context(_Functions(tell))
            return run(self.model, self.batches[noise])

    def _run_as_it_is(self) -> None:
        """See how often modules are called, what feeds norms, and what is used outside modules."""

        def enter(name: str, module: Any, given: list[Tensor]) -> None:
            self.calls[name] += 1
            self.feeds[name] = getattr(given[0], "_made_by", "something") if given else ""

        def leave(name: str, module: Any, out: Any) -> None:
            if isinstance(module, _LAYERS):
                out._made_by = name
                if not bool(out.isfinite().all()):
                    self.nonfinite.add(name)

        def tell(function: str, given: list[Tensor], results: list[Tensor]) -> None:
            name = self.inside[-1] if self.inside else ""
            own = {id(p) for p in self.modules[name]._parameters.values()}
            for t in given:
                if hasattr(t, "_made_by"):
                    self.between[name] = self.between[f"{name}.{function}()"] = t._made_by
                if isinstance(t, nn.Parameter) and id(t) not in own:
                    self.outside.add(id(t))
            is_sum = function in _SUMS and len({t.shape for t in given}) < len(given)
            for t in results if "dropout" not in function else []:
                t._made_by = _SUM if is_sum else self._label(function)  # type: ignore[attr-defined]

        self._run(enter, leave, tell)

    def _label(self, function: str) -> str:
        """What to call a function to the reader: by its module where that holds no other."""
        name = self.inside[-1] if self.inside else ""
        module = self.modules[name]
        if name and not list(module.children()):
            return f"{name!r} ({type(module).__name__})"
        return f"{function}(), a sum" if function in _SUMS else f"{function}()"

    def observe(
        self,
        noise: int = 0,
        *,
        on: Sequence[Plan] = (),
        shifted: Sequence[Plan] = (),
        gated: Sequence[Plan] = (),
        training: bool = False,
        functions: bool = False,
    ) -> _Pass:
        """Run once with noise number 0 or 1, and with all dead units silent but those of ``on``.

        Those of ``shifted`` are silent in another way, and the gates of ``gated`` are shut.
        """
        seen = _Pass()
        calls: Counter[str] = Counter()
        sources = {id(plan.source[1]): plan for plan in self.plans}
        sources |= {id(plan.layer): plan for plan in shifted}
        gates = {id(s.module): s for plan in gated for s in plan.sinks if s.is_gate}

        def enter(name: str, module: Any, given: list[Tensor]) -> None:
            if self._is_read(module):
                channels = isinstance(module, (*_LAYERS, *_NORMS))
                for t in given[:1] if channels else given:
                    seen.reads[name, calls[name]] = _digest(
                        t, unit_dim(module) if channels else None
                    )
                    calls[name] += 1

        def leave(name: str, module: Any, out: Any) -> Any:
            plan, gate = sources.get(id(module)), gates.get(id(module))
            if plan is None and isinstance(module, _NORMS):
                seen.returns[name] = _digest(out, 1)
                if gate is not None:
                    out = _set(out, 1, gate.columns.nonzero(), gate.constant[gate.columns])
                return out
            if plan is None and not self._is_read(module):
                return out
            seed = 2 * list(self.modules).index(name)
            out = tree_map_only(Tensor, lambda t: _noise(t, seed + noise), out)
            if plan is not None:
                levels = torch.full((len(plan.units),), -2000.0 if plan in shifted else -1000.0)
                if plan in on:
                    levels = 1000.0 * (1 + torch.rand(len(levels), generator=_seeded(seed)))
                out = _set(out, unit_dim(module), plan.units, levels)
            return out

        def tell(function: str, given: list[Tensor], results: list[Tensor]) -> None:
            total = sum((_digest(t)[0, 0] for t in results), torch.zeros(()))
            seen.functions.append((self._label(function), total))

        out = self._run(enter, leave, tell if functions else None, noise, training)
        for i, t in enumerate(tensors_of(out)):
            seen.reads[None, i] = _digest(t)
        return seen

    def _is_read(self, module: Any) -> bool:
        """Whether a module's reads are watched and its output is replaced (save for norms)."""
        own = next(module.parameters(recurse=False), None) is not None
        return isinstance(module, (*_LAYERS, *_NORMS)) or (own and not list(module.children()))

    # --- what is to be done -------------------------------------------------------------------

    def plan(self, site: Any, uses: int) -> Plan:
        """The layer to repair for a site; whom it feeds is found later."""
        name = site.producer
        if name is None:
            call = site.name.split("#")[0].replace("_()", "()")
            what = self.between.get(call) or self.between.get(f".{call}", "something")
            raise Unpaired(f"{what} lies between it and the layers: none feeds it alone")
        if not site.silences:
            raise Unpaired(f"{site.kind} has no input on which it is silent")
        if uses > 1:
            raise Unpaired(
                f"{name!r} feeds {uses} rectifier sites, so its units cannot be changed for one "
                "of them"
            )
        module, before = self.modules[name], None
        if isinstance(module, _NORMS):
            self._check(name, _NORMS)
            fed = self.feeds[name]
            if fed not in self.modules:
                raise Unpaired(f"{fed} lies between {name!r} and the layers")
            before, name = (name, module), fed
            module = self.modules[name]
        self._check(name, _LAYERS)
        if name in self.nonfinite:
            raise ValueError(f"on the batch the pre-activations of {name!r} are not finite")
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        units = site.dead.detach().cpu().nonzero().flatten()
        if outputs != site.dead.numel():
            raise Unpaired(f"it has {site.dead.numel()} units, but {name!r} has {outputs} outputs")
        if site.unit_dim not in (unit_dim(module), unit_dim(module) + len(site.shape)):
            raise Unpaired(f"its units lie along dimension {site.unit_dim}, not those of {name!r}")
        plan = Plan(site.name, name, module, units, before)
        self._check_parameters(plan)
        return plan

    def _check(self, name: str, kinds: tuple[type, ...]) -> None:
        module = self.modules[name]
        if not is_plain(module, kinds):
            raise Unpaired(
                f"{name!r} is a {type(module).__name__}; linear layers and convolutions can be "
                "repaired"
            )
        if any(k in dir(module) and k not in module._parameters for k in ("weight", "bias")):
            raise Unpaired(
                f"the weight of {name!r} is computed from other parameters (a parametrization, "
                "weight norm or pruning): remove that first"
            )
        if self.calls[name] != 1:
            raise Unpaired(f"{name!r} is called {self.calls[name]} times")

    def _check_parameters(self, plan: Plan) -> None:
        everything = list(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in plan.parameters():
            if not parameter.requires_grad:
                raise Unpaired(f"{name!r} is frozen (requires_grad is False)")
            if id(parameter) in self.outside:
                raise Unpaired(f"{name!r} is also used outside of its layer")
            for other, twin in everything:
                if other != name and parameter.data_ptr() == twin.data_ptr():
                    raise Unpaired(f"{name!r} shares its memory with {other!r}")

    def find_sinks(self, plans: list[Plan]) -> list[tuple[Plan, str]]:
        """Find who reads each plan's units; returns the plans that fail, with the reasons."""
        self.plans = plans
        try:
            self.off, self.other = self.observe(0), self.observe(1)
        except Exception as error:  # whatever the model's code raises on noise
            return [(p, f"the model does not run on made-up activations ({error})") for p in plans]
        self.noisy = self.off.changed(self.other)
        leaks = bool(self._leaks(plans))
        failed = []
        for plan in plans:
            try:
                if leaks and self._leaks([plan]):
                    raise Unpaired(
                        f"what {plan.producer!r} computes goes to 2 places or more, not to one "
                        "rectifier"
                    )
                try:
                    plan.sinks = self._sinks(plan)
                except Unpaired:
                    plan.sinks = self._gates(plan)
                    if not plan.sinks:
                        raise
                    plan.sinks = self._sinks(plan)
                self._check_parameters(plan)
            except Unpaired as reason:
                failed.append((plan, str(reason)))
        return failed

    def _leaks(self, plans: list[Plan]) -> bool:
        """Whether anything but the rectifiers sees how silent the units are."""
        changed = self.off.changed(self.observe(shifted=plans))
        norms = {plan.before[0] for plan in plans if plan.before}
        return any(name not in norms for name, _ in changed)

    def _sinks(self, plan: Plan) -> list[Sink]:
        """Every layer that reads a plan's units, and the gates that are given and reached."""
        given = {s.name: s for s in plan.sinks}
        sinks = []
        touched = self.off.changed(self.observe(on=[plan], gated=[plan]))
        passed = [(self.off.returns.get(str(name)), at) for (name, _), at in touched.items()]
        known = torch.cat(
            [torch.zeros(1)] + [_constant(r, c)[0] for r, c in passed if r is not None]
        )
        for (name, call), columns in touched.items():
            if name is None:
                raise Unpaired(
                    self._mixer(plan) or "its units are the model's output: they have no next layer"
                )
            module = self.modules[name]
            if isinstance(module, _NORMS):
                sinks += [given[name]] if name in given else []
                continue
            if not isinstance(module, _LAYERS):
                raise Unpaired(
                    f"its units reach {name!r} ({type(module).__name__}), which may mix them with "
                    "others"
                )
            self._check(name, _LAYERS)
            if bool((self.noisy.get((name, call), columns & False) & columns).any()):
                raise Unpaired(
                    self._mixer(plan) or f"its units reach {name!r} together with others"
                )
            constant, even = _constant(self.off.reads[name, call], columns)
            gaps = (constant[columns, None] - known).abs().amin(1)
            even &= bool((gaps <= 1e-6 * constant[columns].abs()).all())
            if bool((constant != 0).any()) or not even:
                behind = f"its units, while silent, are not 0 to {name!r}"
                if module.bias is None:
                    raise Unpaired(f"{behind}, which has no bias that could take over the rest")
                if not even or isinstance(module, TRANSPOSED) or _pads_zeros(module):
                    raise Unpaired(f"{behind}, nor the same constant everywhere")
            sinks.append(Sink(name, module, columns, constant))
        if not sinks:
            raise Unpaired("no layer reads its units")
        return sinks

    def _gates(self, plan: Plan) -> list[Sink]:
        """The norms that a plan's units pass, where their scale can be cut."""
        plan.sinks = []
        gates = []
        for (name, _), columns in self.off.changed(self.observe(on=[plan])).items():
            norm: Any = None if name is None else self.modules[name]
            if name is None or not is_plain(norm, _NORMS) or self.calls[name] != 1:
                continue
            mine, its = self.off.returns[name][:, columns], self.other.returns[name][:, columns]
            constant, even = _constant(self.off.returns[name], columns)
            if even and torch.equal(mine, its) and norm._parameters.get("weight") is not None:
                gates.append(Sink(name, norm, columns, constant))
        return gates

    def check_training(self, plans: list[Plan]) -> list[tuple[Plan, str]]:
        """The plans whose units reach other places in training than in evaluation mode."""

        def strays(plans: list[Plan]) -> bool:
            known = {s.name for plan in plans for s in plan.sinks}
            known |= {n for n, m in self.modules.items() if isinstance(m, _NORMS)}
            off = self.observe(gated=plans, training=True)
            on = self.observe(on=plans, gated=plans, training=True)
            return any(name not in known for name, _ in off.changed(on))

        try:
            failed = [plan for plan in plans if strays([plan])] if strays(plans) else []
        except Exception:  # a model may not run in training mode on a batch alone
            return []
        return [(p, "its units go other ways in training than in evaluation mode") for p in failed]

    def _mixer(self, plan: Plan) -> str | None:
        """The first function that makes one value of a plan's units and of something else."""
        passes = [
            self.observe(noise, on=on, functions=True).functions
            for noise in (0, 1)
            for on in ([], [plan])
        ]
        for (label, a), (_, b), (_, c), (_, d) in zip(*passes, strict=False):
            if not abs((b - a) - (d - c)) < 1e-6:
                return f"its units reach {label}, which may mix them with others"
        return None


def is_plain(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a module is of one of the kinds and computes what that kind computes."""
    forward = getattr(type(module), "forward", None)
    return any(isinstance(module, k) and forward is getattr(k, "forward", None) for k in kinds)


def _constant(digest: Tensor, columns: Tensor) -> tuple[Tensor, bool]:
    """What some columns hold, 0 elsewhere, and whether it is the same everywhere."""
    low, high = digest[1], digest[2]
    even = (high - low) <= 1e-6 * torch.maximum(low.abs(), high.abs())
    return torch.where(columns, (low + high) / 2, 0.0), bool(even[columns].all())


def _pads_zeros(module: Any) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    return module.padding != "valid" and (module.padding == "same" or any(module.padding))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(t: Tensor, seed: int) -> Tensor:
    if not t.is_floating_point():
        return t
    return torch.randn(t.shape, generator=_seeded(seed)).to(t)


def _jittered(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    size = float(t.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().mean()) or 1.0
    return t + 0.1 * size * _noise(t, 1)


def _set(out: Tensor, dim: int, at: Tensor, values: Tensor) -> Tensor:
    """A copy with one value for each of some slices along a dimension."""
    changed = out.clone()
    slices = changed.movedim(dim, -1)
    slices[..., at.flatten().to(out.device)] = values.to(out)
    return changed
