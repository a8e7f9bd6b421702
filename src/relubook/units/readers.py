"""Find the layers that read a layer's units, by numbers that go along with the units' outputs.

Each unit of each linear layer and convolution has a number, negative before its rectifier and
positive behind it. Operators that move elements move their numbers, what acts on each unit alone
keeps them, and with anything else the units' way ends; a layer reads them in its input columns.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from relubook.units import _numbers
from relubook.units.sites import Site, SiteFinder, hook, tensors_in

# GPT-2's linear layer in transformers, with a weight of shape (inputs, outputs).
Conv1D = _numbers.told_by(lambda x: type(x).__name__ == "Conv1D" and hasattr(x, "nf"))
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
REPAIRED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
LAYERS = (*REPAIRED, *TRANSPOSED)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm, _numbers.FrozenBatchNorm)
NORMS = (*BATCH_NORMS, nn.modules.instancenorm._InstanceNorm)
ALONE = {*_numbers.SAME, "mul", "native_dropout", "constant_pad_nd"}  # act on each unit alone
LAYER = 2**32  # a unit's number is that of its layer, from 1, times this, plus its index there


class Unpaired(Exception):  # noqa: N818  (a finding, not an error)
    """A site cannot be repaired; the text is the reason that the reader sees."""


@dataclass
class Sink:
    """A layer whose weights for some input columns are to become zero."""

    name: str
    module: Any
    columns: Tensor  # bool, (inputs,): which of them the silent units reach
    constant: Tensor  # float64, (inputs,): what these hold then

    def __post_init__(self) -> None:
        self.is_folded = bool((self.constant != 0).any())


@dataclass
class Plan:
    """One site's repair: the layer and norm that start anew, and the sinks that are cut."""

    site: str
    producer: str
    layer: Any
    units: Tensor
    before: tuple[str, Any] | None
    sinks: list[Sink]
    alive: bool = False  # whether some of its units are not silent

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the parameters that the repair changes."""
        owners = [(self.producer, self.layer, True)]
        owners += [(*self.before, True)] if self.before else []
        owners += [(sink.name, sink.module, sink.is_folded) for sink in self.sinks]
        for name, module, with_bias in owners:
            for kind in ("weight", "bias") if with_bias else ("weight",):
                if (parameter := module._parameters.get(kind)) is not None:
                    yield f"{name}.{kind}".lstrip("."), parameter


@dataclass
class Way:
    """Where the outputs of a layer go."""

    first: int  # the number of its first unit
    before: str | None = None  # the norm in front of its rectifier
    norms: list[Tensor] = field(default_factory=list)  # what those behind it gave, least by channel
    fires: dict[Any, Tensor] = field(default_factory=dict)  # by its rectifiers' keys: which units
    ends: list[tuple[Tensor, str]] = field(default_factory=list)  # units, and who gets them


def find_readers(
    model: nn.Module, sites: Sequence[Any], batch: Any, chosen: Mapping[str, Tensor], **options: Any
) -> tuple[list[Plan], dict[str, str]]:
    """Say of each site how to repair its chosen units, or why not; ValueError for lost layers."""
    ill = [site for site in sites if bool(chosen[site.name].any())]
    tracer, training = Tracer(model, **options), Tracer(model, **options)
    for site in sites:
        if site.producer not in (None, *tracer.ways):
            claim = f"the report's site {site.name!r} names the layer {site.producer!r}"
            raise ValueError(f"{claim}, which the model does not have: diagnose this model")
    if ill:
        tracer.trace(model, batch)
        try:
            training.trace(model, batch, training=True)
        except Exception:  # a model may not run in training mode on a batch alone
            training = tracer
    plans, reasons = [], dict[str, str]()
    for site in ill:
        try:
            plan = tracer.plan(site, chosen[site.name].detach().cpu())
            cut = {sink.name: sink.columns.tolist() for sink in plan.sinks}
            if training.readers(plan.producer, plan.units) != cut:
                raise Unpaired("its units go other ways in training than in evaluation mode")
            plans.append(plan)
        except Unpaired as reason:
            reasons[site.name] = str(reason)
    return plans, reasons


def run(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, a tuple that starts with one, or keyword arguments."""
    inputs = batch[0] if type(batch) in (tuple, list) else batch
    device = next((p.device for p in model.parameters()), None)
    if isinstance(inputs, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return model(inputs.to(device) if hasattr(inputs, "to") else inputs)


def is_plain(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a module is of one of the kinds and computes what that kind computes."""
    forward = getattr(type(module), "forward", None)
    return any(isinstance(module, k) and forward is getattr(k, "forward", forward) for k in kinds)


def turned(layer: Any, tensor: Tensor) -> Tensor:
    """Return a view of a layer's weight, or of what has its shape, with the outputs first."""
    return tensor.T if isinstance(layer, Conv1D) and tensor.ndim == 2 else tensor


class Tracer(SiteFinder):
    """Follows the units of all layers through one pass."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.ways = {name: Way(k * LAYER) for k, name in enumerate(self._modules, 1)}
        self.reads: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.calls: Counter[str] = Counter()
        self.made_by: dict[str, str] = {}  # what lies between a norm, or a site, and the layers
        self.outside: set[int] = set()  # ids of parameters that are used outside of their modules
        self._parameters = list(model.named_parameters(remove_duplicate=False))
        self._of = WeakTensorKeyDictionary()  # a tensor's numbers, or what they were lost to
        self._inside = self._rectifies = False

    def trace(self, model: nn.Module, batch: Any, training: bool = False) -> None:
        """Run the model on a batch, and leave no trace."""
        with self.attached(model):
            model.train(training)
            self.begin(0, ())
            with self:
                out = run(model, batch)
        for x in tensors_in(out):
            self._end(self._of.get(x), "the model's output")

    def attach(self) -> None:
        """Register the hooks, those of layers and norms next to their own code."""
        super().attach()
        for name, module in self._modules.items():
            if is_plain(module, (*LAYERS, *NORMS)):
                enter, leave = hook(self._enter, name), hook(self._leave, name)
                self._handles += [
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, with_kwargs=True, prepend=True),
                ]

    def _enter(self, name: str, module: Any, args: Any, kwargs: Any) -> None:
        self._inside = True
        self.calls[name] += 1
        x = next(tensors_in((args, kwargs)))
        numbers, dim = self._of.get(x), _numbers.unit_dim(module, x)
        self.made_by[name] = numbers if isinstance(numbers, str) else "something"
        if not isinstance(numbers, Tensor):
            return
        columns = _numbers.core(numbers).movedim(dim, 0).flatten(1).expand(x.shape[dim], -1)
        whose, last = columns.amin(1), columns.amax(1)
        if isinstance(module, LAYERS):
            self._end(columns[whose != last], f"{name!r} together with others")
            self._end(whose if name in self.reads else whose[whose < 0], repr(name))
            values = x.movedim(dim, 0).flatten(1).double().cpu()
            self.reads.setdefault(name, (whose * (whose == last), values.amin(1), values.amax(1)))
            return
        for way in self._ways(numbers):
            if torch.equal(whose, -way.first - torch.arange(len(whose), device="cpu")):
                way.before = name

    def _leave(self, name: str, module: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        self._inside = False
        if isinstance(module, LAYERS):
            units = _numbers.numbered(out.shape, _numbers.unit_dim(module, out))
            self._of[out] = -self.ways[name].first - units
        elif (numbers := self._of.get(next(tensors_in((args, kwargs))))) is not None:
            self._of[out] = numbers
            for way in self._ways(numbers):
                least = out.movedim(_numbers.unit_dim(module, out), 0).flatten(1).amin(1)
                way.norms.append(least.double().cpu())

    def _ways(self, numbers: Any) -> list[Way]:
        """Return the ways of the layers whose units are among the numbers."""
        if not isinstance(numbers, Tensor):
            return []
        ways = [Way(0), *self.ways.values()]
        return [ways[k] for k in (_numbers.core(numbers).abs() // LAYER).unique().tolist()]

    def _end(self, numbers: Any, what: str) -> None:
        """Note that units go where they may mix with others."""
        for way in self._ways(numbers):
            way.ends.append((_numbers.core(numbers).unique(), what))

    def observe(self, site: Site, x: Tensor, out: Tensor) -> None:
        """Take note that the operator under way, or an own activation, is a rectifier."""
        self._rectifies, numbers = True, self._of.get(x)
        self.made_by[site.key[0]] = numbers if isinstance(numbers, str) else "something"
        for way in self._ways(numbers):
            fires = site.per_unit(site.kind.fires(x, out), "amax").cpu()
            way.fires[site.key] = fires | way.fires.get(site.key, torch.zeros_like(fires))

    def passed(self, operator: str, func: Any, bound: Mapping[str, Any], out: Any) -> None:
        """Let the numbers go along with what an operator returns."""
        rectifies, self._rectifies = self._rectifies, False
        if self._inside:
            return
        given = list(tensors_in(bound))
        self.outside |= {id(x) for x in given if isinstance(x, nn.Parameter)}
        known = [x for x in given if isinstance(self._of.get(x), Tensor)]
        words = [old for x in given if isinstance(old := self._of.get(x), str)]
        if not (known or words) or operator.endswith("_like") or operator.startswith("new_"):
            return
        running = self._stack[-1][0] if self._stack else ""
        what = f"{operator}()"
        if operator in ("add", "sub", "rsub") and sum(map(self._is_data, given)) > 1:
            what, words = "a sum (a residual connection)", []
        elif running and not list(self._modules[running].children()):
            what = f"{running!r} ({type(self._modules[running]).__name__})"
        results = list(tensors_in(out))
        kept = self._kept(operator, func, bound, known, rectifies, results)
        if not kept:
            kept = words or [what]
            for x in known:
                self._end(self._of[x].abs() if self._own else self._of[x], what)
        for k, result in enumerate(results):
            numbers: Any = kept[k % len(kept)]  # pooling returns indices too
            flips = rectifies and isinstance(numbers, Tensor)
            self._of[result] = numbers.abs() if flips else numbers

    def _kept(
        self, operator: str, func: Any, bound: Any, known: list[Tensor], flips: bool, results: Any
    ) -> list[Any]:
        """Return the numbers of an operator's results; none if it may mix units."""
        if not (known and results):
            return []
        shape = results[0].shape
        (name, first), *others = bound.items()
        if operator in _numbers.VIEWS or operator in _numbers.PICKS:
            if any(isinstance(self._of.get(x), Tensor) for x in tensors_in(others)):
                return []  # the units choose what is picked
            moved = {name: tree_map_only(Tensor, self._numbers_of, first)}
            out = func(**moved, **tree_map_only(Tensor, Tensor.cpu, dict(others)))
            return list(tensors_in(out))
        if operator in _numbers.SHAPES:
            return [_numbers.reshaped(self._of[first], shape)]
        dims = list[int]()
        if spatial := re.search(r"(?:pool|pad|upsample\w*?)(\d)d", operator):
            dims = list(range(first.ndim - int(spatial[1]), first.ndim))
        elif "keepdim" in bound or ("dim" in bound and first.shape != shape):
            dims = _numbers.gone(bound["dim"], first.ndim)
        elif not flips and operator not in ALONE:
            others = [x for x in tensors_in(bound) if not isinstance(self._of.get(x), Tensor)]
            pointwise = torch.Tag.pointwise in func.tags or operator == "masked_fill"
            fired = self._own is not None or bool((self._of[known[0]] >= 0).all())
            if not (pointwise and fired) or any(map(self._is_data, others)):
                return []
        fits: list[Any] = [_numbers.summed(self._of[own], dims, shape) for own in known]
        same = all(x is not None and torch.equal(x, fits[0]) for x in fits)
        return fits[:1] if same else []

    def _is_data(self, x: Tensor) -> bool:
        tag = self._numbers.of(x)
        return tag is not None and tag.data and not tag.weight

    def _numbers_of(self, x: Tensor) -> Tensor:
        none = torch.zeros((), dtype=torch.int64, device="cpu").expand(x.shape)
        return numbers if isinstance(numbers := self._of.get(x), Tensor) else none

    def readers(self, name: str, units: Tensor) -> dict[str, list[bool]]:
        """Say which input columns of which layers read some units; Unpaired if others get them."""
        way = self.ways[name]
        mine = way.first + units
        for numbers, what in way.ends:
            if bool(torch.isin(mine, numbers).any()):
                raise Unpaired(f"its units reach {what}: they have no next layer of their own")
            if bool(torch.isin(-mine, numbers).any()):
                raise Unpaired(f"what {name!r} computes goes to 2 places or more, one is {what}")
        found = {reader: torch.isin(whose, mine) for reader, (whose, _, _) in self.reads.items()}
        return {reader: columns.tolist() for reader, columns in found.items() if columns.any()}

    def plan(self, site: Any, chosen: Tensor) -> Plan:
        """Say how to repair some units of a site; Unpaired if they cannot be repaired."""
        name, before = site.producer, None
        if name is None:
            what = self.made_by.get(site.name.split("#")[0], "something")
            raise Unpaired(f"{what} lies between it and the layers: none feeds it alone")
        if isinstance(self._modules[name], NORMS):
            before = (name, self._check(name, NORMS))
            name = next((layer for layer, way in self.ways.items() if way.before == name), None)
            if name is None:
                what = self.made_by[before[0]]
                raise Unpaired(f"{what} lies between {before[0]!r} and the layers")
        layer, units = self._check(name, REPAIRED), chosen.nonzero().flatten()
        if (uses := len(self.ways[name].fires)) != 1:
            own = "" if uses else ": an activation of your own is followed if activations= names it"
            raise Unpaired(f"{name!r} feeds {uses} sites that can be followed, not 1{own}")
        outputs, dim = len(turned(layer, layer.weight)), _numbers.unit_dim(layer, chosen)
        if outputs != len(chosen) or site.unit_dim not in (dim, dim + len(site.shape)):
            where = f"its {len(chosen)} units lie along dimension {site.unit_dim}"
            raise Unpaired(f"{where}, which is not that of the {outputs} outputs of {name!r}")
        readers, norms = self.readers(name, units), self.ways[name].norms
        alive = bool((chosen & ~site.dead.cpu()).any())
        sinks = [self._sink(reader, columns, norms, alive) for reader, columns in readers.items()]
        if not sinks:
            raise Unpaired("no layer reads its units")
        plan = Plan(site.name, name, layer, units, before, sinks, alive)
        for label, parameter in plan.parameters():
            same = [n for n, p in self._parameters if p.data_ptr() == parameter.data_ptr()]
            if not parameter.requires_grad:
                raise Unpaired(f"{label!r} is frozen (requires_grad is False)")
            if id(parameter) in self.outside:
                raise Unpaired(f"{label!r} is also used outside of its layer")
            if len(same) > 1:
                raise Unpaired(f"{label!r} shares its memory with {(set(same) - {label}).pop()!r}")
        return plan

    def _sink(self, name: str, whose: list[bool], norms: list[Tensor], alive: bool) -> Sink:
        module, (_, low, high) = self._check(name, LAYERS), self.reads[name]
        columns = torch.tensor(whose, device="cpu")
        if not bool((low + high)[columns].isfinite().all()):
            raise ValueError(f"on the batch the inputs of {name!r} are not finite")
        if alive and not norms:  # small outputs, which are lost
            return Sink(name, module, columns, torch.zeros_like(low))
        even = (high - low)[columns] <= 1e-6 * torch.maximum(low.abs(), high.abs())[columns]
        sink = Sink(name, module, columns, torch.where(columns, (low + high) / 2, 0.0))
        if sink.is_folded or not bool(even.all()):
            where = f"its units, {'if small' if alive else 'while silent'}, are not 0 to {name!r}"
            if module.bias is None:
                raise Unpaired(f"{where}, which has no bias that could take over the rest")
            known = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), *norms])
            gaps = sink.constant[columns, None] - known
            even &= gaps.abs().amin(1) <= 1e-6 * sink.constant[columns].abs()
            convolves = isinstance(module, nn.modules.conv._ConvNd)
            pads = convolves and any(module._reversed_padding_repeated_twice)
            uneven = convolves and (module.transposed or (pads and module.padding_mode == "zeros"))
            if uneven or not bool(even.all()):
                raise Unpaired(f"{where}, nor the same constant everywhere")
        return sink

    def _check(self, name: str, kinds: tuple[type, ...]) -> Any:
        module = self._modules[name]
        if not is_plain(module, kinds):
            kind = type(module).__name__
            raise Unpaired(f"{name!r} is a {kind}; linear layers and convolutions can be repaired")
        held = {**module._parameters, **module._buffers}
        if any(k in dir(module) and k not in held for k in ("weight", "bias")):
            why = "computed from other parameters (a parametrization, weight norm or pruning)"
            raise Unpaired(f"the weight of {name!r} is {why}: remove that first")
        if self.calls[name] != 1:
            raise Unpaired(f"{name!r} is called {self.calls[name]} times")
        return module
