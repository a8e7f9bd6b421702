"""A page of the built site, opened in a real browser."""

from urllib.parse import urlparse

from axe_playwright_python.sync_playwright import Axe

PHONE = {"width": 375, "height": 812}
DESK = {"width": 1280, "height": 900}


class Visit:
    """One page opened in a fresh context, with all that it asked for and complained about."""

    def __init__(self, browser, address, path, *, viewport=None, scheme="light", **options):
        self.context = browser.new_context(
            viewport=viewport or DESK, color_scheme=scheme, **options
        )
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.failed: list[str] = []
        self.loaded: set[str] = set()
        self.host = urlparse(address).netloc
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("response", self._response)
        self.page.route("**/*", self._route)
        self.page.goto(f"{address}/{path}")
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_function(
            "!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)"
        )

    def load_all(self):
        """Load the images and set the formulas that wait for a reader to come near."""
        self.page.evaluate(
            """async () => {
                const late = [...document.querySelectorAll('img[loading=lazy]')];
                for (const image of late) image.loading = 'eager';
                await Promise.all(late.map(image => image.decode().catch(() => {})));
                await window.MathJax?.startup?.document.lazyTypesetAll?.();
            }"""
        )
        self.page.wait_for_load_state("networkidle")

    def _route(self, route):
        url = urlparse(route.request.url)
        if url.scheme in ("data", "blob") or url.netloc == self.host:
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()

    def _response(self, response):
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url}")
        else:
            self.loaded.add(urlparse(response.url).path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


def violations(page):
    """Return what axe finds serious or critical."""
    return [
        f"{v['id']}: {n['html'][:120]} {n['any'][0]['message'] if n['any'] else ''}"
        for v in Axe().run(page).response["violations"]
        if v["impact"] in ("serious", "critical")
        for n in v["nodes"]
    ]
