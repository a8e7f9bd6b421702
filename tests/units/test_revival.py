import copy
import random
import re
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from relubook.units.diagnosis import Report, diagnose
from relubook.units.revival import Revival, revive_
from relubook.units.watch import Watch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def settle(model, seed=0):
    """Give every parameter and running statistic a value that is nothing special."""
    generator = seeded(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for tensor in (module.weight, module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.copy_(torch.randn(tensor.shape, generator=generator))
                if module.running_var is not None:
                    module.running_var.uniform_(0.5, 2.0, generator=generator)
            elif isinstance(module, FrozenBatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            elif hasattr(module, "reset_parameters") and not isinstance(module, nn.LayerNorm):
                for p in module.parameters(recurse=False):
                    p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 1) ** 0.5)
    return model.eval()


class FrozenBatchNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d: buffers only."""

    def __init__(self, units):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            self.register_buffer(name, torch.full((units,), value))
            self.register_buffer(
                f"running_{'var' if value else 'mean'}", torch.full((units,), value)
            )

    def forward(self, x):
        weight, bias, mean, var = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def gpt2_mlp():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(6, 4), nn.ReLU(), Conv1D(5, 6), nn.ReLU(), Conv1D(2, 5))


def kill(layer, units):
    """Let units of a layer die through their bias (or a norm's)."""
    with torch.no_grad():
        layer.bias[units] = -1000.0


def state_of(model, optimizer=None):
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if optimizer is not None:
        for i, state in enumerate(optimizer.state.values()):
            for key, value in state.items():
                tensors[f"{i}.{key}"] = torch.as_tensor(value).clone()
    return tensors


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def mlp(width=8):
    return settle(nn.Sequential(OrderedDict(
        one=nn.Linear(4, width), relu=nn.ReLU(), two=nn.Linear(width, 6), relu2=nn.ReLU(),
        head=nn.Linear(6, 2),
    )))  # fmt: skip


# --- the function is kept ---------------------------------------------------------------------


def image_net(**between):
    layers = OrderedDict(conv=nn.Conv2d(2, 6, 3), relu=nn.ReLU())
    layers.update(between)
    return nn.Sequential(layers)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.fc = nn.Linear(6 * 16, 5)
        self.head = nn.Linear(5, 2)
        self.drop = nn.Dropout()

    def forward(self, x, scale=None):
        x = F.max_pool2d(F.relu(self.conv(x)), 1)
        x = self.fc(self.drop(x).view(x.size(0), -1)).clamp(min=0)
        if scale is not None:
            x = x * scale
        return self.head(F.dropout(x, training=self.training))


class Branches(nn.Module):
    """Two rectified branches, joined, normalized, read by two heads."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.after = nn.Conv2d(9, 4, 3)
        self.by_position = nn.Linear(4 * 16, 2)
        self.by_channel = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(torch.cat([torch.relu(self.a(x)), F.relu_(self.conv(x))], dim=1))
        x = self.after(x).relu()
        return self.by_position(torch.flatten(x, 1)) + self.by_channel(x.mean(dim=(2, 3)))


class ReadsDtype(nn.Module):
    """The next layer's weight is looked at, but only for its type; the layer's input by keyword."""

    def __init__(self):
        super().__init__()
        self.fc, self.next = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(input=self.fc(input=x))
        return self.next((x * 2.0).to(self.next.weight.dtype))


class Accumulates(nn.Module):
    """The units are added to zeros in place; the next layer's weight is looked at for its shape."""

    def __init__(self):
        super().__init__()
        self.fc, self.next = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.zeros(*x.shape[:-1], 6, dtype=x.dtype)
        h += F.relu(self.fc(x))
        return self.next(h) + torch.zeros_like(self.next.weight).sum()


class Gated(nn.Module):
    """The units are multiplied by others, masked, enlarged and padded before they are read."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(2, 6, 3), nn.Conv2d(2, 6, 3)
        self.next = nn.Conv2d(6, 2, 3)

    def forward(self, x):
        h = F.relu(self.conv(x)) * self.gate(x).sigmoid()
        h = torch.where(h > 0.1, h, 0.0)
        h = torch.native_dropout(h, 0.5, self.training)[0]
        return self.next(F.pad(F.interpolate(h, scale_factor=2), (1, 1, 1, 1)))


class Squeeze(nn.Module):
    """A block behind control flow that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4))

    def forward(self, x):
        return self.block(x) if float(x.sum()) > -1e9 else x


class Leaves(Squeeze):
    """The next layer is beyond the part with control flow."""

    def __init__(self):
        super().__init__()
        self.block, self.head = self.block[:2], nn.Linear(6, 2)

    def forward(self, x):
        return self.head(super().forward(x))


X2 = (64, 2, 6, 6)
# name: model, name of the layer whose units 1, 2 and 4 die, input's shape, bit for bit
KEPT = {
    "mlp": (mlp, "one", (64, 4), True),
    "leading dimensions": (mlp, "one", (16, 5, 4), True),
    "functional, view": (Functional, "conv", X2, True),
    "functional, clamp": (Functional, "fc", X2, True),
    "joined branches": (Branches, "conv", X2, False),
    "gated": (Gated, "conv", X2, True),
    "dtype read": (ReadsDtype, "fc", (64, 4), True),
    "accumulated": (Accumulates, "fc", (64, 4), True),
    "control flow outside": (Squeeze, "block.0", (64, 4), True),
    "control flow between": (Leaves, "block.0", (64, 4), True),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.AvgPool1d(2, padding=1),
                              nn.Conv1d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(12, 2)),
        "0", (64, 2, 9), True),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 6, 2), nn.ReLU6(), nn.AdaptiveAvgPool3d(1),
                              nn.Flatten(), nn.Linear(6, 2)),
        "0", (64, 1, 4, 4, 4), True),
    "average of one place": (
        lambda: image_net(pool=nn.AdaptiveAvgPool2d(1), again=nn.AdaptiveAvgPool2d(1),
                          flat=nn.Flatten(), head=nn.Linear(6, 2)),
        "conv", X2, True),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(),
                              nn.Conv2d(6, 9, 3, groups=3, padding=1)),
        "0", X2, True),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6),
                              nn.ReLU(), nn.Conv2d(6, 2, 1)),
        "0", X2, True),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(),
                              nn.ConvTranspose2d(6, 3, 2, groups=3), nn.Flatten(2)),
        "0", X2, True),
    "flatten": (
        lambda: image_net(pool=nn.MaxPool2d(2), drop=nn.Dropout2d(), flat=nn.Flatten(),
                          head=nn.Linear(24, 2)),
        "conv", X2, True),
    "norm before": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                              nn.Conv2d(6, 2, 1)),
        "1", X2, True),
    "norm after": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2)),
        "0", (64, 4), False),
    "norm after, conv": (
        lambda: image_net(norm=nn.BatchNorm2d(6), next=nn.Conv2d(6, 4, 3, groups=2)),
        "conv", X2, False),
    "norm after, same border": (
        lambda: image_net(norm=nn.BatchNorm2d(6),
                          next=nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate")),
        "conv", X2, False),
    "norm after, pooled and flat": (
        lambda: image_net(norm=nn.BatchNorm2d(6), pool=nn.AvgPool2d(2), flat=nn.Flatten(),
                          head=nn.Linear(24, 2)),
        "conv", X2, False),
    "norm of columns": (
        lambda: image_net(flat=nn.Flatten(), norm=nn.BatchNorm1d(96), head=nn.Linear(96, 2)),
        "conv", X2, False),
    "Conv1D of GPT-2": (gpt2_mlp, "0", (16, 5, 4), True),
    "Conv1D behind a norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), gpt2_mlp()[2]),
        "0", (64, 4), False),
    "frozen norm before": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), FrozenBatchNorm(6), nn.ReLU(),
                              nn.Conv2d(6, 2, 1)),
        "1", X2, True),
    "frozen norm after": (
        lambda: image_net(norm=FrozenBatchNorm(6), next=nn.Conv2d(6, 4, 3, groups=2)),
        "conv", X2, False),
    "instance norm": (
        lambda: image_net(norm=nn.InstanceNorm2d(6, affine=True), next=nn.Conv2d(6, 4, 3)),
        "conv", X2, False),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        "linear1", (16, 5, 4), True),
}  # fmt: skip


@pytest.mark.parametrize("batch", [False, True], ids=["", "centered"])
@pytest.mark.parametrize("name", KEPT)
def test_the_function_is_kept_and_the_units_fire(name, batch):
    build, dying, shape, exact = KEPT[name]
    model = settle(build()).double()
    x = randn(*shape).double()
    units = [1, 2, 4]
    kill(model.get_submodule(dying), units)
    report = diagnose(model, [x])
    site = next(s for s in report.sites if s.dead.any())
    assert set(units) <= set(torch.nonzero(site.dead).flatten().tolist())
    with torch.no_grad():
        before = model(x)
        revival = revive_(model, report, generator=seeded(1), batch=x if batch else None)
        after = model(x)
    assert not revival.left
    change = next(c for c in revival.changes if c.site == site.name)
    assert change.units.tolist() == torch.nonzero(site.dead).flatten().tolist()
    assert bool(change.folded) == (not exact)
    if exact:
        assert torch.equal(before, after)
    else:
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    again = diagnose(model, [x])
    assert not again[site.name].dead[units].any()


@pytest.mark.parametrize("name", KEPT)
def test_revived_units_learn_from_the_second_step_on(name):
    build, dying, shape, _ = KEPT[name]
    model = settle(build())
    kill(model.get_submodule(dying), [1, 2, 4])
    x = randn(*shape)
    revival = revive_(model, diagnose(model, [x]), generator=seeded(1), batch=x)
    change = revival.changes[0]
    layer = model.get_submodule(change.producer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sizes = []
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        outgoing = sum(
            float(model.get_submodule(n).weight.grad.abs().sum()) for n in change.consumers
        )
        rows = layer.weight.grad.movedim(int(type(layer).__name__ == "Conv1D"), 0)
        rows = rows[change.units].abs().flatten(1).sum(1)
        sizes.append((outgoing, rows))
        optimizer.step()
    assert sizes[0][0] > 0
    assert bool((sizes[0][1] == 0).all())
    assert bool((sizes[1][1] > 0).all())


def test_a_layer_that_is_40_percent_dead_fires_again_and_lowers_the_loss():
    x = randn(512, 4)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    model = settle(nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 1)))
    with torch.no_grad():
        model[0].bias.zero_()
    kill(model[0], list(range(40)))
    dead = diagnose(model, [x])
    assert int(dead["1"].dead.sum()) == 40
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    start = train(50)
    assert int(diagnose(model, [x])["1"].dead.sum()) == 40
    twin, weights = copy.deepcopy(model), model[2].weight
    revival = revive_(model, diagnose(model, [x]), optimizer=optimizer, generator=seeded(1))
    assert revival.total == 40
    assert int(diagnose(model, [x])["1"].dead.sum()) == 0
    assert torch.equal(model(x), twin(x))
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    assert bool((weights.grad[0, :40] != 0).all())
    end = train(50)
    assert end < start
    assert bool((weights[0, :40] != 0).all())


def test_units_that_stay_silent_on_the_batch_are_counted():
    model, x = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)), randn(9, 4)
    with torch.no_grad():
        model[0].weight.zero_()
    report = diagnose(model, [x])
    revival = revive_(copy.deepcopy(model), report, torch.zeros(3, 4))
    assert (revival.total, revival.silent, revival.changes[0].silent) == (8, 8, 8)
    assert "8 units revived (8 silent on the batch)" in repr(revival)
    assert revive_(model, report, x).silent == 0


def test_a_dead_layer_as_a_whole_is_revived():
    model, x = mlp(), randn(64, 4)
    kill(model.two, list(range(6)))
    report = diagnose(model, [x])
    assert report["relu2"].dead.all()
    before = model(x)
    revive_(model, report, generator=seeded(1), batch=x)
    assert torch.equal(model(x), before)
    assert not diagnose(model, [x])["relu2"].dead.any()


def test_dead_units_in_neighboring_layers_feed_each_other():
    """The weight between two revived units is fresh: the second one's outgoing weights are 0."""
    model, x = mlp(), randn(64, 4)
    kill(model.one, list(range(8)))
    with torch.no_grad():
        model.two.bias.fill_(-1.0)
    report = diagnose(model, [x])
    assert report["relu"].dead.all()
    assert report["relu2"].dead.all()
    before = model(x)
    revive_(model, report, generator=seeded(1), batch=x)
    assert torch.equal(model(x), before)
    again = diagnose(model, [x])
    assert not again["relu"].dead.any()
    assert not again["relu2"].dead.any()


def test_nothing_but_the_named_entries_changes():
    model, x = mlp(), randn(64, 4)
    kill(model.one, [0, 3])
    before = state_of(model)
    revive_(model, diagnose(model, [x]), generator=seeded(1))
    after = state_of(model)
    expected = {"one.weight": 2 * 4, "one.bias": 2, "two.weight": 6 * 2}
    for name, value in after.items():
        assert int((value != before[name]).sum()) == expected.get(name, 0), name
    assert bool((after["two.weight"][:, [0, 3]] == 0).all())
    assert bool((after["one.bias"][[0, 3]] != -1000).all())


def test_the_norm_in_front_is_reset_for_the_unit():
    norm = nn.BatchNorm2d(6)
    model = settle(nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 2, 1)))
    kill(norm, [5])
    x = randn(*X2)
    report = diagnose(model, [x])
    assert report["2"].dead.tolist() == [False] * 5 + [True]
    before = state_of(norm)
    revival = revive_(model, report, generator=seeded(1), batch=x)
    assert revival.changes[0].before == "1"
    assert (norm.weight[5].item(), norm.bias[5].item()) == (1.0, 0.0)
    for key, value in norm.state_dict().items():
        if value.dim():
            assert torch.equal(value[:5], before[key][:5])
    y = model[0](x)[:, 5].detach()
    torch.testing.assert_close(norm.running_mean[5], y.mean())
    torch.testing.assert_close(norm.running_var[5], y.var(correction=0))


def test_fresh_weights_have_he_variance_and_are_centered():
    model = settle(nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 1)))
    kill(model[0], list(range(400)))
    x = randn(256, 50) + 5
    report = diagnose(model, [x])
    revival = revive_(model, report, generator=seeded(1))
    assert (revival.total, revival.silent) == (400, 0)
    assert float(model[0].weight.detach().var()) == pytest.approx(2 / 50, rel=0.05)
    after = diagnose(model, [x])["1"]
    assert 0.45 < float(after.fired.float().mean() / 256) < 0.55
    assert int(after.fired.min()) > 64


# --- what is left -----------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, after=None):
        super().__init__()
        self.after = after or nn.Identity()
        self.fc = nn.Linear(4, 6)
        self.inner = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.inner(F.relu(self.fc(x)))) + x
        return self.head(self.after(x))


class Twice(nn.Module):
    """The layer, or the next one, is called twice."""

    def __init__(self, which):
        super().__init__()
        self.fc, self.next, self.which = nn.Linear(4, 4), nn.Linear(4, 4), which

    def forward(self, x):
        if self.which == "layer":
            return self.next(F.relu(self.fc(F.relu(self.fc(x)))))
        return self.next(self.next(F.relu(self.fc(x))))


class Reads(nn.Module):
    """What the layer computes, or its weight, is used elsewhere too."""

    def __init__(self, which):
        super().__init__()
        self.fc, self.next, self.which = nn.Linear(4, 4), nn.Linear(4, 4), which

    def forward(self, x):
        h = self.fc(x)
        y = self.next(F.relu(h))
        if self.which == "rectifier":
            return y + self.next(F.relu6(h))
        return y + h if self.which == "output" else y + F.linear(x, self.fc.weight)


class Decides(nn.Module):
    """The units decide which layer comes next."""

    def __init__(self):
        super().__init__()
        self.fc, self.next, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = F.relu(self.fc(x))
        return self.next(h) if float(h.max()) < 500 else self.other(h)


class Modes(nn.Module):
    """An auxiliary head in training mode."""

    def __init__(self):
        super().__init__()
        self.fc, self.next, self.aux = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = F.relu(self.fc(x))
        return self.next(h) + self.aux(h) if self.training else self.next(h)


class BehindSum(nn.Module):
    """The rectifier, a module or a function, comes after a sum (behind a norm, or not)."""

    def __init__(self, functional, norm=None):
        super().__init__()
        self.fc, self.next = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.relu = norm or nn.Identity(), F.relu if functional else nn.ReLU()

    def forward(self, x):
        return self.next(self.relu(self.norm(self.fc(x) + 1e-3 * x)))


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is transposed."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(
            torch.randn(outputs))  # fmt: skip

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class SumOfNorms(nn.Module):
    """The rectifier gets a sum of which one part comes from a layer norm, or a shifted layer."""

    def __init__(self, shift=None):
        super().__init__()
        self.fc, self.other, self.next = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.shift = nn.LayerNorm(4), shift

    def forward(self, x):
        other = self.norm(self.other(x)) if self.shift is None else self.shift
        return self.next(F.relu(other + self.fc(x)))


class Scale(nn.Module):
    def __init__(self, units):
        super().__init__()
        for name in ("weight", "bias"):
            self.register_buffer(name, torch.full((units,), 1.0))

    def forward(self, x):
        return x * self.weight + self.bias


class Flipped(nn.Module):
    """The order of the units changes between the layer and its norm."""

    def forward(self, x):
        return x.flip(1)


class Chosen(nn.Module):
    """What another layer computes is kept where a unit fires, or written into its place."""

    def __init__(self, how):
        super().__init__()
        self.fc, self.other, self.next = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.how = how

    def forward(self, x):
        h, other = F.relu(self.fc(x)), self.other(x)
        if self.how == "where":
            return self.next(torch.where(h > 0, h, other))
        out = torch.zeros(len(x), 4)
        out[:, :] = h
        return self.next(out)


class BothSigns(nn.Module):
    """One rectifier gets what a layer computes, another its negative."""

    def __init__(self):
        super().__init__()
        self.fc, self.next = nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x):
        x = self.fc(x)
        return self.next(torch.cat([F.relu(x), F.relu(-x)], 1))


def chain(*between, first=None):
    layers = OrderedDict(fc=first or nn.Linear(4, 4))
    layers.update((f"m{i}", m) for i, m in enumerate(between))
    return nn.Sequential(layers)


def tied():
    model = chain(nn.ReLU(), nn.Linear(4, 4))
    model.m1.weight = model.fc.weight
    return model


def frozen():
    model = chain(nn.ReLU(), nn.Linear(4, 4))
    model.m1.weight.requires_grad_(False)
    return model


def weight_normed():
    return chain(nn.ReLU(), nn.Linear(4, 4), first=nn.utils.parametrizations.weight_norm(
        nn.Linear(4, 4)))  # fmt: skip


def pruned():
    model = chain(nn.ReLU(), nn.Linear(4, 4))
    prune.random_unstructured(model.m1, "weight", 0.25)
    return model


LEFT = {
    "sum": (Residual, "inner", "reach a sum"),
    "sum, then a reshape": (lambda: Residual(nn.Flatten()), "inner", "reach a sum"),
    "decides": (Decides, "fc", r"reach max\(\)"),
    "behind a sum": (lambda: BehindSum(False), "fc", "^a sum .* lies between"),
    "behind a sum, function": (lambda: BehindSum(True), "fc", "^a sum .* lies between"),
    "behind a sum, norm": (
        lambda: BehindSum(True, nn.BatchNorm1d(4)), "norm", "^a sum .* lies between"),
    "behind a sum with a norm": (SumOfNorms, "fc", "^a sum .* lies between"),
    "behind a shift": (lambda: SumOfNorms(torch.ones(4)), "fc", r"^add\(\) lies between"),
    "Conv1D": (lambda: chain(nn.ReLU(), nn.Linear(4, 4), first=Conv1D(4, 4)), "fc",
               "'fc' is a Conv1D; linear layers"),
    "next Conv1D": (lambda: chain(nn.ReLU(), Conv1D(4, 4)), "fc", "reach 'm1' .Conv1D."),
    "scale": (
        lambda: chain(Scale(4), nn.ReLU(), nn.Linear(4, 4)), "fc", "^'m0' .Scale. lies between"),
    "layer twice": (lambda: Twice("layer"), "fc", "'fc' is called 2 times"),
    "two rectifiers": (lambda: Reads("rectifier"), "fc", "feeds 2 sites that can be"),
    "next twice": (lambda: Twice("next"), "fc", "'next' is called 2 times"),
    "output read": (lambda: Reads("output"), "fc", "goes to 2 places"),
    "weight read": (lambda: Reads("weight"), "fc", "also used outside"),
    "modes": (Modes, "fc", "training"),
    "layer norm": (lambda: chain(nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4)), "fc", "LayerNorm"),
    "layer norm before": (
        lambda: chain(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4)), "m0", "'fc' goes|LayerNorm"),
    "softmax": (lambda: chain(nn.ReLU(), nn.Softmax(1), nn.Linear(4, 4)), "fc", "Softmax"),
    "output": (lambda: chain(nn.ReLU()), "fc", "no next layer"),
    "tied": (tied, "fc", "shares its memory with"),
    "frozen": (frozen, "fc", "frozen"),
    "weight norm": (weight_normed, "fc", "computed from other parameters"),
    "pruned": (pruned, "fc", "computed from other parameters"),
    "pooled features": (
        lambda: chain(nn.ReLU(), nn.MaxPool1d(3), nn.Linear(1, 4)), "fc", "MaxPool1d"),
    "rnn": (lambda: chain(nn.ReLU(), nn.RNN(4, 4)), "fc", "RNN"),
    "neighbors": (
        lambda: chain(nn.ReLU(), nn.AvgPool1d(3, 1, 1), nn.Linear(4, 4)), "fc", "AvgPool1d"),
    "shuffled": (lambda: chain(Flipped(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)), "m1",
                 "something lies between 'm1'"),
    "where": (lambda: Chosen("where"), "fc", r"reach where\(\)"),
    "written": (lambda: Chosen("write"), "fc", r"reach copy\(\)"),
    "both signs": (BothSigns, "fc", r"2 places or more, one is neg\(\)"),
    "norm after, layer norm": (
        lambda: chain(nn.ReLU(), nn.BatchNorm1d(4), nn.LayerNorm(4)), "fc", "LayerNorm"),
    "norm after, no bias": (
        lambda: chain(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)), "fc",
        "'m2', which has no bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_paired_is_left_untouched_and_listed(name):
    build, dying, reason = LEFT[name]
    model = settle(build())
    kill(model.get_submodule(dying), [0, 1])
    x = randn(16, 4)
    report = diagnose(model, [x])
    before = state_of(model)
    revival = revive_(model, report)
    left = revival.left
    assert left
    assert all(entry.units >= 2 for entry in left)
    assert any(re.search(reason, entry.reason) for entry in left), left
    assert revival.changes == ()
    assert same(before, state_of(model))
    assert f"left: {left[0].site}" in repr(revival)


@pytest.mark.parametrize(
    "behind",
    [
        (nn.Conv2d(6, 4, 3, padding=1),),
        (nn.AvgPool2d(3, padding=1), nn.Conv2d(6, 4, 1)),
        (nn.ConvTranspose2d(6, 4, 3),),
    ],
)
def test_a_constant_that_is_uneven_at_the_border_is_left(behind):
    layers = (nn.Conv2d(2, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), *behind)
    model, x = settle(nn.Sequential(*layers)), randn(*X2)
    kill(model[0], [0, 1])
    before = state_of(model)
    revival = revive_(model, diagnose(model, [x]))
    assert "nor the same constant everywhere" in revival.left[0].reason
    assert same(before, state_of(model))


ZERO = "silent where 0"


class Jump(nn.Module):
    """JumpReLU with a threshold of each unit's own."""

    def __init__(self, threshold=0.1, width=6):
        super().__init__()
        self.threshold = nn.Parameter(torch.full((width,), threshold))

    def forward(self, x):
        return x * (x > self.threshold)


class Written(nn.Module):
    """Works in place, with a rectifier and a view inside."""

    def forward(self, x):
        x.unflatten(-1, (2, 3)).masked_fill_(x.unflatten(-1, (2, 3)) < 0.1, 0.0)
        return x.relu_()


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, level):
        return torch.where(x > level, x, 0.0)


def shrunk(x):
    return torch.sign(x) * (x.abs() - 0.2).relu()


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# name: activation, what names it
OWN = {
    "module": (Jump, lambda act: Jump),
    "by name": (Jump, lambda act: "*1"),
    "in place": (Written, lambda act: act),
    "function": (lambda: Calls(lambda x: shrunk(x)), lambda act: shrunk),
    "autograd function": (lambda: Calls(lambda x: Kept.apply(x, 0.1)), lambda act: Kept),
}


@pytest.mark.parametrize("shape", [(64, 4), (16, 5, 4)])
@pytest.mark.parametrize("name", OWN)
def test_units_of_own_activations_are_revived(name, shape):
    build, key = OWN[name]
    layers = nn.Linear(4, 6), build(), nn.Dropout(), nn.Linear(6, 2)
    model, x = settle(nn.Sequential(*layers)), randn(*shape)
    rules = {key(model[1]): ZERO}
    with torch.no_grad():  # dead: nothing comes in, and the bias is silent
        model[0].weight[[1, 4]], model[0].bias[[1, 4]] = 0.0, 0.05
        units = model[1](model[0](x.clone())).flatten(0, -2)
    assert (units == 0).all(0).tolist() == [False, True, False, False, True, False]
    report = diagnose(model, [x], activations=rules)
    assert report[0].dead.tolist() == (units == 0).all(0).tolist()
    more, before, state = randn(*shape, seed=2), model(x), state_of(model)
    silent = model[1](model[0](more.clone()))[..., [1, 4]] == 0
    assert silent.all()
    later = model(more)
    revival = revive_(model, report, activations=rules, generator=seeded(1))
    (change,) = revival.changes
    assert (change.producer, change.consumers, change.units.tolist()) == ("0", ("3",), [1, 4])
    assert (revival.total, revival.silent, revival.left) == (2, 0, ())
    assert torch.equal(model(x), before)
    assert torch.equal(model(more), later)
    assert (model[1](model[0](x)).flatten(0, -2) != 0).any(0).all()
    rows = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert rows == {"0.weight", "0.bias", "3.weight"}
    assert torch.equal(model[0].weight[[0, 2, 3, 5]], state["0.weight"][[0, 2, 3, 5]])
    assert bool((model[3].weight[:, [1, 4]] == 0).all())


def test_units_of_own_activations_that_stay_silent_are_counted():
    model, x, rules = (
        nn.Sequential(nn.Linear(4, 6), Jump(), nn.Linear(6, 2)),
        randn(64, 4),
        {Jump: ZERO},
    )
    kill(model[0], [0, 1, 2])
    with torch.no_grad():
        model[1].threshold[[1, 2]] = 50.0  # above what fresh weights reach
    revival = revive_(model, diagnose(model, [x], activations=rules), activations=rules)
    assert (revival.total, revival.silent) == (3, 2)
    assert (
        diagnose(model, [x], activations=rules)[0].dead.tolist()
        == [False, True, True] + [False] * 3
    )


def test_between_norms_and_in_a_loaded_report_too(tmp_path):
    layers = (
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        Calls(shrunk),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 3),
    )
    model, x, rules = settle(nn.Sequential(*layers)), randn(*X2), {shrunk: ZERO}
    model[1].weight.data[2], model[1].bias.data[2] = 0.0, 0.1
    diagnose(model, [x], activations=rules).save(tmp_path / "report")
    report, before = Report.load(tmp_path / "report"), model(x)
    assert report[0].dead.tolist() == [False, False, True, False, False, False]
    (left,) = revive_(model, report, x).left
    assert "of your own is followed if activations= names it" in left.reason
    assert torch.equal(model(x), before)
    (change,) = revive_(model, report, x, activations=rules).changes
    assert (change.producer, change.before, change.folded) == ("0", "1", ("4",))
    torch.testing.assert_close(model(x), before)
    assert not diagnose(model, [x], activations=rules)[0].dead.any()


class TopTwo(nn.Module):
    """Units compete: one that fires anew takes the place of another."""

    def forward(self, x):
        top = x.relu().topk(2)
        return torch.zeros_like(x).scatter_(-1, top.indices, top.values)


class OfHalf(nn.Module):
    def forward(self, x):
        left, right = x.chunk(2, -1)
        return (left * (right > 0)).repeat(1, 2)


class Leaks(nn.Module):
    """Its mask is used for other units than its own."""

    def forward(self, x):
        self.mask = x > 0.1
        return x * self.mask


class UsesMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.out, self.side = (
            nn.Linear(4, 6),
            Leaks(),
            *(nn.Linear(6, 2) for _ in "ab"),
        )

    def forward(self, x):
        x = self.out(self.act(self.fc(x)))
        return x + self.side(self.act.mask.to(x.dtype))


class BothUsed(UsesMask):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h) + h)


def between(act):
    layers = OrderedDict(fc=nn.Linear(4, 6), act=act, out=nn.Linear(6, 2))
    return nn.Sequential(layers)


OWN_LEFT = {
    "top-k": (lambda: between(TopTwo()), r"its units reach 'act' \(TopTwo\)"),
    "gate": (lambda: between(OfHalf()), r"its units reach 'act' \(OfHalf\)"),
    "relative": (
        lambda: between(Calls(lambda x: x * (x > x.mean(-1, keepdim=True)))),
        r"its units reach 'act'",
    ),
    "share": (lambda: between(Calls(lambda x: x * (x.softmax(-1) > 0.1))), "units reach 'act'"),
    "mask": (UsesMask, "2 places or more, one is 'side'"),
    "sum": (BothUsed, r"a sum \(a residual"),
}


@pytest.mark.parametrize("name", OWN_LEFT)
def test_what_mixes_units_of_own_activations_is_left(name):
    build, reason = OWN_LEFT[name]
    model, x = settle(build()), randn(64, 4)
    rules = {type(model.act): ZERO}
    kill(model.fc, [0, 1, 3, 4])
    report, before = diagnose(model, [x], activations=rules), state_of(model)
    assert report["act"].dead.tolist() == [True, True, False] * 2
    revival = revive_(model, report, activations=rules)
    assert [entry.units for entry in revival.left] == [4]
    assert re.search(reason, revival.left[0].reason), revival.left
    assert same(before, state_of(model))


@pytest.mark.parametrize("name", ["clone", "flip", "cat", "pad2d", "view"])
def test_own_functions_with_names_of_operators(name):
    act = Calls(types.FunctionType(shrunk.__code__.replace(co_name=name), globals(), name))
    model, x = settle(nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 2))), randn(64, 4)
    rules = {act.function: ZERO}
    model[0].weight.data[0], model[0].bias.data[0] = 0.0, 0.1
    report = diagnose(model, [x], activations=rules)
    assert revive_(model, report, activations=rules).total == 1


def test_a_transposed_convolution_is_left():
    model = settle(nn.Sequential(nn.ConvTranspose2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    kill(model[0], [0, 1])
    revival = revive_(model, diagnose(model, [randn(*X2)]))
    assert "'0' is a ConvTranspose2d; linear layers and" in revival.left[0].reason


def on_the_side(model, module):
    """Hooks that let the output depend on what a layer computes, past what comes next."""
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(out))
    model.head.register_forward_hook(lambda m, args, out: out + seen[-1].mean())


HOOKS = {
    "rectifier": lambda m: m.relu.register_forward_hook(lambda m, args, out: out + 1),
    "rectifier's input": lambda m: m.relu.register_forward_pre_hook(lambda m, args: args[0].abs()),
    "producer": lambda m: on_the_side(m, m.one),
    "reader": lambda m: on_the_side(m, m.relu),
}


@pytest.mark.parametrize("place", HOOKS)
def test_where_hooks_change_what_is_computed_the_site_is_put_back(place):
    model, x = mlp(), randn(64, 4)
    kill(model.one, [0, 3])
    kill(model.two, [2])
    report = diagnose(model, [x])
    HOOKS[place](model)
    before, state, generator = model(x), state_of(model), seeded(1)
    revival = revive_(model, report, x, generator=generator)
    assert [left.site for left in revival.left] == ["relu"]
    assert [change.site for change in revival.changes] == ["relu2"]
    assert torch.equal(model(x), before)
    assert torch.equal(state["one.weight"], model.one.weight)
    fresh = nn.init.kaiming_normal_(torch.empty(1, 8), generator=seeded(1))
    assert torch.equal(model.two.weight[[2]], fresh)  # trials leave the generator alone
    kept = revive_(mlp_with(state), report, x, generator=seeded(1))
    assert kept.total == 3


def mlp_with(state):
    model = mlp()
    model.load_state_dict(state)
    return model


def test_the_repr_is_a_table_of_what_was_done():
    model, x = mlp(), randn(64, 4)
    kill(model.one, [0, 3])
    revival = revive_(model, diagnose(model, [x]), generator=seeded(1))
    assert isinstance(revival, Revival)
    first, header, _, row = repr(revival).splitlines()
    assert first == "Revival: 2 units revived, 0 left"
    assert header.split() == ["site", "units", "re-initialized", "set", "to", "zero"]
    assert row.split() == ["relu", "2", "one", "two"]
    assert revive_(model, diagnose(model, [x])).total == 0


# --- what no graph shows ----------------------------------------------------------------------


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.behind, self.fc = nn.BatchNorm2d(6), nn.Linear(96, 4)
        self.next, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        x = self.behind(F.relu(self.norm(self.conv(x))))
        x = F.relu(self.next(self.fc(x.view(-1, 96))))
        return self.head(x) + self.other(x)


def test_units_are_followed_through_control_flow_on_values():
    model, x = settle(Opaque()).double(), randn(*X2).double()
    kill(model.norm, [1, 2])
    kill(model.next, [0])
    report = diagnose(model, [x])
    before = model(x)
    revival = revive_(model, report, generator=seeded(1))
    assert [c.consumers for c in revival.changes] == [("fc",), ("head", "other")]
    assert (revival.changes[0].producer, revival.changes[0].before) == ("conv", "norm")
    assert revival.changes[0].folded == ("fc",)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    again = diagnose(model, [x])
    assert not any(site.dead.any() for site in again.sites)


# --- dormant units ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, lambda: nn.LeakyReLU(0.01)])
def test_dormant_units_are_those_of_redo_and_are_cut(activation):
    model, x = mlp().double(), randn(64, 4).double()
    model.relu, model.relu2 = activation(), activation()
    with torch.no_grad():
        model.one.weight[2], model.one.bias[2] = 1e-3, 1e-3  # fires, but hardly
        model.two.bias[1] = -1000.0
        if activation is not nn.ReLU:
            model.two.weight[1] = model.two.bias[1] = -1e-4
    report = diagnose(model, [x], family="all")
    with torch.no_grad():
        h = [model.relu(model.one(x))]
        h.append(model.relu2(model.two(h[0])))
        means = [a.abs().mean(0) for a in h]
        dormant = [mean / mean.mean() <= 0.05 for mean in means]
        assert dormant[0][2]
        assert dormant[1][1]
        cut = copy.deepcopy(model)
        for reader, units in ((cut.two, dormant[0]), (cut.head, dormant[1])):
            reader.weight[:, units] = 0.0
        optimizer = torch.optim.Adam(model.parameters())
        revival = revive_(model, report, x, tau=0.05, optimizer=optimizer)
        assert [c.units.tolist() for c in revival.changes] == [
            units.nonzero().flatten().tolist() for units in dormant
        ]
        assert not revival.left
        # The first layer's fresh units are cut off, so only its cut shows.
        for module in (cut.one, cut.two):
            units = dormant[module is cut.two]
            for name in ("weight", "bias"):
                getattr(module, name)[units] = getattr(model.get_submodule(
                    "two" if module is cut.two else "one"), name)[units]  # fmt: skip
        assert same(cut.state_dict(), model.state_dict())
        assert torch.equal(cut(x), model(x))


def test_revived_dormant_units_are_dormant_no_more():
    model, x = mlp(64), randn(256, 4)
    with torch.no_grad():
        model.one.weight[:32] *= 1e-3
        model.one.bias[:32] = 1e-4
    report = diagnose(model, [x], family="all")
    assert int(report["relu"].dormant.sum()) >= 32
    assert not report["relu"].dead[:32].any()
    assert revive_(model, report, x).total == int(sum(site.dead.sum() for site in report))
    revive_(model, report, x, tau=0.025)
    assert not diagnose(model, [x], family="all")["relu"].dormant[:32].any()


def test_dormant_units_behind_a_norm_that_enlarges_them_are_left():
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)),
        randn(64, 4),
    )
    with torch.no_grad():
        model[0].weight[0] *= 1e-3
        model[0].bias[0] = 1e-4
    model.train()(x)
    model.eval()
    before = state_of(model)
    revival = revive_(model, diagnose(model, [x], family="all"), x, tau=0.025)
    assert "its units, if small, are not 0 to '3', nor the same" in revival.left[0].reason
    assert same(before, state_of(model))


def test_dead_units_behind_dormant_ones_are_revived_too():
    model, x = mlp(), randn(64, 4)
    with torch.no_grad():
        model.one.weight[0], model.one.bias[0] = 0.0, 1e-2
        model.two.bias[1] = -1000.0
    report = diagnose(model, [x], family="all")
    revival = revive_(model, report, x, tau=0.025)
    assert [change.site for change in revival.changes] == ["relu", "relu2"]
    assert not any(site.dead.any() for site in diagnose(model, [x]))


def test_bad_choices_of_units_raise():
    model, x = mlp(), randn(64, 4)
    report = diagnose(model, [x])
    scored = diagnose(model, [x], family="all")
    for wrong, tau in ((scored, -1.0), (scored, float("nan")), (report, 0.1)):
        with pytest.raises(ValueError, match=f"tau={tau} must be a score from 0 on, of diagnose"):
            revive_(model, wrong, x, tau=tau)


# --- layers of transformers -------------------------------------------------------------------


@pytest.mark.slow
def test_units_of_gpt2_fire_again_and_its_function_stays():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=8, n_embd=8, n_layer=2, n_head=2, activation_function="relu",
        use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(30, (16, 8), generator=seeded())
    for block in model.transformer.h:
        kill(block.mlp.c_fc, [0, 5, 31])
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    report = diagnose(model, [tokens])
    before = model(tokens).logits
    revival = revive_(model, report, tokens, optimizer=optimizer)
    assert [change.consumers for change in revival.changes] == [
        (f"transformer.h.{k}.mlp.c_proj",) for k in range(2)
    ]
    assert (revival.total, revival.silent, revival.left) == (6, 0, ())
    assert torch.equal(model(tokens).logits, before)
    assert not any(site.dead.any() for site in diagnose(model, [tokens]))
    moments = optimizer.state[model.transformer.h[0].mlp.c_fc.weight]["exp_avg"]
    assert bool((moments[:, [0, 5, 31]] == 0).all())
    moments = optimizer.state[model.transformer.h[0].mlp.c_proj.weight]["exp_avg"]
    assert bool((moments[[0, 5, 31]] == 0).all())
    moments = optimizer.state[model.transformer.h[0].mlp.c_fc.bias]["exp_avg"]
    assert (moments == 0).nonzero().flatten().tolist() == [0, 5, 31]


def test_units_behind_detrs_frozen_norm_fire_again():
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    model = settle(nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), detr.DetrFrozenBatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ))  # fmt: skip
    kill(model[1], [1, 4])
    x = randn(*X2)
    report, before = diagnose(model, [x]), model(x)
    assert report["2"].producer == "1"
    revival = revive_(model, report, x, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert (revival.changes[0].producer, revival.changes[0].before) == ("0", "1")
    assert (revival.total, revival.silent) == (2, 0)
    assert torch.equal(model(x), before)
    z = model[1](model[0](x))[:, [1, 4]].detach()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(2), rtol=1e-3, atol=0)


# --- the optimizer ----------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
}
FIRST = {"momentum_buffer", "exp_avg", "grad_avg", "acc_delta", "prev"}
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum"}


def trained(name):
    """A network with dead units and an optimizer with a past in every entry."""
    model, x = mlp(), randn(64, 4)
    optimizer = OPTIMIZERS[name](model.parameters())
    for i in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for p in model.parameters():
            p.grad += 0.1 * torch.randn(p.shape, generator=seeded(i))
        optimizer.step()
    kill(model.one, [0, 3])
    return model, optimizer, x


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_starts_anew_for_exactly_these_entries(name):
    model, optimizer, x = trained(name)
    before = copy.deepcopy(optimizer.state_dict())["state"]
    report = diagnose(model, [x])
    assert report["relu"].dead.tolist()[:4] == [True, False, False, True]
    revive_(model, report, optimizer=optimizer, generator=seeded(1))
    fresh = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    outgoing = {n: mask.clone() for n, mask in fresh.items()}
    for site, layer, reader in (("relu", "one", "two"), ("relu2", "two", "head")):
        outgoing[f"{reader}.weight"][:, report[site].dead] = True
        fresh[f"{layer}.weight"][report[site].dead] = True
        fresh[f"{layer}.bias"][report[site].dead] = True
        outgoing[f"{layer}.weight"][report[site].dead] = False
    fresh = {n: mask | outgoing[n] for n, mask in fresh.items()}
    seen = set()
    for i, (n, p) in enumerate(model.named_parameters()):
        mask = fresh[n]
        for key, old in before[i].items():
            new = optimizer.state[p][key]
            if not isinstance(old, torch.Tensor) or old.shape != p.shape:
                assert torch.equal(torch.as_tensor(new), torch.as_tensor(old))
                continue
            assert torch.equal(new[~mask], old[~mask])
            if not mask.any():
                continue
            seen.add(key)
            if key == "ax":
                assert torch.equal(new[mask], p[mask])
            elif key == "step_size":
                assert bool((new[mask] == 0.01).all())
            else:
                assert key in FIRST | SECOND
                expected = torch.full_like(old, 0.5 if key == "sum" else 0.0)
                if key in SECOND:
                    expected[outgoing[n]] = old[~mask].mean()
                torch.testing.assert_close(new[mask], expected[mask])
    assert seen
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()  # the state still fits


def test_adams_first_updates_are_as_the_docstring_says():
    """A steady gradient on a fresh entry, long after the first step."""
    model, x = mlp(), randn(64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].fill_(1e6)
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1.0)
    kill(model.one, [0])
    with torch.no_grad():
        model.one.bias[1:] = 1.0
    revive_(model, diagnose(model, [x]), optimizer=optimizer)
    steps = []
    for _ in range(40):
        past = [model.one.weight[0, 0].item(), model.two.weight[0, 0].item()]
        optimizer.step()
        now = [model.one.weight[0, 0].item(), model.two.weight[0, 0].item()]
        steps.append([abs(b - a) / 1e-3 for a, b in zip(past, now, strict=True)])
    incoming, outgoing = torch.tensor(steps).T
    assert float(incoming[0]) == pytest.approx(3.16, abs=0.1)
    assert float(incoming.max()) == pytest.approx(6.56, abs=0.1)
    assert float(outgoing.max()) < 1.02


def test_an_optimizer_of_other_parameters_raises_before_anything_changes():
    model, optimizer, x = trained("adam")
    report = diagnose(model, [x])
    before = state_of(model, optimizer)
    partial = torch.optim.SGD(model.one.parameters(), lr=0.1)
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    lbfgs = torch.optim.LBFGS(model.parameters())
    for wrong, error, message in (
        (partial, ValueError, "does not hold 'two.weight'$"),
        (other, ValueError, "does not hold 'one.bias', 'one.weight', 'two.weight'$"),
        (lbfgs, ValueError, "L-BFGS"),
        (optimizer.state_dict(), TypeError, "optimizer is a dict"),
    ):
        with pytest.raises(error, match=message):
            revive_(model, report, optimizer=wrong)
    assert same(before, state_of(model, optimizer))


def test_each_of_several_optimizers_starts_anew_where_it_holds_what_changed():
    model, optimizer, x = trained("adam")
    twin, past = copy.deepcopy((model, optimizer))
    report, state = diagnose(model, [x]), copy.deepcopy(past.state_dict())
    parts = [torch.optim.Adam(m.parameters(), amsgrad=True) for m in (model.one, model.two)]
    parts.append(torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9))
    for part, (start, end) in zip(parts[:2], ((0, 2), (2, 4)), strict=True):
        part.load_state_dict({
            "state": {i - start: state["state"][i] for i in range(start, end)},
            "param_groups": [{**state["param_groups"][0], "params": [0, 1]}],
        })  # fmt: skip
    with pytest.raises(ValueError, match="the optimizers do not hold 'two.weight'$"):
        revive_(model, report, x, optimizer=parts[::2])
    with pytest.raises(TypeError, match="optimizer is a str"):
        revive_(model, report, x, optimizer=[parts[0], "adam"])
    revive_(twin, report, x, optimizer=past, generator=seeded(1))
    revive_(model, report, x, optimizer=parts, generator=seeded(1))
    assert same(state_of(twin), state_of(model))
    expected, held = past.state_dict()["state"], [part.state_dict()["state"] for part in parts[:2]]
    for i in range(4):
        for key, value in expected[i].items():
            assert torch.equal(value, held[i // 2][i % 2][key])


def test_whatever_fails_midway_is_rolled_back(monkeypatch):
    model, optimizer, x = trained("adam")
    model.add_module("norm", nn.BatchNorm1d(2))
    model.eval()
    kill(model.two, [5])
    report = diagnose(model, [x])
    before = state_of(model, optimizer)

    def broken(tensor, generator):
        broken.calls += 1
        if broken.calls == 2:
            raise KeyboardInterrupt
        tensor.normal_(generator=generator)

    broken.calls, generator = 0, seeded(3)
    with pytest.raises(KeyboardInterrupt):
        revive_(model, report, optimizer=optimizer, init=broken, generator=generator)
    with pytest.raises(ValueError, match="not finite"):
        revive_(model, report, init=lambda t, generator: t.fill_(float("nan")))
    with pytest.raises(RuntimeError, match="shapes"):
        revive_(model, report, optimizer=optimizer, batch=randn(4, 9))
    with pytest.raises(ValueError, match="not finite"):
        revive_(model, report, batch=torch.full((4, 4), float("inf")))
    monkeypatch.setattr("relubook.units.revival._SECOND_MOMENTS", 3)
    with pytest.raises(TypeError):
        revive_(model, report, optimizer=optimizer, batch=x)
    assert same(before, state_of(model, optimizer))
    assert not model.training
    assert torch.equal(generator.get_state(), seeded(3).get_state())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# --- the rest is as before --------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        torch.rand(1)
        random.random()
        return self.inner(x)


def test_randomness_mode_hooks_and_gradients_stay():
    model, x = Noisy(), randn(64, 4)
    kill(model.inner.one, [0])
    report = diagnose(model, [x])
    model.train()
    model.inner.relu.eval()
    hooked = []
    handle = model.inner.register_forward_hook(lambda m, a, out: hooked.append(out))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state, python = torch.random.get_rng_state(), random.getstate()
    modes = [m.training for m in model.modules()]
    assert revive_(model, report).total == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python
    assert [m.training for m in model.modules()] == modes
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())
    assert [list(m._forward_hooks) for m in model.inner.modules()] == [[handle.id], *[[]] * 5]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_weights_come_from_the_generator_or_from_the_global_state_as_it_is():
    x = randn(64, 4)

    def fresh(seed, generator=None):
        model = mlp()
        kill(model.one, [0])
        torch.manual_seed(seed)
        revive_(model, diagnose(model, [x]), generator=generator)
        return model.one.weight[0].detach()

    assert torch.equal(fresh(0, seeded(7)), fresh(1, seeded(7)))
    assert torch.equal(fresh(0), fresh(0))
    assert not torch.equal(fresh(0), fresh(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model, x = mlp().to(dtype), randn(64, 4).to(dtype)
    kill(model.one, [0, 1])
    before = model(x)
    assert revive_(model, diagnose(model, [x]), generator=seeded(1), batch=x).total == 2
    assert torch.equal(model(x), before)
    assert model.one.weight.dtype == dtype


def test_batches_of_other_kinds():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs):
            return self.inner(inputs)

    model, x = Named(), randn(64, 4) + 3
    kill(model.inner.one, [0, 1, 2, 3])
    report = diagnose(model, [{"inputs": x}])
    biases = []
    for batch in ({"inputs": x}, (x, 0), [x], x):
        revive_(model, report, generator=seeded(1), batch=batch)
        biases.append(model.inner.one.bias.detach().clone())
    assert all(torch.equal(biases[0], b) for b in biases)
    assert bool((biases[0][:4] != 0).all())


def test_bad_input_raises():
    model, x = mlp(), randn(64, 4)
    kill(model.one, [0])
    report = diagnose(model, [x])
    with pytest.raises(TypeError, match="model is a function"):
        revive_(lambda x: x, report)
    with pytest.raises(TypeError, match="report is a dict"):
        revive_(model, {})
    with Watch(model, window=1) as watch:
        model.train()(x)
    with pytest.raises(TypeError, match="report is a WatchReport; it must be what diagnose"):
        revive_(model, watch.compute(), x)
    unseen = diagnose(model, [x], forward=lambda model, batch: model(batch))
    with pytest.raises(ValueError, match="pass a batch"):
        revive_(model, unseen)
    assert revive_(model, unseen, x).total == 1
    other = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="'one', which the model does not have"):
        revive_(other, report)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_raises():
    model, x = mlp(), randn(64, 4)
    kill(model.one, [0])
    report = diagnose(model, [x])
    with pytest.raises(TypeError, match="scripted"):
        revive_(torch.jit.script(model), report)


@pytest.mark.slow
def test_a_compiled_wrapper_is_looked_through():
    model, x = mlp(), randn(64, 4)
    kill(model.one, [0])
    compiled = torch.compile(model, backend="eager")
    assert revive_(compiled, diagnose(compiled, [x]), batch=x).total == 1
    assert not diagnose(model, [x])["relu"].dead[0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [
    "mlp", "groups", "transposed", "joined branches", "norm before", "norm after",
    "frozen norm before", "frozen norm after", "Conv1D of GPT-2",
])  # fmt: skip
def test_on_a_gpu(name):
    build, dying, shape, _ = KEPT[name]
    model, x = settle(build()).double().cuda(), randn(*shape).double().cuda()
    kill(model.get_submodule(dying), [1, 2, 4])
    report, before = diagnose(model, [x]), model(x)
    optimizer = torch.optim.Adam(model.parameters())
    for generator in (None, torch.Generator("cuda").manual_seed(0)):
        state = torch.cuda.get_rng_state()
        assert revive_(model, report, optimizer=optimizer, generator=generator, batch=x).total >= 3
        assert torch.equal(torch.cuda.get_rng_state(), state)
        torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert not any(site.dead.any() for site in diagnose(model, [x]).sites)


def test_dead_units_beside_one_that_overflows_are_revived():
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), randn(40, 3)
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1:3], model[0].bias[1:3] = 3e38, 0.0, -1.0
    report = diagnose(model, [x])
    assert report[0].nonfinite[0]
    assert report[0].dead[1:3].all()
    revival = revive_(model, report, x)
    assert revival.changes[0].units.tolist() == report[0].dead.nonzero().flatten().tolist()
    assert diagnose(model, [x])[0].dead.sum() == 0
