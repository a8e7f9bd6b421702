"""Many networks as one module: members side by side, each with numbers of its own.

:meth:`relubook.training.recipe.Recipe.stack` builds fully connected ones, :func:`stack_of` others.

>>> stack = stack_of(lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), seeds=5)
>>> [tuple(post.shape) for pre, post in stack.hidden(torch.randn(4, 3))]
[(5, 4, 8)]
"""

import contextlib
import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from relubook.layers.activations import MODULES
from relubook.training.modules import (
    SMALL_MAP,
    Drawing,
    StackedDropout,
    StackedLinear,
    StackedModule,
    StackedRReLU,
    rebuild_,
    stream,
)
from relubook.training.recipe import Recipe, Seen, wire

__all__ = ["RecipeStack", "Stack", "batch_order", "member_seeds", "stack_of"]


def member_seeds(seeds: int | Iterable[int]) -> tuple[int, ...]:
    """Return the members' seeds, one at least; a number m stands for ``range(m)``."""
    if isinstance(seeds, bool) or not isinstance(seeds, int | Iterable):
        raise TypeError(f"seeds must be a number or integers, not {seeds!r}")
    chosen = []
    for seed in range(seeds) if isinstance(seeds, int) else seeds:
        try:
            chosen.append(operator.index(seed))
        except TypeError:
            raise TypeError(f"every seed must be an integer, not {seed!r}") from None
    if not chosen:
        raise ValueError("seeds must name at least one member, not 0")
    return tuple(chosen)


def batch_order(seed: int, n: int, batch_size: int, steps: int) -> Tensor:
    """Return the batches that :func:`relubook.training.train.train` gives the member of a seed.

    Every epoch is a fresh permutation of the n examples, cut into whole batches; what is left
    over at its end is dropped. Returns indices of the examples, shape (steps, batch_size).
    """
    batches = batches_of([seed], n, batch_size)
    rows = [next(batches)[0] for _ in range(steps)]
    return torch.stack(rows) if rows else torch.empty(0, batch_size, dtype=torch.int64)


def batches_of(seeds: Sequence[int], n: int, batch_size: int) -> Iterator[Tensor]:
    """Yield batches for ever, each (seeds, batch_size), with the seeds side by side in memory."""
    generators = [torch.Generator().manual_seed(stream(seed, "batches")) for seed in seeds]
    while True:
        epoch = torch.stack([torch.randperm(n, generator=g) for g in generators], 1)
        yield from (part.t() for part in epoch[: n // batch_size * batch_size].split(batch_size))


@contextlib.contextmanager
def kept_modes(network: nn.Module) -> Iterator[None]:
    """Leave every module in training or evaluation mode as it was."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Stack(nn.Module):
    """Many networks as one module; the base of :class:`RecipeStack` and :func:`stack_of`.

    Parameters and buffers have the members first. ``seeds`` are the members' seeds.
    """

    members_last = False
    """Whether training lays the members side by side in memory."""
    dims = 2
    """Dimensions of one network's batch; 0 where inputs are always shared."""

    def __init__(self, seeds: int | Iterable[int]):
        super().__init__()
        self.seeds = member_seeds(seeds)

    def __len__(self) -> int:
        return len(self.seeds)

    def run(self, input: Tensor, seen: Seen = None) -> Tensor:
        """Run all members; ``seen(pre, post)`` is called at each activation."""
        raise NotImplementedError

    def owns(self, input: Tensor) -> bool:
        """Whether an input's first dimension is that of the members."""
        return bool(self.dims) and input.dim() > self.dims

    def _single(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, ...), shared by all, or (members, batch, ...) to (members, batch, ...)."""
        return self.run(input)

    def hidden(self, input: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (pre, post) of every activation in order, each (members, batch, ...)."""
        pairs: list[tuple[Tensor, Tensor]] = []
        self.run(input, lambda pre, post: pairs.append((pre, post)))
        return pairs

    def member(self, index: int) -> nn.Module:
        """Copy one member (-1: the last) out as a plain module, in the mode of the stack."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no member {index}; the stack has {len(self)}")
        network = self._single()
        plain = network.state_dict()
        turned = {f"{n}.weight" for n, m in self.named_modules() if isinstance(m, StackedLinear)}
        for name, (own, value) in zip(plain, self.state_dict().items(), strict=True):
            one = value.detach().cpu()[index]
            one = one.mT if own in turned else one
            plain[name] = one.clone(memory_format=torch.contiguous_format)
        network.load_state_dict(plain, assign=True)
        return network.train(self.training)

    def parameter_vectors(self) -> Tensor:
        """Return every member's parameters as ``parameters_to_vector`` has them: (members, n)."""
        parts = []
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                turned = isinstance(module, StackedLinear) and parameter.dim() == 3
                value = parameter.detach().mT if turned else parameter.detach()
                parts.append(value.reshape(len(self), -1))
        return torch.cat(parts, 1) if parts else torch.empty(len(self), 0)

    def range(self, start: int, stop: int) -> "Stack":
        """Return a stack of its own of the members from ``start`` to before ``stop``."""
        return copy.deepcopy(self)._hold([self], slice(start, stop))

    @staticmethod
    def join(stacks: "Sequence[Stack]") -> "Stack":
        """Return a stack of its own of the members of several."""
        return copy.deepcopy(stacks[0])._hold(stacks, slice(None))

    def take_(self, other: "Stack") -> None:
        """Take over all numbers of a stack with as many members."""
        self.load_state_dict(other.state_dict())
        for mine, theirs in zip(self.modules(), other.modules(), strict=True):
            if isinstance(mine, Drawing) and isinstance(theirs, Drawing):
                mine.generators = theirs.generators

    def _hold(self, stacks: "Sequence[Stack]", cut: slice) -> "Stack":
        self.seeds = tuple(seed for one in stacks for seed in one.seeds)[cut]
        rebuild_(self, stacks, lambda parts: torch.cat(parts)[cut].clone())
        for module, *sources in zip(self.modules(), *(s.modules() for s in stacks), strict=True):
            if isinstance(module, Drawing):
                every = [generator for source in sources for generator in source.generators]
                module.generators = [generator.clone_state() for generator in every[cut]]
        return self

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"members={len(self)}"


class RecipeStack(Stack):
    """Many networks of one recipe; modules are named as in ``recipe.single(seed)``."""

    def __init__(
        self, recipe: Recipe, seeds: int | Iterable[int], *, dtype: torch.dtype | None = None
    ):
        super().__init__(seeds)
        self.recipe, members = recipe, len(self.seeds)
        dtype = dtype or torch.get_default_dtype()
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

        def linear(ins: int, outs: int) -> nn.Module:
            made = StackedLinear(members, ins, outs, recipe.bias is not False, dtype=dtype)
            weight = torch.empty(members, outs, ins, dtype=dtype)
            bias = made.bias if made.bias is None else made.bias.detach()
            for place, generator in enumerate(generators):
                recipe.draw_(weight[place], None if bias is None else bias[place], generator)
            made.weight.data.copy_(weight.mT)
            return made

        def turn(module: nn.Module, layer: int) -> nn.Module:
            if isinstance(module, nn.Dropout):
                return StackedDropout(self.seeds, module.p, layer)
            if isinstance(module, nn.RReLU):
                return StackedRReLU(self.seeds, module.lower, module.upper, layer)
            if isinstance(module, MODULES) and not module.state_dict():
                return module
            return StackedModule([module.to(dtype)] * members)

        for name, module in recipe.modules(linear, turn).items():
            self.add_module(name, module)
        self.members_last = max(ins * outs for ins, outs in recipe.maps) <= SMALL_MAP

    def run(self, input: Tensor, seen: Seen = None) -> Tensor:
        """Run all members on (batch, inputs) or (members, batch, inputs)."""
        size, shape = self.recipe.inputs, tuple(input.shape)
        if shape[-1:] != (size,) or shape[:-2] not in ((), (len(self),)) or len(shape) < 2:
            shapes = f"(batch, {size}) or ({len(self)}, batch, {size})"
            raise ValueError(f"the input must have the shape {shapes}, not {shape}")
        if not input.is_floating_point():
            raise TypeError(f"the input must be floating point, not {input.dtype}")
        return wire(self, self.recipe.residual, input, seen)

    def _single(self) -> nn.Module:
        return self.recipe.single(0)


class _AnyStack(Stack):
    def __init__(self, members: Sequence[nn.Module], seeds: Sequence[int], dims: int | None):
        super().__init__(seeds)
        self.body = StackedModule(members)
        self.dims = _input_dims(members[0]) if dims is None else dims

    def run(self, input: Tensor, seen: Seen = None) -> Tensor:
        own = self.owns(input)
        if own and len(input) != len(self):
            shape = f"({len(self)}, batch, ...), not {tuple(input.shape)}"
            raise ValueError(f"inputs of each member's own must have the shape {shape}")
        units = [m for m in self.body.module.modules() if isinstance(m, MODULES)]
        if seen is None or not units:
            return self.body(input, not own)
        pairs: list[Tensor] = []  # pre- and post-activations in turn
        hooks = []
        for unit in units:
            hooks += [
                unit.register_forward_pre_hook(lambda _, args: pairs.append(args[0].clone())),
                unit.register_forward_hook(lambda _, args, out: pairs.append(out.clone())),
            ]

        def found(out: Tensor) -> tuple[Tensor, list[Tensor]]:
            kept = list(pairs)
            pairs.clear()
            return out, kept

        try:
            out, kept = self.body(input, not own, found)
        finally:
            for hook in hooks:
                hook.remove()
        for pre, post in zip(kept[::2], kept[1::2], strict=True):
            seen(pre, post)
        return out

    def _single(self) -> nn.Module:
        network = copy.deepcopy(self.body.module)
        rebuild_(network, [network], lambda rows: rows[0][0].clone())
        return network.requires_grad_()


def _input_dims(module: nn.Module) -> int:
    """Return the dimensions of a batch for the first layer that tells, 0 if none does."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            return 2 + len(layer.kernel_size)
        if isinstance(layer, nn.Linear):
            return 2
    return 0


def stack_of(
    build: Callable[[], nn.Module], seeds: int | Iterable[int], *, dims: int | None = None
) -> Stack:
    """Stack networks of any kind by ``torch.func.vmap``.

    Args:
        build: Builds one network from torch's global random state, which is seeded with each
            member's seed in turn and left as it was.
        seeds: The members' seeds; a number m stands for ``range(m)``.
        dims: Dimensions of one network's batch, by which inputs of each member's own are told from
            shared ones. By default 2, or those of the first convolution, else all are shared.

    ``hidden`` of the stack sees activation modules of ``relubook.layers.activations.MODULES``, not
    functions called in ``forward``. Dropout draws from torch's global generator.

    Raises TypeError if ``build`` returns no module, ValueError if members differ in shape or a
    parameter is shared within a network.
    """
    chosen, members = member_seeds(seeds), []
    with torch.random.fork_rng():
        for seed in chosen:
            torch.manual_seed(seed)
            members.append(build())
            if not isinstance(members[-1], nn.Module):
                raise TypeError(f"build must return a module, not {members[-1]!r}")
    shapes = [[(k, v.shape) for k, v in member.state_dict().items()] for member in members]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("all members must have parameters of the same shapes")
    every = [*members[0].named_parameters(remove_duplicate=False)]
    if len(every) > len([*members[0].parameters()]):
        raise ValueError("no parameter may be shared between modules of a network")
    return _AnyStack(members, chosen, dims)
