"""The programs compared, each as the same function: a case and its inputs in, a scalar loss out.

Every peer is called the way its own library calls it, with its own defaults; one that can be told
how much memory to use is told what fusedpo is told. A test holds each to the same loss and the same
gradients, so that only speed, memory and precision differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpo.benchmarks.formulas import FORMULAS, WITH_REFERENCE, Tokens
from fusedpo.benchmarks.peer_memory import TRL_COLUMNS
from fusedpo.benchmarks.shapes import TINY, Case, Inputs, make_inputs
from fusedpo.benchmarks.timing import told
from fusedpo.labels import IGNORE_INDEX

Logprobs = Callable[[Case, Tensor, Tensor, Tensor], Tensor]
"""``logprobs(case, hidden [B, T, H], weight, labels [B, T]) -> [B, T]``; what it gives for ignored
labels does not matter, as long as it is finite."""


class Unsupported(Exception):
    """What a peer cannot do, in a few words."""


def logits_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


# per token


def full_logits(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprobs = F.linear(hidden, weight).log_softmax(-1, dtype=logits_dtype(hidden))
    return logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def linear_cross_entropy(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = None  # its own choice; at a large vocabulary that is 8 rows
    if case.budget is not None:
        rows = max(1, case.budget // (weight.shape[0] * weight.element_size()))
    losses = F.linear_cross_entropy(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows),
    )
    return -losses.view_as(labels)


def trl(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As ``trl.trainer.utils.add_fused_lm_head``: scored positions where Triton runs, else all."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton

    mask = labels != IGNORE_INDEX
    compact = _use_triton(hidden.device)
    logprobs = ChunkedLogProbFunction.apply(  # type: ignore[no-untyped-call]
        hidden[mask] if compact else hidden.flatten(0, 1),
        weight,
        None,
        labels[mask] if compact else labels.clamp(min=0).flatten(),
        1.0,
        TRL_COLUMNS,
        None,
        1.0,
        ("log_probs",),
    )[0]
    if compact:
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)
    return logprobs.view(mask.shape).masked_fill(~mask, 0)


def liger_scaled(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    if not hidden.is_cuda:
        raise Unsupported("its kernels need a GPU; elsewhere it is another library's formula")
    flat, targets = hidden.flatten(0, 1), labels.flatten()
    found = Function.apply(flat, weight, targets, 1.0, IGNORE_INDEX)
    losses = found[0] if isinstance(found, tuple) else found
    return -losses.view_as(labels)


def cut_cross_entropy(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as function

    if not hidden.is_cuda:
        raise Unsupported("without a GPU it is full logits in torch.compile, which is there")
    if hidden.dtype == torch.float32:
        raise Unsupported("bf16 and fp16 only")
    return -function(hidden, weight, labels, ignore_index=IGNORE_INDEX, reduction="none")


def fusedpo_logprobs(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    import fusedpo

    return fusedpo.linear_logprobs(hidden, weight, labels, **_told(case))


def _told(case: Case) -> dict[str, Any]:
    """What every function of fusedpo is told."""
    return {"memory_budget": case.budget, "gradient_tolerance": case.tolerance}


# whole losses


def by_formula(logprobs: Logprobs, case: Case, inputs: Inputs) -> Tensor:
    """The loss of a peer that has log-probabilities only, its reference by the same function."""
    ref = inputs.ref_logprobs
    scored = inputs.labels != IGNORE_INDEX
    if inputs.ref_hidden is not None and inputs.ref_weight is not None:
        with torch.no_grad():
            found = logprobs(case, inputs.ref_hidden, inputs.ref_weight, inputs.labels)
            ref = (found * scored).sum(-1)
    taken = logprobs(case, inputs.hidden, inputs.weight, inputs.labels)
    return FORMULAS[case.loss](Tokens(taken, scored, ref, inputs))


@cache
def _compiled(case: Case) -> Callable[[Inputs], Tensor]:
    # what was compiled for other shapes counts towards a limit, and then nothing is compiled
    torch._dynamo.reset()

    def loss(inputs: Inputs) -> Tensor:
        return by_formula(full_logits, case, inputs)

    return torch.compile(loss, dynamic=False)


def compiled(case: Case, inputs: Inputs) -> Tensor:
    return _compiled(case)(inputs)


def liger(case: Case, inputs: Inputs) -> Tensor:
    """Liger's chunked losses; compiled, as they are by default, where a compiler is there."""
    from liger_kernel import chunked_loss as its

    if case.reference == "precomputed":
        raise Unsupported("has no precomputed reference")
    made: dict[str, Callable[..., Any]] = {
        "simpo": partial(
            its.LigerFusedLinearSimPOLoss, beta=2.0, gamma=0.5, compute_nll_loss=False
        ),
        # averaged over tokens it would be another loss
        "dpo": partial(its.LigerFusedLinearDPOLoss, beta=0.1, use_ref_model=True),
        "orpo": partial(its.LigerFusedLinearORPOLoss, beta=0.1),
        "kto": partial(its.LigerFusedLinearKTOLoss, beta=0.1, use_ref_model=True),
    }
    if case.loss not in made:
        raise Unsupported(f"has no such loss: {case.loss}")
    module = made[case.loss](ignore_index=IGNORE_INDEX, compiled=case.device != "cpu")
    hidden, weight, labels = inputs[:3]
    more = {}
    if case.loss in WITH_REFERENCE:
        more = {"ref_input": inputs.ref_hidden, "ref_weight": inputs.ref_weight}
    if case.loss == "kto":
        return module(hidden, weight, labels, preference_labels=inputs.desirable, **more)[0]
    return module(weight, hidden, labels, **more)[0]


def liger_cross_entropy(case: Case, inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if case.loss != "sft":
        raise Unsupported("gives one number for all tokens: SFT only")
    module = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    return module(inputs.weight, inputs.hidden.flatten(0, 1), inputs.labels.flatten())


def quack(case: Case, inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if case.loss != "sft":
        raise Unsupported("gives one number for all tokens: SFT only")
    flat, labels = inputs.hidden.flatten(0, 1), inputs.labels.flatten()
    return chunked_linear_cross_entropy(
        flat, inputs.weight, labels, ignore_index=IGNORE_INDEX, reduction="mean"
    )


def fusedpo(case: Case, inputs: Inputs) -> Tensor:
    import fusedpo
    from fusedpo import losses

    hidden, weight, labels = inputs[:3]
    if case.loss == "sspo":
        assert inputs.advantages is not None
        return fusedpo.policy_loss(
            losses.SoftSequence(),
            hidden,
            weight,
            labels,
            advantages=inputs.advantages,
            old_logprobs=inputs.old_logprobs,
            **_told(case),
        ).loss
    if case.loss == "sft":
        # of all rows, as the others have it, and not of chosen ones
        logprobs = fusedpo_logprobs(case, hidden, weight, labels)
        return -logprobs.sum() / (labels != IGNORE_INDEX).sum()
    return fusedpo_preference(case, inputs).loss


def fusedpo_preference(case: Case, inputs: Inputs, **told: Any) -> Any:
    """The whole ``LossOutput`` of a loss of pairs; told: what is not as the case has it."""
    import fusedpo
    from fusedpo import losses

    hidden, weight, labels = inputs[:3]
    extra: dict[str, Any] = {}
    if case.loss == "kto":
        extra = {"desirable": inputs.desirable, "kl": torch.zeros((), device=labels.device)}
    loss = {
        "simpo": losses.SimPO(beta=2.0, gamma=0.5),
        "dpo": losses.DPO(beta=0.1),
        "orpo": losses.ORPO(beta=0.1),
        "kto": losses.KTO(beta=0.1),
    }[case.loss]
    return fusedpo.preference_loss(
        loss,
        hidden,
        weight,
        labels,
        ref_hidden=inputs.ref_hidden,
        ref_weight=inputs.ref_weight,
        ref_logprobs=inputs.ref_logprobs,
        **{**_told(case), **extra, **told},
    )


@dataclass(frozen=True)
class Peer:
    """A program to compare.

    Attributes:
        label: its name in tables.
        package: the distribution it comes from.
        needs: a dotted name that has to exist for it to run.
        logprobs: its log-probabilities per token, if it has them.
        loss: the whole loss, if that is not the formula over its log-probabilities.
        budgeted: whether it can be told how much memory to use.
        compiles: whether its first call at a shape compiles.
    """

    label: str
    package: str
    needs: str
    logprobs: Logprobs | None = None
    loss: Callable[[Case, Inputs], Tensor] | None = None
    budgeted: bool = False
    compiles: bool = False

    def __call__(self, case: Case, inputs: Inputs) -> Tensor:
        if self.loss is not None:
            return self.loss(case, inputs)
        assert self.logprobs is not None, "a peer has one or the other"
        return by_formula(self.logprobs, case, inputs)

    def missing(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        module, _, name = self.needs.rpartition(".")
        try:
            getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            return f"not installed (pip install {self.package}): {reason}"
        return None

    @property
    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


_LINEAR = "torch.nn.functional.linear"
PEERS: dict[str, Peer] = {
    "full_logits": Peer("full logits", "torch", _LINEAR, full_logits),
    "compiled": Peer(
        "full logits, torch.compile", "torch", _LINEAR, full_logits, compiled, compiles=True
    ),
    "linear_cross_entropy": Peer(
        "torch linear_cross_entropy",
        "torch",
        "torch.nn.LinearCrossEntropyOptions",
        linear_cross_entropy,
        budgeted=True,
    ),
    "trl": Peer("TRL chunked", "trl", "trl.kernels.chunked_logprob.ChunkedLogProbFunction", trl),
    "liger": Peer(
        "Liger chunked loss",
        "liger-kernel",
        "liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss",
        loss=liger,
    ),
    "liger_scaled": Peer(
        "Liger scaled cross-entropy",
        "liger-kernel",
        "liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction",
        liger_scaled,
    ),
    "liger_cross_entropy": Peer(
        "Liger cross-entropy",
        "liger-kernel",
        "liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss",
        loss=liger_cross_entropy,
    ),
    "cut_cross_entropy": Peer(
        "cut-cross-entropy",
        "cut-cross-entropy",
        "cut_cross_entropy.linear_cross_entropy",
        cut_cross_entropy,
    ),
    "quack": Peer(
        "QuACK",
        "quack-kernels",
        "quack.linear_cross_entropy.chunked_linear_cross_entropy",
        loss=quack,
    ),
    "fusedpo": Peer(
        "fusedpo", "fusedpo", "fusedpo.preference_loss", fusedpo_logprobs, fusedpo, budgeted=True
    ),
}
OURS = "fusedpo"
BASELINE = "full_logits"


def step(case: Case, inputs: Inputs) -> Tensor:
    """Forward and backward of the case's peer; gradients land in the inputs."""
    loss = PEERS[case.peer](case, inputs)
    torch.autograd.backward(loss)
    return loss.detach()


def why_not(case: Case) -> str | None:
    """Why the case's peer cannot do it, tried once at a tiny size; None if it can."""
    return _why_not(replace(case.at(TINY), budget=None, states=None), PEERS[case.peer])


@cache
def _why_not(tiny: Case, peer: Peer) -> str | None:
    if (missing := peer.missing()) is not None:
        return missing
    try:
        step(tiny, make_inputs(tiny))
    except Unsupported as error:
        return str(error)
    except Exception as error:  # another library's failure is a line of the table, not its end
        return told(error)
    return None
