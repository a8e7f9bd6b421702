"""The computation behind :func:`relubook.training.train.train_many`: members laid out for speed."""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook.layers.maxout import MaxPieces
from relubook.training.stack import (
    Recipe,
    StackedBatchNorm,
    StackedLayerNorm,
    StackedNetwork,
    StackedPReLU,
    StackedRReLU,
    _bits,
    _kept,
    _Keyed,
    _slopes,
    _wire,
)

# Rows of the training set evaluated at once: fixed, so that sums do not depend on the members.
ROWS = 128
# Functions with a region where they are 0. The others may round to 0, but are never silent.
SILENT = ("relu", "relu6", "hardswish", "squared_relu", "step")
# Weights a member from which one fused pass of Adam pays.
FUSED_FROM = 4096
# Alignment that makes a member's numbers independent of its place in the stack.
FEATURES, MEMBERS = 8, 64
# Largest linear map for which plain arithmetic with the members side by side beats batched
# matrix products.
SMALL_MAP = 16


STATES = {"sgd": 0, "adam": 2, "adamw": 2, "adamax": 2, "adadelta": 2, "rmsprop": 1}


@dataclass(frozen=True)
class Plan:
    """The checked arguments of a run."""

    recipe: Recipe
    x: Tensor
    y: Tensor
    seeds: tuple[int, ...]
    lr: Tensor
    steps: int
    optimizer: str
    options: dict[str, Any]
    loss: Any
    batch_size: int | None
    batch_seed: int | None
    factor: Callable[[int], float]
    clip: float | None
    record: tuple[int, ...]
    validation: tuple[Tensor, Tensor] | None
    device: torch.device

    def part(self, start: int, stop: int) -> "Plan":
        def cut(value: Tensor, shared: int) -> Tensor:
            return value[start:stop] if value.dim() > shared else value

        changes = {
            "seeds": self.seeds[start:stop],
            "lr": self.lr[start:stop],
            "x": cut(self.x, 2),
            "y": cut(self.y, shared_dims(self.loss)),
        }
        if self.validation is not None:
            x, y = self.validation
            changes["validation"] = (cut(x, 2), cut(y, shared_dims(self.loss)))
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Plan(**values | changes)


def shared_dims(loss: Any) -> int:
    return 1 if loss == "cross_entropy" else 2


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def is_narrow(recipe: Recipe) -> bool:
    """Whether every map is so small that members stand side by side in the last dimension."""
    return max(ins * outs for ins, outs in recipe.maps) <= SMALL_MAP


class _Maps:
    """The linear maps of one layer, (M, B, in) to (M, B, out), with buffers for what they write.

    Fresh memory costs more than most of the arithmetic, so that outputs and, where nobody else
    holds them, gradients are written where those of the last step were.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, grads: tuple[Tensor, Tensor | None]):
        self.weight, self.bias = weight, bias
        self.weight_grad, self.bias_grad = grads
        self.outputs: dict[int, Tensor] = {}

    def output(self, batch: int) -> Tensor:
        """Return the buffer for a batch of that size."""
        if batch not in self.outputs:
            self.outputs[batch] = self.weight.new_empty(self._shape(batch))
        return self.outputs[batch]

    def _shape(self, batch: int) -> tuple[int, ...]:
        return len(self.weight), batch, self.weight.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        """Write the outputs into their buffer."""
        out = self.output(x.shape[1])
        if self.bias is None:
            return torch.bmm(x, self.weight, out=out)
        return torch.baddbmm(self.bias[:, None], x, self.weight, out=out)

    def backward(self, x: Tensor, grad: Tensor) -> None:
        """Write the gradients of weight and bias."""
        torch.bmm(x.mT, grad, out=self.weight_grad)
        if self.bias_grad is not None:
            torch.sum(grad, 1, out=self.bias_grad)

    def back(self, grad: Tensor, out: Tensor | None) -> Tensor:
        """Return the gradient of the input."""
        if out is None:
            return torch.bmm(grad, self.weight.mT)
        return torch.bmm(grad, self.weight.mT, out=out)


class _NarrowMaps(_Maps):
    """The same by plain arithmetic, (in, B, M) to (out, B, M): members side by side."""

    def __init__(self, weight: Tensor, bias: Tensor | None, grads: tuple[Tensor, Tensor | None]):
        super().__init__(weight, bias, grads)
        self.rows = weight.unsqueeze(2).unbind(0)
        self.columns = weight.unsqueeze(2).unbind(1)
        self.shift = None if bias is None else bias.unsqueeze(1)
        self.row_grads = grads[0].unbind(0)
        self.products: dict[int, Tensor] = {}

    def _shape(self, batch: int) -> tuple[int, ...]:
        return self.weight.shape[1], batch, self.weight.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        out, inputs = self.output(x.shape[1]), x.unbind(0)
        if self.shift is None:
            torch.mul(self.rows[0], inputs[0], out=out)
        else:
            torch.addcmul(self.shift, self.rows[0], inputs[0], out=out)
        for row, one in zip(self.rows[1:], inputs[1:], strict=True):
            out.addcmul_(row, one)
        return out

    def backward(self, x: Tensor, grad: Tensor) -> None:
        batch = x.shape[1]
        if batch not in self.products:
            self.products[batch] = torch.empty_like(grad)
        product = self.products[batch]
        for one, row_grad in zip(x.unbind(0), self.row_grads, strict=True):
            torch.mul(one, grad, out=product)
            torch.sum(product, 1, out=row_grad)
        if self.bias_grad is not None:
            torch.sum(grad, 1, out=self.bias_grad)

    def back(self, grad: Tensor, out: Tensor | None) -> Tensor:
        grads = grad.unbind(0)
        out = torch.mul(self.columns[0], grads[0], out=out)
        for column, one in zip(self.columns[1:], grads[1:], strict=True):
            out.addcmul_(column, one)
        return out


class _Apply(torch.autograd.Function):
    """Apply a layer's maps, with the rectifier behind them where that is all there is."""

    @staticmethod
    def forward(ctx, anchor, x, engine, maps, layer):
        out = maps.forward(x)
        ctx.rectified = engine.plain and layer <= engine.recipe.hidden
        if ctx.rectified:
            out.relu_()
        # Buffers, not autograd's tensors: what they hold lasts until the backward pass.
        ctx.held = engine, maps, layer, x.detach(), out
        return out.detach()

    @staticmethod
    def backward(ctx, grad):
        engine, maps, layer, x, out = ctx.held
        grad = grad.contiguous()
        if ctx.rectified:
            # The gradient is the buffer that the next layer filled for this one alone.
            torch.ops.aten.threshold_backward.grad_input(grad, out, 0, grad_input=grad)
        maps.backward(x, grad)
        if not ctx.needs_input_grad[1]:
            return None, None, None, None, None
        target = engine.scratch(x.shape, layer) if engine.plain else None
        return None, maps.back(grad, target).detach(), None, None, None


def _without_tail(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an elementwise function so that every element takes the vectorized path.

    The last few elements of a tensor are computed one by one, and exponentials then round
    differently: a member would depend on its place.
    """
    missing = -x.numel() % 64
    if not missing:
        return function(x)
    return function(F.pad(x.flatten(), (0, missing)))[: x.numel()].view(x.shape)


class Engine:
    """A stack laid out for speed: one flat buffer of parameters, one of their gradients.

    Wide networks keep the members first, (M, B, F), with the features padded to a multiple of 8;
    narrow ones keep them last, (F, B, M), with the members padded to a multiple of 64. Either
    way a member's numbers do not depend on its place. What is padded stays 0, or belongs to
    members that do not exist.
    """

    def __init__(self, plan: Plan, network: StackedNetwork):
        self.plan, self.network, self.recipe = plan, network, plan.recipe
        self.members = len(plan.seeds)
        self.narrow = is_narrow(self.recipe)
        self.places = round_up(self.members, MEMBERS) if self.narrow else self.members
        self.device, self.dtype = plan.device, plan.x.dtype
        self.step = 0
        self.training = True
        self.flags: list[Tensor | None] | None = None
        self.anchor = torch.zeros((), requires_grad=True, device=self.device)
        self.keys: Tensor | None = None
        blocks, size = {}, 0
        parameters = dict(network.named_parameters())
        # The matrices come first: an optimizer may take them in one piece.
        for name in sorted(parameters, key=lambda name: parameters[name].dim() < 3):
            shape = self._shape(name, parameters[name])
            blocks[name] = (size, shape)
            size += round_up(math.prod(shape), 16)
        self.flat, self.grad, self.rates = (
            torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(3)
        )
        self.values = {name: self._view(self.flat, block) for name, block in blocks.items()}
        self.grads = {name: self._view(self.grad, block) for name, block in blocks.items()}
        rates = torch.zeros(self.places, dtype=self.dtype, device=self.device)
        rates[: self.members] = plan.lr.to(self.device, self.dtype)
        for name, block in blocks.items():
            view = self._view(self.rates, block)
            view.copy_(rates if self.narrow else rates.view(-1, *[1] * (view.dim() - 1)))
            self._put(self.values[name], parameters[name].detach())
        self.buffers = {}
        for name, buffer in network.named_buffers():
            if buffer.dim() and buffer.is_floating_point():
                self.buffers[name] = torch.zeros(
                    self._shape(name, buffer), dtype=self.dtype, device=self.device
                )
                self._put(self.buffers[name], buffer)
        # What autograd itself must reach: everything but the linear maps.
        self.leaves = {}
        for name, value in self.values.items():
            if not name.startswith("linear"):
                leaf = value.detach().requires_grad_()
                leaf.grad = self.grads[name]
                self.leaves[name] = leaf
        kind = _NarrowMaps if self.narrow else _Maps
        self.maps = []
        for layer in range(1, self.recipe.hidden + 2):
            weight, bias = f"linear{layer}.weight", f"linear{layer}.bias"
            grads = self.grads[weight], self.grads.get(bias)
            self.maps.append(kind(self.values[weight], self.values.get(bias), grads))
        self.plain = (
            self.recipe.activation == "relu"
            and self.recipe.normalization == self.recipe.residual == "none"
            and not self.recipe.dropout
        )
        self._scratch: dict[tuple[Any, ...], Tensor] = {}
        zero = torch.zeros(1, dtype=self.dtype)
        act = getattr(network, "act1", nn.ReLU())
        self.moves_zero = not isinstance(act, StackedPReLU | StackedRReLU | MaxPieces) and bool(
            act(zero) != 0
        )

    def _shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        sizes = tensor.shape[1:]
        if self.narrow:
            return (*sizes, self.places)
        if name.startswith("act") and sizes == (1,):
            return (self.members, 1)
        return (self.members, *(round_up(size, FEATURES) for size in sizes))

    @staticmethod
    def _view(flat: Tensor, block: tuple[int, tuple[int, ...]]) -> Tensor:
        start, shape = block
        return flat[start : start + math.prod(shape)].view(shape)

    def _real(self, padded: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the part that is not padding, members first."""
        if self.narrow:
            return padded[..., : self.members].movedim(-1, 0)
        return padded[tuple(slice(size) for size in shape)]

    def _put(self, padded: Tensor, value: Tensor) -> None:
        self._real(padded, value.shape).copy_(value)

    def store(self) -> None:
        """Copy everything back into the network."""
        state = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        with torch.no_grad():
            for name, padded in (self.values | self.buffers).items():
                state[name].copy_(self._real(padded, state[name].shape))
            for name, buffer in self.network.named_buffers():
                if name.endswith("num_batches_tracked"):
                    buffer.fill_(self.step)
        for module in self.network.modules():
            if isinstance(module, _Keyed):
                module.calls = self.step

    def scratch(self, shape: Sequence[int], layer: int) -> Tensor:
        """Return a buffer for the gradient that a layer hands down; the next but one reuses it."""
        key = (tuple(shape), layer % 2)
        if key not in self._scratch:
            self._scratch[key] = self.flat.new_empty(shape)
        return self._scratch[key]

    def _pad(self, x: Tensor) -> Tensor:
        missing = 0 if self.narrow else -x.shape[-1] % FEATURES
        return F.pad(x, (0, missing)) if missing else x

    def run(self, x: Tensor) -> Tensor:
        """Run all members on padded inputs and return padded outputs."""
        return _wire(self.recipe.hidden, self.recipe.residual, x, self._apply)

    def _apply(self, kind: str, layer: int, x: Tensor) -> Tensor:
        name = f"{kind}{layer}"
        module = getattr(self.network, name, None)
        if module is None:
            return x
        if kind == "linear":
            return _Apply.apply(self.anchor, x, self, self.maps[layer - 1], layer)
        if kind == "norm":
            return self._normalize(name, module, x)
        if kind == "dropout":
            return x * self._keyed(module, x, self._kept) if self.training else x
        out = self._activate(name, module, x)
        if self.flags is not None:
            peak = out.detach()
            peak = (peak.abs() if self.recipe.activation == "hardswish" else peak).amax(1)
            seen = self.flags[layer - 1]
            # NaN is not silence: it wins every maximum.
            self.flags[layer - 1] = peak if seen is None else torch.maximum(seen, peak)
        return out

    def _activate(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        if self.plain:
            return x
        if isinstance(module, nn.ReLU):
            return F.relu(x) if self.recipe.residual == "pre-activation" else F.relu_(x)
        if isinstance(module, StackedPReLU):
            slope = self.leaves[f"{name}.weight"].unsqueeze(1)
            return torch.where(x > 0, x, slope * x)
        if isinstance(module, StackedRReLU):
            if not self.training:
                return F.leaky_relu(x, (module.lower + module.upper) / 2)
            slope = self._keyed(module, x, self._slope)
            return torch.where(x > 0, x, slope * x)
        if isinstance(module, MaxPieces):
            pieces, layer = module.pieces, int(name.removeprefix("act"))
            units = self.recipe.hidden_widths[layer - 1]
            if self.narrow:
                return x.unflatten(0, (units, pieces)).amax(1)
            return self._pad(x[..., : units * pieces].unflatten(-1, (units, pieces)).amax(-1))
        out = _without_tail(module, x)
        if self.moves_zero and not self.narrow:
            real = self.recipe.hidden_widths[int(name.removeprefix("act")) - 1]
            return self._pad(out[..., :real]) if real < out.shape[-1] else out
        return out

    def _kept(self, module: Any, bits: Tensor) -> Tensor:
        return _kept(bits, module.p, self.dtype)

    def _slope(self, module: Any, bits: Tensor) -> Tensor:
        return _slopes(bits, module.lower, module.upper, self.dtype)

    def _keyed(self, module: Any, x: Tensor, value: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """Draw an element's number by member, step, layer and place, in the engine's layout."""
        features = self.recipe.hidden_widths[module.site // 2 - 1]
        batch = x.shape[1]
        if self.keys is None:
            self.keys = module.keys.to(self.device)
        bits = _bits(self.keys, self.step, module.site, batch * features)
        drawn = value(module, bits).view(-1, batch, features)
        if self.narrow:
            return F.pad(drawn.permute(2, 1, 0), (0, self.places - self.members))
        return self._pad(drawn)

    def _normalize(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        weight = self.leaves[f"{name}.weight"].unsqueeze(1)
        bias = self.leaves[f"{name}.bias"].unsqueeze(1)
        if isinstance(module, StackedBatchNorm):
            running_mean = self.buffers[f"{name}.running_mean"]
            running_var = self.buffers[f"{name}.running_var"]
            if self.training:
                var, mean = torch.var_mean(x, 1, correction=0)
                with torch.no_grad():
                    n = x.shape[1]
                    running_mean.lerp_(mean, module.momentum)
                    running_var.lerp_(var * (n / (n - 1)), module.momentum)
            else:
                mean, var = running_mean, running_var
            scale = weight * torch.rsqrt(var + module.eps).unsqueeze(1)
            return (x - mean.unsqueeze(1)) * scale + bias
        assert isinstance(module, StackedLayerNorm)
        features = module.weight.shape[1]
        if self.narrow:
            var, mean = torch.var_mean(x, 0, correction=0)
            normal = (x - mean) * torch.rsqrt(var + module.eps)
        else:
            normal = self._pad(F.layer_norm(x[..., :features], (features,), eps=module.eps))
        return normal * weight + bias

    def norms(self) -> Tensor:
        """Return the norm of each member's gradient, shape (places,)."""
        total = torch.zeros(self.places, dtype=self.dtype, device=self.device)
        for grad in self.grads.values():
            square = grad * grad
            dims = list(range(grad.dim() - 1)) if self.narrow else list(range(1, grad.dim()))
            total += square.sum(dims)
        return total.sqrt_()

    def clip(self, norms: Tensor, largest: float) -> None:
        """Scale down the gradients of members whose norm is too large."""
        factor = (largest / (norms + 1e-6)).clamp_(max=1.0)
        for grad in self.grads.values():
            grad.mul_(factor if self.narrow else factor.view(-1, *[1] * (grad.dim() - 1)))


class Data:
    """The training or validation set in the engine's layout."""

    def __init__(self, engine: Engine, x: Tensor, y: Tensor):
        self.engine, self.n = engine, x.shape[-2]
        self.loss, self.outputs = engine.plan.loss, engine.recipe.outputs
        self.own_x, self.own_y = x.dim() == 3, y.dim() > shared_dims(self.loss)
        if engine.narrow:
            extra = engine.places - engine.members
            # (in, n) or (in, n, M)
            self.x = F.pad(x.permute(2, 1, 0), (0, extra)) if self.own_x else x.mT.contiguous()
            if self.own_y:
                y = y.movedim(0, -1)
                y = torch.cat([y, y.new_zeros(*y.shape[:-1], extra)], -1)
            self.y = y
        else:
            self.x = F.pad(x, (0, -x.shape[-1] % FEATURES)).contiguous()
            self.y = y

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return neighboring examples for all members; shared ones as expanded views."""
        engine = self.engine
        if engine.narrow:
            x = self.x[:, start:stop]
            x = x if self.own_x else x.unsqueeze(-1).expand(-1, -1, engine.places)
            y = self.y[start:stop]
            return x, y if self.own_y else y.unsqueeze(-1).expand(*y.shape, engine.places)
        x = self.x[..., start:stop, :]
        x = x if self.own_x else x.expand(engine.members, -1, -1)
        y = self.y[:, start:stop] if self.own_y else self.y[start:stop]
        return x, y if self.own_y else y.expand(engine.members, *y.shape)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the examples of an index: (M, B), or (B, places) with the members last."""
        engine = self.engine
        flat = index.reshape(-1)
        if engine.narrow:
            if self.own_x:
                x = self.x.gather(1, index.expand(len(self.x), *index.shape))
            else:
                x = self.x.index_select(1, flat).view(len(self.x), *index.shape)
            if self.own_y:
                shape = (index.shape[0], *self.y.shape[1:-1], index.shape[1])
                inner = index.view(index.shape[0], *[1] * (self.y.dim() - 2), -1)
                return x, self.y.gather(0, inner.expand(shape))
            y = self.y.index_select(0, flat).view(*index.shape, *self.y.shape[1:])
            return x, y.movedim(1, -1)
        apart = (torch.arange(len(index), device=index.device)[:, None] * self.n + index).view(-1)
        x = self.x.flatten(0, 1) if self.own_x else self.x
        y = self.y.flatten(0, 1) if self.own_y else self.y
        x = x.index_select(0, apart if self.own_x else flat).view(*index.shape, -1)
        y = y.index_select(0, apart if self.own_y else flat)
        return x, y.view(*index.shape, *y.shape[1:])

    def output(self, out: Tensor) -> Tensor:
        """Drop the padding of the outputs: (M, B, outputs), or (outputs, B, places)."""
        return out if self.engine.narrow else out[..., : self.outputs]

    def total(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the members' mean losses over a batch."""
        batch = out.shape[1]
        out = self.output(out)
        if callable(self.loss):
            return self.each(out, y).sum()
        if self.loss == "cross_entropy":
            if self.engine.narrow:
                return F.cross_entropy(out.transpose(0, 1), y, reduction="sum") / batch
            return F.cross_entropy(out.flatten(0, 1), y.reshape(-1), reduction="sum") / batch
        y = y.transpose(0, 1) if self.engine.narrow else y
        compare = F.mse_loss if self.loss == "mse" else F.l1_loss
        return compare(out, y, reduction="sum") / (batch * self.outputs)

    def each(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the members' losses, from a function of the user's, members first."""
        members = self.engine.members
        if self.engine.narrow:
            out, y = out.permute(2, 1, 0)[:members], y.movedim(-1, 0)[:members]
        losses = self.loss(out, y)
        if losses.shape != (members,):
            raise ValueError(
                f"the loss must return one number a member, shape ({members},), "
                f"not {tuple(losses.shape)}"
            )
        return losses

    def sums(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the examples of loss and hits, both (places,)."""
        narrow = self.engine.narrow
        out = self.output(out)
        over = 0 if narrow else 1
        if callable(self.loss):
            losses = self.each(out, y) * out.shape[1]
            return losses, torch.full_like(losses, math.nan)
        if self.loss == "cross_entropy":
            classes = 0 if narrow else -1
            log_p = torch.log_softmax(out, classes)
            losses = -log_p.gather(classes, y.unsqueeze(classes)).squeeze(classes)
            hits = (out.argmax(classes) == y).to(out.dtype)
            return losses.sum(over), hits.sum(over)
        y = y.transpose(0, 1) if narrow else y
        error = out - y
        error = error * error if self.loss == "mse" else error.abs()
        losses = error.mean(0 if narrow else -1).sum(over)
        return losses, torch.full_like(losses, math.nan)


def evaluate(engine: Engine, data: Data, watch: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return loss, accuracy and the largest output of each hidden unit over a whole set.

    No outputs are returned unless asked for, or for functions that are never silent.
    """
    engine.training = False
    watch = watch and engine.recipe.activation in SILENT
    engine.flags = [None] * engine.recipe.hidden if watch else None
    loss = hits = torch.zeros((), dtype=engine.dtype, device=engine.device)
    with torch.no_grad():
        for start in range(0, data.n, ROWS):
            x, y = data.rows(start, min(start + ROWS, data.n))
            one, two = data.sums(engine.run(x), y)
            loss, hits = loss + one, hits + two
    flags = engine.flags or []
    engine.training, engine.flags = True, None
    members = engine.members
    peaks = []
    for layer, flag in enumerate(flags):
        assert flag is not None
        real = (members, engine.recipe.hidden_widths[layer])
        peaks.append(engine._real(flag, real))
    return loss[:members] / data.n, hits[:members] / data.n, peaks


def _fused() -> dict[str, Callable[..., Any]]:
    """Return torch's fused updates on the processor, if this torch has them."""
    found = {}
    for name in ("adam", "adamw"):
        update = getattr(torch, f"_fused_{name}_", None)
        if update is not None:
            one = [torch.zeros(1)]
            with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
                update(
                    one, [torch.zeros(1)], [torch.zeros(1)], [torch.zeros(1)], [],
                    [torch.ones(())], lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8,
                    amsgrad=False, maximize=False,
                )  # fmt: skip
                found[name] = update
    return found


FUSED = _fused()


class Optimizer:
    """The optimizers of torch.optim over one flat buffer, with a rate for each number."""

    def __init__(self, engine: Engine):
        self.name, self.options = engine.plan.optimizer, engine.plan.options
        count = STATES[self.name] + bool(self.options.get("momentum"))
        state = [torch.zeros_like(engine.flat) for _ in range(count)]
        self.fused = self._segments(engine, state)
        start = sum(segment[1].numel() for segment in self.fused)
        self.p, self.g, self.rates = engine.flat[start:], engine.grad[start:], engine.rates[start:]
        self.state = [tensor[start:] for tensor in state]
        self.scratch = torch.zeros_like(self.p)
        self.t = 0

    def _segments(self, engine: Engine, state: list[Tensor]) -> list[tuple[Any, ...]]:
        """Return rate, parameters, gradients and moments of what torch's fused Adam can take.

        It passes over the memory once instead of seven times but takes one rate a call: one call
        for each run of members of equal rate. Whether it is used must not depend on the members.
        """
        matrices = [m.weight for m in engine.maps]
        if (
            engine.narrow
            or self.name not in FUSED
            or engine.device.type != "cpu"
            or sum(matrix[0].numel() for matrix in matrices) < FUSED_FROM
        ):
            return []
        everything = (engine.flat, engine.grad, *state)
        rates = engine.plan.lr.tolist()
        front = sum(matrix.numel() for matrix in matrices)
        if len(set(rates)) == 1:
            return [(rates[0], *(tensor[:front] for tensor in everything))]
        segments, offset = [], 0
        for matrix in matrices:
            size, member = matrix[0].numel(), 0
            for rate, run in itertools.groupby(rates):
                length = len(list(run))
                cut = slice(offset + member * size, offset + (member + length) * size)
                segments.append((rate, *(tensor[cut] for tensor in everything)))
                member += length
            offset += matrix.numel()
        return segments

    def step(self, factor: float) -> None:
        """Move the parameters by one step with the rates times ``factor``."""
        self.t += 1
        decay = self.options["weight_decay"]
        if self.fused:
            beta1, beta2 = self.options["betas"]
            count = torch.tensor(float(self.t))
            by_rate: dict[float, list[tuple[Any, ...]]] = {}
            for rate, *tensors in self.fused:
                by_rate.setdefault(rate, []).append(tuple(tensors))
            for rate, tensors in by_rate.items():
                p, g, first, second = (list(column) for column in zip(*tensors, strict=True))
                FUSED[self.name](
                    p, g, first, second, [], [count] * len(p), lr=rate * factor, beta1=beta1,
                    beta2=beta2, weight_decay=decay, eps=self.options["eps"], amsgrad=False,
                    maximize=False,
                )  # fmt: skip
        if decay and self.name == "adamw":
            self.p.addcmul_(self.p, self.rates, value=-factor * decay)
        elif decay:
            self.g.add_(self.p, alpha=decay)
        getattr(self, "_" + ("adam" if self.name == "adamw" else self.name))(factor)

    def _sgd(self, factor: float) -> None:
        move = self.g
        if momentum := self.options["momentum"]:
            (velocity,) = self.state
            velocity.mul_(momentum).add_(self.g)
            move = self.g.add_(velocity, alpha=momentum) if self.options["nesterov"] else velocity
        self.p.addcmul_(move, self.rates, value=-factor)

    def _adam(self, factor: float) -> None:
        (first, second), (beta1, beta2) = self.state, self.options["betas"]
        first.lerp_(self.g, 1 - beta1)
        second.mul_(beta2).addcmul_(self.g, self.g, value=1 - beta2)
        # Both bias corrections in the scalars: eps is enlarged by what the root is not divided.
        correction = math.sqrt(1 - beta2**self.t)
        torch.sqrt(second, out=self.scratch).add_(self.options["eps"] * correction)
        torch.div(first, self.scratch, out=self.scratch)
        scale = factor * correction / (1 - beta1**self.t)
        self.p.addcmul_(self.scratch, self.rates, value=-scale)

    def _adamax(self, factor: float) -> None:
        (first, largest), (beta1, beta2) = self.state, self.options["betas"]
        first.lerp_(self.g, 1 - beta1)
        torch.abs(self.g, out=self.scratch).add_(self.options["eps"])
        torch.maximum(largest.mul_(beta2), self.scratch, out=largest)
        torch.div(first, largest, out=self.scratch)
        self.p.addcmul_(self.scratch, self.rates, value=-factor / (1 - beta1**self.t))

    def _adadelta(self, factor: float) -> None:
        (square, moved), rho, eps = self.state, self.options["rho"], self.options["eps"]
        square.mul_(rho).addcmul_(self.g, self.g, value=1 - rho)
        torch.add(moved, eps, out=self.scratch).sqrt_()
        self.scratch.mul_(self.g).div_((square + eps).sqrt_())
        moved.mul_(rho).addcmul_(self.scratch, self.scratch, value=1 - rho)
        self.p.addcmul_(self.scratch, self.rates, value=-factor)

    def _rmsprop(self, factor: float) -> None:
        square, alpha = self.state[0], self.options["alpha"]
        square.mul_(alpha).addcmul_(self.g, self.g, value=1 - alpha)
        torch.sqrt(square, out=self.scratch).add_(self.options["eps"])
        torch.div(self.g, self.scratch, out=self.scratch)
        move = self.scratch
        if momentum := self.options["momentum"]:
            move = self.state[1].mul_(momentum).add_(self.scratch)
        self.p.addcmul_(move, self.rates, value=-factor)
