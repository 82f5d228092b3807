"""SoftSequence: worked numbers, bounds of its gates, and the losses it has as cases."""

from __future__ import annotations

import math

import pytest
import torch
from losses import formulas as f
from losses.problems import Found, of_samples, sampled

from fusedpo.losses import GMPO, GSPO, SoftSequence
from fusedpo.losses.gates import GATES, clip_log


def exact(
    samples: list[f.Sample],
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    gate: str = "arctan_log",
    epsilon: float = 0.4,
    **options,
) -> f.Result:
    """-A s,  s = exp(mean_t phi(delta_t)): mean over sequences. ``epsilon`` is for clip_log."""

    def rule(delta, advantage):
        tokens = max(len(delta), 1)
        tau = tau_pos if advantage > 0 else tau_neg
        gates = [f.log_gate(gate, x, tau, advantage, epsilon) for x in delta]
        s = math.exp(sum(phi for phi, _ in gates) / tokens)
        return -advantage * s, [-advantage * s / tokens * slope for _, slope in gates]

    return f.of_sequences(samples, rule, **options)


EXACT = {
    SoftSequence: (
        exact,
        [
            {"tau_pos": 1.4, "tau_neg": 2.1},
            {"gate": "sigmoid_ratio", "tau_pos": 1.4, "tau_neg": 2.1},
        ],
    ),
}

DEFAULTS = [
    "SoftSequence(tau_pos=1.0, tau_neg=1.05, gate='arctan_log')",
]

SAMPLES = sampled(
    [0.3, -0.2, 0.9], [0.5, -0.7], [-0.4], [0.1, 2.0], advantages=[1.0, -2.0, 0.0, 0.5]
)
# far from its clip, on either side
UNCLIPPED = GSPO(epsilon_low=0.999, epsilon_high=1e9)


def apart(a: Found, b: Found) -> float:
    """The largest relative difference of values and gradients."""
    found = [abs(a.value / b.value - 1)]
    for x, y in zip(a.gradients, b.gradients, strict=True):
        assert ((x == 0) == (y == 0)).all()
        found += (abs(x[y != 0] / y[y != 0] - 1)).tolist()
    return max(found)


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 1 and -0.5, A = 2, tau 1: arctan 0.7853982 and -0.4636476, s = exp of their mean,
    0.1608753, = 1.1745385; L = -2 s, gradients -2 s / 2 times 1/2 and 1/1.25."""
    s = 1.17453846794966
    found = of_samples(SoftSequence(), sampled([1.0, -0.5], advantages=[2.0]))
    assert found.value == pytest.approx(-2 * s, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([-s / 2, -s / 1.25], rel=1e-12)


def test_the_identity_is_gspo_without_its_clip() -> None:
    mine = of_samples(SoftSequence(gate="identity"), SAMPLES)
    assert apart(mine, of_samples(UNCLIPPED, SAMPLES)) < 1e-14


@pytest.mark.parametrize("c", [0.1, 0.4, 1.0])
def test_a_clip_is_gmpo(c: float) -> None:
    mine = of_samples(SoftSequence(gate="clip_log", tau_pos=c, tau_neg=c), SAMPLES)
    assert apart(mine, of_samples(GMPO(epsilon=c), SAMPLES)) == 0.0


@pytest.mark.parametrize("gate", GATES)
def test_far_from_the_sampling_policy_all_is_finite(gate: str) -> None:
    found = of_samples(SoftSequence(gate=gate), sampled([1e3], [-1e3], advantages=[1.0, -1.0]))
    assert math.isfinite(found.value)
    assert all(math.isfinite(x) for g in found.gradients for x in g)


def test_a_weight_is_limited_where_single_precision_ends_only() -> None:
    """exp(60) is still itself; beyond exp(80) there is no more of it."""
    loss = SoftSequence(gate="identity")
    for delta, score in ((60.0, 60.0), (90.0, 80.0)):
        found = of_samples(loss, sampled([delta], advantages=[-1.0]))
        assert found.value == pytest.approx(math.exp(score), rel=1e-12)


def test_without_an_advantage_a_clip_has_nothing() -> None:
    """Neither value nor gradient, though the response before it has both."""
    delta = torch.tensor([0.5, 0.7, -0.9], dtype=torch.float64, requires_grad=True)
    found = clip_log(delta, torch.tensor([0.2, 0.0, -0.0], dtype=torch.float64))
    assert found.tolist() == [0.2, 0.0, 0.0]
    assert torch.autograd.grad(found.sum(), delta)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("gate", ["arctan_log", "softsign_log", "erf_log", "tanh_log"])
def test_a_small_temperature_is_the_identity(gate: str) -> None:
    mine = of_samples(SoftSequence(1e-7, 1e-7, gate), SAMPLES)
    assert apart(mine, of_samples(UNCLIPPED, SAMPLES)) < 2e-6


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "gate, limit",
    [
        ("arctan_log", lambda tau: math.pi / (2 * tau)),
        ("softsign_log", lambda tau: 1 / tau),
        ("erf_log", lambda tau: math.sqrt(math.pi) / (2 * tau)),
        ("tanh_log", lambda tau: 1 / tau),
    ],
)
def test_the_logarithm_of_the_weight_is_bounded(gate: str, limit, tau: float) -> None:
    for delta in (-1e6, -3.0, 3.0, 1e6):
        found = of_samples(SoftSequence(tau, tau, gate), sampled([delta] * 3, advantages=[-1.0]))
        assert abs(math.log(found.value)) <= limit(tau) * (1 + 1e-15)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_a_sigmoid_weighs_below_four_over_tau(tau: float) -> None:
    for delta in (-3.0, 0.0, 1.0):
        found = of_samples(
            SoftSequence(tau, tau, "sigmoid_ratio"), sampled([delta] * 2, advantages=[-1.0])
        )
        assert 0 < found.value < 4 / tau


@pytest.mark.parametrize(
    "name, value", [("tau_pos", 0.0), ("tau_neg", -1.0), ("gate", "arctan"), ("gate", "sigmoid")]
)
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SoftSequence(**{name: value})
