"""Gates, sequence maps and links of the tail, with their slopes, in fp64.

    gate            phi(delta; tau)                      phi'(delta)
    identity        delta                                1
    arctan_log      arctan(x) / tau                      1 / (1 + x^2)
    sigmoid_ratio   log(4 / tau) + log sigmoid(z)        tau r sigmoid(-z), 0 above the limit
    softsign_log    delta / (1 + |x|)                    1 / (1 + |x|)^2
    erf_log         sqrt(pi) / (2 tau) erf(x)            exp(-x^2)
    tanh_log        tanh(x) / tau                        1 / cosh(x)^2
    clip_log        min(delta, tau), tau > 0             1 where delta <= tau, else 0
                    max(delta, tau), tau < 0             1 where delta >= tau, else 0
                    0, tau = 0                           0

    x = tau delta, r = exp(min(delta, 20)), z = tau (r - 1)

    map             m(S)                                 m'(S)
    identity        S                                    1
    exp             exp(min(S, 80))                      m(S), 0 above the limit

    link            f(x)                                 f'(x)
    neg_log_sigmoid -(1 - s) log sigmoid(x)              s - sigmoid(-x)
                    - s log sigmoid(-x), s the smoothing
    hinge           max(0, 1 - x)                        -1 where x < 1, else 0
    squared         x^2                                  2 x
    linear          x                                    1

Everything is NaN where its argument is.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fusedpo.kernels.double_math import arctan, expm1, log1p, sigmoid, tanh

GATES = (
    "identity",
    "arctan_log",
    "sigmoid_ratio",
    "softsign_log",
    "erf_log",
    "tanh_log",
    "clip_log",
)
MAPS = ("identity", "exp")
LINKS = ("neg_log_sigmoid", "hinge", "squared", "linear")

# exp(20) is beyond any ratio a gate tells from infinity; exp(80) times a weight still fits fp32
_RATIO_LIMIT = tl.constexpr(20.0)
_MAP_LIMIT = tl.constexpr(80.0)
_HALF_SQRT_PI = tl.constexpr(math.sqrt(math.pi) / 2)


@triton.jit
def gate_value(delta, tau, GATE: tl.constexpr):
    """phi(delta; tau); delta [n] fp64, tau a fp64 scalar (any number for a gate without one)."""
    if GATE == "arctan_log":
        phi = arctan(delta * tau) / tau
    elif GATE == "sigmoid_ratio":
        z = expm1(tl.where(delta > _RATIO_LIMIT, _RATIO_LIMIT, delta)) * tau
        # log(4 / tau) + log sigmoid(z), with log 2 taken out of either: at small delta and tau = 2
        # the two would cancel
        phi = tl.minimum(z, 0.0) - log1p(0.5 * expm1(-tl.abs(z))) + tl.log(2.0 / tau)
    elif GATE == "softsign_log":
        phi = delta / (tl.abs(delta) * tau + 1.0)
    elif GATE == "erf_log":
        phi = tl.erf(delta * tau) * (_HALF_SQRT_PI / tau)
    elif GATE == "tanh_log":
        phi = tanh(delta * tau) / tau
    elif GATE == "clip_log":
        phi = tl.where(_clipped(delta, tau), tau, delta)
    else:
        tl.static_assert(GATE == "identity", "unknown gate")
        phi = delta
    return phi


@triton.jit
def gate_slope(delta, tau, GATE: tl.constexpr):
    """phi'(delta; tau); as in gate_value."""
    if GATE == "arctan_log":
        x = delta * tau
        slope = 1.0 / (x * x + 1.0)
    elif GATE == "sigmoid_ratio":
        beyond = delta > _RATIO_LIMIT
        delta = tl.where(beyond, _RATIO_LIMIT, delta)
        # no inf times 0: the ratio is limited, and the sigmoid is formed from exp(-|z|)
        slope = tl.where(beyond, 0.0, tl.exp(delta) * tau * sigmoid(expm1(delta) * -tau))
    elif GATE == "softsign_log":
        root = 1.0 / (tl.abs(delta) * tau + 1.0)
        slope = root * root
    elif GATE == "erf_log":
        x = delta * tau
        slope = tl.exp(-x * x)
    elif GATE == "tanh_log":
        e = tl.exp(-2.0 * tl.abs(delta * tau))
        slope = 4.0 * e / ((e + 1.0) * (e + 1.0))
    elif GATE == "clip_log":
        slope = tl.where(_clipped(delta, tau), 0.0, 1.0).to(tl.float64)
    else:
        tl.static_assert(GATE == "identity", "unknown gate")
        slope = tl.full(delta.shape, 1.0, tl.float64)
    return slope


@triton.jit
def _clipped(delta, tau):
    """Whether delta is beyond the bound; the bound itself is not, and neither is NaN."""
    # one comparison of numbers: the interpreter does not broadcast a scalar's comparison rightly
    side = tl.where(tau == 0.0, 0.0, tl.where(tau < 0.0, -1.0, 1.0))
    room = tl.where(tau == 0.0, -1.0, tl.abs(tau))
    return delta * side > room


@triton.jit
def map_and_slope(score, MAP: tl.constexpr):
    """m(S) and m'(S) of a fp64 scalar."""
    if MAP == "exp":
        value = tl.exp(tl.where(score > _MAP_LIMIT, _MAP_LIMIT, score))
        slope = tl.where(score > _MAP_LIMIT, 0.0, value)
    else:
        tl.static_assert(MAP == "identity", "unknown map")
        value = score
        slope = tl.full((), 1.0, tl.float64)
    return value, slope


@triton.jit
def link_and_slope(x, smoothing, LINK: tl.constexpr):
    """f(x) and f'(x) of a fp64 scalar."""
    if LINK == "neg_log_sigmoid":
        value = tl.maximum(-x, 0.0) + log1p(tl.exp(-tl.abs(x))) + x * smoothing
        slope = smoothing - sigmoid(-x)
    elif LINK == "hinge":
        value = tl.where(x >= 1.0, 0.0, 1.0 - x)
        slope = tl.where(x >= 1.0, 0.0, -1.0).to(tl.float64)
    elif LINK == "squared":
        value = x * x
        slope = x * 2.0
    else:
        tl.static_assert(LINK == "linear", "unknown link")
        value = x
        slope = tl.full((), 1.0, tl.float64)
    return value, slope
