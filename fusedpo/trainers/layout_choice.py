"""Which layout a dataset has, by its columns or by those that a person names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusedpo.checks import bad_choice, bad_value
from fusedpo.data.reading import Splits
from fusedpo.data.rows import OF_TEMPLATE
from fusedpo.trainers.layouts import LAYOUTS, Layout, Row, kind_of


def read_rows(
    splits: Splits, kind: str, columns: Mapping[str, str] | None = None, numbers: Iterable[str] = ()
) -> tuple[Splits, str]:
    """Rows of a dataset in the columns of a kind, and a line that says what they were taken for.

    The rows to train on decide the layout, all of them; those held out are read by the same, and
    decide it where there are no others.

    Args:
        splits: as the dataset has them.
        kind: PAIRS, RESPONSES or CONTEXTS, whichever is to be trained on.
        columns: by the name that a layout has for a column, the dataset's own name; "" leaves the
            column out.
        numbers: further columns that the loss takes, which may be renamed too.

    Raises:
        ValueError, TypeError: if no layout fits or more than one, for rows of another kind, for an
            unknown column, and for a row that is not of the layout, with its place.
    """
    parts: list[list[Row]] = [list(splits.train), list(splits.held_out or ())]
    if columns:
        check_columns(columns, _samples(parts[0] or parts[1]), numbers)
        parts = [[_renamed(row, columns) for row in part] for part in parts]
    decisive = parts[0] or parts[1]
    layout = _find(decisive, splits, kind)
    train, held_out = (
        [layout.row(row, splits.where(i)) for i, row in enumerate(part)] for part in parts
    )
    samples = _samples(decisive)
    names = [name for name in layout.reads if name in samples]
    line = f"layout: {layout.name}, of {_listed(samples, names)}"
    if others := [name for name in samples if name not in names]:
        line += f"; further columns: {', '.join(others)}"
    held = None if splits.held_out is None else held_out
    return replace(splits, train=train, held_out=held), line


def parse_columns(text: str) -> dict[str, str]:
    """``NAME=COLUMN,...`` of a command line, as :func:`read_rows` takes it.

    Raises:
        ValueError: for anything else, and for a NAME that is given twice.
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not name or not equals or name in columns:
            expected = "NAME=COLUMN,... with each NAME once"
            remedy = "such as prompt=question,chosen=yes,rejected=no; NAME= leaves NAME out"
            raise bad_value("columns", expected, repr(text), remedy)
        columns[name] = column
    return columns


def check_columns(
    columns: Mapping[str, str], present: Iterable[str], numbers: Iterable[str] = ()
) -> None:
    """Refuse a column that the dataset does not have, and a name that nothing reads.

    Raises:
        ValueError: naming it, and what there is.
    """
    known = dict.fromkeys((*(n for each in LAYOUTS for n in each.reads), *OF_TEMPLATE, *numbers))
    for name, column in columns.items():
        if (column or name) not in present:
            raise bad_choice(f"columns, {name}", column or name, present)
        if column and name not in known:
            raise bad_choice("columns", name, known)


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    taken = {name: column for name, column in columns.items() if column}
    gone = {*columns, *taken.values()}
    kept = {name: value for name, value in row.items() if name not in gone}
    return kept | {name: row[column] for name, column in taken.items() if column in row}


# which layout


def _find(rows: Sequence[Row], splits: Splits, kind: str) -> Layout:
    """The one layout of the kind that rows are of."""
    first: dict[Layout, int] = {}
    for i, row in enumerate(rows):
        for layout in LAYOUTS:
            if layout not in first and layout.fits(row):
                first[layout] = i
    fitting = [layout for layout in first if layout.kind == kind]
    if len(fitting) == 1:
        return fitting[0]
    dataset, samples = f"dataset {splits.name}", _samples(rows)
    if fitting:
        got = " and ".join(
            f"{each.name} ({each.about}; {splits.unit} {first[each] + 1})" for each in fitting
        )
        told = f"; of the columns {_listed(samples)}"
        raise bad_value(dataset, "rows of one layout", got + told, _apart(fitting, samples))
    if first:
        got = f"{' or '.join(f'{each.name} ({each.about})' for each in first)} rows, which are "
        remedy = "take a loss that is trained on such rows, or other rows"
        raise bad_value(dataset, kind, got + next(iter(first)).kind, remedy)
    layouts = [layout for layout in LAYOUTS if layout.kind == kind]
    known = "; ".join(f"{each.about} ({each.name})" for each in layouts)
    listed = _listed(samples) or "none"
    raise bad_value(dataset, f"the columns of a layout: {known}", listed, _named(samples, layouts))


def _apart(fitting: Sequence[Layout], samples: Row) -> str:
    """What makes rows of several layouts rows of one."""
    only = {
        name: None
        for layout in fitting
        for name in layout.reads
        if name in samples and not all(name in each.reads for each in fitting)
    }
    leave = " or ".join(f"--columns {name}=" for name in only)
    return f"leave a column out with {leave}, or keep each layout in a dataset of its own"


def _named(samples: Row, layouts: Sequence[Layout]) -> str:
    """How to name the columns of the first layout that the dataset has under other names."""
    missing = [name for name in layouts[0].reads if name not in samples]
    if not missing:
        return "each row needs all columns of its layout"
    near = {name: difflib.get_close_matches(name, samples, n=1) for name in missing}
    pairs = (f"{name}={(near[name] or ['COLUMN'])[0]}" for name in missing)
    return f"if they have other names, say so: --columns {','.join(pairs)}"


def _samples(rows: Iterable[Row]) -> dict[str, Any]:
    """By column, the first value that is not null."""
    samples: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                samples.setdefault(name, value)
    return samples


def _listed(samples: Row, names: Iterable[str] | None = None) -> str:
    return ", ".join(f"{name} ({kind_of(samples[name])})" for name in names or samples)
