"""The data half of group policy optimization: rewards, advantages, batches of sampled responses.

Letters: G responses a prompt, B of all prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_choice, bad_type, bad_value
from fusedpo.recipes.short_to_long import pad_sequences

# a group whose rewards are all alike has no advantage, rather than rounding over nothing
_LEAST_SPREAD = 1e-6


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: Literal["group", "none"] = "group"
) -> Tensor:
    """[B] fp32: each reward minus its group's mean, over the group's standard deviation.

    Args:
        rewards: [B] of any real dtype, a group's responses following each other.
        group_size: G, at least 2.
        scale: ``group``: (R - mean) / (std + 1e-6) with the sample standard deviation, as in GRPO
            (arXiv 2402.03300); ``none``: R - mean, as in Dr.GRPO (arXiv 2503.20783).

    Raises:
        TypeError: if ``rewards`` is no tensor.
        ValueError: for another ``scale``, or rewards that are not whole groups.
    """
    if scale not in ("group", "none"):
        raise bad_choice("scale", scale, ("group", "none"))
    if not isinstance(rewards, Tensor):
        got = type(rewards).__name__
        raise bad_type("rewards", "a tensor [B]", got, "pass torch.tensor(rewards)")
    if group_size < 2 or rewards.dim() != 1 or rewards.numel() % group_size:
        raise bad_value(
            "rewards",
            f"[B], B a multiple of the group size {group_size}, which is at least 2",
            str(list(rewards.shape)),
        )
    groups = rewards.double().view(-1, group_size)
    apart = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        apart = apart / (groups.std(1, keepdim=True) + _LEAST_SPREAD)
    # equal rewards may leave rounding behind, which the division would blow up
    alike = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return apart.masked_fill(alike, 0.0).reshape(-1).float()


def token_overlap(response: Sequence[int], target: Sequence[int]) -> float:
    """F1 of the tokens that two texts have in common, as often as they do, in [0, 1].

    A reward that can be checked and needs no other model: 1 for a response of the target's tokens
    in any order.
    """
    common = sum((Counter(response) & Counter(target)).values())
    return 2.0 * common / (len(response) + len(target)) if common else 0.0


def sampled_batch(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    rewards: Sequence[float],
    group_size: int,
    pad_token_id: int,
) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels [B, T] int64; advantages and rewards [B] fp32.

    Args:
        prompts, responses: B sequences of token ids; a group's follow each other.
        rewards: B numbers.

    Raises:
        ValueError: if prompts, responses and rewards differ in number, there are none, or they are
            not whole groups of ``group_size``.
    """
    if not len(prompts) == len(responses) == len(rewards):
        got = f"{len(prompts)}, {len(responses)} and {len(rewards)}"
        raise bad_value("rewards", "as many as prompts and responses", got)
    batch = pad_sequences(prompts, responses, pad_token_id)
    given = torch.tensor(rewards, dtype=torch.float64)
    return {
        **batch,
        "advantages": group_advantages(given, group_size),
        "rewards": given.float(),
    }
