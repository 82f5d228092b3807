"""VESPO: worked numbers, the peak of its weight, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import VESPO
from fusedpo.losses.scores import Tokens
from fusedpo.objective.sequences import Sequences


def exact(
    samples: list[f.Sample],
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    fold_weight: bool = False,
    num_items: float | None = None,
    kl_weight: float = 0.0,
    kl_estimator: str = "k3",
    frozen: list[f.Sample] | None = None,
) -> f.Result:
    """-sg[phi(W)] A p_t,  W = exp(sum_t delta_t), mean over all tokens

    Each delta_t is within [-20, 20]. ``fold_weight``: a sample's weight multiplies W, not the loss.
    """
    frozen = frozen or samples
    weights = f.weights_of_tokens(samples, "token_mean", num_items)
    loss = 0.0
    grads = [np.zeros(len(sample.p)) for sample in samples]
    for sample, constant, w, grad in zip(samples, frozen, weights, grads, strict=True):
        log_w = sum(f.clip(x, -20.0, 20.0) for x in f.log_ratios(constant, constant))
        importance = f.per_token(sample.weight, len(sample.p))
        if fold_weight:
            log_w += math.log(f.per_sequence(sample.weight))
            importance = [1.0] * len(sample.p)
        advantage = f.per_token(sample.advantage, len(sample.p))
        for t, (p, a) in enumerate(zip(sample.p, advantage, strict=True)):
            k, lam = (k_pos, lambda_pos) if a >= 0 else (k_neg, lambda_neg)
            coefficient = importance[t] * f.vespo_phi(log_w, k, lam) * a
            loss -= w * coefficient * p
            grad[t] = -w * coefficient
    return f.add_kl(loss, grads, samples, frozen, weights, kl_weight, kl_estimator)


EXACT = {
    VESPO: (exact, [{}, {"k_pos": 1.0, "lambda_pos": 2.0, "k_neg": 2.0, "lambda_neg": 1.0}]),
}

DEFAULTS = [
    "VESPO(k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Two tokens with W = 1/2 together. A = 2: phi = e^3 (1/4) e^-1.5 = 1.1204223; A = -2: phi =
    e^2 (1/8) e^-1 = 0.3397852. Log-probabilities -1: L = phi A, gradients -phi A / 2."""
    for advantage, phi in ((2.0, 1.1204222675845161), (-2.0, 0.3397852285573807)):
        samples = sampled([math.log(0.5) + 1, -1.0], advantages=[advantage])
        found = of_samples(VESPO(), samples)
        assert found.value == pytest.approx(phi * advantage, rel=1e-12)
        assert found.gradients[0].tolist() == pytest.approx([-phi * advantage / 2] * 2, rel=1e-12)


def test_the_weight_is_largest_at_k_over_lambda() -> None:
    def phi(w: float) -> float:
        loss = VESPO(k_pos=2.0, lambda_pos=4.0)
        return of_samples(loss, sampled([math.log(w)], advantages=[1.0])).value

    assert phi(0.45) < phi(0.5) > phi(0.55)


@pytest.mark.parametrize("delta", [-1e4, 1e4])
def test_a_response_from_far_away_counts_for_nothing(delta: float) -> None:
    found = of_samples(VESPO(), sampled([delta] * 4, advantages=[1.0]))
    assert 0 <= found.value < 1e-12 and math.isfinite(found.gradients[0].sum())


def test_a_log_ratio_is_limited_by_token_and_by_response() -> None:
    """phi e^(-3) is W^2 e^(-3 W): W is 1e-8 at least, where a response is that unlikely by tokens
    of no less than -20 each; a token of -30 is one of -20."""
    for deltas, w in (([-10.0, -15.0], 1e-8), ([-30.0, 19.0], math.exp(-1.0))):
        found = of_samples(VESPO(), sampled(deltas, advantages=[1.0])).value
        assert found == pytest.approx(w**2 * math.exp(3 - 3 * w), rel=1e-12, abs=0)


def test_one_token_is_limited_before_it_is_added() -> None:
    """Log-ratios -30 and 20 are limited to +-20 each: log W = 0, phi = 1."""
    samples = sampled([-30.0, 20.0], advantages=[1.0])
    lost = -sum(samples[0].p) / 2
    assert of_samples(VESPO(), samples).value == pytest.approx(lost, rel=1e-12)


def test_a_weight_of_nothing_counts_as_the_least() -> None:
    """An importance weight of 0 is 1e-8, so that log-ratios above it still count."""
    least = VESPO().log_correction(torch.zeros(1, dtype=torch.float64))
    assert least.tolist() == pytest.approx([math.log(1e-8)], rel=1e-12)


@pytest.mark.parametrize("advantage, phi", [(0.0, 2.0), (-0.0, 2.0), (1.0, 2.0), (-1.0, 3.0)])
def test_the_logged_weight_takes_the_side_of_the_advantage(advantage: float, phi: float) -> None:
    """At W = 1 phi is 1 on either side; at log W = log 2 and lambda near 0 it is about 2^k."""
    loss = VESPO(k_pos=1.0, lambda_pos=1e-12, k_neg=math.log(3, 2), lambda_neg=1e-12)
    one = torch.tensor([math.log(2.0)], dtype=torch.float64)
    sequences = Sequences(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    t = Tokens(one, torch.tensor([advantage]).double(), sequences, torch.zeros_like(one))
    assert loss.metrics(t)["vespo/phi_seq_mean"].item() == pytest.approx(phi, rel=1e-9)


@pytest.mark.parametrize("name", ["k_pos", "lambda_pos", "k_neg", "lambda_neg"])
def test_bad_hyperparameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        VESPO(**{name: 0.0})
