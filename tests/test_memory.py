"""What the engine holds: never the logits, never more than its budget, as the planner says."""

from __future__ import annotations

import gc

import pytest
import torch
from engine import with_tile
from tracking import Allocations

from fusedpo import (
    linear_logprobs,
    linear_token_stats,
    losses,
    plan,
    policy_loss,
    preference_loss,
)
from fusedpo.objective.groups import group_sizes

MIB = 2**20
TOKENS, VOCAB, WIDTH = 1024, 6000, 64


def tensors(
    dtype: torch.dtype, *, masked: bool, frozen: bool, tokens: int = TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, tokens // 4, WIDTH, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH, generator=g) / 8).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(VOCAB, (4, tokens // 4), generator=g)
    if masked:
        labels[:, : tokens // 8] = -100
    return hidden, weight, labels


def held(function, hidden, weight, labels) -> tuple[Allocations, int]:
    """Bytes held beyond the outputs by forward and backward of function() -> (scalar, outputs)."""
    gc.collect()
    with Allocations() as seen:
        seen.know(hidden, weight, labels)
        total, outputs = function()
        total.backward()
    return seen, seen.peak_beyond(hidden.grad, weight.grad, *outputs)


CASES = [
    # dtype, budget, frozen, softcap
    (torch.float32, "2MiB", False, None),
    (torch.float32, "16MiB", False, None),
    (torch.float32, "16MiB", False, 30.0),
    (torch.float32, "64MiB", False, None),
    (torch.float32, "64MiB", True, None),
    (torch.bfloat16, "4MiB", False, None),
    (torch.bfloat16, "16MiB", True, None),
    (torch.bfloat16, "64MiB", False, None),
    (torch.float64, "16MiB", False, None),
]


@pytest.mark.holds(20)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "budget", "frozen", "softcap"), CASES)
def test_holds_what_the_plan_says(dtype, budget, frozen, softcap, masked) -> None:
    hidden, weight, labels = tensors(dtype, masked=masked, frozen=frozen)
    chosen = plan(
        int((labels >= 0).sum()),
        VOCAB,
        WIDTH,
        dtype=dtype,
        budget=budget,
        needs=("hidden",) if frozen else ("hidden", "weight"),
        softcap=softcap is not None,
        gathered=masked,
    )

    def call() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        out = linear_logprobs(hidden, weight, labels, softcap=softcap, memory_budget=budget)
        return out.sum(), (out,)

    seen, bytes_held = held(call, hidden, weight, labels)
    vectors = 8 * labels.numel() * 8  # over all positions: masks, indices, the upstream gradient
    assert bytes_held <= chosen.bytes + vectors, (str(chosen), bytes_held)
    assert bytes_held >= 0.75 * chosen.bytes - vectors, (str(chosen), bytes_held)
    if chosen.route != "retain":
        # logits are kept in fp32 or better, and never more than those of a tile of half of the rows
        assert seen.largest() <= TOKENS * VOCAB // 2 * max(4, dtype.itemsize)


@pytest.mark.holds(20)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("budget", ["16MiB", "24MiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_holds_what_the_plan_says(dtype, budget, pairs, masked) -> None:
    hidden, weight, labels = tensors(dtype, masked=masked, frozen=False)
    hidden = hidden.detach().reshape(2 * pairs, -1, WIDTH).requires_grad_()
    labels = labels.reshape(2 * pairs, -1)
    counts = (labels >= 0).sum(1).tolist()
    chosen = plan(
        sum(counts),
        VOCAB,
        WIDTH,
        dtype=dtype,
        budget=budget,
        scope="pair",
        groups=group_sizes(losses.SimPO(), counts),
        gathered=masked,
        reordered=pairs > 1,
    )

    def call() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        out = preference_loss(losses.SimPO(), hidden, weight, labels, memory_budget=budget)
        return out.loss, (out.loss, out.logprobs)

    _, bytes_held = held(call, hidden, weight, labels)
    vectors = 16 * labels.numel() * 8
    assert bytes_held <= chosen.bytes + vectors, (str(chosen), bytes_held)


@pytest.mark.holds(20)
def test_entropy_keeps_its_budget() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for masked in (False, True):
            hidden, weight, labels = tensors(dtype, masked=masked, frozen=False)
            budget = 4 * MIB

            def call(h=hidden, w=weight, y=labels) -> tuple[torch.Tensor, tuple]:
                stats = linear_token_stats(h, w, y, memory_budget=4 * MIB)
                return (stats.logprob + stats.entropy).sum(), (stats.logprob, stats.entropy)

            _, bytes_held = held(call, hidden, weight, labels)
            assert bytes_held <= budget + 16 * labels.numel() * 8


@pytest.mark.holds(20)
def test_a_reference_in_the_same_call_keeps_the_budget() -> None:
    hidden, weight, labels = tensors(torch.float32, masked=True, frozen=False)
    ref_hidden, ref_weight = hidden.detach() + 1, weight.detach() + 0

    def call() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        out = preference_loss(
            losses.DPO(),
            hidden,
            weight,
            labels,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            memory_budget="8MiB",
        )
        return out.loss, (out.loss, out.logprobs)

    _, bytes_held = held(call, hidden, weight, labels)
    assert bytes_held <= 8 * MIB + 16 * labels.numel() * 8


def test_ignored_rows_are_not_projected() -> None:
    """Half of the rows masked: half of the flops, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(masked: bool) -> int:
        hidden, weight, labels = tensors(torch.float32, masked=masked, frozen=False)
        with FlopCounterMode(display=False) as counter:
            linear_logprobs(hidden, weight, labels, memory_budget="8MiB").sum().backward()
        return counter.get_total_flops()

    assert flops(masked=True) == flops(masked=False) // 2


@pytest.mark.holds(24)
@pytest.mark.parametrize(
    ("route", "needs", "products"),
    [
        ("forward", (), 1),
        ("frozen", ("hidden",), 2),
        ("recompute", ("hidden", "weight"), 4),
        ("recompute", ("weight",), 3),
        ("retain", ("hidden", "weight"), 3),
        ("hybrid", ("hidden", "weight"), 3.25),
        ("hybrid", ("weight",), 2.25),
        ("one_pass", ("hidden", "weight"), 3),
    ],
)
def test_the_products_are_as_many_as_the_plan_says(route, needs, products) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # of four row blocks three are retained
    tokens = 2 * TOKENS if route == "hybrid" else TOKENS
    made = tensors(torch.float32, masked=False, frozen=True, tokens=tokens)
    hidden, weight, labels = (t.detach() for t in made)
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    chosen = plan(
        tokens, VOCAB, WIDTH, budget="1GiB", needs=needs, scope="pair", groups=2, route=route
    )
    assert chosen.products == products
    with FlopCounterMode(display=False) as counter:
        out = preference_loss(losses.SimPO(), hidden, weight, labels, memory_budget=chosen)
        if needs:
            out.loss.backward()
    assert counter.get_total_flops() == products * 2 * tokens * VOCAB * WIDTH


@pytest.mark.holds(24)
@pytest.mark.parametrize(("frozen", "products"), [(True, 4), (False, 5)])
def test_a_gradient_through_the_entropy_costs_what_the_plan_says(frozen, products) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, labels = tensors(torch.float32, masked=False, frozen=frozen)
    needs = ("hidden",) if frozen else ("hidden", "weight")
    chosen = plan(TOKENS, VOCAB, WIDTH, needs=needs, entropy=True)
    assert chosen.products == products
    with FlopCounterMode(display=False) as counter:
        stats = linear_token_stats(hidden, weight, labels, memory_budget=chosen)
        (stats.logprob + stats.entropy).sum().backward()
    assert counter.get_total_flops() == products * 2 * TOKENS * VOCAB * WIDTH


def _with_prompts(sequences: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Responses that cross the borders of slabs, after a prompt that is not scored."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(sequences, 40, 16, generator=g).requires_grad_()
    weight = (torch.randn(300, 16, generator=g) / 4).requires_grad_()
    labels = torch.randint(300, (sequences, 40), generator=g)
    labels[:, :7] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("name", losses.available())
def test_every_loss_takes_three_products_if_its_gradient_is_known_early(name: str) -> None:
    """one_pass, with responses much longer than a slab; nothing of size N x V is retained."""
    from torch.utils.flop_counter import FlopCounterMode

    loss = losses.get(name)
    policy = isinstance(loss, losses.PolicyLoss)
    roles = 1 if policy else len(loss.roles)
    hidden, weight, labels = _with_prompts(6 * roles)
    scored = int((labels >= 0).sum())
    given: dict = {"advantages": torch.linspace(-1, 1, 6 * roles)} if policy else {}
    for key in loss.inputs:
        given[key] = torch.tensor([1.0, 0.0] * 3) if key == "desirable" else torch.full((6,), 0.5)
    if loss.needs_reference:
        given["ref_logprobs"] = torch.full(labels.shape, -5.0)
    structure = loss.gradient_structure
    options = {"scope": structure.scope, "groups": 6, "factors": structure.factors}
    if structure.scope == "batch":
        assert name == "aot"
        chosen = plan(scored, 300, 16, budget="1GiB", **options)
        assert chosen.route == "retain" and chosen.products == 3
    else:
        chosen = with_tile(plan(scored, 300, 16, route="one_pass", **options), 8, 64)
    assert chosen.products == 3
    with FlopCounterMode(display=False) as counter:
        call = policy_loss if policy else preference_loss
        call(loss, hidden, weight, labels, memory_budget=chosen, **given).loss.backward()
    assert counter.get_total_flops() == 3 * 2 * scored * 300 * 16


@pytest.mark.parametrize("name", losses.available())
def test_one_pass_is_chosen_where_its_accumulators_fit(name: str) -> None:
    """At 64k tokens J would take 16 GiB; a loss with few factors is served by [V, H] ones."""
    loss = losses.get(name)
    factors = loss.gradient_structure.factors
    chosen = plan(
        2**16,
        2**16,
        512,
        budget="1200MiB",
        scope=loss.gradient_structure.scope,
        groups=4,
        factors=factors,
    )
    if loss.gradient_structure.scope == "batch":
        assert chosen.route == "hybrid" and 3.5 < chosen.products < 4
    else:
        assert (chosen.route, chosen.products) == ("one_pass", 3)
