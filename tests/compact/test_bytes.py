"""What kept columns hold is what the plan says: no buffer that is not declared, no list beside, and
no operation's own memory. All that the allocator is asked for counts."""

from __future__ import annotations

import gc

import pytest
import torch
from compact.shared import (
    no_records,  # noqa: F401
    random_case,
    record,
)
from oracles import Case
from tracking import peak_allocated

from fusedpo import linear_logprobs, plan
from fusedpo.engine.plan import BudgetTooSmall, Plan

TOLERANCE = 2e-3
NEEDS = [("hidden", "weight"), ("hidden",), ("weight",), ("hidden", "weight", "bias")]


def planned(case: Case, budget: str) -> Plan:
    return plan(
        int(case.scored.sum()),
        *case.weight.shape,
        dtype=case.dtype,
        needs=case.needs,
        softcap=case.softcap is not None,
        gathered=not bool(case.scored.all()),
        route="compact",
        budget=budget,
        gradient_tolerance=TOLERANCE,
    )


def held(case: Case, chosen: Plan) -> int:
    """Bytes beyond operands and as many as the outputs have, at the worst moment."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.leaves().items()}
    hidden, weight = leaves.get("hidden", case.hidden), leaves.get("weight", case.weight)
    bias, upstream = leaves.get("bias", case.bias), case.upstream
    out: list[torch.Tensor] = []

    def step() -> None:
        options = {**case.options, "bias": bias, "gradient_tolerance": TOLERANCE}
        out.append(linear_logprobs(hidden, weight, case.labels, memory_budget=chosen, **options))
        out[0].backward(upstream)

    gc.collect()
    peak = peak_allocated(step)
    # not beyond these very outputs: a breached gradient is another tensor in the same place
    gradients = (leaf.grad for leaf in leaves.values() if leaf.grad is not None)
    return peak - sum(t.numel() * t.element_size() for t in (*out, *gradients))


def allowed(case: Case, chosen: Plan) -> int:
    """Vectors over positions are not counted, as everywhere: masks, indices, the upstream."""
    return chosen.bytes + 8 * 8 * case.labels.numel()


@pytest.mark.holds(20)
@pytest.mark.parametrize("coherence", [None, 1e-6, 1e6], ids=["", "breach", "all kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: " ".join(needs))
def test_it_holds_what_the_plan_says(needs, dtype, coherence) -> None:
    for masked, budget in ((False, "64MiB"), (True, "7MiB")):
        case = random_case(512, 6000, 64, needs=needs)
        case.hidden, case.weight = case.hidden.to(dtype), case.weight.to(dtype)
        if "bias" in needs:
            case.bias = torch.zeros(6000, dtype=dtype)
        if masked:
            case.labels[::4] = -100
        chosen = planned(case, budget)
        if coherence is not None:
            record(case, TOLERANCE).coherence.update(hidden=coherence, head=coherence)
        found = held(case, chosen)
        assert found <= allowed(case, chosen), (str(chosen), found)
        assert record(case, TOLERANCE).breaches == (coherence == 1e-6)
        record(case, TOLERANCE).breaches = 0


@pytest.mark.holds(20)
@pytest.mark.parametrize(
    "needs", [("hidden", "weight", "bias"), ("hidden",)], ids=["all", "frozen"]
)
@pytest.mark.parametrize("coherence", [None, 1e-6, 1e6], ids=["", "breach", "all kept"])
@pytest.mark.parametrize(
    "shape",
    [(300, 1500, 512), (2500, 1000, 128), (64, 20_000, 32), (130, 257, 33), (1024, 16_384, 96)],
    ids=lambda shape: " x ".join(map(str, shape)),
)
def test_it_holds_what_the_plan_says_of_other_shapes(shape, coherence, needs) -> None:
    """Where the states are wide, the vocabulary is large, or there are many rows."""
    bias = torch.zeros(shape[1]) if "bias" in needs else None
    case, fitting = random_case(*shape, needs=needs, bias=bias, softcap=20.0), 0
    for budget in ("4MiB", "12MiB", "64MiB"):
        try:
            chosen = planned(case, budget)
        except BudgetTooSmall:
            continue
        fitting += 1
        if coherence is not None:
            record(case, TOLERANCE).coherence.update(hidden=coherence, head=coherence)
        found = held(case, chosen)
        assert found <= allowed(case, chosen), (str(chosen), found)
    assert fitting


@pytest.mark.holds(20)
@pytest.mark.parametrize("coherence", [None, 1e-6, 1e6], ids=["", "breach", "all kept"])
@pytest.mark.parametrize(("rows", "width", "budget"), [(512, 16, "8MiB"), (1024, 256, "16MiB")])
def test_a_large_vocabulary_in_a_small_budget(rows, width, budget, coherence) -> None:
    """Lists of kept columns are larger than a tile there, if all of them are made at once, and so
    are flags that are made numbers."""
    case = random_case(rows, 49_152, width)
    chosen = planned(case, budget)
    if coherence is not None:
        record(case, TOLERANCE).coherence.update(hidden=coherence, head=coherence)
    found = held(case, chosen)
    assert chosen.bytes <= chosen.budget and found <= allowed(case, chosen), (str(chosen), found)


@pytest.mark.holds(20)
def test_a_breached_gradient_makes_room_for_the_exact_one() -> None:
    """Both at once would be as much again as the weight, which is most of what there is."""
    case = random_case(64, 8000, 256)
    chosen = planned(case, "4MiB")
    record(case, TOLERANCE).coherence.update(hidden=1e-6, head=1e-6)
    found = held(case, chosen)
    assert record(case, TOLERANCE).breaches == 1
    assert found <= allowed(case, chosen) < 8000 * 256 * 4, (str(chosen), found)


@pytest.mark.holds(20)
def test_small_budgets_are_kept_or_refused() -> None:
    case, fitting = random_case(300, 3000, 32), 0
    case.labels[::3] = -100
    for kilobytes in range(200, 1600, 50):
        try:
            chosen = planned(case, f"{kilobytes}KiB")
        except BudgetTooSmall as error:
            assert error.least > kilobytes * 2**10
            continue
        fitting += 1
        assert chosen.bytes <= kilobytes * 2**10
        assert held(case, chosen) <= allowed(case, chosen)
    assert fitting > 2


@pytest.mark.holds(20)
def test_more_memory_costs_no_products() -> None:
    products = []
    for budget in ("10MiB", "16MiB", "24MiB", "64MiB", "256MiB", "4GiB"):
        chosen = plan(1024, 49_152, 576, budget=budget, gradient_tolerance=TOLERANCE)
        assert chosen.bytes <= chosen.budget
        products.append(chosen.products)
    assert products == sorted(products, reverse=True)
