"""The reference policy of a call: as log-probabilities, or as hidden states scored in the call.

Letters: B sequences, N scored tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.engine.plan import Plan
from fusedpo.head import Head
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.objective.layout import Layout
from fusedpo.objective.scoring import score_tokens


@dataclass(frozen=True)
class Reference:
    """The reference policy of a loss: its log-probabilities, or its hidden states and head.

    Attributes:
        logprobs: log-probabilities under the reference, per token (shaped like labels, aligned with
            hidden) or, for a preference loss, per sequence [B]; float64, float32, bfloat16 or
            float16.
        hidden: instead, the reference's hidden states, shaped like the policy's up to H; scored in
            the call, tile for tile as the policy's.
        head: the reference's head, None for the policy's own. Only the temperature of the call
            applies to it: bias, softcap, logit_scale and vocab_group are those of this Head. Its
            vocabulary is at least as large as the policy's; its H may be another.

    All are detached by the call.

    Raises:
        TypeError, ValueError: for an attribute that cannot be, naming it; by the function that is
            called with it, not when it is made.
    """

    logprobs: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None


@dataclass(frozen=True)
class ReferenceArguments:
    """A reference as a public function is called with it: whole, or as loose arguments."""

    reference: Tensor | Reference | None = None
    ref_logprobs: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None

    def loose(self) -> list[str]:
        """Names of the loose arguments that are not None."""
        names = ("ref_logprobs", "ref_hidden", "ref_weight", "ref_bias")
        return [name for name in names if getattr(self, name) is not None]


def check_reference(loss: Loss, layout: Layout, arguments: ReferenceArguments) -> Reference:
    """The reference of a loss, checked and detached; empty for a loss without one."""
    loose = arguments.loose()
    names = ["reference"] * (arguments.reference is not None) + loose
    if len(names) > len(loose) > 0:
        raise checks.bad_value(
            loose[0],
            "None beside reference",
            "a tensor",
            "pass the reference in one form: as reference, or as the arguments ref_...",
        )
    if not loss.needs_reference:
        if names:
            expected = f"None, as {type(loss).__name__} has no reference"
            got = "a reference" if names[0] == "reference" else "a tensor"
            raise checks.bad_value(names[0], expected, got, "leave it out")
        return Reference()
    if arguments.reference is None:
        return _of_loose_arguments(loss, layout, arguments, loose)
    reference = arguments.reference
    if isinstance(reference, Tensor):
        return Reference(logprobs=_logprobs("reference", reference, loss, layout))
    if not isinstance(reference, Reference):
        expected = "log-probabilities, a torch.Tensor, or a fusedpo.Reference"
        raise checks.bad_type("reference", expected, type(reference).__name__)
    return _of_record(loss, layout, reference)


_SCORE_IT = (
    "score the same labels by the reference model, with fusedpo.linear_logprobs, and pass that as "
    "reference"
)


def _of_loose_arguments(
    loss: Loss, layout: Layout, arguments: ReferenceArguments, names: list[str]
) -> Reference:
    """The reference of the arguments ``ref_...``, of which these names are not None."""
    logprobs, hidden = arguments.ref_logprobs, arguments.ref_hidden
    if (logprobs is None) == (hidden is None):
        got = "both" if logprobs is not None else "neither"
        expected = f"a reference for {type(loss).__name__}: either ref_logprobs or ref_hidden"
        remedy = "pass one of them" if logprobs is not None else _SCORE_IT
        raise checks.bad_value("ref_logprobs", expected, got, remedy)
    if logprobs is not None:
        if len(names) > 1:
            raise checks.bad_value(names[1], "None beside ref_logprobs", "a tensor", "leave it out")
        return Reference(logprobs=_logprobs("ref_logprobs", logprobs, loss, layout))
    assert hidden is not None, "it is one of the two"
    if arguments.ref_weight is None and arguments.ref_bias is not None:
        raise checks.bad_value(
            "ref_bias", "None without ref_weight", "a tensor", "pass ref_weight too"
        )
    head = None
    if arguments.ref_weight is not None:
        head = replace(
            layout.batch.head, weight=arguments.ref_weight, bias=arguments.ref_bias, shard=None
        )
    return _states("ref_", hidden, head, layout)


def _of_record(loss: Loss, layout: Layout, reference: Reference) -> Reference:
    """The reference of a user's record."""
    logprobs, hidden, head = reference.logprobs, reference.hidden, reference.head
    if (logprobs is None) == (hidden is None):
        got = "both" if logprobs is not None else "neither"
        expected = f"a Reference for {type(loss).__name__} with either logprobs or hidden"
        remedy = "leave one out" if logprobs is not None else _SCORE_IT
        raise checks.bad_value("reference", expected, got, remedy)
    if head is not None and not isinstance(head, Head):
        remedy = "pass Head(weight)" if isinstance(head, Tensor) else ""
        raise checks.bad_type("reference.head", "a fusedpo.Head", type(head).__name__, remedy)
    if logprobs is not None:
        if head is not None:
            raise checks.bad_value(
                "reference.head", "None beside logprobs", "a Head", "leave it out"
            )
        return Reference(logprobs=_logprobs("reference.logprobs", logprobs, loss, layout))
    assert hidden is not None, "it is one of the two"
    return _states("reference.", hidden, head, layout)


def _logprobs(argument: str, logprobs: Tensor, loss: Loss, layout: Layout) -> Tensor:
    """Log-probabilities per token or, for a preference loss, per sequence."""
    logprobs = checks.floating(argument, logprobs)
    checks.same_device(hidden=layout.device, **{argument: logprobs})
    shape, per_sequence = layout.labels.shape, (layout.sequences.count,)
    if logprobs.shape == shape:
        return logprobs.detach()
    expected, got = f"per token {list(shape)}", str(list(logprobs.shape))
    if isinstance(loss, PreferenceLoss):
        if logprobs.shape != per_sequence:
            expected += f" or per sequence {list(per_sequence)}"
        elif not loss.weights_tokens:
            return logprobs.detach()
        else:
            expected = f"per token, as {type(loss).__name__} weights tokens"
            got = f"per sequence {got}"
    remedy = "score the reference with the same labels and shift as the policy"
    raise checks.bad_value(argument, expected, got, remedy)


def _states(prefix: str, hidden: Tensor, head: Head | None, layout: Layout) -> Reference:
    """Hidden states and their head; the policy's, detached, without one of their own.

    Args:
        prefix: of the arguments' names.
    """
    if head is None:
        policy = layout.batch.head
        bias = None if policy.bias is None else policy.bias.detach()
        head = replace(policy, weight=policy.weight.detach(), bias=bias)
    else:
        head = head.local(prefix)
        weight, bias = checks.is_tensor(f"{prefix}weight", head.weight), head.bias
        if bias is not None:
            bias = checks.is_tensor(f"{prefix}bias", bias).detach()
        head = replace(head, weight=weight.detach(), bias=bias)
    head.check(hidden, prefix=prefix)
    shape = layout.labels.shape
    expected = "the shape of hidden without its last axis"
    checks.shaped(f"{prefix}hidden", hidden[..., 0], shape, expected)
    checks.same_device(hidden=layout.device, **{f"{prefix}hidden": hidden})
    if head.vocab < layout.batch.head.vocab:
        raise checks.bad_value(
            f"{prefix}weight",
            f"a vocabulary of at least {layout.batch.head.vocab}, the policy's",
            str(head.vocab),
            "a reference of another tokenizer cannot be compared with",
        )
    return Reference(hidden=hidden.detach(), head=head)


def token_logprobs(
    reference: Reference,
    layout: Layout,
    memory_budget: int | float | str | Plan | None,
    policy_plan: Plan | None,
) -> Tensor | None:
    """[N], the reference's log-probability of each row; None without a reference.

    fp64 if the reference is its log-probabilities.

    Args:
        policy_plan: None in a graph that is traced, which has only the budget.
    """
    if reference.logprobs is not None:
        return layout.rows.gather(reference.logprobs.double())
    if reference.hidden is None or reference.head is None:
        return None
    if policy_plan is not None:
        memory_budget = policy_plan.budget
    with torch.no_grad():
        batch = layout.batch.under(reference.hidden, reference.head)
        return score_tokens(batch, memory_budget, like=policy_plan).logprob


def sequence_logprobs(
    reference: Reference,
    layout: Layout,
    memory_budget: int | float | str | Plan | None,
    policy_plan: Plan | None,
    total: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """[B] fp64, the reference's log-probability of each sequence; None without a reference.

    Args:
        total: the sum of values [N] over each sequence, in the order in which the policy's are
            summed: to the last bit, so that equal models have a log-ratio of exactly 0.
    """
    logprobs = reference.logprobs
    # as many tokens as sequences: what is shaped like labels is per token
    if logprobs is not None and logprobs.shape != layout.labels.shape:
        return logprobs.double()
    values = token_logprobs(reference, layout, memory_budget, policy_plan)
    return None if values is None else total(values)
