"""Find every rectifier that a forward pass calls, and the units and inputs at each.

A dispatch mode sees each operator that runs below autograd, so it does not matter how a rectifier
was written: a module, a function, a method, in place, inside a scripted or a checkpointed part.
"""

import fnmatch
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from traceback import walk_stack
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from relubook.layers.maxout import maxout
from relubook.units._kinds import PIECE, Activations, Kind, Site, is_zero, kind_of, own_kinds, place
from relubook.units._numbers import LAYERS, RAW, Numbering, Tag, numbered

__all__ = ["AmbiguousUnitsError", "Site", "SiteFinder", "undisturbed", "unwrapped"]

Dims = int | Mapping[str, int | None] | None
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s and data-parallel wrappers; else TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run forward passes of a model and leave no trace, whatever happens inside.

    Turns off gradients, autocast's cache, ``nn.TransformerEncoderLayer``'s fused path and compiled
    code; restores these, training flags, buffers, and random states, also of accelerators in use.
    """
    numpy: Any = sys.modules.get("numpy")
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else ()))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        rnns = [module for module in model.modules() if isinstance(module, nn.RNN)]
        if cuda and any(module.nonlinearity == "relu" for module in rnns):
            # cuDNN's fused kernel hides the rectifier
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.no_grad())
        stack.callback(random.setstate, random.getstate())
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        if torch.backends.mps.is_available():
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        for module in model.modules():
            # A frozen scripted module has no flag; a scripted one's buffers can only be written to.
            if hasattr(module, "training"):
                stack.callback(setattr, module, "training", module.training)
            scripted = isinstance(module, torch.jit.ScriptModule)
            held: Any = dict(module.named_buffers(recurse=False)) if scripted else module._buffers
            for name, buffer in held.items():
                if buffer is not None:
                    stack.callback(buffer.copy_, buffer.clone())
                stack.callback(held.__setitem__, name, buffer)
        mha = torch.backends.mha
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        yield


class AmbiguousUnitsError(ValueError):
    """Nothing tells which dimension of a rectifier's input holds its units."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and plain objects that hold some."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | set | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for item in vars(value).values():
            if isinstance(item, Tensor | list | tuple | Mapping):
                yield from tensors_in(item)


_LIBRARIES = tuple(os.path.dirname(os.path.abspath(f)) + os.sep for f in (__file__, torch.__file__))
_MAXOUT = maxout.__code__
_LIBRARIES += (_MAXOUT.co_filename,)
_CALL = nn.Module._call_impl.__code__
_foreign: dict[CodeType, bool] = {}


def call_path(
    frame: FrameType | None, boundary: FrameType | None, modules: Mapping[int, str], layer: str
) -> tuple[tuple[Any, ...], str | None]:
    """Return the way from the model's call to one in it, and ``"file.py:12"``, the line of that.

    The way holds code and instruction of each frame from ``frame`` to ``boundary`` outside torch
    and this package, and each module's name by its ``id``, or the type of one made in the pass. It
    starts at the innermost module that holds the named layer too: who calls that does not matter.
    """
    path: list[Any] = []
    location, whole = None, False
    while frame is not None and frame is not boundary:
        code = frame.f_code
        if code not in _foreign:
            _foreign[code] = not code.co_filename.startswith(_LIBRARIES)
        if _foreign[code]:
            location = location or f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
            path += [] if whole else [(code, frame.f_lasti)]
        elif code is _CALL and not whole:
            module = frame.f_locals["self"]
            name = modules.get(id(module), type(module))
            whole = isinstance(name, str) and f"{layer}.".startswith(f"{name}.")
            path.append(name)
        frame = frame.f_back
    return tuple(path), location


def hook(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a hook that calls a function with a module's name first, and is no part of copies."""
    return lambda *args: function(name, *args)


class SiteFinder(TorchDispatchMode):
    """Calls :meth:`before` and :meth:`observe` for all rectifiers and maxouts of a forward pass.

    With ``smooth`` it looks for leaky and smooth members too; ``unit_dim``, ``batch_dim`` and
    ``activations`` are those of :func:`relubook.units.diagnosis.diagnose`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        smooth: bool = False,
        unit_dim: Dims = None,
        batch_dim: int = 0,
        activations: Activations = None,
    ) -> None:
        super().__init__()
        self.smooth, self.unit_dim, self.batch_dim = smooth, unit_dim, batch_dim
        self.batch_size = self._found = 0
        self.notes: dict[str, None] = {}
        self.seen_smooth: Counter[str] = Counter()
        self.used_overrides: set[str] = set()
        self._modules = {  # by their names before ``torch.compile`` wrapped them
            ".".join(part for part in name.split(".") if part != "_orig_mod"): module
            for name, module in model.named_modules()
            if not hasattr(module, "_orig_mod")
        }
        self._module_names = {id(module): name for name, module in self._modules.items()}
        self._numbers = Numbering(self._modules)
        self._own_kinds = own_kinds(activations, self._modules)
        self.uncalled = dict(activations or {})
        # An own activation's call that is under way: its frame or depth, kind, and input.
        self._own: tuple[FrameType | int, Kind, Tensor] | None = None
        self._handles: list[Any] = []
        self._stack: list[tuple[str, int]] = []
        self._boundary: FrameType | None = None
        self._ranks: dict[tuple[Any, ...], int] = {}
        self._bases: Counter[str] = Counter()
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._unplaced: dict[tuple[Any, ...], str] = {}
        self._operators: dict[Any, tuple[str, list[str], bool]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's wrapper would import the compiler, which takes seconds

    def before(self, site: Site, x: Tensor) -> None:
        """Take note of the pre-activation before the call, which may destroy it."""

    def observe(self, site: Site, x: Tensor, out: Tensor) -> None:
        """Take note of one call: its site, its pre-activation (gone if in place), its output."""

    def passed(self, operator: str, func: Any, bound: Mapping[str, Any], out: Any) -> None:
        """Number what an operator returns, given its arguments by name."""
        self._numbers.propagate(operator, func, bound, out)

    @property
    def ambiguous(self) -> dict[str, str]:
        """Names of the sites that were skipped since their units cannot be told, and why."""
        return {self.name_of(key): why for key, why in self._unplaced.items()}

    def attach(self) -> None:
        """Register the hooks that tell which module is running; RuntimeError under a profiler."""
        if any(isinstance(call, CodeType) for call in self._own_kinds):
            if sys.getprofile() is not None:
                what = "activations names a function, whose calls a running profiler hides"
                raise RuntimeError(f"{what}: stop it, or name the module that calls the function")
            sys.setprofile(self._profile)
        for name, module in self._modules.items():
            enter, leave = hook(self._enter_module, name), hook(self._leave_module, name)
            try:
                self._handles += [
                    module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                    module.register_forward_hook(leave, always_call=True),
                ]
            except (RuntimeError, TypeError):  # part of a scripted module
                self._note("rectifiers in scripted parts carry the name of what calls these")

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()
        if sys.getprofile() == self._profile:
            sys.setprofile(None)
        self._boundary = self._own = None
        self._numbers.clear()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Let passes of a model, or a part of it, be seen and leave no trace."""
        with undisturbed(model):
            try:
                self.attach()
                yield
            finally:
                self.detach()

    def begin(self, batch_size: int, inputs: Any) -> None:
        """Start a pass over a batch of so many inputs, with what the model will be called with."""
        self.batch_size = batch_size
        self._stack.clear()
        self._numbers.clear()
        self._mark(inputs, True)

    def _note(self, text: str) -> None:
        self.notes[text] = None

    def _mark(self, value: Any, data: bool) -> None:
        numbers, dim = self._numbers, self.batch_dim
        for x in tensors_in(value):
            if numbers.of(x) is None:
                inside = data and -x.ndim <= dim < x.ndim
                batched = inside and x.shape[dim] == self.batch_size
                tag = partial(Tag, inputs=numbered(x.shape, dim) if batched else None, data=data)
                numbers.tags[x] = numbers.step((x.shape, batched, data), tag)

    def _enter_module(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._stack and self._boundary is None:
            self._boundary = sys._getframe(2)  # behind the hook
        self._mark((args, kwargs), not self._stack)
        self._stack.append((name, self._found))
        self._numbers.running = name
        self._enter_own(name, len(self._stack), (args, kwargs))

    def _profile(self, frame: FrameType, event: str, result: Any) -> None:
        """Follow the calls of the own functions inside the model."""
        if frame.f_code in self._own_kinds and self._stack:
            if event == "call":
                given = [x for x in frame.f_locals.values() if isinstance(x, Tensor | tuple | dict)]
                self._enter_own(frame.f_code, frame, given)
            elif event == "return":
                self._leave_own(frame, result)

    def _enter_own(self, name: str | CodeType, call: FrameType | int, given: Any) -> None:
        """Keep what an own activation gets, unless it runs inside of another."""
        own = self._own_kinds.get(name) if self._own is None else None
        if own is not None and (x := next(tensors_in(given), None)) is not None:
            self.uncalled.pop(own[0], None)
            given, x = self._numbers.of(x) or Tag(data=False), x.detach().clone()
            self._numbers.tags[x] = given  # of a constant too
            self._own = call, own[1], x

    def _leave_own(self, call: FrameType | int, result: Any) -> None:
        """Count a call of an own activation, by its input if that gave the output its units."""
        if self._own is None or self._own[0] != call:
            return
        (_, kind, x), self._own = self._own, None
        if (out := next(tensors_in(result), None)) is None:  # the call failed
            return
        if not out.is_floating_point():
            raise TypeError(f"activations: {kind.name} returned {out.dtype}, not floating numbers")
        if torch._C._functorch.is_functorch_wrapped_tensor(out):
            return self._note(f"NOT SEEN: {kind.name} runs under vmap or another transform")
        with _disable_current_modes():
            given, made = self._numbers.tags[x], self._numbers.of(out) or Tag(data=False)
            inner = made.units is not None and made.layer.source != given.layer.source
            whole = x.shape == out.shape and not inner
            tag, x = (given, x) if whole else (made, out.detach())
            frame = call.f_back if isinstance(call, FrameType) else None
            shown = kind.name if frame or not self._stack[-1][0] else ""
            site = self._site(shown, kind, x, tag, frame)
            if site is not None:
                self.before(site, x)
                self.observe(site, x, out)
            self.passed("own", None, {"self": x} if whole else {}, out)

    def _leave_module(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._stack or self._stack[-1][0] != name:
            return
        self._leave_own(len(self._stack), output)
        numbers, first = self._numbers, args[0] if args else None
        found = self._found > self._stack.pop()[1]
        numbers.running = self._stack[-1][0] if self._stack else ""
        if not self._stack:
            self._boundary = None
        recurrent = isinstance(module, nn.RNNBase)
        rectifies = isinstance(module, RECTIFIERS) or (recurrent and module.mode == "RNN_RELU")
        if rectifies and not found:
            self._note(f"NOT SEEN: {name} was called, but its rectifier is in a fused operator")
        if recurrent:
            output = next(tensors_in(output))
        if not isinstance(output, Tensor) or not output.ndim:
            return
        if recurrent or (isinstance(module, LAYERS) and not found):
            numbers.enter_output(name, module, output)
        elif isinstance(module, nn.modules.dropout._DropoutNd | nn.Identity):
            tag = numbers.of(first)
            if tag is not None and output is not first:
                numbers.tags[output] = tag

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._operators:
            schema = func._schema
            # Another library's operator may have the name of one of ATen's.
            name = schema.name.removeprefix("aten::")
            name = name if name.endswith("__") else name.removesuffix("_")
            names = [argument.name for argument in schema.arguments]
            implicit = torch._C._dispatch_has_kernel_for_dispatch_key
            self._operators[func] = name, names, implicit(func.name(), "CompositeImplicitAutograd")
        operator, names, composite = self._operators[func]
        if composite:  # torch takes it apart before, save in inference mode
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        bound = dict(zip(names, args, strict=False)) | kwargs
        sought = "" if self._own else operator  # what runs inside an own activation is part of it
        site, kind = None, kind_of(sought, bound)
        if kind is not None:
            x, other = bound["self"], bound.get("other")
            if other is not None and not is_zero(other):
                x, other = other, x
            shown = kind.name if operator == "hardtanh" else operator.strip("_")
            # The other may be an activation or a weight that happens to be 0.
            if self._numbers.of(other) is None and isinstance(x, Tensor) and x.is_floating_point():
                site = self._site(shown, kind, x)
        elif sought == "amax" and _MAXOUT in [f.f_code for f, _ in walk_stack(sys._getframe())]:
            x, dims = bound["self"], bound["dim"]
            site = self._site("maxout", Kind(PIECE, False, by_output=True, dim=dims[0] % x.ndim), x)
        if site is not None:
            self.before(site, x)
        out = func(*args, **kwargs)
        if site is not None:
            self.observe(site, x, out)
        if not operator.endswith("_like") and not operator.startswith("new_"):
            self.passed(operator, func, bound, out)
        return out

    def _site(
        self, shown: str, kind: Kind, x: Tensor, tag: Tag | None = None, frame: Any = None
    ) -> Site | None:
        """Return the site of a call, or ``None`` if it is not to be counted."""
        if not kind.silences and not self.smooth and kind.dim is None:
            self.seen_smooth[kind.name] += 1
            return None
        tag = tag or self._numbers.of(x) or Tag(data=False)
        running = self._stack[-1][0] if self._stack else ""
        if tag.weight:
            self._note(f"{kind.name} on weights in {running or 'the model'} is not counted")
            return None
        self._found += 1
        if not x.numel():
            return None
        layer = tag.layer.source[0] if tag.layer.source else ""
        frame = frame or sys._getframe(2)
        path, location = call_path(frame, self._boundary, self._module_names, layer)
        base = self._base(running, shown) if shown else running
        key: tuple[Any, ...] = (base, path, tag.layer.source)
        if isinstance(self._modules.get(running), nn.RNN):  # its sites are named as its weights are
            base = f"{running}.{tag.layer.source[-1].split('_', 2)[2]}".removeprefix(".")
            key = (base, (), ())
        if key not in self._ranks:
            self._bases[base] += 1
            self._ranks[key] = self._bases[base]
        given = key, kind, tag, x.shape, self.batch_size
        return self._numbers.step(given, lambda: self._placed(key, kind, tag, x, location))

    def _placed(
        self, key: tuple[Any, ...], kind: Kind, tag: Tag, x: Tensor, location: str | None
    ) -> Site | None:
        base, units, inputs = key[0], tag.units, tag.inputs
        raw = tag.reason == RAW and x.ndim == 2 and x.shape[self.batch_dim] == self.batch_size
        pattern, dim = self._override(base, f"{base}#{self._ranks[key]}")
        if kind.dim is not None and (pattern is None or dim is not None):
            units, pattern, dim = numbered(x.shape, kind.dim - 1, kind.dim), None, None
        if dim is not None:
            if not -x.ndim <= dim < x.ndim:
                what = f"unit_dim={dim} for {base}, whose input has shape {tuple(x.shape)}"
                raise ValueError(f"{what}: dimensions go from {-x.ndim} to {x.ndim - 1}")
            units = numbered(x.shape, dim)
        elif pattern is not None:
            return None
        elif units is None and raw:
            units = numbered(x.shape, 1 - self.batch_dim % 2)
            inputs = numbered(x.shape, self.batch_dim) if inputs is None else inputs
        if units is None:
            where = f", {location}" if location else ""
            self._unplaced[key] = f"shape {tuple(x.shape)}: {tag.reason}{where}"
            return None
        if inputs is None and (self.batch_size == 1 or not tag.data):
            inputs = numbered(x.shape)
        placing = place(units, tag.layer.dim if dim is None else dim % x.ndim - x.ndim)
        if (size := self._sizes.setdefault(key, placing[0])) != placing[0]:
            what = f"it had {size} units before and has {placing[0]} now"
            self._unplaced[key] = f"shape {tuple(x.shape)}: {what}"
        if key in self._unplaced:
            return None
        producer = tag.layer.name if tag.near else None
        location = location if self._boundary is not None else None
        return Site(key, kind, *placing, inputs, self.batch_size, tag.data, producer, location)

    def _base(self, running: str, shown: str) -> str:
        """Return the name of the running module, with the operator's unless that is its purpose."""
        module = self._modules[running]
        own = [*module.children(), *module.parameters(recurse=False)]
        if running and (type(module).__module__ == nn.ReLU.__module__ or not own):
            shown = ""
        return f"{running}.{shown}()".removeprefix(".") if shown else running

    def name_of(self, key: tuple[Any, ...]) -> str:
        """Return the name of a site, with ``#k`` if others have the same base."""
        return f"{key[0]}#{self._ranks[key]}" if self._bases[key[0]] > 1 else key[0]

    def _override(self, base: str, name: str) -> tuple[str | None, int | None]:
        """Return what in ``unit_dim`` is about a site, and the dimension it gives."""
        if not isinstance(self.unit_dim, Mapping):
            return None, self.unit_dim
        fits = [pattern for pattern in (name, base) if pattern in self.unit_dim]
        fits += [pattern for pattern in self.unit_dim if fnmatch.fnmatchcase(base, pattern)]
        self.used_overrides.update(fits[:1])
        return (fits[0], self.unit_dim[fits[0]]) if fits else (None, None)
