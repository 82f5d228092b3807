"""Where the tests of this folder run: on a GPU, or, to try the tests themselves, on the CPU.

With FUSEDPO_TEST_DEVICE=cuda they run on the GPU; with cpu in Triton's interpreter, those that are
about a GPU alone excepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import engine
import pytest
import torch
from oracles import HALF, Case, Result, gradient_faults, naive
from torch import Tensor

from fusedpo.engine.plan import Plan

CHOSEN = os.environ.get("FUSEDPO_TEST_DEVICE")
DEVICE = torch.device(CHOSEN or "cuda")
ON_GPU = DEVICE.type == "cuda"
BACKENDS = ("torch", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

needs_device = pytest.mark.skipif(
    CHOSEN is None, reason="needs a CUDA device and FUSEDPO_TEST_DEVICE=cuda"
)
about_gpus = pytest.mark.skipif(not ON_GPU, reason="is about CUDA devices alone")


def there(t: Tensor) -> Tensor:
    """A copy on the device with the same strides, gaps included."""
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
    return out.copy_(t)


def case_there(case: Case) -> Case:
    moved = {
        field.name: there(value)
        for field in dataclasses.fields(case)
        if isinstance(value := getattr(case, field.name), Tensor)
    }
    return dataclasses.replace(case, **moved)


def plan_there(
    case: Case, route: str, backend: str, rows: int | None = None, cols: int | None = None
) -> Plan:
    """engine.plan_of for the device."""
    return engine.plan_of(case, route, rows, cols, backend, budget="64GiB", device=DEVICE)


def routes_for(case: Case) -> list[str]:
    # fp16 products need the loss to be known
    unknown = ON_GPU and case.dtype == torch.float16
    return [r for r in engine.routes_for(case) if not (unknown and r == "one_pass")]


def faults_there(got: Result, case: Case, exact: Result, same: Result) -> list[str]:
    """As oracles.faults, of results that are there already, by what half-precision products allow.

    On a GPU a Jacobian enters its products in half precision, as in the naive program. The two
    errors are then of one size, and either may be the larger.
    """
    found = []
    bound = 2e-6 * max(10.0, exact.largest_logit)
    gap = (got.logprob.double() - exact.logprob).abs().max()
    if not float(gap) <= bound:
        found.append(f"logprob: error {float(gap):.2e}, allowed {bound:.2e}")
    if bool((got.logprob[~case.scored] != 0).any()):
        found.append("logprob: not 0 where ignored")
    roundings = 2 if ON_GPU and case.dtype in HALF else 1
    for name, mine in got.gradients.items():
        found += gradient_faults(
            name,
            mine,
            exact.gradients[name],
            same.gradients[name],
            exact.largest_logit,
            roundings,
        )
    return found


def naive_by_rows(case: Case, dtype: torch.dtype, rows: int) -> Result:
    """The naive program on a block of rows at a time, for logits that no memory holds at once."""
    blocks, weight, largest = [], None, 0.0
    for start in range(0, case.hidden.shape[0], rows):
        part = slice(start, start + rows)
        block = naive(
            dataclasses.replace(
                case,
                hidden=case.hidden[part],
                labels=case.labels[part],
                upstream=case.upstream[part],
            ),
            dtype,
        )
        largest = max(largest, block.largest_logit)
        added = block.gradients.pop("weight").double()
        weight = added if weight is None else weight.add_(added)
        blocks.append(block)
    return Result(
        torch.cat([block.logprob for block in blocks]),
        gradients={
            "hidden": torch.cat([block.gradients["hidden"] for block in blocks]),
            "weight": weight.to(dtype),
        },
        largest_logit=largest,
    )


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """An error wherever the host waits for the device, as far as PyTorch notices."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
