"""One batch of a training, two ways: the fused loss, and the same loss from full logits.

Time is the fastest of interleaved rounds, as other work on the machine only ever adds. Memory is
measured one way at a time, on the CPU in a process of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from fusedpo import losses
from fusedpo.benchmarks import measure, plots
from fusedpo.benchmarks.timing import Clock
from fusedpo.benchmarks.worker import in_fresh_process
from fusedpo.checks import bad_type
from fusedpo.engine.plan import BudgetTooSmall
from fusedpo.engine.planner import plan
from fusedpo.functional import preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses.base import Loss, PreferenceLoss
from fusedpo.losses.scores import Scores
from fusedpo.sizes import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


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

    @property
    def logits_bytes(self) -> int:
        """Of the logits of all positions in fp32."""
        return self.labels[:, 1:].numel() * len(self.head.weight) * 4

    def rows(self, rows: list[int]) -> Batch:
        """Some of the sequences."""
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows]
        hidden, labels = self.hidden[rows], self.labels[rows]
        return replace(self, hidden=hidden, labels=labels, ref_logprobs=ref)


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

    @property
    def gap(self) -> float:
        """The larger one."""
        return max(self.hidden_gap, self.weight_gap)


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

    @property
    def machine(self) -> str:
        threads = f"{self.threads} CPU thread{'s' * (self.threads != 1)}"
        return threads if self.device == "cpu" else self.device


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
        sums = taken.new_zeros(len(targets)).index_add(0, mask.nonzero()[:, 0], taken)
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
    SCORED_ONLY: partial(full_logits, scored_only=True),
}


def small_budget(batch: Batch, fraction: float = 1 / 16) -> int:
    """Bytes: this fraction of the logits of all positions, or the least that will do."""
    vocab, hidden = batch.head.weight.shape
    budget = max(1, int(fraction * batch.logits_bytes))
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
    except BudgetTooSmall as error:
        return error.least
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
    results = {name: step(way, batch) for name, way in WAYS.items()}
    steps = {name: partial(step, way, batch) for name, way in WAYS.items()}
    times = Clock(batch.hidden.device).interleaved(steps, rounds, warmup=0)
    _, fused_hidden, fused_weight = results[FUSED]
    ways = {
        name: Way(
            loss=float(loss),
            hidden_gap=_gap(hidden, fused_hidden),
            weight_gap=_gap(weight, fused_weight),
            seconds=min(times[name].seconds),
            peak_bytes=_peak(name, batch),
        )
        for name, (loss, hidden, weight) in results.items()
    }
    vocab, size = batch.head.weight.shape
    return Comparison(
        ways=ways,
        pairs=len(batch.labels) // 2,
        positions=batch.labels.numel(),
        scored=batch.scored,
        vocab=vocab,
        hidden=size,
        logits_bytes=batch.logits_bytes,
        memory_budget=plan(1, 1, 1, budget=batch.memory_budget, device=batch.hidden.device).budget,
        device=str(batch.hidden.device),
        threads=torch.get_num_threads(),
    )


def step(way: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients for hidden states and weight."""
    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.head.weight.detach().requires_grad_()
    loss = way(replace(batch, hidden=hidden, head=replace(batch.head, weight=weight)))
    hidden_gradient, weight_gradient = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), hidden_gradient, weight_gradient


def _gap(gradient: Tensor, fused_gradient: Tensor) -> float:
    scale = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
    return float((gradient - fused_gradient).abs().amax() / scale)


def _peak(name: str, batch: Batch) -> int | None:
    """Peak bytes of one way, or None where a process cannot see its own."""
    if batch.hidden.device.type != "cpu":
        return peak_of(name, batch)
    if not Path("/proc/self/status").exists():
        return None
    with tempfile.TemporaryDirectory(prefix="fusedpo-") as folder:
        path = Path(folder, "batch.pt")
        torch.save(_packed(batch), path)
        request = {"way": name, "path": str(path), "threads": torch.get_num_threads()}
        return int(in_fresh_process("fusedpo.benchmarks.compare:answer", request)["peak"])


def peak_of(name: str, batch: Batch) -> int:
    """Bytes of a step beyond the batch and the gradients."""
    way = WAYS[name]
    # a pair first: thread pools, lazy imports, and what the linear algebra library keeps for itself
    step(way, batch.rows([0, len(batch.labels) // 2]))
    peak = measure.peak_bytes(partial(step, way, batch), str(batch.hidden.device))
    return max(0, peak - batch.hidden.nbytes - batch.head.weight.nbytes)


def _packed(batch: Batch) -> dict[str, Any]:
    """Plain values and tensors, which a file may hold."""
    head = batch.head
    return {
        **vars(batch),
        "loss": (type(batch.loss).__name__, asdict(batch.loss)),
        "head": {"weight": head.weight, **head.options()},
    }


def preload() -> None:
    """Nothing but this module."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The peak of a batch in a file."""
    packed = torch.load(request["path"], weights_only=True)
    name, hyperparameters = packed["loss"]
    loss, head = losses.get(name, **hyperparameters), Head(**packed["head"])
    return {"peak": peak_of(request["way"], Batch(**{**packed, "loss": loss, "head": head}))}


def comparison_table(c: Comparison) -> Table:
    """For a rich console."""
    from rich.table import Table

    table = Table(
        title=f"One batch of {c.pairs} pairs: {c.positions} positions, {c.scored} of them scored; "
        f"vocabulary {c.vocab}, hidden size {c.hidden}, {c.machine}",
        title_justify="left",
        caption="Forward and backward, the fastest of several rounds. The fused loss was allowed "
        f"{format_bytes(c.memory_budget)}; the logits alone are {format_bytes(c.logits_bytes)}. "
        "Memory is beyond the batch and the gradients, each in a process of its own. Gradients "
        "differ by at most this share of their largest entry.",
        caption_justify="left",
    )
    for column in ("", "loss", "gradients differ", "time", "x fused", "peak memory", "x fused"):
        table.add_column(column, justify="right" if column else "left")
    base = c.ways[FUSED]
    for name, way in c.ways.items():
        peak, least = way.peak_bytes, base.peak_bytes
        table.add_row(
            name,
            f"{way.loss:.7f}",
            "" if name == FUSED else f"{way.gap:.1e}",
            f"{1e3 * way.seconds:{'.0f' if way.seconds > 0.1 else '.3g'}} ms",
            f"{way.seconds / base.seconds:.2f}",
            "not measured" if peak is None else format_bytes(peak),
            f"{peak / least:.1f}" if peak is not None and least else "",
        )
    return table


def draw_comparison(path: Path, c: Comparison) -> None:
    """Time and peak memory of each way, to a PNG."""
    gap = max(way.gap for way in c.ways.values())
    losses = [way.loss for way in c.ways.values()]
    title = (
        f"One batch of {c.pairs} pairs, {c.scored} scored tokens, vocabulary {c.vocab}: "
        f"losses within {max(losses) - min(losses):.0e}, gradients within {gap:.0e} of their "
        "largest entry"
    )
    figure = plots.figure({"title": title}, 12, 3.6, below=0.0)
    time, memory = figure.subplots(1, 2)
    _bars(time, {name: 1e3 * way.seconds for name, way in c.ways.items()}, "ms")
    time.set(title=f"Forward and backward, {c.machine}", xlabel="milliseconds")
    known = {n: w.peak_bytes / 2**20 for n, w in c.ways.items() if w.peak_bytes is not None}
    _bars(memory, known, "MiB")
    memory.set(
        title="Peak memory beyond batch and gradients",
        xlabel=f"MiB; the fused loss was allowed {format_bytes(c.memory_budget)}",
    )
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, values: Mapping[str, float], unit: str) -> None:
    names = [name.replace(", ", ",\n") for name in values]
    colors = [plots.OUR_COLOURS[0] if name == FUSED else plots.COLOURS[2] for name in values]
    bars = axes.barh(names, list(values.values()), color=colors)
    axes.bar_label(bars, [f"{value:.3g} {unit}" for value in values.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
