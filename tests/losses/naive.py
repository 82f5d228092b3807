"""The naive programs of the losses: from the log-probability of every token to the loss.

Log-probabilities are [B, T], and 0 where the labels are below 0. The formula of a loss is its own;
what is written out is what stands around it: sums over responses, masks, means.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusedpo.losses import PolicyLoss, PreferenceLoss
from fusedpo.losses.scores import Scores, Tokens
from fusedpo.objective.sequences import Sequences


def preference(
    loss: PreferenceLoss,
    logprob: Tensor,
    labels: Tensor,
    inputs: Mapping[str, Tensor],
    *,
    reference: Tensor | None = None,
    sure: Tensor | None = None,
    hidden: Tensor | None = None,
    num_items: float | None = None,
    num_tokens: float | None = None,
) -> Tensor:
    """Per-sequence sums, the loss's formula on them, the mean over examples.

    Args:
        reference: [B, T] likewise, or sums [B].
        sure: [B, T], log p - log of the sum of all tokens' p^2, for a loss that looks at it.
        hidden: [B, T, H], for a loss that looks at the last states.
    """
    scored = labels >= 0
    count, length = labels.shape[0] // len(loss.roles), scored.sum(-1)
    counts = None
    if loss.weights_tokens:
        shortest = length.view(-1, count).amin(0).repeat(len(loss.roles))[:, None]
        counts = loss.token_weight(scored.cumsum(-1) - 1, shortest.expand_as(labels))

    def total(logp: Tensor) -> Tensor:
        return (logp if counts is None else logp * counts.to(logp.dtype)).sum(-1)

    size = length.to(logprob.dtype)
    if reference is not None and reference.dim() > 1:
        reference = total(reference)
    scores = Scores(total(logprob), size, reference, None if sure is None else sure.sum(-1) / size)
    sides = [scores[r * count : (r + 1) * count] for r in range(len(loss.roles))]
    per_example = loss.per_example(*sides, **inputs)
    if loss.uses_states:
        last = scored.shape[1] - 1 - scored.flip(-1).int().argmax(-1)
        states = hidden[torch.arange(len(last)), last].to(logprob.dtype)
        per_example = per_example + loss.of_states(*states.split(count))
    result = per_example.sum() / (num_items or count)
    if loss.nll_weight:
        chosen = logprob[:count].sum() / (num_tokens or size[:count].sum())
        result = result - loss.nll_weight * chosen
    return result


def policy(
    loss: PolicyLoss,
    logprob: Tensor,
    labels: Tensor,
    data: Mapping[str, Tensor | None],
    *,
    entropy: Tensor | None = None,
    num_items: float | None = None,
    num_tokens: float | None = None,
) -> Tensor:
    """The formula token by token, the mean as the loss says it.

    Args:
        data: advantages, and old_logprobs, ref_logprobs, importance_weights if there are.
        entropy: [B, T] likewise, for a loss that looks at it.
    """
    where = labels >= 0
    lengths = where.sum(-1)
    index = torch.arange(len(labels))[:, None].expand_as(labels)[where]
    starts = lengths.cumsum(0) - lengths
    items, tokens = num_items or len(labels), num_tokens or max(1, len(index))

    def of(name: str) -> Tensor | None:
        value = data.get(name)
        if value is None:
            return None
        return (value[index] if value.dim() == 1 else value[where]).double()

    correction = of("importance_weights")
    inside = correction is not None and loss.absorbs_correction
    t = Tokens(
        logprob[where].double(),
        of("advantages"),
        Sequences(index, lengths, starts),
        of("old_logprobs"),
        loss.log_correction(correction) if inside else None,
    )
    value = loss.per_token(t)
    if correction is not None and not inside:
        value = value * correction
    if loss.kl_weight:
        value = value + loss.kl_weight * loss.kl(t, of("ref_logprobs"))
    if loss.aggregation == "token_mean":
        total = value.sum() / tokens
    else:
        sums = torch.zeros(len(labels), dtype=torch.float64).index_add(0, index, value)
        if loss.aggregation == "sequence_mean":
            sums = sums / lengths.clamp(min=1)
        total = sums.sum() / items / loss.divisor
    if loss.entropy_bonus:
        total = total - loss.entropy_bonus * entropy[where].double().sum() / tokens
    return total
