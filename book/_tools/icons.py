"""The icons of the site: a style sheet with the two dozen glyphs that its pages show.

The theme brings Font Awesome whole, 375 KB of fonts and styles a visit and 2.8 MB a site.  When the
pages are written, this draws from it what they name, as one small style with the fonts inside.
"""

import base64
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pydata_sphinx_theme
from fontTools import subset
from fontTools.ttLib import TTFont
from sphinx.application import Sphinx

STATIC = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static"
(AWESOME,) = (STATIC / "vendor" / "fontawesome").iterdir()
FONTS = {  # font file: the names by which styles ask for it, its weight, its classes
    "fa-solid-900.ttf": (("Font Awesome 6 Free", "Font Awesome 5 Free"), 900, ".fa-solid,.fas"),
    "fa-brands-400.ttf": (("Font Awesome 6 Brands",), 400, ".fa-brands,.fab"),
}
BASE = """\
/* Glyphs of Font Awesome Free 6 by @fontawesome, https://fontawesome.com/license/free
   (icons CC BY 4.0, fonts SIL OFL 1.1, code MIT), cut to what these pages show. */
:root{--fa-font-solid:normal 900 1em/1 "Font Awesome 6 Free";\
--fa-font-brands:normal 400 1em/1 "Font Awesome 6 Brands"}
.fa-lg{font-size:1.25em;line-height:.05em;vertical-align:-.075em}
"""


def codepoints() -> dict[str, str]:
    """Return the hexadecimal code point of every icon of the theme, by class."""
    style = (AWESOME / "css" / "all.min.css").read_text(encoding="utf-8")
    rules = re.findall(r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\(\w+)"\}', style)
    return {name: code for names, code in rules for name in re.findall(r"\.(fa-[\w-]+)", names)}


def named(pages: Path) -> tuple[dict[str, str], set[str]]:
    """Return the icons that pages and scripts name, and the code points that styles do."""
    known = codepoints()
    texts = [p.read_text(encoding="utf-8") for p in pages.rglob("*.html")]
    texts += [p.read_text(encoding="utf-8") for p in (pages / "_static" / "scripts").glob("*.js")]
    names = {name for text in texts for name in re.findall(r"\bfa-[a-z-]+", text)} & known.keys()
    styles = [p.read_text(encoding="utf-8") for p in (pages / "_static" / "styles").glob("*.css")]
    codes = {code for text in styles for code in re.findall(r'"\\(f[0-9a-f]{3})"', text)}
    return {name: known[name] for name in sorted(names)}, codes


def cut(path: Path, codes: set[str]) -> str:
    """Return a font with these glyphs alone, as the address that a style sheet may hold."""
    font = TTFont(path, recalcTimestamp=False)
    options = subset.Options(flavor="woff", hinting=False, desubroutinize=True, glyph_names=False)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[int(code, 16) for code in codes])
    subsetter.subset(font)
    font.flavor = "woff"
    file = io.BytesIO()
    font.save(file)
    return "data:font/woff;base64," + base64.b64encode(file.getvalue()).decode()


def style(pages: Path) -> str:
    """Return the style sheet of the icons that the pages show."""
    icons, codes = named(pages)
    lines = [BASE.rstrip()]
    for file, (families, weight, classes) in FONTS.items():
        source = cut(AWESOME / "webfonts" / file, {*icons.values(), *codes})
        lines += [
            f'@font-face{{font-family:"{family}";font-weight:{weight};src:url({source})}}'
            for family in families
        ]
        lines.append(
            f'{classes}{{font-family:"{families[0]}";font-weight:{weight};font-style:normal;'
            "line-height:1;display:inline-block;-webkit-font-smoothing:antialiased}"
        )
    lines += [f'.{name}:before{{content:"\\{code}"}}' for name, code in icons.items()]
    return "\n".join(lines) + "\n"


def write(app: Sphinx, exception: Exception | None) -> None:
    """Write the style sheet and drop the theme's copy of all icons."""
    if exception is None and app.builder.format == "html":
        out = Path(app.outdir)
        (out / "_static" / "icons.css").write_text(style(out), encoding="utf-8", newline="\n")
        shutil.rmtree(out / "_static" / "vendor" / "fontawesome", ignore_errors=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the step."""
    app.connect("build-finished", write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
