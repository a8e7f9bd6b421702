"""Find every rectifier that a forward pass calls, and the dimension along which its units lie.

A dispatch mode sees each operator that runs below autograd, so it does not matter how the
rectifier was written: a module, a function, a method, in place, inside a scripted or a
checkpointed part. It also follows where each tensor comes from. A tensor's *layout* splits every
dimension into factors, each of them the batch, the units or positions; views, permutations and
the like carry the layout along, and a layer with weights starts a new one.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["AmbiguousUnitsError", "Site", "SiteFinder", "undisturbed"]

BATCH, UNIT, POSITION = "batch", "unit", "position"
Factor = tuple[int, str]
Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]

RAW = "no layer came before it"
"""Why the units of the network's own input are unknown."""

SMOOTH = {
    "leaky_relu": "leaky_relu",
    "prelu": "prelu",
    "_prelu_kernel": "prelu",
    "rrelu_with_noise": "rrelu",
    "rrelu_with_noise_functional": "rrelu",
    "elu": "elu",
    "celu": "celu",
    "gelu": "gelu",
    "silu": "silu",
    "mish": "mish",
    "softplus": "softplus",
}
"""Operators of the members without a silent region, with the kind that the report names."""

VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "view_copy"}
SAME = {
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift",
    "lift_fresh",
    "lift_fresh_copy",
    "_to_copy",
    "to",
    "native_dropout",
}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "matmul", "linear", "addbmm"}
REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "logsumexp",
    "var",
    "std",
    "prod",
    "linalg_vector_norm",
    "norm",
    "median",
    "argmax",
    "argmin",
    "any",
    "all",
    "nansum",
}
NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
SHUFFLES = {"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"}
WEIGHTED = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Embedding,
    nn.RNNBase,
)
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish)


class AmbiguousUnitsError(ValueError):
    """Nothing tells which dimension of a rectifier's input holds its units."""


@dataclass(frozen=True)
class Kind:
    """One member of the family.

    Attributes:
        name: ``"relu"`` and so on.
        silences: Whether it has a silent region.
        level: It is silent up to this pre-activation.
        by_output: Whether its output tells more exactly whether it is silent.
    """

    name: str
    silences: bool = True
    level: float = 0.0
    by_output: bool = False

    def fires(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Return where a unit is not silent, as ``bool``; never at NaN.

        Args:
            x: Pre-activations.
            out: Outputs, of the same shape; may be ``None`` unless ``by_output``.
        """
        if not self.by_output:
            return x > self.level
        assert out is not None
        return (out != 0) & ~torch.isnan(out)


def _zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 0 and not bool(value.any()) and not value.requires_grad
    return isinstance(value, int | float) and value == 0


def _bounded(low: Any, high: Any) -> Kind | None:
    if not _zero(low):
        return None
    if high is None:
        return Kind("relu")
    return Kind("relu6" if not isinstance(high, Tensor) and high == 6 else "hardtanh")


def classify(operator: str, bound: Mapping[str, Any]) -> Kind | None:
    """Tell whether an operator is a member of the family.

    Args:
        operator: Name of the ATen operator, without its trailing underscore.
        bound: Its arguments by name.

    Returns:
        Its kind, or ``None`` for any other operator.
    """
    kind: Kind | None = None
    if operator == "relu":
        kind = Kind("relu")
    elif operator == "relu6":
        kind = Kind("relu6")
    elif operator in ("clamp", "clip"):
        kind = _bounded(bound.get("min"), bound.get("max"))
    elif operator == "clamp_min":
        kind = _bounded(bound.get("min"), None)
    elif operator == "maximum":
        kind = _bounded(bound.get("other"), None) or _bounded(bound.get("self"), None)
    elif operator == "threshold":
        if _zero(bound.get("value")):
            level = float(bound["threshold"])
            kind = Kind("relu")
            if level != 0:
                kind = Kind("threshold", level=level, by_output=True)
    elif operator == "hardtanh":
        low, high = bound.get("min_val", -1), bound.get("max_val", 1)
        kind = _bounded(low, high) or Kind("hardtanh", silences=False)
    elif operator == "hardswish":
        kind = Kind("hardswish", level=-3.0, by_output=True)
    elif operator in SMOOTH:
        kind = Kind(SMOOTH[operator], silences=False)
    return kind


@dataclass(frozen=True)
class Tag:
    """Where a tensor comes from.

    Attributes:
        layout: Factors of each dimension, or ``None`` if lost.
        known: Whether the layout tells the units.
        reason: Why not.
        producer: Qualified name of the module with weights that made it, if nothing but shape
            operations, pooling or dropout came since.
        direct: Nothing but shape operations came since.
        weight: The tensor was computed from parameters only; ``producer`` owns them.
        call: Which of the producer's calls in this pass returned it, from 1; 0 if none did.
        source_dim: The dimension of units in what the producer returned, from the end.
    """

    layout: Layout | None
    known: bool = False
    reason: str = RAW
    producer: str | None = None
    direct: bool = False
    weight: bool = False
    call: int = 0
    source_dim: int = 0


def plain(shape: Sequence[int], unit_dims: Sequence[int] = (), batch: int | None = None) -> Layout:
    """Return the layout of a tensor with whole dimensions of units and one of the batch."""
    units = {dim % len(shape) for dim in unit_dims} if shape else set()
    return tuple(
        ((size, UNIT if dim in units else BATCH if dim == batch else POSITION),)
        for dim, size in enumerate(shape)
    )


def has_units(dim: Dim) -> bool:
    """Tell whether units lie along a dimension."""
    return any(role == UNIT for _, role in dim)


def without_units(dim: Dim) -> Dim:
    """Return a dimension whose units have become positions."""
    return tuple((size, POSITION if role == UNIT else role) for size, role in dim)


def refactor(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """Return the layout of a view of another shape, or ``None`` if it cannot be expressed.

    Args:
        layout: The layout before.
        shape: The shape after, with as many elements, in the same (row-major) order.

    Returns:
        The layout after. A factor that is split gives two of the same role.
    """
    factors = [factor for dim in layout for factor in dim if factor[0] != 1]
    factors.reverse()
    result: list[Dim] = []
    for size in shape:
        dim: list[Factor] = []
        missing = size
        while missing > 1:
            if not factors:
                return None
            have, role = factors.pop()
            if missing % have == 0:
                dim.append((have, role))
                missing //= have
            elif have % missing == 0:
                dim.append((missing, role))
                factors.append((have // missing, role))
                missing = 1
            else:
                return None
        result.append(tuple(dim) or ((1, POSITION),))
    return None if factors else tuple(result)


class Site(NamedTuple):
    """One call of a rectifier, as :meth:`SiteFinder.observe` gets it.

    Attributes:
        key: What tells this call site from others.
        base: Its name without the ``#k`` that tells repeated calls apart.
        kind: Name and rule of silence.
        layout: Layout of its input, units included.
        producer: See ``Tag``.
        direct: See ``Tag``.
        call: See ``Tag``.
        source_dim: See ``Tag``.
        location: Line of the model that made the call.
        module: Name of the module in which it ran.
        function: Whether it was a function's call rather than an activation module's.
        recurrent: Whether one pass calls the site once for each time step.
    """

    key: tuple[Any, ...]
    base: str
    kind: Kind
    layout: Layout
    producer: str | None
    direct: bool
    call: int
    source_dim: int
    location: str | None
    module: str
    function: bool
    recurrent: bool = False


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and plain objects that hold some."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for item in vars(value).values():
            if isinstance(item, Tensor | list | tuple | Mapping):
                yield from tensors_in(item)


def public_name(name: str) -> str:
    """Return a module's qualified name as written before ``torch.compile`` wrapped it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s and the data-parallel wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(
            model, nn.DataParallel | torch.nn.parallel.DistributedDataParallel
        ) and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Tell whether ``torch.compile`` has been applied to the model or to a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


_OWN = {
    os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    for name in ("sites.py", "diagnosis.py", "watch.py")
}
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_CALL = nn.Module._call_impl.__code__
_foreign: dict[CodeType, bool] = {}


def call_path(
    frame: FrameType | None, boundary: FrameType | None
) -> tuple[tuple[Any, ...], str | None]:
    """Return the way from the model to a call, and the line of the model's code that makes it.

    Args:
        frame: Where to start.
        boundary: Frame of the model's call, at which to stop.

    Returns:
        Code and instruction of each frame outside torch and this package, the identity of each
        module called, and ``"file.py:12"``.
    """
    path: list[Any] = []
    location = None
    while frame is not None and frame is not boundary:
        code = frame.f_code
        foreign = _foreign.get(code)
        if foreign is None:
            name = code.co_filename
            foreign = not (name.startswith(_TORCH) or name in _OWN)
            _foreign[code] = foreign
        if foreign:
            if location is None:
                location = f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
            path.append((code, frame.f_lasti))
        elif code is _CALL:
            path.append(id(frame.f_locals["self"]))
        frame = frame.f_back
    return tuple(path), location


class SiteFinder(TorchDispatchMode):
    """Calls :meth:`observe` for every rectifier of the family in a forward pass.

    Args:
        model: The model.
        smooth: Look for leaky and smooth members too.
        unit_dim: ``None``; a dimension for all sites; or a mapping from a site's name, with or
            without ``#k``, to a dimension, or to ``None`` to leave the site out.
        batch_dim: Dimension of the model's inputs along which they are batched.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        smooth: bool = False,
        unit_dim: int | Mapping[str, int | None] | None = None,
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.smooth = smooth
        self.unit_dim = unit_dim
        self.batch_dim = batch_dim
        self.batch_size = 0
        self.notes: dict[str, None] = {}
        self.ambiguous: dict[str, str] = {}
        self.seen_smooth: Counter[str] = Counter()
        self.called: set[str] = set()
        self.used_overrides: set[str] = set()
        self.ignored: set[tuple[Any, ...]] = set()
        self._tags = WeakTensorKeyDictionary()
        self._modules = {
            public_name(name): module
            for name, module in model.named_modules()
            if not hasattr(module, "_orig_mod")
        }
        self._owners: dict[int, list[str]] = {}
        for name, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append(name)
        self._handles: list[Any] = []
        self._stack: list[str] = []
        self._boundary: FrameType | None = None
        self._rnn: list[_Recurrence] = []
        self._calls: Counter[Any] = Counter()
        self._module_calls: Counter[str] = Counter()
        self._found: list[int] = []
        self._ranks: dict[tuple[Any, ...], tuple[str, int]] = {}
        self._bases: Counter[str] = Counter()
        self._arguments: dict[Any, tuple[str, tuple[str, ...]]] = {}

    # What a subclass overrides.

    def observe(self, site: Site, x: Tensor, out: Tensor) -> None:
        """Take note of one call: its site, its pre-activation (copied if in place), its output."""

    def before(self, site: Site, x: Tensor) -> None:
        """Take note of the pre-activation before the call, which may destroy it."""

    # The forward pass.

    def attach(self) -> None:
        """Register the hooks that tell which module is running."""
        for name, module in self._modules.items():
            try:
                self._handles.append(
                    module.register_forward_pre_hook(
                        self._enter_hook(name), prepend=True, with_kwargs=True
                    )
                )
                self._handles.append(
                    module.register_forward_hook(self._leave_hook(name), always_call=True)
                )
            except (RuntimeError, TypeError):  # part of a scripted module
                if not isinstance(self._modules.get(name.rpartition(".")[0]), type(module)) or (
                    not name
                ):
                    self.notes[
                        f"{name or 'the model'} is scripted: its rectifiers carry the name of what "
                        "calls it, not those of its parts"
                    ] = None

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()
        self._boundary = None
        self._tags.clear()

    def begin(self, batch_size: int, inputs: Any) -> None:
        """Start a pass over one batch.

        Args:
            batch_size: Number of inputs in it.
            inputs: What the model will be called with.
        """
        self.batch_size = batch_size
        self._calls.clear()
        self._module_calls.clear()
        self._stack.clear()
        self._rnn.clear()
        self._found.clear()
        self._tags.clear()
        for tensor in tensors_in(inputs):
            self._mark_raw(tensor)

    def _mark_raw(self, tensor: Tensor) -> None:
        if tensor in self._tags or id(tensor) in self._owners:
            return
        batch = None
        if tensor.ndim and -tensor.ndim <= self.batch_dim < tensor.ndim:
            dim = self.batch_dim % tensor.ndim
            batch = dim if tensor.shape[dim] == self.batch_size else None
        self._tags[tensor] = Tag(plain(tensor.shape, (), batch))

    def _enter_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._stack and self._boundary is None:
                self._boundary = sys._getframe(1)
            self._stack.append(name)
            self._found.append(0)
            self.called.add(name)
            for tensor in tensors_in((args, kwargs)):
                self._mark_raw(tensor)
            if isinstance(module, nn.RNN) and module.nonlinearity == "relu":
                self._rnn.append(_Recurrence(*_steps(module, args, kwargs)))
            self._warn_time_first(name, module, args)

        return hook

    def _warn_time_first(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if getattr(module, "batch_first", True) or not args or not isinstance(args[0], Tensor):
            return
        tag = self._tags.get(args[0])
        if args[0].ndim == 3 and tag is not None and tag.layout is not None:
            roles = [[role for _, role in dim] for dim in tag.layout]
            if roles[0] == [BATCH] and roles[1] != [BATCH]:
                self.notes[
                    f"{name} has batch_first=False and so reads the batch as time; if that is "
                    "meant, pass batch_dim=1, since n counts the inputs of the batch"
                ] = None

    def _leave_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._stack or self._stack[-1] != name:
                return
            self._stack.pop()
            found = self._found.pop()
            if self._found:
                self._found[-1] += found
            if not self._stack:
                self._boundary = None
            if isinstance(module, nn.RNN) and module.nonlinearity == "relu":
                self._rnn.pop()
            hidden = isinstance(module, RECTIFIERS) or (
                isinstance(module, nn.RNN) and module.nonlinearity == "relu"
            )
            if hidden and not found:
                self.notes[
                    f"NOT SEEN: {name} was called, but its rectifier runs inside a fused operator"
                ] = None
            if isinstance(module, WEIGHTED) and (not found or isinstance(module, nn.RNNBase)):
                self._tag_output(name, module, output)
            elif isinstance(module, nn.modules.dropout._DropoutNd | nn.Identity):
                tag = self._tags.get(args[0]) if args and isinstance(args[0], Tensor) else None
                if tag is not None and isinstance(output, Tensor):
                    same = isinstance(module, nn.Identity) or not module.training
                    self._tags[output] = replace(tag, direct=tag.direct and same)

        return hook

    def _tag_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Make sure of the tag of a known layer's output, whatever operators it used."""
        if isinstance(module, nn.RNNBase):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, nn.utils.rnn.PackedSequence):
                output = output.data
        if not isinstance(output, Tensor) or not output.ndim:
            return
        tag = self._tags.get(output)
        self._module_calls[name] += 1
        call = self._module_calls[name]
        if tag is not None and tag.known and tag.layout is not None:
            units = [dim for dim, factors in enumerate(tag.layout) if has_units(factors)]
            if len(units) != 1 or len(tag.layout[units[0]]) != 1:
                call, units = 0, [0]
            self._tags[output] = replace(
                tag, producer=name, direct=True, call=call, source_dim=units[0] - output.ndim
            )
            return
        unit = -1
        if isinstance(module, nn.modules.conv._ConvNd):
            unit = -1 - len(module.kernel_size)
        elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            unit = 1
        if isinstance(module, nn.Linear) and output.shape[-1] != module.out_features:
            return
        layout = plain(output.shape, (unit,))
        if tag is not None and tag.layout is not None:
            layout = tuple(
                new if has_units(new) else without_units(old)
                for new, old in zip(layout, tag.layout, strict=True)
            )
        self._tags[output] = Tag(
            layout, True, "", name, True, call=call, source_dim=unit % output.ndim - output.ndim
        )

    def _owner(self, candidates: Sequence[str]) -> str | None:
        """Return the module that uses a weight: the one running, if it or a part of it owns it."""
        if not candidates:
            return None
        if self._stack:
            running = self._stack[-1]
            for name in candidates:
                if name == running or name.startswith(running + "."):
                    return running
        return candidates[0]

    # Operators.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        known = self._arguments.get(func)
        if known is None:
            schema = func._schema
            name = schema.name.partition("::")[2]
            stripped = name.removesuffix("_") if not name.endswith("__") else name
            known = (stripped, tuple(argument.name for argument in schema.arguments))
            self._arguments[func] = known
        operator, names = known
        tags = self._tags_of(args, kwargs)
        if not tags and operator not in SMOOTH and operator not in _CANDIDATES:
            return func(*args, **kwargs)
        bound = dict(zip(names, args, strict=False)) | kwargs
        site = x = None
        if operator in SMOOTH or operator in _CANDIDATES:
            site, x = self._rectifier(operator, bound)
            if site is not None and x is not None:
                self.before(site, x)
        out = func(*args, **kwargs)
        if site is not None and x is not None:
            self.observe(site, x, out)
        if tags and not operator.endswith("_like") and not operator.startswith("new_"):
            self._propagate(operator, func, bound, tags, out)
        return out

    def _tags_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Any, Tag]]:
        found: list[tuple[Any, Tag]] = []
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Tensor):
                    tag = self._tag(item)
                    if tag is not None:
                        found.append((item, tag))
        return found

    def _tag(self, tensor: Any) -> Tag | None:
        if not isinstance(tensor, Tensor):
            return None
        owners = self._owners.get(id(tensor))
        if owners is not None:
            return Tag(None, producer=self._owner(owners), weight=True)
        return self._tags.get(tensor)

    def _rectifier(
        self, operator: str, bound: Mapping[str, Any]
    ) -> tuple[Site | None, Tensor | None]:
        kind = classify(operator, bound)
        if kind is None:
            return None, None
        x = bound["self"]
        if operator == "maximum":
            zero = bound["other"]
            if not _zero(zero):
                x, zero = zero, x
            if self._tag(zero) is not None:  # an activation or a weight that happens to be 0
                return None, None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None, None
        if not kind.silences and not self.smooth:
            self.seen_smooth[kind.name] += 1
            return None, None
        tag = self._tag(x)
        running = self._stack[-1] if self._stack else ""
        if tag is not None and tag.weight:
            self.notes[f"{kind.name} on weights in {running or 'the model'} is not counted"] = None
            self.ignored.add(call_path(sys._getframe(2), self._boundary)[0])
            return None, None
        if self._found:
            self._found[-1] += 1
        module = self._modules.get(running)
        if isinstance(module, nn.RNN) and self._rnn:
            return self._rnn_site(running, module, kind, x), x
        own = (
            bool(running)
            and module is not None
            and (
                type(module).__module__ == nn.ReLU.__module__
                or not (any(True for _ in module.children()) or _has_weights(module))
            )
        )
        shown = kind.name if operator == "hardtanh" else operator.strip("_")
        base = running if own else f"{running}.{shown}()" if running else f"{shown}()"
        path, location = call_path(sys._getframe(2), self._boundary)
        if self._boundary is None:
            location = None
        self._calls[base, path] += 1
        key = (base, path, self._calls[base, path])
        rank = self._rank(base, key)
        override, overridden = self._override(base, rank)
        layout: Layout | None = None
        if overridden:
            if override is None:
                return None, None
            if not -x.ndim <= override < x.ndim:
                raise ValueError(
                    f"unit_dim={override} for {base}, whose input has shape {tuple(x.shape)}: "
                    f"dimensions go from {-x.ndim} to {x.ndim - 1}"
                )
            old = tag.layout if tag is not None else None
            layout = plain(x.shape, (override,))
            if old is not None:
                layout = tuple(
                    new if has_units(new) else without_units(before)
                    for new, before in zip(layout, old, strict=True)
                )
        elif tag is not None and tag.known:
            layout = tag.layout
        elif (
            (tag is None or tag.reason == RAW)
            and x.ndim == 2
            and x.shape[self.batch_dim] == self.batch_size
        ):
            layout = plain(x.shape, (1 - self.batch_dim % 2,), self.batch_dim % 2)
        if layout is None:
            name = f"{base}#{rank}"
            why = RAW if tag is None else tag.reason
            self.ambiguous[name] = f"shape {tuple(x.shape)}: {why}" + (
                f", {location}" if location else ""
            )
            return None, None
        site = Site(
            key,
            base,
            kind,
            layout,
            tag.producer if tag is not None else None,
            tag.direct if tag is not None else False,
            tag.call if tag is not None else 0,
            tag.source_dim if tag is not None else 0,
            location,
            running,
            not own,
        )
        return site, x

    def _rank(self, base: str, key: tuple[Any, ...]) -> int:
        if key not in self._ranks:
            self._bases[base] += 1
            self._ranks[key] = (base, self._bases[base])
        return self._ranks[key][1]

    def name_of(self, key: tuple[Any, ...]) -> str:
        """Return the name of a call site, with ``#k`` if its base is not unique."""
        base, rank = self._ranks[key]
        return f"{base}#{rank}" if self._bases[base] > 1 else base

    def _override(self, base: str, rank: int) -> tuple[int | None, bool]:
        if isinstance(self.unit_dim, Mapping):
            for name in (f"{base}#{rank}", base):
                if name in self.unit_dim:
                    self.used_overrides.add(name)
                    return self.unit_dim[name], True
            return None, False
        return self.unit_dim, self.unit_dim is not None

    def _rnn_site(self, name: str, module: nn.RNN, kind: Kind, x: Tensor) -> Site:
        running = self._rnn[-1]
        line, step = divmod(running.calls, max(running.steps, 1))
        running.calls += 1
        directions = 2 if module.bidirectional else 1
        base = f"{name}.l{line // directions}" + ("_reverse" if line % directions else "")
        base = base.removeprefix(".")
        if step == 0:
            self._calls[base] += 1
        key = (base, (), self._calls[base])
        self._rank(base, key)
        batched = x.ndim == 2 and (running.packed or x.shape[0] == self.batch_size)
        layout = plain(x.shape, (-1,), 0 if batched else None)
        return Site(key, base, kind, layout, name, False, 0, 0, None, name, False, True)

    # Layouts.

    def _propagate(
        self, operator: str, func: Any, bound: dict[str, Any], tags: list[tuple[Any, Tag]], out: Any
    ) -> None:
        data = [(tensor, tag) for tensor, tag in tags if not tag.weight]
        results = [value for value in _outputs(out) if isinstance(value, Tensor)]
        if not data:
            if operator == "embedding":
                indices = bound["indices"]
                layout = (*plain(indices.shape), ((results[0].shape[-1], UNIT),))
                self._tags[results[0]] = Tag(layout, True, "", tags[0][1].producer, True)
                return
            for result in results:
                if id(result) not in self._owners:
                    self._tags[result] = Tag(None, producer=tags[0][1].producer, weight=True)
            return
        weights = [tag for _, tag in tags if tag.weight]
        for result in results:
            tag = self._tag_for(operator, bound, data, weights, result)
            if tag.layout is not None and len(tag.layout) != result.ndim:
                tag = Tag(None, reason=f"its units were lost in {operator}")
            self._tags[result] = tag

    def _tag_for(
        self,
        operator: str,
        bound: dict[str, Any],
        data: list[tuple[Any, Tag]],
        weights: list[Tag],
        out: Tensor,
    ) -> Tag:
        first = data[0][1]
        shape = tuple(out.shape)
        if operator in SAME:
            return replace(first, direct=first.direct and operator != "native_dropout")
        if operator in VIEWS:
            return _viewed(first, shape, operator)
        if operator in PRODUCTS:
            return self._product(operator, bound, out)
        if "convolution" in operator or operator in ("conv1d", "conv2d", "conv3d"):
            batch = first.layout[0] if first.layout else ((shape[0], POSITION),)
            layout = (without_units(batch), *plain(shape[1:], (0,)))
            owner = weights[0].producer if weights else None
            return Tag(layout, True, "", owner, True)
        if operator == "embedding":
            front = first.layout or plain(shape[:-1])
            owner = weights[0].producer if weights else None
            return Tag((*front, ((shape[-1], UNIT),)), True, "", owner, True)
        if any(norm in operator for norm in NORMS):
            return self._normalized(operator, first, weights, shape)
        if operator == "copy":
            source = self._tag(bound.get("src"))
            return _broadcast([source] if source and not source.weight else [first], shape)
        if operator in STRUCTURAL:
            return STRUCTURAL[operator](self, bound, data, out)
        if operator in REDUCTIONS and "dim" in bound:
            return _reduced(first, bound, shape)
        if "pool" in operator:
            tag = _broadcast([first], shape)
            return replace(tag, producer=first.producer if tag.known else None)
        if operator in SHUFFLES and first.known and first.layout and len(shape) >= 3:
            lead = first.layout[:-3]
            return Tag((*lead, *plain(shape[-3:], (0,))), True, "")
        tag = _broadcast([tag for _, tag in data], shape)
        if (
            operator == "add"
            and len(data) == 1
            and weights
            and first.producer is not None
            and all(weight.producer == first.producer for weight in weights)
        ):
            return replace(tag, producer=first.producer, direct=first.direct)
        return tag

    def _normalized(
        self, operator: str, tag: Tag, weights: list[Tag], shape: tuple[int, ...]
    ) -> Tag:
        running = self._modules.get(self._stack[-1]) if self._stack else None
        owner = weights[0].producer if weights else None
        if owner is None and isinstance(running, WEIGHTED):
            owner = self._stack[-1]
        if tag.known and tag.layout is not None and len(tag.layout) == len(shape):
            return Tag(tag.layout, True, "", owner, True)
        if tag.layout is None or len(tag.layout) != len(shape) or len(shape) < 2:
            return Tag(None, reason=f"its units were lost in {operator}")
        unit = len(shape) - 1 if "layer" in operator or "rms" in operator else 1
        layout = tuple(
            ((size, UNIT),) if dim == unit else without_units(tag.layout[dim])
            for dim, size in enumerate(shape)
        )
        return Tag(layout, True, "", owner, True)

    def _product(self, operator: str, bound: dict[str, Any], out: Tensor) -> Tag:
        names = {
            "addmm": ("mat1", "mat2"),
            "baddbmm": ("batch1", "batch2"),
            "addbmm": ("batch1", "batch2"),
            "addmv": ("mat", "vec"),
            "mv": ("self", "vec"),
            "bmm": ("self", "mat2"),
            "mm": ("self", "mat2"),
            "matmul": ("self", "other"),
            "linear": ("input", "weight"),
        }[operator]
        left, right = bound[names[0]], bound[names[1]]
        left_tag, right_tag = self._tag(left), self._tag(right)
        left_data = left_tag is not None and not left_tag.weight
        right_data = right_tag is not None and not right_tag.weight
        shape = tuple(out.shape)
        lost = Tag(None, reason="it is a product of two activations")
        if not left_data and not right_data:  # only what is added comes from the data
            return _broadcast([tag for tag in [self._tag(bound.get("self"))] if tag], shape)
        if operator == "linear" or (operator == "matmul" and right.ndim <= 2 and left_data):
            front = left_tag.layout[:-1] if left_tag and left_tag.layout else plain(shape[:-1])
            owner = right_tag.producer if right_tag is not None else None
            if right_data or right.ndim != 2 or len(front) != len(shape) - 1:
                return lost
            return Tag((*map(without_units, front), ((shape[-1], UNIT),)), True, "", owner, True)
        if operator in ("matmul", "addbmm"):
            return lost
        if operator in ("mv", "addmv"):
            if left_data:
                return lost
            owner = left_tag.producer if left_tag is not None else None
            return Tag(plain(shape, (0,)), True, "", owner, True)
        batched = len(shape) == 3

        def dims(tag: Tag | None, tensor: Tensor) -> Layout:
            if tag is not None and tag.layout is not None:
                return tag.layout
            return plain(tensor.shape)

        a, b = dims(left_tag, left), dims(right_tag, right)

        def stacked(weight: Tensor) -> bool:
            return batched and weight.shape[0] > 1 and weight.stride(0) != 0

        if left_data and not right_data:
            owner = right_tag.producer if right_tag is not None else None
            members = right_tag is not None and stacked(right)
            batch = ((shape[0], UNIT),) if members and batched else without_units(a[0])
            front = (batch,) if batched else ()
            layout = (*front, without_units(a[-2]), ((shape[-1], UNIT),))
            return Tag(layout, True, "", owner, True)
        if right_data and left_tag is not None and left_tag.weight:
            members = stacked(left)
            batch = ((shape[0], UNIT),) if members and batched else without_units(b[0])
            front = (batch,) if batched else ()
            layout = (*front, ((shape[-2], UNIT),), without_units(b[-1]))
            return Tag(layout, True, "", left_tag.producer, True)
        for tag, own in ((right_tag, b), (left_tag, a)):
            is_right = tag is right_tag
            contracted = own[-2] if is_right else own[-1]
            if tag is not None and tag.known and tag.layout and not has_units(contracted):
                rows = without_units(a[-2]) if is_right else a[-2]
                columns = b[-1] if is_right else without_units(b[-1])
                front = (own[0],) if batched else ()
                return Tag((*front, rows, columns), True, "")
        return lost


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _outputs(out: Any) -> Sequence[Any]:
    return out if isinstance(out, list | tuple) else (out,)


@dataclass
class _Recurrence:
    """The call of an ``nn.RNN`` under way."""

    steps: int
    packed: bool
    calls: int = 0


def _steps(module: nn.RNN, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the number of time steps, and whether the sequences are packed."""
    sequence = args[0] if args else kwargs["input"]
    if not isinstance(sequence, Tensor):
        return int(sequence.batch_sizes.numel()), True
    return sequence.shape[1 if module.batch_first and sequence.ndim == 3 else 0], False


def _viewed(tag: Tag, shape: tuple[int, ...], operator: str) -> Tag:
    if tag.layout is None:
        return tag
    layout = refactor(tag.layout, shape)
    if layout is None:
        return Tag(None, reason=f"its units were mixed with positions in {operator}")
    return replace(tag, layout=layout)


def _broadcast(tags: Sequence[Tag], shape: tuple[int, ...]) -> Tag:
    """Return the tag of an elementwise result, or of one that resizes dimensions of positions."""
    result: list[Dim | None] = [None] * len(shape)
    known = False
    for tag in sorted(tags, key=lambda tag: not tag.known):
        layout = tag.layout
        if layout is None or len(layout) > len(shape):
            continue
        if known and not tag.known:
            continue
        offset = len(shape) - len(layout)
        for dim, factors in enumerate(layout, start=offset):
            size = 1
            for factor in factors:
                size *= factor[0]
            if size != shape[dim]:
                if size == 1:
                    continue
                if tag.known and has_units(factors):
                    return Tag(None, reason="the dimension of its units changed size")
                factors = ((shape[dim], POSITION),)
            before = result[dim]
            if before is None or (not has_units(before) and not has_units(factors)):
                if before is None or any(role == BATCH for _, role in factors):
                    result[dim] = factors
            elif before != factors:
                if known and tag.known:
                    return Tag(None, reason="tensors with units in different dimensions met")
                result[dim] = factors if has_units(factors) else before
        known = known or tag.known
    layout = tuple(
        dim if dim is not None else ((size, POSITION),)
        for dim, size in zip(result, shape, strict=True)
    )
    reason = next((tag.reason for tag in tags if tag.reason), RAW)
    return Tag(layout, known, "" if known else reason)


def _reduced(tag: Tag, bound: Mapping[str, Any], shape: tuple[int, ...]) -> Tag:
    if tag.layout is None:
        return replace(tag, producer=None, direct=False)
    dims = bound["dim"]
    ndim = len(tag.layout)
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        reduced = set(range(ndim))
    else:
        listed = dims if isinstance(dims, list | tuple) else (dims,)
        reduced = {dim % ndim for dim in listed} if ndim else set()
    lost = any(has_units(tag.layout[dim]) for dim in reduced)
    keep = len(shape) == ndim
    layout = tuple(
        ((1, POSITION),) if dim in reduced else factors
        for dim, factors in enumerate(tag.layout)
        if keep or dim not in reduced
    )
    if lost:
        layout = tuple(map(without_units, layout))
    reason = "its units were summed up" if lost else tag.reason
    return Tag(layout, tag.known and not lost, reason)


def _cut(tag: Tag, dim: int, size: int | None) -> Tag:
    """Return the tag after slicing (or, for ``size=None``, dropping) one dimension."""
    if tag.layout is None or not tag.layout:
        return tag
    dim %= len(tag.layout)
    factors = tag.layout[dim]
    whole = 1
    for factor in factors:
        whole *= factor[0]
    if size == whole:
        return tag
    units = has_units(factors)
    if units and (len(factors) > 1):
        return Tag(None, reason="a slice was taken across units and positions")
    middle: Layout = ()
    if size is not None:
        middle = (((size, UNIT if units else POSITION),),)
    layout = (*tag.layout[:dim], *middle, *tag.layout[dim + 1 :])
    if units:
        return Tag(layout, tag.known, tag.reason)
    return replace(tag, layout=layout, direct=False)


Rule = Callable[[SiteFinder, dict[str, Any], list[tuple[Any, Tag]], Tensor], Tag]


def _permute(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    tag = data[0][1]
    if tag.layout is None:
        return tag
    ndim = len(tag.layout)
    if "dims" in bound:
        order = [dim % ndim for dim in bound["dims"]]
    else:
        order = list(range(ndim))
        if ndim >= 2:
            one, two = bound.get("dim0", 0) % ndim, bound.get("dim1", 1) % ndim
            order[one], order[two] = order[two], order[one]
    return replace(tag, layout=tuple(tag.layout[dim] for dim in order))


def _unsqueeze(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    tag = data[0][1]
    if tag.layout is None:
        return tag
    dim = bound["dim"] % (len(tag.layout) + 1)
    return replace(tag, layout=(*tag.layout[:dim], ((1, POSITION),), *tag.layout[dim:]))


def _squeeze(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    tag = data[0][1]
    if tag.layout is None:
        return tag
    return _viewed(tag, tuple(out.shape), "squeeze")


def _expand(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    tag = data[0][1]
    return replace(_broadcast([tag], tuple(out.shape)), producer=tag.producer, direct=tag.direct)


def _slice(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    dim = bound.get("dim", 0)
    return _cut(data[0][1], dim, out.shape[dim])


def _select(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    return _cut(data[0][1], bound.get("dim", 0), None)


def _cat(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    tensors = bound["tensors"]
    if len(tensors) == 1:
        return data[0][1]
    dim = bound.get("dim", 0) % out.ndim
    tags = [tag for _, tag in data if tag.layout is not None and len(tag.layout) == out.ndim]
    known = [tag for tag in tags if tag.known]
    if not known:
        return Tag(plain(out.shape), reason=next((tag.reason for _, tag in data), RAW))
    along = [tag.layout[dim] for tag in known]
    units = [has_units(factors) for factors in along]
    if any(units) and (
        not all(units) or any(len(factors) > 1 for factors in along) or len(known) < len(tensors)
    ):
        return Tag(None, reason="tensors with different layouts were concatenated")
    merged = _broadcast(
        [
            replace(tag, layout=(*tag.layout[:dim], ((1, POSITION),), *tag.layout[dim + 1 :]))
            for tag in known
        ],
        (*out.shape[:dim], 1, *out.shape[dim + 1 :]),
    )
    if merged.layout is None:
        return merged
    middle = ((out.shape[dim], UNIT if any(units) else POSITION),)
    return replace(merged, layout=(*merged.layout[:dim], middle, *merged.layout[dim + 1 :]))


def _stack(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    dim = bound.get("dim", 0) % out.ndim
    shape = (*out.shape[:dim], *out.shape[dim + 1 :])
    tag = _broadcast([tag for _, tag in data], shape)
    if tag.layout is None:
        return tag
    middle = ((out.shape[dim], POSITION),)
    return replace(tag, layout=(*tag.layout[:dim], middle, *tag.layout[dim:]))


def _picked(tag: Tag, dim: int, out: Tensor) -> Tag:
    """Return the tag after some entries were picked along one dimension, in any order."""
    if tag.layout is None or len(tag.layout) != out.ndim:
        return Tag(None, reason="its units were lost in indexing")
    dim %= out.ndim
    units = has_units(tag.layout[dim])
    if units and len(tag.layout[dim]) > 1:
        return Tag(None, reason="entries were picked across units and positions")
    picked = ((out.shape[dim], UNIT if units else POSITION),)
    return Tag((*tag.layout[:dim], picked, *tag.layout[dim + 1 :]), tag.known, tag.reason)


def _index_select(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    tag = finder._tag(bound["self"])
    if tag is None or tag.weight:
        return Tag(plain(out.shape))
    return _picked(tag, bound["dim"], out)


def _index(finder: SiteFinder, bound: dict[str, Any], data: Any, out: Tensor) -> Tag:
    tag = finder._tag(bound["self"])
    indices = bound["indices"]
    lost = Tag(None, reason="its units were lost in indexing")
    if tag is None or tag.weight or tag.layout is None or not tag.known:
        return lost
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) == 1 and given[0][1].ndim == 1:
        return _picked(tag, given[0][0], out)
    units = [dim for dim, factors in enumerate(tag.layout) if has_units(factors)]
    reached = 0
    for index in indices:
        width = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None and any(reached <= dim < reached + width for dim in units):
            return lost
        reached += width
    behind = len(tag.layout) - reached
    tail = tag.layout[reached:]
    if any(dim < reached for dim in units) or out.ndim < behind:
        return lost
    return Tag((*plain(out.shape[: out.ndim - behind]), *tail), True, "")


STRUCTURAL: dict[str, Rule] = {
    "permute": _permute,
    "transpose": _permute,
    "t": _permute,
    "numpy_T": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "narrow": _slice,
    "split": _slice,
    "split_with_sizes": _slice,
    "unsafe_split": _slice,
    "unsafe_split_with_sizes": _slice,
    "chunk": _slice,
    "unsafe_chunk": _slice,
    "select": _select,
    "unbind": _select,
    "cat": _cat,
    "stack": _stack,
    "index": _index,
    "index_select": _index_select,
}
_CANDIDATES = {
    "relu",
    "relu6",
    "clamp",
    "clip",
    "clamp_min",
    "maximum",
    "threshold",
    "hardtanh",
    "hardswish",
}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run forward passes of a model and leave no trace, whatever happens inside.

    Turns off gradients, autocast's cache, the fused path of ``nn.TransformerEncoderLayer`` and
    ``torch.compile``; restores these, each module's training flag, all buffers, and the random
    state of Python, NumPy (if imported), torch, and the accelerators in use.

    Args:
        model: The model.

    Raises:
        RuntimeError: If a part of the model is compiled and torch is older than 2.6, which cannot
            switch to eager execution.
    """
    training = [  # a frozen scripted module has no such flag
        (module, module.training) for module in model.modules() if hasattr(module, "training")
    ]
    buffers: list[tuple[nn.Module | None, str, Tensor | None, Tensor | None]] = []
    for module in model.modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        held = module.named_buffers(recurse=False) if scripted else module._buffers.items()
        for name, buffer in held:
            copy = None if buffer is None else buffer.clone()
            buffers.append((None if scripted else module, name, buffer, copy))
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    torch_state = torch.get_rng_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else None
    mps = torch.backends.mps.is_available()
    mps_state = torch.mps.get_rng_state() if mps else None
    fastpath = torch.backends.mha.get_fastpath_enabled()
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        elif is_compiled(model):
            raise RuntimeError(
                "a part of the model is compiled, and this torch cannot run it eagerly: "
                "use torch 2.6 or newer, or the model as it was before torch.compile"
            )
        if cuda and any(
            isinstance(module, nn.RNN) and module.nonlinearity == "relu"
            for module in model.modules()
        ):  # cuDNN's fused kernel hides the rectifier
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.no_grad())
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_autocast_cache_enabled(cached)
            for module, flag in training:
                module.training = flag
            for owner, name, buffer, copy in buffers:
                if owner is not None:
                    owner._buffers[name] = buffer
                if buffer is not None and copy is not None:
                    buffer.copy_(copy)
            random.setstate(python_state)
            if numpy is not None and numpy_state is not None:
                numpy.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
