"""The layers of many networks side by side: inputs and outputs are (members, batch, features)."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL_MAP = 16
"""Largest linear map, in weights, for which plain arithmetic, members last, beats ``bmm``."""


def stream(seed: int, purpose: str) -> int:
    """Return a seed of its own for one purpose of a member."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=7).digest())


def rebuild_(
    network: nn.Module, sources: Sequence[nn.Module], make: Callable[[list[Tensor]], Tensor]
) -> None:
    """Make every parameter and buffer of a network anew from those of several like it."""
    for module, *others in zip(network.modules(), *(s.modules() for s in sources), strict=True):
        for kind in ("_parameters", "_buffers"):
            store = getattr(module, kind)
            for name, value in store.items():
                if value is not None:
                    new = make([getattr(other, kind)[name].detach() for other in others])
                    trained = isinstance(value, nn.Parameter)
                    store[name] = nn.Parameter(new, value.requires_grad) if trained else new


class StackedLinear(nn.Module):
    """The linear maps of many networks, 0 at first: x to ``x @ weight[i] + bias[i]``."""

    def __init__(
        self,
        members: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: Any = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(members, in_features, out_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(members, out_features, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """Map (members, batch, in) or (batch, in), shared by all, to (members, batch, out)."""
        if self.in_features * self.out_features <= SMALL_MAP and self.weight.stride(0) == 1:
            return self._small(input)
        if input.dim() == 2:
            input = input.expand(len(self.weight), *input.shape)
        if self.bias is None:
            return torch.bmm(input, self.weight)
        return torch.baddbmm(self.bias[:, None], input, self.weight)

    def _small(self, input: Tensor) -> Tensor:
        columns = (input.permute(2, 1, 0) if input.dim() == 3 else input.mT[..., None]).unbind(0)
        rows = self.weight.permute(1, 2, 0).unsqueeze(2).unbind(0)
        if self.bias is None:
            out = rows[0] * columns[0]
        else:
            out = torch.addcmul(self.bias.mT[:, None], rows[0], columns[0])
        for row, column in zip(rows[1:], columns[1:], strict=True):
            out = torch.addcmul(out, row, column)
        return out.permute(2, 1, 0)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"members={len(self.weight)}, {sizes}, bias={self.bias is not None}"


class Drawing(nn.Module):
    """A module that draws in training, for every member from a generator of its own."""

    def __init__(self, seeds: Sequence[int], site: str):
        super().__init__()
        self.generators = [torch.Generator().manual_seed(stream(s, site)) for s in seeds]

    def uniform(self, input: Tensor, low: float, high: float) -> Tensor:
        """Draw as many numbers from U(low, high) as the input (members, ...) has."""
        drawn = torch.empty(input.shape, dtype=input.dtype)
        for row, generator in zip(drawn, self.generators, strict=True):
            row.uniform_(low, high, generator=generator)
        return drawn.to(input.device)


class StackedDropout(Drawing):
    """Dropout with probability ``p``, as ``nn.Dropout``; ``layer`` tells apart a network's own."""

    def __init__(self, seeds: Sequence[int], p: float = 0.5, layer: int = 0):
        super().__init__(seeds, f"dropout {layer}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of (members, batch, features) in training, none in evaluation."""
        if not self.training:
            return input
        return input * (self.uniform(input, 0, 1) >= self.p) / (1 - self.p)


class StackedRReLU(Drawing):
    """The randomized leaky rectifier with slopes from U(lower, upper), as ``nn.RReLU``."""

    def __init__(
        self, seeds: Sequence[int], lower: float = 1 / 8, upper: float = 1 / 3, layer: int = 0
    ):
        super().__init__(seeds, f"rrelu {layer}")
        self.lower, self.upper = lower, upper

    def forward(self, input: Tensor) -> Tensor:
        """Apply one drawn slope an element in training, the mean slope in evaluation."""
        if not self.training:
            return F.leaky_relu(input, (self.lower + self.upper) / 2)
        return torch.where(input > 0, input, self.uniform(input, self.lower, self.upper) * input)


class StackedModule(nn.Module):
    """Modules of one kind by ``torch.func.vmap``; ``module`` holds them all, members first."""

    def __init__(self, each: Sequence[nn.Module]):
        super().__init__()
        self.module = copy.deepcopy(each[0])
        rebuild_(self.module, each, torch.stack)

    def forward(
        self, input: Tensor, shared: bool = False, then: Callable[[Tensor], Any] = lambda out: out
    ) -> Any:
        """Map (members, batch, ...), or (batch, ...) if ``shared``, and apply ``then`` to each."""
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        call = torch.func.vmap(
            lambda one, x: then(torch.func.functional_call(self.module, one, (x,))),
            in_dims=(0, None if shared else 0),
            randomness="different",
        )
        return call(state, input)
