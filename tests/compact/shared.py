"""Problems, their solution by kept columns, and what is wrong with one.

The measure is the truth, the naive program in float64; what the exact route is off from it, by
rounding, is allowed on top of the tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import engine
import pytest
import torch
from oracles import Case, naive, relative, row_errors
from torch import Tensor

from fusedpo import linear_logprobs, plan
from fusedpo.benchmarks.states import States
from fusedpo.engine import tolerance
from fusedpo.engine.plan import Plan
from fusedpo.engine.tolerance import Record

TOLERANCES = (1e-2, 2e-3, 2e-4, 1e-5)

# the exact route's own rounding may come once more, and be a little larger
ROUNDINGS = 1.5
# what an estimate of few rows may take for its tolerance, where they are nothing alike
NOISE = 1.25
# of 99 % of the rows, in tolerances
OF_ROWS = 30.0


@pytest.fixture(autouse=True)
def no_records() -> Iterator[None]:
    """No test aims by what another has shown."""
    tolerance.forget()
    yield
    tolerance.forget()


@dataclass
class Solved:
    logprob: Tensor
    gradients: dict[str, Tensor]
    plan: Plan


def case_of(given: States, **options: Any) -> Case:
    """States as a case, with the gradients of a loss that wants some rows likelier."""
    upstream = given.upstream
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(len(given.labels), generator=generator)
    needs = ("hidden", "weight") if given.bias is None else ("hidden", "weight", "bias")
    kwargs = {"needs": needs, "bias": given.bias, **options}
    return Case(given.name, given.hidden, given.weight, given.labels, upstream, **kwargs)


def random_case(
    rows: int = 200, vocab: int = 1500, width: int = 32, *, seed: int = 0, **options: Any
) -> Case:
    """Rows that are certain of a few columns, and flat ones among them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    hidden *= torch.where(torch.arange(rows) % 5 == 4, 0.3, 1.0)[:, None]
    weight = torch.randn(vocab, width, generator=generator).mul_(5 / width**0.5)
    weight *= torch.linspace(1.5, 0.5, vocab)[:, None]
    labels = torch.randint(vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    return Case(f"random {seed}", hidden, weight, labels, upstream, **options)


def record(case: Case, tolerance_: float) -> Record:
    """That of calls on one device with this head."""
    return tolerance.record_of(tolerance_, case.hidden.device.type, *case.weight.shape)


def plan_of(
    case: Case,
    tolerance_: float,
    *,
    backend: str | None = None,
    budget: str = "8GiB",
    tile: tuple[int, int] | None = None,
    slab: int | None = None,
    route: str = "compact",
) -> Plan:
    """A plan of a route; with a tile, rows of a slab, or a tile of the backward of its own."""
    chosen = plan(
        int(case.scored.sum()),
        *case.weight.shape,
        dtype=case.dtype,
        weight_dtype=case.weight.dtype,
        needs=tuple(case.leaves()),
        softcap=case.softcap is not None,
        budget=budget,
        backend=backend or engine.BACKEND,
        route=route,
        gradient_tolerance=tolerance_,
    )
    if tile is not None:
        rows, cols = tile
        changes = {"rows": rows, "cols": cols, "back_rows": 2 * rows, "back_cols": -(-cols // 2)}
        chosen = dataclasses.replace(chosen, **changes)
    return dataclasses.replace(chosen, slab=slab or chosen.slab)


def exact_route(case: Case) -> str:
    return "frozen" if case.needs == ("hidden",) else "recompute"


def solve(case: Case, tolerance_: float, *, chosen: Plan | None = None, **options: Any) -> Solved:
    """By kept columns within the tolerance, of 0 by the exact route."""
    if chosen is None:
        route = "compact" if tolerance_ else exact_route(case)
        chosen = plan_of(case, tolerance_, route=route, **options)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.leaves().items()}
    logprob = linear_logprobs(
        leaves.get("hidden", case.hidden),
        leaves.get("weight", case.weight),
        case.labels,
        **{**case.options, "bias": leaves.get("bias", case.bias)},
        memory_budget=chosen,
        backend=options.get("backend") or engine.BACKEND,
        gradient_tolerance=tolerance_,
    )
    logprob.backward(case.upstream.to(logprob.dtype))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Solved(logprob.detach(), gradients, chosen)


def shortfalls(
    got: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    tolerance_: float,
    rounding: Mapping[str, float] | None = None,
) -> list[str]:
    """What is wrong with gradients within a tolerance, in words.

    99 % of the rows are held to 30 tolerances of their own size, or of the root mean square of all
    rows if that is larger: of rows with little upstream gradient less is kept, and so is of columns
    that are left out.

    Args:
        rounding: the relative error of each that is allowed besides.
    """
    found = []
    for name, exact in truth.items():
        mine = got.get(name)
        if mine is None or mine.shape != exact.shape:
            found.append(f"d{name}: missing, or of another shape")
            continue
        if not bool(mine.isfinite().all()):
            found.append(f"d{name}: not finite")
            continue
        of_rounding = ROUNDINGS * (rounding or {}).get(name, 5e-6)
        allowed = tolerance_ + of_rounding
        if not (error := relative(mine, exact)) <= allowed:
            found.append(f"d{name}: relative error {error:.2e}, allowed {allowed:.2e}")
        if mine.dim() < 2 or not mine.numel() or not bool(exact.any()):
            continue
        gaps, sizes = ((t.double().flatten(0, -2).norm(dim=1)) for t in (mine - exact, exact))
        rows = gaps / sizes.clamp(min=float(sizes.square().mean().sqrt()))
        limit = OF_ROWS * tolerance_ + 4 * of_rounding
        if not float(rows.quantile(0.99)) <= limit:
            found.append(f"d{name}: rows off by {float(rows.quantile(0.99)):.2e}")
    return found


def own_errors(got: Tensor, exact: Tensor) -> Tensor:
    """Relative errors of rows by their own size, of those that are more than rounding."""
    return row_errors(got, exact)[0]


def faults(case: Case, solved: Solved, tolerance_: float) -> list[str]:
    """What is wrong with a solution; its log-probabilities are to be those of tolerance 0."""
    truth = naive(case, torch.float64).gradients
    # tiles decide the order of sums, and so the last bits
    exact = solve(case, 0.0, tile=(solved.plan.rows, solved.plan.cols))
    rounding = {name: relative(exact.gradients[name], value) for name, value in truth.items()}
    found = shortfalls(solved.gradients, truth, tolerance_, rounding)
    if not torch.equal(solved.logprob, exact.logprob):
        found.append("log-probabilities are others")
    return found
