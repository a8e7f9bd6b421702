"""What a fully connected network is made of: one description for one network or for a thousand.

>>> recipe = Recipe(inputs=1, widths=2, outputs=1, hidden=9)
>>> recipe.stack(range(1000))(torch.linspace(-1, 1, 5)[:, None]).shape
torch.Size([1000, 5, 1])
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from relubook.layers.activations import activation, registered
from relubook.layers.initializers import initialize_
from relubook.layers.maxout import MaxPieces

if TYPE_CHECKING:
    from relubook.training.stack import RecipeStack

__all__ = ["NORMALIZATIONS", "RESIDUALS", "Recipe", "ResidualNetwork"]

Seen = Callable[[Tensor, Tensor], None] | None  # is called with pre- and post-activations

NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
}
"""What :class:`Recipe` takes by name as ``normalization``, beside ``"none"``."""

RESIDUALS = ("none", "relu(f)+x", "relu(f+x)", "pre-activation")
"""What :class:`Recipe` takes as ``residual``."""


@dataclass(frozen=True)
class Recipe:
    """What a fully connected network is made of.

    A hidden layer is linear map, normalization, activation, dropout; a last linear map follows.
    With a residual form the first hidden layer stays plain and the later ones are blocks:

    - ``"relu(f)+x"``: a block's input is added to the output of its whole hidden layer;
    - ``"relu(f+x)"``: it is added in front of the activation;
    - ``"pre-activation"``: the linear map of a block comes last; the first layer is then a bare
      linear map, and one more activation stands before the last linear map.

    Attributes:
        widths: Units of each hidden layer; one number for ``hidden`` equal layers.
        hidden: Number of hidden layers when ``widths`` is one number; 1 by default.
        activation: What :func:`relubook.layers.activations.activation` takes; each layer gets a
            copy, and parameters of a module are trained. May mix units in the last dimension.
        activation_options: Its parameters, such as ``{"negative_slope": 0.1}``.
        initializer: What :func:`relubook.layers.initializers.initializer` takes. By default what
            the registry has for the activation, LeCun's normal draw for maxout, else He's.
        initializer_options: Its parameters, such as ``{"a": 0.1}``.
        bias: None for what the initializer does (0 but for ``"torch"`` and ``"rai"``), False for
            no biases, a number for that constant, a pair for draws from U(low, high).
        normalization: ``"none"``, ``"batch"``, ``"layer"``, or a function of the number of
            features that returns a module for inputs (batch, features), such as a class.
        residual: ``"none"`` or one of the forms above.
        dropout: Probability of dropping a hidden unit's output in training.

    Raises ValueError or TypeError, and names what is unknown or does not fit.
    """

    inputs: int
    widths: int | Sequence[int]
    outputs: int
    hidden: int | None = None
    activation: Any = "relu"
    activation_options: Mapping[str, Any] = field(default_factory=dict)
    initializer: Any = None
    initializer_options: Mapping[str, Any] = field(default_factory=dict)
    bias: float | tuple[float, float] | None = None
    normalization: str | Callable[[int], nn.Module] = "none"
    residual: str = "none"
    dropout: float = 0.0
    _unit: nn.Module = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        widths, hidden = self.widths, self.hidden
        if isinstance(widths, int):
            hidden = 1 if hidden is None else hidden
            if hidden < 0:
                raise ValueError(f"hidden must be at least 0, not {hidden}")
            widths = (widths,) * hidden
        elif hidden is not None and hidden != len(widths):
            raise ValueError(f"hidden must be {len(widths)}, the number of widths, not {hidden}")
        widths = tuple(int(width) for width in widths)
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "hidden", len(widths))
        sizes = {"inputs": self.inputs, "outputs": self.outputs, "every width": min(widths or [1])}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        object.__setattr__(self, "_unit", activation(self.activation, **self.activation_options))
        kinds = ["none", *NORMALIZATIONS]
        if not callable(self.normalization) and self.normalization not in kinds:
            known = ", ".join(kinds)
            raise ValueError(f"unknown normalization {self.normalization!r}; known: {known}")
        if self.residual not in RESIDUALS:
            raise ValueError(f"unknown residual {self.residual!r}; known: {', '.join(RESIDUALS)}")
        if self.residual != "none" and len(set(widths)) > 1:
            raise ValueError(f"widths must be equal for residual {self.residual!r}, not {widths}")
        if self.residual == "relu(f+x)" and self.pieces > 1:
            raise ValueError("residual 'relu(f+x)' does not fit maxout: f has more features than x")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")
        bias = self.bias
        numbers = bias if isinstance(bias, tuple) else () if bias in (None, False) else (bias,)
        if bias is True or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"bias must be None, False, a number or a pair, not {bias!r}")
        if isinstance(bias, tuple) and not (len(bias) == 2 and bias[0] < bias[1]):
            raise ValueError(f"a pair as bias must be (low, high) with low < high, not {bias!r}")
        self.draw_(torch.empty(2, 2), None if bias is False else torch.empty(2), torch.Generator())
        for width in sorted(set(widths)):
            self._check_layer(width)

    def _check_layer(self, width: int) -> None:
        x = torch.zeros(2, width * self.pieces)
        for kind, module in self._after(width * self.pieces).items():
            name = {"norm": "normalization", "act": "activation"}.get(kind, kind)
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must make a module, not {module!r}")
            try:
                x = module.eval()(x)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{name} does not fit the width {width}: {error}") from error
        want, shape = (2, width), tuple(x.shape)
        if shape != want:
            raise ValueError(f"activation must return the shape that it gets, {want}, not {shape}")

    @property
    def pieces(self) -> int:
        """Linear pieces of a unit; 1 unless the activation is maxout."""
        return self._unit.pieces if isinstance(self._unit, MaxPieces) else 1

    @property
    def maps(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each linear map; the pieces of maxout count as outputs."""
        ins = [self.inputs, *self.hidden_widths]
        outs = [width * self.pieces for width in self.hidden_widths]
        return list(zip(ins, [*outs, self.outputs], strict=True))

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Units of each hidden layer."""
        assert isinstance(self.widths, tuple)
        return self.widths

    @property
    def parameter_count(self) -> int:
        """Number of trained numbers of one network."""
        return sum(parameter.numel() for parameter in self.single(0).parameters())

    def single(self, seed: int, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Build the network of one seed as a plain module, without the global random state.

        An ``nn.Sequential`` or a ``ResidualNetwork`` of ``linear1, norm1, act1, dropout1, ...``.
        """
        generator = torch.Generator().manual_seed(seed)

        def linear(ins: int, outs: int) -> nn.Module:
            made = nn.utils.skip_init(nn.Linear, ins, outs, self.bias is not False, dtype=dtype)
            self.draw_(made.weight, made.bias, generator)
            return made

        modules = self.modules(linear, lambda module, layer: module)
        network: nn.Module = ResidualNetwork(modules, self.residual)
        if self.residual == "none":
            network = nn.Sequential(OrderedDict(modules))
        return network if dtype is None else network.to(dtype)

    def stack(
        self, seeds: int | Iterable[int], *, dtype: torch.dtype | None = None
    ) -> "RecipeStack":
        """Build the networks of seeds, or of ``range(seeds)``, as one; see :meth:`single`."""
        from relubook.training.stack import RecipeStack

        return RecipeStack(self, seeds, dtype=dtype)

    def modules(
        self, linear: Callable[[int, int], nn.Module], turn: Callable[[nn.Module, int], nn.Module]
    ) -> dict[str, nn.Module]:
        """Build ``linear1, norm1, act1, ...`` by ``linear(ins, outs)``, ``turn(other, layer)``."""
        made: dict[str, nn.Module] = {}
        for layer, (ins, outs) in enumerate(self.maps, 1):
            made[f"linear{layer}"] = linear(ins, outs)
            if layer <= len(self.hidden_widths):
                for name, module in self._after(outs).items():
                    made[f"{name}{layer}"] = turn(module, layer)
        return made

    def _after(self, features: int) -> dict[str, nn.Module]:
        made: dict[str, nn.Module] = {}
        if self.normalization != "none":
            kind = self.normalization
            made["norm"] = (kind if callable(kind) else NORMALIZATIONS[kind])(features)
        made["act"] = activation(self._unit)
        if self.dropout:
            made["dropout"] = nn.Dropout(self.dropout)
        return made

    def draw_(self, weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
        """Draw one linear map in place: weight of shape (out, in), bias (out,)."""
        kind = self.initializer
        if kind is None:
            entry = registered(self.activation)
            kind = "he_normal" if entry is None else entry.initializer
            kind = "lecun_normal" if self.pieces > 1 else kind
        initialize_(kind, weight, bias, generator=generator, **self.initializer_options)
        if bias is not None and self.bias is not None:
            with torch.no_grad():
                if isinstance(self.bias, tuple):
                    bias.uniform_(*self.bias, generator=generator)
                else:
                    bias.fill_(self.bias)


class ResidualNetwork(nn.Module):
    """A plain network with skip connections; see :class:`Recipe` for the forms."""

    def __init__(self, modules: Mapping[str, nn.Module], residual: str):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.residual = residual

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, inputs) to (batch, outputs)."""
        return wire(self, self.residual, input)


def wire(network: nn.Module, residual: str, x: Tensor, seen: Seen = None) -> Tensor:
    """Run ``linear1, norm1, act1, ...`` of a network; ``seen(pre, post)`` sees each activation."""
    made = network._modules
    hidden = sum(name.startswith("act") for name in made)

    def apply(kind: str, layer: int, x: Tensor) -> Tensor:
        module = made.get(f"{kind}{layer}")
        return x if module is None else module(x)

    def activate(layer: int, z: Tensor) -> Tensor:
        h = apply("act", layer, z)
        if seen is not None:
            seen(z, h)
        return apply("dropout", layer, h)

    x = h = apply("linear", 1, x)
    for layer in range(1, hidden + 1):
        f = apply("norm", layer, x)
        if residual == "pre-activation":
            branch = apply("linear", layer + 1, activate(layer, f))
            x = x + branch if layer < hidden else branch
            continue
        if residual == "none" or layer == 1:
            h = activate(layer, f)
        else:
            h = activate(layer, f) + h if residual == "relu(f)+x" else activate(layer, f + h)
        x = apply("linear", layer + 1, h)
    return x
