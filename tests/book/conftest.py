"""A small chapter with its evidence, run once, to break one thing in it; the site in a browser."""

import functools
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import notebooks
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

MODEL = Path(__file__).with_name("model")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Return a folder with the model chapter, executed, and the text of its evidence."""
    folder = tmp_path_factory.mktemp("model") / "book"
    shutil.copytree(MODEL, folder)
    notebooks.refresh(folder / "toy.md")
    return folder


@pytest.fixture
def pair(model, tmp_path) -> Path:
    """Return the text of a copy of the model chapter; its evidence lies beside it."""
    shutil.copytree(model, tmp_path / "book")
    return tmp_path / "book" / "toy.md"


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Build the site from nothing, with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    program = shutil.which("jupyter-book", path=str(Path(sys.executable).parent))
    command = [program, "build", "-W", "-n", "--keep-going", "--path-output", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"the strict build failed:\n{result.stdout}\n{result.stderr}"
    assert "WARNING" not in result.stdout + result.stderr
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        message = "no Chromium on this machine: install the package chromium to test the site"
        if os.environ.get("RELUBOOK_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
