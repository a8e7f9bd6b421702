"""Draw the book's logo and favicon: an open book whose pages are a rectifier's two pieces."""

from pathlib import Path

STATIC = Path(__file__).resolve().parents[1] / "_static"
BLUE, VERMILION, WHITE = "#0072B2", "#D55E00", "#ffffff"


def mark(size: int) -> str:
    """Return the mark in a square of ``size`` units: a cover, a flat left page, a rising right."""
    unit = size / 16
    points = [(2, 11), (8, 11), (14, 4)]
    path = " ".join(f"{x * unit:g},{y * unit:g}" for x, y in points)
    return (
        f'<rect width="{size}" height="{size}" rx="{2.5 * unit:g}" fill="{BLUE}"/>'
        f'<path d="M{8 * unit:g} {2.5 * unit:g}V{13.5 * unit:g}" stroke="{WHITE}" '
        f'stroke-width="{0.5 * unit:g}" stroke-opacity=".6"/>'
        f'<polyline points="{path}" fill="none" stroke="{WHITE}" stroke-width="{1.7 * unit:g}" '
        'stroke-linecap="round" stroke-linejoin="round"/>'
        f'<circle cx="{8 * unit:g}" cy="{11 * unit:g}" r="{1.5 * unit:g}" fill="{VERMILION}" '
        f'stroke="{WHITE}" stroke-width="{0.5 * unit:g}"/>'
    )


def svg(width: int, height: int, content: str, title: str) -> str:
    """Wrap drawing commands into a document with a title for assistive technology."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img"><title>{title}</title>{content}</svg>\n'
    )


def main() -> None:
    """Write both files."""
    STATIC.mkdir(exist_ok=True)
    for name, size in (("logo.svg", 96), ("favicon.svg", 32)):
        (STATIC / name).write_text(svg(size, size, mark(size), "The ReLU Book"), encoding="utf-8")


if __name__ == "__main__":
    main()
