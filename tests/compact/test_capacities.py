"""Where a backward waits for nothing, as on a GPU: capacities, and estimates a step behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine
import pytest
import torch
from compact.shared import (
    no_records,  # noqa: F401
    plan_of,
    random_case,
    record,
    shortfalls,
)
from oracles import Case, naive
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedpo import linear_logprobs
from fusedpo.engine.plan import Plan
from fusedpo.engine.tolerance import Record, Seen

TOLERANCE = 1e-2
# they say how many there are, or what a number is, which only the device knows
WAITING = ("nonzero", "_local_scalar_dense", "unique", "masked_select")


class NothingWaits(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert not any(name in str(function) for name in WAITING), f"{function} waits"
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.as_on_a_gpu(monkeypatch)


def step(case: Case, memory_budget: Plan | None = None) -> tuple[dict[str, Tensor], str]:
    """Gradients of a call, as it is planned if no plan is given, and its route."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.leaves().items()}
    skipped = record(case, TOLERANCE).skipped
    out = linear_logprobs(
        leaves["hidden"],
        leaves["weight"],
        case.labels,
        gradient_tolerance=TOLERANCE,
        memory_budget=memory_budget,
    )
    with NothingWaits():
        out.backward(case.upstream)
    route = "compact" if record(case, TOLERANCE).skipped == skipped else "exact"
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, route


def of_few_columns() -> Case:
    """Rows that are nearly sure of some of 400 columns, whatever their labels."""
    case = random_case(300, 6000)
    case.weight[400:] *= 0.1
    return case


# what nobody plans anew learns from its calls, too
given = pytest.mark.parametrize("given", [False, True], ids=["planned", "given a plan"])


@given
@pytest.mark.holds(20)
def test_the_first_call_is_exact_and_the_later_ones_are_within_the_tolerance(given: bool) -> None:
    case = of_few_columns()
    chosen = plan_of(case, TOLERANCE) if given else None
    truth = naive(case, torch.float64).gradients
    routes = []
    for i in range(10):
        found, route = step(case, chosen)
        routes.append(route)
        assert not shortfalls(found, truth, TOLERANCE if i else 1e-6)
    assert routes[0] == "compact" and routes[-2:] == ["compact", "compact"]
    assert 1 / 16 <= record(case, TOLERANCE).kept < 1


def seen(needed: float, error: float) -> Seen:
    names = ("hidden", "head")
    return Seen(
        300, 0.1, 0.0, *(dict.fromkeys(names, value) for value in (1e-6, needed, error * TOLERANCE))
    )


def test_capacities_go_up_at_once_and_down_by_halves_where_the_error_has_room() -> None:
    kept = Record(TOLERANCE)
    parts = []
    for needed, error in ((0.01, 0.1), (0.01, 0.5), (0.01, 0.1), (0.01, 0.1), (0.01, 0.1)):
        kept.note(seen(needed, error), 1.0)
        parts.append(kept.parts["hidden"])
    assert parts == [1 / 4, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
    kept.note(seen(0.3, 0.1), 1.0)
    assert kept.parts["hidden"] == 0.5
    kept.note(seen(0.01, 1.5), 1.0)
    assert kept.parts["hidden"] == 1.0, "a breach"
    assert kept.capacities(16_000, 100) == {"hidden": 16_000, "head": 16_000}


def test_capacities_have_room_for_every_target_of_a_slab() -> None:
    kept = Record(TOLERANCE, parts={"hidden": 1 / 16, "head": 1 / 8})
    assert kept.capacities(16_000, 100) == {"hidden": 2000, "head": 2000}
    assert kept.capacities(16_000, 3000)["head"] == 3000


@given
@pytest.mark.holds(20)
def test_the_call_after_a_breach_is_exact(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = of_few_columns()
    chosen = plan_of(case, TOLERANCE) if given else None
    step(case, chosen)
    step(case, chosen)
    few: Callable[..., dict[str, int]] = lambda *_: {"hidden": 310, "head": 305}  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(Record, "capacities", few)
        found, route = step(case, chosen)
    assert route == "compact"
    truth = naive(case, torch.float64).gradients
    assert shortfalls(found, truth, TOLERANCE), "so few columns are a breach"
    with torch.no_grad():  # as of a reference, which takes nothing from the step after it
        linear_logprobs(case.hidden, case.weight, case.labels, gradient_tolerance=TOLERANCE)
    found, route = step(case, chosen)
    assert route == "exact" and record(case, TOLERANCE).breaches == 1
    assert not shortfalls(found, truth, 1e-6)
    found, route = step(case, chosen)
    assert route == "compact" and not shortfalls(found, truth, TOLERANCE)


def test_a_breach_is_not_forgotten_for_another_backward_of_the_same_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of two heads, or of a head that two losses use."""
    case = of_few_columns()
    step(case)
    step(case)
    few: Callable[..., dict[str, int]] = lambda *_: {"hidden": 310, "head": 305}  # noqa: E731
    outs = []
    for capacities in (few, Record.capacities):
        leaves = [t.clone().requires_grad_() for t in case.leaves().values()]
        with monkeypatch.context() as patched:
            patched.setattr(Record, "capacities", capacities)
            outs.append(linear_logprobs(*leaves, case.labels, gradient_tolerance=TOLERANCE))
    for out in outs:
        out.backward(case.upstream)
    _, route = step(case)
    assert route == "exact" and record(case, TOLERANCE).breaches == 1


def test_what_ranks_decide_by_together_is_waited_for() -> None:
    """Or one would have read what is still to arrive at another, and take another route."""

    class Event:
        waited = False

        def query(self) -> bool:
            return self.waited

        def synchronize(self) -> None:
            self.waited = True

    for together in (False, True):
        kept, found = Record(TOLERANCE, together=together), seen(0.01, 2.0)
        numbers = torch.tensor([0.0] * 9, dtype=torch.float64)
        numbers[0], numbers[-2:] = 300, 2 * TOLERANCE
        kept._coming.append((found, 1.0, numbers, Event()))
        assert kept.owes_exact() is together and kept.breaches == together
