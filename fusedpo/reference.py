"""The reference policy of a call: as log-probabilities, or as hidden states scored in the call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.engine.backend import resolve
from fusedpo.engine.plan import Plan
from fusedpo.engine.rows import Rows
from fusedpo.engine.score import plan_for, score, score_in_graph
from fusedpo.head import Head
from fusedpo.losses import Loss


@dataclass(frozen=True)
class Reference:
    """What the reference was given as: logprobs, or hidden and head, or nothing."""

    logprobs: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None


def check_reference(
    loss: Loss,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sequences: int | None,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> Reference:
    """The reference, checked.

    Args:
        sequences: how many there are, if log-probabilities per sequence [B] will do.
    """
    name = type(loss).__name__
    given = [
        argument
        for argument, value in (
            ("ref_logprobs", ref_logprobs),
            ("ref_hidden", ref_hidden),
            ("ref_weight", ref_weight),
            ("ref_bias", ref_bias),
        )
        if value is not None
    ]
    if not loss.needs_reference:
        if given:
            raise checks.bad_value(
                given[0], f"None, as {name} has no reference", "a tensor", "leave it out"
            )
        return Reference()
    if (ref_logprobs is None) == (ref_hidden is None):
        got = "both" if ref_logprobs is not None else "neither"
        raise checks.bad_value(
            "ref_logprobs", f"a reference for {name}: either ref_logprobs or ref_hidden", got
        )
    if ref_logprobs is not None:
        if len(given) > 1:
            raise checks.bad_value(
                given[1], "None beside ref_logprobs", "a tensor", "it would have no effect"
            )
        ref_logprobs = checks.floating("ref_logprobs", ref_logprobs)
        checks.same_device(hidden=hidden, ref_logprobs=ref_logprobs)
        expected = f"per token {list(labels.shape)}"
        if sequences is not None:
            expected += f" or per sequence [{sequences}]"
        if ref_logprobs.shape not in (labels.shape, (sequences,)):
            raise checks.bad_value("ref_logprobs", expected, str(list(ref_logprobs.shape)))
        return Reference(logprobs=ref_logprobs.detach())
    assert ref_hidden is not None, "one of the two was given"
    if ref_weight is None and ref_bias is not None:
        raise checks.bad_value(
            "ref_bias", "None without ref_weight", "a tensor", "pass ref_weight too"
        )
    if ref_weight is None:
        ref_head = replace(
            head,
            weight=head.weight.detach(),
            bias=None if head.bias is None else head.bias.detach(),
        )
    else:
        ref_head = replace(head, weight=ref_weight, bias=ref_bias, shard=None).local("ref_")
        weight, bias = checks.is_tensor("ref_weight", ref_head.weight), ref_head.bias
        if bias is not None:
            bias = checks.is_tensor("ref_bias", bias).detach()
        ref_head = replace(ref_head, weight=weight.detach(), bias=bias)
    ref_head.check(ref_hidden, prefix="ref_")
    checks.shaped(
        "ref_hidden", ref_hidden[..., 0], labels.shape, "the shape of hidden without its last axis"
    )
    checks.same_device(hidden=hidden, ref_hidden=ref_hidden)
    if ref_head.vocab < head.vocab:
        raise checks.bad_value(
            "ref_weight",
            f"a vocabulary of at least {head.vocab}, the policy's",
            str(ref_head.vocab),
        )
    return Reference(hidden=ref_hidden.detach(), head=ref_head)


def reference_logprobs(
    reference: Reference,
    rows: Rows,
    temperature: float | Tensor,
    memory_budget: int | float | str | Plan | None,
    policy_plan: Plan | None,
    backend: str,
) -> Tensor | None:
    """[N], the reference's log-probability of each row; None without a reference.

    fp64 if they were given.
    """
    if reference.logprobs is not None:
        return rows.gather(reference.logprobs.double())
    if reference.hidden is None or reference.head is None:
        return None
    hidden, head = reference.hidden, reference.head
    with torch.no_grad():
        if policy_plan is None:
            values, _ = score_in_graph(
                hidden, head, rows, memory_budget, temperature=temperature, backend=backend
            )
        else:
            resolve(backend, hidden, head.weight, head.bias)  # or the error of this head
            planned = plan_for(
                hidden, head, rows, policy_plan.budget, backend=backend, like=policy_plan
            )
            values, _ = score(hidden, head, rows, planned, temperature=temperature, backend=backend)
    return values.logprob
