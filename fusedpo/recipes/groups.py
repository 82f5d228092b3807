"""The data half of sampled responses: rewards, advantages and batches for group policy
optimization, and pairs of the best and the worst for preference losses.

Letters: G responses a prompt, B of all prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_choice, bad_type, bad_value, count
from fusedpo.data.padding import pad_sequences
from fusedpo.recipes.semantic import best_and_worst

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
    count("group_size", group_size, 2)
    if rewards.dim() != 1 or rewards.numel() % group_size:
        raise bad_value(
            "rewards",
            f"[B], B a multiple of the group size {group_size}",
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


def pairs_of_samples(
    prompts: Sequence[Any],
    samples: Sequence[Sequence[Any]],
    scores: Sequence[Any],
    *,
    ties: Literal["refuse", "drop"] = "refuse",
) -> list[dict[str, Any]]:
    """Rows of the best and the worst of the responses that were sampled for each prompt.

    The data half of SimPO (arXiv 2405.14734, and on_policy_data_gen of the authors' code): five
    responses, a reward model's score each; the highest is chosen and the lowest is rejected. With
    ``win_rates_of_pairs`` as scores they are the pairs that SPPO trains on (arXiv 2405.00675). Of
    several best the first is taken, and of several worst the last. A tie is where the best and the
    worst have one score or are one text: there is nothing to prefer.

    Args:
        prompts: P of them, each a text or a list of messages.
        samples: for each prompt at least two responses, of its kind; their number may differ.
        scores: for each prompt as many finite numbers, higher is better.
        ties: ``refuse``, or ``drop`` such prompts, as the authors do where all texts are one.

    Returns:
        For each prompt (that is not dropped) prompt, chosen, rejected, score_chosen and
        score_rejected: columns that ``fusedpo train`` and TRL read, from
        ``datasets.Dataset.from_list``.

    Raises:
        ValueError, TypeError: naming the prompt, what was expected and what came.
    """
    if ties not in ("refuse", "drop"):
        raise bad_choice("ties", ties, ("refuse", "drop"))
    if not len(prompts) == len(samples) == len(scores):
        got = f"{len(samples)} and {len(scores)} for {len(prompts)} prompts"
        raise bad_value("samples", "samples and scores of each prompt", got)
    rows = []
    for i, (prompt, responses, own) in enumerate(zip(prompts, samples, scores, strict=True)):
        best, worst, values = _extremes(f"prompt {i + 1}", prompt, responses, own)
        chosen, rejected = responses[best], responses[worst]
        if chosen == rejected or values[best] == values[worst]:
            if ties == "drop":
                continue
            same = "one text" if chosen == rejected else f"the score {values[best]:g} for both"
            remedy = "sample more of them, or give ties='drop' to leave such prompts out"
            raise bad_value(f"prompt {i + 1}", "a best response and a worse one", same, remedy)
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "score_chosen": values[best],
                "score_rejected": values[worst],
            }
        )
    return rows


def _extremes(
    where: str, prompt: Any, responses: Sequence[Any], scores: Any
) -> tuple[int, int, list[float]]:
    """Places of the best and the worst response, and the scores."""
    if isinstance(responses, str):
        raise bad_type(f"{where}, samples", "a list of responses", "a str")
    for response in responses:
        if isinstance(response, str) != isinstance(prompt, str):
            kinds = ("a text", "a list of messages")
            expected, got = kinds if isinstance(prompt, str) else kinds[::-1]
            raise bad_type(f"{where}, samples", f"{expected}, as the prompt is", got)
    try:
        best, worst = best_and_worst(scores)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}, {error}") from error
    values = torch.as_tensor(scores).double()
    if values.shape != (len(responses),):
        expected = f"one for each of {len(responses)} samples"
        raise bad_value(f"{where}, scores", expected, str(list(values.shape)))
    return int(best), int(worst), values.tolist()


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
        got = f"{len(rewards)} for {len(prompts)} prompts and {len(responses)} responses"
        raise bad_value("rewards", "as many as prompts and responses", got)
    batch = pad_sequences(prompts, responses, pad_token_id)
    given = torch.tensor(rewards, dtype=torch.float64)
    return {
        **batch,
        "advantages": group_advantages(given, group_size),
        "rewards": given.float(),
    }
