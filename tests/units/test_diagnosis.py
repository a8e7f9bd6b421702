"""`diagnose` against brute force, on architectures of every kind, and its promised failures."""

import copy
import random
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relubook.units.diagnosis import AmbiguousUnitsError, Report, diagnose, silence_bound
from relubook.units.report import STATES
from relubook.units.revival import revive_
from relubook.units.watch import Watch


class Tapped(nn.Module):
    """A model that can log each pre-activation next to the call, which `diagnose` never sees."""

    log: list[tuple[str, Tensor, tuple[int, ...], int | None, str]] | None = None

    def tap(
        self, name: str, x: Tensor, *units: int, batch: int | None = 0, rule: str = "relu"
    ) -> Tensor:
        if Tapped.log is not None:
            Tapped.log.append((name, x.detach().clone(), units or (1,), batch, rule))
        return x


FIRES: dict[str, Callable[[float], bool]] = {
    "relu": lambda x: max(x, 0.0) != 0,
    "hardswish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6 != 0,
    "threshold": lambda x: (x if x > 0.3 else 0.0) != 0,
}


def brute_force(model: nn.Module, batches: list[Any], run: Callable[..., Any]) -> dict[str, Any]:
    """Count in plain Python, one number at a time."""
    result: dict[str, Any] = {}
    for batch in batches:
        Tapped.log = []
        with torch.no_grad():
            run(model, batch)
        log, Tapped.log = Tapped.log, None
        reached: dict[str, dict[int, set[int]]] = {}
        sizes: dict[str, int] = {}
        for name, x, units, batch_at, rule in log:
            order = [dim % x.ndim for dim in units]
            rest = [dim for dim in range(x.ndim) if dim not in order]
            site = result.setdefault(
                name, {"inputs": 0, "observations": 0, "fired": {}, "by_input": {}, "peak": {}}
            )
            moved = x.permute(order + rest).flatten(0, len(order) - 1)
            inputs = torch.zeros_like(x, dtype=torch.long)
            if batch_at is not None:
                index = torch.arange(x.shape[batch_at])
                inputs += index.view([-1 if d == batch_at else 1 for d in range(x.ndim)])
            owner = inputs.permute(order + rest).flatten(0, len(order) - 1).flatten(1)
            sizes[name] = max(sizes.get(name, 0), 1 if batch_at is None else x.shape[batch_at])
            site["observations"] += moved[0].numel()
            for unit, values in enumerate(moved.flatten(1).tolist()):
                site["fired"].setdefault(unit, 0)
                site["by_input"].setdefault(unit, 0)
                for value, who in zip(values, owner[unit].tolist(), strict=True):
                    if FIRES[rule](value):
                        site["fired"][unit] += 1
                        reached.setdefault(name, {}).setdefault(unit, set()).add(who)
                peak = site["peak"].get(unit, -float("inf"))
                site["peak"][unit] = max([peak, *values])
        for name, size in sizes.items():
            result[name]["inputs"] += size
            for unit, who in reached.get(name, {}).items():
                result[name]["by_input"][unit] += len(who)
    return result


def agree(report: Report, oracle: dict[str, Any], *, by_input: bool = True) -> None:
    assert sorted(site.name for site in report) == sorted(oracle)
    for site in report:
        expected = oracle[site.name]
        assert site.inputs == expected["inputs"], site.name
        assert site.observations == expected["observations"], site.name
        assert site.fired.tolist() == list(expected["fired"].values()), site.name
        if by_input:
            assert site.fired_inputs is not None, site.name
            assert site.fired_inputs.tolist() == list(expected["by_input"].values()), site.name
        assert site.peak.tolist() == pytest.approx(list(expected["peak"].values()), rel=1e-6)


class Functional(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.tap("relu()#1", self.one(x), -1))
        x = torch.relu(self.tap("relu()#2", self.two(x), -1))
        return self.out(x)


class Spellings(Tapped):
    """Every way to write the rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(16))

    def forward(self, x: Tensor) -> Tensor:
        f = iter(self.layers)
        x = self.tap("relu()#1", next(f)(x), -1).relu()
        x = self.tap("relu()#2", next(f)(x), -1).relu_()
        x = F.relu(self.tap("relu()#3", next(f)(x), -1), inplace=True)
        x = self.tap("clamp()#1", next(f)(x), -1).clamp(min=0)
        x = self.tap("clamp()#2", next(f)(x), -1).clamp_(0.0)
        x = self.tap("clamp()#3", next(f)(x), -1).clip(min=0, max=6)
        x = self.tap("clamp_min()", next(f)(x), -1).clamp_min(0)
        x = torch.threshold(self.tap("threshold()#1", next(f)(x), -1), 0, 0)
        x = F.threshold(self.tap("threshold()#2", next(f)(x), -1, rule="threshold"), 0.3, 0.0, True)
        x = F.relu6(self.tap("relu6()", next(f)(x), -1))
        x = F.hardtanh(self.tap("hardtanh()", next(f)(x), -1), 0, 2)
        x = F.hardswish(self.tap("hardswish()", 9 * next(f)(x), -1, rule="hardswish"))
        x = torch.maximum(self.tap("maximum()#1", next(f)(x), -1), torch.zeros(()))
        x = self.tap("maximum()#2", next(f)(x), -1)
        x = torch.max(torch.zeros_like(x), x)
        x = torch.clamp(self.tap("clamp()#4", next(f)(x), -1), min=torch.tensor(0.0))
        return torch.relu_(self.tap("relu()#4", next(f)(x), -1))


class Convolutional(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.fc = nn.Conv2d(6, 4, 3, groups=2), nn.Linear(4, 5)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.tap("relu#1", self.bn1(self.conv1(x))))
        x = F.max_pool2d(self.conv2(x), 2)
        x = self.relu(self.tap("relu#2", x))
        x = self.drop(self.fc(x.mean((2, 3))))
        return self.relu(self.tap("relu#3", x))


class Residual(Tapped):
    """Shared blocks, functional sums, pre-activation."""

    class Block(Tapped):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.bn, self.conv = nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.tap(f"{self.name}.relu()#1", self.bn(x)))
            out = self.conv(out) + x
            return F.relu(self.tap(f"{self.name}.relu()#2", out))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv1d(2, 4, 1), self.Block("block")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x)))


class Branches(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)
        self.c = nn.ConvTranspose2d(7, 5, 2, stride=2)
        self.gate = nn.Linear(5, 5)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], dim=1)
        x = self.act(self.tap("act#1", x))
        x = self.c(x)
        gate = F.hardtanh(self.tap("hardtanh()", self.gate(x.mean((2, 3))), -1), 0, 1)
        x = x * gate[:, :, None, None]
        x = torch.cat([x, -x], 1)  # concatenated ReLU
        return self.act(self.tap("act#2", x))


class Volumes(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4)
        self.inst = nn.InstanceNorm3d(4, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.tap("relu()#1", self.norm(self.conv(x))))
        return F.relu(self.tap("relu()#2", self.inst(x - 0.1 * x)))


class Attention(Tapped):
    """Self-attention with a ReLU feed-forward and ReLU features, split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (z.view(b, t, 2, 4).transpose(1, 2) for z in (q, k, v))
        q = F.relu(self.tap("relu()#1", q, 1, 3))
        k = F.relu(self.tap("relu()#2", k, 1, 3))
        mixed = F.relu(self.tap("relu()#3", (q @ k.transpose(-1, -2)) @ v, 1, 3))
        mixed = mixed.transpose(1, 2).reshape(b, t, 8)
        x = self.norm(x + self.out(F.relu(self.tap("relu()#4", mixed, -1))))
        return x + self.down(F.relu(self.tap("relu()#5", self.up(x), -1)))


class Library(Tapped):
    """`nn.TransformerEncoderLayer`, fused in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if Tapped.log is not None:
            hook = lambda module, args, out: void(self.tap("layer.relu()", out, -1))  # noqa: E731
            handle = self.layer.linear1.register_forward_hook(hook)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                return self.layer(x)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
                handle.remove()
        return self.layer(x)


def void(value: object) -> None:
    pass


class Recurrent(Tapped):
    """`nn.RNN`, unrolled by hand for the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 5, 2, nonlinearity="relu", batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        if Tapped.log is None:
            return self.rnn(x)[0]
        for layer in range(2):
            outputs = []
            for suffix in ("", "_reverse"):
                w, u, b, c = (
                    getattr(self.rnn, f"{kind}_l{layer}{suffix}")
                    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                h, steps = torch.zeros(len(x), 5), []
                for t in range(x.shape[1]) if not suffix else reversed(range(x.shape[1])):
                    # the order of addition of the library, so that the sums round alike
                    z = F.linear(h, u, c) + F.linear(x, w, b)[:, t]
                    h = self.tap(f"rnn.l{layer}{suffix}", z, -1).relu()
                    steps.append(h)
                outputs.append(torch.stack(steps if not suffix else steps[::-1], 1))
            x = torch.cat(outputs, -1)
        return x


class CellLoop(Tapped):
    """A loop whose length depends on the data, through a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.RNNCell(3, 4, nonlinearity="relu"), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 4)
        for _ in range(3):
            cell = self.cell
            z = F.linear(h, cell.weight_hh, cell.bias_hh) + F.linear(
                x, cell.weight_ih, cell.bias_ih
            )
            self.tap("cell.relu()", z, -1)
            h = cell(x, h)
        return self.out(h)


class ControlFlow(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.loop = nn.Linear(5, 9), nn.Linear(5, 4), nn.Linear(5, 5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        rounds = 1 + int(x[0, 0] > 0) + int(x[0, 1] > 0)
        for _ in range(rounds):
            x = F.relu(self.tap("relu()", self.loop(x), -1))
        if rounds == 1:
            return self.relu(self.tap("relu#1", self.wide(x), -1))
        return self.relu(self.tap("relu#2", self.narrow(x), -1))


class Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * (ctx.saved_tensors[0] > 0)


class Unusual(Tapped):
    """Custom functions, checkpoints, bare parameters, flattening, einsum, stacked members."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
        self.kernel = nn.Parameter(torch.randn(4, 1, 3))
        self.heads = nn.Parameter(torch.randn(8, 2, 3))
        self.members = nn.Parameter(torch.randn(2, 3, 4))
        self.inner = nn.Linear(6, 6)

    def _inner(self, x: Tensor) -> Tensor:
        return F.relu(self.tap("relu()#1", self.inner(x), -1))

    def forward(self, x: Tensor) -> Tensor:
        x = Rectify.apply(self.tap("clamp()", F.linear(x, self.weight, self.bias), -1))
        x = checkpoint(self._inner, x, use_reentrant=False)
        x = F.conv1d(x[:, None], self.kernel)  # (batch, 4, 4)
        channels = self.tap("relu()#2", x)
        x = F.relu(channels.flatten(1))  # units are still the 4 channels
        x = x.view(-1, 4, 4)[:, :, :2].flatten(1)
        x = torch.einsum("bi,ihk->bhk", x, self.heads)
        x = F.relu(self.tap("relu()#3", x, 1, 2))
        x = torch.bmm(x.transpose(0, 1), self.members)  # (members, batch, out)
        return F.relu(self.tap("relu()#4", x, 0, 2, batch=1))


class Parts(Tapped):
    """Modules of activations inside containers, a shared one, a custom one."""

    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x).square()

    def __init__(self) -> None:
        super().__init__()
        act = nn.Hardswish(inplace=True)
        self.net = nn.Sequential(nn.Linear(5, 6), act, nn.Linear(6, 6), act)
        self.square, self.fc = self.Squared(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.net):
            if k % 2:
                self.tap(f"net.1#{k // 2 + 1}", 5 * x if False else x, -1, rule="hardswish")
            x = layer(x)
        return self.square(self.tap("square", self.fc(x), -1))


class Sequence(Tapped):
    """(batch, time, features), normalized, transposed to a convolution and back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(11, 6), nn.Linear(6, 8)
        self.conv, self.bn = nn.Conv1d(8, 5, 3, padding=1), nn.BatchNorm1d(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.relu(self.tap("relu()#1", self.embed(ids), -1))
        x = self.fc(x).transpose(1, 2)
        x = F.relu(self.tap("relu()#2", self.bn(x), 1))
        x = self.conv(x).permute(2, 0, 1)
        return F.relu(self.tap("relu()#3", x, 2, batch=1))


def call(model: nn.Module, x: Any) -> Any:
    return model(x)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "functional": (Functional, (5,)),
    "functional on sequences": (Functional, (3, 5)),
    "every spelling": (Spellings, (6,)),
    "convolution, in place, reused": (Convolutional, (3, 9, 9)),
    "residual, shared block, 1-D": (Residual, (2, 7)),
    "branches, transposed convolution": (Branches, (2, 4, 4)),
    "3-D": (Volumes, (1, 5, 5, 4)),
    "attention": (Attention, (4, 8)),
    "TransformerEncoderLayer": (Library, (4, 8)),
    "RNN": (Recurrent, (4, 3)),
    "RNN cell": (CellLoop, (3,)),
    "control flow": (ControlFlow, (5,)),
    "custom functions and bare weights": (Unusual, (5,)),
    "containers": (Parts, (5,)),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "custom functions" in name else ())
        for name in ARCHITECTURES
    ],
)
def test_counts_agree_with_brute_force(name, mode):
    build, shape = ARCHITECTURES[name]
    model = build()
    model.train(mode == "train")
    for module in model.modules():  # random masks would differ between the two runs
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    batches = [torch.randn(size, *shape) for size in (4, 3, 1, 4)]
    if mode == "train":
        batches.pop(2)  # batch norm wants more than one value
    report = diagnose(model, batches)
    for site in report:
        assert site.inputs <= report.inputs == sum(map(len, batches))
    agree(report, brute_force(model, batches, call))


def test_embeddings_and_permutations():
    model = Sequence()
    batches = [torch.randint(11, (size, 6)) for size in (4, 2)]
    agree(diagnose(model.eval(), batches), brute_force(model, batches, call))


def test_channels_last():
    model = Convolutional().to(memory_format=torch.channels_last).eval()
    batches = [torch.randn(4, 3, 9, 9).contiguous(memory_format=torch.channels_last)]
    agree(diagnose(model, batches), brute_force(model, batches, call))


def test_packed_sequences_count_each_sequence_once():
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(3, 4, nonlinearity="relu")

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])[0]

    model, lengths = Packs(), [5, 3, 1]
    x = torch.randn(3, 5, 3)
    site = diagnose(model, [x]).sites[0]
    output = model(x)
    assert (site.name, site.inputs, site.observations) == ("rnn.l0", 3, 9)
    assert site.fired.tolist() == (output > 0).sum((0, 1)).tolist()
    assert site.fired_inputs.tolist() == (output > 0).any(0).sum(0).tolist()


def test_of_packed_input_the_sequences_are_unknown():
    rnn, lengths = nn.RNN(3, 4, nonlinearity="relu"), [5, 3, 1]
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in lengths])
    with pytest.raises(TypeError, match="the input is a PackedSequence.*pass forward="):
        diagnose(rnn, [packed])
    report = diagnose(rnn, [packed], forward=lambda rnn, x: rnn(x), count=lambda _: len(lengths))
    output = nn.utils.rnn.pad_packed_sequence(rnn(packed)[0])[0]
    assert report[0].fired.tolist() == (output > 0).sum((0, 1)).tolist()
    assert (report[0].inputs, report[0].fired_inputs) == (3, None)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_and_parts(backend):
    model = Functional()
    batches = [torch.randn(4, 5), torch.randn(3, 5)]
    oracle = brute_force(model, batches, call)
    compiled = torch.compile(model, backend=backend)
    agree(diagnose(compiled, batches), oracle)
    before = compiled(batches[0])
    agree(diagnose(compiled, batches), oracle)
    assert torch.equal(compiled(batches[0]), before)
    holder = nn.Sequential(torch.compile(Functional(), backend=backend), nn.ReLU())
    assert [site.name for site in diagnose(holder, batches)] == ["0.relu()#1", "0.relu()#2", "1"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("freeze", [False, True])
def test_scripted_and_frozen_models(freeze):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU())
    model.eval()
    batches = [torch.randn(3, 2, 4, 4), torch.randn(2, 2, 4, 4)]
    plain = diagnose(model, batches)
    scripted = torch.jit.script(model)
    report = diagnose(torch.jit.freeze(scripted) if freeze else scripted, batches)
    assert [site.fired.tolist() for site in report] == [site.fired.tolist() for site in plain]
    assert "scripted" in repr(report)


@pytest.mark.parametrize("forward", [None, lambda model, x: model.train()(x)])
@pytest.mark.parametrize(
    "wrapper", ["data parallel", "distributed", pytest.param("compiled", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_wrappers_are_looked_through(wrapper, forward):
    """Names and numbers are those of the model inside, whichever of both runs."""
    model, x = Functional().eval(), torch.randn(40, 5)
    with torch.no_grad():
        model.one.bias[:2] = -99.0
    with ExitStack() as stack:
        if wrapper == "distributed":
            alone = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=alone, rank=0, world_size=1)
            stack.callback(torch.distributed.destroy_process_group)
        wrap = {
            "data parallel": nn.DataParallel,
            "distributed": nn.parallel.DistributedDataParallel,
            "compiled": partial(torch.compile, backend="eager"),
        }
        wrapped = wrap[wrapper](model).eval()
        report = diagnose(wrapped, [x], forward=forward)
        assert not any(module.training for module in wrapped.modules())
        with Watch(wrapped.train(), window=1) as watch:
            wrapped(x).sum().backward()
        plain = diagnose(model, [x], forward=forward)
        watched = [(site.name, site.dead.tolist()) for site in watch.compute()]
        assert [(site.name, site.dead.tolist()) for site in report] == watched
        assert watched[0][0] == "relu()#1"
        assert report.to_frame().equals(plain.to_frame())
        assert [site.producer for site in report] == [site.producer for site in plain]
        assert revive_(copy.deepcopy(model), report, x).total == 2
        assert revive_(wrapped, report, x).total == 2
        assert not diagnose(model, [x])["relu()#1"].dead[:2].any()


# Models of a library


def module_oracle(
    model: nn.Module, kinds: tuple[type, ...], batches: list[Any], run: Callable[..., Any], dim: int
) -> dict[str, tuple[int, list[int]]]:
    """Count at the inputs of activation modules, by hooks."""
    seen: dict[str, Tensor] = {}
    observed: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().movedim(dim, 0).flatten(1)
            seen[name] = seen.get(name, 0) + (x > 0).sum(1)
            observed[name] = observed.get(name, 0) + x.shape[1]

        return count

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    for handle in handles:
        handle.remove()
    return {name: (observed[name], seen[name].tolist()) for name in seen}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["opt", "t5", "resnet", "mobilenet"])
def test_models_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    dim = 1 if kind in ("resnet", "mobilenet") else -1
    if kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=50,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            word_embed_proj_dim=16,
        )
        model = transformers.OPTForCausalLM(config)
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
        )
        model = transformers.T5ForConditionalGeneration(config)
    elif kind == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
        )
        model = transformers.ResNetForImageClassification(config)
    else:
        config = transformers.MobileNetV2Config(depth_multiplier=0.1, image_size=32)
        model = transformers.MobileNetV2ForImageClassification(config)
    model.eval()
    if dim == 1:
        batches = [{"pixel_values": torch.randn(n, 3, 32, 32)} for n in (2, 3)]
    else:
        batches = [
            {"input_ids": torch.randint(1, 50, (n, 7)), "attention_mask": torch.ones(n, 7).long()}
            for n in (2, 3)
        ]
        if kind == "t5":
            for batch in batches:
                batch["decoder_input_ids"] = batch["input_ids"]
    report = diagnose(model, batches)
    expected = module_oracle(
        model, (nn.ReLU, nn.ReLU6), batches, lambda model, batch: model(**batch), dim
    )
    assert len(expected) >= 2
    assert {site.name: (site.observations, site.fired.tolist()) for site in report} == expected
    assert report.inputs == 5
    for site in report:
        assert site.inputs == 5
        assert site.fired_inputs is not None


# States and the report


def engineered(*columns: list[float]) -> tuple[nn.Module, Tensor]:
    """Return a model whose unit i gets the pre-activations columns[i], and its input."""
    model = nn.Sequential(nn.Linear(len(columns), len(columns)), nn.ReLU(), nn.Identity())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(len(columns)))
        model[0].bias.zero_()
    return model, torch.tensor(columns).T.contiguous()


def test_states():
    n = 200
    model, x = engineered(
        [-1.0] * n,  # dead
        [0.0] * n,  # silent at exactly 0: dead
        [-1.0] * (n - 1) + [1.0],  # fires on 0.5% of the inputs: rare
        [-1.0] * (n - 2) + [1.0, 1.0],  # on 1%: no longer rare
        [1.0] * n,  # always on
        [1.0, -1.0] * (n // 2),  # mixed
    )
    site = diagnose(model, x.split(50))["1"]
    assert site.dead.tolist() == [True, True, False, False, False, False]
    states = [STATES[state] for state in site.state.tolist()]
    assert states == ["dead", "dead", "rare", "mixed", "always on", "mixed"]
    assert site.fired.tolist() == [0, 0, 1, 2, 200, 100]
    assert site.peak.tolist() == [-1, 0, 1, 1, 1, 1]
    assert site.upper_bound[0] == pytest.approx(1 - 0.05 ** (1 / n))
    assert site.upper_bound[2:].isnan().all()
    assert (site.kind, site.producer, site.unit_dim, site.units) == ("relu", "0", 1, 6)
    assert site.dead_fraction == pytest.approx(1 / 3)


@pytest.mark.slow
def test_silence_bound_is_clopper_and_pearsons():
    scipy = pytest.importorskip("scipy.stats")
    for n in (1, 10, 1000, 100000):
        exact = scipy.binomtest(0, n, alternative="less").proportion_ci(0.95, "exact").high
        assert silence_bound(n) == pytest.approx(exact, rel=1e-9)
    assert silence_bound(100000) == pytest.approx(3 / 100000, rel=2e-3)
    assert silence_bound(0) == 1


def test_the_bound_counts_inputs_not_positions():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    nn.init.constant_(model[0].bias, -100)
    site = diagnose(model, [torch.randn(4, 1, 10, 10)])["1"]
    assert (site.inputs, site.observations) == (4, 400)
    assert site.upper_bound[0] == pytest.approx(1 - 0.05 ** (1 / 4))


def test_a_sparse_detector_is_not_rare():
    """It fires at one position in a hundred, but on every input."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
    x = -torch.ones(5, 1, 20, 20)
    x[:, :, 3, 3] = 1
    site = diagnose(model, [x])["1"]
    assert site.fired.tolist() == site.fired_inputs.tolist() == [5]
    assert STATES[site.state] == "mixed"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_is_a_state_of_its_own(value):
    model, x = engineered([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0])
    with torch.no_grad():
        model[0].bias[0] = value
    report = diagnose(model, [x])
    site = report["1"]
    assert site.nonfinite.tolist() == [True, False, False]
    assert site.dead.tolist() == [False, True, False]
    assert STATES[site.state[0]] == "non-finite"
    assert "NON-FINITE" in repr(report)
    with pytest.raises(AssertionError, match="non-finite"):
        report.assert_alive(max_dead=1.0)


def test_a_dead_layer_is_called_out():
    model = Functional()
    nn.init.constant_(model.two.bias, -1000)
    report = diagnose(model, [torch.randn(8, 5)])
    assert report.dead_layers == ["relu()#2"]
    assert report["relu()#2"].dead_fraction == 1
    assert "DEAD LAYER: all 6 units of relu()#2 are dead" in repr(report)
    assert "network is constant behind it" in repr(report)
    assert "network is constant behind it" in report._repr_html_()
    with pytest.raises(AssertionError, match="6 of 6 units dead, the whole layer"):
        report.assert_alive(max_dead=0.99)


def test_report():
    model = Functional()
    nn.init.constant_(model.one.bias[:2], -1000)
    report = diagnose(model, [torch.randn(8, 5)] * 3)
    assert len(report) == 2
    assert [site.name for site in report] == ["relu()#1", "relu()#2"]
    assert "relu()#2" in report
    assert "nowhere" not in report
    with pytest.raises(KeyError, match="the sites are relu"):
        report["nowhere"]
    dead = sum(int(site.dead.sum()) for site in report)
    assert dead >= 2
    assert report.dead_fraction == dead / 13
    text = repr(report)
    assert text == str(report)
    for word in ("site", "units", "dead", "rare", "always on", "median rate", "24"):
        assert word in text
    assert f"{silence_bound(24):.2%}" in text
    report.assert_alive(max_dead=1)
    with pytest.raises(AssertionError, match="units dead"):
        report.assert_alive()
    with pytest.raises(ValueError, match="share of units"):
        report.assert_alive(max_dead=40)
    assert report.inputs == 24
    assert "<table>" in report._repr_html_()
    assert "7 units" in repr(report.sites[0])


def test_nothing_is_printed(capsys):
    diagnose(Functional(), [torch.randn(8, 5)])
    assert capsys.readouterr() == ("", "")


def test_report_as_a_frame():
    pytest.importorskip("pandas")
    report = diagnose(Functional(), [torch.randn(8, 5)])
    frame = report.to_frame()
    assert len(frame) == 13
    assert (frame.state == "dead").sum() == sum(int(site.dead.sum()) for site in report)
    assert frame[frame.site == "relu()#1"].fired.tolist() == report.sites[0].fired.tolist()


def test_plot_shows_every_site():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    report = diagnose(Spellings(), [torch.randn(8, 6)])
    figure = report.plot()
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{site.name} ({site.units})" for site in report]
    widths = [patch.get_width() for patch in axes.patches]
    assert sum(widths) == pytest.approx(len(report))
    figure.canvas.draw()
    pyplot.close(figure)


@settings(deadline=None, max_examples=25)
@given(
    width=st.integers(1, 6),
    depth=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    shift=st.floats(-3, 3),
)
def test_properties(width, depth, sizes, shift):
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
        nn.init.constant_(layers[-2].bias, shift)
    model = nn.Sequential(*layers)
    batches = [torch.randn(size, width) for size in sizes]
    report = diagnose(model, batches)
    whole = diagnose(model, torch.cat(batches))
    for site, other in zip(report, whole, strict=True):
        assert site.inputs == site.observations == sum(sizes)
        assert torch.equal(site.fired, other.fired)  # how data is batched does not matter
        assert (site.fired >= 0).all()
        assert (site.fired <= site.observations).all()
        assert torch.equal(site.dead, site.peak <= 0)
        assert sum(site.counts().values()) == site.units


def test_smooth_members_on_request():
    model = nn.Sequential(
        nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.LeakyReLU(), nn.Linear(4, 3), nn.ReLU()
    )
    with torch.no_grad():
        model[2].weight[1], model[2].bias[1] = 0, 0
    batches = [torch.randn(10, 5)]
    report = diagnose(model, batches)
    assert [site.name for site in report] == ["5"]
    assert "family='all' only: gelu (1 calls), leaky_relu (1 calls)" in repr(report)
    report = diagnose(model, batches, family="all")
    assert [site.kind for site in report] == ["gelu", "leaky_relu", "relu"]
    for index, site in zip((2, 4, 6), report, strict=True):
        magnitude = model[:index](batches[0]).detach().abs().mean(0)
        score = (magnitude / magnitude.mean().clamp(min=1e-30)).double()
        torch.testing.assert_close(site.score, score, rtol=1e-5, atol=1e-7)
        assert site.dormant.tolist() == (score <= 0.025).tolist()
    assert report["3"].dormant.tolist() == [False, True, False, False]
    assert not report["3"].dead.any()
    assert report["1"].fired.tolist() == (model[0](batches[0]) > 0).sum(0).tolist()
    for module in (nn.ELU(), nn.SELU(), nn.CELU(), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.PReLU()):
        assert len(diagnose(nn.Sequential(nn.Linear(5, 4), module), batches, family="all")) == 1
    assert len(diagnose(nn.Sequential(nn.Linear(5, 4), nn.RReLU()), batches, family="all")) == 1


# Which units


def test_producers_and_unit_dims():
    def facts(model: nn.Module, *shape: int) -> list[tuple[Any, Any]]:
        report = diagnose(model.eval(), [torch.randn(2, *shape)])
        return [(site.producer, site.unit_dim) for site in report]

    assert facts(Functional(), 3, 5) == [("one", 2), ("two", 2)]
    assert facts(Convolutional(), 3, 9, 9) == [("bn1", 1), ("conv2", 1), ("fc", 1)]
    assert facts(Residual(), 2, 7)[:2] == [("block.bn", 1), (None, 1)]  # a sum has no one producer
    assert facts(Attention(), 4, 8)[-1] == ("up", 2)
    assert facts(Attention(), 4, 8)[0] == (None, (1, 3))  # a part of qkv, two heads
    assert facts(Unusual(), 5)[0] == ("", 1)  # the model itself owns the weight
    named = diagnose(Functional(), [torch.randn(2, 5)])
    assert named.sites[0].location.startswith("test_diagnosis.py:")


def test_weight_norm_keeps_its_producer():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.ReLU())
    assert diagnose(model, [torch.randn(2, 5)])["1"].producer == "0"


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)).sum() + F.relu(x @ x.transpose(1, 2)).sum()


def test_an_ambiguous_site_is_skipped_with_a_note_on_how_to_decide():
    batches = [torch.randn(2, 5, 4)]
    report = diagnose(Scores(), batches)
    assert [site.name for site in report] == ["relu()#1"]
    assert "SKIPPED" in repr(report)
    assert "'relu()#2': shape (2, 5, 5): it is a product of two activations" in repr(report)
    assert "unit_dim={'relu()#2': 1}" in repr(report)
    report = diagnose(Scores(), batches, unit_dim={"relu()#2": 1})
    assert report["relu()#2"].unit_dim == 1
    assert report["relu()#1"].unit_dim == 2
    report = diagnose(Scores(), batches, unit_dim={"relu()#2": None})
    assert len(report) == 1
    assert [site.unit_dim for site in diagnose(Scores(), batches, unit_dim=-1)] == [2, 2]
    with pytest.raises(ValueError, match="'elsewhere'"):
        diagnose(Scores(), batches, unit_dim={"relu()#2": 1, "elsewhere": 1})
    with pytest.raises(ValueError, match="dimensions go from -3 to 2"):
        diagnose(Scores(), batches, unit_dim=7)


def test_patterns_of_names_decide_for_many_sites():
    model = nn.ModuleDict({"decoder": Scores(), "encoder": Functional()})

    def forward(model: nn.Module, x: Tensor) -> None:
        model["encoder"](torch.randn(2, 5))
        model["decoder"](x)

    x = torch.randn(2, 5, 4)
    report = diagnose(model, [x], forward=forward, unit_dim={"decoder.*": -1})
    assert [site.unit_dim for site in report if "decoder" in site.name] == [2, 2]
    report = diagnose(model, [x], forward=forward, unit_dim={"encoder.*": None, "*": 1})
    assert [site.name for site in report] == ["decoder.relu()#1", "decoder.relu()#2"]
    assert [site.unit_dim for site in report] == [1, 1]
    with pytest.raises(ValueError, match=r"'middle\.\*'"):
        diagnose(model, [x], forward=forward, unit_dim={"middle.*": 1})


def test_units_that_were_summed_up_are_ambiguous():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x).sum(-1))

    with pytest.raises(AmbiguousUnitsError, match="summed up"):
        diagnose(Summed(), [torch.randn(2, 5, 4)])


def test_images_without_a_layer_are_ambiguous():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 1))
    with pytest.raises(AmbiguousUnitsError, match="no layer came before it"):
        diagnose(model, [torch.randn(2, 3, 4, 4)])
    report = diagnose(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), [torch.randn(2, 3)])
    assert report["0"].units == 3


@pytest.mark.parametrize("again", [False, True])
def test_units_must_not_change_their_number(again):
    batches = [torch.randn(2, 5, 4), torch.randn(2, 6, 4)] + [torch.randn(2, 5, 4)] * again
    model = Scores()
    report = diagnose(model, batches, unit_dim={"relu()#2": 1})
    assert [site.name for site in report] == ["relu()#1"]
    assert report[0].fired.tolist() == sum((model.fc(x) > 0).sum((0, 1)) for x in batches).tolist()
    shape = r"'relu\(\)#2': shape \(2, 6, 6\)"
    assert re.search(shape + ": it had 5 units before and has 6 now", repr(report))
    with pytest.raises(AmbiguousUnitsError, match="5 units before and has 6"):
        diagnose(model, batches, unit_dim={"relu()#2": 1, "relu()#1": None})


def test_clamps_of_integers_and_weights_are_no_rectifiers():
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            index = torch.arange(3).clamp(min=0)
            x = self.fc(x)[:, index].clamp(min=-1).clamp(max=0.5)
            return F.relu(x) * self.scale.clamp(min=0)

    report = diagnose(Guarded(), [torch.randn(2, 4)])
    assert [site.name for site in report] == ["relu()"]
    assert "relu on weights" in repr(report)


# Batches


def test_kinds_of_batches():
    model = Functional()
    x = torch.randn(6, 5)
    expected = diagnose(model, [x]).sites[0].fired.tolist()
    for data in (
        x,
        {"x": x},
        [(x, torch.zeros(6))],
        [[x]],
        [{"x": x}],
        [({"x": x}, torch.zeros(6))],
        (batch for batch in x.split(4)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4),
    ):
        report = diagnose(model, data)
        assert report.inputs == 6
        assert report.sites[0].fired.tolist() == expected

    class Bag:
        def __init__(self, content: Tensor) -> None:
            self.content = content

    with pytest.raises(TypeError, match="Bag, not a tensor or a mapping.*pass forward"):
        diagnose(model, [Bag(x)])
    report = diagnose(model, [Bag(x)], forward=lambda model, bag: model(bag.content))
    assert report.inputs == 6
    assert report.sites[0].fired.tolist() == expected


def test_the_number_of_inputs():
    model = Functional()
    sequence_first = diagnose(model, [torch.randn(7, 3, 5)], batch_dim=1)
    assert [(site.inputs, site.observations) for site in sequence_first] == [(3, 21), (3, 21)]

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
            nodes = self.fc(nodes)
            return F.relu(nodes.index_add(0, edges[1], nodes[edges[0]]))

    batch = {"nodes": torch.randn(6, 4), "edges": torch.randint(6, (2, 9))}
    with pytest.raises(ValueError, match=r"batch 0: cannot tell how many inputs.*\[2, 6\]"):
        diagnose(Graph(), [batch])
    report = diagnose(Graph(), [batch], count=lambda batch: 1)
    assert (report.sites[0].inputs, report.sites[0].observations) == (1, 6)


def test_experts_count_only_what_reaches_them():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            up = self.up(x)
            return F.relu(up[x[:, 0] > 0]).sum()

    x = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    site = diagnose(Experts(), [x, -x, -x.abs()]).sites[0]
    assert (site.inputs, site.observations) == (3, 3)


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_data(value):
    good, bad = torch.randn(4, 5), torch.randn(4, 5)
    bad[1, 2] = value
    with pytest.raises(ValueError, match="batch 1 holds NaN, infinity.*forward="):
        diagnose(Functional(), [good, bad, good])
    meant = lambda model, x: model(x)  # noqa: E731
    report = diagnose(Functional(), [good, bad, good], forward=meant)
    assert (report.inputs, report.batches) == (12, 3)
    assert all(site.nonfinite.all() and not site.dead.any() for site in report)
    assert "NON-FINITE: 7 units" in repr(report)
    with pytest.raises(AssertionError, match="non-finite"):
        report.assert_alive()


def test_no_data():
    model = Functional()
    with pytest.raises(ValueError, match="holds no batch"):
        diagnose(model, [])
    batches = (torch.randn(2, 5) for _ in range(2))
    diagnose(model, batches)
    with pytest.raises(ValueError, match="exhausted"):
        diagnose(model, batches)
    with pytest.raises(ValueError, match="batch 1 is empty"):
        diagnose(model, [torch.randn(2, 5), torch.randn(0, 5)])
    for data in (None, 3, "data"):
        with pytest.raises(TypeError, match="not an iterable of batches"):
            diagnose(model, data)
    with pytest.raises(TypeError, match="batch 0: the input is a tuple"):
        diagnose(model, [()])
    with pytest.raises(ValueError, match="no tensor"):
        diagnose(model, [{"x": 1}])


def test_no_rectifier():
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"no rectifier; .* family='all' only: gelu \(1 calls\)"):
        diagnose(nn.Sequential(nn.Linear(5, 4), nn.GELU()), [x])
    with pytest.raises(ValueError, match="called no rectifier"):
        diagnose(nn.Linear(5, 4), [x])


def test_wrong_arguments():
    x = torch.randn(2, 5)
    with pytest.raises(TypeError, match=r"function, not a torch\.nn\.Module"):
        diagnose(lambda x: x, [x])
    for option in ({"family": "relu"}, {"family": True}):
        with pytest.raises(ValueError, match="family must be 'rectifiers' or 'all', not"):
            diagnose(Functional(), [x], **option)
    with pytest.raises(ValueError, match=r"0\.weight has no values yet"):
        diagnose(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), [x])


def test_a_hidden_rectifier_is_said_to_be_hidden():
    class Hidden(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return x * (x > 0)

    model = nn.Sequential(nn.Linear(5, 4), Hidden(), nn.Linear(4, 3), nn.ReLU())
    report = diagnose(model, [torch.randn(2, 5)])
    assert [site.name for site in report] == ["3"]
    assert "NOT SEEN: 1 was called" in repr(report)


def test_a_layer_with_a_rectifier_of_its_own_is_no_producer():
    class Rectified(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    class Wrapped(nn.Conv1d):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    for kind in (Rectified, Wrapped):
        model = nn.Sequential(kind(2, 3, 1), nn.ReLU())
        inner, outer = diagnose(model, [torch.randn(2, 2, 4)])
        assert (inner.producer, outer.producer) == ("0", None)


# No trace


class Failing(Tapped):
    """Disturbs all there is, and may raise on its second batch."""

    def __init__(self, error: type[BaseException] | None) -> None:
        super().__init__()
        self.error, self.calls = error, 0
        self.fc, self.bn, self.drop = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.bn.eval()  # as in fine-tuning: one part in another mode
        self.bn2 = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count = self.count + 1
        random.random()
        torch.rand(3)
        x = F.relu(self.bn2(self.drop(self.bn(self.fc(x)))))
        if self.error is not None and self.calls > 1:
            raise self.error("in the middle")
        return x


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", [None, True, False])
def test_no_trace(error, mode):
    model = Failing(error)
    if mode is not None:
        model.train(mode)
    model.fc(torch.randn(2, 5)).sum().backward()
    grad = model.fc.weight.grad.clone()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    rng, python = torch.get_rng_state(), random.getstate()
    batches = torch.utils.data.DataLoader(
        [torch.randn(5) for _ in range(8)], batch_size=4, shuffle=True
    )
    rng = torch.get_rng_state()
    if error is None:
        diagnose(model, batches)
    else:
        with pytest.raises(error, match="in the middle") as caught:
            diagnose(model, batches)
        if error is ValueError:
            assert any("batch 1" in note for note in caught.value.__notes__)
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(model.fc.weight.grad, grad)
    for name, (buffer, copied) in buffers.items():
        assert model.get_buffer(name) is buffer
        assert torch.equal(buffer, copied)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    model.error = None
    assert model(torch.randn(3, 5)).requires_grad


def test_no_gradient_is_taken_and_autocast_keeps_its_cache_clean():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        diagnose(model, [x])
        model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_dispatch_mode_of_the_user_and_grad_mode_survive():
    with torch.inference_mode():
        report = diagnose(Functional(), [torch.randn(2, 5)])
        assert torch.is_inference_mode_enabled()
    assert len(report) == 2


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU())
        report = diagnose(model, [torch.randn(6, 5)])
    assert [site.units for site in report] == [5, 4]


def test_warnings_are_not_raised_by_diagnose():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnose(Recurrent(), [torch.randn(2, 4, 3)])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    batches = [torch.randn(4, 4, 3), torch.randn(3, 4, 3)]
    model = Recurrent()
    on_cpu = diagnose(model, batches)
    torch.cuda.init()
    state = torch.cuda.get_rng_state()
    report = diagnose(model.cuda(), batches)  # batches are moved
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert [site.name for site in report] == [site.name for site in on_cpu]
    for site, other in zip(report, on_cpu, strict=True):
        assert site.fired.device.type == "cpu"
        assert (site.fired - other.fired).abs().max() <= 1
