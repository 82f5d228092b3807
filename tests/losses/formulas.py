"""What the written-out losses are made of: ragged token log-probabilities, rules, sums of them.

Nothing of it is imported from the library. The formula of a loss stands in the test file of that
loss (exact.py finds it), with what is here as ``f``. It is a plain program over Python's floats,
one example after another, that returns its value by its formula and, separately, the derivative
with respect to each token's log-probability by the closed form of that derivative. The derivatives
are those of the whole loss: the mean over pairs, examples or groups is in them.

    pairs     f(pairs, **hyperparameters)           -> loss, [{role: array of dL/dp_t}]
    examples  KTO(examples, desirable, kl, ...)     -> loss, [array]
    groups    f(samples, **hyperparameters)         -> loss, [array]

A sequence without tokens has averages of zero, counts as a member of its batch or group, and
receives an empty gradient; to a loss of a group it adds nothing.

Some losses hold a quantity constant ("stop-gradient"). They take ``frozen``, a copy of their
input: what is held constant is computed from it, what is not from the input itself. By default both
are the same, which is the loss; with a fixed copy the value is a function whose ordinary derivative
is the gradient returned, so that finite differences can be compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

# what goes in


@dataclass
class Response:
    """A completion: log-probabilities of its tokens under the policy and under the reference.

    ``lssq`` is the log of the sum of the squared probabilities of the vocabulary, token by token.
    """

    p: list[float]
    q: list[float] | None = None
    lssq: list[float] | None = None


@dataclass
class Pair:
    """Two completions of one prompt and, for some losses, of a longer prompt too.

    ``inputs`` may hold ``win_rate_chosen``, ``win_rate_rejected`` and ``similarity``.
    """

    chosen: Response
    rejected: Response
    long_chosen: Response | None = None
    long_rejected: Response | None = None
    inputs: dict[str, float] = field(default_factory=dict)


ROLES = ("chosen", "rejected", "long_chosen", "long_rejected")


@dataclass
class Sample:
    """A completion of a group. ``o`` is the behaviour policy, ``q`` the reference.

    Without ``o`` the sample is exactly on-policy: its ratio is one, and its gradient is not zero.
    ``advantage`` and ``weight`` (a constant factor of the policy's part) are one number or, where
    the loss is a sum over tokens, one per token.
    """

    p: list[float]
    o: list[float] | None = None
    q: list[float] | None = None
    advantage: float | list[float] = 1.0
    weight: float | list[float] = 1.0


PairResult = tuple[float, list[dict[str, np.ndarray]]]
Result = tuple[float, list[np.ndarray]]


# scalar functions


def sigma(x: float) -> float:
    """1 / (1 + e^-x)"""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def logsig(x: float) -> float:
    """log sigma(x)"""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def log1mexp(x: float) -> float:
    """log(1 - e^x), x < 0"""
    return math.log1p(-math.exp(x)) if x < -math.log(2) else math.log(-math.expm1(x))


def sgn(x: float) -> float:
    return float(x > 0) - float(x < 0)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


# pairs: what they have in common


def f_divergence(name: str, a: float, alpha: float = 0.5) -> tuple[float, float]:
    """S(a), S'(a): what stands for the log-ratio under that divergence; S(0) = 0."""
    if name == "reverse_kl":
        return a, 1.0
    if name == "forward_kl":
        return -math.expm1(-a), math.exp(-a)
    if name == "js":
        return math.log(2) + logsig(a), sigma(-a)
    if name == "alpha":
        return math.expm1((alpha - 1) * a) / (alpha - 1), math.exp((alpha - 1) * a)
    raise ValueError(name)


def log_ratio(response: Response, m: int, ld_alpha: float) -> tuple[float, list[float]]:
    """a, da/dp_t: the sum of p_t - q_t, tokens after the first m counting ``ld_alpha``."""
    if response.q is None:
        raise ValueError("no reference")
    weights = [1.0 if t < m else ld_alpha for t in range(len(response.p))]
    a = sum(c * (p - q) for c, p, q in zip(weights, response.p, response.q, strict=True))
    return a, weights


def zeros(pairs: list[Pair]) -> list[dict[str, np.ndarray]]:
    return [
        {
            role: np.zeros(len(getattr(pair, role).p))
            for role in ROLES
            if getattr(pair, role) is not None
        }
        for pair in pairs
    ]


# two numbers of a pair, one for each response -> value, derivatives with respect to the two
Rule = Callable[[float, float], tuple[float, float, float]]


def of_log_ratios(
    pairs: list[Pair],
    rule: Rule,
    *,
    average: bool = False,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    ld_alpha: float = 1.0,
) -> PairResult:
    """Mean over pairs of a rule of the log-ratios: of S(a), or of S(a)/T."""
    loss = 0.0
    grads = zeros(pairs)
    for pair, grad in zip(pairs, grads, strict=True):
        w, l = pair.chosen, pair.rejected
        m = min(len(w.p), len(l.p))
        a_w, da_w = log_ratio(w, m, ld_alpha)
        a_l, da_l = log_ratio(l, m, ld_alpha)
        s_w, ds_w = f_divergence(divergence, a_w, divergence_alpha)
        s_l, ds_l = f_divergence(divergence, a_l, divergence_alpha)
        n_w = max(len(w.p), 1) if average else 1
        n_l = max(len(l.p), 1) if average else 1
        value, d_w, d_l = rule(s_w / n_w, s_l / n_l)
        loss += value / len(pairs)
        for t in range(len(w.p)):
            grad["chosen"][t] = d_w * ds_w / n_w * da_w[t] / len(pairs)
        for t in range(len(l.p)):
            grad["rejected"][t] = d_l * ds_l / n_l * da_l[t] / len(pairs)
    return loss, grads


def of_log_probs(pairs: list[Pair], rule: Rule, *, average: bool) -> PairResult:
    """Mean over pairs of a rule of the policy's log-probabilities: their sums or their averages."""
    loss = 0.0
    grads = zeros(pairs)
    for pair, grad in zip(pairs, grads, strict=True):
        w, l = pair.chosen.p, pair.rejected.p
        n_w = max(len(w), 1) if average else 1
        n_l = max(len(l), 1) if average else 1
        value, d_w, d_l = rule(sum(w) / n_w, sum(l) / n_l)
        loss += value / len(pairs)
        for t in range(len(w)):
            grad["chosen"][t] = d_w / n_w / len(pairs)
        for t in range(len(l)):
            grad["rejected"][t] = d_l / n_l / len(pairs)
    return loss, grads


def cross_entropy(pairs: list[Pair], weight: float = 1.0) -> PairResult:
    """Minus the mean log-probability of all chosen tokens of the batch."""
    tokens = max(sum(len(pair.chosen.p) for pair in pairs), 1)
    loss = 0.0
    grads = zeros(pairs)
    for pair, grad in zip(pairs, grads, strict=True):
        for t, p in enumerate(pair.chosen.p):
            loss -= weight * p / tokens
            grad["chosen"][t] = -weight / tokens
    return loss, grads


def add(*results: PairResult) -> PairResult:
    """The sum of losses of the same pairs."""
    loss = sum(value for value, _ in results)
    grads = [
        {role: sum(grad[role] for grad in of_pair) for role in of_pair[0]}
        for of_pair in zip(*(grads for _, grads in results), strict=True)
    ]
    return loss, grads


# pairs with a reference


def soften(win_rate: float, similarity: float) -> float:
    """P' = 1/2 + (1 - s)(P - 1/2), s the similarity clipped to [0, 1]"""
    return 0.5 + (1 - clip(similarity, 0.0, 1.0)) * (win_rate - 0.5)


def repulsion(
    form: str, h_w: np.ndarray, h_l: np.ndarray, margin: float = 1.0, kappa: float = 1.0
) -> tuple[float, np.ndarray, np.ndarray]:
    """The latent repulsion of one pair and its gradients with respect to the two hidden states.

    unit_sq_euclid  -||u_w - u_l||^2,  u = h/||h||
    cosine          u_w . u_l
    hinge_sq        max(0, margin - d)^2,  d = ||h_w - h_l||
    gauss           exp(-d^2 / (2 kappa^2))
    none            0
    """
    h_w, h_l = np.asarray(h_w, np.float64), np.asarray(h_l, np.float64)
    if form == "none":
        return 0.0, np.zeros_like(h_w), np.zeros_like(h_l)
    if form in ("unit_sq_euclid", "cosine"):
        n_w, n_l = math.sqrt(float(h_w @ h_w)), math.sqrt(float(h_l @ h_l))
        u_w, u_l = h_w / n_w, h_l / n_l
        c = float(u_w @ u_l)
        grad_w, grad_l = (u_l - c * u_w) / n_w, (u_w - c * u_l) / n_l
        if form == "cosine":
            return c, grad_w, grad_l
        return -float((u_w - u_l) @ (u_w - u_l)), 2 * grad_w, 2 * grad_l
    apart = h_w - h_l
    d = math.sqrt(float(apart @ apart))
    if form == "hinge_sq":
        short = max(0.0, margin - d)
        grad = -2 * short * apart / d if d > 0 else np.zeros_like(apart)
        return short**2, grad, -grad
    if form == "gauss":
        value = math.exp(-(d**2) / (2 * kappa**2))
        grad = -apart / kappa**2 * value
        return value, grad, -grad
    raise ValueError(form)


# pairs without a reference


def linked(link: str, label_smoothing: float, z: float) -> tuple[float, float]:
    """A loss of the margin z, and minus its derivative."""
    e = label_smoothing
    if link == "sigmoid":
        return -(1 - e) * logsig(z) - e * logsig(-z), (1 - e) * sigma(-z) - e * sigma(z)
    if link == "hinge":
        return max(0.0, 1 - z), 1.0 if z < 1 else 0.0
    raise ValueError(link)


def log_odds(x: float) -> tuple[float, float]:
    """log( e^x / (1 - e^x) ) and its derivative 1 / (1 - e^x), x < 0"""
    return x - log1mexp(x), -1 / math.expm1(x)


# pairs: modifiers


def wpo_weight(pair: Pair) -> float:
    """exp(mean c_w + mean c_l),  c_t = p_t - log sum_v softmax_v^2"""
    exponent = 0.0
    for response in (pair.chosen, pair.rejected):
        exponent += mean([p - x for p, x in zip(response.p, response.lssq, strict=True)])
    return math.exp(exponent)


def WPO(
    base: Callable[..., PairResult], pairs: list[Pair], frozen: list[Pair] | None = None, **hyper
) -> PairResult:
    """Each pair's loss times its weight, which is constant; for means over independent pairs."""
    loss = 0.0
    grads = []
    for pair, constant in zip(pairs, frozen or pairs, strict=True):
        weight = wpo_weight(constant)
        value, (grad,) = base([pair], **hyper)
        loss += weight * value / len(pairs)
        grads.append({role: weight * of_role / len(pairs) for role, of_role in grad.items()})
    return loss, grads


def reward(base: str, response: Response, hyper: dict) -> tuple[float, float]:
    """r(x, y) of a base loss, and its derivative with respect to each token."""
    tokens = max(len(response.p), 1)
    if base == "DPO":
        beta = hyper.get("beta", 0.1)
        n = tokens if hyper.get("length_normalized", False) else 1
        return beta * (sum(response.p) - sum(response.q)) / n, beta / n
    if base == "SimPO":
        beta = hyper.get("beta", 2.0)
        return beta * sum(response.p) / tokens, beta / tokens
    if base == "ORPO":
        odds, slope = log_odds(sum(response.p) / tokens)
        return odds, slope / tokens
    if base == "IPO":
        beta = hyper.get("beta", 0.1)
        return beta * (sum(response.p) - sum(response.q)), beta
    raise ValueError(base)


def compared(base: str, response: Response, hyper: dict) -> tuple[float, float]:
    """What the margin of a base loss compares, before its beta; and its derivative."""
    tokens = max(len(response.p), 1)
    if base == "SimPO":
        return sum(response.p) / tokens, 1 / tokens
    ratio = sum(response.p) - sum(response.q)
    summed = not hyper.get("average", True) if base == "IPO" else True
    return (ratio, 1.0) if summed else (ratio / tokens, 1 / tokens)


def distance(name: str, d: float, kappa: float, scale: float) -> tuple[float, float]:
    if name == "abs":
        return abs(d), sgn(d)
    if name == "sq":
        return d**2, 2 * d
    if name == "huber":
        return math.sqrt(d**2 + kappa**2) - kappa, d / math.sqrt(d**2 + kappa**2)
    if name == "quadratic":
        return d**2 / scale**2, 2 * d / scale**2
    raise ValueError(name)


# single examples


# groups: what they have in common


def per_token(value: float | list[float], tokens: int) -> list[float]:
    if isinstance(value, list):
        if len(value) != tokens:
            raise ValueError("one value per token")
        return value
    return [float(value)] * tokens


def per_sequence(value: float | list[float]) -> float:
    if isinstance(value, list):
        if any(x != value[0] for x in value[1:]):
            raise ValueError("this loss has one value per sequence")
        return float(value[0]) if value else 0.0
    return float(value)


def log_ratios(sample: Sample, constant: Sample) -> list[float]:
    """delta_t = p_t - o_t; without o, p_t minus a constant of the same value."""
    old = constant.p if sample.o is None else sample.o
    return [p - o for p, o in zip(sample.p, old, strict=True)]


def kl_term(name: str, p: float, q: float, delta: float) -> tuple[float, float]:
    """An estimator of the divergence from the reference at one token, and its derivative."""
    x = q - p
    k3 = math.exp(x) - x - 1
    if name == "k1":
        return p - q, 1.0
    if name == "k2":
        return (p - q) ** 2 / 2, p - q
    if name == "k3":
        return k3, 1 - math.exp(x)
    if name == "k3_corrected":
        return math.exp(delta) * k3, math.exp(delta) * (p - q)
    raise ValueError(name)


def number_of_tokens(samples: list[Sample]) -> int:
    return max(sum(len(sample.p) for sample in samples), 1)


def weights_of_tokens(
    samples: list[Sample], aggregation: str, num_items: float | None, length: float | None = None
) -> list[float]:
    """For each sample, the weight that each of its tokens has in the sum over tokens.

    sequence_mean  1/(G T_i)      mean over sequences of the mean over tokens
    token_mean     1/N            mean over all tokens
    constant       1/(G length)
    sequence_sum   1/G            mean over sequences of the sum over tokens

    ``num_items`` stands in for N in token_mean and for G in the others.
    """
    if aggregation == "token_mean":
        n = number_of_tokens(samples) if num_items is None else num_items
        return [1 / n for _ in samples]
    group = len(samples) if num_items is None else num_items
    if aggregation == "sequence_mean":
        return [1 / (group * max(len(sample.p), 1)) for sample in samples]
    if aggregation == "constant":
        return [1 / (group * length) for _ in samples]
    if aggregation == "sequence_sum":
        return [1 / group for _ in samples]
    raise ValueError(aggregation)


def add_kl(
    loss, grads, samples, frozen, weights, kl_weight, kl_estimator, of_sequence=False
) -> Result:
    """Adds kl_weight times the aggregated divergence.

    ``k3_corrected`` multiplies by the token's ratio or, ``of_sequence``, by s = exp(mean_t delta).
    """
    if kl_weight == 0:
        return loss, grads
    for sample, constant, w, grad in zip(samples, frozen, weights, grads, strict=True):
        if of_sequence and kl_estimator == "k3_corrected":
            value, slopes = sequence_corrected_kl(sample, log_ratios(sample, constant))
            loss += w * kl_weight * value
            grad += w * kl_weight * slopes
            continue
        for t, delta in enumerate(log_ratios(sample, constant)):
            value, slope = kl_term(kl_estimator, sample.p[t], sample.q[t], delta)
            loss += w * kl_weight * value
            grad[t] += w * kl_weight * slope
    return loss, grads


def sequence_corrected_kl(sample: Sample, delta: list[float]) -> tuple[float, np.ndarray]:
    """s sum_t k3_t and its derivatives, s (1 - e^(q_t - p_t)) + (s/T) sum_u k3_u."""
    s = math.exp(mean(delta))
    of_tokens = [kl_term("k3", p, q, 0.0) for p, q in zip(sample.p, sample.q, strict=True)]
    total = sum(value for value, _ in of_tokens)
    slopes = [s * slope + s / len(delta) * total for _, slope in of_tokens]
    return s * total, np.array(slopes, dtype=np.float64)


def of_tokens(
    samples: list[Sample],
    rule: Callable[[float, float, float, float], tuple[float, float]],
    aggregation: str,
    *,
    num_items: float | None = None,
    kl_weight: float = 0.0,
    kl_estimator: str = "k3",
    frozen: list[Sample] | None = None,
    length: float | None = None,
) -> Result:
    """Aggregates rule(p, delta, constant delta, advantage) -> l_t, dl/dp_t over all tokens."""
    frozen = frozen or samples
    weights = weights_of_tokens(samples, aggregation, num_items, length)
    loss = 0.0
    grads = [np.zeros(len(sample.p)) for sample in samples]
    for sample, constant, w, grad in zip(samples, frozen, weights, grads, strict=True):
        delta = log_ratios(sample, constant)
        still = log_ratios(constant, constant)
        advantage = per_token(sample.advantage, len(sample.p))
        importance = per_token(sample.weight, len(sample.p))
        for t in range(len(sample.p)):
            value, slope = rule(sample.p[t], delta[t], still[t], advantage[t])
            loss += w * importance[t] * value
            grad[t] = w * importance[t] * slope
    return add_kl(loss, grads, samples, frozen, weights, kl_weight, kl_estimator)


def of_sequences(
    samples: list[Sample],
    rule: Callable[[list[float], float], tuple[float, list[float]]],
    *,
    times_length: bool = False,
    num_items: float | None = None,
    kl_weight: float = 0.0,
    kl_estimator: str = "k3",
    frozen: list[Sample] | None = None,
    ratio_of_sequence: bool = False,
) -> Result:
    """Mean over sequences of rule(delta, advantage) -> l, [dl/dp_t]; perhaps of T times that."""
    frozen = frozen or samples
    group = len(samples) if num_items is None else num_items
    loss = 0.0
    grads = []
    for sample, constant in zip(samples, frozen, strict=True):
        delta = log_ratios(sample, constant)
        value, slopes = rule(delta, per_sequence(sample.advantage))
        w = per_sequence(sample.weight) / group
        if times_length:
            w *= len(sample.p)
        loss += w * value if delta else 0.0
        grads.append(np.array([w * slope for slope in slopes], dtype=np.float64))
    aggregation = "sequence_sum" if times_length else "sequence_mean"
    weights = weights_of_tokens(samples, aggregation, num_items)
    return add_kl(loss, grads, samples, frozen, weights, kl_weight, kl_estimator, ratio_of_sequence)


# groups: clipped ratios


def clipped(ratio: float, advantage: float, low: float, high: float) -> tuple[float, bool]:
    """-min(r A, clip(r, low, high) A), and whether it depends on r."""
    value = -min(ratio * advantage, clip(ratio, low, high) * advantage)
    active = (advantage > 0 and ratio <= high) or (advantage < 0 and ratio >= low)
    return value, active


def ppo(epsilon_low, epsilon_high, dual_clip, ratio_cap):
    """Token rule of the clipped ratio; dual_clip bounds the loss at -dual_clip A where A < 0."""

    def rule(p, delta, still, advantage):
        ratio = math.exp(delta)
        capped = ratio if ratio_cap is None else min(ratio, ratio_cap)
        value, active = clipped(capped, advantage, 1 - epsilon_low, 1 + epsilon_high)
        if ratio_cap is not None and ratio > ratio_cap:
            active = False
        if dual_clip is not None and advantage < 0:
            value = min(-advantage * dual_clip, value)
            if capped > dual_clip:
                active = False
        return value, -advantage * ratio if active else 0.0

    return rule


def gspo(epsilon_low, epsilon_high):
    def rule(delta, advantage):
        tokens = max(len(delta), 1)
        s = math.exp(sum(delta) / tokens)
        value, active = clipped(s, advantage, 1 - epsilon_low, 1 + epsilon_high)
        return value, [-advantage * s / tokens if active else 0.0 for _ in delta]

    return rule


# groups: soft gates


def log_gate(
    name: str, delta: float, tau: float, advantage: float = 1.0, epsilon: float = 0.4
) -> tuple[float, float]:
    """phi(delta), phi'(delta): the logarithm of a token's gate."""
    if name == "arctan_log":
        return math.atan(tau * delta) / tau, 1 / (1 + (tau * delta) ** 2)
    if name == "sigmoid_ratio":
        x = tau * math.expm1(delta)
        return math.log(4 / tau) + logsig(x), tau * math.exp(delta) * sigma(-x)
    if name == "softsign_log":
        return delta / (1 + tau * abs(delta)), 1 / (1 + tau * abs(delta)) ** 2
    if name == "erf_log":
        phi = math.sqrt(math.pi) / (2 * tau) * math.erf(tau * delta)
        return phi, math.exp(-((tau * delta) ** 2))
    if name == "tanh_log":
        return math.tanh(tau * delta) / tau, 1 - math.tanh(tau * delta) ** 2
    if name == "clip_log":
        if advantage > 0:
            return min(delta, epsilon), 1.0 if delta <= epsilon else 0.0
        if advantage < 0:
            return max(delta, -epsilon), 1.0 if delta >= -epsilon else 0.0
        return 0.0, 0.0
    if name == "identity":
        return delta, 1.0
    raise ValueError(name)


# groups: constant coefficients


def vespo_phi(log_w: float, k: float, lam: float) -> float:
    """e^lam W^k e^(-lam W), log W within [log 1e-8, 20]"""
    log_w = clip(log_w, math.log(1e-8), 20.0)
    return math.exp(lam + k * log_w - lam * math.exp(log_w))


# random input


def log_probs(rng: np.random.Generator, tokens: int) -> list[float]:
    return [float(x) for x in -6 * rng.uniform(0.002, 0.998, tokens)]


def near(rng: np.random.Generator, p: list[float], spread: float) -> list[float]:
    """Log-probabilities of the same tokens under a model that is not far."""
    return [min(x + spread * float(rng.normal()), -1e-3) for x in p]


def random_response(
    rng: np.random.Generator, tokens: int | None = None, reference: bool = True
) -> Response:
    p = log_probs(rng, int(rng.integers(1, 31)) if tokens is None else tokens)
    return complete(rng, p, reference)


def complete(rng: np.random.Generator, p: list[float], reference: bool) -> Response:
    # the token's own square, and what squares the rest of the probability can have
    lssq = [
        math.log(math.exp(2 * x) + math.expm1(x) ** 2 * float(rng.uniform(0.01, 1.0))) for x in p
    ]
    return Response(p, near(rng, p, 0.3) if reference else None, lssq)


def random_pairs(
    rng: np.random.Generator, P: int, reference: bool = True, long: bool = False
) -> list[Pair]:
    """Pairs of 1 to 30 tokens a response; a long response has as many tokens as its short one."""
    pairs = []
    for _ in range(P):
        pair = Pair(random_response(rng, None, reference), random_response(rng, None, reference))
        if long:
            pair.long_chosen = complete(rng, near(rng, pair.chosen.p, 0.3), reference)
            pair.long_rejected = complete(rng, near(rng, pair.rejected.p, 0.3), reference)
        pair.inputs = {
            "win_rate_chosen": float(rng.uniform(0.5, 1.0)),
            "win_rate_rejected": float(rng.uniform(0.0, 0.5)),
            "similarity": float(rng.uniform(-0.2, 1.0)),
        }
        pairs.append(pair)
    return pairs


def random_samples(
    rng: np.random.Generator,
    G: int,
    old: bool = True,
    reference: bool = False,
    weighted: bool = False,
    per_token: bool = False,
) -> list[Sample]:
    """A group of 1 to 30 tokens a sample, whose advantages have both signs and one exact zero.

    ``weighted`` draws importance weights, ``per_token`` an advantage (and a weight) for each token.
    """
    samples = []
    for i in rng.permutation(G):
        sign = (1.0, 0.0, -1.0)[i] if i < 3 else float(rng.choice([-1.0, 1.0]))
        tokens = int(rng.integers(1, 31))
        p = log_probs(rng, tokens)
        o = near(rng, p, 0.3)
        if i < 3 and sum(p) > sum(o):
            # less likely than before: a clip of sequences leaves the first of these, not the last
            o = [min(2 * x - y, -1e-3) for x, y in zip(p, o, strict=True)]
        shape = tokens if per_token else 1
        advantage = [sign * float(x) for x in rng.uniform(0.2, 2.0, shape)]
        weight = [float(x) if weighted else 1.0 for x in rng.uniform(0.5, 2.0, shape)]
        if per_token:  # both signs within a sequence
            flips = rng.choice([-1.0, 1.0], tokens)
            advantage = [float(a * s) for a, s in zip(advantage, flips, strict=True)]
        samples.append(
            Sample(
                p,
                o if old else None,
                near(rng, p, 0.3) if reference else None,
                advantage if per_token else advantage[0],
                weight if per_token else weight[0],
            )
        )
    return samples
