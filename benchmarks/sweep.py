"""What most questions ask: programs, in turn, at points along an axis; their table and plot.

A question is a list of points and of entries. At every point each entry's memory is measured in a
process of its own; then those that fit are timed in turn on the same inputs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fusedpo import losses
from fusedpo.benchmarks import options as asking
from fusedpo.benchmarks import plots
from fusedpo.benchmarks.measure import Advance, progress
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.peer_memory import full_logits, liger_pairs, trl_chunked
from fusedpo.benchmarks.peers import BASELINE, OURS, PEERS, step, why_not
from fusedpo.benchmarks.section import number
from fusedpo.benchmarks.section import table as table_of
from fusedpo.benchmarks.shapes import MIB, Case, Inputs, make_inputs
from fusedpo.benchmarks.timing import Clock, in_rounds, median, told
from fusedpo.benchmarks.worker import OutOfMemory, fresh_peak
from fusedpo.engine.plan import BudgetTooSmall
from fusedpo.footprint import Workload
from fusedpo.model_shapes import ModelShape
from fusedpo.sizes import DEFAULT_BUDGET, format_bytes

Size = int | Literal["least"] | None

_LOSSES = {"sspo": "soft_sequence"}
# seconds of a step beside which what the first one pays does not count
_LONG = 1.0
# so many times as long as the fastest
_HOPELESS = 2.0
_FORMULAS = {"full_logits": full_logits, "trl": trl_chunked, "liger": liger_pairs}


@dataclass(frozen=True)
class Entry:
    """A program, and what it is told.

    Attributes:
        label: its name in tables; None: the peer's.
        budget: bytes for a program that takes a budget; "least": the smallest it accepts.
    """

    peer: str
    label: str | None = None
    budget: Size = None

    @property
    def name(self) -> str:
        return self.label or PEERS[self.peer].label


def budgets(options: Options) -> tuple[int, int]:
    """A small one and a large one: with neither is a step of fusedpo slowed by small tiles."""
    return (16 * MIB, DEFAULT_BUDGET) if options.on_cpu else (DEFAULT_BUDGET, 8 * 1024 * MIB)


def others(options: Options) -> tuple[Entry, ...]:
    """Every program but this one; those that take a budget get the large one."""
    return tuple(
        Entry(name, budget=budgets(options)[1] if peer.budgeted else None)
        for name, peer in PEERS.items()
        if name != OURS
    )


def own(sizes: Sequence[int]) -> list[Entry]:
    """fusedpo with each of these budgets."""
    return [Entry(OURS, f"fusedpo, {format_bytes(size)}", size) for size in sizes]


def entries(options: Options) -> list[Entry]:
    """Every program, fusedpo with both budgets."""
    return [*others(options), *own(budgets(options))]


@dataclass(frozen=True)
class Point:
    """Where the entries are compared: a place on the axis of one panel."""

    group: str
    x: float
    case: Case


@dataclass
class Row:
    """An entry at a point; ``missing`` says why there is no number.

    alone: seconds of the step that memory was measured of.
    """

    group: str
    x: float
    entry: str
    case: Case
    seconds: tuple[float, ...] = ()
    extra: int | None = None
    products: float | None = None
    predicted: int | None = None
    loss: float | None = None
    alone: float = math.nan
    missing: str | None = None

    @property
    def median(self) -> float | None:
        return median(self.seconds)

    def drop(self, reason: str) -> None:
        """A reason in the place of the numbers."""
        self.missing, self.seconds, self.extra, self.products = reason, (), None, None

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "x": self.x,
            "entry": self.entry,
            "version": PEERS[self.case.peer].version,
            "case": self.case.to_json(),
            "seconds": [round(s, 6) for s in self.seconds],
            "median_seconds": self.median,
            "extra_bytes": self.extra,
            "products": self.products,
            "predicted_bytes": self.predicted,
            "loss": None if self.loss is None or math.isnan(self.loss) else self.loss,
            "missing": self.missing,
        }


@dataclass(frozen=True)
class Question(asking.Question):
    """One whose programs are compared at points.

    Attributes:
        axis: what x is.
        points: where it is asked.
        entries: which programs.
        unit: for x in tables.
        across: whether the plot has time over bytes, rather than either over x.
    """

    axis: str
    points: Callable[[Options], list[Point]]
    entries: Callable[[Options], Sequence[Entry]] = entries
    unit: str = ""
    across: bool = False

    def measured(self, options: Options) -> dict[str, Any]:
        here = self.rows(options)
        with progress(self.title, 2 * sum(map(len, here))) as advance:
            for rows in here:
                for row in rows:
                    advance(f"{row.group} {row.x:g}: memory of {row.entry}")
                    measure_memory(row, options.threads)
                compare(rows)
                self.time([row for row in rows if not row.missing], options, advance)
        return {
            "axis": self.axis,
            "unit": self.unit,
            "across": self.across,
            "rows": [row.to_json() for rows in here for row in rows],
        }

    def rows(self, options: Options) -> list[list[Row]]:
        """Of each point; what cannot be run says so already."""
        asked = [entry for entry in self.entries(options) if entry.peer in options.peers]
        return [[_row(point, entry) for entry in asked] for point in self.points(options)]

    def time(self, rows: Sequence[Row], options: Options, advance: Advance) -> None:
        """Rounds in turn, for as long as the point may take.

        The first one warms up, but counts for a program whose steps are long. Rounds go on with
        those that are within a factor of the fastest; what the others take is known well enough. A
        program that took long and was far behind when its memory was measured is not timed anew:
        that counts.
        """
        fastest = min((row.alone for row in rows if row.alone > 0), default=math.inf)
        for row in rows:
            if row.alone > max(_HOPELESS * fastest, 2 * _LONG) and row.case.peer != BASELINE:
                row.seconds = (row.alone,)
        rows = [row for row in rows if not row.seconds]
        if not rows:
            return
        clock, shared = Clock(options.device), make_inputs(rows[0].case)
        steps = {id(row): stepper(row.case, shared) for row in rows}

        def timed(row: Row, before: tuple[float, ...] = ()) -> None:
            try:
                row.seconds = (*before, clock.once(steps[id(row)]))
            except Exception as error:  # another library's failure is a line of the table
                row.missing, row.seconds = told(error), ()

        for row in rows:
            advance(f"{row.group} {row.x:g}: time of {row.entry}")
            if PEERS[row.case.peer].compiles:
                timed(row)
            timed(row)
        alive = [row for row in rows if row.seconds]
        fastest = min((row.seconds[0] for row in alive), default=0.0)
        if fastest > _LONG and sum(row.seconds[0] for row in alive) > options.seconds_a_point:
            return
        alive = [row for row in alive if row.seconds[0] < _HOPELESS * fastest]
        for row in alive:
            if row.seconds[0] < _LONG:
                row.seconds = ()
        for i in in_rounds(range(len(alive)), 15, options.seconds_a_point):
            if not alive[i].missing:
                timed(alive[i], alive[i].seconds)
        gc.collect()


def _row(point: Point, entry: Entry) -> Row:
    case = replace(point.case, peer=entry.peer)
    row = Row(point.group, point.x, entry.name, case)
    row.missing = why_not(case)
    if row.missing is None and PEERS[entry.peer].budgeted:
        row.case = replace(case, budget=_budget(case, entry.budget))
    if row.missing is None:
        row.predicted = predicted(row.case)
    return row


def _budget(case: Case, size: Size) -> int | None:
    if size != "least":
        return size
    try:
        workload(replace(case, budget=1)).plan()
    except BudgetTooSmall as error:
        return error.least
    raise AssertionError("no plan fits a byte")


def workload(case: Case) -> Workload:
    """The case as fusedpo's planner takes it."""
    prompt = case.masked_tokens
    return Workload(
        ModelShape(case.shape.hidden, case.shape.vocab),
        losses.get(_LOSSES.get(case.loss, case.loss)),
        tokens=case.shape.tokens - prompt,
        pairs=case.shape.pairs,
        context=prompt,
        dtype=case.torch_dtype,
        device=case.device,
        backend="torch" if case.device == "cpu" else "triton",
        frozen=case.frozen,
        budget=case.budget or DEFAULT_BUDGET,
        gradient_tolerance=case.tolerance,
    )


def predicted(case: Case) -> int | None:
    """Bytes beyond the gradients, by arithmetic; None where there is no formula."""
    if case.loss == "sft":
        return None
    if case.peer == OURS:
        return workload(case).plan().bytes
    formula = _FORMULAS.get(case.peer)
    found = formula(workload(case)) if formula else None
    return None if found is None else sum(found.values())


def measure_memory(row: Row, threads: int) -> None:
    """Of a step of its case."""
    if row.missing:
        return
    try:
        found = fresh_peak(row.case, threads)
    except OutOfMemory:
        row.missing = "out of memory"
    except RuntimeError as error:
        row.missing = str(error)
    else:
        row.extra, row.products, row.loss = found.extra, found.products, found.loss
        row.alone = found.seconds


def compare(rows: Sequence[Row]) -> None:
    """No numbers of what computes another loss than the first of the programs."""
    ran = [row for row in rows if row.loss is not None]
    for row in ran[1:]:
        expected, found = ran[0].loss or 0.0, row.loss or 0.0
        if not abs(found - expected) <= row.case.loss_tolerance * max(1.0, abs(expected)):
            row.drop(f"another loss: {found:.6f}, {ran[0].entry}: {expected:.6f}")


def stepper(case: Case, shared: Inputs) -> Callable[[], object]:
    inputs = shared.for_case(case)

    def run() -> None:
        step(case, inputs)
        # freed in the timed part by every program alike, so that none leaves memory for the next
        inputs.hidden.grad = inputs.weight.grad = None

    return run


# what is shown of it


def ratio(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of its time to the baseline's at the same point."""
    for other in rows:
        same = (other["group"], other["x"]) == (row["group"], row["x"])
        if same and other["case"]["peer"] == BASELINE and other["median_seconds"]:
            seconds: float | None = row["median_seconds"]
            return seconds / other["median_seconds"] if seconds else None
    return None


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words; without programs that could not be run at all."""
    absent, rows = dict(missing_everywhere(answer)), answer["rows"]
    return table_of(
        [row for row in rows if row["entry"] not in absent],
        ("", "group"),
        (answer["axis"], lambda row: f"{row['x']:g}{answer['unit']}"),
        ("program", "entry"),
        ("ms", ("median_seconds", 1e3, 0)),
        ("x full logits", lambda row: number(ratio(row, rows))),
        ("extra MiB", ("extra_bytes", 1 / MIB, 1)),
        ("products", ("products", 1, 1)),
        ("", "missing"),
    )


def plot(answer: dict[str, Any]) -> Any:
    return plots.sweep(answer)


def missing_everywhere(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """(program, reason) of those without a number at any point."""
    found = []
    rows = [row for row in answer["rows"] if "entry" in row]
    for entry in dict.fromkeys(row["entry"] for row in rows):
        here = [row for row in rows if row["entry"] == entry]
        if all(row["missing"] and row.get("extra_bytes") is None for row in here):
            reasons = dict.fromkeys(row["missing"] for row in here)
            found.append((entry, "; ".join(reasons)))
    return found
