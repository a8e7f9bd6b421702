"""The page that a report of `diagnose` writes, in a real browser."""

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from torch import nn

import relubook as rb

pytestmark = [pytest.mark.site, pytest.mark.slow, pytest.mark.xdist_group("site")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_without_javascript(browser, tmp_path, scheme):
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        model[0].bias[:40] = -100
    path = tmp_path / "report.html"
    rb.diagnose(model, torch.randn(50, 3)).write_html(path)
    requests = []
    options = {"color_scheme": scheme, "viewport": {"width": 375, "height": 700}}
    visit = browser.new_page(**options)
    visit.on("request", lambda request: requests.append(request.url))
    visit.goto(path.as_uri())
    assert requests == [path.as_uri()]
    assert Axe().run(visit).response["violations"] == []
    assert visit.evaluate("document.documentElement.scrollWidth") == 375
    visit.close()
    plain = browser.new_page(java_script_enabled=False, **options)
    plain.goto(path.as_uri())
    plain.click("summary >> nth=0")
    assert plain.locator("details[open] li").count() > 1
    plain.close()
