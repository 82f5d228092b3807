"""Records of earlier calls decide how much work is done, and never whether the tolerance holds."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compact.shared import (
    NOISE,
    faults,
    no_records,  # noqa: F401
    plan_of,
    random_case,
    record,
    solve,
)
from oracles import Case, relative, same_bits
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedpo import linear_logprobs, plan
from fusedpo.engine import tolerance
from fusedpo.engine.plan import Plan
from fusedpo.engine.routes import compact

NEEDS = [("hidden", "weight"), ("hidden",), ("weight",), ("hidden", "weight", "bias")]


def wrong_record(case: Case, coherence: float = 1e-6) -> tolerance.Record:
    """One that promises that what is left out costs nothing."""
    kept = record(case, 2e-3)
    kept.coherence.update(hidden=coherence, head=coherence)
    return kept


@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize("tile", [None, (64, 512), (7, 300)], ids=str)
@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: " ".join(needs))
def test_a_breach_is_corrected_at_once_and_counted(needs, tile, rows: int) -> None:
    bias = torch.linspace(-1, 1, 1500) if "bias" in needs else None
    case = random_case(rows, needs=needs, bias=bias)
    kept = wrong_record(case)
    solved = solve(case, 2e-3, tile=tile)
    assert kept.breaches == 1 and max(kept.errors.values()) > 2e-3
    # exactly, not merely within the tolerance
    exact = solve(case, 0.0)
    assert all(relative(solved.gradients[name], exact.gradients[name]) <= 2e-6 for name in needs)
    # and the next one aims better
    assert not faults(case, solve(case, 2e-3, tile=tile), 2e-3)
    assert kept.breaches <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_breach_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    case = random_case()
    case.hidden, case.weight = case.hidden.to(dtype), case.weight.to(dtype)
    kept = wrong_record(case)
    solved, exact = solve(case, 2e-3), solve(case, 0.0)
    assert kept.breaches == 1
    rounding = torch.finfo(dtype).eps
    for name, gradient in exact.gradients.items():
        assert solved.gradients[name].dtype == dtype
        assert relative(solved.gradients[name], gradient) <= 0.1 * rounding


def test_a_record_that_is_far_too_careful_only_costs_time() -> None:
    case = random_case()
    kept = wrong_record(case, 1e6)
    shares = []
    for step in range(15):
        solved = solve(case, 2e-3)
        assert step % 7 or not faults(case, solved, 2e-3)
        shares.append(kept.share)
    assert shares[0] > 0.99 and min(shares) < 0.9


def test_records_settle_and_breaches_stay_rare() -> None:
    case = random_case(400)
    for step in range(25):
        case.upstream = torch.randn(400, generator=torch.Generator().manual_seed(step))
        solved = solve(case, 2e-3)
        if step % 8 == 0:
            assert not faults(case, solved, 2e-3), step
    kept = record(case, 2e-3)
    # an exact backward costs what some four by kept columns save
    assert kept.breaches <= 25 // 4
    # it does not hold back either: the error is a good part of what is allowed
    assert all(error > 0.2 * 2e-3 for error in kept.errors.values())


def test_a_sudden_change_of_data_is_noticed_in_the_same_step() -> None:
    """A model that was certain of every row meets rows of which it knows nothing, and back."""
    kinds = {name: random_case(200, seed=seed) for seed, name in enumerate(("certain", "flat"))}
    kinds["certain"].hidden *= 3
    kinds["flat"].hidden *= 0.2
    kinds["flat"].weight = kinds["certain"].weight
    kinds["mixed"] = random_case(200, seed=2)
    kinds["mixed"].weight = kinds["certain"].weight
    kinds["mixed"].hidden *= torch.where(torch.arange(200) % 2 == 0, 3.0, 0.1)[:, None]
    for name in ("certain", "certain", "certain", "flat", "certain", "mixed", "flat", "certain"):
        case = kinds[name]
        assert not faults(case, solve(case, 2e-3), NOISE * 2e-3), name


def test_a_second_backward_of_a_graph_gives_the_same_bits() -> None:
    """Whatever was learned of the first, or of another call in between."""
    for coherence in (None, 1e-6):
        tolerance.forget()
        case = random_case()
        if coherence is not None:
            wrong_record(case, coherence)
        hidden, weight = (case.leaves()[name].clone().requires_grad_() for name in case.needs)
        total = linear_logprobs(
            hidden, weight, case.labels, memory_budget=plan_of(case, 2e-3), gradient_tolerance=2e-3
        )
        first = torch.autograd.grad(
            (total * case.upstream).sum(), (hidden, weight), retain_graph=True
        )
        solve(case, 2e-3)
        second = torch.autograd.grad((total * case.upstream).sum(), (hidden, weight))
        assert same_bits(first, second)


def test_ten_runs_with_the_same_records_give_the_same_bits() -> None:
    case = random_case()
    found = []
    for _ in range(10):
        tolerance.forget()
        found.append(list(solve(case, 2e-3).gradients.values()))
    assert all(same_bits(each, found[0]) for each in found)


def test_records_are_kept_apart() -> None:
    """By tolerance and by the sizes of the head; of calls that came last."""
    case, other = random_case(), random_case(vocab=700)
    solve(case, 2e-3)
    assert record(case, 2e-3).errors
    assert not record(case, 1e-2).errors and not record(other, 2e-3).errors
    tolerance.forget()
    assert not record(case, 2e-3).errors


def test_what_is_learned_does_not_depend_on_the_tile_of_the_backward() -> None:
    """Slabs are chosen for as many at a time as it has memory for, and columns are audited a block
    of rows at a time; the last of them, here of little gradient, is one of many."""
    case, found = random_case(300), []
    case.upstream[-8:] *= 1e-3
    for back in ((16, 256), (300, 1500)):
        tolerance.forget()
        rows, cols = back
        chosen = dataclasses.replace(plan_of(case, 2e-3, slab=8), back_rows=rows, back_cols=cols)
        solve(case, 2e-3, chosen=chosen)
        found.append(record(case, 2e-3))
    one, all_ = found
    assert one.needed == all_.needed and one.share == all_.share
    assert not one.breaches and not all_.breaches
    for name, coherence in all_.coherence.items():
        assert one.coherence[name] == pytest.approx(coherence, rel=1e-2), name
        assert one.errors[name] == pytest.approx(all_.errors[name], rel=1e-2) != 0, name


def test_many_kinds_of_exact_calls_do_not_push_a_record_out() -> None:
    case = random_case(needs=("hidden",))
    solve(case, 2e-3)
    for vocab in range(2, 72):
        small = random_case(2, vocab, 4)
        linear_logprobs(small.hidden.requires_grad_(), small.weight, small.labels)
    assert record(case, 2e-3).errors


# what the planner makes of it


def planned(share: float | None = None, **options) -> Plan:
    more = {} if share is None else {"kept_share": share}
    return plan(
        1024, 49_152, 576, gradient_tolerance=2e-3, **{"budget": "16MiB", **options}, **more
    )


def test_it_is_taken_where_it_is_expected_to_pay() -> None:
    assert planned().route == "compact" and planned().products < 2
    assert planned(1.0).route != "compact"
    assert planned(0.05).products < planned(0.2).products < planned(0.4).products
    exact = plan(1024, 49_152, 576, budget="16MiB")
    for share in (0.05, 0.3, 0.6, 0.9, 1.0):
        assert planned(share).products <= exact.products


def test_of_tolerance_0_or_through_the_entropy_it_is_not_taken() -> None:
    assert plan(1024, 49_152, 576, budget="16MiB").route != "compact"
    assert planned(entropy=True).route == "recompute"
    assert planned(entropy_value=True).route == "compact"
    for needs in ((), ("bias",)):
        assert planned(needs=needs).route != "compact"


def test_a_frozen_head_pays_for_one_product_of_columns() -> None:
    both, frozen = planned(0.1), planned(0.1, needs=("hidden",))
    assert frozen.route == "compact"
    assert 1.1 < frozen.products < both.products < 1.6


def test_the_plan_says_what_it_does() -> None:
    text = str(planned(0.15))
    assert text.startswith("compact: 1.")
    assert "column sums" in text and " products of 1024 x 49152 x 576" in text


def test_where_all_columns_matter_the_exact_route_is_taken_until_it_is_time_to_look_again() -> None:
    case = random_case(1024, 3000)
    case.hidden *= 0.05
    kept, hidden = record(case, 2e-3), case.hidden.requires_grad_()

    def route() -> str:
        out = linear_logprobs(hidden, case.weight, case.labels, gradient_tolerance=2e-3)
        went = "compact" if kept.skipped == before else "exact"
        if went == "compact":
            out.sum().backward()
        return went

    for _ in range(2):
        before = kept.skipped
        assert route() == "compact"
        assert kept.share == 1.0 and kept.skipped == 0
        for _ in range(64):
            before = kept.skipped
            assert route() == "exact"
        assert kept.skipped == 64


def test_after_few_rows_that_kept_every_column_there_is_a_plan() -> None:
    """Slabs of fewer rows than usual keep less: the share of usual ones is at most all."""
    case = random_case(30, 3000)
    case.hidden *= 0.05
    solve(case, 2e-3)
    assert record(case, 2e-3).kept > 0.99 and record(case, 2e-3).share == 1.0
    hidden = case.hidden.requires_grad_()
    linear_logprobs(hidden, case.weight, case.labels, gradient_tolerance=2e-3).sum().backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["hidden", "upstream"])
def test_what_is_no_number_teaches_a_record_nothing(where: str, bad: float) -> None:
    """One step that overflowed, as under loss scaling, would be 64 calls by the exact route."""
    case = random_case(100, needs=("hidden", "weight"))
    case.hidden *= 3
    solve(case, 2e-3)
    before = copy.deepcopy(record(case, 2e-3))
    assert before.share < 0.5
    good = getattr(case, where).clone()
    getattr(case, where)[7] = bad
    solve(case, 2e-3)
    after = record(case, 2e-3)
    assert after.breaches == 1 and any(map(math.isnan, after.errors.values()))
    for name in ("share", "coherence", "needed", "parts"):
        assert getattr(after, name) == getattr(before, name), name
    setattr(case, where, good)
    assert not faults(case, solve(case, 2e-3), 2e-3)


def test_what_is_no_number_is_not_known_yet() -> None:
    kept = tolerance.Record(2e-3)
    left_out = {"hidden": 1.0, "head": math.nan}
    seen = tolerance.Seen(5, 0.1, math.nan, left_out, {}, {"hidden": math.nan})
    assert not kept.note(seen, 1.0)
    assert kept.breaches == 1 and not kept.known
    assert kept.coherence == tolerance.Record(2e-3).coherence


def test_a_gradient_that_is_beyond_its_range_is_a_breach_of_which_no_size_is_learned() -> None:
    kept = tolerance.Record(2e-3)
    left_out = {"hidden": 1.0}
    assert not kept.note(tolerance.Seen(5, 0.1, 0.2, left_out, {}, {"hidden": math.inf}), 1.0)
    assert kept.breaches == 1 and kept.parts["hidden"] == 1.0
    assert kept.coherence == tolerance.Record(2e-3).coherence


def test_a_gradient_of_zeros_teaches_a_record_nothing() -> None:
    """As of a batch whose advantages are 0: nothing is left out of it, whatever is kept."""
    case = random_case()
    solve(case, 2e-3)
    before = copy.deepcopy(record(case, 2e-3))
    upstream, case.upstream = case.upstream, torch.zeros_like(case.upstream)
    for _ in range(5):
        solve(case, 2e-3)
    after = record(case, 2e-3)
    for name in ("share", "coherence", "needed", "parts", "known"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.errors == {"hidden": 0.0, "head": 0.0} and not after.breaches
    case.upstream = upstream
    assert not faults(case, solve(case, 2e-3), 2e-3)


def test_a_plan_for_another_tolerance_keeps_to_that_of_the_call() -> None:
    case = random_case()
    leaves = {name: t.clone().requires_grad_() for name, t in case.leaves().items()}
    linear_logprobs(
        *leaves.values(), case.labels, memory_budget=plan_of(case, 1e-1), gradient_tolerance=1e-4
    ).backward(case.upstream)
    exact = solve(case, 0.0)
    for name, leaf in leaves.items():
        assert relative(leaf.grad, exact.gradients[name]) <= 1e-4
    assert record(case, 1e-4).errors and not record(case, 1e-1).errors


# calls that are made, or made again, in other ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: " ".join(needs))
def test_a_batch_without_a_scored_token_gives_zeros(needs, dtype: torch.dtype) -> None:
    bias = torch.zeros(1500, dtype=dtype) if "bias" in needs else None
    case = random_case(needs=needs, bias=bias)
    case.hidden, case.weight = case.hidden.to(dtype), case.weight.to(dtype)
    case.labels[:] = -100
    solved = solve(case, 2e-3)
    assert solved.plan.route == "compact" and set(solved.gradients) == set(needs)
    assert all(not gradient.any() for gradient in solved.gradients.values())
    assert not record(case, 2e-3).breaches and not record(case, 2e-3).known


@pytest.mark.parametrize("breached", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_call_that_is_made_again_in_the_backward(use_reentrant: bool, breached: bool) -> None:
    """By then the record has seen other chunks, and the planner may take another route."""
    case = random_case(2000, 3000)
    case.hidden *= 0.05
    if breached:
        wrong_record(case)
    exact = solve(case, 0.0).gradients
    routes = set()
    for _ in range(3):
        hidden, weight = (t.clone().requires_grad_() for t in case.leaves().values())
        total = hidden.new_zeros(())
        for rows in torch.arange(2000).split(500):

            def part(hidden: Tensor, rows: Tensor = rows, weight: Tensor = weight) -> Tensor:
                return linear_logprobs(
                    hidden,
                    weight,
                    case.labels[rows],
                    memory_budget="1MiB",
                    gradient_tolerance=2e-3,
                )

            out = checkpoint(part, hidden[rows], use_reentrant=use_reentrant)
            total = total + (out * case.upstream[rows]).sum()
        total.backward()
        routes.add(record(case, 2e-3).skipped > 0)
        for name, leaf in (("hidden", hidden), ("weight", weight)):
            assert relative(leaf.grad, exact[name]) <= 2e-3, name
    assert True in routes, "or all were by one route"


def test_two_graphs_that_wait_for_each_other() -> None:
    """As the micro-batches of a pipeline: forward, forward, backward, backward."""
    case, flat = random_case(300, 3000), random_case(300, 3000)
    flat.hidden *= 0.05
    flat.weight = case.weight
    truth = [solve(each, 0.0).gradients for each in (case, flat)]
    for _ in range(3):
        leaves = [
            [t.clone().requires_grad_() for t in each.leaves().values()] for each in (case, flat)
        ]
        outs = [
            linear_logprobs(*own, each.labels, gradient_tolerance=2e-3)
            for own, each in zip(leaves, (case, flat), strict=True)
        ]
        for out, each in zip(outs, (case, flat), strict=True):
            out.backward(each.upstream)
        for own, exact in zip(leaves, truth, strict=True):
            for leaf, gradient in zip(own, exact.values(), strict=True):
                assert relative(leaf.grad, gradient) <= NOISE * 2e-3


def test_calls_of_many_threads_share_their_records() -> None:
    """And none is lost, or met while it is put in its place."""
    interval, found = sys.getswitchinterval(), set()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:

            def ask(i: int) -> None:
                found.add(id(tolerance.record_of(2e-3, "cpu", 5, 7)))
                tolerance.record_of(2e-3, "cpu", 10 + i % 50, 7)

            list(pool.map(ask, range(20_000)))
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 1


# what is said of the last backward


def test_a_breach_is_shown_by_the_exact_call_that_it_leads_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = random_case(1024, 3000)
    case.hidden *= 0.05
    kept, leaves = record(case, 2e-3), [t.clone().requires_grad_() for t in case.leaves().values()]
    monkeypatch.setattr(compact.audit, "relative_error", lambda squares: torch.tensor(0.5))
    said = []
    for _ in range(3):
        out = linear_logprobs(*leaves, case.labels, gradient_tolerance=2e-3)
        said.append(kept.metrics()["head/gradient_error"])
        out.backward(case.upstream)
    assert kept.breaches == 1 and kept.skipped == 2
    assert said == [0.0, 0.5, 0.0]


def test_an_exact_call_by_a_plan_that_is_given_is_shown_as_one() -> None:
    case = random_case()
    solve(case, 2e-3)
    assert record(case, 2e-3).metrics()["head/columns_kept"] < 1
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in case.leaves().values()]
        linear_logprobs(
            *leaves,
            case.labels,
            memory_budget=plan_of(case, 0.0, route="recompute"),
            gradient_tolerance=2e-3,
        ).sum().backward()
    assert record(case, 2e-3).metrics()["head/columns_kept"] == 1.0
    assert record(case, 2e-3).metrics()["head/gradient_error"] == 0.0


def test_a_backward_after_an_exact_call_is_the_last_one() -> None:
    """As of two graphs, the second of them exact, whose backwards are one after the other."""
    kept = tolerance.Record(2e-3)
    kept.skip()
    assert kept.note(tolerance.Seen(5, 0.1, 0.2, {"head": 1.0}, {}, {"head": 1e-3}), 1.0)
    assert not kept.owes_exact()
    assert kept.metrics() == {
        "head/columns_kept": 0.1,
        "head/dropped_mass": 0.2,
        "head/gradient_error": 1e-3,
        "head/breaches": 0.0,
    }
