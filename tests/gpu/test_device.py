"""What only a device can show: waits, streams, other devices, memory, and results that repeat."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from gpu.place import (
    BACKENDS,
    DEVICE,
    ON_GPU,
    about_gpus,
    needs_device,
    no_waiting,
    synchronize,
)
from torch import Tensor

from fusedpo import linear_logprobs, losses, plan, preference_loss
from fusedpo.engine.plan import Plan

pytestmark = needs_device

ROUTES = ("forward", "frozen", "retain", "hybrid", "one_pass", "recompute")
PAIRS, LENGTH, VOCAB, WIDTH = (4, 100, 5000, 128) if ON_GPU else (2, 6, 120, 16)
MASKED = LENGTH // 3
COUNTS = [LENGTH - MASKED] * (2 * PAIRS)


def inputs(
    device: torch.device | str = DEVICE, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH, generator=g).to(device, dtype)
    weight = (torch.randn(VOCAB, WIDTH, generator=g) * WIDTH**-0.5).to(device, dtype)
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=g)
    labels[:, :MASKED] = -100
    return hidden, weight, labels.to(device)


def plan_of(route: str, backend: str, device: torch.device | str = DEVICE, **options) -> Plan:
    needs = {"forward": (), "frozen": ("hidden",)}.get(route, ("hidden", "weight"))
    return plan(
        sum(COUNTS),
        VOCAB,
        WIDTH,
        dtype=torch.bfloat16,
        needs=needs,
        scope="pair",
        groups=PAIRS,
        device=device,
        backend=backend,
        route=route,
        **{"budget": "4GiB", **options},
    )


def step(
    chosen: Plan,
    backend: str,
    given: tuple[Tensor, Tensor, Tensor],
    loss: losses.Loss | None = None,
    **options,
) -> tuple[Tensor, ...]:
    """Loss, log-probabilities and gradients of one step by the plan's route."""
    hidden, weight, labels = given
    hidden = hidden.detach().requires_grad_("hidden" in chosen.needs)
    weight = weight.detach().requires_grad_("weight" in chosen.needs)
    out = preference_loss(
        loss or losses.SimPO(),
        hidden,
        weight,
        labels,
        memory_budget=chosen,
        backend=backend,
        **options,
    )
    if chosen.needs:
        out.loss.backward()
    gradients = [t.grad for t in (hidden, weight) if t.grad is not None]
    return out.loss.detach(), out.logprobs, *gradients


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_step_repeats_bit_for_bit(route: str, backend: str) -> None:
    chosen, given = plan_of(route, backend), inputs()
    first = step(chosen, backend, given)
    for _ in range(10 if ON_GPU else 1):
        assert same(first, step(chosen, backend, given))


def test_the_fused_forward_repeats_bit_for_bit() -> None:
    chosen, given = plan_of("forward", "triton", fused=True), inputs()
    first = step(chosen, "triton", given)
    for _ in range(10 if ON_GPU else 1):
        assert same(first, step(chosen, "triton", given))


@pytest.mark.parametrize("loss", [losses.DPO(), losses.SimPO()], ids=lambda x: type(x).__name__)
def test_the_tail_repeats_bit_for_bit(loss: losses.Loss) -> None:
    pytest.importorskip("triton")
    from fusedpo.kernels.tail import tail

    count, length = (64, 512) if ON_GPU else (4, 9)
    logprob = -torch.rand(count * length, device=DEVICE)
    starts = torch.arange(count, device=DEVICE) * length
    lengths = torch.full((count,), length, device=DEVICE)
    first = tail(logprob, starts, lengths, **asdict(loss.tail))
    for _ in range(10 if ON_GPU else 1):
        assert same(first, tail(logprob, starts, lengths, **asdict(loss.tail)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sliced", [False, True])
def test_nothing_waits_for_the_device(route: str, backend: str, sliced: bool) -> None:
    """With the counts handed over; wrong ones would be asserted on the device."""
    chosen, given = plan_of(route, backend), inputs()
    if sliced:  # as hidden[:, :-1], which cannot be flattened
        given = (torch.cat((given[0], given[0][:, :1]), 1)[:, :-1], *given[1:])
    expected = step(chosen, backend, given)  # compiles, and fills caches
    step(chosen, backend, given, num_scored=COUNTS)
    with no_waiting():
        found = step(chosen, backend, given, num_scored=COUNTS)
    assert same(expected, found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device_with_a_reference(backend: str) -> None:
    given = inputs()
    chosen = plan_of("recompute", backend)
    options = {"ref_hidden": given[0] * 0.9, "num_scored": COUNTS}
    expected = step(chosen, backend, given, losses.DPO(), **options)
    with no_waiting():
        found = step(chosen, backend, given, losses.DPO(), **options)
    assert same(expected, found)


@about_gpus
def test_waiting_is_found_out() -> None:
    values = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        values.sum().item()
    assert torch.cuda.get_sync_debug_mode() == 0


@about_gpus
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ROUTES)
def test_everything_runs_on_the_current_stream(route: str, backend: str) -> None:
    """The inputs are written there after a while: what ran elsewhere would read NaN."""
    chosen, given = plan_of(route, backend), inputs()
    expected = step(chosen, backend, given)
    late = tuple(torch.full_like(t, torch.nan) for t in given[:2])
    stream = torch.cuda.Stream(DEVICE)
    synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for empty, full in zip(late, given[:2], strict=True):
            empty.copy_(full)
        found = step(chosen, backend, (*late, given[2]), num_scored=COUNTS)
    stream.synchronize()
    assert same(expected, found)


@about_gpus
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ROUTES)
def test_another_device_than_the_current_one(route: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = {}
    for name in ("cuda:0", "cuda:1"):
        with torch.cuda.device(0):
            found[name] = step(plan_of(route, backend, name), backend, inputs(name))
            assert all(t.device == torch.device(name) for t in found[name])
            assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert same(found["cuda:0"], found["cuda:1"])


def test_auto_takes_the_kernels_on_a_gpu() -> None:
    given = inputs()
    expected = linear_logprobs(*given, backend="triton" if ON_GPU else "torch")
    assert torch.equal(linear_logprobs(*given), expected)


@about_gpus
def test_a_wrong_label_is_an_error_that_names_it() -> None:
    """Without counts the labels are read, so the error is an exception and not an assertion."""
    hidden, weight, labels = inputs()
    labels[1, -1] = VOCAB
    with pytest.raises(ValueError, match=rf"labels: expected class numbers in \[0, {VOCAB}\)"):
        linear_logprobs(hidden, weight, labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("route", "budget"),
    [
        ("forward", "32MiB"),
        ("frozen", "64MiB"),
        ("recompute", "32MiB"),
        ("recompute", "64MiB"),
        ("recompute", "256MiB"),
        ("retain", "2GiB"),
        ("one_pass", "2GiB"),
    ],
)
def test_memory_is_kept(route: str, budget: str, backend: str) -> None:
    """The most that the allocator hands out beyond inputs and outputs is what the plan says."""
    pairs, length, vocab, width = (2, 1024, 50_000, 512) if ON_GPU else (2, 6, 120, 16)
    tokens = 2 * pairs * length
    needs = {"forward": (), "frozen": ("hidden",)}.get(route, ("hidden", "weight"))
    chosen = plan(
        tokens,
        vocab,
        width,
        dtype=torch.bfloat16,
        needs=needs,
        scope="pair",
        groups=pairs,
        gathered=route == "one_pass",
        device=DEVICE,
        backend=backend,
        route=route,
        budget=budget,
    )
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * pairs, length, width, generator=g).to(DEVICE, torch.bfloat16)
    weight = (torch.randn(vocab, width, generator=g) / 20).to(DEVICE, torch.bfloat16)
    labels = torch.randint(vocab, (2 * pairs, length), generator=g).to(DEVICE)
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    counts = [length] * (2 * pairs)

    def forward() -> Tensor:
        return preference_loss(
            losses.SimPO(),
            hidden,
            weight,
            labels,
            memory_budget=chosen,
            backend=backend,
            num_scored=counts,
        ).loss

    def peak_of(part, returned: int) -> int:
        """Bytes beyond what there was before the step and what is returned of it."""
        synchronize()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats(DEVICE)
        part()
        synchronize()
        return torch.cuda.max_memory_allocated(DEVICE) - before - returned if ON_GPU else 0

    found: list[Tensor] = []
    for _ in range(2):  # the first compiles, and allocates what libraries keep
        hidden.grad = weight.grad = None
        found.clear()
        synchronize()
        before = torch.cuda.memory_allocated(DEVICE) if ON_GPU else 0
        # without room in full precision, the hidden gradient waits where it will be returned
        waits_in_output = bool(needs) and route != "retain" and not chosen.wide
        held = [peak_of(lambda: found.append(forward()), hidden.nbytes * waits_in_output)]
        if needs:
            gradients = hidden.nbytes + weight.nbytes * ("weight" in needs)
            held.append(peak_of(lambda: found[0].backward(), gradients))
    # masks, indices and the upstream gradient over all positions; blocks of whole half kilobytes
    vectors = 16 * 8 * labels.numel() + 2**18
    assert max(held) <= chosen.bytes + vectors, (str(chosen), held)
