"""Kernels and routes at one shape each: the setting, what was found there, and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TextIO, TypeVar

from fusedpo import tables
from fusedpo.benchmarks import measure
from fusedpo.benchmarks import options as asking
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.shapes import GPU, Case, Shape, head_of
from fusedpo.benchmarks.timing import Clock, Deadline, told
from fusedpo.engine.cost import Backend

T = TypeVar("T")
Cell = str | tuple[str, float, int] | Callable[[Mapping[str, Any]], str]
"""How a column reads a row: a key of words; a number's key, factor and digits; or a function."""


@dataclass(frozen=True)
class Setting:
    """Where and what to measure.

    Attributes:
        clock: of the device.
        case: its shape, dtype and device.
        rounds: interleaved rounds, if there is time.
        calls: launches of a small kernel that are timed together.
    """

    clock: Clock
    case: Case
    rounds: int
    calls: int

    @property
    def cuda(self) -> bool:
        return self.clock.cuda

    @property
    def backend(self) -> Backend:
        """The kernels on a GPU, and elsewhere PyTorch's definitions of them."""
        return "triton" if self.cuda else "torch"


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

    @property
    def word(self) -> str:
        return {None: "not measured", True: "met", False: "MISSED"}[self.met]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Verdict:
        return cls(*(values[name] for name in ("what", "measured", "at_most", "at_least")))


@dataclass
class Section:
    """What was measured at a shape.

    Attributes:
        ran_out: what there was no time or no memory for.
        wrong: what failed, or computed something else than it should.
    """

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
            self.failed(name, told(error))

    def failed(self, name: object, why: str) -> None:
        """Of a GPU that is too small nothing is wrong."""
        small = why.startswith("OutOfMemoryError")
        (self.ran_out if small else self.wrong).append(f"{name}: {why}")


@dataclass(frozen=True)
class Question(asking.Question):
    """One of kernels or routes instead of programs.

    Attributes:
        measure: what is measured at a shape.
    """

    measure: Callable[[Setting, Deadline], Section]

    def measured(self, options: Options) -> dict[str, Any]:
        answer: dict[str, Any] = {key: [] for key in ("rows", "ran_out", "wrong", "targets")}
        wanted = options.shapes or _usual_shapes(options)
        with measure.progress(self.title, len(wanted)) as advance:
            for shape in wanted:
                advance(str(shape))
                setting = Setting(
                    Clock(options.device),
                    options.case(shape),
                    rounds=3 if options.quick else 15,
                    calls=4 if options.on_cpu else 16,
                )
                found = self.measure(setting, Deadline(options.seconds_a_point))
                answer["rows"] += [{"shape": str(shape), **row} for row in found.rows]
                answer["ran_out"] += found.ran_out
                answer["wrong"] += found.wrong
                answer["targets"] += [verdict.to_json() for verdict in found.verdicts]
        return answer


def _usual_shapes(options: Options) -> Sequence[Shape]:
    if options.on_cpu:
        return (head_of("pythia-70m", 512 if options.quick else 1024),)
    return (replace(GPU, tokens=256) if options.quick else GPU,)


def table(
    rows: Sequence[Mapping[str, Any]], *columns: tuple[str, Cell]
) -> tuple[list[str], list[list[str]]]:
    """Headings, and cells in words."""
    lines = [[_cell(read, row) for _, read in columns] for row in rows]
    return [heading for heading, _ in columns], lines


def by_shape(
    answer: Mapping[str, Any], *columns: tuple[str, Cell]
) -> tuple[list[str], list[list[str]]]:
    """The same, with the shapes where there are several."""
    several = len({row["shape"] for row in answer["rows"]}) > 1
    return table(answer["rows"], *([("at", "shape")] if several else []), *columns)


def remarks(answer: Mapping[str, Any]) -> list[str]:
    """What is wrong, and what there was no time or memory for."""
    wrong = [f"WRONG: {what}." for what in answer["wrong"]]
    return wrong + [f"No time or memory was left for {what}." for what in answer["ran_out"]]


def _cell(read: Cell, row: Mapping[str, Any]) -> str:
    if isinstance(read, str):
        return "" if row.get(read) is None else str(row[read])
    if isinstance(read, tuple):
        key, factor, digits = read
        return number(row.get(key), factor, digits)
    return read(row)


def show_targets(
    verdicts: Iterable[Verdict], title: str = "targets", stream: TextIO | None = None
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
        lines.append([verdict.what, shown, " and ".join(limits), verdict.word])
    tables.show(title, ("target", "measured", "asked for", ""), lines, stream)


def number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    """For a table; a dash for what was not measured."""
    return "-" if value is None else f"{factor * value:.{digits}f}"


def quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
