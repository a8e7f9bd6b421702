"""Find the layers that read a layer's units, and what a silent unit is when it gets there."""

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from relubook.units.sites import undisturbed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, *TRANSPOSED)
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

# What a node may do between a rectifier and the next layer. "same" keeps every value, "constant"
# keeps a constant channel constant (whatever the constant), "zero" keeps a channel of zeros, and
# the pools work along positions, which a linear layer's output does not have.
_SAME_CALLS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "clone"}
_ZERO_CALLS = {"relu", "relu_", "relu6", "square", "tanh", "gelu", "silu", "to", "type_as"}
_POOL_CALLS = {
    f"{kind}_pool{n}d": rule
    for n in (1, 2, 3)
    for kind, rule in (
        ("max", "constant"),
        ("adaptive_max", "constant"),
        ("adaptive_avg", "constant"),
        ("avg", "zero"),
    )
}
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_ZERO_MODULES = (nn.ReLU, nn.ReLU6, nn.Tanh, nn.GELU, nn.SiLU)
_SHAPE_READS = {"size", "dim", "ndimension", "numel", "__len__", "len"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda"}


class SiteReport(Protocol):
    """What :func:`revive_` reads of one site of a report."""

    name: str
    kind: str
    producer: str | None
    dead: Tensor
    unit_dim: int | tuple[int, ...]
    silences: bool
    shape: tuple[int, ...]


class Report(Protocol):
    """What :func:`revive_` reads of a report."""

    @property
    def sites(self) -> Sequence[Any]:
        """The sites in execution order."""


@dataclass(frozen=True)
class Pair:
    """Where a layer's units go, for a model whose graph cannot be read.

    By naming a pair you vouch for the path: producer, ``before``, rectifier, ``after``, consumers,
    and besides these nothing but dropout, pooling of positions without padding, and flattening.

    Args:
        consumers: Qualified names of the layers that read the units. All of them.
        before: Name of the batch norm between the producer and the rectifier.
        after: Name of the batch norm between the rectifier and the consumers.
    """

    consumers: str | Sequence[str]
    before: str | None = None
    after: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The consumers' names."""
        return (self.consumers,) if isinstance(self.consumers, str) else tuple(self.consumers)


# --- what is to be done -----------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """A site with dead units that was left as it was.

    Attributes:
        site: Name of the site in the report.
        units: Number of its dead units.
        reason: Why they could not be revived, and what would help.
    """

    site: str
    units: int
    reason: str


@dataclass
class Stream:
    """Where dead units are on their way from the rectifier to the next layers.

    ``index`` are their positions among ``width`` channels (or features, with ``last``); once
    flattened, each channel has k adjacent columns, or with ``last`` k columns ``width`` apart.
    There are ``positions`` dimensions of positions (2 for images). ``constant`` is what the units
    are while silent: ``(units, 1)``, or ``(units, k)`` once flattened. With ``rows`` (and
    ``last``) there is a dimension between batch and features, which a batch norm would take for
    the channels.
    """

    index: Tensor
    width: int
    last: bool
    constant: Tensor
    positions: int = 0
    flat: bool = False
    rows: bool = False

    def columns(self, size: int) -> Tensor:
        """Positions among ``size`` inputs, ``(units, size // width)``."""
        if not self.flat:
            return self.index[:, None]
        k = torch.arange(size // self.width)
        if self.last:
            return self.index[:, None] + self.width * k
        return self.index[:, None] * (size // self.width) + k

    def fits(self, size: int) -> bool:
        """Whether ``size`` inputs can be these channels."""
        return size % self.width == 0 if self.flat else size == self.width


@dataclass
class Sink:
    """A consumer whose weights, or a norm whose scale, for these units is to become zero."""

    name: str
    module: nn.Module
    stream: Stream

    @property
    def is_gate(self) -> bool:
        """Whether it is a norm, not a layer."""
        return isinstance(self.module, NORMS)

    @property
    def is_folded(self) -> bool:
        """Whether the silent units' constants go into the consumer's bias."""
        return not self.is_gate and bool((self.stream.constant != 0).any())


@dataclass
class Plan:
    """One site's repair: the layer and norm that start anew, and the sinks that are cut."""

    site: str
    producer: str
    layer: Any
    units: Tensor
    before: tuple[str, Any] | None = None
    reads_rectifier: bool = False
    sinks: list[Sink] = field(default_factory=list)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the parameters that the repair changes."""
        for kind in ("weight", "bias"):
            yield from _named(self.producer, self.layer, kind)
            if self.before:
                yield from _named(*self.before, kind)
            for sink in self.sinks:
                if kind == "weight" or sink.is_gate or sink.is_folded:
                    yield from _named(sink.name, sink.module, kind)


def _named(name: str, module: nn.Module, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
    parameter = module._parameters.get(kind)
    if parameter is not None:
        yield (f"{name}.{kind}" if name else kind), parameter


class Unpaired(Exception):  # noqa: N818  (a finding, not an error)
    """A path cannot be followed; the text is the reason that the reader sees."""


def plan_repairs(
    model: nn.Module,
    report: Report,
    pairs: Mapping[str, str | Sequence[str] | Pair] | None,
) -> tuple[list[Plan], list[Left]]:
    """Say for every site with dead units how to repair it, or why not. Changes nothing."""
    given = _read_pairs(model, report, pairs)
    modules = dict(model.named_modules())
    graphs = _Graphs(model)
    uses: dict[str, int] = {}
    for site in report.sites:
        if site.producer is not None:
            uses[site.producer] = uses.get(site.producer, 0) + 1
    plans: list[Plan] = []
    left: list[Left] = []
    for site in report.sites:
        units = torch.nonzero(site.dead.detach().cpu()).flatten()
        if not len(units):
            continue
        try:
            key = next((k for k, p in given.items() if _names(k, p, site)), None)
            pair = None if key is None else given[key]
            if site.producer is None and pair is None:
                raise Unpaired("no layer with weights was seen to feed it")
            if site.producer is not None and site.producer not in modules:
                raise ValueError(
                    f"the report's site {site.name!r} names the layer {site.producer!r}, which the "
                    "model does not have: diagnose this model"
                )
            if not site.silences:
                raise Unpaired(f"{site.kind} has no input on which it is silent")
            if site.producer is not None and uses[site.producer] > 1:
                raise Unpaired(
                    f"{site.producer!r} feeds {uses[site.producer]} rectifier sites, so its units "
                    "cannot be changed for one of them"
                )
            if key is None or pair is None:
                plan = _from_graphs(model, graphs, site, units)
            else:
                plan = _from_pair(modules, site, units, pair, key)
            _check_parameters(model, plan)
        except Unpaired as reason:
            left.append(Left(site.name, len(units), str(reason)))
        else:
            plans.append(plan)
    return plans, left


def _names(key: str, pair: Pair, site: SiteReport) -> bool:
    """Whether a pair was given for a site: by its name, its layer's, or that of the norm."""
    return key in (site.name, site.producer) or pair.before == (site.producer or ())


def outputs_of(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def inputs_of(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether a module is of one of the kinds and computes what that kind computes."""
    forward = type(module).forward
    return any(isinstance(module, k) and forward is getattr(k, "forward", None) for k in kinds)


def _check_layer(name: str, module: nn.Module) -> None:
    if not _is_plain(module, _LAYERS):
        raise Unpaired(
            f"{name!r} is a {type(module).__name__}; linear layers and convolutions can be repaired"
        )
    if module._parameters.get("weight") is None:
        raise Unpaired(
            f"the weight of {name!r} is computed from other parameters (a parametrization, weight "
            "norm or pruning): remove that first"
        )


def _check_units(name: str, layer: Any, site: Any) -> None:
    if outputs_of(layer) != site.dead.numel():
        raise Unpaired(
            f"it has {site.dead.numel()} units, but {name!r} has {outputs_of(layer)} outputs"
        )
    channels = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
    if site.unit_dim not in (channels, channels + len(site.shape)):
        raise Unpaired(
            f"its units lie along dimension {site.unit_dim}, not the channels of {name!r}"
        )


def _check_parameters(model: nn.Module, plan: Plan) -> None:
    everything = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in plan.parameters():
        if not parameter.requires_grad:
            raise Unpaired(f"{name!r} is frozen (requires_grad is False)")
        for other, twin in everything:
            if other != name and _overlap(parameter, twin):
                raise Unpaired(f"{name!r} shares its memory with {other!r}")


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.device != b.device or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    start, stop = _extent(a)
    other_start, other_stop = _extent(b)
    return start < other_stop and other_start < stop


def _extent(t: Tensor) -> tuple[int, int]:
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    return t.data_ptr(), t.data_ptr() + (span * t.element_size() if t.numel() else 0)


# --- explicit pairs ---------------------------------------------------------------------------


def _read_pairs(
    model: nn.Module,
    report: Report,
    pairs: Mapping[str, str | Sequence[str] | Pair] | None,
) -> dict[str, Pair]:
    modules = dict(model.named_modules())
    sites = {site.name for site in report.sites}
    read: dict[str, Pair] = {}
    for producer, value in (pairs or {}).items():
        if producer not in modules and producer not in sites:
            raise KeyError(f"pairs names {producer!r}, neither a layer of the model nor a site")
        pair = value if isinstance(value, Pair) else Pair(value)
        for name in (*pair.names, pair.before, pair.after):
            if name is not None and name not in modules:
                raise KeyError(f"pairs[{producer!r}] names {name!r}, which the model does not have")
        for name in pair.names:
            if not isinstance(modules[name], _LAYERS):
                raise TypeError(
                    f"pairs[{producer!r}] names {name!r}, a {type(modules[name]).__name__}; a "
                    "consumer is a linear layer or a convolution"
                )
        for name in (pair.before, pair.after):
            if name is not None and not isinstance(modules[name], NORMS):
                raise TypeError(
                    f"pairs[{producer!r}] names {name!r}, a {type(modules[name]).__name__}; what "
                    "may stand in between is a batch or instance norm"
                )
        if not pair.names:
            raise ValueError(f"pairs[{producer!r}] names no consumer")
        read[producer] = pair
    return read


def _from_pair(
    modules: dict[str, nn.Module],
    site: Any,
    units: Tensor,
    pair: Pair,
    key: str,
) -> Plan:
    name = key if key in modules else site.producer
    layer = modules[name]
    _check_layer(name, layer)
    _check_units(name, layer, site)
    plan = Plan(site.name, name, layer, units)
    if pair.before is not None:
        norm: Any = modules[pair.before]
        if norm.num_features != outputs_of(layer):
            raise ValueError(
                f"pairs[{name!r}]: {pair.before!r} has {norm.num_features} features, but {name!r} "
                f"has {outputs_of(layer)} outputs"
            )
        plan.before = (pair.before, norm)
    stream = _start(layer, units, site.shape)
    for consumer in pair.names:
        target: Any = modules[consumer]
        _check_layer(consumer, target)
        flat = isinstance(target, nn.Linear) and (
            not stream.last or target.in_features != stream.width
        )
        arriving = replace(stream, flat=bool(flat))
        mixed = isinstance(layer, nn.Linear) and not isinstance(target, nn.Linear)
        if mixed or not arriving.fits(inputs_of(target)):
            raise ValueError(
                f"pairs[{name!r}]: {consumer!r} has {inputs_of(target)} inputs, which does not fit "
                f"the {outputs_of(layer)} outputs of {name!r}"
            )
        gate: Sink | None = None
        if pair.after is not None:
            norm = modules[pair.after]
            norm_stream = replace(stream, flat=norm.num_features != stream.width)
            if not norm_stream.fits(norm.num_features):
                raise ValueError(
                    f"pairs[{name!r}]: {pair.after!r} has {norm.num_features} features, which does "
                    f"not fit the {outputs_of(layer)} outputs of {name!r}"
                )
            after = _through_norm(norm_stream, norm)
            gate = _gate(pair.after, norm, after)
            arriving = replace(after, flat=bool(flat))
        try:
            plan.sinks.append(_consume(consumer, target, arriving))
        except Unpaired:
            if gate is None:
                raise
            plan.sinks = [gate]
            break
    return plan


# --- pairs read from the graph ----------------------------------------------------------------


class _Graphs:
    """The graphs of a model, or of its parts, in one mode; traced when first asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.traced: dict[tuple[str, bool], fx.Graph | None] = {}

    def scopes(self, name: str) -> Iterator[str]:
        """Names of the modules around ``name``, the model first."""
        parts = name.split(".")
        for i in range(len(parts)):
            yield ".".join(parts[:i])

    def graph(self, scope: str, training: bool) -> fx.Graph | None:
        key = scope, training
        if key not in self.traced:
            self.traced[key] = _trace(self.modules[scope], training)
        return self.traced[key]

    def around(self, name: str) -> tuple[str, fx.Graph] | None:
        """The largest traceable part around a module, and its graph in evaluation mode."""
        for scope in self.scopes(name):
            graph = self.graph(scope, training=False)
            if graph is not None:
                return scope, graph
        return None


def _trace(module: nn.Module, training: bool) -> fx.Graph | None:
    """Trace a module without leaving anything behind in it; None if that does not work."""
    with undisturbed(module), _kept(module):
        module.train(training)
        for part in module.modules():  # a user's hooks are not to meet symbols
            part._forward_hooks = OrderedDict()
            part._forward_pre_hooks = OrderedDict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return fx.Tracer().trace(module, concrete_args=_defaults(module) or None)
            except Exception:  # whatever the model's code raises on symbols
                return None


def _defaults(module: nn.Module) -> dict[str, Any]:
    """The defaults of forward's optional arguments: the path taken when they are not given."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Put back every attribute of every submodule: tracing runs the model's own Python code."""
    containers = (dict, list, set)
    saved = [
        (m, dict(m.__dict__), {k: v.copy() for k, v in m.__dict__.items() if type(v) in containers})
        for m in module.modules()
    ]
    try:
        yield
    finally:
        for m, attributes, contents in saved:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for key, content in contents.items():
                held = m.__dict__[key]
                if isinstance(held, list):
                    held[:] = content
                else:
                    held.clear()
                    held.update(content)


def _from_graphs(model: nn.Module, graphs: _Graphs, site: Any, units: Tensor) -> Plan:
    known = _transformer_layer(graphs.modules, site, units)
    if known is not None:
        return known
    found = graphs.around(site.producer)
    if found is None:
        raise Unpaired("the model's graph cannot be read: name the next layer in pairs=")
    scope, graph = found
    plan = _Walk(graphs, scope, graph).plan(site, units)
    training = graphs.graph(scope, training=True)
    if training is not None:
        other = _Walk(graphs, scope, training).plan(site, units)
        if other.before != plan.before or {x.name for x in other.sinks} != {
            x.name for x in plan.sinks
        }:
            raise Unpaired("its units go other ways in training than in evaluation mode")
    return plan


def _transformer_layer(modules: dict[str, nn.Module], site: Any, units: Tensor) -> Plan | None:
    """Torch's transformer layers, whose forward cannot be traced: linear1, rectifier, linear2."""
    parent, _, child = site.producer.rpartition(".")
    owner = modules[parent]
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    if child != "linear1" or not _is_plain(owner, kinds):
        return None
    consumer = f"{parent}.linear2" if parent else "linear2"
    for name in (site.producer, consumer):
        _check_layer(name, modules[name])
    layer = modules[site.producer]
    _check_units(site.producer, layer, site)
    plan = Plan(site.name, site.producer, layer, units)
    plan.sinks = [_consume(consumer, modules[consumer], _start(layer, units, site.shape))]
    return plan


def _start(layer: Any, units: Tensor, shape: tuple[int, ...]) -> Stream:
    zero = torch.zeros(len(units), 1, dtype=torch.float64)
    positions = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    last = isinstance(layer, nn.Linear)
    return Stream(units, outputs_of(layer), last, zero, positions, rows=last and len(shape) > 2)


class _Walk:
    """Follow a layer's units through one graph to the layers that read them."""

    def __init__(self, graphs: _Graphs, scope: str, graph: fx.Graph) -> None:
        self.scope = scope
        self.graph = graph
        self.inside = dict(graphs.modules[scope].named_modules())
        self.names = {id(m): name for name, m in reversed(graphs.modules.items())}
        self.calls: dict[int, int] = {}
        self.read: set[int] = set()
        for node in graph.nodes:
            if node.op == "call_module":
                module = self.module(node)
                self.calls[id(module)] = self.calls.get(id(module), 0) + 1
            elif node.op == "get_attr" and self.users(node):  # not for its dtype only
                owner, _, attribute = str(node.target).rpartition(".")
                value = getattr(self.inside.get(owner), attribute, None)
                self.read.add(id(value))

    def module(self, node: fx.Node) -> nn.Module:
        return self.inside[str(node.target)]

    def name(self, node: fx.Node) -> str:
        return self.names[id(self.module(node))]

    def plan(self, site: Any, units: Tensor) -> Plan:
        layer: Any = dict.get(self.inside, _strip(site.producer, self.scope))
        nodes = [n for n in self.graph.nodes if n.op == "call_module" and self.module(n) is layer]
        if len(nodes) != 1:
            raise Unpaired(
                f"{site.producer!r} is called {len(nodes)} times"
                if nodes
                else f"{site.producer!r} is not seen in the model's graph: name the next layer in "
                "pairs="
            )
        node = nodes[0]
        if _is_plain(layer, NORMS):
            node = self.source(node)
        name, layer = self.name(node), self.module(node)
        _check_layer(name, layer)
        _check_units(name, layer, site)
        self.check_called_once(name, layer)
        plan = Plan(site.name, name, layer, units)
        plan.reads_rectifier = self.is_rectified(_input(node))
        rectifier = self.rectifier(node, plan, len(site.shape))
        plan.sinks = self.follow(rectifier, _start(layer, units, site.shape))
        if not plan.sinks:
            raise Unpaired("nothing reads its output")
        return plan

    def source(self, norm: fx.Node) -> fx.Node:
        """The layer in front of a norm."""
        node = _input(norm)
        if not isinstance(node, fx.Node) or node.op != "call_module":
            raise Unpaired(f"what feeds {self.name(norm)!r} is not one layer")
        return node

    def check_called_once(self, name: str, module: nn.Module) -> None:
        if self.calls[id(module)] > 1:
            raise Unpaired(f"{name!r} is called {self.calls[id(module)]} times")
        if any(id(p) in self.read for p in module.parameters(recurse=False)):
            raise Unpaired(f"the parameters of {name!r} are also used outside of it")

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if not _reads_shape(user)]

    def rectifier(self, node: fx.Node, plan: Plan, ndim: int) -> fx.Node:
        """Go from the layer to its rectifier, noting the norm in between."""
        while True:
            users = self.users(node)
            if len(users) != 1:
                raise Unpaired(
                    f"what {plan.producer!r} computes goes to {len(users)} places, not to one "
                    "rectifier"
                )
            node = users[0]
            if self.is_rectifier(node):
                return node
            if node.op == "call_module" and _is_plain(self.module(node), NORMS):
                norm: Any = self.module(node)
                rows = isinstance(plan.layer, nn.Linear) and ndim > 2
                if plan.before or rows or norm.num_features != outputs_of(plan.layer):
                    raise Unpaired(f"{self.name(node)!r} does not normalize its units one by one")
                self.check_norm(node, norm)
                plan.before = (self.name(node), norm)
                continue
            rule = self.rule(node)
            positions = isinstance(plan.layer, nn.Linear) and self.is_pool(node)
            if rule not in ("same", "constant") or positions:
                raise Unpaired(self.mixes(node))

    def check_norm(self, node: fx.Node, norm: nn.Module) -> None:
        self.check_called_once(self.name(node), norm)
        if any(k in dir(norm) and k not in norm._parameters for k in ("weight", "bias")):
            raise Unpaired(f"the weight of {self.name(node)!r} is computed from other parameters")

    def is_rectifier(self, node: fx.Node) -> bool:
        """Whether a node is a rectifier that gives exactly 0 where it is silent."""
        if node.op == "call_module":
            module: Any = self.module(node)
            if isinstance(module, nn.Hardtanh):  # nn.ReLU6 is one
                return module.min_val == 0 and module.max_val > 0
            if isinstance(module, nn.Threshold):
                return module.value == 0
            return _is_plain(module, (nn.ReLU, nn.Hardswish))
        if node.op not in ("call_function", "call_method"):
            return False
        name, rest, kwargs = _call(node), node.args[1:], node.kwargs
        if name in ("relu", "relu_", "relu6", "hardswish"):
            return True
        if name in ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"):
            low = rest[0] if rest else kwargs.get("min")
            high = rest[1] if len(rest) > 1 else kwargs.get("max")
            return _is_zero(low) and (high is None or _is_positive(high))
        if name in ("hardtanh", "hardtanh_"):
            return _is_zero(rest[0] if rest else kwargs.get("min_val"))
        if name in ("threshold", "threshold_", "_threshold"):
            return _is_zero(rest[1] if len(rest) > 1 else kwargs.get("value"))
        return False

    def is_rectified(self, node: Any) -> bool:
        """Whether a node is a rectifier's output, and so never negative."""
        while isinstance(node, fx.Node) and not self.is_rectifier(node):
            if self.rule(node) not in ("same", "constant", "flatten", "mean"):
                return False
            node = _input(node)
        return isinstance(node, fx.Node)

    def rule(self, node: fx.Node) -> str | None:
        """What a node keeps of a silent channel (see above), or None if it may mix channels."""
        if node.op == "call_module":
            module: Any = self.module(node)
            if _is_plain(module, (nn.Identity, *_DROPOUTS)):
                return "same"
            if getattr(module, "return_indices", False):
                return None
            if _is_plain(module, _MAX_POOLS + _ADAPTIVE_POOLS):
                return "constant"
            if _is_plain(module, _AVERAGE_POOLS):
                whole = not _any(module.padding) and not module.ceil_mode
                return "constant" if whole and _divisor(module) is None else "zero"
            if _is_plain(module, _ZERO_MODULES):
                return "zero"
            return (
                "flatten"
                if _is_plain(module, (nn.Flatten,))
                and _flattens((module.start_dim, module.end_dim))
                else None
            )
        if node.op not in ("call_function", "call_method"):
            return None
        name, rest = _call(node), node.args[1:]
        if name in _SAME_CALLS:
            return "same"
        if name in _POOL_CALLS and not node.kwargs.get("return_indices"):
            return _POOL_CALLS[name]
        if name in _ZERO_CALLS:
            return "zero"
        if name in ("pow", "mul", "truediv", "div") and len(rest) == 1 and _is_positive(rest[0]):
            return "zero" if isinstance(_input(node), fx.Node) else None
        if name == "flatten":
            dims = (*rest, *(node.kwargs[k] for k in ("start_dim", "end_dim") if k in node.kwargs))
            return "flatten" if _flattens(dims) else None
        if name in ("view", "reshape"):
            return "flatten" if self.is_flat_view(node) else None
        if name == "mean":
            return "mean"
        return None

    def is_flat_view(self, node: fx.Node) -> bool:
        """Whether a view is (batch size, -1), read off its own input or the model's."""
        shape = node.args[1:]
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        if len(shape) != 2 or shape[1] != -1 or not isinstance(shape[0], fx.Node):
            return False
        size: Any = shape[0]
        if _call(size) == "size" and size.args[1:] == (0,):
            origin = size.args[0]
        elif _call(size) == "getitem" and size.args[1] == 0 and _is_shape(size.args[0]):
            origin = size.args[0].args[0]
        else:
            return False
        return origin.op == "placeholder" or self.keeps_batch(_input(node), origin)

    def keeps_batch(self, node: Any, origin: fx.Node) -> bool:
        """Whether a node comes from ``origin`` by steps that keep the first dimension."""
        while isinstance(node, fx.Node) and node is not origin:
            layer = node.op == "call_module" and _is_plain(self.module(node), _LAYERS + NORMS)
            if not layer and not self.is_rectifier(node) and self.rule(node) is None:
                return False
            node = _input(node)
        return node is origin

    def is_pool(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return _is_plain(self.module(node), _MAX_POOLS + _ADAPTIVE_POOLS + _AVERAGE_POOLS)
        return _call(node) in _POOL_CALLS

    def mixes(self, node: fx.Node) -> str:
        if node.op == "output":
            if self.scope:
                return (
                    f"its units leave {self.scope!r}, beyond which the graph cannot be read: name "
                    "the next layer in pairs="
                )
            return "its units are the model's output: they have no next layer"
        if node.op == "call_module":
            what = f"{self.name(node)!r} ({type(self.module(node)).__name__})"
        else:
            what = f"{_call(node)}()"
        return f"its units reach {what}, which may mix them with others"

    def follow(self, node: fx.Node, stream: Stream) -> list[Sink]:
        """Every layer that reads a node's channels."""
        return [sink for user in self.users(node) for sink in self.step(user, node, stream)]

    def step(self, node: fx.Node, origin: fx.Node, stream: Stream) -> list[Sink]:
        if node.op == "call_module":
            module = self.module(node)
            if isinstance(module, _LAYERS):
                _check_layer(self.name(node), module)
                self.check_called_once(self.name(node), module)
                return [_consume(self.name(node), module, stream)]
            if _is_plain(module, NORMS):
                return self.through_norm(node, module, stream)
        if node.op == "call_function" and _call(node) in ("cat", "concat", "concatenate"):
            return self.follow(node, self.joined(node, origin, stream))
        rule = self.rule(node)
        constant = bool((stream.constant != 0).any())
        positions = self.is_pool(node) or rule == "mean"
        if rule is None or (rule == "zero" and constant) or (positions and stream.last):
            raise Unpaired(self.mixes(node))
        if (positions and stream.flat) or (
            rule == "mean" and not _is_global_mean(node, stream.positions)
        ):
            raise Unpaired(self.mixes(node))
        if rule in ("flatten", "mean"):
            stream = replace(stream, flat=True)
        return self.follow(node, stream)

    def through_norm(self, node: fx.Node, norm: Any, stream: Stream) -> list[Sink]:
        name = self.name(node)
        self.check_norm(node, norm)
        if stream.rows or not stream.fits(norm.num_features):
            raise Unpaired(self.mixes(node))
        after = _through_norm(stream, norm)
        gate = _gate(name, norm, after)
        try:
            return self.follow(node, after)
        except Unpaired:
            if gate is None:
                raise
            return [gate]

    def joined(self, node: fx.Node, origin: fx.Node, stream: Stream) -> Stream:
        """The stream after a concatenation along the channels."""
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        right = dim == -1 or (dim == 1 and not stream.rows) if stream.last else dim == 1
        if not right or stream.flat or not isinstance(parts, (tuple, list)):
            raise Unpaired(self.mixes(node))
        widths = [self.width(part) for part in parts]
        if None in widths or list(parts).count(origin) != 1:
            raise Unpaired(f"{self.mixes(node)}: the width of what is joined is not known")
        offset = sum(w for w in widths[: list(parts).index(origin)] if w is not None)
        total = sum(w for w in widths if w is not None)
        return replace(stream, index=stream.index + offset, width=total)

    def width(self, node: Any) -> int | None:
        """Number of channels of a node, where the graph tells."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "call_module":
            module: Any = self.module(node)
            if isinstance(module, _LAYERS):
                return outputs_of(module)
            if isinstance(module, NORMS):
                return module.num_features
        if _call(node) in ("cat", "concat", "concatenate") and node.args:
            parts: Any = node.args[0]
            widths = [self.width(part) for part in parts]
            return None if None in widths else sum(w for w in widths if w is not None)
        keeps = self.is_rectifier(node) or self.rule(node) in ("same", "constant", "zero")
        return self.width(_input(node)) if keeps else None


def _strip(name: str, scope: str) -> str:
    return name[len(scope) + 1 :] if scope else name


def _call(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _reads_shape(node: fx.Node) -> bool:
    if _call(node) == "getattr":
        return node.args[1] in _SHAPE_ATTRIBUTES
    return _call(node) in _SHAPE_READS


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    whole = _call(node) == "size" and len(node.args) == 1
    return whole or (_call(node) == "getattr" and node.args[1] == "shape")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_zero(value: Any) -> bool:
    return _is_number(value) and value == 0


def _any(value: int | tuple[int, ...]) -> bool:
    return bool(value) if isinstance(value, int) else any(value)


def _divisor(module: nn.Module) -> int | None:
    return getattr(module, "divisor_override", None)


def _flattens(dims: Sequence[Any]) -> bool:
    return tuple(dims) in ((1,), (1, -1))


def _is_global_mean(node: fx.Node, positions: int) -> bool:
    """Whether a mean runs over all positions, such as (2, 3) or (-2, -1), and drops them."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or node.kwargs.get("keepdim") or len(node.args) > 2:
        return False
    last = list(range(-positions, 0))
    return sorted(dims) in (last, [d + positions + 2 for d in last])


# --- constants behind a norm ------------------------------------------------------------------


def _through_norm(stream: Stream, norm: Any) -> Stream:
    """What a silent channel becomes behind a batch or instance norm."""
    at = stream.columns(norm.num_features)

    def pick(tensor: Tensor | None, default: float) -> Tensor:
        if tensor is None:
            return torch.full(at.shape, default, dtype=torch.float64)
        return tensor.detach().double().cpu()[at]

    weight, bias = pick(norm.weight, 1.0), pick(norm.bias, 0.0)
    if norm.running_mean is None:  # the statistics are the channel's own: mean c, variance 0
        return replace(stream, constant=bias)
    scale = weight / (pick(norm.running_var, 1.0) + norm.eps).sqrt()
    centered = stream.constant - pick(norm.running_mean, 0.0)
    return replace(stream, constant=centered * scale + bias)


def _gate(name: str, norm: Any, after: Stream) -> Sink | None:
    return Sink(name, norm, after) if norm.affine else None


def _consume(name: str, module: Any, stream: Stream) -> Sink:
    """A consumer, after the check that the bias can take over the silent unit's constant."""
    size = inputs_of(module)
    linear = isinstance(module, nn.Linear)
    along_channels = (stream.flat or stream.last) if linear else not (stream.flat or stream.last)
    if not along_channels or not stream.fits(size):
        raise Unpaired(
            f"{name!r} ({type(module).__name__}, {size} inputs) does not read its {stream.width} "
            "units as channels"
        )
    if bool((stream.constant != 0).any()):
        behind = f"behind the norm a silent unit is a constant, and {name!r}"
        if module.bias is None:
            raise Unpaired(f"{behind} has no bias that could take it over")
        if isinstance(module, TRANSPOSED) or (
            not linear and module.padding_mode == "zeros" and _pads(module)
        ):
            raise Unpaired(f"{behind} does not see it in full at the border")
    return Sink(name, module, stream)


def _pads(module: Any) -> bool:
    if module.padding == "valid":
        return False
    if module.padding == "same":
        return any(k > 1 for k in module.kernel_size)
    return any(module.padding)
