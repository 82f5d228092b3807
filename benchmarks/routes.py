"""What does a step take over the bare products that it cannot do without?

A step is forward and backward of SimPO. The bare products are those of the linear algebra library
at exactly these shapes, in the operands' dtype, timed in the same rounds: hidden W^T, J W and
J^T hidden. A route's ratio is its step over the products that it makes. Before it is timed its loss
and gradients are held to those of full logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from torch import Tensor

import fusedpo
from fusedpo.benchmarks import roofline, section
from fusedpo.benchmarks.compact_errors import relative
from fusedpo.benchmarks.peers import fusedpo_preference, step
from fusedpo.benchmarks.section import Cell, Question, Section, Setting, Verdict, number, quotient
from fusedpo.benchmarks.shapes import Case, Inputs, make_inputs
from fusedpo.benchmarks.timing import Deadline, Measured, Step
from fusedpo.engine.cost import Backend, Needs
from fusedpo.engine.plan import Plan, RouteName

# more than either backend's rounding in half precision makes of a gradient, and less than a lost
# tile does
GRADIENT_DIFFERENCE = 0.05
LOSS_DIFFERENCE = 0.01

TILES = tuple((rows, cols) for rows in (128, 256, 512, 1024) for cols in (1024, 2048, 4096, 8192))


@dataclass(frozen=True)
class Way:
    """A route on a backend; tile: rows and columns of logits, None: the plan's."""

    route: RouteName
    backend: Backend
    fused: bool | None = None
    tile: tuple[int, int] | None = None

    def __str__(self) -> str:
        tile = self.tile and " x ".join(map(str, self.tile))
        parts = (self.route, "fused" if self.fused else self.backend, tile)
        return ", ".join(part for part in parts if part)

    @property
    def tolerance(self) -> float:
        """Of the gradients: that of rounding to bf16, where there can be one."""
        return 2e-3 if self.route == "compact" else 0.0

    @property
    def needs(self) -> tuple[Needs, ...]:
        return roofline.needs_of(self.route)

    def plan(self, case: Case) -> Plan:
        shape = case.shape
        chosen = fusedpo.plan(
            shape.positions,
            shape.vocab,
            shape.hidden,
            dtype=case.torch_dtype,
            needs=self.needs,
            scope="pair",
            groups=shape.pairs,
            # one_pass takes a pair's rows side by side
            gathered=self.route == "one_pass" and shape.pairs > 1,
            device=case.device,
            backend=self.backend,
            route=self.route,
            fused=self.fused,
            gradient_tolerance=self.tolerance,
            budget=roofline.BUDGETS[self.route] if self.tile is None else "64GiB",
        )
        if self.tile is None:
            return chosen
        rows, cols = min(self.tile[0], shape.positions), min(self.tile[1], shape.vocab)
        return replace(chosen, rows=rows, cols=cols, back_rows=rows, back_cols=cols, slab=rows)

    def loss(self, case: Case, chosen: Plan, inputs: Inputs) -> Tensor:
        """The number of scored tokens is handed over, so that nothing waits for it."""
        if "weight" not in self.needs:
            inputs = inputs._replace(weight=inputs.weight.detach())
        with torch.set_grad_enabled(self.route != "forward"):
            found = fusedpo_preference(
                case,
                inputs,
                memory_budget=chosen,
                backend=self.backend,
                gradient_tolerance=self.tolerance,
                num_scored=len(inputs.labels) * [inputs.labels.shape[1]],
            ).loss
            if found.requires_grad:
                torch.autograd.backward(found)
        return found.detach()

    def step(self, case: Case, chosen: Plan, inputs: Inputs) -> Step:
        """A whole step, which leaves no gradient behind."""

        def run() -> None:
            self.loss(case, chosen, inputs)
            clear(inputs)

        return run


def clear(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None


def bare_products(inputs: Inputs) -> dict[str, Step]:
    """The three products, on the exponentials that a Jacobian is made of."""
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    logits = hidden @ weight.T
    jacobian = torch.softmax(logits, 1)
    states, head = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "hidden W^T": lambda: torch.mm(hidden, weight.T, out=logits),
        "J W": lambda: torch.mm(jacobian, weight, out=states),
        "J^T hidden": lambda: torch.mm(jacobian.T, hidden, out=head),
    }


def bare_seconds(chosen: Plan, times: Mapping[str, Measured]) -> float | None:
    """Of the products that a plan makes; None if one of them was not timed."""
    gradients = [("hidden", "J W"), ("weight", "J^T hidden")]
    made = {product: 1.0 for need, product in gradients if need in chosen.needs}
    made["hidden W^T"] = chosen.products - len(made)
    found = [(count, times[name].median) for name, count in made.items()]
    known = [count * seconds for count, seconds in found if seconds is not None]
    return sum(known) if len(known) == len(found) else None


def predicted_ratio(way: Way, chosen: Plan) -> float | None:
    """That of benchmarks/ROOFLINE.md, if that is about this way and shape."""
    about = (roofline.TOKENS, roofline.VOCAB, roofline.HIDDEN, torch.bfloat16)
    if (chosen.tokens, chosen.vocab, chosen.hidden, chosen.dtype) != about:
        return None
    kernels = way.backend == "triton" and not way.fused and way.tile is None
    return roofline.predicted(chosen).ratio if kernels else None


Gradients = tuple[float, dict[str, Tensor | None]]
"""A loss and its gradients, by the operand."""


def taken(loss: Tensor, inputs: Inputs) -> Gradients:
    """What a step left, taken away."""
    found = {"hidden": inputs.hidden.grad, "weight": inputs.weight.grad}
    clear(inputs)
    return float(loss), found


def differences(way: Way, got: Gradients, truth: Gradients) -> dict[str, float]:
    """Relative difference of the loss, and of each gradient that the way delivers."""
    found = {"loss": abs(got[0] / truth[0] - 1)}
    for name in way.needs:
        mine, exact = got[1][name], truth[1][name]
        found[name] = math.inf if mine is None or exact is None else relative(mine, exact)
    return found


def faults(name: str, differences: dict[str, float]) -> list[str]:
    """Where a way is not what full logits are, in words."""
    return [
        f"{name}: its {what} differs from that of full logits by {gap:.1e}"
        for what, gap in differences.items()
        if not gap <= (LOSS_DIFFERENCE if what == "loss" else GRADIENT_DIFFERENCE)
    ]


def routes(setting: Setting, deadline: Deadline) -> Section:
    """Every route on the device's backends."""
    ways = [Way(route, "torch") for route in roofline.TARGETS]
    if setting.cuda:
        ways = [
            *(Way(route, "triton") for route in roofline.TARGETS),
            Way("forward", "triton", fused=True),
            *ways,
        ]
    return measured(setting, ways, deadline)


def tiles(setting: Setting, deadline: Deadline) -> Section:
    """The route that most steps take, its tile of logits forced."""
    ways = [Way("recompute", setting.backend, tile=tile) for tile in TILES]
    return measured(setting, ways, deadline)


def measured(setting: Setting, ways: Iterable[Way], deadline: Deadline) -> Section:
    """Steps and the bare products, in the same rounds."""
    case, found = setting.case, Section()
    inputs = make_inputs(case)
    truth = taken(step(case, inputs), inputs)
    functions: dict[str, Step] = dict(bare_products(inputs))
    known: dict[str, tuple[Way, Plan, dict[str, float]]] = {}
    for way in found.in_time(ways, deadline):
        name = str(way)
        with found.attempt(name):
            chosen = way.plan(case)
            gaps = differences(way, taken(way.loss(case, chosen, inputs), inputs), truth)
            found.wrong += faults(name, gaps)
            known[name] = way, chosen, gaps
            functions[name] = way.step(case, chosen, inputs)
        clear(inputs)
    del truth
    times = setting.clock.interleaved(functions, setting.rounds, deadline)
    for name, timing in times.items():
        row: dict[str, Any] = {
            "name": name,
            "seconds": timing.median,
            "quartiles": timing.quartiles or (),
            "all_seconds": timing.seconds,
            "host_seconds": timing.host_median,
            "missing": timing.missing,
        }
        if timing.missing:
            found.failed(name, timing.missing)
        if name in known:
            way, chosen, gaps = known[name]
            products = bare_seconds(chosen, times)
            row["product_seconds"] = products
            row["ratio"] = quotient(timing.median, products)
            row["predicted_ratio"] = predicted_ratio(way, chosen)
            row |= {"differences": gaps, "plan": str(chosen)}
            if way.backend == "triton" and not way.fused and way.tile is None:
                at_most = roofline.TARGETS[way.route]
                what = f"{name}, {case.shape}: over its products"
                found.verdicts.append(Verdict(what, row["ratio"], at_most=at_most))
        else:
            row["flop_per_second"] = quotient(case.flop, timing.median)
        found.add(**row)
    return found


def _note(row: Mapping[str, Any]) -> str:
    if row["missing"]:
        return str(row["missing"])
    if "flop_per_second" in row:
        return f"{number(row['flop_per_second'], 1e-12)} TFLOP/s"
    return f"{max(row['differences'].values()):.0e}"


COLUMNS: dict[str, Cell] = {
    "what": "name",
    "ms": ("seconds", 1e3, 2),
    "quartiles": lambda row: "-".join(number(s, 1e3) for s in row["quartiles"]) or "-",
    "host ms": ("host_seconds", 1e3, 2),
    "its products ms": ("product_seconds", 1e3, 2),
    "ratio": ("ratio", 1, 3),
    "predicted": ("predicted_ratio", 1, 3),
    "difference": _note,
}


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words."""
    return section.by_shape(answer, *COLUMNS.items())


remarks = section.remarks


def plot(answer: dict[str, Any]) -> None:
    """None: the table says it."""


def show_targets(answer: Mapping[str, Any], stream: TextIO) -> None:
    if answer["targets"]:
        section.show_targets((Verdict.of(each) for each in answer["targets"]), stream=stream)


QUESTION = Question("routes", (__doc__ or "").splitlines()[0], routes, kind="routes")
OF_TILES = Question("tiles", "Which tile of logits is worth having?", tiles, kind="routes")
