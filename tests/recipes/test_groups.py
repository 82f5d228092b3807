"""Advantages, the reward of the demonstration, and batches of sampled responses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fusedpo.recipes.groups import (
    group_advantages,
    pairs_of_samples,
    sampled_batch,
    token_overlap,
)
from fusedpo.recipes.semantic import win_rates_of_pairs
from fusedpo.trainers.rows import check_row


@given(seed=st.integers(0, 1000), groups=st.integers(1, 4), size=st.integers(2, 6))
def test_advantages_are_those_of_grpo(seed: int, groups: int, size: int) -> None:
    rewards = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed)).double()
    found = group_advantages(rewards, size).double().view(groups, size)
    plain = group_advantages(rewards, size, scale="none").double().view(groups, size)
    for i, group in enumerate(rewards.view(groups, size)):
        apart = group - group.mean()
        assert (found[i] - apart / (group.std() + 1e-6)).abs().max() < 1e-6 * found[i].abs().max()
        assert (plain[i] - apart).abs().max() < 1e-6 * apart.abs().max()


def test_equal_rewards_have_no_advantage() -> None:
    """0.1 + 0.2 style rounding must not become an advantage of order 1."""
    assert (group_advantages(torch.full((8,), 0.1), 4) == 0).all()
    assert (group_advantages(torch.full((6,), 1 / 3, dtype=torch.float64), 3) == 0).all()


@pytest.mark.fault(28)
def test_bad_groups_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rewards: expected \[B\], B a multiple of .* 2, got \[5\]"
    ):
        group_advantages(torch.zeros(5), 2)
    with pytest.raises(ValueError, match=r"^group_size: expected at least 2, got 1"):
        group_advantages(torch.zeros(4), 1)
    with pytest.raises(TypeError, match=r"^group_size: expected a whole number, got '2'"):
        group_advantages(torch.zeros(4), "2")
    with pytest.raises(TypeError, match=r"^rewards: expected a tensor \[B\], got list; pass torch"):
        group_advantages([1.0, 0.0], 2)
    with pytest.raises(ValueError, match="scale: expected one of 'group', 'none', got 'batch'"):
        group_advantages(torch.zeros(4), 2, scale="batch")
    with pytest.raises(ValueError, match="rewards: expected as many as"):
        sampled_batch([[1], [1]], [[2], [3]], [1.0], 2, 0)


def test_overlap_by_hand() -> None:
    """Three tokens against four, two of them in common: 2 * 2 / 7."""
    assert token_overlap([5, 6, 6], [6, 6, 7, 8]) == pytest.approx(4 / 7)
    assert token_overlap([1, 2], [2, 1]) == 1.0
    assert token_overlap([1], [2]) == 0.0 == token_overlap([], [])


@given(
    a=st.lists(st.integers(0, 5), max_size=12),
    b=st.lists(st.integers(0, 5), min_size=1, max_size=9),
)
def test_overlap_is_symmetric_and_a_share(a: list[int], b: list[int]) -> None:
    assert 0.0 <= token_overlap(a, b) <= 1.0
    assert token_overlap(a, b) == token_overlap(b, a)
    assert token_overlap(b, b) == 1.0


def test_a_batch_has_what_a_policy_loss_takes() -> None:
    batch = sampled_batch([[1, 2], [1, 2]], [[3], [4, 5]], [1.0, 0.0], 2, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [1, 2, 4, 5]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100], [-100, -100, 4, 5]]
    assert batch["advantages"][0] == -batch["advantages"][1] > 0
    assert batch["rewards"].tolist() == [1.0, 0.0]


def test_equal_rewards_have_no_advantage_at_all() -> None:
    """The mean of three times 0.1 is another number, which rounding leaves."""
    rewards = torch.full((6,), 0.1, dtype=torch.float64)
    for scale in ("group", "none"):
        assert (group_advantages(rewards, 3, scale=scale) == 0).all()


# pairs of the best and the worst

SAMPLES = [["a", "b", "c", "d", "e"], ["f", "g"]]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.asarray])
def test_the_best_is_chosen_and_the_worst_is_rejected(kind) -> None:
    """Of five and of two, the first of two best, the last of two worst."""
    scores = [kind([0.5, 2.0, -1.0, 2.0, -1.0]), kind([0.25, 0.75])]
    rows = pairs_of_samples(["x", "y"], SAMPLES, scores)
    assert rows == [
        {
            "prompt": "x",
            "chosen": "b",
            "rejected": "e",
            "score_chosen": 2.0,
            "score_rejected": -1.0,
        },
        {
            "prompt": "y",
            "chosen": "g",
            "rejected": "f",
            "score_chosen": 0.75,
            "score_rejected": 0.25,
        },
    ]
    # what every trainer of pairs reads
    for row, plain in zip(Dataset.from_list(rows), rows, strict=True):
        assert row == plain
        checked = check_row(row, "row")
        texts = (checked.prompt, checked.chosen, checked.rejected)
        assert texts == (plain["prompt"], plain["chosen"], plain["rejected"])


def test_scores_may_be_win_rates_and_responses_messages() -> None:
    prompt = [{"role": "user", "content": "x"}]
    said = [[{"role": "assistant", "content": text}] for text in "abc"]
    won = [[0.5, 0.9, 0.4], [0.1, 0.5, 0.2], [0.6, 0.8, 0.5]]
    (row,) = pairs_of_samples([prompt], [said], [win_rates_of_pairs(won)])
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, said[2], said[1])
    assert row["score_chosen"] == pytest.approx(1.9 / 3, rel=1e-12)


def test_a_tie_is_refused_or_left_out() -> None:
    prompts, samples = ["x", "y", "z"], [["a", "b"], ["a", "b"], ["c", "c"]]
    scores = [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    with pytest.raises(
        ValueError, match=r"prompt 2: expected a best .*, got the score 1 for both; "
    ):
        pairs_of_samples(prompts, samples, scores)
    with pytest.raises(ValueError, match=r"prompt 1: expected a best .*, got one text; sample"):
        pairs_of_samples(prompts[2:], samples[2:], scores[2:])
    (row,) = pairs_of_samples(prompts, samples, scores, ties="drop")
    assert row["prompt"] == "x" and row["chosen"] == "b"
    # others may be alike, if those two are not
    (row,) = pairs_of_samples(["x"], [["a", "a", "b"]], [[1.0, 1.0, 0.0]])
    assert (row["chosen"], row["rejected"]) == ("a", "b")


@pytest.mark.parametrize(
    ("samples", "scores", "message"),
    [
        ([["a"]], [[1.0]], "prompt 1, scores: expected those of at least two responses, got 1"),
        ([["a", "b"]], [[1.0, 2.0, 3.0]], r"prompt 1, scores: expected one for each of 2 samples"),
        ([["a", "b"]], [[[1.0, 2.0]]], r"prompt 1, scores: expected one for each .*, got \[1, 2\]"),
        ([["a", "b"]], [[1.0, float("nan")]], "prompt 1, scores: expected finite numbers, got nan"),
        ([["a", "b"]], [["1", "2"]], "prompt 1, scores: expected real numbers"),
        ([["a", ["b"]]], [[1.0, 2.0]], "prompt 1, samples: expected a text, as the prompt is"),
        (["ab"], [[1.0, 2.0]], "prompt 1, samples: expected a list of responses, got a str"),
        (
            [["a", "b"]],
            [],
            "samples: expected samples and scores of each prompt, got 1 and 0",
        ),
    ],
)
def test_bad_samples_are_refused_with_their_prompt(samples, scores, message) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        pairs_of_samples(["x"], samples, scores)


def test_ties_are_refused_or_dropped_and_nothing_else() -> None:
    with pytest.raises(ValueError, match="ties: expected one of 'refuse', 'drop', got 'first'"):
        pairs_of_samples([], [], [], ties="first")
    assert pairs_of_samples([], [], []) == []
