"""Plain text tables for the terminal and for ``summary.txt``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from vidreason.spelling import printable


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with the first column aligned left and the others right; a wide character takes two places.

    >>> print(render_table(["method", "acc"], [["rb_ft", "50.0"], ["zero_shot", "9.1"]]))
    method      acc
    ---------  ----
    rb_ft      50.0
    zero_shot   9.1
    >>> print(render_table(["class", "n"], [["走路", "12"], ["run", "3"]]))
    class   n
    -----  --
    走路   12
    run     3
    """
    header, *rows = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(cell_len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def blank(cell: str, width: int) -> str:
        return " " * (width - cell_len(cell))

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        right = [blank(cell, width) + cell for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join([first + blank(first, widths[0]), *right])

    return "\n".join(line(row).rstrip() for row in (header, ["-" * width for width in widths], *rows))


def percent(value: float | None) -> str:
    """Returns a share as a percentage with one decimal; a dash for None.

    >>> percent(0.5), percent(None)
    ('50.0', '-')
    """
    return "-" if value is None else f"{100 * value:.1f}"


def decimal(value: float | None) -> str:
    """Returns a number with three decimals; a dash for None."""
    return "-" if value is None else f"{value:.3f}"
