"""The programs compared, each as the same function: inputs in, scalar SimPO loss out.

Every peer is called the way its own library calls it, with its own defaults; one that can be told
how much memory to use is told what fusedpo is told. A test holds each to the same loss and the same
gradients, so that only speed and memory differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import IGNORE_INDEX, Case, Inputs

BETA, GAMMA = 2.0, 0.5

Loss = Callable[[Inputs, int | None], Tensor]
"""``loss(inputs, memory_budget) -> scalar``; peers without a budget ignore it."""


def simpo(logprobs: Tensor, labels: Tensor) -> Tensor:
    """SimPO from per-token log-probabilities: chosen rows first, then rejected."""
    scored = labels != IGNORE_INDEX
    mean = (logprobs * scored).sum(-1) / scored.sum(-1)
    chosen, rejected = mean.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def full_logits(inputs: Inputs, memory_budget: int | None = None) -> Tensor:
    hidden, weight, labels = inputs
    logprobs = F.linear(hidden, weight).log_softmax(-1, dtype=logits_dtype(hidden))
    taken = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return simpo(taken, labels)


def logits_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def linear_cross_entropy(inputs: Inputs, memory_budget: int | None = None) -> Tensor:
    hidden, weight, labels = inputs
    rows = None  # its own choice; at a large vocabulary that is 8 rows, and some ten times slower
    if memory_budget is not None:
        rows = max(1, memory_budget // (weight.shape[0] * weight.element_size()))
    losses = F.linear_cross_entropy(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows),
    )
    return simpo(-losses.view_as(labels), labels)


def liger(inputs: Inputs, memory_budget: int | None = None) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    loss = LigerFusedLinearSimPOLoss(
        ignore_index=IGNORE_INDEX,
        beta=BETA,
        gamma=GAMMA,
        compute_nll_loss=False,
        compiled=False,
    )
    value, _ = loss(inputs.weight, inputs.hidden, inputs.labels)
    return value


def trl(inputs: Inputs, memory_budget: int | None = None) -> Tensor:
    """As ``trl.trainer.utils.add_fused_lm_head``: scored positions where Triton runs, else all."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, weight, labels = inputs
    mask = labels != IGNORE_INDEX
    compact = _use_triton(hidden.device)
    logprobs = ChunkedLogProbFunction.apply(
        hidden[mask] if compact else hidden.flatten(0, 1),
        weight,
        None,
        labels[mask] if compact else labels.clamp(min=0).flatten(),
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs",),
    )[0]
    if compact:
        logprobs = logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)
    else:
        logprobs = logprobs.view(mask.shape).masked_fill(~mask, 0)
    return simpo(logprobs, labels)


def fusedpo(inputs: Inputs, memory_budget: int | None = None) -> Tensor:
    import fusedpo

    loss = fusedpo.losses.SimPO(beta=BETA, gamma=GAMMA)
    return fusedpo.preference_loss(loss, *inputs, memory_budget=memory_budget).loss


@dataclass(frozen=True)
class Peer:
    """A program to compare.

    Attributes:
        label: its name in tables.
        loss: the adapter.
        package: the distribution it comes from.
        needs: a dotted name that has to exist for it to run.
    """

    label: str
    loss: Loss
    package: str
    needs: str

    def missing(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        module, _, name = self.needs.rpartition(".")
        try:
            getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            return f"{self.label}: {self.needs} not found ({error})"
        return None

    @property
    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


PEERS: dict[str, Peer] = {
    "full_logits": Peer("full logits", full_logits, "torch", "torch.nn.functional.linear"),
    "liger": Peer(
        "Liger-Kernel",
        liger,
        "liger-kernel",
        "liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss",
    ),
    "trl": Peer(
        "TRL chunked",
        trl,
        "trl",
        "trl.kernels.chunked_logprob.ChunkedLogProbFunction",
    ),
    "linear_cross_entropy": Peer(
        "torch linear_cross_entropy",
        linear_cross_entropy,
        "torch",
        "torch.nn.LinearCrossEntropyOptions",
    ),
    "fusedpo": Peer("fusedpo", fusedpo, "fusedpo", "fusedpo.preference_loss"),
}


def step(case: Case, inputs: Inputs) -> Tensor:
    """Forward and backward of the case's peer; gradients land in the inputs."""
    loss = PEERS[case.peer].loss(inputs, case.budget)
    loss.backward()
    return loss.detach()
