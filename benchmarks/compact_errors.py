"""How exact are gradients within a tolerance?

Gradients of hidden states and head, by the route ``compact`` in a budget of 256 MiB, against
float64: of a sum of log-probabilities with the upstream gradients of the states, or random ones.
The states are those of benchmarks/states.py, up to 1,024 rows each. Calls are repeated until their
record has settled; the last one counts. Then, of the same states and tolerance, slabs of other
numbers of rows, rows in the order in which they are given, other numbers of main directions of the
weight at the same kept columns, and these columns with nothing in place of the others. Last, of
many random problems, how many gradients are beyond their tolerance though their estimate is not.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fusedpo
from fusedpo.benchmarks import measure, options, precision, reports, states
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.shapes import MIB
from fusedpo.benchmarks.states import States
from fusedpo.benchmarks.timing import told
from fusedpo.engine import column_sums, row_order, tolerance
from fusedpo.engine.columns import Kept
from fusedpo.engine.cost import Needs
from fusedpo.engine.plan import Plan
from fusedpo.engine.tolerance import Record

TITLE = __doc__.splitlines()[0]
TOLERANCES = (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)
USUAL = 2e-3
BUDGET = 256 * MIB
ROWS, MANY = 1024, 512  # of most states, and of those with a large vocabulary
LARGE = 100_000
CALLS = 4
SLABS, SLAB = (64, 128, 256, 512, 1024), 128
DIRECTIONS = (0, 8, 16, 32, 64)
STUDIED = ("smollm2", "sharpened")
DRAWN, DRAWN_TOLERANCES = 1000, (1e-2, 2e-3, 5e-4)


# gradients and what they are off


def relative(got: Tensor, exact: Tensor) -> float:
    """The relative error of a tensor in the 2-norm, in float64, some rows at a time."""
    gap = size = 0.0
    for mine, truth in zip(torch.split(got, 8192), torch.split(exact, 8192), strict=True):
        gap += float((mine.double() - truth.double()).square().sum())
        size += float(truth.double().square().sum())
    return math.sqrt(gap / size) if size else math.sqrt(gap)


def errors(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Of gradients by name, those of hidden [..., H] and weight [V, H] among them; ``rows``, what
    99 % of the rows of hidden are within, relative to their own size or to the root mean square of
    all rows, if that is larger."""
    found = {name: relative(tensor, exact[name]) for name, tensor in got.items()}
    if "hidden" in got:
        rows, truth = (t.double().flatten(0, -2) for t in (got["hidden"], exact["hidden"]))
        sizes, gaps = truth.norm(dim=1), (rows - truth).norm(dim=1)
        least = float(sizes.square().mean().sqrt()) or 1.0
        found["rows"] = float((gaps / sizes.clamp(min=least)).quantile(0.99))
    return found


def upstream_of(given: States) -> Tensor:
    if given.upstream is not None:
        return given.upstream
    return torch.randn(len(given.labels), generator=torch.Generator().manual_seed(1))


def truth_of(given: States, upstream: Tensor) -> dict[str, Tensor]:
    """Gradients in float64, by the definition."""
    return precision.exact_gradients(given.hidden, given.weight, given.labels, upstream, given.bias)


def _leaves(given: States, dtype: torch.dtype = torch.float32) -> dict[Needs, Tensor]:
    tensors: dict[Needs, Tensor | None] = {
        "hidden": given.hidden,
        "weight": given.weight,
        "bias": given.bias,
    }
    return {
        name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items() if t is not None
    }


class Records:
    """What calls have shown, of one program: of others that run in turn it knows nothing."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...] | None, dict[tuple[object, ...], Record]] = {}

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        with mock.patch.dict(tolerance._records, self._kept, clear=True):
            yield
            self._kept = dict(tolerance._records)

    def of(self, allowed: float, vocab: int, size: int) -> Record:
        with self.own():
            return tolerance.record_of(allowed, "cpu", vocab, size)


@dataclass
class Call:
    """A call within a tolerance.

    Attributes:
        slab: rows of a slab; None: as planned, and the plan may be another route.
        directions: main directions of the weight; None: as they are.
        alone: whether columns that are left out are dropped, with no direction in their place.
        in_order: whether rows stay in the order in which they are given.
        left_out: of each gradient, the sum of squares that it may leave out, relative to its own;
            None: what the record says.
        records: what its calls have shown.
    """

    given: States
    upstream: Tensor
    tolerance: float
    slab: int | None = None
    directions: int | None = None
    alone: bool = False
    in_order: bool = False
    left_out: Mapping[str, float] | None = None
    records: Records = field(default_factory=Records)

    @property
    def record(self) -> Record:
        return self.records.of(self.tolerance, self.given.vocab, self.given.hidden.shape[1])

    def gradients(self) -> dict[str, Tensor]:
        leaves = _leaves(self.given)
        for name, least in (self.left_out or {}).items():
            record = self.record
            record.coherence[name] *= record.allowed(name) / least
        dropping = _dropping() if self.alone else contextlib.nullcontext()
        staying = _in_order() if self.in_order else contextlib.nullcontext()
        with self.records.own(), _directions(self.directions), dropping, staying:
            logprobs = fusedpo.linear_logprobs(
                leaves["hidden"],
                leaves["weight"],
                self.given.labels,
                bias=leaves.get("bias"),
                memory_budget=BUDGET if self.slab is None else self._plan(self.slab),
                gradient_tolerance=self.tolerance,
            )
            torch.autograd.backward(logprobs, self.upstream)
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _plan(self, slab: int) -> Plan:
        rows, size = self.given.hidden.shape
        chosen = fusedpo.plan(
            rows,
            self.given.vocab,
            size,
            needs=tuple(_leaves(self.given)),
            budget="4GiB",
            gathered=False,
            route="compact",
            gradient_tolerance=self.tolerance,
        )
        return replace(chosen, slab=min(slab, rows))

    def settled(self, calls: int = CALLS) -> dict[str, Tensor]:
        """The gradients of the last of several calls."""
        for _ in range(calls - 1):
            self.gradients()
        return self.gradients()


@contextlib.contextmanager
def _directions(count: int | None) -> Iterator[None]:
    """Calls take so many main directions of the weight; None: as many as they do."""
    if count is None:
        yield
        return
    with contextlib.ExitStack() as changed:
        changed.enter_context(mock.patch.object(column_sums, "PRODUCTS", max(1, count)))
        if not count:  # one that nothing lies in

            def none(t: Any, count: int) -> Tensor:
                return torch.zeros(t.width, count, dtype=t.acc)

            changed.enter_context(mock.patch.object(column_sums, "main_directions", none))
        yield


@contextlib.contextmanager
def _dropping() -> Iterator[None]:
    """Calls put nothing in place of the columns that they leave out."""
    original = Kept.directions

    def nothing(*arguments: Any) -> Tensor:
        return torch.zeros_like(original(*arguments))

    with mock.patch.object(Kept, "directions", nothing):
        yield


@contextlib.contextmanager
def _in_order() -> Iterator[None]:
    """Calls leave the rows in the order in which they are given."""
    with mock.patch.object(row_order, "alike", lambda *_: None):
        yield


# the question


def _row(part: str, call: Call, exact: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a settled call gives, as numbers."""
    found = errors(call.settled(), exact)
    row: dict[str, Any] = {
        "part": part,
        "entry": call.given.name,
        "rows": len(call.given.labels),
        "vocab": call.given.vocab,
        "tolerance": call.tolerance,
        "slab": call.slab,
        "directions": call.directions,
        "alone": call.alone,
        "in_order": call.in_order,
        "errors": _rounded(found),
        "missing": None,
    }
    if not call.tolerance:
        return row
    record = call.record
    return row | {
        "estimates": _rounded(record.errors),
        "kept": record.kept,
        "dropped": record.dropped,
        "coherence": _rounded(record.coherence),
        "breaches": record.breaches,
    }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def _studied(given: States, upstream: Tensor, exact: Mapping[str, Tensor]) -> Iterator[Any]:
    """Of one tolerance, slabs of other sizes, other numbers of directions, and columns alone.

    The last two with the same columns kept, and with a tolerance that none of them breaches.
    """
    usual = Call(given, upstream, USUAL, slab=SLAB)
    for slab in SLABS:
        yield _row("slabs", replace(usual, slab=slab, records=Records()), exact)
    for in_order in (False, True):
        yield _row("order", replace(usual, in_order=in_order, records=Records()), exact)
    usual.settled()
    left_out = {name: usual.record.allowed(name) for name in usual.record.coherence}
    wide = Call(given, upstream, 0.5, SLAB, left_out=left_out)
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        *(("directions", {"directions": count}) for count in DIRECTIONS),
        ("alone", {}),
        ("alone", {"directions": 0, "alone": True}),
    )
    for part, changes in ways:
        found = _row(part, replace(wide, **changes, records=Records()), exact)
        # the columns are those of the usual tolerance
        yield found | {"tolerance": USUAL, "breaches": None, "coherence": None}


def _drawn(allowed: float, count: int) -> dict[str, Any]:
    """Of random problems, two calls each: how many were done again, and how many were beyond the
    tolerance unnoticed, by which factor at most."""
    again, factors = 0, []
    for seed in range(count):
        given = states.drawn(seed)
        exact = truth_of(given, upstream_of(given))
        call = Call(given, upstream_of(given), allowed, SLAB)
        for _ in range(2):
            found = errors(call.gradients(), exact)
            factors.append(max(found["hidden"], found["weight"]) / allowed)
        again += call.record.breaches
    return {
        "part": "drawn",
        "entry": "random problems",
        "calls": len(factors),
        "tolerance": allowed,
        "breaches": again,
        "missed": sum(factor > 1 for factor in factors),
        "worst": float(f"{max(factors):.3g}"),
        "missing": None,
    }


@dataclass(frozen=True)
class Question(options.Question):
    """About errors.

    Attributes:
        states: names in benchmarks/states.py.
        studied: those of them of which slabs and directions are.
        drawn: random problems of each of `DRAWN_TOLERANCES`.
    """

    name: str = "compact_errors"
    title: str = TITLE
    kind: str = field(default="compact_errors", kw_only=True)
    states: tuple[str, ...] = states.NAMES
    tolerances: tuple[float, ...] = TOLERANCES
    studied: tuple[str, ...] = STUDIED
    drawn: int = DRAWN

    def measured(self, options: Options) -> dict[str, Any]:
        if not options.on_cpu:
            raise ValueError(f"--device: expected cpu, got {options.device}")
        tolerances = self.tolerances[::3] if options.quick else self.tolerances
        rows: list[dict[str, Any]] = []
        drawn = self.drawn // 10 if options.quick else self.drawn
        with measure.progress(self.title, len(self.states) + 1) as advance:
            for name in self.states:
                advance(f"{name}: errors")
                try:
                    rows += self._of(name, tolerances)
                except (ImportError, ValueError) as error:  # no packages, or no texts
                    rows.append({"part": "errors", "entry": name, "missing": told(error)})
            advance("random problems")
            rows += [_drawn(allowed, drawn) for allowed in DRAWN_TOLERANCES if drawn]
        return {"rows": rows}

    def _of(self, name: str, tolerances: Sequence[float]) -> Iterator[dict[str, Any]]:
        given = states.made(name)
        given = given.first(MANY if given.vocab > LARGE else ROWS)
        upstream = upstream_of(given)
        exact = truth_of(given, upstream)
        for allowed in (0.0, *tolerances):
            yield _row("errors", Call(given, upstream, allowed), exact)
        if name in self.studied:
            yield from _studied(given, upstream, exact)


QUESTION = Question()


# the answer


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else "0" if value == 0 else format(value, form)


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words."""
    columns = ["", "states", "N", "V", "tolerance", "dL/dhidden", "rows, 99 %", "dL/dweight"]
    columns += ["dL/dbias", "estimated", "kept", "coherence", "breaches"]
    lines = []
    for row in answer["rows"]:
        if row["missing"] or row["part"] == "drawn":
            continue
        found, estimates = row["errors"], row.get("estimates") or {}
        coherence = row.get("coherence") or {}
        way = {
            "errors": "",
            "slabs": f"slabs of {row['slab']}",
            "directions": f"{row['directions']} directions",
            "alone": "columns alone" if row["alone"] else "as it is",
            "order": "as given" if row.get("in_order") else "alike together",
        }[row["part"]]
        lines.append(
            [
                way,
                row["entry"],
                str(row["rows"]),
                str(row["vocab"]),
                f"{row['tolerance']:g}",
                *(_cell(found.get(name), ".1e") for name in ("hidden", "rows", "weight", "bias")),
                _cell(max(estimates.values(), default=None), ".1e"),
                "" if row.get("kept") is None else f"{100 * row['kept']:.1f} %",
                "; ".join(_cell(coherence[n], ".2g") for n in ("hidden", "head") if n in coherence),
                "" if row.get("breaches") is None else str(row["breaches"]),
            ]
        )
    return columns, lines


def beyond(answer: dict[str, Any]) -> list[str]:
    """Gradients that are off by more than their tolerance and rounding, in words."""
    found = []
    exact = {r["entry"]: r["errors"] for r in _part(answer, "errors") if not r["tolerance"]}
    for row in _part(answer, "errors"):
        for name in ("hidden", "weight", "bias"):
            error, rounding = row["errors"].get(name), exact[row["entry"]].get(name, 0.0)
            if (
                error is not None
                and row["tolerance"]
                and not (error <= row["tolerance"] + 1.5 * rounding)
            ):
                found.append(f"{row['entry']}, {row['tolerance']:g}: d{name} is off by {error:.1e}")
        if row["tolerance"] and not row["errors"]["rows"] <= 30 * row["tolerance"] + 1e-4:
            found.append(f"{row['entry']}, {row['tolerance']:g}: rows of dhidden")
    return found


def _part(answer: dict[str, Any], part: str, entry: str | None = None) -> list[dict[str, Any]]:
    return [
        row
        for row in answer["rows"]
        if row["part"] == part and not row["missing"] and entry in (None, row["entry"])
    ]


def growth(answer: dict[str, Any], entry: str) -> float | None:
    """By which power of its rows the kept share of a slab grows, from the smallest to 256."""
    shares = {row["slab"]: row["kept"] for row in _part(answer, "slabs", entry)}
    first, last = min(shares, default=0), max((s for s in shares if s <= 256), default=0)
    if first >= last or not shares[first]:
        return None
    return math.log(shares[last] / shares[first]) / math.log(last / first)


def remarks(answer: dict[str, Any]) -> list[str]:
    wrong = beyond(answer)
    found = [f"Not within its tolerance: {what}." for what in wrong]
    if not wrong:
        found.append("Every gradient is within its tolerance, and 99 % of rows within 30 times it.")
    for entry in dict.fromkeys(row["entry"] for row in _part(answer, "slabs")):
        power = growth(answer, entry)
        if power is not None:
            found.append(
                f"{entry}: with twice the rows of a slab the kept share is {2**power:.2f} times "
                f"as large, a power of {power:.2f}."
            )
    for entry in dict.fromkeys(row["entry"] for row in _part(answer, "order")):
        own, given = (row["kept"] for row in _part(answer, "order", entry))
        found.append(
            f"{entry}: of rows in the order given, {given / own:.2f} times as much is kept."
        )
    for entry in dict.fromkeys(row["entry"] for row in _part(answer, "directions")):
        of = {r["directions"]: r["errors"]["hidden"] for r in _part(answer, "directions", entry)}
        less = [f"{n} take {1 - e / of[0]:.0%}" for n, e in of.items() if n and of.get(0)]
        found.append(f"{entry}: of the error of dL/dhidden, main directions: {', '.join(less)}.")
    for entry in dict.fromkeys(row["entry"] for row in _part(answer, "alone")):
        own, alone = (row["errors"] for row in _part(answer, "alone", entry))
        times = [f"{alone[name] / own[name]:.1f} times dL/d{name}" for name in ("hidden", "weight")]
        found.append(f"{entry}: the same columns alone are off by {' and '.join(times)}.")
    for row in _part(answer, "drawn"):
        found.append(
            f"Of {row['calls']} gradients of random problems within {row['tolerance']:g}, "
            f"{row['breaches']} were made again, and {row['missed']} were beyond it unnoticed, "
            f"the worst by a factor of {row['worst']:g}."
        )
    return found


def plot(answer: dict[str, Any]) -> Any:
    """Errors and kept columns over the tolerance."""
    from fusedpo.benchmarks import plots

    rows = [
        {
            "group": "gradients within a tolerance",
            "entry": row["entry"],
            "x": row["tolerance"],
            "error": max(row["errors"].get(name, 0.0) for name in ("hidden", "weight", "bias")),
            "kept": row["kept"],
            "missing": None,
        }
        for row in _part(answer, "errors")
        if row["tolerance"]
    ]
    wanted = (("error", 1.0, "largest relative error"), ("kept", 1.0, "columns kept"))
    shown = {"rows": rows, "title": answer["title"], "axis": "gradient_tolerance", "unit": ""}
    return plots.along(shown, wanted)


if __name__ == "__main__":
    sys.exit(reports.main(QUESTION))
