"""What most questions share: programs, in turn, at points along an axis; a table, a plot, a file.

A question is a list of points and of entries. At every point each entry's memory is measured in a
process of its own; then those that fit are timed in turn on the same inputs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import torch

from fusedpo import losses, tables
from fusedpo.benchmarks import measure
from fusedpo.benchmarks.formulas import FORMULAS
from fusedpo.benchmarks.peers import BASELINE, OURS, PEERS, step, why_not
from fusedpo.benchmarks.shapes import MIB, TINY, Case, Inputs, Shape, make_inputs
from fusedpo.benchmarks.worker import OutOfMemory, fresh_peak, told
from fusedpo.engine.plan import BudgetTooSmall
from fusedpo.footprint import ModelShape, Workload, full_logits, liger_pairs, trl_chunked
from fusedpo.sizes import format_bytes, parse_budget

Size = int | Literal["least"] | None

_LOSSES = {name: name for name in FORMULAS} | {"sspo": "soft_sequence"}
_FORMULAS = {"full_logits": full_logits, "trl": trl_chunked, "liger": liger_pairs}


@dataclass(frozen=True)
class Options:
    """How a question is asked.

    Attributes:
        device: where.
        quick: the small version.
        output: folder of results and plots.
        shapes: in place of the question's own; None: those.
        losses, peers: names, of those that the question has.
        dtype: None: fp32 on the CPU, bf16 elsewhere.
        threads: of the CPU.
        seconds: for timing at each point; a round is measured in any case.
        print_json: the answer on stdout, tables on stderr.
        memory: bytes, for the longest training that fits; None: as the question has it.
    """

    device: str = "cpu"
    quick: bool = False
    output: Path = Path("build/bench")
    shapes: tuple[Shape, ...] | None = None
    losses: tuple[str, ...] | None = None
    peers: tuple[str, ...] = tuple(PEERS)
    dtype: str | None = None
    threads: int = 2
    seconds: float | None = None
    print_json: bool = False
    memory: int | None = None

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def dtype_name(self) -> str:
        return self.dtype or ("float32" if self.on_cpu else "bfloat16")

    @property
    def seconds_a_point(self) -> float:
        return self.seconds or (15.0 if self.quick else 60.0)

    def of(self, losses: Sequence[str]) -> list[str]:
        """The losses of a question that were asked for."""
        return [name for name in losses if self.losses is None or name in self.losses]

    def case(self, shape: Shape, **values: Any) -> Case:
        return Case(BASELINE, shape, self.dtype_name, self.device, **values)


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


DEFAULT_BUDGET = parse_budget(None)


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


def entries(options: Options) -> tuple[Entry, ...]:
    """Every program, fusedpo with both budgets."""
    return (
        *others(options),
        *(Entry(OURS, f"fusedpo, {format_bytes(size)}", size) for size in budgets(options)),
    )


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
        return measure.Timing(self.seconds).median if self.seconds else None

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
class Question:
    """One of the benchmarks.

    Attributes:
        name: of its answer in the results, and of its plot.
        title: the question.
        axis: what x is.
        points: where it is asked.
        entries: which programs.
        unit: for x in tables.
        across: whether the plot has time over bytes, rather than either over x.
    """

    name: str
    title: str
    axis: str
    points: Callable[[Options], list[Point]]
    entries: Callable[[Options], Sequence[Entry]] = entries
    unit: str = ""
    across: bool = False

    def ask(self, options: Options) -> dict[str, Any]:
        """Measure everything, and return what is to be saved."""
        about = measure.machine(options.device, options.threads)
        wanted = [e for e in self.entries(options) if e.peer in options.peers]
        points = self.points(options)
        rows: list[Row] = []
        reasons: dict[tuple[Any, ...], str | None] = {}
        steps = 2 * len(wanted) * len(points)
        with progress(self.title, steps) as advance:
            for point in points:
                here = [_row(point, entry, reasons) for entry in wanted]
                for row in here:
                    advance(f"{row.group} {row.x:g}: memory of {row.entry}")
                    measure_memory(row, options.threads)
                compare(here)
                _time([row for row in here if not row.missing], options, advance)
                rows += here
        return {
            "question": self.name,
            "title": self.title,
            "axis": self.axis,
            "unit": self.unit,
            "across": self.across,
            "machine": about,
            "quick": options.quick,
            "rows": [row.to_json() for row in rows],
        }


def _row(point: Point, entry: Entry, reasons: dict[tuple[Any, ...], str | None]) -> Row:
    case = replace(point.case, peer=entry.peer)
    tried = replace(case.at(TINY), budget=None)
    if tried not in reasons:
        reasons[tried] = why_not(tried)  # type: ignore[index]
    row = Row(point.group, point.x, entry.name, case, missing=reasons[tried])  # type: ignore[index]
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
        losses.get(_LOSSES[case.loss]),
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
    if row.missing:
        return
    try:
        peak = fresh_peak(row.case, threads)
    except OutOfMemory as error:
        row.missing = str(error)
    except RuntimeError as error:
        row.missing = str(error)
    else:
        row.extra, row.products, row.loss = peak.extra, peak.products, peak.loss
        row.alone = peak.seconds


def compare(rows: Sequence[Row]) -> None:
    """No numbers of what computes another loss than full logits do."""
    truth = next((row.loss for row in rows if row.case.peer == BASELINE), None)
    if truth is None:
        return
    for row in rows:
        # log-probabilities from half-precision logits add up to this much in a long response
        allowed = 1e-3 if row.case.dtype == "float32" else 0.1
        if row.loss is not None and not abs(row.loss - truth) <= allowed * max(1.0, abs(truth)):
            row.missing = f"computes another loss: {row.loss:.6g}, not {truth:.6g}"
            row.extra = row.products = None


def _time(rows: Sequence[Row], options: Options, advance: Callable[[str], None]) -> None:
    """Rounds in turn, for as long as the point may take.

    The first one warms up, but counts for a program whose steps are long. Rounds go on with those
    that are within a factor of the fastest; what the others take is known well enough. A program
    that took long and was far behind when its memory was measured is not timed anew: that counts.
    """
    fastest = min((row.alone for row in rows if row.alone > 0), default=math.inf)
    for row in rows:
        if row.alone > max(_HOPELESS * fastest, 2 * _LONG) and row.case.peer != BASELINE:
            row.seconds = (row.alone,)
    rows = [row for row in rows if not row.seconds]
    if not rows:
        return
    shared, longest = make_inputs(rows[0].case), options.seconds_a_point
    steps = {id(row): stepper(row.case, shared) for row in rows}
    for row in rows:
        advance(f"{row.group} {row.x:g}: time of {row.entry}")
        try:
            if PEERS[row.case.peer].compiles:
                steps[id(row)]()
            row.seconds = (measure.timed(steps[id(row)], options.device),)
        except Exception as error:
            row.missing = told(error)
    alive = [row for row in rows if row.seconds]
    fastest = min((row.seconds[0] for row in alive), default=0.0)
    alive = [row for row in alive if row.seconds[0] < _HOPELESS * fastest]
    if fastest > _LONG and sum(row.seconds[0] for row in rows if row.seconds) > longest:
        return
    begin = time.monotonic()
    for row in alive:
        if row.seconds[0] < _LONG:
            row.seconds = ()
    for round_ in range(15):
        for i in measure.rotated(range(len(alive)), round_):
            row = alive[i]
            if row.missing:
                continue
            try:
                row.seconds = (*row.seconds, measure.timed(steps[id(row)], options.device))
            except Exception as error:
                row.missing, row.seconds = told(error), ()
        # another round takes as long as those so far did on average
        if (time.monotonic() - begin) * (round_ + 2) / (round_ + 1) > longest:
            break
    gc.collect()


# seconds of a step beside which what the first one pays does not count
_LONG = 1.0
# so many times as long as the fastest
_HOPELESS = 2.0


def stepper(case: Case, shared: Inputs) -> Callable[[], object]:
    inputs = shared.for_case(case)

    def run() -> None:
        step(case, inputs)
        # freed in the timed part by every program alike, so that none leaves memory for the next
        inputs.hidden.grad = inputs.weight.grad = None

    return run


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's stderr, elsewhere a line a step; call it at the start of every step."""
    done = 0

    def say(what: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{steps}] {what}", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield say
        return
    try:
        from rich.console import Console
        from rich.progress import Progress, TimeElapsedColumn
    except ImportError:
        yield say
        return
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=steps)

        def advance(what: str) -> None:
            bar.update(task, advance=1, description=what)

        yield advance


def ratio(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """Of its time to the baseline's at the same point."""
    for other in rows:
        same = (other["group"], other["x"]) == (row["group"], row["x"])
        if same and other["case"]["peer"] == BASELINE and other["median_seconds"]:
            own = row["median_seconds"]
            return own / other["median_seconds"] if own else None
    return None


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words; without programs that could not be run at all."""
    columns = ["", answer["axis"], "program", "ms", "x full logits", "extra MiB", "products", ""]
    absent = dict(missing_everywhere(answer))
    lines = []
    for row in answer["rows"]:
        if row["entry"] in absent:
            continue
        relative = ratio(row, answer["rows"])
        extra, products = row["extra_bytes"], row["products"]
        lines.append(
            [
                row["group"],
                f"{row['x']:g}{answer['unit']}",
                row["entry"],
                "-" if row["median_seconds"] is None else f"{1e3 * row['median_seconds']:.0f}",
                "-" if relative is None else f"{relative:.2f}",
                "-" if extra is None else f"{extra / MIB:.1f}",
                "-" if products is None else f"{products:.1f}",
                row["missing"] or "",
            ]
        )
    return columns, lines


def missing_everywhere(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """(program, reason) of those without a number at any point."""
    found = []
    rows = [row for row in answer["rows"] if "entry" in row]
    for entry in dict.fromkeys(row["entry"] for row in rows):
        own = [row for row in rows if row["entry"] == entry]
        if all(row["missing"] and row.get("extra_bytes") is None for row in own):
            reasons = dict.fromkeys(row["missing"] for row in own)
            found.append((entry, "; ".join(reasons)))
    return found


def report(answer: dict[str, Any], options: Options) -> None:
    """The file, the plot and the table."""
    from fusedpo.benchmarks import plots

    stream = sys.stderr if options.print_json else sys.stdout
    path = options.output / measure.file_name(answer["machine"])
    measure.save(answer["question"], answer, path)
    own = kind_of(answer)
    plot = plots.save(answer, options.output / f"{answer['question']}.png", own.plot)
    print(measure.describe(answer["machine"]), file=stream)
    columns, lines = own.table(answer)
    tables.show(answer["title"], columns, lines, stream)
    for line in remarks(answer):
        print(line, file=stream)
    if show_targets := getattr(own, "show_targets", None):
        show_targets(answer, stream)
    print(f"written to {path}" + (f" and {plot}" if plot else ""), file=stream)
    if options.print_json:
        json.dump(answer, sys.stdout)
        print()


def remarks(answer: dict[str, Any]) -> list[str]:
    """What is to be said below the table."""
    own = getattr(kind_of(answer), "remarks", None)
    absent = [f"Not measured: {entry}: {why}." for entry, why in missing_everywhere(answer)]
    return [*(own(answer) if own else []), *absent]


def kind_of(answer: dict[str, Any]) -> Any:
    """What has the answer's ``table`` and ``plot``: the module of its kind, or those of a sweep."""
    if "kind" in answer:
        return importlib.import_module(f"fusedpo.benchmarks.{answer['kind']}")
    from fusedpo.benchmarks import plots

    return SimpleNamespace(table=table, plot=plots.sweep)


def parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(found)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every question is asked with."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="N,H,V|N,MODEL",
        help="scored tokens, hidden size and vocabulary, or a model's head by its name, in place "
        "of the question's own shapes; N counts both responses of two pairs",
    )
    parser.add_argument("--losses", nargs="+", metavar="LOSS", choices=list(FORMULAS))
    parser.add_argument("--peers", nargs="+", metavar="PEER", choices=list(PEERS))
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on the CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--seconds", type=float, help="for timing at each point")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="training: for which the longest response is to be found (default: 1GiB on the CPU, "
        "40GiB elsewhere)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="results and plots (default: build/bench)"
    )
    parser.add_argument(
        "--json", action="store_true", help="the answer on stdout as JSON, tables on stderr"
    )


def options_of(given: argparse.Namespace) -> Options:
    """Checked, before anything is measured."""
    try:
        device = torch.device(given.device)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu or cuda, got {given.device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {given.device!r}")
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise ValueError(f"--device: expected one that is there, got {device}; there are {there}")
    if given.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {given.threads}")
    if given.seconds is not None and not given.seconds > 0:
        raise ValueError(f"--seconds: expected a positive number, got {given.seconds}")
    shapes = None if given.shapes is None else tuple(Shape.parse(text) for text in given.shapes)
    output = given.output or Options.output
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ValueError(f"--output: expected a folder, got {output}, and {parent} is a file")
    try:
        memory = None if given.memory is None else parse_budget(given.memory)
    except ValueError as error:
        raise ValueError(str(error).replace("memory_budget", "--memory")) from error
    torch.set_num_threads(given.threads)
    return Options(
        device=given.device,
        quick=given.quick,
        output=output,
        shapes=shapes,
        losses=None if given.losses is None else tuple(given.losses),
        # ratios are to the baseline
        peers=tuple(PEERS)
        if given.peers is None
        else tuple({BASELINE: 0, **dict.fromkeys(given.peers)}),
        dtype=given.dtype,
        threads=given.threads,
        seconds=given.seconds,
        print_json=given.json,
        memory=memory,
    )


class Asked(Protocol):
    """A question: one of this module's, or one with a ``kind``, a table and a plot of its own."""

    name: str
    title: str

    def ask(self, options: Options) -> dict[str, Any]: ...


def main(question: Asked, arguments: Sequence[str] | None = None) -> int:
    """``python -m fusedpo.benchmarks.<question>``."""
    given = parser(question.title, f"python -m fusedpo.benchmarks.{question.name}")
    parsed = given.parse_args(arguments)
    try:
        options = options_of(parsed)
    except ValueError as error:
        given.error(str(error))
    report(question.ask(options), options)
    return 0
