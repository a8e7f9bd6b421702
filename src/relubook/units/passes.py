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

from relubook.units.sites import tensors_in, undisturbed

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.SyncBatchNorm)
SUM = "a sum (a residual connection)"
_SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub"}

Reads = dict[tuple[str | None, int], Tensor]
Enter = Callable[[str, Any, list[Tensor]], None]
Leave = Callable[[str, Any, Any], Any]


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

    def __post_init__(self) -> None:
        self.is_gate = isinstance(self.module, NORMS)
        self.is_folded = not self.is_gate and bool((self.constant != 0).any())


@dataclass
class Plan:
    """One site's repair: the layer and norm that start anew, and the sinks that are cut."""

    site: str
    producer: str
    layer: Any
    units: Tensor
    before: tuple[str, Any] | None = None
    sinks: list[Sink] = field(default_factory=list)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the parameters that the repair changes."""
        owners = [(self.producer, self.layer, True)]
        owners += [(*self.before, True)] if self.before else []
        owners += [(s.name, s.module, s.is_gate or s.is_folded) for s in self.sinks]
        for name, module, with_bias in owners:
            for kind in ("weight", "bias") if with_bias else ("weight",):
                if (parameter := module._parameters.get(kind)) is not None:
                    yield f"{name}.{kind}".lstrip("."), parameter


def run(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, a tuple that starts with one, or keyword arguments."""
    inputs = batch[0] if type(batch) in (tuple, list) else batch
    device = next((p.device for p in model.parameters()), None)
    if isinstance(inputs, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return model(inputs.to(device) if hasattr(inputs, "to") else inputs)


def unit_dim(module: Any) -> int:
    """The dimension of a module's output along which its units lie."""
    if isinstance(module, nn.Linear):
        return -1
    return 1 if isinstance(module, NORMS) else -1 - len(module.kernel_size)


def is_plain(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a module is of one of the kinds and computes what that kind computes."""
    forward = getattr(type(module), "forward", None)
    return any(isinstance(module, k) and forward is getattr(k, "forward", None) for k in kinds)


def _is_read(module: Any) -> bool:
    """Whether a module's reads are watched and its output is replaced (save for norms)."""
    own = next(module.parameters(recurse=False), None) is not None
    return isinstance(module, (*LAYERS, *NORMS)) or (own and not list(module.children()))


@dataclass
class Seen:
    """Digests of each read, by module (None reads the output) and call, and each norm's result."""

    reads: Reads = field(default_factory=dict)
    returns: dict[str, Tensor] = field(default_factory=dict)

    def changed(self, other: "Seen") -> Reads:
        """Which columns of which reads differ from another pass's; ``[True]`` for another shape."""
        found = {}
        for key in self.reads | other.reads:
            columns = torch.tensor([True])
            if key in self.reads and key in other.reads:
                mine, theirs = self.reads[key], other.reads[key]
                columns = (mine != theirs).any(0) if mine.shape == theirs.shape else columns
            if bool(columns.any()):
                found[key] = columns
        return found


def _digest(x: Tensor, dim: int | None = None) -> Tensor:
    """Weighted sum, minimum and maximum of every slice along a dimension, ``(3, slices)``."""
    x = x.detach().double()
    x = x.reshape(1, -1) if dim is None else x.movedim(dim, 0).flatten(1)
    if not x.numel():
        return torch.zeros(3, len(x), dtype=x.dtype)
    weights = torch.linspace(1, 2, x.shape[1], dtype=x.dtype, device=x.device)
    return torch.stack([(x * weights).sum(1), x.amin(1), x.amax(1)]).cpu()


class _Functions(TorchFunctionMode):
    """Tell of every torch function that returns tensors."""

    def __init__(self, tell: Callable[[str, list[Tensor], list[Tensor]], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = list(tensors_in(out))
        if results:
            self.tell(func.__name__.strip("_"), list(tensors_in([args, kwargs or {}])), results)
        return out


class Passes:
    """Runs a model with noise in place of its layers' outputs, first as it is.

    Attributes:
        calls: How often each module is called.
        feeds: By a module's name (None: the output) or ``"module.function()"``, what made its
            input: the name of a layer, or words for a function.
        outside: Ids of the parameters that are used outside of their modules.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model = model
        self.batches = (batch, tree_map_only(Tensor, _jittered, batch))
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.plans: list[Plan] = []
        self.calls: Counter[str] = Counter()
        self.feeds: dict[str | None, str] = {}
        self.outside: set[int] = set()
        self._inside: list[str] = []

        def enter(name: str, module: Any, given: list[Tensor]) -> None:
            self.calls[name] += 1
            self.feeds[name] = _made_by(given)

        def leave(name: str, module: Any, out: Any) -> None:
            if isinstance(module, LAYERS):
                out._made_by = name

        with _Functions(self._note_function):
            out = self._run(enter, leave)
        self.feeds[None] = _made_by(list(tensors_in(out)))

    def _note_function(self, function: str, given: list[Tensor], results: list[Tensor]) -> None:
        name = self._inside[-1] if self._inside else ""
        module, label = self.modules[name], f"{function}()"
        used = {id(t) for t in given if isinstance(t, nn.Parameter)}
        self.outside |= used - {id(p) for p in module._parameters.values()}
        self.feeds[f"{name}.{label}".lstrip(".")] = feed = _made_by(given)
        if name and not list(module.children()):
            label = f"{name!r} ({type(module).__name__})"
        is_sum = function in _SUMS and len({t.shape for t in given}) < len(given)
        if is_sum or (feed == SUM and not used):
            label = SUM
        for t in results if "dropout" not in function else []:
            t._made_by = label  # type: ignore[attr-defined]

    def _run(self, enter: Enter, leave: Leave, noise: int = 0, training: bool = False) -> Any:
        """Run the model with hooks on either side of every module."""
        names = {id(module): name for name, module in self.modules.items()}
        self._inside = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._inside.append(names[id(module)])
            with torch._C.DisableTorchFunction():
                enter(self._inside[-1], module, list(tensors_in([args, kwargs])))

        def after(module: nn.Module, args: Any, out: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return leave(self._inside.pop(), module, out)

        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            for module in self.modules.values():
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            self.model.train(training)
            return run(self.model, self.batches[noise])

    def observe(
        self,
        noise: int = 0,
        *,
        on: Sequence[Plan] = (),
        shifted: Sequence[Plan] = (),
        gated: Sequence[Plan] = (),
        training: bool = False,
    ) -> Seen:
        """Run with noise number 0 or 1 and all dead units silent but those of ``on``.

        Those of ``shifted`` are silent in another way, and the gates of ``gated`` are shut.
        """
        seen = Seen()
        calls: Counter[str] = Counter()
        sources = {id(plan.before[1] if plan.before else plan.layer): plan for plan in self.plans}
        sources |= {id(plan.layer): plan for plan in shifted}
        gates = {id(s.module): s for plan in gated for s in plan.sinks if s.is_gate}

        def enter(name: str, module: Any, given: list[Tensor]) -> None:
            channels = isinstance(module, (*LAYERS, *NORMS))
            for t in (given[:1] if channels else given) if _is_read(module) else []:
                seen.reads[name, calls[name]] = _digest(t, unit_dim(module) if channels else None)
                calls[name] += 1

        def leave(name: str, module: Any, out: Any) -> Any:
            plan, gate = sources.get(id(module)), gates.get(id(module))
            if plan is None and isinstance(module, NORMS):
                seen.returns[name] = _digest(out, 1)
                return out if gate is None else _set(out, 1, gate.columns, gate.constant)
            if plan is None and not _is_read(module):
                return out
            seed = 2 * list(self.modules).index(name)
            out = tree_map_only(Tensor, lambda t: _noise(t, seed + noise), out)
            if plan is None:
                return out
            units = torch.zeros(out.shape[unit_dim(module)], dtype=torch.bool)
            units[plan.units] = True
            levels = torch.full(units.shape, -2000.0 if plan in shifted else -1000.0)
            if plan in on:
                levels = 1000.0 * (1 + torch.rand(units.shape, generator=_seeded(seed)))
            return _set(out, unit_dim(module), units, levels)

        out = self._run(enter, leave, noise, training)
        seen.reads |= {(None, i): _digest(t) for i, t in enumerate(tensors_in(out))}
        return seen


def _made_by(tensors: list[Tensor]) -> str:
    found = [t._made_by for t in tensors if hasattr(t, "_made_by")]
    return SUM if SUM in found else found[0] if found else "something"


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(t: Tensor, seed: int) -> Tensor:
    if not t.is_floating_point():
        return t
    period = 2**16 + 1  # drawing every value anew takes longer than the model
    noise = torch.randn(min(t.numel(), period), generator=_seeded(seed))
    return noise.repeat(-(-t.numel() // period))[: t.numel()].reshape(t.shape).to(t)


def _jittered(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    size = float(t.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().mean()) or 1.0
    return t + 0.1 * size * _noise(t, 1)


def _set(out: Tensor, dim: int, at: Tensor, values: Tensor) -> Tensor:
    """A copy with one value for each of some slices along a dimension, both ``(slices,)``."""
    changed = out.clone()
    changed.movedim(dim, -1)[..., at.to(out.device)] = values[at].to(out)
    return changed
