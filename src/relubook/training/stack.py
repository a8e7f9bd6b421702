"""Many networks as one: layers and whole networks that hold their members side by side.

A :class:`Recipe` says what a network is made of. ``recipe.single(seed)`` builds one as a plain
module; ``recipe.stack(seeds)`` builds all of them at once, and its member i equals the single
network of seed i, number for number.

>>> recipe = Recipe(inputs=1, widths=2, outputs=1, depth=10)
>>> stack = recipe.stack(range(1000))
>>> stack(torch.linspace(-1, 1, 5)[:, None]).shape
torch.Size([1000, 5, 1])
>>> stack.member(7).linear1
Linear(in_features=1, out_features=2, bias=True)
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook.layers.activations import REGISTRY, activation
from relubook.layers.initializers import initialize_, initializer_names
from relubook.layers.maxout import MaxPieces

__all__ = [
    "NORMALIZATIONS",
    "RESIDUALS",
    "Recipe",
    "ResidualNetwork",
    "StackedBatchNorm",
    "StackedDropout",
    "StackedLayerNorm",
    "StackedLinear",
    "StackedNetwork",
    "StackedPReLU",
    "StackedRReLU",
    "keyed_bits",
    "keyed_uniform",
]

NORMALIZATIONS = ("none", "batch", "layer")
"""What :class:`Recipe` takes as ``normalization``."""

RESIDUALS = ("none", "relu(f)+x", "relu(f+x)", "pre-activation")
"""What :class:`Recipe` takes as ``residual``."""


@dataclass(frozen=True)
class Recipe:
    """What a fully connected network is made of.

    A hidden layer is linear map, normalization, activation, dropout; a last linear map follows.
    With a residual form the first hidden layer stays plain and the later ones are blocks, f being
    the branch and ``relu`` standing for the activation of the recipe:

    - ``"relu(f)+x"``: the branch is a whole hidden layer, its input is added to the output;
    - ``"relu(f+x)"``: the input is added in front of the activation;
    - ``"pre-activation"``: normalization, activation and dropout come first and the linear map
      last; the first layer is then a bare linear map, and one more activation stands before the
      last linear map.

    Attributes:
        inputs: Number of input features.
        widths: Units of each hidden layer; one number together with ``depth``.
        outputs: Number of outputs.
        depth: Number of linear maps when ``widths`` is one number: ``depth - 1`` hidden layers.
        activation: A name of the registry, or ``"maxout"``.
        activation_options: Its parameters, such as ``{"negative_slope": 0.1}``, or ``pieces``.
        initializer: A name of ``relubook.layers.initializers.initializer_names`` for every linear map; the
            activation's own by default (LeCun's normal draw for maxout).
        initializer_options: Its parameters, such as ``{"a": 0.1}``.
        bias: None for what the initializer does (0 but for ``"torch"`` and ``"rai"``), False for
            no biases, a number for that constant, a pair for draws from U(low, high).
        normalization: ``"none"``, ``"batch"`` or ``"layer"``.
        residual: ``"none"`` or one of the forms above.
        dropout: Probability of dropping a hidden unit's output in training.

    Raises:
        ValueError: On building, if something is unknown or does not fit; names it.
        TypeError: If the activation has no such parameter.
    """

    inputs: int
    widths: int | Sequence[int]
    outputs: int
    depth: int | None = None
    activation: str = "relu"
    activation_options: Mapping[str, Any] = field(default_factory=dict)
    initializer: str | None = None
    initializer_options: Mapping[str, Any] = field(default_factory=dict)
    bias: float | tuple[float, float] | None = None
    normalization: str = "none"
    residual: str = "none"
    dropout: float = 0.0

    def __post_init__(self):
        widths = self.widths
        if isinstance(widths, int):
            if self.depth is None or self.depth < 1:
                raise ValueError(
                    f"one width wants depth=, the number of linear maps, >= 1, not {self.depth!r}"
                )
            widths = (widths,) * (self.depth - 1)
        elif self.depth is not None and self.depth != len(widths) + 1:
            raise ValueError(f"{len(widths)} widths make depth {len(widths) + 1}, not {self.depth}")
        widths = tuple(int(width) for width in widths)
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "depth", len(widths) + 1)
        for name, size in (("inputs", self.inputs), ("outputs", self.outputs)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if any(width < 1 for width in widths):
            raise ValueError(f"every width must be at least 1, not {widths}")
        if self.activation != "maxout":
            probe = activation(self.activation, **self.activation_options)
            shared = probe.weight.numel() if isinstance(probe, nn.PReLU) else 1
            if shared != 1 and any(width != shared for width in widths):
                raise ValueError(
                    f"prelu with num_parameters={shared} does not fit the widths {widths}"
                )
        else:
            unknown = set(self.activation_options) - {"pieces"}
            if unknown:
                raise TypeError(f"'maxout' has no parameter {sorted(unknown)[0]!r}; known: pieces")
            MaxPieces(self.pieces)
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"unknown normalization {self.normalization!r}; known: {', '.join(NORMALIZATIONS)}"
            )
        if self.residual not in RESIDUALS:
            raise ValueError(f"unknown residual {self.residual!r}; known: {', '.join(RESIDUALS)}")
        if self.residual != "none" and len(set(widths)) > 1:
            raise ValueError(f"residual {self.residual!r} wants equal widths, not {widths}")
        if self.residual == "relu(f+x)" and self.pieces > 1:
            raise ValueError("residual 'relu(f+x)' does not fit maxout: f has more features than x")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")
        if self.initializer is not None:
            known = initializer_names()
            if self.initializer.removesuffix("_") not in known:
                raise ValueError(
                    f"unknown initializer {self.initializer!r}; known: {', '.join(known)}"
                )
        bias = self.bias
        numbers = bias if isinstance(bias, tuple) else () if bias in (None, False) else (bias,)
        if bias is True or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"bias must be None, False, a number or a pair, not {bias!r}")
        if isinstance(bias, tuple) and not (len(bias) == 2 and bias[0] < bias[1]):
            raise ValueError(f"a pair as bias must be (low, high) with low < high, not {bias!r}")
        if bias is False and self._initializer == "rai":
            raise ValueError("the initializer 'rai' draws weight and bias together; bias is False")
        self._initialize(
            [("probe", torch.empty(1, 1), None if bias is False else torch.empty(1))],
            torch.Generator(),
            stacked=False,
        )

    @property
    def pieces(self) -> int:
        """Linear pieces of a unit; 1 unless the activation is maxout."""
        return int(self.activation_options.get("pieces", 2)) if self.activation == "maxout" else 1

    @property
    def hidden(self) -> int:
        """Number of hidden layers."""
        return len(self.hidden_widths)

    @property
    def maps(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each linear map; the pieces of maxout count as outputs."""
        ins = [self.inputs, *self.hidden_widths]
        outs = [width * self.pieces for width in self.hidden_widths]
        return list(zip(ins, [*outs, self.outputs], strict=True))

    @property
    def parameter_count(self) -> int:
        """Number of trained numbers of one network."""
        skeleton = self._skeleton(torch.float32, device="meta")
        return sum(parameter.numel() for parameter in skeleton.parameters())

    def single(self, seed: int, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Build the network of one seed as a plain module.

        Args:
            seed: Seed of all its draws. The global random state is not used.
            dtype: Type of its parameters; torch's default type by default.

        Returns:
            An ``nn.Sequential`` of ``linear1, norm1, act1, dropout1, linear2, ...``, or a
            :class:`ResidualNetwork` with the same names.
        """
        network = self._skeleton(dtype or torch.get_default_dtype())
        layers = [
            (name, module.weight, module.bias)
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear)
        ]
        self._initialize(layers, torch.Generator().manual_seed(seed), stacked=False)
        return network

    def stack(self, seeds: int | Iterable[int], *, dtype: torch.dtype | None = None) -> Any:
        """Build the networks of many seeds as one :class:`StackedNetwork`.

        Args:
            seeds: The members' seeds; a number m stands for ``range(m)``.
            dtype: Type of the parameters; torch's default type by default.

        Returns:
            The stack; member i equals ``single(seeds[i])``.

        Raises:
            ValueError: If there is no member.
        """
        return StackedNetwork(self, seeds, dtype=dtype)

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Units of each hidden layer, as ``widths`` or ``depth`` gave them."""
        assert isinstance(self.widths, tuple)
        return self.widths

    @property
    def _initializer(self) -> str:
        if self.initializer is not None:
            return self.initializer.removesuffix("_")
        if self.activation == "maxout":
            return "lecun_normal"
        return REGISTRY[self.activation].initializer.removesuffix("_")

    def _initialize(
        self,
        layers: Sequence[tuple[str, Tensor, Tensor | None]],
        generator: torch.Generator | Sequence[torch.Generator],
        *,
        stacked: bool,
    ) -> None:
        """Draw layer after layer; every member takes the same draws in the same order."""
        for _, weight, bias in layers:
            initialize_(
                self._initializer,
                weight,
                bias,
                generator=generator,
                stacked=stacked,
                **self.initializer_options,
            )
            if bias is None or self.bias is None:
                continue
            with torch.no_grad():
                if not isinstance(self.bias, tuple):
                    bias.fill_(self.bias)
                    continue
                low, high = self.bias
                rows = bias if stacked else bias.unsqueeze(0)
                each = [generator] if isinstance(generator, torch.Generator) else generator
                for row, g in zip(rows, each, strict=True):
                    row.copy_(torch.empty_like(row).uniform_(low, high, generator=g))

    def _activation(self, dtype: torch.dtype | None = None, device: str | None = None) -> nn.Module:
        if self.activation == "maxout":
            return MaxPieces(self.pieces)
        if self.activation == "prelu":
            return nn.PReLU(**self.activation_options, dtype=dtype, device=device)
        return activation(self.activation, **self.activation_options)

    def _skeleton(self, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
        """Build the plain network with unset weights."""
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        bias = self.bias is not False
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        features = self.normalized
        for index, (ins, outs) in enumerate(self.maps, 1):
            modules[f"linear{index}"] = nn.utils.skip_init(
                nn.Linear, ins, outs, bias, dtype=dtype, device=device
            )
            if index > self.hidden:
                break
            if self.normalization in norms:
                norm = norms[self.normalization]
                modules[f"norm{index}"] = norm(features[index - 1], dtype=dtype, device=device)
            modules[f"act{index}"] = self._activation(dtype, device)
            if self.dropout:
                modules[f"dropout{index}"] = nn.Dropout(self.dropout)
        if self.residual == "none":
            return nn.Sequential(modules)
        return ResidualNetwork(modules, self.hidden, self.residual)

    @property
    def normalized(self) -> list[int]:
        """Features that each normalization sees."""
        return [width * self.pieces for width in self.hidden_widths]


class ResidualNetwork(nn.Module):
    """A plain network with skip connections; see :class:`Recipe` for the forms.

    Args:
        modules: ``linear1, norm1, act1, dropout1, linear2, ...`` by name.
        hidden: Number of hidden layers.
        residual: One of :data:`RESIDUALS`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], hidden: int, residual: str):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.hidden, self.residual = hidden, residual

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, inputs) to (batch, outputs)."""
        return _wire(self.hidden, self.residual, input, _apply(self))


def _apply(network: nn.Module) -> Callable[[str, int, Tensor], Tensor]:
    def apply(kind: str, layer: int, x: Tensor) -> Tensor:
        module = getattr(network, f"{kind}{layer}", None)
        return x if module is None else module(x)

    return apply


def _wire(
    hidden: int, residual: str, x: Tensor, apply: Callable[[str, int, Tensor], Tensor]
) -> Tensor:
    """Run a network; ``apply(kind, layer, x)`` does a step, counted from layer 1."""

    def activate(layer: int, f: Tensor) -> Tensor:
        return apply("dropout", layer, apply("act", layer, f))

    for layer in range(1, hidden + 1):
        if residual == "pre-activation":
            if layer == 1:
                x = apply("linear", 1, x)
            else:
                branch = activate(layer - 1, apply("norm", layer - 1, x))
                x = x + apply("linear", layer, branch)
            continue
        f = apply("norm", layer, apply("linear", layer, x))
        if layer == 1 or residual == "none":
            x = activate(layer, f)
        elif residual == "relu(f)+x":
            x = activate(layer, f) + x
        else:
            x = activate(layer, f + x)
    if residual == "pre-activation" and hidden:
        x = activate(hidden, apply("norm", hidden, x))
    return apply("linear", hidden + 1, x)


class StackedLinear(nn.Module):
    """The linear maps of many networks: member i maps x to ``x @ weight[i] + bias[i]``.

    Args:
        members: Number of networks.
        in_features: Size of an input.
        out_features: Size of an output.
        bias: Whether there is a bias.
        initializer: A name of ``relubook.layers.initializers.initializer_names``; what ``nn.Linear`` draws by
            default.
        generator: Source of the randomness: one for all members in turn, or one per member.
        dtype: Type of the parameters.

    Attributes:
        weight: Shape (members, in_features, out_features).
        bias: Shape (members, out_features), or None.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(
        self,
        members: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        initializer: str | None = "torch",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _at_least_one(members=members, in_features=in_features, out_features=out_features)
        self.members, self.in_features, self.out_features = members, in_features, out_features
        self.weight = nn.Parameter(torch.zeros(members, in_features, out_features, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(members, out_features, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        if initializer is not None:
            initialize_(initializer, self.weight, self.bias, generator=generator, stacked=True)

    def forward(self, input: Tensor) -> Tensor:
        """Map (members, batch, in) or (batch, in), shared by all, to (members, batch, out)."""
        if input.dim() == 2:
            input = input.expand(self.members, *input.shape)
        if self.bias is None:
            return torch.bmm(input, self.weight)
        return torch.baddbmm(self.bias[:, None], input, self.weight)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return (
            f"members={self.members}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class StackedBatchNorm(nn.Module):
    """Batch normalization with statistics of its own for every member, as ``nn.BatchNorm1d``.

    Args:
        members: Number of networks.
        features: Features of each.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running statistics.
        dtype: Type of the parameters.

    Attributes:
        weight: Scale, shape (members, features).
        bias: Shift, shape (members, features).
        running_mean: Shape (members, features); used in evaluation mode.
        running_var: Shape (members, features), unbiased.
    """

    def __init__(
        self,
        members: int,
        features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _at_least_one(members=members, features=features)
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(members, features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(members, features, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(members, features, dtype=dtype))
        self.register_buffer("running_var", torch.ones(members, features, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (members, batch, features) over the batch, member by member."""
        if self.training:
            if input.shape[1] < 2:
                raise ValueError("batch normalization in training wants at least 2 inputs")
            var, mean = torch.var_mean(input, 1, correction=0)
            with torch.no_grad():
                n = input.shape[1]
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
                self.num_batches_tracked += 1
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (input - mean[:, None]) * scale[:, None] + self.bias[:, None]


class StackedLayerNorm(nn.Module):
    """Layer normalization with scale and shift of its own for every member, as ``nn.LayerNorm``.

    Args:
        members: Number of networks.
        features: Features of each.
        eps: Added to the variance.
        dtype: Type of the parameters.

    Attributes:
        weight: Scale, shape (members, features).
        bias: Shift, shape (members, features).
    """

    def __init__(
        self, members: int, features: int, eps: float = 1e-5, *, dtype: torch.dtype | None = None
    ):
        super().__init__()
        _at_least_one(members=members, features=features)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(members, features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(members, features, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (members, batch, features) over the features of each input."""
        normal = F.layer_norm(input, input.shape[-1:], eps=self.eps)
        return normal * self.weight[:, None] + self.bias[:, None]


class StackedPReLU(nn.Module):
    """The parametric rectifier with learned slopes for every member, as ``nn.PReLU``.

    Args:
        members: Number of networks.
        num_parameters: Slopes of each: 1, or one a feature.
        init: Their first value.
        dtype: Type of the parameters.

    Attributes:
        weight: Slopes, shape (members, num_parameters).
    """

    def __init__(
        self,
        members: int,
        num_parameters: int = 1,
        init: float = 0.25,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _at_least_one(members=members, num_parameters=num_parameters)
        self.weight = nn.Parameter(torch.full((members, num_parameters), init, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the slopes to the negative part of (members, batch, features)."""
        return torch.where(input > 0, input, self.weight[:, None] * input)


class _Keyed(nn.Module):
    """A module whose draws in training depend on member, count of calls and place alone."""

    def __init__(self, seeds: Sequence[int], site: int):
        super().__init__()
        self.register_buffer("keys", _member_keys(seeds), persistent=False)
        self.keys: Tensor
        self.site = site
        self.calls = 0

    def _bits(self, input: Tensor) -> Tensor:
        bits = _bits(self.keys, self.calls, self.site, math.prod(input.shape[1:]))
        self.calls += 1
        return bits.view(input.shape)


class StackedDropout(_Keyed):
    """Dropout that drops for every member what it would drop for that member alone.

    Args:
        seeds: The members' seeds.
        p: Probability of an element to be set to 0; the others are divided by 1 - p.
        site: Distinguishes the dropouts of one network.
    """

    def __init__(self, seeds: Sequence[int], p: float = 0.5, site: int = 0):
        super().__init__(seeds, site)
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), not {p!r}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of (members, batch, features) in training, none in evaluation."""
        if not self.training or self.p == 0:
            return input
        return input * _kept(self._bits(input), self.p, input.dtype)


class StackedRReLU(_Keyed):
    """The randomized leaky rectifier, as ``nn.RReLU``, with draws of each member's own.

    Args:
        seeds: The members' seeds.
        lower: Least slope of the negative part.
        upper: Largest slope; in evaluation the slope is the mean of the two.
        site: Distinguishes the places of one network.
    """

    def __init__(
        self, seeds: Sequence[int], lower: float = 1 / 8, upper: float = 1 / 3, site: int = 0
    ):
        super().__init__(seeds, site)
        self.lower, self.upper = lower, upper

    def forward(self, input: Tensor) -> Tensor:
        """Apply one drawn slope an element in training, the mean slope in evaluation."""
        if not self.training:
            return F.leaky_relu(input, (self.lower + self.upper) / 2)
        slope = _slopes(self._bits(input), self.lower, self.upper, input.dtype)
        return torch.where(input > 0, input, slope * input)


class StackedNetwork(nn.Module):
    """Many networks of one recipe, side by side; build it with ``recipe.stack(seeds)``.

    Args:
        recipe: What each is made of.
        seeds: The members' seeds; a number m stands for ``range(m)``.
        dtype: Type of the parameters; torch's default type by default.
        initialize: Whether to draw the weights; they are 0 otherwise.

    Attributes:
        recipe: The recipe.
        seeds: The members' seeds, a tuple.

    Raises:
        ValueError: If there is no member.
    """

    def __init__(
        self,
        recipe: Recipe,
        seeds: int | Iterable[int],
        *,
        dtype: torch.dtype | None = None,
        initialize: bool = True,
    ):
        super().__init__()
        self.recipe = recipe
        self.seeds = _seeds(seeds)
        members = len(self.seeds)
        dtype = dtype or torch.get_default_dtype()
        options = dict(recipe.activation_options)
        features = recipe.normalized
        layers = []
        for index, (ins, outs) in enumerate(recipe.maps, 1):
            linear = StackedLinear(
                members, ins, outs, recipe.bias is not False, initializer=None, dtype=dtype
            )
            layers.append((f"linear{index}", linear.weight, linear.bias))
            self.add_module(f"linear{index}", linear)
            if index > recipe.hidden:
                break
            if recipe.normalization == "batch":
                norm: nn.Module = StackedBatchNorm(members, features[index - 1], dtype=dtype)
                self.add_module(f"norm{index}", norm)
            elif recipe.normalization == "layer":
                norm = StackedLayerNorm(members, features[index - 1], dtype=dtype)
                self.add_module(f"norm{index}", norm)
            act: nn.Module
            if recipe.activation == "prelu":
                act = StackedPReLU(members, dtype=dtype, **options)
            elif recipe.activation == "rrelu":
                act = StackedRReLU(self.seeds, site=2 * index, **options)
            else:
                act = recipe._activation()
            self.add_module(f"act{index}", act)
            if recipe.dropout:
                dropout = StackedDropout(self.seeds, recipe.dropout, site=2 * index + 1)
                self.add_module(f"dropout{index}", dropout)
        if initialize:
            generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
            recipe._initialize(layers, generators, stacked=True)

    def __len__(self) -> int:
        return len(self.seeds)

    def forward(self, input: Tensor) -> Tensor:
        """Run all members.

        Args:
            input: Shape (batch, inputs), shared, or (members, batch, inputs).

        Returns:
            Shape (members, batch, outputs).

        Raises:
            ValueError: If the shape does not fit.
        """
        wanted = self.recipe.inputs
        if (
            input.dim() not in (2, 3)
            or input.shape[-1] != wanted
            or (input.dim() == 3 and len(input) != len(self))
        ):
            raise ValueError(
                f"the input must have the shape (batch, {wanted}) or ({len(self)}, batch, "
                f"{wanted}), not {tuple(input.shape)}"
            )
        return _wire(self.recipe.hidden, self.recipe.residual, input, _apply(self))

    def member(self, index: int) -> nn.Module:
        """Take one member out as a plain module, in the mode (training or not) of the stack.

        Args:
            index: Its place, from 0; negative numbers count from the end.

        Returns:
            A copy, as ``recipe.single`` builds it, that shares nothing with the stack.

        Raises:
            IndexError: If there is no such member.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"no member {index}; the stack has {len(self)}")
        state = self.state_dict()
        first = next(self.parameters())
        network = self.recipe._skeleton(first.dtype)
        plain = {}
        for name in network.state_dict():
            value = state[name].detach().cpu()
            if value.dim():
                value = value[index]
            plain[name] = (value.mT if value.dim() == 2 else value).contiguous()
        network.load_state_dict(plain)
        return network.train(self.training)

    def parameter_vectors(self) -> Tensor:
        """Return every member's parameters as one vector.

        Returns:
            Shape (members, parameters), in the order of ``parameters_to_vector`` on
            ``member(i)``.
        """
        parts = []
        for parameter in self.parameters():
            value = parameter.detach()
            parts.append((value.mT if value.dim() == 3 else value).flatten(1))
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"members={len(self)}"


def keyed_bits(seeds: Sequence[int], step: int, site: int, count: int) -> Tensor:
    """Draw 32 random bits an element, each a function of seed, step, site and place alone.

    What a member draws does not depend on which others are in the stack, so that a stack equals
    the loop over its members, and ranges of members can be trained apart.

    Args:
        seeds: Seeds of the members.
        step: Counts the draws, such as the training step.
        site: Distinguishes the places of a network that draw; a recipe's hidden layer l, from 1,
            has 2 l (randomized slopes) and 2 l + 1 (dropout).
        count: Elements a member.

    Returns:
        Integers of all 32 bits, shape (members, count), dtype int32.

    Source:
        The finalizer lowbias32 by C. Wellons, https://github.com/skeeto/hash-prospector
    """
    return _bits(_member_keys(seeds), step, site, count)


def keyed_uniform(seeds: Sequence[int], step: int, site: int, count: int) -> Tensor:
    """Draw numbers from U[0, 1), float64, by :func:`keyed_bits`; shape (members, count)."""
    return keyed_bits(seeds, step, site, count).double() / 2**32 + 0.5


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def _mix(x: Tensor) -> Tensor:
    """Apply the finalizer to int32, in place."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _member_keys(seeds: Sequence[int]) -> Tensor:
    return torch.tensor([_signed(_stream(seed, "keys")) for seed in seeds], dtype=torch.int32)


def _stream(seed: int, purpose: str) -> int:
    """Return a seed of its own for one purpose of a member."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=7).digest())


def _bits(keys: Tensor, step: int, site: int, count: int) -> Tensor:
    place = _signed(_stream(step, f"site {site}"))
    own = _mix(keys ^ place)
    elements = torch.arange(count, dtype=torch.int32, device=keys.device)
    return _mix(own[:, None] + elements * _signed(0x9E3779B1))


def _kept(bits: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return the factor of dropout: 0 with probability p, else 1 / (1 - p)."""
    return (bits >= _signed_threshold(p)).to(dtype).mul_(1 / (1 - p))


def _signed_threshold(p: float) -> int:
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def _slopes(bits: Tensor, lower: float, upper: float, dtype: torch.dtype) -> Tensor:
    return bits.to(dtype).div_(2**32).add_(0.5).mul_(upper - lower).add_(lower)


def _seeds(seeds: int | Iterable[int]) -> tuple[int, ...]:
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(s) for s in seeds)
    if not seeds:
        raise ValueError("a stack wants at least one member, got 0")
    return seeds


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
