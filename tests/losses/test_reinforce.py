"""REINFORCE: worked numbers, and that every policy loss is it for the policy that sampled."""

from __future__ import annotations

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled
from losses.shared import made

from fusedpo.losses import REINFORCE, PolicyLoss, SoftSequence, available
from fusedpo.losses.gates import GATES


def exact(samples: list[f.Sample], **options) -> f.Result:
    """-A p_t, mean over all tokens"""

    def rule(p, delta, still, advantage):
        return -advantage * p, -advantage

    return f.of_tokens(samples, rule, "token_mean", **options)


EXACT = {
    REINFORCE: (exact, [{}]),
}

DEFAULTS = [
    "REINFORCE()",
]

EVERY = [cls() for cls in available().values() if issubclass(cls, PolicyLoss)]
EVERY += [made(SoftSequence, gate=gate, tau_pos=0.7, tau_neg=1.9) for gate in GATES]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-probabilities -1: A = 2 for two tokens and -3 for one, L = (2 + 2 - 3) / 3."""
    found = of_samples(REINFORCE(), sampled([0.4, 0.1], [0.0], advantages=[2.0, -3.0]))
    assert found.value == pytest.approx(1 / 3, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([-2 / 3] * 2, rel=1e-12)
    assert found.gradients[1].tolist() == pytest.approx([1.0], rel=1e-12)


@pytest.mark.parametrize("given", [True, False], ids=["equal", "none"])
@pytest.mark.parametrize("loss", EVERY, ids=lambda loss: f"{type(loss).__name__}")
def test_the_policy_that_sampled_has_the_plain_gradient(loss: PolicyLoss, given: bool) -> None:
    """dL/dp_t = -A w, w being what the token counts in the mean."""
    lengths, advantages = (3, 1, 5), [1.5, -0.5, 0.0]
    samples = sampled(*([0.0] * n for n in lengths), advantages=advantages)
    if not given:
        for sample in samples:
            sample.o = None
    found = of_samples(loss, samples)
    for n, a, gradient in zip(lengths, advantages, found.gradients, strict=True):
        weight = {"sequence_mean": 1 / (3 * n), "sequence_sum": 1 / 3, "token_mean": 1 / 9}
        truth = -a * weight[loss.aggregation] / loss.divisor
        assert gradient.tolist() == pytest.approx([truth] * n, rel=1e-13, abs=0)


@pytest.mark.parametrize("name, value", [("kl_weight", -0.1), ("entropy_bonus", float("nan"))])
def test_bad_hyperparameters_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        REINFORCE(**{name: value})
