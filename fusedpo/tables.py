"""Tables on a terminal: with rich, which is for the eye only, or as plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

# a file or a pipe has no width of its own, and a table cut to 80 columns hides its numbers
_WIDTH_OF_A_FILE = 160


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    stream: TextIO | None = None,
    styles: Mapping[str, str] | None = None,
) -> None:
    """Print a table: words to the left, numbers to the right.

    Args:
        columns: names; if none of them has a letter there is no such line.
        stream: stdout, if not given.
        styles: rich's style of cells that read so.
    """
    rows, stream = [list(row) for row in rows], stream or sys.stdout
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except Exception:  # not installed, or broken
        print("\n".join([title, *plain(columns, rows)]), file=stream)
        return
    table = Table(show_header=any(columns), pad_edge=False)
    for i, column in enumerate(columns):
        right = are_numbers(row[i] for row in rows)
        table.add_column(Text(column), justify="right" if right else "left")
    for row in rows:
        # as text: square brackets are no markup
        table.add_row(*(Text(cell, (styles or {}).get(cell, "")) for cell in row))
    console = Console(file=stream, highlight=False)
    console.width = console.width if console.is_terminal else _WIDTH_OF_A_FILE
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(table)


def are_numbers(cells: Iterable[str]) -> bool:
    """Whether a column is to stand to the right."""
    return all(not cell or cell == "-" or cell.lstrip("-")[0].isdigit() for cell in cells)


def plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Lines of a table, without its title."""
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    right = [are_numbers(row[i] for row in rows) for i in range(len(columns))]
    for line in lines if any(columns) else rows:
        cells = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, right, strict=True)
        )
        yield "  ".join(cells).rstrip()
