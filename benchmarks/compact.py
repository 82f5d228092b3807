"""What does a tolerance of gradients gain in time and memory, and at what error?

    python -m fusedpo.benchmarks.compact [--only times|errors] [--places NAME ...] [--quick] ...

Forward and backward of SimPO on a language model's hidden states (SmolLM2-135M-Instruct's, see
benchmarks/states.py), on those before a vocabulary of 262,144, on a trained toy's, and on random
ones, in fp32. All ways of a place take turns. Every way's memory is measured in a process of its
own, and its gradients are compared with float64. A way within a tolerance has made a few steps
before it is measured, as in a training: its record has settled. ``--only errors`` asks
benchmarks/compact_errors.py's question alone. What is measured is written after each place;
``--places`` asks some of them anew, and keeps what the file in the output's folder has of others.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fusedpo.benchmarks import (
    compact_errors,
    measure,
    plots,
    precision,
    reports,
    routes,
    section,
    states,
    sweep,
)
from fusedpo.benchmarks.compact_errors import Records, errors
from fusedpo.benchmarks.options import Options, Question, options_of, parser
from fusedpo.benchmarks.peers import BASELINE, OURS, PEERS, fusedpo_preference, step, why_not
from fusedpo.benchmarks.section import Verdict, number, quotient
from fusedpo.benchmarks.shapes import MIB, Case, Inputs, Shape, make_inputs
from fusedpo.benchmarks.timing import Clock, told
from fusedpo.engine import score
from fusedpo.engine.plan import Plan
from fusedpo.sizes import format_bytes

TITLE = __doc__.splitlines()[0]
USUAL = 2e-3
SMALL, MIDDLE, LARGE = 16 * MIB, 256 * MIB, 1024 * MIB
SETTLING = 4  # calls of a way before it is measured
LEAST_ROUNDS, MOST_ROUNDS = 5, 15
SECONDS, QUICK_SECONDS = 240.0, 20.0  # for the rounds of a place

BARE = "three bare products"
ROUNDED = "the exact gradient, rounded to bf16"
OTHER_BITS = "other log-probabilities"


@dataclass(frozen=True)
class Way:
    """A program, and what it is told; of `BARE` and `ROUNDED`, which are none, the name alone."""

    peer: str
    budget: int | None = None
    tolerance: float = 0.0
    frozen: bool = False
    dtype: str = "float32"

    @property
    def label(self) -> str:
        if self.peer not in PEERS:
            return self.peer
        parts = [PEERS[self.peer].label]
        if self.peer == OURS and self.budget is not None:
            parts.append(format_bytes(self.budget))
        if self.tolerance:
            parts.append(f"tolerance {self.tolerance:.0e}".replace("e-0", "e-"))
        if self.dtype != "float32":
            parts.append("bf16")
        if self.frozen:
            parts.append("frozen head")
        return ", ".join(parts)


def ours(budget: int, tolerance: float = 0.0, *, frozen: bool = False) -> Way:
    return Way(OURS, budget, tolerance, frozen)


FULL, FULL_FROZEN = Way(BASELINE), Way(BASELINE, frozen=True)
OTHERS = (Way("compiled"), Way("linear_cross_entropy", MIDDLE), Way("trl"), Way("liger"))
EXACT = (ours(SMALL), ours(MIDDLE), ours(LARGE))
KEPT, STREAMED = ours(MIDDLE, USUAL), ours(SMALL, USUAL)
KEPT_FROZEN = ours(MIDDLE, USUAL, frozen=True)
YARDSTICKS = (Way(BASELINE, dtype="bfloat16"), Way(ROUNDED))
ALL = (
    FULL,
    *OTHERS,
    Way(BARE),
    *YARDSTICKS,
    *EXACT,
    KEPT,
    STREAMED,
    ours(MIDDLE, 1e-2),
    ours(MIDDLE, 5e-4),
    FULL_FROZEN,
    ours(MIDDLE, frozen=True),
    KEPT_FROZEN,
)
FEW = (
    FULL,
    *(way for way in OTHERS if way.peer != "trl"),
    Way(BARE),
    *YARDSTICKS,
    *EXACT,
    KEPT,
    STREAMED,
    FULL_FROZEN,
    KEPT_FROZEN,
)
OWN = (FULL, Way(BARE), ours(MIDDLE), KEPT)


@dataclass(frozen=True)
class Place:
    """States, how many of their rows, and the ways that are compared there.

    Attributes:
        title: of the states.
        states: a name in benchmarks/states.py; None: random ones of the shape.
        shape: H and V are those of the states.
    """

    title: str
    states: str | None
    shape: Shape
    ways: tuple[Way, ...]

    def case(self, way: Way) -> Case:
        return Case(
            way.peer,
            self.shape,
            way.dtype,
            frozen=way.frozen,
            budget=way.budget,
            tolerance=way.tolerance,
            states=self.states,
        )


REAL, WIDE, RANDOM, TOY = "SmolLM2", "V 262,144", "random weights", "toy"


def _place(title: str, name: str, rows: int, size: int, vocab: int, ways: Sequence[Way]) -> Place:
    return Place(title, name, Shape(2, rows // 4, size, vocab), tuple(ways))


PLACES = (
    _place(REAL, "smollm2", 1024, 576, 49_152, ALL),
    # the other ways go on as they began, and take minutes each
    _place(REAL, "smollm2", 4096, 576, 49_152, OWN),
    _place(WIDE, "sharpened", 1024, 576, 262_144, FEW),
    _place(RANDOM, "untrained", 1024, 576, 49_152, OWN),
    _place(TOY, "toy", 2048, 128, 8192, OWN),
)
QUICK = (
    _place(REAL, "smollm2", 512, 576, 49_152, ALL),
    _place(RANDOM, "untrained", 512, 576, 49_152, OWN),
)


def places(options: Options) -> list[Place]:
    """Where it is asked; of shapes that were given, with random weights."""
    if options.shapes:
        return [Place(RANDOM, None, shape, ALL) for shape in options.shapes]
    return list(QUICK if options.quick else PLACES)


# a way's row


@dataclass
class Row(sweep.Row):
    """A way at a place.

    Attributes:
        errors: relative, of hidden and weight, and ``rows``: see `compact_errors.errors`.
        same: whether log-probabilities are the exact route's, to the bit; None: not asked.
        planned: the products of the plan, its route, and its bytes.
        noted: what the record of a way within a tolerance says.
    """

    errors: dict[str, float] = field(default_factory=dict)
    same: bool | None = None
    planned: dict[str, Any] = field(default_factory=dict)
    noted: dict[str, Any] = field(default_factory=dict)
    records: Records = field(default_factory=Records)

    @property
    def is_program(self) -> bool:
        return self.case.peer in PEERS

    def to_json(self) -> dict[str, Any]:
        peer = PEERS.get(self.case.peer)
        return {
            "group": self.group,
            "x": self.x,
            "entry": self.entry,
            "version": None if peer is None else peer.version,
            "case": self.case.to_json(),
            "seconds": [round(s, 6) for s in self.seconds],
            "median_seconds": self.median,
            "extra_bytes": self.extra,
            "products": self.products,
            "errors": {name: float(f"{e:.4g}") for name, e in self.errors.items()},
            "same_logprobs": self.same,
            "planned": self.planned,
            "noted": self.noted,
            "missing": self.missing,
        }


def _rows(place: Place, options: Options) -> list[Row]:
    found = []
    for way in place.ways:
        if way.peer not in options.peers and way.peer in PEERS:
            continue
        case = place.case(way)
        row = Row(place.title, place.shape.positions, way.label, case)
        if row.is_program:
            row.missing = why_not(replace(case, budget=None, tolerance=0.0))
        found.append(row)
    return found


# what a way does


def _measure(rows: Sequence[Row], advance: Callable[[str], None]) -> dict[str, Inputs]:
    """Errors, and everything else that is no time; the inputs by dtype."""
    inputs: dict[str, Inputs] = {}
    for dtype in dict.fromkeys(row.case.dtype for row in rows):
        own = [row for row in rows if row.case.dtype == dtype]
        case = replace(own[0].case, frozen=False)
        inputs[dtype] = make_inputs(case)
        advance(f"{own[0].group} {own[0].x:g}: float64, {dtype}")
        truth = precision.truth_of(case, inputs[dtype])
        exact = {"hidden": truth.hidden, "weight": truth.weight}
        logprobs: dict[int | None, Tensor] = {}
        for row in own:
            if row.missing:
                continue
            advance(f"{row.group} {row.x:g}: gradients of {row.entry}")
            if row.case.peer == ROUNDED:
                row.errors = errors({n: t.bfloat16() for n, t in exact.items()}, exact)
            elif row.is_program:
                try:
                    _gradients(row, inputs[dtype], exact, logprobs)
                except Exception as error:  # another library's failure is a line of the table
                    row.missing = told(error)
        del truth, exact
        gc.collect()
    return inputs


def _gradients(
    row: Row, shared: Inputs, exact: Mapping[str, Tensor], logprobs: dict[int | None, Tensor]
) -> None:
    """logprobs: of the exact route, by budget; what is not there yet is added."""
    case, ours = row.case, row.case.peer == OURS
    if case.tolerance:
        run = _stepper(row, shared)
        for _ in range(SETTLING):
            run()
    own = shared.for_case(case)
    with row.records.own(), _planned(row):
        if ours:
            out = fusedpo_preference(case, own)
            out.loss.backward()
        else:
            step(case, own)
    got = {"hidden": own.hidden.grad, "weight": own.weight.grad}
    row.errors = errors({name: g for name, g in got.items() if g is not None}, exact)
    if not ours or case.frozen:
        return
    if not case.tolerance:
        logprobs[case.budget] = out.logprobs
    elif case.budget in logprobs:
        row.same = torch.equal(out.logprobs, logprobs[case.budget])


@contextlib.contextmanager
def _planned(row: Row) -> Iterator[None]:
    """Note the plan that is made meanwhile."""

    def noting(*args: Any, **given: Any) -> Plan:
        chosen = original(*args, **given)
        row.planned = {
            "route": chosen.route,
            "products": round(chosen.products, 3),
            "bytes": chosen.bytes,
            "slab": chosen.slab if chosen.route == "compact" else None,
        }
        return chosen

    original: Callable[..., Plan] = getattr(score, "plan")  # noqa: B009 - imported there
    with mock.patch.object(score, "plan", noting):
        yield


def _noted(row: Row) -> dict[str, Any]:
    case = row.case
    if not case.tolerance or row.missing:
        return {}
    record = row.records.of(case.tolerance, case.shape.vocab, case.shape.hidden)
    return {
        "kept": record.kept,
        "dropped": record.dropped,
        "estimates": dict(record.errors),
        "coherence": dict(record.coherence),
        "breaches": record.breaches,
    }


def _stepper(row: Row, shared: Inputs) -> Callable[[], object]:
    """A step that leaves no gradient behind, with records of the way's own."""
    run = sweep.stepper(row.case, shared)

    def with_records() -> None:
        with row.records.own():
            run()

    return with_records if row.case.tolerance else run


def _bare(shared: Inputs) -> Callable[[], object]:
    products = routes.bare_products(shared)

    def run() -> None:
        for product in products.values():
            product()

    return run


def _time(
    rows: Sequence[Row],
    inputs: Mapping[str, Inputs],
    options: Options,
    advance: Callable[[str], None],
) -> None:
    """Rounds in turn, for as long as the place may take, or the least number of them."""
    alive = [row for row in rows if not row.missing and row.case.peer != ROUNDED]
    if not alive:
        return
    functions = {
        row.entry: _stepper(row, inputs[row.case.dtype])
        if row.is_program
        else _bare(inputs[row.case.dtype])
        for row in alive
    }
    advance(f"{alive[0].group} {alive[0].x:g}: time")
    # all have run before, and what was compiled was
    first = Clock("cpu").interleaved(functions, 1, warmup=0)
    taken = sum(timing.median or 0.0 for timing in first.values())
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    least = 2 if options.quick else LEAST_ROUNDS
    rounds = max(least, min(MOST_ROUNDS, int(seconds / max(taken, 1e-9))))
    for name, timing in Clock("cpu").interleaved(functions, rounds, warmup=0).items():
        (row,) = (row for row in alive if row.entry == name)
        row.seconds, row.missing = tuple(timing.seconds), timing.missing


# the question


@dataclass(frozen=True)
class Compact(Question):
    """About times, memory and errors at each place; saved after each.

    Attributes:
        places: titles of those that are asked; none: all.
    """

    name: str = "compact"
    title: str = TITLE
    kind: str = field(default="compact", kw_only=True)
    places: tuple[str, ...] = ()

    def ask(self, options: Options) -> dict[str, Any]:
        """Measure everything, and return what is to be saved."""
        if not options.on_cpu:
            raise ValueError(f"--device: expected cpu, got {options.device}")
        answer = self.about(options)
        every = places(options)
        asked = [place for place in every if not self.places or place.title in self.places]
        here = [(place, _rows(place, options)) for place in asked]
        path = options.output / measure.file_name(answer["machine"])
        lines = _lines_of(path, [place for place in every if place not in asked])
        steps = sum(2 * len(rows) + 3 for _, rows in here)
        with measure.progress(self.title, steps) as advance, _records_kept():
            for place, rows in here:
                self._at(place, rows, options, advance)
                lines += [row.to_json() for row in rows]
                order = [(each.title, each.shape.positions) for each in every]
                answer["rows"] = sorted(
                    lines, key=lambda row: order.index((row["group"], row["x"]))
                )
                answer["targets"] = [verdict.to_json() for verdict in verdicts(answer)]
                measure.save(self.name, answer, path)
        return answer

    def _at(
        self,
        place: Place,
        rows: list[Row],
        options: Options,
        advance: Callable[[str], None],
    ) -> None:
        try:
            if place.states is not None:
                states.made(place.states, rows=place.shape.positions)
        except (ImportError, ValueError) as error:  # no packages, or no texts
            for row in rows:
                row.missing = told(error)
            return
        for row in rows:
            if row.is_program:
                advance(f"{row.group} {row.x:g}: memory of {row.entry}")
                sweep.measure_memory(row, options.threads)
        sweep.compare(rows)
        inputs = _measure(rows, advance)
        _time(rows, inputs, options, advance)
        for row in rows:
            row.noted = _noted(row)
        gc.collect()


def _lines_of(path: Path, others: Sequence[Place]) -> list[dict[str, Any]]:
    """What a file has of places that are not asked."""
    known = {(place.title, place.shape.positions) for place in others}
    if not known or not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8")).get(QUESTION.name, {}).get("rows", [])
    return [row for row in rows if (row["group"], row["x"]) in known]


@contextlib.contextmanager
def _records_kept() -> Iterator[None]:
    """What this process knew of its own calls, it knows again afterwards."""
    with Records().own():
        yield


QUESTION = Compact()


# the targets


@dataclass(frozen=True)
class Found:
    """Rows of an answer, by place and way."""

    rows: Sequence[Mapping[str, Any]]

    def row(self, place: str, x: float, way: Way) -> Mapping[str, Any] | None:
        key = (place, x, way.label)
        found = (r for r in self.rows if (r["group"], r["x"], r["entry"]) == key)
        return next((r for r in found if not r["missing"]), None)

    def seconds(self, place: str, x: float, way: Way) -> float | None:
        row = self.row(place, x, way)
        return None if row is None else row["median_seconds"]

    def ratio(self, place: str, x: float, way: Way, other: Way = FULL) -> float | None:
        return quotient(self.seconds(place, x, way), self.seconds(place, x, other))

    def worst(self, place: str, x: float, way: Way) -> float | None:
        """The larger of the errors of both gradients."""
        row = self.row(place, x, way)
        if row is None or not row["errors"]:
            return None
        return max(row["errors"].get(name, 0.0) for name in ("hidden", "weight"))


def verdicts(answer: Mapping[str, Any]) -> list[Verdict]:
    """What is asked of it, and what was measured of that. ``x`` is over full logits' time."""
    found = Found(answer["rows"])
    sizes = {place: _sizes(answer, place) for place in (REAL, WIDE, RANDOM)}
    asked = []
    for x in sizes[REAL][:1]:
        asked += _at_first(found, x)
    for x in sizes[REAL][1:]:
        first = found.ratio(REAL, sizes[REAL][0], KEPT)
        ratio = quotient(found.ratio(REAL, x, KEPT), first)
        asked.append(Verdict(f"{REAL}, N {x}: x, over that of N {sizes[REAL][0]}", ratio, 1.0))
    for x in sizes[WIDE]:
        asked.append(Verdict(f"{WIDE}, N {x}: x", found.ratio(WIDE, x, KEPT), 0.42))
    for place in (REAL, WIDE):
        for x in sizes[place]:
            asked += _of_errors(found, place, x)
    for x in sizes[RANDOM]:
        ratio = found.ratio(RANDOM, x, KEPT, EXACT[1])
        asked.append(Verdict(f"{RANDOM}, N {x}: over the exact route", ratio, 1.1))
        asked.append(Verdict(f"{RANDOM}, N {x}: larger error", found.worst(RANDOM, x, KEPT), USUAL))
    return asked


def _sizes(answer: Mapping[str, Any], place: str) -> list[int]:
    return sorted({row["x"] for row in answer["rows"] if row["group"] == place})


def _at_first(found: Found, x: int) -> list[Verdict]:
    """Of the first size of SmolLM2's states."""

    def of(what: str, measured: float | None, at_most: float) -> Verdict:
        return Verdict(f"{REAL}, N {x}: {what}", measured, at_most)

    exact = [found.seconds(REAL, x, way) for way in EXACT]
    best = min((s for s in exact if s is not None), default=None)
    own = found.seconds(REAL, x, KEPT)
    frozen = found.ratio(REAL, x, KEPT_FROZEN)
    return [
        of("x, 256 MiB", found.ratio(REAL, x, KEPT), 0.60),
        of("over the best exact route", quotient(own, best), 0.70),
        of(f"over {BARE}", found.ratio(REAL, x, KEPT, Way(BARE)), 1.0),
        of("x, frozen head (full logits train it)", frozen, 0.40),
        of("x, 16 MiB", found.ratio(REAL, x, STREAMED), 0.75),
        of("x, exact, 256 MiB", found.ratio(REAL, x, EXACT[1]), 0.87),
        of("x, exact, 16 MiB", found.ratio(REAL, x, EXACT[0]), 1.10),
        *_beside_others(found, x, of),
    ]


def _beside_others(
    found: Found, x: int, of: Callable[[str, float | None, float], Verdict]
) -> list[Verdict]:
    """Beside the fastest of the other programs, and in error beside the yardstick."""
    programs = [(found.row(REAL, x, way), way) for way in (FULL, *OTHERS)]
    timed = [(row["median_seconds"], row) for row, _ in programs if row and row["median_seconds"]]
    own = found.row(REAL, x, KEPT)
    if own is None or not timed:
        return []
    seconds, fastest = min(timed, key=lambda pair: pair[0])
    memory = quotient(own["extra_bytes"], fastest["extra_bytes"])
    error = quotient(found.worst(REAL, x, KEPT), found.worst(REAL, x, YARDSTICKS[0]))
    return [
        of("time over the fastest other program", quotient(own["median_seconds"], seconds), 1.0),
        of(f"memory over its ({fastest['entry']})", memory, 1.0),
        of(f"larger error over that of {YARDSTICKS[0].label}", error, 1.0),
    ]


def _of_errors(found: Found, place: str, x: int) -> list[Verdict]:
    asked = []
    for way in (KEPT, STREAMED):
        row = found.row(place, x, way)
        if row is None:
            continue
        what = f"{place}, N {x}, {format_bytes(way.budget or 0)}"
        asked += [
            Verdict(f"{what}: error of d{name}", row["errors"].get(name), USUAL)
            for name in ("hidden", "weight")
        ]
        same = None if row["same_logprobs"] is None else float(row["same_logprobs"])
        asked.append(Verdict(f"{what}: log-probabilities of the exact bits", same, at_least=1.0))
    return asked


# the answer


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words; products are those that were made, and that were planned."""
    columns = ["", "program", "ms", "x full logits", "extra MiB", "products", "dL/dhidden"]
    columns += ["rows, 99 %", "dL/dweight", "kept", "breaches", ""]
    found, lines = Found(answer["rows"]), []
    absent = dict(sweep.missing_everywhere(answer))
    for row in answer["rows"]:
        if row["entry"] in absent:
            continue
        full = found.seconds(row["group"], row["x"], FULL)
        noted = row["noted"]
        extra, planned = row["extra_bytes"], row["planned"].get("products")
        lines.append(
            [
                f"{row['group']}, N {row['x']:g}",
                row["entry"],
                number(row["median_seconds"], 1e3, 0),
                number(quotient(row["median_seconds"], full)),
                number(extra, 1 / MIB, 1),
                number(row["products"]) + ("" if planned is None else f" ({planned:.2f})"),
                *(
                    f"{row['errors'][name]:.1e}" if name in row["errors"] else "-"
                    for name in ("hidden", "rows", "weight")
                ),
                f"{100 * noted['kept']:.1f} %" if noted else "-",
                str(noted["breaches"]) if noted else "-",
                row["missing"] or OTHER_BITS * (row["same_logprobs"] is False),
            ]
        )
    return columns, lines


def show_targets(answer: dict[str, Any], stream: Any = None) -> None:
    """What is asked of it: met, or missed."""
    section.show_targets(verdicts(answer), "targets; x: time over that of full logits", stream)


def plot(answer: dict[str, Any]) -> Any:
    """Time against the larger gradient error: what is further down is better, and to the left."""
    found = Found(answer["rows"])
    rows = [
        row
        for row in answer["rows"]
        if row["median_seconds"] and "weight" in row["errors"] and row["group"] in (REAL, WIDE)
    ]
    rows = rows or [r for r in answer["rows"] if r["median_seconds"] and "weight" in r["errors"]]
    if not rows:
        return None
    panels = list(dict.fromkeys((row["group"], row["x"]) for row in rows))
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    colours = plots.colours_of(entries)
    wide = min(2, len(panels))
    high = -(-len(panels) // wide)
    figure = plots.figure(answer, 1.2 + 7.4 * wide, 0.6 + 4.4 * high)
    lines = figure.subplots(high, wide, squeeze=False).flatten()
    for (place, x), axes in zip(panels, lines, strict=False):
        own = [row for row in rows if (row["group"], row["x"]) == (place, x)]
        _panel(axes, found, place, x, own, colours)
    for axes in lines[len(panels) :]:
        axes.remove()
    return figure


def _panel(
    axes: Any,
    found: Found,
    place: str,
    x: int,
    rows: Sequence[Mapping[str, Any]],
    colours: Mapping[str, str],
) -> None:
    ends = []
    for row in rows:
        full = found.seconds(place, x, FULL) or 1.0
        at = max(row["errors"]["hidden"], row["errors"]["weight"]), row["median_seconds"] / full
        within, own = row["case"]["tolerance"] > 0, row["case"]["peer"] == OURS
        marker = "o" if within else "s" if own else "^"
        colour = plots.OUR_COLOURS[within] if own else colours[row["entry"]]
        axes.plot(*at, marker=marker, ms=7, color=colour)
        extra = row["extra_bytes"]
        name = row["entry"] + ("" if extra is None else f" ({extra / MIB:.0f} MiB)")
        ends.append((at, name, colour))
    axes.set(
        xscale="log",
        title=f"{place}, N {x}",
        xlabel="relative error of the gradients, the larger of two",
        ylabel="time of forward + backward, x full logits",
    )
    axes.set_ylim(0.0, 1.08 * max(y for (_, y), _, _ in ends))
    axes.margins(x=0.08)
    axes.grid(True, which="major", color="0.9")
    bare, rounded = found.ratio(place, x, Way(BARE)), found.worst(place, x, Way(ROUNDED))
    style, small = {"color": "0.5", "lw": 1, "ls": "--"}, {"fontsize": 7, "color": "0.4"}
    if bare is not None:
        axes.axhline(bare, **style)
        axes.annotate(BARE, (0.01, bare), xycoords=axes.get_yaxis_transform(), va="bottom", **small)
    if rounded is not None:
        axes.axvline(rounded, **style)
        where = {"xycoords": axes.get_xaxis_transform(), "rotation": 90, "ha": "right"}
        axes.annotate("rounding to bf16", (rounded, 0.01), va="bottom", **where, **small)
    plots.name_ends(axes, ends)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fusedpo.benchmarks.compact``."""
    given = parser(__doc__, "python -m fusedpo.benchmarks.compact")
    given.add_argument("--only", choices=("times", "errors"), help="of the two questions")
    titles = tuple(dict.fromkeys(place.title for place in PLACES))
    given.add_argument("--places", nargs="+", choices=titles, default=[], help="some of them anew")
    parsed = given.parse_args(arguments)
    try:
        options = options_of(parsed)
    except ValueError as error:
        given.error(str(error))
    if parsed.only != "times":
        reports.report(compact_errors.QUESTION.ask(options), options)
    if parsed.only != "errors":
        question = replace(QUESTION, places=tuple(parsed.places))
        reports.report(question.ask(options), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
