"""How light the built site is, and what it does not wait for."""

import base64
import io
import re

import pytest
from fontTools.ttLib import TTFont

pytestmark = [pytest.mark.site, pytest.mark.slow, pytest.mark.xdist_group("site")]


def test_icons_are_a_small_style_with_a_glyph_for_each_icon_shown(site):
    style = (site / "_static" / "icons.css").read_text()
    assert len(style) < 15_000
    assert not (site / "_static" / "vendor" / "fontawesome").exists()
    glyphs = set()
    for font in re.findall(r"base64,([\w+/=]+)", style):
        glyphs |= TTFont(io.BytesIO(base64.b64decode(font))).getBestCmap().keys()
    codes = dict(re.findall(r'\.(fa-[\w-]+):before\{content:"\\(\w+)"', style))
    assert {int(code, 16) for code in codes.values()} <= glyphs
    kinds = {"fa-solid", "fa-brands", "fa-lg"}
    for page in site.rglob("*.html"):
        for classes in re.findall(r'<i class="([^"]*)"', page.read_text(encoding="utf-8")):
            shown = set(re.findall(r"fa-[\w-]+", classes))
            assert shown - kinds <= codes.keys(), page
            assert shown & {"fa-solid", "fa-brands"} or {"fas", "fab"} & set(classes.split())
