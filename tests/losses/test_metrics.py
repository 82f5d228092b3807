"""Metrics worked by hand: which tokens and responses count, in which direction, over what."""

from __future__ import annotations

import math

import pytest
import torch
from losses.problems import scores_of

from fusedpo import preference_loss
from fusedpo.losses import (
    CISPO,
    GRPO,
    GSPO,
    KTO,
    ORPO,
    VESPO,
    PolicyLoss,
    PreferenceLoss,
    SemanticSPPO,
    ShortToLong,
    SimPO,
)
from fusedpo.objective.policy import PolicyProblem
from fusedpo.objective.sequences import Sequences

LOG_2 = math.log(2)
# pi / pi_old of three tokens of a response, and of one of another; log(pi_ref / pi) of all
RATIOS = torch.tensor([2.0, 0.25, 8.0, 0.5], dtype=torch.float64)
BEHIND = torch.tensor([LOG_2, -LOG_2, 0.0, 2 * LOG_2], dtype=torch.float64)


def metrics(loss: PolicyLoss, *signs: float, reference: bool = False) -> dict[str, float]:
    """Of the two responses with log-probabilities of -1 and these advantages."""
    logprob = torch.full((4,), -1.0, dtype=torch.float64)
    lengths = torch.tensor([3, 1])
    problem = PolicyProblem(
        loss,
        Sequences(torch.tensor([0, 0, 0, 1]), lengths, lengths.cumsum(0) - lengths),
        advantage=torch.tensor(signs, dtype=torch.float64).repeat_interleave(lengths),
        weight=torch.full((4,), 0.25, dtype=torch.float64),
        old=logprob - RATIOS.log(),
        reference=logprob + BEHIND if reference else None,
    )
    entropy = torch.tensor([0.1, 0.2, 0.3, 0.6], dtype=torch.float64)
    found = problem.metrics({"logprob": logprob, "entropy": entropy})
    return {name: value.item() for name, value in found.items()}


@pytest.mark.holds(33)
@pytest.mark.parametrize(
    ("loss", "signs", "expected"),
    [
        # k3 from samples of the policy itself would be r - 1 - log r
        (
            GRPO(),
            (1, -1),
            {
                "ratio/mean": 10.75 / 4,
                "kl_old": (0.5 + 4 + 0.125 + 2 - 4 + LOG_2 * (1 - 2 + 3 - 1)) / 4,
                "entropy": 0.3,
                "clip_ratio/low_mean": 1 / 4,  # 0.5; 0.25 has a gradient that raises it
                "clip_ratio/high_mean": 1 / 2,
                "clip_ratio/region_mean": 3 / 4,
            },
        ),
        (GRPO(), (-1, 1), {"clip_ratio/low_mean": 1 / 4, "clip_ratio/high_mean": 0}),
        (GRPO(), (0, -1), {"clip_ratio/high_mean": 0, "clip_ratio/region_mean": 1 / 4}),
        # of responses, whose ratios are 4^(1/3) and 1/2
        (GSPO(), (1, -1), {"clip_ratio/low_mean": 1 / 2, "clip_ratio/high_mean": 1 / 2}),
        (GSPO(), (-1, 1), {"clip_ratio/low_mean": 0, "clip_ratio/region_mean": 0}),
        (CISPO(epsilon_high=1.5), (1, -1), {"cispo_clip_ratio": 1 / 2}),
        (CISPO(epsilon_high=5.0), (1, 1), {"cispo_clip_ratio": 1 / 4}),
        (CISPO(epsilon_high=1.5), (-1, 1), {"cispo_clip_ratio": 0}),
        # W = 4 and 1/2: e^3 W^2 e^(-3 W) and e^2 W^3 e^(-2 W)
        (VESPO(), (1, -1), {"vespo/phi_seq_mean": (16 * math.exp(-9) + math.e / 8) / 2}),
    ],
    ids=str,
)
def test_of_sampled_responses(
    loss: PolicyLoss, signs: tuple[float, float], expected: dict[str, float]
) -> None:
    found = metrics(loss, *signs)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_the_divergence_from_the_reference() -> None:
    """Mean of q / p - 1 - log(q / p), the estimate k3 from samples of p, the policy."""
    found = metrics(GRPO(kl_weight=0.1), 1, -1, reference=True)
    assert found["kl"] == pytest.approx((2 + 0.5 + 1 + 4 - 4 - 2 * LOG_2) / 4, rel=1e-12)


def test_the_gap_of_two_contexts_is_a_mean_of_distances() -> None:
    """Rewards 2 logp: one response is 2 above its own on the long context, the other 6 below."""
    short, other, long = scores_of([-2.0, -4.0]), scores_of([-5.0] * 2), scores_of([-3.0, -1.0])
    found = ShortToLong(SimPO(beta=2.0)).metrics(short, other, long)
    assert found["rewards/short_to_long_gap"].item() == pytest.approx(4.0, rel=1e-12)
    assert found["rewards/long_chosen"].item() == pytest.approx(-4.0, rel=1e-12)


@pytest.mark.parametrize(("kl", "logged"), [([-3.0, 1.0], 0.0), ([3.0, -1.0], 1.0)])
def test_the_reference_point_is_logged_as_it_is_used(kl: list[float], logged: float) -> None:
    s = scores_of([-8.0] * 2, [-10.0] * 2)
    found = KTO().metrics(s, desirable=torch.tensor([1, 0]), kl=torch.tensor(kl))
    assert found["kl"].item() == logged


@pytest.mark.parametrize(
    "loss",
    [
        SemanticSPPO(repulsion="cosine", repulsion_weight=0.3),
        SimPO(sft_weight=0.5),
        ORPO(),
        KTO(variant="apo_zero"),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_metrics_are_of_the_batch_whatever_the_loss_is_divided_by(loss: PreferenceLoss) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, 6, generator=g), torch.randn(20, 6, generator=g)
    labels = torch.randint(20, (4, 5), generator=g)
    given: dict = {"ref_hidden": hidden + 0.1} if loss.needs_reference else {}
    if isinstance(loss, KTO):
        given["desirable"] = torch.tensor([1, 0, 1, 0])
    step = {"num_items": 7.0, **({"num_tokens": 90} if loss.nll_weight else {})}
    own = preference_loss(loss, hidden, weight, labels, **given)
    of_step = preference_loss(loss, hidden, weight, labels, **given, **step)
    assert own.loss != of_step.loss
    assert own.metrics == of_step.metrics
    if loss.uses_states:
        units = hidden[:, -1] / hidden[:, -1].norm(dim=-1, keepdim=True)
        expected = 0.3 * (units[:2] * units[2:]).sum(-1).mean()
        assert own.metrics["loss/states"].item() == pytest.approx(expected.item(), rel=1e-5)
