"""Advantages, the reward of the demonstration, and batches of sampled responses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedpo.recipes.groups import group_advantages, sampled_batch, token_overlap


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
        ValueError, match=r"rewards: expected \[B\], B a multiple of .* 2, .*, got \[5\]"
    ):
        group_advantages(torch.zeros(5), 2)
    with pytest.raises(ValueError, match="rewards: expected"):
        group_advantages(torch.zeros(4), 1)
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
