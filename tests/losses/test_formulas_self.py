"""The written-out losses against themselves: gradients are those of the values, limits are met.

Gradients are compared with central differences of the values. What a loss holds constant is held
constant there too.
"""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
from losses import exact as f


def differences(value, sequences: list[list[float]], step: float = 1e-5) -> list[np.ndarray]:
    """Central differences of a value with respect to every number of the lists, which it reads."""
    found = []
    for numbers in sequences:
        slope = np.zeros(len(numbers))
        for t, x in enumerate(numbers):
            numbers[t] = x + step
            above = value()
            numbers[t] = x - step
            below = value()
            numbers[t] = x
            slope[t] = (above - below) / (2 * step)
        found.append(slope)
    return found


def error(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Relative, in the Frobenius norm over all tokens."""
    a, b = np.concatenate(found), np.concatenate(expected)
    assert a.shape == b.shape
    assert np.linalg.norm(b) > 0
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def flat(pairs: list[f.Pair], grads: list[dict[str, np.ndarray]]):
    """The lists of log-probabilities of some pairs and their gradients, in the same order."""
    logp, of_logp = [], []
    for pair, grad in zip(pairs, grads, strict=True):
        roles = [role for role in f.ROLES if getattr(pair, role) is not None]
        assert list(grad) == roles
        logp += [getattr(pair, role).p for role in roles]
        of_logp += [grad[role] for role in roles]
    return logp, of_logp


def pairs_of(seed: int, P: int = 4, **options) -> list[f.Pair]:
    return f.random_pairs(np.random.default_rng(seed), P, **options)


def samples_of(seed: int, G: int = 6, **options) -> list[f.Sample]:
    return f.random_samples(np.random.default_rng(seed), G, **options)


def same(result, other, rtol: float = 1e-12) -> None:
    """Two results are the same loss."""
    (a, a_grads), (b, b_grads) = result, other
    assert a == pytest.approx(b, rel=rtol, abs=0)
    if a_grads and isinstance(a_grads[0], dict):
        a_grads = [g for of_pair in a_grads for g in of_pair.values()]
        b_grads = [g for of_pair in b_grads for g in of_pair.values()]
    assert error(a_grads, b_grads) <= rtol


# gradients of pairs

PLAIN = {
    "DPO": functools.partial(f.DPO),
    "DPO smoothed": functools.partial(f.DPO, beta=0.5, label_smoothing=0.2),
    "DPO normalized": functools.partial(f.DPO, beta=3.0, length_normalized=True),
    "RobustDPO": functools.partial(f.RobustDPO, beta=0.7),
    "SLiC": functools.partial(f.SLiC),
    "SLiC active": functools.partial(f.SLiC, beta=1.5),
    "IPO": functools.partial(f.IPO),
    "IPO sums": functools.partial(f.IPO, average=False),
    "EXO": functools.partial(f.EXO),
    "NCA": functools.partial(f.NCA, beta=0.4),
    "BCO": functools.partial(f.BCO, beta=0.4),
    "APOZero": functools.partial(f.APOZero),
    "APODown": functools.partial(f.APODown, beta=0.6),
    "AOT": functools.partial(f.AOT),
    "AOT unpaired": functools.partial(f.AOT, beta=0.3, paired=False, label_smoothing=0.1),
    "DiscoPOP": functools.partial(f.DiscoPOP),
    "SPPO": functools.partial(f.SPPO),
    "SPPO scaled": functools.partial(f.SPPO, beta=0.1, scaled=True),
    "SPPO baseline": functools.partial(f.SPPO, beta=0.1, scaled=True, baseline=0.8),
    "SemanticSPPO": functools.partial(f.SemanticSPPO),
    "SimPO": functools.partial(f.SimPO),
    "SimPO hinge": functools.partial(f.SimPO, link="hinge", sft_weight=0.3),
    "SimPO smoothed": functools.partial(f.SimPO, label_smoothing=0.1, sft_weight=1.0),
    "AlphaPO": functools.partial(f.AlphaPO, beta=2.0, gamma=0.3),
    "AlphaPO hinge": functools.partial(f.AlphaPO, beta=1.0, gamma=0.3, alpha=-0.5, link="hinge"),
    "CPO": functools.partial(f.CPO),
    "CPO hinge": functools.partial(f.CPO, link="hinge", nll_weight=0.1),
    "CPO ipo": functools.partial(f.CPO, link="ipo"),
    "CPO smoothed": functools.partial(f.CPO, label_smoothing=0.1, nll_weight=0.0),
    "ORPO": functools.partial(f.ORPO),
    "ORPO odds": functools.partial(f.ORPO, beta=1.0, nll_weight=0.0),
    "SFT": functools.partial(f.SFT, weight=0.4),
}
for _name, _loss in [
    ("DPO", f.DPO),
    ("IPO", f.IPO),
    ("SLiC", f.SLiC),
    ("NCA", f.NCA),
    ("APODown", f.APODown),
]:
    for _divergence in ("forward_kl", "js", "alpha"):
        PLAIN[f"{_name} {_divergence}"] = functools.partial(_loss, divergence=_divergence)
    PLAIN[f"{_name} ld"] = functools.partial(_loss, ld_alpha=0.3)
PLAIN["APOZero ld"] = functools.partial(f.APOZero, ld_alpha=0.3)
PLAIN["IPO all"] = functools.partial(
    f.IPO, divergence="alpha", divergence_alpha=0.2, ld_alpha=0.6, average=False
)
for _base in ("DPO", "SimPO", "ORPO"):
    for _distance in ("abs", "sq", "huber"):
        for _both in (False, True):
            PLAIN[f"ShortToLong {_base} {_distance} {_both}"] = functools.partial(
                f.ShortToLong, base=_base, alpha=1.7, distance=_distance, kappa=0.3, both=_both
            )
for _average in (True, False):
    PLAIN[f"ShortToLong IPO {_average}"] = functools.partial(
        f.ShortToLong, base="IPO", distance="quadratic", scale=0.4, average=_average, both=True
    )
PLAIN["ShortToLong normalized"] = functools.partial(
    f.ShortToLong, base="DPO", beta=3.0, length_normalized=True
)


@pytest.mark.parametrize("name", PLAIN)
def test_pair_gradients(name: str) -> None:
    loss = PLAIN[name]
    pairs = pairs_of(len(name), long="ShortToLong" in name)
    logp, grads = flat(pairs, loss(pairs)[1])
    assert error(differences(lambda: loss(pairs)[0], logp), grads) < 1e-6


FROZEN = {
    "WPO": functools.partial(f.WPO, f.DPO, beta=0.4),
    "WPO ipo": functools.partial(f.WPO, f.IPO, divergence="js"),
    "WPO SimPO": functools.partial(f.WPO, f.SimPO),
    "ShortToLong": functools.partial(f.ShortToLong, detach_short=True),
    "ShortToLong both": functools.partial(
        f.ShortToLong, base="SimPO", detach_short=True, both=True, distance="sq"
    ),
    "ShortToLong huber": functools.partial(
        f.ShortToLong, base="ORPO", detach_short=True, distance="huber", beta=0.3
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_pair_gradients_with_something_constant(name: str) -> None:
    loss = FROZEN[name]
    pairs = pairs_of(len(name), long=True)
    constant = copy.deepcopy(pairs)
    logp, grads = flat(pairs, loss(pairs)[1])
    assert error(differences(lambda: loss(pairs, frozen=constant)[0], logp), grads) < 1e-6
    # and it is not the gradient of the value when nothing is constant
    assert error(differences(lambda: loss(pairs)[0], logp), grads) > 1e-2


@pytest.mark.parametrize("variant", ["kto", "apo_zero"])
@pytest.mark.parametrize("kl", [-0.3, 1.4])
def test_kto_gradients(variant: str, kl: float) -> None:
    rng = np.random.default_rng(5)
    examples = [f.random_response(rng) for _ in range(5)]
    loss = functools.partial(
        f.KTO,
        examples,
        [True, False, False, True, False],
        kl=kl,
        beta=0.8,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        variant=variant,
    )
    found = differences(lambda: loss()[0], [example.p for example in examples])
    assert error(found, loss()[1]) < 1e-6


@pytest.mark.parametrize("form", ["unit_sq_euclid", "cosine", "hinge_sq", "gauss"])
def test_repulsion_gradients(form: str) -> None:
    rng = np.random.default_rng(2)
    h_w, h_l = rng.normal(size=6).tolist(), rng.normal(size=6).tolist()
    loss = functools.partial(f.repulsion, form, margin=5.0, kappa=1.5)
    _, *grads = loss(h_w, h_l)
    assert error(differences(lambda: loss(h_w, h_l)[0], [h_w, h_l]), grads) < 1e-6


# gradients of groups

TOKEN = {
    "GRPO": functools.partial(f.GRPO),
    "GRPO bounded": functools.partial(f.GRPO, dual_clip=1.35, ratio_cap=1.6),
    "GRPO capped": functools.partial(f.GRPO, ratio_cap=1.3),
    "DAPO": functools.partial(f.DAPO),
    "DAPO num_items": functools.partial(f.DAPO, num_items=301),
    "DrGRPO": functools.partial(f.DrGRPO, max_completion_length=40),
    "SoftAdaptive": functools.partial(f.SoftAdaptive, tau_pos=2.0, tau_neg=3.0),
    "CISPO": functools.partial(f.CISPO, epsilon_high=1.3),
    "VESPO": functools.partial(f.VESPO),
    "REINFORCE": functools.partial(f.REINFORCE),
}
SEQUENCE = {
    "GSPO": functools.partial(f.GSPO),
    "GSPO wide": functools.partial(f.GSPO, epsilon_low=0.2, epsilon_high=0.05, num_items=9),
    "GMPO": functools.partial(f.GMPO),
    "LUSPO": functools.partial(f.LUSPO),
    "SoftSequence": functools.partial(f.SoftSequence),
}
for _gate in ("sigmoid_ratio", "softsign_log", "erf_log", "tanh_log", "clip_log", "identity"):
    SEQUENCE[f"SoftSequence {_gate}"] = functools.partial(
        f.SoftSequence, gate=_gate, tau_pos=1.4, tau_neg=2.1
    )
GROUP = TOKEN | SEQUENCE


def check(loss, samples: list[f.Sample]) -> None:
    constant = copy.deepcopy(samples)
    logp = [sample.p for sample in samples]
    # |delta| has a kink on-policy, where the differences of delta / (1 + |delta|) are slow
    step = 1e-7 if loss.keywords.get("gate") == "softsign_log" else 1e-5
    found = differences(lambda: loss(samples, frozen=constant)[0], logp, step)
    assert error(found, loss(samples)[1]) < 1e-6


@pytest.mark.parametrize("name", GROUP)
def test_group_gradients(name: str) -> None:
    check(GROUP[name], samples_of(len(name), weighted=True))


@pytest.mark.parametrize("name", GROUP)
def test_group_gradients_on_policy(name: str) -> None:
    check(GROUP[name], samples_of(len(name), old=False, weighted=True))


@pytest.mark.parametrize("name", TOKEN)
def test_group_gradients_of_advantages_per_token(name: str) -> None:
    check(GROUP[name], samples_of(len(name), weighted=True, per_token=True))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_corrected"])
@pytest.mark.parametrize("name", GROUP)
def test_group_gradients_with_divergence(name: str, estimator: str) -> None:
    loss = functools.partial(GROUP[name], kl_weight=0.7, kl_estimator=estimator)
    check(loss, samples_of(len(name), G=4, reference=True, weighted=True))
    check(loss, samples_of(len(name), G=4, old=False, reference=True))


def test_vespo_gradients_with_the_weight_folded_in() -> None:
    check(functools.partial(f.VESPO, fold_weight=True), samples_of(3, weighted=True))


@pytest.mark.parametrize("name", ["CISPO", "VESPO"])
def test_a_constant_coefficient_is_constant(name: str) -> None:
    samples = samples_of(7)
    _, grads = GROUP[name](samples)
    found = differences(lambda: GROUP[name](samples)[0], [sample.p for sample in samples])
    assert error(found, grads) > 1e-2


# random input


@pytest.mark.parametrize("seed", range(20))
def test_random_input_is_what_it_says(seed: int) -> None:
    for pair in pairs_of(seed, long=True):
        for role in f.ROLES:
            response = getattr(pair, role)
            assert 1 <= len(response.p) <= 30
            assert len(response.p) == len(response.q) == len(response.lssq)
            assert all(-9 < x < 0 for x in response.p + response.q + response.lssq)
            assert all(x >= 2 * p for x, p in zip(response.lssq, response.p, strict=True))
    samples = samples_of(seed)
    advantages = [sample.advantage for sample in samples]
    assert min(advantages) < 0 < max(advantages)
    assert advantages.count(0) == 1
    # some tokens and some sequences are clipped, and some are not
    for loss in (f.GRPO, f.DAPO, f.GSPO, f.GMPO, f.LUSPO):
        grads = [g for s, g in zip(samples, loss(samples)[1], strict=True) if s.advantage]
        active = np.concatenate(grads) != 0
        assert 0 < active.sum() < active.size, loss.__name__
    assert all(sample.o is None for sample in samples_of(seed, old=False))


# worked values


def test_values_at_the_reference() -> None:
    """Where the policy is the reference, losses are known numbers."""
    pairs = pairs_of(0)
    for pair in pairs:
        pair.chosen.q, pair.rejected.q = list(pair.chosen.p), list(pair.rejected.p)
    log2 = math.log(2)
    e = 1e-3
    expected = {
        "DPO": log2,
        "DPO smoothed": log2,
        "DPO normalized": log2,
        "RobustDPO": log2,
        "SLiC": 1.0,
        "IPO": 25.0,
        "EXO": -log2 - math.log(e * (1 - e)) / 2,
        "NCA": 2 * log2,
        "BCO": 2 * log2,
        "APOZero": 1.0,
        "APODown": 1.0,
        "AOT": log2,
        "AOT unpaired": log2,
        "DiscoPOP": (log2 + 1) / 2,
    }
    for name, value in expected.items():
        assert PLAIN[name](pairs)[0] == pytest.approx(value, rel=1e-12, abs=0), name
    assert f.DPO(pairs)[1][0]["chosen"] == pytest.approx(-0.05 / len(pairs), rel=1e-12, abs=0)


def test_values_by_hand() -> None:
    w, l = f.Response([-1.0, -2.0], [-1.5, -2.5], [-0.5, -1.0]), f.Response([-3.0], [-2.0], [-2.0])
    pairs = [f.Pair(w, l)]

    def is_about(loss, value):
        assert loss[0] == pytest.approx(value, rel=1e-12, abs=0)

    # a_w = 1, a_l = -1, Delta = 2, pbar_w = -1.5, pbar_l = -3
    is_about(f.DPO(pairs, beta=0.5), math.log1p(math.exp(-1.0)))
    is_about(f.DPO(pairs, beta=1.0, length_normalized=True), math.log1p(math.exp(-1.5)))
    is_about(f.DPO(pairs, beta=0.5, ld_alpha=0.0), math.log1p(math.exp(-0.75)))
    is_about(f.IPO(pairs, beta=0.25), 0.5**2)
    is_about(f.IPO(pairs, beta=0.5, average=False), 1.0)
    is_about(f.SLiC(pairs, beta=0.25), 0.5)
    is_about(f.SPPO(pairs, beta=0.25), ((1 - 2) ** 2 + (-1 + 2) ** 2) / 2)
    is_about(f.SimPO(pairs, beta=2.0, gamma=0.5), math.log1p(math.exp(-2.5)))
    is_about(f.SimPO(pairs, beta=1.0, gamma=1.0, link="hinge", sft_weight=1.0), 0.5 + 1.5)
    is_about(f.CPO(pairs, beta=0.25, link="ipo", nll_weight=0.0), 0.25)
    is_about(f.CPO(pairs, nll_weight=2.0), math.log(2) + 3.0)
    is_about(
        f.SLiC(pairs, beta=0.1, divergence="forward_kl"), 1 - 0.1 * (math.exp(1) - math.exp(-1))
    )
    # c_w = -0.75 on average, c_l = -1
    is_about(f.WPO(f.SLiC, pairs, beta=0.25), 0.5 * math.exp(-1.75))
    odds_w, odds_l = (math.exp(x) / (1 - math.exp(x)) for x in (-1.5, -3.0))
    is_about(f.ORPO(pairs, beta=0.2), 1.5 + 0.2 * math.log1p(odds_l / odds_w))


def test_sorted_values_by_hand() -> None:
    """Margins 3 and 1 of the policy, 0 and 2 of the reference: ranks match 1 with 0, 3 with 2."""
    pairs = [
        f.Pair(f.Response([-1.0], [-2.0]), f.Response([-4.0], [-2.0])),
        f.Pair(f.Response([-1.0], [-1.0]), f.Response([-2.0], [-3.0])),
    ]
    loss, grads = f.AOT(pairs, beta=1.0)
    assert loss == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-12, abs=0)
    # log-ratios 1 and 0 of the chosen, -2 and 1 of the rejected: 0 with -2, 1 with 1
    loss, grads = f.AOT(pairs, beta=1.0, paired=False)
    expected = (math.log1p(math.exp(-2.0)) + math.log(2)) / 2
    assert loss == pytest.approx(expected, rel=1e-12, abs=0)
    slopes = [float(grad[role][0]) for grad in grads for role in ("chosen", "rejected")]
    small = 0.5 / (1 + math.exp(2.0))
    assert slopes == pytest.approx([-0.25, small, -small, 0.25], rel=1e-12, abs=0)


def test_other_values_by_hand() -> None:
    w, l = f.Response([-1.0, -2.0], [-1.5, -2.5]), f.Response([-3.0], [-2.0])
    # a = 1 and -1; z0 = 1/2
    kto = f.KTO([w, l], [True, False], kl=0.5, beta=2.0, desirable_weight=3.0)
    expected = (3 / (1 + math.exp(1.0)) + 1 / (1 + math.exp(3.0))) / 2
    assert kto[0] == pytest.approx(expected, rel=1e-12, abs=0)
    # z0 is not negative, and not there in the other variant
    same(f.KTO([w, l], [True, False], kl=-2.0), f.KTO([w, l], [True, False]))
    same(f.KTO([w, l], [True, False], kl=2.0, variant="apo_zero"), f.KTO([w, l], [True, False]))
    pair = f.Pair(w, l, f.Response([-2.0, -3.0], [-1.5, -2.5]))
    # of the long input a = -1, pbar = -2.5
    base = f.DPO([pair], beta=0.5)[0]
    for distance, value in {"abs": 1.0, "sq": 1.0, "huber": math.sqrt(2) - 1}.items():
        loss, _ = f.ShortToLong([pair], alpha=3.0, distance=distance, kappa=1.0, beta=0.5)
        assert loss - base == pytest.approx(3 * value, rel=1e-12, abs=0)
    # the log-ratio per token is 1/2 and -1/2
    for distance, value in {"quadratic": (1 / 2) ** 2, "sq": 0.2**2 * 2**2}.items():
        loss, _ = f.ShortToLong([pair], base="IPO", alpha=3.0, beta=0.2, distance=distance, scale=2)
        assert loss - f.IPO([pair], beta=0.2)[0] == pytest.approx(3 * value, rel=1e-12, abs=0)
    loss, _ = f.ShortToLong([pair], base="SimPO", alpha=3.0, beta=4.0)
    assert loss - f.SimPO([pair], beta=4.0)[0] == pytest.approx(3 * 4.0, rel=1e-12, abs=0)


def test_group_values_by_hand() -> None:
    up, down = math.log(1.5), math.log(0.5)
    samples = [
        f.Sample([-1.0, -2.0, -3.0], [-1.0 - up, -2.0 - down, -3.0], None, 1.0),
        f.Sample([-1.5], [-1.5 - up], None, -2.0),
    ]
    first, second = -(1.2 + 0.5 + 1.0), 3.0

    def is_about(loss, value):
        assert loss[0] == pytest.approx(value, rel=1e-12, abs=0)

    is_about(f.GRPO(samples), (first / 3 + second) / 2)
    is_about(f.GRPO(samples, dual_clip=1.25), (first / 3 + 2.5) / 2)
    is_about(f.GRPO(samples, ratio_cap=1.3), (first / 3 + 2.6) / 2)
    is_about(f.DAPO(samples), (first - 0.08 + second) / 4)
    is_about(f.DrGRPO(samples, max_completion_length=10), (first + second) / 20)
    s = 0.75 ** (1 / 3)
    is_about(f.GSPO(samples), (-s + 3.0) / 2)
    is_about(f.LUSPO(samples), (-3 * s + 3.0) / 2)
    is_about(f.GMPO(samples), (-((math.exp(0.4) * 0.5) ** (1 / 3)) + 3.0) / 2)
    is_about(f.CISPO(samples, epsilon_high=1.25), (1.25 + 0.5 * 2 + 3 - 2 * 1.25 * 1.5) / 4)
    phi = math.exp(3) * 0.75**2 * math.exp(-3 * 0.75), math.exp(2) * 1.5**3 * math.exp(-2 * 1.5)
    is_about(f.VESPO(samples), (6 * phi[0] - 3 * phi[1]) / 4)
    is_about(f.REINFORCE(samples), (6 - 3) / 4)
    is_about(f.REINFORCE(samples, num_items=6), (6 - 3) / 6)


# what is known of them


SEQUENCE_MEAN = ["GRPO", "SoftAdaptive", *SEQUENCE]
SEQUENCE_MEAN.remove("LUSPO")
SEQUENCE_MEAN.remove("GSPO wide")


@pytest.mark.parametrize("name", SEQUENCE_MEAN)
def test_on_policy_the_gradient_is_minus_the_advantage(name: str) -> None:
    for old in (False, True):
        samples = samples_of(1, old=old)
        for sample in samples:
            sample.o = list(sample.p) if old else None
        _, grads = GROUP[name](samples)
        expected = [np.full(len(s.p), -s.advantage / len(samples) / len(s.p)) for s in samples]
        assert error(grads, expected) < 1e-13


@pytest.mark.parametrize("name", ["DAPO", "CISPO", "VESPO", "REINFORCE"])
def test_on_policy_token_means(name: str) -> None:
    samples = samples_of(1, old=False)
    tokens = sum(len(s.p) for s in samples)
    expected = [np.full(len(s.p), -s.advantage / tokens) for s in samples]
    assert error(GROUP[name](samples)[1], expected) < 1e-13


def test_soft_sequence_meets_its_neighbours() -> None:
    samples = samples_of(4, weighted=True)
    unclipped = f.GSPO(samples, epsilon_low=1.0, epsilon_high=1e9)
    same(f.SoftSequence(samples, gate="identity"), unclipped)
    same(f.SoftSequence(samples, gate="clip_log"), f.GMPO(samples))
    same(f.SoftSequence(samples, 1e-6, 1e-6), unclipped, rtol=1e-9)
    token_level = f.GRPO(samples, epsilon_low=1.0, epsilon_high=1e9)
    soft = f.SoftSequence(samples, 1e-9, 1e-9, gate="sigmoid_ratio")
    assert error(soft[1], token_level[1]) < 1e-6


def test_soft_sequence_weights_are_bounded() -> None:
    for delta in (-700.0, -3.0, 0.2, 5.0, 700.0):
        for tau in (0.5, 1.0, 2.5):
            assert abs(f.log_gate("arctan_log", delta, tau)[0]) <= math.pi / (2 * tau)
            assert f.log_gate("sigmoid_ratio", delta, tau)[0] <= math.log(4 / tau)


def test_semantic_sppo_meets_sppo() -> None:
    pairs = pairs_of(6)
    for pair in pairs:
        pair.inputs = {"similarity": -0.1}
    same(f.SemanticSPPO(pairs), f.SPPO(pairs))
    for pair in pairs:
        pair.inputs = {"similarity": 1.0, "win_rate_chosen": 0.9, "win_rate_rejected": 0.3}
    centred = copy.deepcopy(pairs)
    for pair in centred:
        pair.inputs = {"win_rate_chosen": 0.5, "win_rate_rejected": 0.5}
    same(f.SemanticSPPO(pairs), f.SPPO(centred))
    assert f.soften(0.8, 0.3) + f.soften(0.2, 0.3) == pytest.approx(1.0, rel=1e-12, abs=0)


def test_simpo_gives_and_takes_as_much() -> None:
    for grad in f.SimPO(pairs_of(8))[1]:
        assert grad["chosen"].sum() == pytest.approx(-grad["rejected"].sum(), rel=1e-12, abs=0)


def test_alphapo_tends_to_simpo() -> None:
    pairs = pairs_of(9)
    same(f.AlphaPO(pairs, 2.0, 0.5, alpha=0), f.SimPO(pairs))
    same(f.AlphaPO(pairs, 2.0, 0.5, alpha=1e-7), f.SimPO(pairs), rtol=1e-5)


def test_orpo_is_antisymmetric() -> None:
    for pair in pairs_of(10):
        swapped = f.Pair(pair.rejected, pair.chosen)
        there, (grad,) = f.ORPO([pair], beta=1.0, nll_weight=0.0)
        back, _ = f.ORPO([swapped], beta=1.0, nll_weight=0.0)
        # -log sigma(lo) of lo and of -lo
        assert math.exp(-there) + math.exp(-back) == pytest.approx(1.0, rel=1e-12, abs=0)
        w, l = pair.chosen.p, pair.rejected.p
        of_w = grad["chosen"].sum() * (1 - math.exp(f.mean(w)))
        of_l = grad["rejected"].sum() * (1 - math.exp(f.mean(l)))
        assert of_w == pytest.approx(-of_l, rel=1e-12, abs=0)


@pytest.mark.parametrize("base", ["DPO", "SimPO", "ORPO"])
def test_short_to_long_meets_its_base(base: str) -> None:
    loss = getattr(f, base)
    pairs = pairs_of(11, long=True)
    same(f.ShortToLong(pairs, base=base, alpha=0.0, beta=0.3), loss(pairs, beta=0.3))
    for pair in pairs:
        pair.long_chosen = copy.deepcopy(pair.chosen)
    same(f.ShortToLong(pairs, base=base, alpha=3.0), loss(pairs))


@pytest.mark.parametrize("paired", [True, False])
def test_aot_of_one_pair_is_dpo(paired: bool) -> None:
    pairs = pairs_of(12, P=1)
    same(f.AOT(pairs, beta=0.2, paired=paired), f.DPO(pairs, beta=0.2))


def test_modifiers_at_rest() -> None:
    pairs = pairs_of(13)
    same(f.DPO(pairs, divergence="reverse_kl", ld_alpha=1.0), f.DPO(pairs))
    # S(a) = (e^((alpha-1) a) - 1)/(alpha-1) is forward KL's at alpha = 0
    same(
        f.DPO(pairs, divergence="alpha", divergence_alpha=0.0),
        f.DPO(pairs, divergence="forward_kl"),
    )
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            response.lssq = list(response.p)
    same(f.WPO(f.DPO, pairs), f.DPO(pairs))


def test_importance_weights_leave_the_divergence_alone() -> None:
    samples = samples_of(14, reference=True)
    for sample in samples:
        sample.weight = 0.0
    kl = 0.0
    for sample in samples:
        of_tokens = [f.kl_term("k3", p, q, 0.0)[0] for p, q in zip(sample.p, sample.q, strict=True)]
        kl += f.mean(of_tokens) / len(samples)
    for loss in (f.GRPO, f.GSPO, f.GMPO, f.SoftSequence, f.SoftAdaptive):
        found, _ = loss(samples, kl_weight=0.5)
        assert found == pytest.approx(0.5 * kl, rel=1e-12, abs=0)


def test_an_empty_sequence_gets_nothing() -> None:
    samples = [*samples_of(15), f.Sample([], [], None, 0.7)]
    for name, loss in GROUP.items():
        value, grads = loss(samples)
        assert math.isfinite(value), name
        assert grads[-1].shape == (0,), name
    pair = pairs_of(15, P=1)[0]
    pair.rejected = f.Response([], [], [])
    for name in ("DPO", "DPO normalized", "IPO", "SPPO", "CPO"):
        value, (grad,) = PLAIN[name]([pair])
        assert math.isfinite(value), name
        assert grad["rejected"].shape == (0,), name
