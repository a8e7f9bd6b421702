"""What every report on a model shares: its sites by name, and a plain table of them."""

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The site's name."""


S = TypeVar("S", bound=Named)


class SiteListing(Generic[S]):
    """Sites in execution order, each to be had by its name.

    Attributes:
        sites: The sites.
    """

    sites: Sequence[S]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[S]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return any(site.name == name for site in self.sites)

    def __getitem__(self, name: str) -> S:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"no site {name!r}; the sites are {', '.join(s.name for s in self.sites)}")


def plain_table(rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Lay out a table in aligned columns.

    Args:
        rows: The header and the rows, all of one length.
        words: How many of the first columns hold words, set flush left; the others hold numbers.

    Returns:
        One line a row, with a rule below the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines
