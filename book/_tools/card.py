"""Draw the card that stands for the book where its address is shared: `make stills`."""

import shutil
import sys

import explorables

SIZE = {"width": 1200, "height": 630}
CARD = explorables.BOOK / "_static" / "card.png"
PAGE = """<!doctype html><html data-theme="light"><style>
body {{ margin: 0; padding: 48px 60px; font: 30px/1.35 "DejaVu Sans", sans-serif; color: #222832;
  background: #fff; border-top: 14px solid #0072b2; height: 520px; }}
h1 {{ font-size: 64px; margin: 0 0 8px; }} p {{ margin: 0 0 18px; max-width: 34em; }}
.rb-explorable.rb-explorable {{ border: 0; padding: 0; margin: 0; }}
.rb-panels.rb-panels {{ display: flex; gap: 40px; justify-content: center; }}
.rb-panels > * {{ flex: 0 1 auto; }} .rb-panels svg {{ width: 510px; height: auto; }}
.rb-panels :not(svg, svg *, .rb-panel, :has(svg)) {{ display: none; }}
</style><style>{style}</style><body><h1>The ReLU Book</h1>
<p>Why it works, how its units die, and what saves them: 5 notes, put on trial by experiment.</p>
<div class="rb-explorable">{still}</div></body></html>"""


def main() -> None:
    """Draw the card."""
    from playwright.sync_api import sync_playwright

    page_text = PAGE.format(
        style=(explorables.BOOK / "_static" / "explorables.css").read_text(encoding="utf-8"),
        still=(explorables.SCRIPTS / "kill-a-unit.html").read_text(encoding="utf-8"),
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=SIZE)
        page.set_content(page_text)
        page.screenshot(path=CARD)
        browser.close()
    print(CARD.name)


if __name__ == "__main__":
    sys.exit(main())
