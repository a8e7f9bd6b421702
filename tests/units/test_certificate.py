import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relubook.units.certificate import Certificate, certify_dead

torch.set_num_threads(1)


def units_first(values):
    """(batch, units, ...) as (units, everything else)."""
    return values.transpose(0, 1).flatten(1)


def peaks(model, x):
    """Largest pre-activation of every unit on x, for each ReLU of a Sequential."""
    found = {}
    with torch.no_grad():
        for name, layer in model.named_children():
            if isinstance(layer, nn.ReLU | nn.ReLU6):
                found[name] = units_first(x).amax(1)
            x = layer(x)
    return found


def ascend(model, x, low, high, steps=15):
    """Move inputs within the box so that all pre-activations that are not positive grow."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        h, gain = x, torch.zeros(())
        for layer in model:
            if isinstance(layer, nn.ReLU | nn.ReLU6):
                gain = gain + torch.where(h <= 0, h, 0.0).sum()
            h = layer(h)
        (slope,) = torch.autograd.grad(gain, x)
        with torch.no_grad():
            x = torch.where(
                slope > 0, x + 0.2 * (high - x), torch.where(slope < 0, x - 0.2 * (x - low), x)
            )
            x = x.clamp(low, high)
    return x.detach()


def build(kind, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "mlp":
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU6(),
                              nn.Dropout(), nn.Linear(12, 8), nn.ReLU())  # fmt: skip
        shape = (5,)
    elif kind == "norm":
        model = nn.Sequential(nn.Linear(5, 9), nn.Hardtanh(), nn.Linear(9, 9), nn.Identity(),
                              nn.Linear(9, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1),
                              nn.Sigmoid())  # fmt: skip
        shape = (5,)
    elif kind == "conv1d":
        model = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1, groups=2), nn.BatchNorm1d(6),
                              nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(6, 4, 3, padding=2),
                              nn.ReLU())  # fmt: skip
        shape = (2, 8)
    else:
        model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, padding_mode="reflect"),
                              nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Conv2d(8, 6, 2, bias=False), nn.ReLU(), nn.Flatten(),
                              nn.Linear(24, 10), nn.ReLU())  # fmt: skip
        shape = (2, 6, 6)
    with torch.no_grad():
        for layer in model:
            for p in layer.parameters():
                p.copy_(randn(*p.shape) / math.sqrt(max(p[0].numel(), 1)))
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean.copy_(randn(layer.num_features))
                layer.running_var.copy_(randn(layer.num_features).exp())
            if getattr(layer, "bias", None) is not None:
                layer.bias.sub_(1.0)
    return model.eval(), shape


@pytest.mark.parametrize(
    "kind",
    ["mlp", "norm", *(pytest.param(k, marks=pytest.mark.slow) for k in ("conv1d", "conv2d"))],
)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    width=st.floats(1e-3, 2.0),
    magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_no_certified_unit_fires_and_no_bound_is_passed(kind, seed, width, magnitude):
    generator = torch.Generator().manual_seed(seed)
    model, shape = build(kind, generator)
    center = torch.randn(shape, generator=generator)
    low, high = (center - width) * magnitude, (center + width) * magnitude
    certificate = certify_dead(model, low, high)
    mixed = low + (high - low) * torch.rand(64, *shape, generator=generator)
    corners = torch.where(torch.rand(64, *shape, generator=generator) < 0.5, low, high)
    x = torch.cat([mixed, corners]).clamp(low, high)
    for inputs in (x, ascend(model, x, low, high)):
        for name, peak in peaks(model, inputs).items():
            site = certificate[name]
            assert not bool((peak[site.certified] > 0).any())
            assert bool((peak.double() <= site.upper).all())


def test_the_first_layers_bound_is_exact_up_to_rounding():
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU())
    low, high = -torch.rand(20), torch.rand(20)
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    best = torch.where(weight > 0, high.double(), low.double())
    exact = (weight * best).sum(1) + bias
    upper = certify_dead(model, low, high)["1"].upper
    assert bool((upper >= exact).all())
    assert bool((upper - exact <= 1e-5).all())


def test_units_at_the_boundary_are_not_certified_by_rounding():
    """The bound is 0 in real numbers; float32 sums in some order come out positive."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(400, 64, generator=generator)
    best = torch.where(weight > 0, 1.0, -1.0)
    exact = (weight.double() * best.double()).sum(1)
    model = nn.Sequential(nn.Linear(64, 400), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(weight)
        model[0].bias.copy_(-exact)  # rounded to float32
    certificate = certify_dead(model, -1.0, 1.0)
    with torch.no_grad():
        own_corner = model(best).diagonal()
    assert int((own_corner > 0).sum()) > 40  # a bound without margin would certify these
    assert certificate.total == 0


def test_float64_models_have_a_smaller_margin():
    narrow = nn.Sequential(nn.Linear(30, 4), nn.ReLU())
    wide = nn.Sequential(nn.Linear(30, 4), nn.ReLU()).double()
    wide.load_state_dict(narrow.state_dict())
    upper32 = certify_dead(narrow, -1.0, 1.0)["1"].upper
    upper64 = certify_dead(wide, -1.0, 1.0)["1"].upper
    assert bool((upper64 < upper32).all())
    coarse = certify_dead(narrow.half(), -1.0, 1.0)["1"].upper
    assert bool((coarse > upper32).all())


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0, 3)], ids=str
)
def test_every_rectifier_is_certified_up_to_where_it_fires(layer):
    def certified(high):
        certificate = certify_dead(layer, torch.tensor([-9.0]), torch.tensor([high]))
        return certificate[0].certified.item()

    assert certified(-0.01)
    assert not certified(0.01)
    for x in (-0.01, 0.01):
        assert (layer(torch.tensor([x])).item() > 0) == (x > 0)


@pytest.mark.parametrize(
    "layer",
    [nn.Hardtanh(-0.1, 0.1), nn.ReLU6(), nn.ReLU(), nn.Identity(), nn.Dropout().eval()],
    ids=str,
)  # fmt: skip
def test_values_behind_every_activation_stay_within_the_bounds(layer):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(1, 1, bias=False)
    for sign in (1.0, -1.0):
        nn.init.constant_(linear.weight, sign)
        for _ in range(40):
            low = 8 * torch.randn(1, generator=generator)
            high = low + 4 * torch.rand(1, generator=generator)
            upper = certify_dead(nn.Sequential(layer, linear, nn.ReLU()), low, high)["2"].upper
            x = torch.linspace(0, 1, 2001)[:, None] * (high - low) + low
            values = linear(layer(x.clamp(low, high))).detach()
            assert float(values.max()) <= float(upper)
            assert float(upper) <= float(values.max()) + 0.02 * (1 + float(values.abs().max()))


def test_names_and_units_of_nested_containers_and_convolutions():
    block = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(48, 5), nn.ReLU())
    certificate = certify_dead(model, torch.zeros(1, 6, 6), 1.0)
    assert isinstance(certificate, Certificate)
    assert [(s.name, s.kind, len(s.upper)) for s in certificate.sites] == [
        ("0.1", "relu", 3),
        ("3", "relu", 5),
    ]
    lines = repr(certificate).splitlines()
    assert lines[0] == f"Certificate: {certificate.total} of 8 units are silent on the whole box"
    assert len(lines) == 5  # title, header, rule, and two sites
    assert [site.name for site in certificate] == ["0.1", "3"]
    assert "3" in certificate
    assert "2" not in certificate
    with pytest.raises(KeyError, match=r"0\.1, 3"):
        certificate["2"]


def test_layers_behind_the_last_rectifier_do_not_matter():
    layers = [nn.Linear(2, 3), nn.ReLU()]
    behind = [nn.Linear(3, 2), nn.GELU(), nn.Softmax(-1)]
    whole = certify_dead(nn.Sequential(*layers, *behind), 0.0, 1.0)
    assert torch.equal(whole["1"].upper, certify_dead(nn.Sequential(*layers), 0.0, 1.0)["1"].upper)
    last = nn.Sequential(nn.Sequential(nn.Linear(3, 2), nn.GELU()), nn.ReLU())
    with pytest.raises(TypeError, match=r"layer '2\.0\.0\.1' is a GELU"):
        certify_dead(nn.Sequential(*layers, nn.Sequential(last)), 0.0, 1.0)


def test_corners_broadcast_to_an_input():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    per_channel = torch.tensor([[[0.0]], [[-1.0]]])
    full = per_channel.expand(2, 5, 5)
    a = certify_dead(model, per_channel, torch.ones(2, 5, 5))["1"].upper
    b = certify_dead(model, full, torch.ones(2, 5, 5))["1"].upper
    assert bool((a == b).all())


def test_overflow_is_refused():
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(-3e38)
        model[2].weight.fill_(-1.0)
        model[2].bias.fill_(-1.0)
    with pytest.raises(ValueError, match=r"layer '0' \(Linear\) has no bounds.*overflow"):
        certify_dead(model, -1.0, 3.0)
    with pytest.raises(ValueError, match="overflow"):
        certify_dead(model, -1e38, 3e38)
    long = nn.Sequential(nn.Linear(300, 1), nn.ReLU()).bfloat16()
    with pytest.raises(ValueError, match="lose all its digits"):
        certify_dead(long, 0.0, 1.0)


def test_weights_are_left_alone_and_parametrizations_are_followed():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU()).eval()
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[0].bias.copy_(model[0].bias)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    upper = certify_dead(model, -1.0, 1.0)["1"].upper
    assert bool((upper == certify_dead(plain, -1.0, 1.0)["1"].upper).all())
    assert all(bool((v == state[k]).all()) for k, v in model.state_dict().items())


LINEAR = nn.Linear(2, 3)


@pytest.mark.parametrize(
    ("layers", "low", "high", "error", "message"),
    [
        ([LINEAR, nn.ReLU()], 1.0, 0.0, ValueError, r"low > high at \(0,\): 1.0 > 0.0"),
        ([LINEAR, nn.ReLU()], torch.tensor([0.0, 2.0]), 1.0, ValueError, r"at \(1,\)"),
        ([LINEAR, nn.ReLU()], math.nan, 1.0, ValueError, "low is not finite"),
        ([LINEAR, nn.ReLU()], 0.0, math.inf, ValueError, "high is not finite"),
        ([LINEAR, nn.ReLU()], torch.zeros(3), torch.ones(3), ValueError, "cannot be multiplied"),
        ([LINEAR, nn.ReLU()], torch.zeros(3), torch.ones(2), ValueError, "shapes"),
        ([LINEAR, nn.ReLU()], "0", 1.0, TypeError, "'str'"),
        ([nn.Conv2d(1, 2, 3), nn.ReLU()], 0.0, 1.0, ValueError, "pass a tensor"),
        ([nn.Conv2d(1, 2, 3), nn.ReLU()], torch.zeros(2, 5, 5), 1.0, ValueError, "1 channels"),
        ([LINEAR], 0.0, 1.0, ValueError, "no rectifier"),
        ([], 0.0, 1.0, ValueError, "no rectifier"),
        ([LINEAR, nn.GELU(), nn.ReLU()], 0.0, 1.0, TypeError, "GELU; .* Conv2d.*ReLU6"),
        ([LINEAR, nn.LayerNorm(3), nn.ReLU()], 0.0, 1.0, TypeError, "layer '1' is a LayerNorm"),
        ([LINEAR, nn.PReLU(), nn.ReLU()], 0.0, 1.0, TypeError, "layer '1' is a PReLU"),
        ([LINEAR, nn.Threshold(0, 0), nn.ReLU()], 0.0, 1.0, TypeError, "is a Threshold"),
        ([nn.ConvTranspose1d(1, 1, 2), nn.ReLU()], 0.0, 1.0, TypeError, "is a ConvTranspose1d"),
        ([LINEAR, nn.BatchNorm1d(3), nn.ReLU()], 0.0, 1.0, ValueError, r"call eval\(\)"),
        ([LINEAR, nn.Dropout(), nn.ReLU()], 0.0, 1.0, ValueError, "drops values"),
        ([LINEAR, nn.ReLU(), nn.Linear(4, 1), nn.ReLU()], 0.0, 1.0, ValueError, "layer '2'"),
        ([LINEAR, nn.LeakyReLU(), nn.ReLU()], 0.0, 1.0, TypeError, "layer '1' is a LeakyReLU"),
    ],
)  # fmt: skip
def test_bad_input_raises(layers, low, high, error, message):
    with pytest.raises(error, match=message):
        certify_dead(nn.Sequential(*layers), low, high)


@pytest.mark.parametrize("model", [3, torch.relu, [LINEAR, nn.ReLU()]])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        certify_dead(model, 0.0, 1.0)


def test_hooks_weights_that_are_not_finite_and_custom_forwards_are_refused():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="Twice"):
        certify_dead(nn.Sequential(Twice(2, 2), nn.ReLU()), 0.0, 1.0)
    layer = nn.Linear(2, 2)
    handle = layer.register_forward_hook(lambda m, a, out: out + 1)
    with pytest.raises(ValueError, match="hooks"):
        certify_dead(nn.Sequential(layer, nn.ReLU()), 0.0, 1.0)
    handle.remove()
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="'weight' of layer '0' is not finite"):
        certify_dead(nn.Sequential(layer, nn.ReLU()), 0.0, 1.0)
