"""Every launch that the library makes, bound and compiled for a target, but not run.

    python tests/kernels/launches.py sm_90

The interpreter takes any argument; Triton's launcher looks at each, specializes on it and compiles.
Here the engine runs on tensors of the CPU with a driver that only says what its target is, so that
all of that happens. The numbers that come out mean nothing. Prints how many variants of each kernel
were compiled, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fusedpo.engine.backend
import fusedpo.engine.problem
import fusedpo.engine.score
from fusedpo import linear_logprobs, linear_token_stats, losses, plan, preference_loss
from fusedpo.devices import Device
from fusedpo.engine.stats import STATS
from tools.targets import target_named

VARIANTS: dict[str, set[str]] = {}


class Driver:
    """What a launch asks of a driver before it launches."""

    def __init__(self, target) -> None:
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only() -> None:
    run = JITFunction.run

    def without_a_launch(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        VARIANTS.setdefault(self.fn.__name__, set()).add(kernel.hash)
        return kernel

    JITFunction.run = without_a_launch


def use(dtype: torch.dtype, vocab: int) -> None:
    """The library as a trainer would use it, by every route."""
    hidden = torch.randn(4, 40, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 64, dtype=dtype, requires_grad=True)
    bias = torch.zeros(vocab, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab, (4, 40))
    labels[:, :3] = -100
    args = (hidden, weight, labels)
    for loss, reference in (
        (losses.SimPO(), {}),
        (losses.DPO(), {"ref_hidden": hidden.detach()}),
        (losses.IPO(), {"ref_logprobs": torch.zeros(4)}),
    ):
        for budget in ("200KiB", None):
            options = {"backend": "triton", "memory_budget": budget}
            preference_loss(loss, *args, **options, **reference).loss.backward()
    stats = linear_token_stats(
        *args,
        stats=STATS,
        bias=bias,
        softcap=30.0,
        temperature=torch.ones(labels.shape),
        backend="triton",
    )
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    count = int((labels >= 0).sum())
    for route in ("retain", "hybrid", "recompute", "frozen", "forward"):
        needs = {"forward": (), "frozen": ("hidden",)}.get(route, ("hidden", "weight"))
        shapes = {"dtype": dtype, "needs": needs, "backend": "triton", "device": "cuda"}
        chosen = plan(count, vocab, 64, **shapes, route=route, budget="1GiB")
        cut = {"rows": 16, "cols": 256, "back_rows": 32, "back_cols": 128, "slab": 32}
        chosen = dataclasses.replace(chosen, **cut)
        h = hidden.detach().requires_grad_("hidden" in needs)
        w = weight.detach().requires_grad_("weight" in needs)
        out = linear_logprobs(h, w, labels, backend="triton", memory_budget=chosen)
        if needs:
            out.sum().backward()
    fused = plan(count, vocab, 64, dtype=dtype, needs=(), backend="triton", fused=True)
    with torch.no_grad():
        linear_logprobs(*args, backend="triton", memory_budget=fused)


def main() -> None:
    driver.set_active(Driver(target_named(sys.argv[1]).gpu))
    compile_only()
    # neither a GPU nor the interpreter: say that there is one, and take products as it would
    fusedpo.engine.backend.obstacle = lambda *tensors: None
    fusedpo.engine.batch.operand_dtype = lambda dtype, device: dtype
    fusedpo.engine.problem.as_device = lambda device: Device("cuda")
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vocab in (1000, 1024):
            use(dtype, vocab)
    print(json.dumps({name: len(hashes) for name, hashes in VARIANTS.items()}))


if __name__ == "__main__":
    main()
