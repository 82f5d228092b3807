"""One batch, two ways: the fused loss, and the same loss from full logits in plain PyTorch.

Time is the fastest of interleaved rounds, as other work on the machine only ever adds. Memory is
measured one way at a time in a process of its own: on the CPU the highest resident set (which also
sees what libraries hold for themselves), on a GPU the most that PyTorch's allocator held.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fusedpo import losses
from fusedpo.checks import bad_type
from fusedpo.engine.planner import plan
from fusedpo.functional import preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses.base import Loss, PreferenceLoss
from fusedpo.losses.scores import Scores

# glibc otherwise keeps large blocks that were freed, and the peak counts what nobody holds
_RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024),
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True)
class Batch:
    """What a loss is computed from.

    Attributes:
        loss: a loss of pairs.
        hidden: [B, T, H], detached.
        head: its weight is [V, H], detached.
        labels: [B, T] as Hugging Face gives them, -100 where not scored.
        ref_logprobs: [B] sums under the reference, or None.
        memory_budget: bytes the fused loss may hold.
        gradient_tolerance: the relative error that its gradients may have.
    """

    loss: PreferenceLoss
    hidden: Tensor
    head: Head
    labels: Tensor
    ref_logprobs: Tensor | None = None
    memory_budget: int | float | str | None = None
    gradient_tolerance: float = 0.0

    @property
    def scored(self) -> int:
        """Tokens that enter the loss."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Way:
    """How one way did.

    Attributes:
        loss: value.
        hidden_gap, weight_gap: largest difference of its gradient to the fused one, over the
            largest entry of the gradient.
        seconds: forward and backward, the fastest round.
        peak_bytes: memory beyond the batch and the two gradients, or None where not measured.
    """

    loss: float
    hidden_gap: float
    weight_gap: float
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """The ways by name, the fused one first, and what they were run on."""

    ways: dict[str, Way]
    pairs: int
    positions: int
    scored: int
    vocab: int
    hidden: int
    logits_bytes: int
    memory_budget: int
    device: str
    threads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


FUSED, FULL, SCORED_ONLY = "fused", "full logits", "full logits, scored tokens only"


def fused(batch: Batch) -> Tensor:
    """The loss without the logits."""
    return preference_loss(
        batch.loss,
        batch.hidden,
        batch.head.weight,
        batch.labels,
        shift=True,
        ref_logprobs=batch.ref_logprobs,
        memory_budget=batch.memory_budget,
        gradient_tolerance=batch.gradient_tolerance,
        **batch.head.options(),
    ).loss


def full_logits(batch: Batch, *, scored_only: bool = False) -> Tensor:
    """The loss as a plain program has it: logits, log-softmax, gather, mask, formula.

    Args:
        batch: the inputs.
        scored_only: drop prompt and padding before the head, rather than mask them afterwards.
    """
    targets = batch.labels[:, 1:]
    mask = targets != IGNORE_INDEX
    hidden = batch.hidden[:, :-1]
    if scored_only:
        logprobs = batch.head.logits(hidden[mask]).log_softmax(-1)
        taken = logprobs.gather(-1, targets[mask][:, None])[:, 0]
        rows = mask.nonzero()[:, 0]
        sums = taken.new_zeros(len(targets)).index_add(0, rows, taken)
    else:
        logprobs = batch.head.logits(hidden).log_softmax(-1)
        taken = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        sums = (taken * mask).sum(1)
    pairs = len(targets) // 2
    scores = Scores(sums, mask.sum(1).to(sums.dtype), batch.ref_logprobs)
    chosen, rejected = scores[:pairs], scores[pairs:]
    loss = batch.loss.per_example(chosen, rejected).mean()
    if batch.loss.nll_weight:
        loss = loss - batch.loss.nll_weight * chosen.logp.sum() / chosen.length.sum()
    return loss


WAYS: dict[str, Callable[[Batch], Tensor]] = {
    FUSED: fused,
    FULL: full_logits,
    SCORED_ONLY: lambda batch: full_logits(batch, scored_only=True),
}


def small_budget(batch: Batch, fraction: float = 1 / 16) -> int:
    """Bytes: this fraction of the logits of all positions, or the least that will do."""
    vocab, hidden = batch.head.weight.shape
    budget = max(1, int(fraction * batch.labels[:, 1:].numel() * vocab * 4))
    while True:
        try:
            plan(
                batch.scored,
                vocab,
                hidden,
                dtype=batch.hidden.dtype,
                budget=budget,
                scope=batch.loss.gradient_structure.scope,
                groups=len(batch.labels) // 2,
                softcap=batch.head.softcap is not None,
                device=batch.hidden.device,
            )
        except ValueError:
            budget *= 2
        else:
            return budget


def is_comparable(loss: Loss) -> TypeGuard[PreferenceLoss]:
    """Whether the program with full logits is written for this loss: one of pairs, with a name."""
    return (
        isinstance(loss, PreferenceLoss)
        and type(loss) in losses.available().values()
        and loss.roles == ("chosen", "rejected")
        and not loss.inputs
    )


def compare(batch: Batch, *, rounds: int = 9) -> Comparison:
    """Run the batch every way: loss, gradients, time and peak memory.

    Args:
        batch: without a memory budget it gets a small one, see ``small_budget``.
        rounds: timed rounds, each of which runs every way once.
    """
    if not is_comparable(batch.loss):
        raise bad_type("loss", "a loss of pairs", repr(batch.loss))
    if batch.memory_budget is None:
        batch = replace(batch, memory_budget=small_budget(batch))
    results = {name: _step(way, batch) for name, way in WAYS.items()}
    seconds = _interleaved(batch, rounds)
    _, fused_hidden, fused_weight = results[FUSED]
    ways = {
        name: Way(
            loss=float(loss),
            hidden_gap=_gap(hidden, fused_hidden),
            weight_gap=_gap(weight, fused_weight),
            seconds=seconds[name],
            peak_bytes=_peak_in_fresh_process(name, batch),
        )
        for name, (loss, hidden, weight) in results.items()
    }
    vocab, hidden_size = batch.head.weight.shape
    budget = plan(1, 1, 1, budget=batch.memory_budget, device=batch.hidden.device).budget
    return Comparison(
        ways=ways,
        pairs=len(batch.labels) // 2,
        positions=batch.labels.numel(),
        scored=batch.scored,
        vocab=vocab,
        hidden=hidden_size,
        logits_bytes=batch.labels[:, 1:].numel() * vocab * 4,
        memory_budget=budget,
        device=str(batch.hidden.device),
        threads=torch.get_num_threads(),
    )


def _step(way: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients for hidden states and weight."""
    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.head.weight.detach().requires_grad_()
    loss = way(replace(batch, hidden=hidden, head=replace(batch.head, weight=weight)))
    hidden_gradient, weight_gradient = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), hidden_gradient, weight_gradient


def _gap(gradient: Tensor, fused_gradient: Tensor) -> float:
    scale = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
    return float((gradient - fused_gradient).abs().amax() / scale)


def _interleaved(batch: Batch, rounds: int) -> dict[str, float]:
    """Fastest seconds; a slow spell of the machine falls on every way."""
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    names = list(WAYS)
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            _synchronize(batch.hidden.device)
            start = time.perf_counter()
            _step(WAYS[name], batch)
            _synchronize(batch.hidden.device)
            taken[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in taken.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_in_fresh_process(name: str, batch: Batch) -> int | None:
    """Peak bytes of one way, or None where a process cannot see its own."""
    if batch.hidden.device.type == "cpu" and not Path("/proc/self/status").exists():
        return None
    with tempfile.TemporaryDirectory(prefix="fusedpo-") as folder:
        path = Path(folder, "batch.pt")
        torch.save(_pack(name, batch), path)
        done = subprocess.run(
            [sys.executable, "-m", "fusedpo.compare", str(path)],
            env={**os.environ, **_RETURN_FREED_MEMORY},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that measures the memory of {name!r} failed: {reason}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _pack(name: str, batch: Batch) -> dict[str, Any]:
    return {
        "way": name,
        "loss": type(batch.loss).__name__,
        "hyperparameters": asdict(batch.loss),
        "hidden": batch.hidden.detach(),
        "weight": batch.head.weight.detach(),
        "bias": None if batch.head.bias is None else batch.head.bias.detach(),
        "softcap": batch.head.softcap,
        "logit_scale": batch.head.logit_scale,
        "labels": batch.labels,
        "ref_logprobs": batch.ref_logprobs,
        "memory_budget": batch.memory_budget,
        "gradient_tolerance": batch.gradient_tolerance,
        "threads": torch.get_num_threads(),
    }


def _worker(path: Path) -> int:
    """Peak bytes of one step beyond the batch and the gradients."""
    packed = torch.load(path, weights_only=True)
    torch.set_num_threads(packed["threads"])
    loss = losses.get(packed["loss"], **packed["hyperparameters"])
    assert is_comparable(loss), "compare() lets nothing else through"
    head = Head(packed["weight"], packed["bias"], packed["softcap"], packed["logit_scale"])
    names = ("labels", "ref_logprobs", "memory_budget", "gradient_tolerance")
    batch = Batch(loss, packed["hidden"], head, *(packed[name] for name in names))
    way = WAYS[packed["way"]]
    # thread pools, lazy imports, and what the linear algebra library keeps for itself
    _step(way, _small(batch))
    device = batch.hidden.device
    gradients = batch.hidden.nbytes + head.weight.nbytes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _step(way, batch)
        return torch.cuda.max_memory_allocated(device) - before - gradients
    filler = _settle_high_water_mark()
    before = _resident("VmHWM")
    _step(way, batch)
    peak = _resident("VmHWM") - before - gradients
    del filler
    return max(0, peak)


def _small(batch: Batch) -> Batch:
    """The first pair."""
    rows = [0, len(batch.labels) // 2]
    return replace(
        batch,
        hidden=batch.hidden[rows],
        labels=batch.labels[rows],
        ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[rows],
    )


def _settle_high_water_mark() -> Tensor:
    """Lower the highest resident set to the present one; where forbidden, fill up to it.

    Returns what has to be kept until the measurement is done.
    """
    with contextlib.suppress(AttributeError, OSError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    missing = _resident("VmHWM") - _resident("VmRSS")
    return torch.ones(max(0, missing), dtype=torch.uint8)


def _resident(name: str) -> int:
    """Bytes, from /proc; the highest of getrusage would start from the parent's."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"no {name} in /proc/self/status"
    return int(match[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_worker(Path(sys.argv[1]))))
