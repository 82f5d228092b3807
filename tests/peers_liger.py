"""Liger-Kernel's chunked losses and their gradients, by calling Liger's own modules.

Rows are those of ``peers_trl``; Liger takes them as they are, labels aligned with hidden states.
``compiled=False`` throughout: the same Python, without a C++ compiler and its half a minute.

Liger is imported when a function is called, so that this file can be read without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peers_trl import PeerLoss, Rows, rows, sampled
from torch import Tensor

# every loss_type of Liger-Kernel 0.8.5, by module; those of one kind have none to choose

LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": (
        *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
        *("apo_zero", "apo_down", "discopop"),
    ),
    "grpo": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
}
SINGLE = ("kto", "cpo", "simpo", "orpo")
# with importance_sampling_level="sequence"; Liger refuses the others
SEQUENCE_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")

_METRICS = (
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "nll_loss"),
    *("rewards/chosen", "rewards/rejected", "log_odds_ratio", "log_odds_chosen"),
)


def dpo_loss(
    loss_type: str,
    batch: Rows,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    average_log_prob: bool = False,
    nll_weight: float = 0.0,
    chunk_size: int = 1,
) -> PeerLoss:
    """Chosen rows first, then the rejected ones in the same order; so for all of pairs."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(
        beta=beta,
        alpha=nll_weight,
        compute_nll_loss=nll_weight != 0.0,
        compiled=False,
        average_log_prob=average_log_prob,
        chunk_size=chunk_size,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
    )
    reference = {"ref_input": batch.ref_hidden, "ref_weight": batch.ref_weight}
    return _of_pairs(batch, *module(batch.weight, batch.hidden, batch.labels, **reference))


def cpo_loss(
    batch: Rows,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    chunk_size: int = 1,
) -> PeerLoss:
    from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss

    module = LigerFusedLinearCPOLoss(
        beta=beta,
        alpha=nll_weight,
        label_smoothing=label_smoothing,
        compiled=False,
        chunk_size=chunk_size,
    )
    return _of_pairs(batch, *module(batch.weight, batch.hidden, batch.labels))


def simpo_loss(
    batch: Rows,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    chunk_size: int = 1,
) -> PeerLoss:
    """Liger's module adds the cross-entropy unless it is told not to."""
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    module = LigerFusedLinearSimPOLoss(
        beta=beta,
        alpha=nll_weight,
        label_smoothing=label_smoothing,
        compute_nll_loss=nll_weight != 0.0,
        compiled=False,
        gamma=gamma,
        chunk_size=chunk_size,
    )
    return _of_pairs(batch, *module(batch.weight, batch.hidden, batch.labels))


def orpo_loss(
    batch: Rows,
    *,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_over_prompts: bool = False,
    chunk_size: int = 1,
) -> PeerLoss:
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    module = LigerFusedLinearORPOLoss(
        beta=beta, compute_nll_loss=compute_nll_loss, compiled=False, chunk_size=chunk_size
    )
    target = batch.tokens.masked_fill(~batch.real, -100) if nll_over_prompts else None
    found = module(batch.weight, batch.hidden, batch.labels, nll_target=target)
    return _of_pairs(batch, *found)


def kto_loss(
    batch: Rows,
    desirable: Tensor,
    *,
    kl: Tensor | None = None,
    beta: float = 0.1,
    chunk_size: int = 1,
) -> PeerLoss:
    """Rows of single responses; kl is what z0 is, as the caller has estimated and limited it."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    module = LigerFusedLinearKTOLoss(
        beta=beta, compiled=False, use_ref_model=True, chunk_size=chunk_size
    )
    loss, sums = module(
        batch.hidden,
        batch.weight,
        batch.labels,
        preference_labels=desirable.bool(),
        ref_input=batch.ref_hidden,
        ref_weight=batch.ref_weight,
        kl=kl,
    )
    many = {"chosen": desirable.sum(), "rejected": (desirable == 0).sum()}
    # Liger returns sums over the examples: of log-probabilities, logits, rewards
    names = [f"{what}/{side}" for what in ("logps", "logits", "rewards") for side in many]
    each = zip(names, sums, strict=True)
    means = {n: float(v.detach() / many[n.split("/")[1]]) for n, v in each if n[:6] != "logits"}
    return _result(loss, batch, means)


def grpo_loss(
    loss_type: str,
    batch: Rows,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_items: float | None = None,
    beta: float = 0.0,
    chunk_size: int = 1,
    **options: Any,
) -> PeerLoss:
    """options: those of Liger's module, such as epsilon_low, delta, importance_sampling_level."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=False,
        use_ref_model=beta != 0.0,
        chunk_size=chunk_size,
        loss_type=loss_type,
        **options,
    )
    weights = importance_weights
    loss, found = module(
        batch.hidden,
        batch.weight,
        batch.tokens,
        batch.mask.to(batch.hidden.dtype),
        advantages,
        ref_per_token_logps=ref_logprobs if beta != 0.0 else None,
        old_per_token_logps=old_logprobs,
        vllm_is_ratio=weights[:, None] if weights is not None and weights.dim() == 1 else weights,
        num_items_in_batch=num_items,
    )
    names = ("kl", "clip_ratio") if beta != 0.0 else ("clip_ratio",)
    return _result(loss, batch, {n: float(v) for n, v in zip(names, found, strict=True)})


def _of_pairs(batch: Rows, loss: Tensor, found: Sequence[Tensor]) -> PeerLoss:
    metrics = {n: float(v.detach().mean()) for n, v in zip(_METRICS, found, strict=False)}
    return _result(loss, batch, metrics)


def _result(loss: Tensor, batch: Rows, metrics: dict[str, float]) -> PeerLoss:
    return PeerLoss(loss, batch.hidden, batch.weight, batch.labels, batch.mask, metrics)


# what Liger's code itself knows


def source_loss_types(module: str) -> set[str]:
    """The loss types that a module says it knows."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, grpo_loss

    if module == "dpo":
        return set(LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES)
    said = inspect.getsource(grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn)
    line = next(line for line in said.splitlines() if "loss_type=" in line and "# [" in line)
    return set(line.split("# [")[1].split("]")[0].replace('"', "").split(", "))


if __name__ == "__main__":

    def show(name: str, found: PeerLoss) -> None:
        norms = " ".join(f"{k} {float(g.norm()):.6f}" for k, g in found.gradients().items())
        print(f"{name:36} {float(found.loss.detach()):12.6f}  {norms}")

    for name in LOSS_TYPES:
        assert source_loss_types(name) == set(LOSS_TYPES[name]), source_loss_types(name)
    pairs = rows(1)
    for kind in LOSS_TYPES["dpo"]:
        smoothing = {"exo_pair": 1e-3, "robust": 0.1}.get(kind, 0.0)
        show(f"dpo {kind}", dpo_loss(kind, pairs, label_smoothing=smoothing))
    show("dpo sigmoid, averages", dpo_loss("sigmoid", pairs, average_log_prob=True))
    show("dpo sigmoid, nll", dpo_loss("sigmoid", pairs, nll_weight=0.3))
    show("dpo sigmoid, chunk_size 2", dpo_loss("sigmoid", pairs, chunk_size=2))
    show("cpo", cpo_loss(pairs))
    show("simpo", simpo_loss(pairs))
    show("orpo", orpo_loss(pairs))
    show("orpo, nll over prompts", orpo_loss(pairs, nll_over_prompts=True))
    wanted = torch.tensor([1, 0, 1, 1, 0, 0])
    show("kto", kto_loss(pairs, wanted, kl=torch.tensor(0.3)))
    show("kto without kl", kto_loss(pairs, wanted))
    batch, inputs = sampled(3)
    for kind in LOSS_TYPES["grpo"]:
        options = {"max_completion_length": 256} if kind == "dr_grpo" else {}
        show(f"grpo {kind}", grpo_loss(kind, batch, **inputs, **options))
        kl = {"beta": 0.04, "use_bias_correction_kl": True}
        show(f"grpo {kind} corrected kl", grpo_loss(kind, batch, **inputs, **options, **kl))
        if kind in SEQUENCE_LOSS_TYPES:
            options["importance_sampling_level"] = "sequence"
            show(f"grpo {kind} sequence", grpo_loss(kind, batch, **inputs, **options))
    show("grpo grpo delta 1.1", grpo_loss("grpo", batch, **inputs, delta=1.1))
