"""Gradients of a model with a fused head on two processes, in every wrapping; see
trainers/test_sharded.py."""

from __future__ import annotations

import contextlib
import datetime
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fusedpo import policy_loss, preference_loss
from fusedpo.head import Head
from fusedpo.losses import GRPO, SimPO
from fusedpo.model_head import add_fused_head, aligned_labels, at_head

# how the head is wrapped, and whether it is tied to the embedding
WRAPPINGS = (
    ("DDP", False),
    ("DDP", True),
    ("in the root", False),
    ("in the root", True),
    ("in the root, which reshards", False),
    ("in the tail", False),
    ("in the tail", True),
    ("in the tail, which reshards", False),
    ("a unit of its own", False),
    ("a unit of its own, which reshards", False),
)
# that one is to take part all the same, or the other would wait for its gradients
NOTHING = "nothing on rank 1"
PATHS = (
    "statistics",
    "loss",
    "loss, small budget",
    f"statistics, {NOTHING}",
    f"policy loss, {NOTHING}",
)
# of a rank that waits for one that does not take part
PATIENCE = datetime.timedelta(minutes=3)


def model(tied: bool) -> Any:
    made = tiny.model(num_hidden_layers=2, tie_word_embeddings=tied).double()
    add_fused_head(made)
    return made


def batch(rank: int, step: int, path: str = "") -> tuple[Tensor, Tensor]:
    """Two pairs; different numbers of tokens on each rank, or none on the second."""
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(10 * rank + step))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[rank, -1 - rank :] = -100
    if NOTHING in path and rank == 1:
        labels.fill_(-100)
    return ids, labels


def loss_of(model: Any, rank: int, step: int, path: str) -> Tensor:
    ids, labels = batch(rank, step, path)
    if path.startswith("statistics"):
        stats = model(input_ids=ids, labels=labels, fused=True, stats=("logprob", "entropy"))
        return -(stats.logprob.sum() + 0.1 * stats.entropy.sum()) / 10
    budget = "32KiB" if "budget" in path else None

    def sampled(hidden: Tensor, head: Head) -> Tensor:
        return policy_loss(
            GRPO(entropy_bonus=0.1),
            hidden,
            head.weight,
            aligned_labels(labels),
            advantages=torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64),
            **head.options(),
        ).loss

    def paired(hidden: Tensor, head: Head) -> Tensor:
        return preference_loss(
            SimPO(sft_weight=0.2),
            hidden,
            head.weight,
            aligned_labels(labels),
            memory_budget=budget,
            **head.options(),
        ).loss

    task = sampled if path.startswith("policy") else paired
    return at_head(model, task, input_ids=ids)[0]


def trl_loss(model: Any, rank: int, step: int, path: str) -> Tensor:
    """By TRL's own fused head."""
    ids, labels = batch(rank, step)
    return model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=10).loss


def wrap(model: Any, how: str, tied: bool, policy: MixedPrecisionPolicy | None = None) -> Any:
    if how == "DDP":
        return torch.nn.parallel.DistributedDataParallel(model)
    options: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
    for layer in model.model.layers:
        fully_shard(layer)
    reshards = "reshards" in how
    body = model.model
    if "tail" in how:
        tail = [body.norm, *([body.embed_tokens] if tied else []), model.lm_head]
        fully_shard(tail, reshard_after_forward=reshards, **options)
    elif "own" in how:
        fully_shard(model.lm_head, reshard_after_forward=reshards, **options)
    elif reshards:
        options["reshard_after_forward"] = True
    return fully_shard(model, **options)


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def gradients(
    wrapped: Any, rank: int, steps: int, path: str, loss: Callable[..., Tensor]
) -> dict[str, Tensor]:
    for step in range(steps):
        last = step == steps - 1
        if hasattr(wrapped, "set_requires_gradient_sync"):
            wrapped.set_requires_gradient_sync(last)
        quiet = hasattr(wrapped, "no_sync") and not last
        with wrapped.no_sync() if quiet else contextlib.nullcontext():
            loss(wrapped, rank, step, path).backward()
    named = wrapped.named_parameters()
    return {name.removeprefix("module."): whole(p.grad) for name, p in named}


def expected(made: Any, steps: int, path: str, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    """On one process, the mean over both ranks' batches."""
    for step in range(steps):
        for rank in range(2):
            (loss(made, rank, step, path) / 2).backward()
    return {name: p.grad for name, p in made.named_parameters()}


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of a tensor, of its largest number; 0 where both are 0."""
    assert found.keys() == wanted.keys()
    gaps = []
    for name, exact in wanted.items():
        error = float((found[name] - exact).abs().max())
        gaps.append(error and error / float(exact.abs().max()))
        assert gaps[-1] == gaps[-1], f"{name} is not a number"
    return max(gaps)


def all_cases(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for how, tied in WRAPPINGS:
        for path in PATHS:
            for steps in (1, 2):
                wrapped = wrap(model(tied), how, tied)
                got = gradients(wrapped, rank, steps, path, loss_of)
                wanted = expected(model(tied), steps, path, loss_of)
                found[f"{how}, {tied}, {path}, {steps}"] = gap(got, wanted)
    found["0.9x"] = gap({name: 0.9 * w for name, w in wanted.items()}, wanted)
    found["trl"] = by_trl(rank)
    found["rounding"] = rounding(rank)
    return found


def by_trl(rank: int) -> float:
    """TRL's fused head in a unit of its own: its gradients are of one rank's tokens."""
    from trl.trainer.utils import add_fused_lm_head

    subject, reference = (tiny.model(num_hidden_layers=2).double() for _ in range(2))
    for each in (subject, reference):
        add_fused_lm_head(each)
    wrapped = wrap(subject, "a unit of its own", False)
    got = gradients(wrapped, rank, 1, "", trl_loss)
    return gap(got, expected(reference, 1, "", trl_loss))


def rounding(rank: int) -> tuple[float, float]:
    """What a policy that casts outputs to bfloat16 does to a loss, by at_head and without it."""
    policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    made = tiny.model(num_hidden_layers=2)
    add_fused_head(made)
    wanted = float(loss_of(made, rank, 0, "loss"))
    wrapped = wrap(made, "a unit of its own", False, policy)
    by_at_head = float(loss_of(wrapped, rank, 0, "loss"))
    ids, labels = batch(rank, 0)
    stats = wrapped(input_ids=ids, labels=labels, fused=True)
    exact = aligned_labels(labels)
    scored, _ = at_head(wrapped, lambda h, head: head.logits(h).log_softmax(-1), input_ids=ids)
    logp = scored.gather(-1, exact.clamp(min=0)[..., None])[..., 0].masked_fill(exact == -100, 0)
    direct = float((stats.logprob.float() - logp[:, :-1]).abs().max())
    return abs(by_at_head - wanted) / abs(wanted), direct


def run_cases(rank: int, folder: str, cases: Callable[[int], dict[str, Any]]) -> None:
    """What one of two processes does: its results, or what went wrong, in a file of the folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=PATIENCE)
    try:
        found: Any = cases(rank)
    except Exception:
        found = traceback.format_exc()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def worker(rank: int, folder: str) -> None:
    run_cases(rank, folder, all_cases)


def of_both(worker: Callable[[int, str], None], folder: Path) -> list[dict[str, Any]]:
    """The results of two processes."""
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for each in found:
        assert isinstance(each, dict), each
    return found
