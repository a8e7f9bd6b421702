"""The layers of many networks side by side, each member with numbers of its own.

Inputs and outputs have the shape (members, batch, features).
"""

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "SMALL_MAP",
    "Drawing",
    "StackedBatchNorm",
    "StackedDropout",
    "StackedLayerNorm",
    "StackedLinear",
    "StackedModule",
    "StackedRReLU",
    "stream",
]

SMALL_MAP = 16
"""Largest linear map, in weights, for which plain arithmetic with the members side by side in
memory beats batched matrix products."""


def stream(seed: int, purpose: str) -> int:
    """Return a seed of its own for one purpose of a member."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=7).digest())


class StackedLinear(nn.Module):
    """The linear maps of many networks: member i maps x to ``x @ weight[i] + bias[i]``.

    Args:
        members: Number of networks.
        in_features: Size of an input.
        out_features: Size of an output.
        bias: Whether there is a bias.
        dtype: Type of the parameters.

    Attributes:
        weight: Shape (members, in_features, out_features), 0 at first.
        bias: Shape (members, out_features), 0 at first, or None.
    """

    def __init__(
        self,
        members: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.members, self.in_features, self.out_features = members, in_features, out_features
        self.weight = nn.Parameter(torch.zeros(members, in_features, out_features, dtype=dtype))
        shift = nn.Parameter(torch.zeros(members, out_features, dtype=dtype)) if bias else None
        self.register_parameter("bias", shift)

    def forward(self, input: Tensor) -> Tensor:
        """Map (members, batch, in) or (batch, in), shared by all, to (members, batch, out)."""
        if self.in_features * self.out_features <= SMALL_MAP and self.weight.stride(0) == 1:
            return self._small(input)
        if input.dim() == 2:
            input = input.expand(self.members, *input.shape)
        if self.bias is None:
            return torch.bmm(input, self.weight)
        return torch.baddbmm(self.bias[:, None], input, self.weight)

    def _small(self, input: Tensor) -> Tensor:
        """Multiply number by number, with the members last in memory."""
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
        return (
            f"members={self.members}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class StackedBatchNorm(nn.BatchNorm1d):
    """Batch normalization with statistics of its own for every member, as ``nn.BatchNorm1d``.

    Args:
        members: Number of networks.
        features: Features of each.
        dtype: Type of the parameters.

    Attributes:
        weight: Scale, shape (members, features).
        bias: Shift, shape (members, features).
        running_mean: Shape (members, features); used in evaluation mode.
        running_var: Shape (members, features), unbiased.
    """

    def __init__(self, members: int, features: int, *, dtype: torch.dtype | None = None):
        super().__init__(members * features, dtype=dtype)
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach().view(members, features)))
        for name in ("running_mean", "running_var"):
            setattr(self, name, getattr(self, name).view(members, features))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (members, batch, features) over the batch, member by member."""
        members, batch, features = input.shape
        if self.training and batch < 2:
            raise ValueError("batch normalization in training must see at least 2 inputs, not 1")
        assert self.running_mean is not None and self.running_var is not None
        flat = F.batch_norm(
            input.transpose(0, 1).reshape(batch, members * features),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.reshape(-1),
            self.bias.reshape(-1),
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        return flat.view(batch, members, features).transpose(0, 1)


class StackedLayerNorm(nn.Module):
    """Layer normalization with scale and shift of its own for every member, as ``nn.LayerNorm``.

    Args:
        members: Number of networks.
        features: Features of each.
        dtype: Type of the parameters.

    Attributes:
        weight: Scale, shape (members, features).
        bias: Shift, shape (members, features).
    """

    def __init__(self, members: int, features: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(members, features, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (members, batch, features) over the features of each input."""
        normal = F.layer_norm(input, input.shape[-1:])
        return normal * self.weight[:, None] + self.bias[:, None]


class Drawing(nn.Module):
    """A module that draws in training, for every member from a generator of its own."""

    def __init__(self, seeds: Sequence[int], site: str):
        super().__init__()
        self.generators = [torch.Generator().manual_seed(stream(s, site)) for s in seeds]

    def uniform(self, input: Tensor, low: float, high: float) -> Tensor:
        drawn = torch.empty(input.shape, dtype=input.dtype)
        for row, generator in zip(drawn, self.generators, strict=True):
            row.uniform_(low, high, generator=generator)
        return drawn.to(input.device)


class StackedDropout(Drawing):
    """Dropout in which a member's draws do not depend on who stands beside it.

    Args:
        seeds: The members' seeds.
        p: Probability of an element to be set to 0; the others are divided by 1 - p.
        layer: Tells apart the dropouts of one network.
    """

    def __init__(self, seeds: Sequence[int], p: float = 0.5, layer: int = 0):
        super().__init__(seeds, f"dropout {layer}")
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), not {p!r}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of (members, batch, features) in training, none in evaluation."""
        if not self.training or self.p == 0:
            return input
        return input * (self.uniform(input, 0, 1) >= self.p) / (1 - self.p)


class StackedRReLU(Drawing):
    """The randomized leaky rectifier, as ``nn.RReLU``, with draws of each member's own.

    Args:
        seeds: The members' seeds.
        lower: Least slope of the negative part.
        upper: Largest slope; in evaluation the slope is the mean of the two.
        layer: Tells apart the layers of one network.
    """

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
    """Any module, stacked by ``torch.func.vmap``.

    Args:
        module: A module, of which every member gets a copy.
        members: Number of members.
        each: The members' own modules, of the same shape; copies of ``module`` by default.

    Attributes:
        module: The module with the members first in every parameter and buffer. It does not run
            by itself.
    """

    def __init__(self, module: nn.Module, members: int, each: Sequence[nn.Module] | None = None):
        super().__init__()
        each = [module] * members if each is None else each
        states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in each]
        self.module = copy.deepcopy(module)
        for path, owner in self.module.named_modules():
            for store in (owner._parameters, owner._buffers):
                for name, value in store.items():
                    if value is None:
                        continue
                    key = f"{path}.{name}" if path else name
                    rows = torch.stack([state[key].detach() for state in states])
                    kind = isinstance(value, nn.Parameter)
                    store[name] = nn.Parameter(rows, value.requires_grad) if kind else rows  # type: ignore[assignment]

    def forward(self, input: Tensor, shared: bool = False) -> Tensor:
        """Map (members, batch, ...), or (batch, ...) if ``shared``, to (members, batch, ...)."""
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        call = torch.func.vmap(
            lambda one, x: torch.func.functional_call(self.module, one, (x,)),
            in_dims=(0, None if shared else 0),
            randomness="different",
        )
        return call(state, input)
