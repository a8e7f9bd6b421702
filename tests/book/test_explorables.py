"""The figures without a kernel: their numbers against PyTorch, their use by readers."""

import itertools
import json
import math
import re
from pathlib import Path

import explorables
import pytest
import torch
from scipy.stats import binomtest
from visits import DESK, PHONE, Visit, violations

from relubook.chapters.born_dead import lower_bound, upper_bound
from relubook.evidence.results import load
from relubook.layers.maxout import Maxout
from relubook.units.diagnosis import diagnose

ROOT = Path(__file__).resolve().parents[2]
KILL, BORN, MAP = "book/how-units-die", "book/born-dead", "book/learning-rate-and-optimizer"
BEND = "book/sparsity-and-expressivity"
FIRST = "book/intro"
NORM = "book/normalization"
PAGES = {
    "kill-a-unit": [KILL, FIRST],
    "born-dead": [BORN],
    "the-map": [MAP],
    "bend-a-line": [BEND],
    "take-the-largest": ["book/maxout"],
    "who-dies": [NORM],
    "on-off": [BEND],
}
SHOWN = [(name, page) for name, pages in PAGES.items() for page in pages]

pytestmark = [pytest.mark.site, pytest.mark.slow, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def model(browser):
    """A bare page with the scripts alone: the models need no site."""
    page = browser.new_page()
    for name in ("core", *explorables.TITLES):
        page.add_script_tag(path=str(explorables.SCRIPTS / f"{name}.js"))
    yield page
    page.close()


# ---- the models ------------------------------------------------------------------------------


def torch_run(data, *, rate, leak, center, start, outlier, drops, steps):
    """Train the unit of the figure with PyTorch's gradients."""
    mean = data["mean"] if center else 0.0
    x = torch.tensor(data["x"], dtype=torch.float64) - mean
    y = torch.tensor(data["y"], dtype=torch.float64)
    far = torch.tensor([outlier - mean], dtype=torch.float64)
    w = torch.tensor(start[0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor(start[1] + start[0] * mean, dtype=torch.float64, requires_grad=True)
    path = [(w.item(), b.item())]
    for step in range(steps):
        bx, by = (far, torch.ones(1, dtype=torch.float64)) if step in drops else (x, y)
        out = torch.nn.functional.leaky_relu(w * bx + b, leak)
        gradients = torch.autograd.grad(((out - by) ** 2 / 2).mean(), (w, b))
        with torch.no_grad():
            for value, gradient in zip((w, b), gradients, strict=True):
                value -= rate * gradient
        path.append((w.item(), b.item()))
    return torch.tensor(path, dtype=torch.float64)


GRID = list(
    itertools.product(
        (0.02, 0.15, 0.35, 0.5), (0.0, 0.1, 0.3), (False, True), ([], [0], [60], [20, 21, 70])
    )
)


def chaotic(rate, leak, center):
    """Whether a step overshoots and the leak throws it back: rounding errors then grow to order 1.

    In PyTorch alone a start changed by 1e-15 ends up somewhere else.
    """
    return rate == 0.5 and leak > 0 and not center


def test_kill_a_unit_agrees_with_pytorch(model):
    data = model.evaluate("relubook.killAUnit.data")
    worst, runs, steps = 0.0, 0, 120
    for rate, leak, center, drops in GRID:
        if chaotic(rate, leak, center):
            continue
        settings = {
            "rate": rate, "leak": leak, "center": center, "drops": drops,
            "start": [0.5, -0.9], "outlier": 5.3,
        }  # fmt: skip
        path = model.evaluate("([p, n]) => relubook.killAUnit.run(p, n)", [settings, steps])
        mine = torch.tensor([path["w"], path["b"]], dtype=torch.float64).T
        theirs = torch_run(data, steps=steps, **settings)
        worst = max(worst, (mine - theirs).abs().max().item())
        runs += 1
    print(f"{runs} runs of {steps} steps: largest difference {worst:.1e}")
    assert worst < 1e-9


def test_each_step_of_kill_a_unit_agrees_with_pytorch_even_where_runs_are_chaotic(model):
    data = model.evaluate("relubook.killAUnit.data")
    worst, count = 0.0, 0
    for rate, leak, center, drops in GRID:
        if not chaotic(rate, leak, center):
            continue
        settings = {"rate": rate, "leak": leak, "center": False, "outlier": 5.3}
        first = settings | {"drops": drops, "start": [0.5, -0.9]}
        path = model.evaluate("([p, n]) => relubook.killAUnit.run(p, n)", [first, 120])
        for step in range(120):
            here = settings | {
                "start": [path["w"][step], path["b"][step]], "drops": [0] if step in drops else []
            }  # fmt: skip
            w, b = torch_run(data, steps=1, **here)[1].tolist()
            worst = max(worst, abs(w - path["w"][step + 1]), abs(b - path["b"][step + 1]))
            count += 1
    print(f"{count} single steps: largest difference {worst:.1e}")
    assert worst < 1e-12


def test_kill_a_unit_tells_the_books_story(model):
    story = model.evaluate(
        """() => {
            const { run } = relubook.killAUnit, dead = (path) => path.fires.some((f) => f === 0);
            const result = { raw: dead(run({ drops: [60] }, 200)), learns: dead(run({}, 200)),
                near: dead(run({ drops: [60], outlier: 3 }, 200)),
                rate: dead(run({ rate: 0.5 }, 200)), runs: 0, deaths: [],
                leak: run({ drops: [60], leak: 0.1 }, 200).fires };
            for (let k = 0; k <= 30; k += 1)
                for (let outlier = 3; outlier <= 6; outlier += 0.5)
                    for (const drops of [[], [0], [5], [60], [20, 21, 22],
                                         [60, 61, 62, 63, 64, 65]]) {
                        result.runs += 1;
                        const rate = 0.02 * 25 ** (k / 30);
                        const path = run({ center: true, rate, outlier, drops }, 200);
                        const at = path.fires.indexOf(0);
                        if (at >= 0) result.deaths.push([drops[0], path.b[at]]);
                    }
            return result;
        }"""
    )
    assert [story[name] for name in ("learns", "near", "raw", "rate")] == [False, False, True, True]
    # On centered inputs no unit is dead with a bias of 0 or more: a few die, hit before step 1.
    assert story["runs"] == 1302
    assert len(story["deaths"]) < 10
    assert all(first == 0 and bias < 0 for first, bias in story["deaths"])
    assert 0 in story["leak"]
    assert story["leak"][-1] == 9


def test_born_dead_networks_agree_with_pytorch(model):
    for width, index in itertools.product((1, 2, 3, 10), range(4)):
        net, sides = model.evaluate(
            "([w, k]) => { const n = relubook.bornDead.network(w, k);"
            " return [n, relubook.bornDead.fate(n)]; }",
            [width, index],
        )
        for x, side in zip((1.0, -1.0), sides, strict=True):
            h = torch.tensor([x], dtype=torch.float64)
            for depth in range(1, 31):
                out = torch.tensor(net["last"][depth - 1], dtype=torch.float64) @ h
                assert math.isclose(out.item(), side["f"][depth - 1], rel_tol=1e-9, abs_tol=1e-12)
                if depth < 30:
                    h = (torch.tensor(net["hidden"][depth - 1], dtype=torch.float64) @ h).relu()
                    assert bool((h == 0).all()) == (0 < side["silent"] <= depth)


def test_born_dead_agrees_with_the_book(model):
    stored = json.loads((ROOT / "book/results/born-dead.json").read_text())
    for cell in stored["cells"]:
        width, networks = cell["at"]["width"], 4000
        dead = model.evaluate("([w, n]) => relubook.bornDead.count(w, 0, n)", [width, networks])
        for depth in (2, 3, 5, 10, 20, 30):
            share = sum(cell["measured"][f"both {depth}"]) / 40_000
            mine = binomtest(dead[depth], networks).proportion_ci(1 - 0.001 / 54)
            assert mine.low <= share <= mine.high, (width, depth)
            assert model.evaluate(
                "([w, d]) => relubook.bornDead.lower(w, d)", [width, depth]
            ) == pytest.approx(lower_bound(width, depth), abs=1e-12)
            assert model.evaluate(
                "([w, d]) => relubook.bornDead.upper(w, d)", [width, depth]
            ) == pytest.approx(upper_bound(width, depth), abs=1e-12)


def test_the_map_draws_what_is_stored(model):
    stored = load("rate-map")
    data = json.loads(explorables.data("the-map"))
    layers = {"layer 1": ["layer1"], "layer 2": ["layer2"], "both layers": ["layer1", "layer2"]}
    for at in stored.cells:
        optimizer, way, rate = at
        for shown, names in layers.items():
            kept = [stored.cells[at][name] for name in names]
            dead = [sum(shares) / len(names) for shares in zip(*kept, strict=True)]
            cell = model.evaluate(
                "([d, o, w, k, l]) => relubook.theMap.cell(d, o, w, k, relubook.theMap.layers[l])",
                [data, optimizer, way, stored.grid["rate"].index(rate), shown],
            )
            mine = [math.nan if value is None else value for value in cell["dead"]]
            assert mine == pytest.approx(dead, abs=1e-5, nan_ok=True)
            assert cell["accuracy"] == pytest.approx(stored.cells[at]["accuracy"], abs=1e-5)
    values = [0.3, None, 0.1, 0.2, 0.9]
    summary = model.evaluate("v => relubook.theMap.summary(v)", values)
    kept = torch.tensor([0.3, 0.1, 0.2, 0.9], dtype=torch.float64)
    assert summary["n"] == 4
    assert summary["mean"] == pytest.approx(kept.mean().item())
    quartiles = kept.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    assert [summary["low"], summary["high"]] == pytest.approx(quartiles)


CORNERS = ([0.0], [-0.6, 0.0, 0.6], [-0.98, -0.96, 0.5, 0.52, 0.54, 0.98])


@pytest.mark.parametrize("corners", CORNERS)
def test_a_bent_line_is_the_best_sum_of_relus(model, corners):
    grid = torch.tensor(model.evaluate("relubook.bendALine.grid"), dtype=torch.float64)
    basis = torch.stack([grid**0, grid + 1, *((grid - c).relu() for c in corners)], 1)
    for name in model.evaluate("relubook.bendALine.curves"):
        ask = "([n, c]) => relubook.bendALine.outcome(n, c, 'ReLUs')"
        mine = model.evaluate(ask, [name, corners])
        values = "([n, xs]) => xs.map(x => relubook.bendALine.value(n, x))"
        curve = torch.tensor(model.evaluate(values, [name, grid.tolist()]), dtype=torch.float64)
        best = basis @ torch.linalg.lstsq(basis, curve[:, None], driver="gelsd").solution[:, 0]
        drawn = torch.tensor(mine["values"], dtype=torch.float64)
        torch.testing.assert_close(drawn, best, rtol=0, atol=1e-9)
        assert mine["error"] == pytest.approx((best - curve).abs().max().item(), abs=1e-9)
        assert mine["pieces"] == len(corners) + 1


def test_tangents_of_a_parabola_are_off_by_one_over_k_squared(model):
    for k in (1, 2, 4, 5, 10):
        places = [-1 + (2 * j + 1) / k for j in range(k)]
        ask = "p => relubook.bendALine.outcome('a bowl', p, 'a maximum of lines')"
        mine = model.evaluate(ask, places)
        assert mine["error"] == pytest.approx(1.6 / k**2, abs=1e-12)
        assert mine["pieces"] == k


def maxout_of(rows):
    """Return the unit of one input with these lines, in 64 bits."""
    unit = Maxout(1, 1, len(rows), dtype=torch.float64)
    with torch.no_grad():
        unit.weight.copy_(torch.tensor(rows, dtype=torch.float64)[:, :1])
        unit.bias.copy_(torch.tensor(rows, dtype=torch.float64)[:, 1])
    return unit


def laid(generator, k):
    """Return handles of k lines, some far too low to win; the last of many is below the first."""
    draws = torch.rand(k, 2, generator=generator, dtype=torch.float64)
    handles = [{"p": 2 * p - 1, "lift": 1.2 * lift - 0.6} for p, lift in draws.tolist()]
    if k > 4:
        handles[-1] = handles[0] | {"lift": handles[0]["lift"] - 0.1 * (k % 2)}
    return handles


@pytest.mark.parametrize("mode", ["one maximum", "a difference of two"])
def test_the_largest_line_agrees_with_pytorch(model, mode):
    generator, ask = torch.Generator().manual_seed(0), "a => relubook.takeTheLargest.outcome(...a)"
    grid = torch.tensor(model.evaluate("relubook.takeTheLargest.grid"), dtype=torch.float64)
    aim = "([m, xs]) => xs.map(x => relubook.takeTheLargest.target(m, x))"
    target = torch.tensor(model.evaluate(aim, [mode, grid.tolist()]), dtype=torch.float64)
    guides = {
        "one maximum": [grid**2],
        "a difference of two": [0.35 * (torch.pi * grid).sin() + 1.8 * grid**2, 1.8 * grid**2],
    }[mode]
    torch.testing.assert_close(target, guides[0] - sum(guides[1:]), rtol=0, atol=1e-12)
    fine = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[:, None]
    losers = 0
    for k in range(1, 9):
        units = [laid(generator, k) for _ in guides]
        mine = model.evaluate(ask, [mode, units])
        built = [maxout_of(rows) for rows in mine["rows"]]
        with torch.no_grad():
            made = [unit(grid[:, None])[:, 0] for unit in built]
        theirs = made[0] - sum(made[1:])
        drawn = torch.tensor(mine["values"], dtype=torch.float64)
        torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-9)
        assert mine["error"] >= (theirs - target).abs().max() - 1e-9
        for unit, won, guide, handles in zip(built, mine["won"], guides, units, strict=True):
            (site,) = diagnose(unit, fine)
            assert [stretch is None for stretch in won] == site.never_wins.tolist()
            lengths = [0 if stretch is None else (stretch[1] - stretch[0]) / 2 for stretch in won]
            assert site.rate.tolist() == pytest.approx(lengths, abs=1e-4)
            losers += sum(stretch is None for stretch in won)
            for line, handle in zip(unit.weight.detach()[:, 0], handles, strict=True):
                middle = (grid - handle["p"]).abs().argsort()[:2]  # the slope of the curve there
                slope = (guide[middle[0]] - guide[middle[1]]) / (grid[middle[0]] - grid[middle[1]])
                assert line.item() == pytest.approx(slope.item(), abs=0.02)
    assert losers > 5


def test_no_lines_come_closer_to_a_parabola_than_the_best(model):
    generator, ask = torch.Generator().manual_seed(0), "a => relubook.takeTheLargest.outcome(...a)"
    for k in range(1, 9):
        best = model.evaluate("k => relubook.takeTheLargest.best(k)", k)
        limit = model.evaluate("k => relubook.takeTheLargest.bestError(k)", k)
        assert limit == pytest.approx(1 / (2 * k**2), abs=1e-15)
        assert model.evaluate(ask, ["one maximum", [best]])["error"] == pytest.approx(
            limit, abs=1e-12
        )
        for size in (0.002, 0.02, 0.2):
            for _ in range(20):
                push = size * torch.randn(k, 2, generator=generator, dtype=torch.float64)
                moved = [
                    {"p": line["p"] + p, "lift": line["lift"] + lift}
                    for line, (p, lift) in zip(best, push.tolist(), strict=True)
                ]
                other = model.evaluate(ask, ["one maximum", [moved]])
                assert other["error"] > limit


# ---- the stills and the pages ------------------------------------------------------------------


@pytest.mark.parametrize("name", explorables.TITLES)
def test_still_is_what_the_script_draws(browser, name):
    stored = (explorables.SCRIPTS / f"{name}.html").read_text(encoding="utf-8")
    assert explorables.still(browser, name) == stored, "run: make stills"


def test_scripts_load_only_where_they_are_used(site):
    found = {}
    for page in (site / "book").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        shown = re.findall(r'data-explorable="([\w-]+)"', text)
        loaded = set(re.findall(r"explorables/([\w-]+)\.js", text))
        assert loaded == ({"core", *shown} if shown else set()), page.name
        for name in shown:
            where = page.relative_to(site).with_suffix("").as_posix()
            found.setdefault(name, []).append(where)
    assert {name: sorted(pages) for name, pages in found.items()} == PAGES


@pytest.mark.parametrize(("name", "page"), SHOWN)
def test_without_scripts_a_picture_and_a_sentence_remain(browser, address, name, page):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(f"{address}/{page}.html")
    figure = opened.locator(f"#explorable-{name}")
    assert figure.locator("svg").count() >= 2
    assert figure.locator("button, input").count() == 0
    caption = figure.locator("figcaption").inner_text()
    assert len(caption) > 60
    assert "page.)" not in caption
    context.close()


@pytest.mark.parametrize(("name", "page"), SHOWN)
def test_figures_run_from_a_file(browser, site, name, page):
    context = browser.new_context()
    opened = context.new_page()
    opened.goto((site / f"{page}.html").as_uri())
    opened.wait_for_selector(f"#explorable-{name}[data-ready] :is(input, button)")
    context.close()


def test_a_reader_kills_a_unit_and_centering_saves_it_by_keyboard_alone(browser, address):
    with Visit(browser, address, f"{KILL}.html", reduced_motion="reduce") as visit:
        page = visit.page
        said = page.locator(".rb-explorable [role=status]")
        page.get_by_role("button", name="Drop an outlier").focus()
        page.keyboard.press("Enter")
        assert "pushed z below 0 on all 9 points" in said.inner_text()
        page.get_by_label("Center the inputs").focus()
        page.keyboard.press("Space")
        assert "one side up, the other down" in said.inner_text()
        page.keyboard.press("Space")
        page.get_by_label("Leak", exact=True).focus()
        page.keyboard.press("End")
        assert "the leak brought it back" in said.inner_text()
        start = page.get_by_role("slider", name="Start of the unit")
        before = start.get_attribute("aria-valuetext")
        start.focus()
        page.keyboard.press("ArrowRight")
        assert start.get_attribute("aria-valuetext") != before
        assert not visit.errors


@pytest.mark.parametrize("viewport", [DESK, PHONE])
def test_no_words_touch_an_axis_of_the_plane(browser, address, viewport):
    touching = """svg => [...svg.querySelectorAll('text:not([opacity="0.00"])')].filter(words => {
        const box = words.getBBox();
        return [...svg.querySelectorAll('.rb-axis')].some(axis => {
            const [x1, x2, y1, y2] = ['x1', 'x2', 'y1', 'y2'].map(name => +axis.getAttribute(name));
            return box.width && box.x <= x2 && x1 <= box.x + box.width
                && box.y <= y2 && y1 <= box.y + box.height;
        });
    }).map(words => words.textContent)"""
    with Visit(browser, address, f"{FIRST}.html", viewport=viewport) as visit:
        figure = visit.page.locator("#explorable-kill-a-unit")
        plane = figure.locator("svg").nth(1)
        assert plane.evaluate(touching) == []
        figure.get_by_label("Center the inputs").check()
        plane.locator('.rb-safe[opacity="1.00"]').wait_for()
        assert plane.evaluate(touching) == []


@pytest.mark.parametrize(("name", "where"), SHOWN)
def test_every_control_has_a_name_and_only_the_sentence_speaks_up(browser, address, name, where):
    with Visit(browser, address, f"{where}.html") as visit:
        figure = visit.page.locator(f"#explorable-{name}")
        for label in figure.locator("label[for]").all_inner_texts():
            kind = figure.get_by_label(label, exact=True).evaluate("node => node.type")
            assert kind in ("range", "select-one")
        assert figure.locator("[role=status], [aria-live], output").count() == 1


def test_a_finger_drags_the_start(browser, address):
    with Visit(browser, address, f"{KILL}.html", viewport=PHONE, has_touch=True) as visit:
        page = visit.page
        start = page.get_by_role("slider", name="Start of the unit")
        start.scroll_into_view_if_needed()
        box = start.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        before = start.get_attribute("aria-valuetext")
        top = page.evaluate("scrollY")
        finger = visit.context.new_cdp_session(page)
        for kind, reached in [("Start", [0]), ("Move", range(15, 75, 15)), ("End", [])]:
            for way in reached or [None]:
                points = [] if way is None else [{"x": x - way, "y": y + way / 2}]
                finger.send(
                    "Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points}
                )
        assert start.get_attribute("aria-valuetext") != before
        assert page.evaluate("scrollY") == top
        action = page.evaluate("getComputedStyle(document.querySelector('.rb-start')).touchAction")
        assert action == "none"


def test_more_depth_never_revives(browser, address):
    with Visit(browser, address, f"{BORN}.html") as visit:
        page, counts = visit.page, []
        depth = page.get_by_label("Depth", exact=True)
        for value in (1, 2, 5, 10, 20, 30):
            depth.fill(str(value))
            counts.append(int(page.locator(".rb-chip").inner_text().split()[0]))
        assert counts == sorted(counts)
        assert counts[0] == 0
        assert counts[-1] > 6
        page.get_by_role("button", name="Draw 1,200").click()
        assert "of 1,212 dead" in page.locator(".rb-numbers").inner_text()


def test_a_reader_bends_the_line_closer(browser, address):
    with Visit(browser, address, f"{BEND}.html") as visit:
        page, said = visit.page, visit.page.locator("#explorable-bend-a-line [role=status]")
        assert said.inner_text().startswith("3 ReLUs, 4 pieces: at worst")

        def off():
            return float(re.search(r"it is ([\d.]+) away", said.inner_text())[1])

        before = off()
        for _ in range(7):
            page.get_by_role("button", name="Add one").click()
        assert said.inner_text().startswith("10 ReLUs, 11 pieces")
        assert off() < before / 3
        corner = page.get_by_role("slider", name="corner 1", exact=True)
        place = corner.get_attribute("aria-valuetext")
        corner.focus()
        page.keyboard.press("ArrowRight")
        assert corner.get_attribute("aria-valuetext") != place
        page.get_by_label("Built of", exact=True).select_option("a maximum of lines")
        assert said.inner_text().startswith("The largest of 10 lines, 10 pieces")
        page.get_by_label("Curve", exact=True).select_option("a wave")
        assert "only bends upwards" in said.inner_text()


@pytest.fixture
def alone(browser):
    """Open a figure on a bare page of some width and scheme, which needs no site."""
    opened = []

    def open_(name, width=900, scheme="light", **options):
        viewport = {"width": width, "height": 900}
        opened.append(browser.new_context(viewport=viewport, color_scheme=scheme, **options))
        page = opened[-1].new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        dark = "--pst-color-text-base:#ced6dd;--pst-color-text-muted:#9ca4af;background:#14181e;"
        dark += "--pst-color-background:#14181e;--pst-color-border:#48566b"
        page.set_content(
            f'<!doctype html><html lang="en" data-theme="{scheme}" '
            f'style="{dark if scheme == "dark" else ""}"><title>{name}</title>'
            f'<body style="margin:8px"><style>* {{box-sizing: border-box}}</style><main><h1>x</h1>'
            f'<figure class="rb-explorable" data-explorable="{name}"><div class="rb-stage"></div>'
            f'<script type="application/json">{explorables.data(name)}</script>'
            "<figcaption>A sentence.</figcaption></figure></main></body></html>"
        )
        page.add_style_tag(path=str(explorables.SCRIPTS.parent / "explorables.css"))
        for script in ("core", name):
            page.add_script_tag(path=str(explorables.SCRIPTS / f"{script}.js"))
        return page

    yield open_
    for context in opened:
        context.close()


LARGEST = "take-the-largest"


def test_a_reader_lifts_the_line_that_never_wins(alone):
    page = alone(LARGEST)
    said = page.get_by_role("status")
    assert said.inner_text() == (
        "Of 4 lines 3 win: the largest is at worst 0.111 from x²; with the best 4 lines 0.031. "
        "Line 4 never wins."
    )
    assert page.locator(".rb-lost").count() == 1
    assert page.locator(".rb-lost").evaluate("n => getComputedStyle(n).strokeDasharray") != "none"
    assert page.get_by_text("line 4 never wins", exact=True).count() == 1
    before = page.locator(".rb-unit").first.get_attribute("points")
    page.get_by_role("button", name="Remove line 4").click()  # the unit is the same without it
    after = page.locator(".rb-unit").first.get_attribute("points")
    assert set(after.split()) <= set(before.split())
    assert said.inner_text().startswith("Of 3 lines 3 win: the largest is at worst 0.111")
    page.get_by_role("button", name="Add a line").click()
    assert said.inner_text().startswith("Of 4 lines 4 win")
    page.get_by_role("button", name="Lay the best 4").click()
    assert said.inner_text() == (
        "Of 4 lines 4 win: the largest is at worst 0.031 from x²; with the best 4 lines 0.031."
    )
    assert page.errors == []


def test_a_line_moves_by_mouse_by_keys_and_by_its_sliders(alone):
    page = alone(LARGEST)
    said, line = page.get_by_role("status"), page.get_by_role("slider", name="line 4", exact=True)
    spot = line.bounding_box()
    x, y = spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 10, y - 60, steps=4)
    page.mouse.up()
    assert said.inner_text().startswith("Of 4 lines 4 win")
    place = line.get_attribute("aria-valuetext")
    assert "never wins" not in place
    for key in ("ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
        assert line.get_attribute("aria-valuetext") != place
        place = line.get_attribute("aria-valuetext")
    for _ in range(6):
        page.keyboard.press("Shift+ArrowDown")
    assert line.get_attribute("aria-valuetext").endswith("never wins")
    page.get_by_label("Line 4: lift").fill("0")
    assert said.inner_text().startswith("Of 4 lines 4 win")
    page.get_by_role("slider", name="line 1", exact=True).focus()
    page.get_by_label("Line 1: slope").fill("0.5")
    assert page.get_by_label("Line 1: slope").get_attribute("aria-valuetext") == "1.00"
    assert page.errors == []


def test_a_difference_of_two_maxima_bends_both_ways(alone):
    page = alone(LARGEST)
    said = page.get_by_role("status")

    def off():
        return float(re.search(r"at worst ([\d.]+) from the wave", said.inner_text())[1])

    page.get_by_label("Built of").select_option("a difference of two")
    assert said.inner_text().startswith("The largest of 4 lines minus the largest of 4: at worst")
    before = off()
    assert page.get_by_role("slider", name=re.compile("^(subtracted )?line")).count() == 8
    for _ in range(4):
        page.get_by_role("button", name="Add a line").click()
    assert page.get_by_role("button", name="Add a line").is_disabled()
    page.get_by_role("button", name="Spread evenly").click()
    assert off() < before / 2
    page.get_by_role("slider", name="subtracted line 2", exact=True).focus()
    for _ in range(2):  # its neighbors meet 1.8 / 4 ** 2 = 0.11 below where it touches
        page.keyboard.press("Shift+ArrowDown")
    assert "Subtracted line 2 never wins." in said.inner_text()
    page.get_by_label("Built of").select_option("one maximum")  # as it was left
    assert said.inner_text().endswith("Line 4 never wins.")
    assert page.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("mode", ["one maximum", "a difference of two"])
def test_lines_can_be_laid_on_a_small_phone(alone, mode, scheme):
    page = alone(LARGEST, 320, scheme, has_touch=True, reduced_motion="reduce")
    page.get_by_label("Built of").select_option(mode)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    for handle in page.locator(".rb-handle").all():
        assert handle.evaluate("n => getComputedStyle(n).touchAction") == "none"
        assert min(handle.bounding_box()[side] for side in ("width", "height")) >= 24
    page.touchscreen.tap(*[page.locator(".rb-handle").first.bounding_box()[k] + 12 for k in "xy"])
    assert page.get_by_label("Line 1: slope").count() == 1
    assert violations(page) == []


def test_the_map_answers_a_choice(browser, address):
    with Visit(browser, address, f"{MAP}.html") as visit:
        said = visit.page.locator(".rb-explorable [role=status]")
        assert said.inner_text().startswith("SGD at 0.56: as they come, ")
        visit.page.get_by_label("Optimizer", exact=True).select_option("Adam")
        visit.page.get_by_label("Learning rate", exact=True).fill("0")
        assert said.inner_text().startswith("Adam at 0.00056: as they come, ")
        dots = visit.page.locator(".rb-way-dots").evaluate_all(
            "all => all.map(p => p.getAttribute('d'))"
        )
        assert [path.count("M") for path in dots] == [18 * 40] * 4


@pytest.mark.parametrize("viewport", [PHONE, DESK])
def test_the_page_does_not_jump_when_the_script_arrives(browser, address, viewport):
    with Visit(browser, address, f"{KILL}.html", viewport=viewport) as visit:
        shift = visit.page.evaluate(
            """() => new Promise((done) => { let sum = 0;
                new PerformanceObserver((list) => { for (const e of list.getEntries())
                  if (e.sources.some((s) => s.node?.closest?.('.rb-explorable')))
                    sum += e.value; })
                  .observe({ type: 'layout-shift', buffered: true });
                setTimeout(() => done(sum), 300); })"""
        )
        assert shift < 0.1
