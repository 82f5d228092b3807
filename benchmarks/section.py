"""What the sections of benchmarks/gpu.py share: their setting, and the form of their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO, TypeVar

import torch

from fusedpo import tables
from fusedpo.benchmarks.shapes import Shape
from fusedpo.benchmarks.timing import Clock, Deadline, told

T = TypeVar("T")
Cell = str | tuple[str, float, int] | Callable[[Mapping[str, Any]], str]
"""How a column reads a row: a key of words; a number's key, factor and digits; or a function."""


@dataclass(frozen=True)
class Setting:
    """Where and what to measure.

    Attributes:
        clock: of the device.
        shape: of all sections but the one about shapes.
        dtype: of hidden states and head.
        rounds: interleaved rounds of a section, if there is time.
        calls: launches of a small kernel that are timed together.
        rows: N of the section about shapes, at the shape's vocabulary.
        vocabularies: V of that section, at the shape's N.
        peers: names in benchmarks/peers.py.
        tail: pairs and tokens a sequence of the section about the tail.
        dry: whether only the code is tried, and no number means anything.
    """

    clock: Clock
    shape: Shape
    dtype: torch.dtype
    rounds: int
    calls: int
    rows: tuple[int, ...] = ()
    vocabularies: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    tail: tuple[int, int] = (32, 512)
    dry: bool = False

    @property
    def device(self) -> str:
        return str(self.clock.device)

    @property
    def cuda(self) -> bool:
        return self.clock.cuda

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Verdict:
    """A target, and what was measured of it; None: it was not."""

    what: str
    measured: float | None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        # NaN meets nothing
        low = self.at_most is None or self.measured <= self.at_most
        return low and (self.at_least is None or self.measured >= self.at_least)

    def word(self, *, dry: bool) -> str:
        if self.met is None:
            return "not measured"
        return "dry run" if dry else "met" if self.met else "MISSED"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass
class Section:
    """The answer of a section: what was measured, as numbers and as a table.

    Attributes:
        columns: of the table, by their headings.
        ran_out: what there was no time for.
        wrong: what failed, or computed something else than it should.
    """

    title: str
    columns: Mapping[str, Cell]
    rows: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    ran_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def in_time(self, items: Iterable[T], deadline: Deadline) -> Iterator[T]:
        """Those that there is time for; the others are named in ``ran_out``."""
        for item in items:
            if deadline.over:
                self.ran_out.append(str(item))
            else:
                yield item

    @contextmanager
    def attempt(self, name: object) -> Iterator[None]:
        """What fails in here is wrong, and the end of nothing else."""
        try:
            yield
        except Exception as error:
            self.wrong.append(f"{name}: {told(error)}")

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": self.rows,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "ran_out": self.ran_out,
            "wrong": self.wrong,
        }

    def show(self, *, dry: bool) -> None:
        tables.show(self.title, list(self.columns), cells(self.columns, self.rows))
        if self.verdicts:
            show_targets(self.verdicts, dry=dry)
        if self.ran_out:
            print(f"no time was left for: {', '.join(self.ran_out)}")
        for what in self.wrong:
            print(f"WRONG: {what}")


def cells(columns: Mapping[str, Cell], rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A table's cells in words."""
    return [[_cell(read, row) for read in columns.values()] for row in rows]


def _cell(read: Cell, row: Mapping[str, Any]) -> str:
    if isinstance(read, str):
        return "" if row.get(read) is None else str(row[read])
    if isinstance(read, tuple):
        key, factor, digits = read
        return number(row.get(key), factor, digits)
    return read(row)


def show_targets(
    verdicts: Sequence[Verdict],
    title: str = "targets",
    stream: TextIO | None = None,
    *,
    dry: bool = False,
) -> None:
    """A table of what was asked for: met, or missed."""
    lines = []
    for verdict in verdicts:
        limits = [
            *([f"<= {verdict.at_most:g}"] if verdict.at_most is not None else []),
            *([f">= {verdict.at_least:g}"] if verdict.at_least is not None else []),
        ]
        measured = verdict.measured
        small = measured is not None and 0 < measured < 0.01
        shown = f"{measured:.1e}" if small else number(measured, 1, 3)
        lines.append([verdict.what, shown, " and ".join(limits), verdict.word(dry=dry)])
    tables.show(title, ("target", "measured", "asked for", ""), lines, stream)


def number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    """For a table; a dash for what was not measured."""
    return "-" if value is None else f"{factor * value:.{digits}f}"


def quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
