"""On a GPU, the engine and the losses equal the naive program in float64, by every route."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from engine import generate, run
from gpu.place import (
    BACKENDS,
    DEVICE,
    DTYPES,
    ON_GPU,
    case_there,
    faults_there,
    naive_by_rows,
    needs_device,
    plan_there,
    routes_for,
)
from oracles import Case, naive, relative

from fusedpo import linear_logprobs, linear_token_stats, losses, plan, preference_loss
from fusedpo.engine.stats import STATS

pytestmark = needs_device

SEEDS = 16 if ON_GPU else 1
TILES = ((50, 150), (7, 200), (16, 64), (17, 128), (64, 4096))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_route_equals_the_naive_program(seed: int, dtype: torch.dtype, backend: str) -> None:
    """Values and gradients of generated cases: heads, layouts, masks, upstream scales."""
    case = case_there(generate(seed, dtype=dtype))
    count = int(case.scored.sum())
    starts = sorted({0, count // 3, count // 2, count})
    exact, same = naive(case, torch.float64), naive(case, dtype)
    for i, route in enumerate(routes_for(case)):
        chosen = plan_there(case, route, backend, *TILES[(seed + i) % len(TILES)])
        result = run(case, chosen, starts=starts, backend=backend)
        assert result.logprob.device.type == DEVICE.type
        found = faults_there(result, case, exact, same)
        assert not found, (case.name, str(chosen), found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_as_the_planner_chooses_them(dtype: torch.dtype, backend: str) -> None:
    """Sizes at which a GPU's own tiles are cut, forward and backward, at several budgets."""
    positions, vocab, width = (3000, 40_000, 256) if ON_GPU else (20, 300, 16)
    case = case_of(positions, vocab, width, dtype)
    exact, same = naive(case, torch.float64), naive(case, dtype)
    for budget in ("24MiB", "64MiB", "256MiB", "4GiB"):
        result = run(case, budget, backend=backend)
        # the smallest budgets cost the hidden gradient a rounding, for which this allows
        found = faults_there(result, case, exact, same)
        assert not found, (budget, found)


def case_of(positions: int, vocab: int, width: int, dtype: torch.dtype) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    options = {"generator": g, "device": DEVICE}
    return Case(
        f"{positions} x {vocab} x {width}",
        torch.randn(positions, width, **options).to(dtype),
        (torch.randn(vocab, width, **options) * width**-0.5).to(dtype),
        torch.randint(vocab, (positions,), **options),
        torch.randn(positions, **options) / positions,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_has_its_gradient(backend: str) -> None:
    for seed in range(8 if ON_GPU else 1):
        case = case_there(generate(1000 + seed, dtype=torch.float32))
        case.upstream_entropy = 0.1 * torch.ones_like(case.upstream)
        exact, same = naive(case, torch.float64), naive(case, case.dtype)
        for split in (False, True):
            chosen = plan_there(case, "recompute", backend, *TILES[seed % len(TILES)])
            result = run(case, dataclasses.replace(chosen, split=split), backend=backend)
            assert not (found := faults_there(result, case, exact, same)), (case.name, found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_forward_has_every_statistic(dtype: torch.dtype) -> None:
    """One kernel without logits in memory, against tiles, at sizes that cross its tiles."""
    for positions, vocab, width in (
        ((700, 5001, 192), (130, 300, 64), (5, 40_000, 72)) if ON_GPU else ((20, 300, 24),)
    ):
        case = case_of(positions, vocab, width, dtype)
        chosen = plan(
            positions,
            vocab,
            width,
            dtype=dtype,
            needs=(),
            entropy=True,
            backend="triton",
            device=DEVICE,
            fused=True,
        )
        found = {
            kind: linear_token_stats(
                case.hidden,
                case.weight,
                case.labels,
                stats=STATS,
                memory_budget=budget,
                backend=backend,
            )
            for kind, budget, backend in (("fused", chosen, "triton"), ("tiled", None, "torch"))
        }
        for name in STATS:
            got, expected = (getattr(found[kind], name).double() for kind in ("fused", "tiled"))
            assert relative(got, expected) < 2e-5, (name, positions, vocab)


def test_more_logits_than_31_bits_can_number() -> None:
    """One tile of them all, so that a kernel's own offsets are as large as they can be.

    One test for all routes: side by side in several processes they would not fit.
    """
    positions, vocab, width = (16_512, 131_072, 64) if ON_GPU else (24, 300, 16)
    if ON_GPU:
        assert positions * vocab > 2**31
        if torch.cuda.mem_get_info(DEVICE)[0] < 60e9:
            pytest.skip("needs 60 GB of free memory on the device")
    case = case_of(positions, vocab, width, torch.bfloat16)
    block = 1024 if ON_GPU else 10
    exact = naive_by_rows(case, torch.float64, block)
    same = naive_by_rows(case, torch.bfloat16, block)
    whole = {"rows": positions, "back_rows": positions, "slab": positions}
    for route in ("retain", "hybrid", "recompute", "one_pass"):
        chosen = plan_there(case, route, "triton")
        chosen = dataclasses.replace(chosen, **whole, cols=vocab, back_cols=vocab)
        result = run(case, chosen, backend="triton")
        assert not (found := faults_there(result, case, exact, same)), (route, found)
        del result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_equal_those_from_full_logits(
    dtype: torch.dtype, backend: str, reduction: str
) -> None:
    loss = losses.DPO() if reduction == "sum" else losses.SimPO()
    pairs, length, vocab, width = (4, 64, 1000, 64) if ON_GPU else (2, 6, 100, 16)
    case = case_of(2 * pairs * length, vocab, width, dtype)
    hidden = case.hidden.view(2 * pairs, length, width).requires_grad_()
    labels = case.labels.view(2 * pairs, length)
    labels[:, : length // 3] = -100
    weight = case.weight.requires_grad_()
    g = torch.Generator().manual_seed(1)
    reference = {"ref_logprobs": -torch.rand(2 * pairs, generator=g).to(DEVICE) * length}
    if not loss.needs_reference:
        reference = {}
    out = preference_loss(loss, hidden, weight, labels, backend=backend, **reference)
    out.loss.backward()

    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logprob = (exact_hidden @ exact_weight.T).log_softmax(-1)
    scored = labels != -100
    taken = logprob.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored
    score = taken.sum(-1) / (scored.sum(-1) if loss.formula_structure.unit == "mean_margin" else 1)
    score = score - reference.get("ref_logprobs", torch.zeros_like(score)).double()
    chosen, rejected = score.chunk(2)
    exact = loss.tail.of_margin(chosen - rejected).mean()
    exact.backward()
    assert relative(out.loss, exact) < 1e-5
    # a gradient in half precision is rounded, and so is what it is made of
    allowed = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert relative(hidden.grad, exact_hidden.grad) < allowed
    assert relative(weight.grad, exact_weight.grad) < allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_equal_policies_give_log_two_to_the_last_bit(
    dtype: torch.dtype, backend: str, frozen: bool
) -> None:
    positions, vocab, width = (8 * 200, 3001, 64) if ON_GPU else (8 * 5, 70, 16)
    case = case_of(positions, vocab, width, dtype)
    hidden, labels = case.hidden.view(8, -1, width), case.labels.view(8, -1)
    labels[::2, :2] = -100
    hidden.requires_grad_()
    case.weight.requires_grad_(not frozen)
    for budget in (None, "2MiB"):
        out = preference_loss(
            losses.DPO(),
            hidden,
            case.weight,
            labels,
            ref_hidden=hidden,
            memory_budget=budget,
            backend=backend,
        )
        assert out.loss.item() == torch.tensor(math.log(2.0)).item()
        assert (out.metrics["rewards/margins"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ["forward", "frozen", "retain", "hybrid", "recompute"])
def test_ignored_rows_are_left_out(route: str, backend: str) -> None:
    """Bit for bit what the scored rows alone give; NaN in the others does not matter."""
    positions, vocab, width = (600, 2000, 64) if ON_GPU else (24, 90, 16)
    case = case_of(positions, vocab, width, torch.bfloat16)
    case.needs = ("hidden",) if route == "frozen" else ("hidden", "weight")
    kept = torch.arange(positions, device=DEVICE) % 3 == 1
    small = dataclasses.replace(
        case, hidden=case.hidden[kept], labels=case.labels[kept], upstream=case.upstream[kept]
    )
    case.labels = case.labels.masked_fill(~kept, -100)
    case.hidden = case.hidden.masked_fill(~kept[:, None], torch.nan)
    tile = (32, 128)
    whole, alone = (
        run(c, plan_there(c, route, backend, *tile), backend=backend) for c in (case, small)
    )
    assert torch.equal(whole.logprob[kept], alone.logprob)
    assert (whole.logprob[~kept] == 0).all()
    if "hidden" in whole.gradients:
        assert torch.equal(whole.gradients["hidden"][kept], alone.gradients["hidden"])
        assert (whole.gradients["hidden"][~kept] == 0).all()
    if "weight" in whole.gradients:
        assert torch.equal(whole.gradients["weight"], alone.gradients["weight"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_token_keeps_its_digits(backend: str) -> None:
    vocab, margin = 1000, 40.0
    weight = torch.zeros(vocab, 16, device=DEVICE)
    weight[7, 0] = margin
    hidden = torch.zeros(1, 16, device=DEVICE)
    hidden[0, 0] = 1.0
    hidden.requires_grad_()
    logprob = linear_logprobs(hidden, weight, torch.tensor([7], device=DEVICE), backend=backend)
    logprob.sum().backward()
    others = (vocab - 1) * math.exp(-margin)
    assert abs(float(logprob.detach()) / -math.log1p(others) - 1) < 1e-5
    assert abs(float(hidden.grad[0, 0]) / (margin * others / (1 + others)) - 1) < 1e-5
