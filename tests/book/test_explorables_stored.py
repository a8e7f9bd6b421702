"""*Who dies, who learns?* and *On/off*: they draw what is stored, and what is stored is so."""

import json
import math

import explorables
import on_off
import pytest
import torch
from torch import nn
from visits import PHONE, Visit

from relubook.evidence.data import dataset
from relubook.evidence.results import load
from relubook.training.recipe import Recipe
from relubook.training.stack import batch_order

NORM, ZEROS = "book/normalization", "book/sparsity-and-expressivity"

pytestmark = [pytest.mark.site, pytest.mark.slow, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def model(browser):
    page = browser.new_page()
    for name in ("core", "who-dies", "on-off"):
        page.add_script_tag(path=str(explorables.SCRIPTS / f"{name}.js"))
    yield page
    page.close()


def test_who_dies_draws_what_is_stored(model):
    """Every network on digits under SGD, and how many learn, die and overflow."""
    data, stored = json.loads(explorables.data("who-dies")), load("who-dies")
    images = {"come": "as they come", "centered": "centered"}
    drawn = set()
    for (point,), cell in stored.cells.items():
        task, way, depth, optimizer, method, rate = point.split()
        if (task, optimizer) != ("digits", "SGD") or method not in data["methods"]:
            continue
        setting = f"{images[way]} {depth}"
        index = data["cells"][setting]["rates"].index(float(rate))
        ask = """([d, s, m, k]) => { const n = relubook.whoDies.networks(d, s, m, k);
            return [n, relubook.whoDies.fates(n, 0.9)]; }"""
        networks, fates = model.evaluate(ask, [data, setting, method, index])
        for name in ("dead", "accuracy"):
            mine = [math.nan if v is None else v for v in networks[name]]
            assert mine == pytest.approx(cell[name], abs=1e-9, nan_ok=True)
        finite = [share for share in cell["dead"] if not math.isnan(share)]
        assert fates["overflowed"] == 30 - len(finite)
        assert fates["learn"] == sum(right >= 0.9 for right in cell["accuracy"])
        mean = sum(finite) / len(finite) if finite else None
        assert fates["dead"] == (mean if mean is None else pytest.approx(mean, abs=1e-9))
        drawn.add((setting, method, index))
    offered = {
        (setting, method, index)
        for setting, cell in data["cells"].items()
        for method, found in cell["found"].items()
        for index in range(len(found["dead"]))
    }
    assert drawn == offered
    assert len(drawn) == 120


@pytest.mark.parametrize("way", on_off.WAYS)
@pytest.mark.parametrize("rate", on_off.RATES)
def test_on_off_is_what_one_network_does_in_pytorch(model, way, rate):
    """A plain module, trained by torch's SGD step by step, fires where the figure says."""
    data, known = explorables.silent_units(), dataset("digits", dtype=torch.float64).train
    x = known.x - known.x.mean(0) * (way == "centered")
    network = Recipe(64, (32, 32), 10).single(on_off.SEED, dtype=torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    for rows in batch_order(on_off.SEED, len(x), 64, on_off.STEPS if rate else 0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), known.y[rows]).backward()
        optimizer.step()
    first, second, _ = [layer for layer in network if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        z = first(x)
        on = torch.cat([z, second(z.relu())], 1) > 0
    rows = [k for digit in range(10) for k in (known.y == digit).nonzero()[:5, 0].tolist()]
    mine = model.evaluate(
        "([d, w, k]) => relubook.onOff.view(d, w, k, relubook.onOff.orders[1])",
        [data, way, on_off.RATES.index(rate)],
    )
    assert data["digits"] == known.y[rows].tolist()
    assert mine["on"] == on[rows].T.int().tolist()
    assert mine["fires"] == on.sum(0).tolist()
    assert mine["dead"] == int((~on.any(0)).sum())
    assert mine["silent"] == pytest.approx(1 - on.double().mean().item(), abs=1e-12)
    zeros = (~on[rows]).sum(1)
    assert mine["zeros"] == zeros.tolist()
    assert zeros[mine["columns"]].tolist() == sorted(zeros.tolist())


def test_on_off_shows_the_images(model):
    data, known = explorables.silent_units(), dataset("digits", standardize=False).train
    for k, row in enumerate(on_off.shown(known.y)):
        drawn = model.evaluate("([d, k]) => relubook.onOff.pixels(d, k)", [data, k])
        assert drawn == (16 * known.x[row]).tolist()


def test_a_reader_moves_through_rates_and_depths_by_keyboard(browser, address):
    with Visit(browser, address, f"{NORM}.html") as visit:
        figure = visit.page.locator("#explorable-who-dies")
        said = figure.locator("[role=status]")
        assert said.inner_text().startswith(
            "At a rate of 1.8, of 30 networks each learn: nothing 0"
        )
        figure.get_by_label("Learning rate", exact=True).focus()
        visit.page.keyboard.press("Home")
        assert said.inner_text().startswith("At a rate of 0.03")
        figure.get_by_label("Hidden layers", exact=True).select_option("20")
        assert figure.get_by_label("Images", exact=True).locator("option[disabled]").count() == 1
        before = said.inner_text()
        figure.get_by_label("Learns: right on", exact=True).focus()
        visit.page.keyboard.press("Home")
        assert said.inner_text() != before
        assert not visit.errors


def test_a_finger_picks_a_unit_and_an_image(browser, address):
    with Visit(browser, address, f"{ZEROS}.html", viewport=PHONE, has_touch=True) as visit:
        figure = visit.page.locator("#explorable-on-off")
        said, picture = figure.locator("[role=status]"), figure.locator("svg.rb-matrix")
        row = figure.get_by_label("Row: a unit", exact=True)
        before = row.get_attribute("aria-valuetext")
        picture.scroll_into_view_if_needed()
        box = picture.bounding_box()
        visit.page.touchscreen.tap(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.7)
        assert row.get_attribute("aria-valuetext") != before
        assert row.get_attribute("aria-valuetext").endswith("of layer 2")
        assert "6 of 64 units are dead" in said.inner_text()
        figure.get_by_label("Images", exact=True).select_option("centered")
        assert "0 of 64 units are dead" in said.inner_text()
        assert not visit.errors


@pytest.mark.parametrize("page", [NORM, ZEROS])
def test_the_narrowest_phone_shows_all(browser, address, page):
    with Visit(browser, address, f"{page}.html", viewport={"width": 320, "height": 640}) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 320
        for figure in visit.page.locator(".rb-explorable").all():
            box = figure.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 320
