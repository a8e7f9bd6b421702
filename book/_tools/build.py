"""Build the site with warnings as errors; with --serve also serve it and rebuild on change.

Run by `make book` and `make serve`.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST_PAGE = ROOT / "_build" / "html" / "index.html"
WATCHED = ("book", "src", "_config.yml", "_toc.yml")
PORT = 8000


def build() -> int:
    """Build strictly and return the exit status."""
    program = shutil.which("jupyter-book", path=Path(sys.executable).parent)
    if program is None:
        sys.exit(f"jupyter-book is not installed beside {sys.executable}: run make book")
    command = [program, "build", "-W", "-n", "--keep-going", "-q", "."]
    index = FIRST_PAGE.with_name("searchindex.js")  # written whenever a page was
    if index.exists():  # Sphinx itself does not notice a changed style sheet or template
        built = index.stat().st_mtime
        looks = [p for name in ("_static", "_templates") for p in (ROOT / "book" / name).rglob("*")]
        if any(path.stat().st_mtime > built for path in looks):
            command.append("--all")
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:  # a page that is not read again would not repeat its warning
        shutil.rmtree(ROOT / "_build" / ".doctrees", ignore_errors=True)
    return status


def serve() -> None:
    """Serve the site on loopback; rebuild when a source changes; end with Ctrl-C."""
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    from watchfiles import watch

    def handler(*arguments: object) -> SimpleHTTPRequestHandler:
        return SimpleHTTPRequestHandler(*arguments, directory=str(FIRST_PAGE.parent))  # type: ignore[arg-type]

    try:
        server = ThreadingHTTPServer(("127.0.0.1", PORT), handler)
    except OSError as error:
        sys.exit(f"cannot serve on port {PORT}: {error.strerror}")
    Thread(target=server.serve_forever, daemon=True).start()
    print(f"serving on http://127.0.0.1:{PORT}, Ctrl-C ends", flush=True)
    for _ in watch(*(ROOT / name for name in WATCHED), raise_interrupt=False):
        build()
    server.shutdown()


def main() -> None:
    """Build, and serve if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if status := build():
        sys.exit(status)
    print(f"The book is built. Its first page: {FIRST_PAGE.as_uri()}")
    if options.serve:
        serve()


if __name__ == "__main__":
    main()
