"""Run a model with noise in place of its layers' outputs, and see what each layer reads.

So what one layer passes on reaches its readers and nobody else.
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
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.SyncBatchNorm,
)
_SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub"}
_SUM = "a sum (a residual connection)"


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
        return isinstance(self.module, NORMS)

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


def is_same(before: Tensor, after: Tensor) -> bool:
    """Whether two outputs are equal up to what rounding in a bias may do to them."""
    if before.shape != after.shape:
        return False
    if not before.is_floating_point():
        return torch.equal(before, after)
    size = float(before.double().nan_to_num(0.0, 0.0, 0.0).abs().amax()) if before.numel() else 0.0
    tolerance = torch.finfo(before.dtype).eps ** 0.5 * size
    return torch.allclose(before, after, rtol=0.0, atol=tolerance, equal_nan=True)


def unit_dim(module: Any) -> int:
    """The dimension of a module's output along which its units lie."""
    if isinstance(module, nn.Linear):
        return -1
    return 1 if isinstance(module, NORMS) else -1 - len(module.kernel_size)


@dataclass
class Seen:
    """What one pass saw: a digest of each read and each norm's result, by module and call.

    The model's output is what the module named None reads.
    """

    reads: dict[tuple[str | None, int], Tensor] = field(default_factory=dict)
    returns: dict[str, Tensor] = field(default_factory=dict)
    functions: list[tuple[str, Tensor]] = field(default_factory=list)

    def changed(self, other: "Seen") -> dict[tuple[str | None, int], Tensor]:
        """Which columns of which reads differ from another pass's; all, where it has none."""
        found = {}
        for key in dict.fromkeys([*self.reads, *other.reads]):
            mine, its = self.reads.get(key), other.reads.get(key)
            if mine is not None and its is not None and mine.shape == its.shape:
                columns = (mine != its).any(0)
            else:
                columns = torch.ones(max(len(x[0]) for x in (mine, its) if x is not None)).bool()
            if bool(columns.any()):
                found[key] = columns
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
    return torch.stack([(x * (x + 1) * weights).sum(1), x.amin(1), x.amax(1)]).cpu()


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


class Passes:
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
            if isinstance(module, LAYERS):
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
    ) -> Seen:
        """Run once with noise number 0 or 1, and with all dead units silent but those of ``on``.

        Those of ``shifted`` are silent in another way, and the gates of ``gated`` are shut.
        """
        seen = Seen()
        calls: Counter[str] = Counter()
        sources = {id(plan.source[1]): plan for plan in self.plans}
        sources |= {id(plan.layer): plan for plan in shifted}
        gates = {id(s.module): s for plan in gated for s in plan.sinks if s.is_gate}

        def enter(name: str, module: Any, given: list[Tensor]) -> None:
            if self.is_read(module):
                channels = isinstance(module, (*LAYERS, *NORMS))
                for t in given[:1] if channels else given:
                    seen.reads[name, calls[name]] = _digest(
                        t, unit_dim(module) if channels else None
                    )
                    calls[name] += 1

        def leave(name: str, module: Any, out: Any) -> Any:
            plan, gate = sources.get(id(module)), gates.get(id(module))
            if plan is None and isinstance(module, NORMS):
                seen.returns[name] = _digest(out, 1)
                if gate is not None:
                    out = _set(out, 1, gate.columns.nonzero(), gate.constant[gate.columns])
                return out
            if plan is None and not self.is_read(module):
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

    def is_read(self, module: Any) -> bool:
        """Whether a module's reads are watched and its output is replaced (save for norms)."""
        own = next(module.parameters(recurse=False), None) is not None
        return isinstance(module, (*LAYERS, *NORMS)) or (own and not list(module.children()))


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
