"""Number units and inputs, and carry the numbers along a forward pass.

Beside each tensor go others of its shape: the number of the unit, and of the input, that each
element belongs to, expanded from a few (with stride 0), which costs next to nothing. What moves
elements moves their numbers too; a layer with weights numbers its units anew.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

RAW = "no layer came before it"  # why the units of the network's own input are unknown


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SAME = words("clone contiguous detach alias lift lift_fresh lift_fresh_copy _to_copy")
SHAPES = words("view _unsafe_view _reshape_alias view_copy squeeze unsqueeze")
VIEWS = words(
    "permute transpose t expand slice select split split_with_sizes unsafe_split unbind "
    "unsafe_split_with_sizes diagonal unfold"
)
CHOICES = words("index index_select gather _pack_padded_sequence")
PICKS = CHOICES | words(
    "flip roll pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle cat stack"
)
MOVES = VIEWS | PICKS
PRODUCTS = words("mm bmm addmm baddbmm")


def told_by(test: Callable[[Any], bool]) -> Any:
    """Return a class whose instances are the objects that pass a test."""
    return type("Told", (type,), {"__instancecheck__": lambda _, x: test(x)})("Told", (), {})


_FROZEN = ("weight", "bias", "running_mean", "running_var")
# Of buffers alone, as torchvision, transformers and detectron2 write it.
FrozenBatchNorm = told_by(lambda x: all(name in getattr(x, "_buffers", ()) for name in _FROZEN))
CHANNELED = (nn.modules.batchnorm._NormBase, nn.GroupNorm, FrozenBatchNorm)
WHOLE = (nn.Linear, nn.modules.conv._ConvNd, *CHANNELED, nn.LayerNorm, nn.Embedding)
LAYERS = (*WHOLE, nn.RNNBase, nn.RMSNorm)  # modules whose output has units of its own


def numbered(shape: Sequence[int], *dims: int) -> Tensor:
    """Number the places along some dimensions, alike along all others."""
    kept = {dim % len(shape) for dim in dims}
    sizes = [size if dim in kept else 1 for dim, size in enumerate(shape)]
    return torch.arange(math.prod(sizes), device="cpu").view(sizes).expand(tuple(shape))


def unit_dim(module: Any, output: Tensor) -> int:
    """Return the dimension of a layer's input or output along which units lie, from the end."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    return 1 - output.ndim if isinstance(module, CHANNELED) else -1


def core(numbers: Tensor) -> Tensor:
    """Return the numbers with size 1 along each dimension along which they do not vary."""
    shape, strides = numbers.shape, numbers.stride()
    sizes = [min(size, 1) if step == 0 else size for size, step in zip(shape, strides, strict=True)]
    numbers = numbers.as_strided(sizes, strides)
    for dim in [dim for dim, size in enumerate(sizes) if size > 1]:
        first = numbers.narrow(dim, 0, 1)
        if bool((numbers == first).all()):
            numbers = first
    return numbers


def along(numbers: Tensor) -> list[int]:
    """Return the dimensions along which the numbers vary."""
    return [dim for dim, size in enumerate(core(numbers).shape) if size > 1]


def fitted(numbers: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Return the numbers of a result made place by place; ``None`` if they do not fit its shape."""
    if numbers is None or numbers.shape == tuple(shape):
        return numbers
    small = core(numbers)
    pairs = zip(reversed(small.shape), reversed(shape), strict=False)
    fits = small.ndim <= len(shape) and all(old in (1, new) for old, new in pairs)
    return small.expand(tuple(shape)) if fits else None  # an error in torch would take long


def reshaped(numbers: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Return the numbers under a view of another shape, copying as few as possible."""
    if numbers is None or numbers.numel() != math.prod(shape):
        return None
    sizes = list(shape)
    for dim, (old, new) in enumerate(zip(numbers.shape, shape, strict=False)):
        if old != new:
            break
        if numbers.stride(dim) == 0 and old:
            numbers, sizes[dim] = numbers.narrow(dim, 0, 1), 1
    return numbers.reshape(sizes).expand(tuple(shape))


def summed(numbers: Tensor | None, dims: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """Return the numbers after sums along some dimensions; ``None`` if they vary there."""
    if numbers is None or not set(dims).isdisjoint(along(numbers)):
        return None
    small = core(numbers)
    return fitted(small.squeeze(tuple(dims)) if len(shape) < small.ndim else small, shape)


def shared(numbers: Sequence[Tensor | None], shape: Sequence[int]) -> Tensor | None:
    """Return the numbers of a result on which all that are known agree; ``None`` without any."""
    told = [own for one in numbers if (own := fitted(one, shape)) is not None]
    same = told and all(torch.equal(core(told[0]), core(own)) for own in told[1:])
    return told[0] if same else None


class Layer(NamedTuple):
    """A call of a layer with weights."""

    name: str | None  # that of the module; None for constants and layers made in the pass
    source: tuple[str, ...] = ()  # what tells it from other layers: name and parameter
    dim: int = -1  # that of its output along which units lie, from the end
    age: int = 0  # when it was called


class Tag(NamedTuple):
    """Where a tensor comes from."""

    units: Tensor | None = None  # the number of the unit of each element, if known
    inputs: Tensor | None = None  # the number of the input of each element, if known
    whose: Tensor | None = None  # the one unit of all that a Tracer knows each element to be of
    data: bool = True  # whether it depends on the model's inputs
    reason: str = RAW  # why the units are unknown
    layer: Layer = Layer(None)  # what numbered its units
    near: bool = False  # whether nothing but shape operations, pooling or dropout came since
    weight: bool = False  # whether it was computed from parameters only, those of ``layer``
    lost: str = ""  # what a Tracer lost ``whose`` to

    def __eq__(self, other: object) -> bool:
        return self is other


def merged(tags: Sequence[Tag], shape: Sequence[int]) -> Tag:
    """Return the tag of a result that has, place by place, the units of an operator's arguments."""
    inputs = shared([tag.inputs for tag in tags], shape)
    whose = shared([tag.whose for tag in tags], shape)
    tag = Tag(None, inputs, whose, any(tag.data for tag in tags))
    known = [tag for tag in tags if tag.units is not None]
    if not known:
        reason = next((tag.reason for tag in tags if tag.reason != RAW), RAW)
        return tag._replace(reason=reason)
    fits = [(tag, own) for tag in known if (own := fitted(tag.units, shape)) is not None]
    if not fits:
        return tag._replace(reason="the dimension of its units changed size")
    fits = [pair for pair in fits if along(pair[1])] or fits  # many units before a single one
    latest, units = max(fits, key=lambda pair: pair[0].layer.age)
    ranks = [core(own).unique(return_inverse=True)[1] for _, own in fits]
    if not all(torch.equal(ranks[0], rank) for rank in ranks):  # they tell other elements apart
        return tag._replace(reason="tensors with units in different dimensions met")
    return tag._replace(units=units, reason="", layer=latest.layer)


class Numbering:
    """The tags of a pass's tensors; a pass that does what the last one did gets the same tags."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.running = ""
        self.tags = WeakTensorKeyDictionary()
        self.nameless = self.age = self._place = 0
        # What the last pass found, step by step: from what, what, and ``nameless`` then.
        self._steps: list[tuple[tuple[Any, ...], Any, int]] = []
        self._weights: dict[tuple[int, str], Tag] = {}
        self.owners: dict[int, tuple[nn.Parameter, list[tuple[str, str]]]] = {}
        for name, module in modules.items():
            for own, parameter in module.named_parameters(recurse=False):
                self.owners.setdefault(id(parameter), (parameter, []))[1].append((name, own))

    def clear(self) -> None:
        """Forget the pass."""
        self.tags.clear()
        self.nameless = self._place = 0

    def step(self, given: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        """Return what ``find`` returns, or did at this step of the last pass if given the same."""
        steps, place = self._steps, self._place
        if place == len(steps) or steps[place][0] != given:
            del steps[place:]
            self.nameless = steps[-1][2] if steps else 0
            steps.append((given, find(), self.nameless))
        self._place += 1
        return steps[place][1]

    def of(self, tensor: Any) -> Tag | None:
        """Return the tag of a tensor; ``None`` for one made from constants and for no tensor."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) not in self.owners:
            return self.tags.get(tensor)
        key = id(tensor), self.running
        if key not in self._weights:
            owners = self.owners[id(tensor)][1]
            inside = [pair for pair in owners if f"{pair[0]}.".startswith(f"{self.running}.")]
            name, own = inside[0] if inside else owners[0]
            name = self.running if inside and self.running else name
            whole = isinstance(self.modules[name], (*WHOLE, nn.RNNCellBase))
            layer = Layer(name, (name,) if whole else (name, own))
            self._weights[key] = Tag(weight=True, layer=layer)
        return self._weights[key]

    def renewed(self, tag: Tag, units: Tensor | None, dim: int, layer: Layer) -> Tag:
        """Return the tag of the output of a layer that numbers its units."""
        self.age += 1
        source = layer.source
        if not source:  # a constant, or a layer made in this pass
            self.nameless += 1
            source = ("", str(self.nameless))
        layer = Layer(layer.name, source, dim, self.age)
        return tag._replace(units=units, reason="", layer=layer, near=True, weight=False)

    def enter_output(self, name: str, module: nn.Module, output: Tensor) -> None:
        """Make sure of the tag of a known layer's output, whatever operators it used."""
        tag, shape = self.tags.get(output), output.shape

        def layer() -> Tag | None:
            old = tag or Tag()
            units, dim = old.units, old.layer.dim
            if units is None:
                if isinstance(module, nn.Linear) and shape[-1] != module.out_features:
                    return tag
                dim = unit_dim(module, output)
                units = numbered(shape, dim)
            return self.renewed(old, units, dim, Layer(name, (name,)))

        self.tags[output] = self.step((name, tag, shape), layer)

    def propagate(self, operator: str, func: Any, bound: Mapping[str, Any], out: Any) -> None:
        """Tag the results ``out`` of an operator, given its arguments by name."""
        tags: list[Tag] = []
        values = [self._told(value, tags) for value in bound.values()]
        if not tags:
            return
        results = out if isinstance(out, list | tuple) else (out,)
        shapes = [
            x.shape if isinstance(x, Tensor) and id(x) not in self.owners else None for x in results
        ]
        if operator in CHOICES and not all(tag.weight for tag in tags):
            values.append(object())  # differs from all else
        found = self.step(
            (func, *bound, *values, *shapes),
            lambda: self._found(operator, func, bound, shapes, tags),
        )
        for tag, result, shape in zip(found, results, shapes, strict=True):
            if shape is not None:
                self.tags[result] = tag

    def _told(self, value: Any, tags: list[Tag]) -> Any:
        """Return of an argument what decides on tags, and append its own to ``tags``."""
        if isinstance(value, Tensor):
            tag = self.of(value)
            tags += [] if tag is None else [tag]
            return tag, value.shape, value.layout == torch.strided and value.stride()
        if isinstance(value, list | tuple):
            return tuple([self._told(item, tags) for item in value])
        return value

    def _found(
        self, operator: str, func: Any, bound: Any, shapes: Sequence[Any], tags: Sequence[Tag]
    ) -> Sequence[Tag | None]:
        """Return the tags of an operator's results that have a shape."""
        data = [tag for tag in tags if not tag.weight]
        weights = [tag for tag in tags if tag.weight]
        if not data and operator != "embedding":
            return [weights[0]] * len(shapes)
        if operator not in MOVES:
            given = operator, bound, data, weights
            return [None if shape is None else self._tag_of(*given, shape) for shape in shapes]
        first = self.of(next(iter(bound.values()))) or data[0]
        first = first._replace(data=any(tag.data for tag in data))
        none = [None] * len(shapes)
        moved = [self._moved(operator, func, bound, which) or none for which in Tag._fields[:3]]
        return [self._moved_tag(operator, first, *own) for own in zip(*moved, strict=True)]

    def _moved(self, operator: str, func: Any, bound: Mapping[str, Any], which: str) -> Any:
        """Run an operator that moves elements on their numbers: ``"units"``, ``"inputs"``, ..."""
        (name, first), *others = bound.items()
        tag = self.of(first)
        numbers: Any = None if tag is None or tag.weight else getattr(tag, which)
        if operator in ("cat", "stack"):
            numbers = self._joined(first, bound.get("dim", 0), which, operator == "cat")
        if numbers is None:
            return None
        out = func(**{name: numbers}, **tree_map_only(Tensor, Tensor.cpu, dict(others)))
        return out if isinstance(out, list | tuple) else [out]

    def _joined(self, given: Any, dim: int, which: str, cat: bool) -> list[Tensor] | None:
        """Return the numbers of tensors that are joined along a dimension."""
        pieces = [piece for piece in given if piece.numel() or piece.ndim > 1]
        tags = [self.of(piece) or Tag() for piece in pieces]
        told: list[Any] = [getattr(tag, which) for tag in tags]
        known = [own for own in told if own is not None]
        if not known:
            return None
        dim %= known[0].ndim + (not cat)
        joined = cat and any(dim in along(numbers) for numbers in known)
        if cat and which == "units" and not any(map(along, known)):  # of one unit each
            joined = all(tag.layer.dim == dim - known[0].ndim for tag in tags)
        whose = which == "whose"
        if whose or not joined:  # what has no numbers, such as a class token, gets those of others
            given = torch.zeros((), dtype=torch.int64, device="cpu") if whose else known[0]
            pairs = zip(told, pieces, strict=True)
            told = [fitted(given, x.shape) if own is None else own for own, x in pairs]
        if any(own is None for own in told):
            return None
        start = 0
        if joined and which == "units":  # units of different tensors are different units
            for k, own in enumerate(told):
                told[k] = own + start
                start += int(core(own).max()) + 1
        return told

    def _moved_tag(self, operator: str, first: Tag, units: Any, inputs: Any, whose: Any) -> Tag:
        if units is None:
            known = first.units is not None or first.weight
            reason = f"its units were lost in {operator}" if known else first.reason
            return Tag(None, inputs, whose, first.data, reason)
        near = first.near and operator not in PICKS
        if near and operator in VIEWS and first.units is not None:
            near = core(units).numel() == core(first.units).numel()
        return first._replace(units=units, inputs=inputs, whose=whose, near=near)

    def _tag_of(
        self, operator: str, bound: Any, data: list[Tag], weights: list[Tag], shape: tuple[int, ...]
    ) -> Tag:
        first = data[0] if data else Tag(data=False)
        layer = weights[0].layer if weights else Layer(None)
        ndim = len(shape)
        if operator in SAME:
            return first
        if operator in SHAPES:
            return self._moved_tag(operator, first, *(reshaped(own, shape) for own in first[:3]))
        if operator in PRODUCTS:
            return self._product(bound, shape)
        if "convolution" in operator:
            tag = first._replace(inputs=summed(first.inputs, range(1, ndim), shape), whose=None)
            return self.renewed(tag, numbered(shape, 1), 1 - ndim, layer)
        if operator == "embedding":
            inputs = None if first.inputs is None else first.inputs.unsqueeze(-1).expand(shape)
            tag = first._replace(inputs=inputs, whose=None)
            return self.renewed(tag, numbered(shape, -1), -1, layer)
        if operator == "copy":
            given = self.of(bound["src"])
            return merged([given if given and not given.weight else first], shape)
        given = bound.get("self")
        if "dim" in bound and isinstance(given, Tensor) and tuple(given.shape) != shape:
            named = bound["dim"] if isinstance(bound["dim"], list | tuple) else [bound["dim"]]
            dims = [dim % given.ndim for dim in named if dim is not None] or range(given.ndim)
            units, inputs, whose = (summed(own, dims, shape) for own in first[:3])
            reason = first.reason if first.units is None else "its units were summed up"
            return Tag(units, inputs, whose, first.data, reason, first.layer)
        tag = merged(data, shape)
        bias = operator == "add" and len(data) == 1 and bool(weights)
        bias = bias and all(weight.layer.name == first.layer.name for weight in weights)
        keeps = bias or "pool" in operator or "dropout" in operator
        return tag._replace(near=first.near and keeps and tag.units is not None)

    def _product(self, bound: Mapping[str, Any], shape: tuple[int, ...]) -> Tag:
        """Return the tag of a matrix product; new units lie along the weight's free dimension."""
        left, right = [x for x in bound.values() if isinstance(x, Tensor)][-2:]
        factors = []
        for tensor, along_sum, free in ((right, -2, -1), (left, -1, -2)):
            tag = self.of(tensor) or Tag(weight=True)
            if not tag.weight:
                dims = [tensor.ndim + along_sum]
                units, inputs, _ = (summed(own, dims, shape) for own in tag[:3])
                tag = tag._replace(units=units, inputs=inputs, whose=None)
            factors.append((tag, tensor, free))
        data = [tag for tag, _, _ in factors if not tag.weight]
        if not data:  # only what is added comes from the data
            return merged([self.of(bound["self"]) or Tag()], shape)
        tag = merged([own._replace(units=None) for own in data], shape)
        for own, tensor, free in factors:
            if own.weight:
                stacked = len(shape) == 3 and tensor.shape[0] > 1 and tensor.stride(0) != 0
                units = numbered(shape, 0, free) if stacked else numbered(shape, free)
                return self.renewed(tag, units, free, own.layer)
        for own in data:
            if own.units is not None:
                return tag._replace(units=own.units, layer=own.layer)
        return tag._replace(reason="it is a product of two activations")
