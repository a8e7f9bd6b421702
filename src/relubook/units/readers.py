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

from relubook.units import _numbers
from relubook.units._numbers import Tag
from relubook.units.sites import Site, SiteFinder, hook, tensors_in

# GPT-2's linear layer in transformers, with a weight of shape (inputs, outputs).
Conv1D = _numbers.told_by(lambda x: type(x).__name__ == "Conv1D" and hasattr(x, "nf"))
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
REPAIRED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
LAYERS = (*REPAIRED, *TRANSPOSED)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm, _numbers.FrozenBatchNorm)
NORMS = (*BATCH_NORMS, nn.modules.instancenorm._InstanceNorm)
ALONE = _numbers.SAME | _numbers.SHAPES | {"mul", "native_dropout", "constant_pad_nd", "own"}
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
        self._inside = self._rectifies = False

    def trace(self, model: nn.Module, batch: Any, training: bool = False) -> None:
        """Run the model on a batch, and leave no trace."""
        with self.attached(model):
            model.train(training)
            self.begin(0, ())
            with self:
                out = run(model, batch)
            for x in tensors_in(out):
                self._end(self._tag(x).whose, "the model's output")

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
        tag, dim = self._tag(x), _numbers.unit_dim(module, x)
        self.made_by[name] = tag.lost or "something"
        if tag.whose is None:
            return
        columns = _numbers.core(tag.whose).movedim(dim, 0).flatten(1).expand(x.shape[dim], -1)
        whose, last = columns.amin(1), columns.amax(1)
        if isinstance(module, LAYERS):
            self._end(columns[whose != last], f"{name!r} together with others")
            self._end(whose if name in self.reads else whose[whose < 0], repr(name))
            values = x.movedim(dim, 0).flatten(1).double().cpu()
            self.reads.setdefault(name, (whose * (whose == last), values.amin(1), values.amax(1)))
            return
        for way in self._ways(tag.whose):
            if torch.equal(whose, -way.first - torch.arange(len(whose), device="cpu")):
                way.before = name

    def _leave(self, name: str, module: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        self._inside = False
        given = self._tag(next(tensors_in((args, kwargs))))
        if isinstance(module, LAYERS):
            units = _numbers.numbered(out.shape, _numbers.unit_dim(module, out))
            given = Tag(whose=-self.ways[name].first - units)
        self._numbers.tags[out] = self._tag(out)._replace(whose=given.whose, lost=given.lost)
        if isinstance(module, NORMS):
            for way in self._ways(given.whose):
                least = out.movedim(_numbers.unit_dim(module, out), 0).flatten(1).amin(1)
                way.norms.append(least.double().cpu())

    def _ways(self, numbers: Any) -> list[Way]:
        """Return the ways of the layers whose units are among the numbers."""
        if numbers is None:
            return []
        ways = [Way(0), *self.ways.values()]
        return [ways[k] for k in (_numbers.core(numbers).abs() // LAYER).unique().tolist()]

    def _end(self, numbers: Any, what: str) -> None:
        """Note that units go where they may mix with others."""
        for way in self._ways(numbers):
            way.ends.append((_numbers.core(numbers).unique(), what))

    def observe(self, site: Site, x: Tensor, out: Tensor) -> None:
        """Take note that the operator under way, or an own activation, is a rectifier."""
        self._rectifies, tag = True, self._tag(x)
        self.made_by[site.key[0]] = tag.lost or "something"
        for way in self._ways(tag.whose):
            fires = site.per_unit(site.kind.fires(x, out), "amax").cpu()
            way.fires[site.key] = fires | way.fires.get(site.key, torch.zeros_like(fires))

    def passed(self, operator: str, func: Any, bound: Mapping[str, Any], out: Any) -> None:
        """Let the numbers go along with what an operator returns, unless it may mix units."""
        given = [self._tag(x) for x in tensors_in(bound)]
        super().passed(operator, func, bound, out)
        rectifies, self._rectifies = self._rectifies, False
        if self._inside:
            return
        self.outside |= {id(x) for x in tensors_in(bound) if isinstance(x, nn.Parameter)}
        known = [tag.whose for tag in given if tag.whose is not None]
        words = [tag.lost for tag in given if tag.lost]
        if not (known or words):
            return
        running, what = self._numbers.running, f"{operator}()"
        data = [tag for tag in given if tag.data and not tag.weight]
        if operator in ("add", "sub", "rsub") and len(data) > 1:
            what, words = "a sum (a residual connection)", []
        elif running and not list(self._modules[running].children()):
            what = f"{running!r} ({type(self._modules[running]).__name__})"
        tags = self._numbers.tags
        results = [x for x in tensors_in(out) if x in tags]
        kept = bool(known and results) and all(tags[x].whose is not None for x in results)
        if kept and not rectifies:
            kept = self._alone(operator, func, bound, given, tags[results[0]].whose)
        for x in results:
            whose: Any = tags[x].whose if kept else None
            whose = whose.abs() if kept and rectifies else whose
            tags[x] = tags[x]._replace(whose=whose, lost="" if kept else [*words, what][0])
        for whose in [] if kept else known:
            self._end(whose.abs() if self._own else whose, what)

    def _alone(self, operator: str, func: Any, bound: Any, given: list[Tag], whose: Tensor) -> bool:
        """Whether an operator whose results have numbers moves units, or acts on each alone."""
        first = next(iter(bound.values()))
        if operator in _numbers.MOVES:  # unless units choose what is picked
            return all(tag.whose is None for tag in given[len(list(tensors_in(first))) :])
        if spatial := re.search(r"(?:pool|pad|upsample\w*?)(\d)d", operator):
            dims = range(whose.ndim - int(spatial[1]), whose.ndim)
            return set(dims).isdisjoint(_numbers.along(whose))
        if (
            operator in ALONE
            or "keepdim" in bound
            or ("dim" in bound and first.shape != whose.shape)
        ):
            return True
        fired = self._own is not None or bool((whose >= 0).all())
        others = any(tag.data and not tag.weight for tag in given if tag.whose is None)
        pointwise = torch.Tag.pointwise in func.tags or operator == "masked_fill"
        return pointwise and fired and not others

    def _tag(self, x: Tensor) -> Tag:
        return self._numbers.of(x) or Tag(data=False)

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
