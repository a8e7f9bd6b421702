"""Data off center against NumPy; units at risk against their fate; advice against the ledger."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import relubook
from relubook.evidence.claims import ledger
from relubook.evidence.data import dataset
from relubook.evidence.statistics import seeds
from relubook.layers.maxout import Maxout
from relubook.training.recipe import Recipe
from relubook.training.train import train
from relubook.units.diagnosis import diagnose
from relubook.units.report import Report, SiteReport
from relubook.units.risk import ADVICE, MANY, OFF_CENTER, off_center
from relubook.units.watch import Watch, WatchedSite

ROOT = Path(__file__).resolve().parents[2]


def by_numpy(x: np.ndarray) -> float:
    x = x.reshape(len(x), -1).astype(np.float64)
    return (x.mean(0) ** 2).sum() / (x**2).sum(1).mean()


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=4, max_side=6),
        elements=st.floats(-100, 100, width=32).map(lambda v: v if abs(v) > 1e-3 else 1.0),
    ),
    st.integers(1, 7),
)
def test_off_center_is_its_formula_however_the_data_come(x, size):
    ratio = by_numpy(x)
    assert 0 <= ratio <= 1 + 1e-12
    batches = torch.tensor(x).split(size)
    for data in (torch.tensor(x), x, batches, [(b, None) for b in batches], iter([x[:1], x[1:]])):
        assert off_center(data) == pytest.approx(ratio, rel=1e-9)
    assert off_center(torch.tensor(x) * 1e-3) == pytest.approx(ratio, rel=1e-4)


def test_off_center_of_loaders_frames_and_pixels():
    pixels = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    expected = by_numpy(pixels.numpy())
    loader = DataLoader(TensorDataset(pixels, torch.arange(50)), batch_size=7, shuffle=True)
    state = torch.get_rng_state()
    assert off_center(loader) == pytest.approx(expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert off_center(pixels) == pytest.approx(expected)
    assert off_center(pd.DataFrame(pixels.flatten(1).double())) == pytest.approx(expected)


def test_off_center_of_extremes():
    x = torch.randn(64, 3, dtype=torch.double)
    assert off_center(x - x.mean(0)) < 1e-30
    assert off_center(torch.ones(4, 3)) == pytest.approx(1)
    assert off_center(torch.zeros(4, 3)) == 0
    assert off_center(torch.full((4, 3), 6e4, dtype=torch.float16)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (TensorDataset(torch.ones(3, 2)), TypeError, "data is a TensorDataset, not a tensor"),
        ({"x": torch.ones(3, 2)}, TypeError, "data is a dict"),
        (3.0, TypeError, "not iterable"),
        ("ab", TypeError, "batch 0 holds str"),
        ([{"x": torch.ones(3, 2)}], TypeError, "batch 0 holds dict, not floating-point"),
        (torch.ones(3, 2).long(), TypeError, "batch 0 holds torch.int64"),
        (torch.ones(3, 2, dtype=torch.complex64), TypeError, "batch 0 holds torch.complex64"),
        ([[1.0, 2.0]], TypeError, "batch 0 holds float"),
        (torch.ones(3), ValueError, r"batch 0 has shape \(3,\), not \(inputs, features\)"),
        ([torch.ones(3, 2), torch.ones(3, 1)], ValueError, r"batch 1 .* \(3, 1\), not \(inputs, 2"),
        ([torch.ones(2, 2), torch.tensor([[1, torch.nan]])], ValueError, "batch 1 holds NaN"),
        (np.array([[1, np.inf]]), ValueError, "batch 0 holds NaN, infinity"),
        ([], ValueError, "data holds no input"),
        (torch.ones(0, 2), ValueError, "data holds no input"),
    ],
)
def test_off_center_refuses(data, error, words):
    with pytest.raises(error, match=words):
        off_center(data)


@pytest.mark.slow
def test_below_the_threshold_hardly_a_unit_dies():
    images = dataset("digits").train
    mean = images.x.mean(0)
    dead = {}
    for part in (0.5, 1.0):
        x = images.x - (1 - part) * mean
        stack = Recipe(64, (32, 32), 10).stack(seeds(30))
        run = train(stack, x, images.y, steps=300, lr=1.8, optimizer="sgd", batch_size=64)
        dead[off_center(x)] = float(run.dead[-1][:, 0].nanmean())
    (low, few), (high, many) = sorted(dead.items())
    assert low < OFF_CENTER < high
    assert few < 0.1
    assert many > 0.5


def model_with(*rates: float, inputs: int = 1000) -> tuple[nn.Module, Tensor]:
    """Return a model whose unit i fires on that share of the inputs, and these."""
    z = torch.full((inputs, len(rates)), -1.0)
    for unit, rate in enumerate(rates):
        z[: round(rate * inputs), unit] = 1.0 + unit
    model = nn.Sequential(nn.Linear(len(rates), len(rates)), nn.ReLU(), nn.Identity())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(len(rates)))
        model[0].bias.zero_()
    return model, z


def test_units_at_risk_are_rare_or_of_low_peak():
    model, z = model_with(0, 0.5, 0.6, *[0.5] * 18, 0.005)  # 21 living units: the tenth are three
    (site,) = diagnose(model, [z])
    assert site.at_risk.nonzero().flatten().tolist() == [1, 2, 3, 21]
    site.nonfinite[1] = True
    assert site.at_risk.nonzero().flatten().tolist() == [2, 3, 21]
    assert not diagnose(model_with(0, 0)[0], [z[:, :2] * 0 - 1])[0].at_risk.any()
    pieces = diagnose(Maxout(3, 40, pieces=5), torch.randn(200, 3))
    assert pieces[0].rare.any()
    assert not pieces[0].at_risk.any()
    assert advised(pieces) == []
    leaky = nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU())
    assert not diagnose(leaky, torch.randn(9, 3), family="all")[0].at_risk.any()


def test_a_watched_site_knows_who_is_at_risk_and_who_was_dead_from_the_start():
    model, z = model_with(0, *[0.5] * 11)
    with Watch(model, window=2) as watch:
        for step in range(4):
            silent = torch.tensor(4 if step < 2 else 3)
            model(z.index_fill(1, silent, -1.0))
            site = watch.compute()[0] if step % 2 else None
    assert site.dead.nonzero().flatten().tolist() == [0, 3]
    assert site.at_risk.nonzero().flatten().tolist() == [1]
    text = repr(watch.compute())
    assert "ADVICE from Dead before the first step: silent from the first look on: 1." in text
    unreached = WatchedSite("1", site.dead, torch.full((12,), -torch.inf))
    assert not unreached.at_risk.any()
    with Watch(model, window=1) as alive:
        model(z.abs())
    assert "ADVICE" not in repr(alive.compute())


@pytest.mark.slow
def test_units_at_risk_die_more_often_than_twice():
    """Thirty networks at the edge rate, looked at or watched up to step 100; the dead at 300."""
    digits = dataset("digits", standardize=False)
    x, y = digits.train.x, digits.train.y

    def run(net, seed, first, last):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for step in range(first, last + 1):
            draw = torch.Generator().manual_seed(1000 * seed + step)
            rows = torch.randint(len(x), (64,), generator=draw)
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()

    found = {"diagnose": [], "watch": []}
    for seed in range(30):
        torch.manual_seed(seed)
        net = nn.Sequential(*(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()))
        net.append(nn.Linear(32, 10))
        for layer in net[::2]:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        with Watch(net, window=20) as watch:
            run(net, seed, 1, 100)
        sites = {"diagnose": diagnose(net, [x]), "watch": watch.compute()}
        living = [~site.dead for site in sites["diagnose"]]
        run(net, seed, 101, 300)
        fates = [site.dead for site in diagnose(net, [x])]
        for name, report in sites.items():
            found[name] += zip([s.at_risk for s in report], living, fates, strict=True)
    for units in found.values():
        at_risk, living, dies = (torch.cat(column) for column in zip(*units, strict=True))
        chosen, others = at_risk & living, ~at_risk & living
        assert chosen.sum() < 0.25 * living.sum()
        assert dies[chosen].double().mean() > 2 * dies[others].double().mean() > 0


def advised(report):
    return re.findall(r"^ADVICE from .*\(claim ([\w-]+)\)\.$", repr(report), re.M)


@pytest.mark.parametrize(
    ("rates", "shift", "claims"),
    [
        ([0.5] * 20, 0, []),
        ([0.5] * 20, 99, []),  # off center, and nobody suffers
        ([0] + [0.5] * 20, 0, ["spine-no-cost-at-best"]),
        ([0.005] + [0.5] * 20, 0, ["tool-rare-are-next"]),
        ([0] * 3 + [0.5] * 20, 0, ["spine-centered-born-alive", "tool-revive-recovers"]),
        ([0, 0], 0, ["spine-centered-born-alive", "tool-revive-recovers"]),
        ([0] + [0.5] * 20, 99, ["spine-centering", "spine-no-cost-at-best"]),
    ],
)
def test_advice_follows_what_was_found(rates, shift, claims):
    model, z = model_with(*rates)
    model = nn.Sequential(nn.Linear(len(rates) + 1, len(rates)), *model[1:])
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(len(rates), len(rates) + 1))
        model[0].bias.copy_(z.mean(0))
    x = torch.cat([z - z.mean(0), shift * torch.ones(len(z), 1)], 1)
    for size in (1000, 100, 300):
        report = diagnose(model, x[torch.randperm(1000)].split(size))
        assert advised(report) == claims
    assert report.to_frame().at_risk.sum() == report[0].at_risk.sum()


def test_a_dead_layer_is_worse_than_a_few_dead_units():
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2), nn.ReLU())
    with torch.no_grad():
        model[2].bias.fill_(-99)
    report = diagnose(model, torch.randn(64, 3))
    assert report.dead_fraction < MANY
    assert "tool-revive-recovers" in advised(report)


def test_overflow_gets_advice():
    model, z = model_with(0.5, 0.5)
    with torch.no_grad():
        model[0].bias[0] = torch.inf
    assert advised(diagnose(model, [z])) == ["spine-bound-decides"]


def test_no_advice_on_data_that_cannot_be_told():
    """Few inputs, several first dimensions, changed since, or none kept."""
    model, x = nn.Sequential(nn.Linear(3, 40), nn.ReLU()), torch.rand(64, 3) + 9
    with torch.no_grad():
        model[0].bias[0] = -99
    assert "spine-centering" in advised(diagnose(model, [x]))
    for report in (
        diagnose(model, [x[:20]]),
        diagnose(model, [x], forward=lambda net, batch: net(batch)),
        diagnose(model, [x.view(2, 32, 3)], batch_dim=1, unit_dim=2),
        diagnose(model, [x[:, None].expand(64, 7, 3)], batch_dim=1, unit_dim=2),
        diagnose(model, [x[:40, None].expand(40, 10, 3)] * 10, batch_dim=1, unit_dim=2),
    ):
        assert "spine-centering" not in advised(report)
    report = diagnose(model, [x])
    assert advised(report.filter(lambda site: False)) == []
    x[0] = torch.nan
    assert "spine-centering" not in advised(report)


def test_a_report_looks_at_the_center_of_its_data_once(monkeypatch, tmp_path):
    model, x = nn.Sequential(nn.Linear(3, 40), nn.ReLU()), torch.rand(64, 3) + 9
    with torch.no_grad():
        model[0].bias[0] = -99
    seen = []
    monkeypatch.setattr(relubook.units.report, "off_center", lambda x: seen.append(x) or 0.5)
    report = diagnose(model, [x])
    assert not seen
    shown = repr(report)
    assert "batch 0 is 0.50 off center" in shown
    assert "batch 0 is 0.50 off center" in report._repr_html_()
    assert len(seen) == 1
    report.save(tmp_path / "kept")  # also when that is known
    assert "spine-centering" not in advised(Report.load(tmp_path / "kept"))


@pytest.mark.parametrize("claim", ADVICE)
def test_advice_is_what_the_ledger_supports(claim):
    """Its verdict is true; its first reservation is quoted; its chapter is named by its title."""
    row = next(row for row in ledger() if row["id"] == claim)
    assert row["verdict"] in ("true", "true, but")
    chapter, text = ADVICE[claim].split(": ", 1)
    page = ROOT / "book" / f"{row['chapter']}.md"
    assert f"# {chapter}\n" in page.read_text(encoding="utf-8")
    conditions = row["condition"].split("; ") if row["condition"] else [""]
    assert any(condition in text for condition in conditions)
    assert len(text) < 200


def test_as_many_as_one_in_ten_die_at_the_best_rate():
    """What `MANY` stands for: the verdict on the claim that the optimizer has no effect."""
    page = (ROOT / "book/learning-rate-and-optimizer.md").read_text("utf-8")
    assert MANY == 0.1
    assert "at its best rate Adam kills one unit in ten" in page


def test_a_report_made_by_hand_can_be_printed():
    zeros = torch.zeros(2, dtype=torch.int64)
    site = SiteReport("1", "relu", None, 1, zeros, None, zeros - 1.0, zeros.bool(), inputs=5)
    assert "2 dead units" in repr(Report([site], 5, 1))
    assert relubook.off_center is off_center
