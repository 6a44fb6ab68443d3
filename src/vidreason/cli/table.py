"""Plain text tables for the terminal and for ``summary.txt``."""

from __future__ import annotations

from collections.abc import Sequence


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns: the first to the left, the others to the right.

    >>> print(render_table(["method", "acc"], [["rb_ft", "50.0"], ["zero_shot", "9.1"]]))
    method      acc
    ---------  ----
    rb_ft      50.0
    zero_shot   9.1
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])

    return "\n".join(line(row).rstrip() for row in (header, ["-" * width for width in widths], *rows))


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal; a dash where there is none.

    >>> percent(0.5), percent(None)
    ('50.0', '-')
    """
    return "-" if value is None else f"{100 * value:.1f}"


def decimal(value: float | None) -> str:
    """A number with three decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
