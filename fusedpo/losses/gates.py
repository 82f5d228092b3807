"""Gates and sequence maps, by mathematical name; autograd gives their derivatives.

A gate turns the log-ratio delta of a token into the number that is summed over its sequence; tau is
its temperature, above 0 except for ``clip_log``. All but ``sigmoid_ratio`` have value 0 and slope 1
at delta = 0, so that nothing changes while the policy is the one that sampled. Values and gradients
are finite for every finite delta, and NaN stays NaN.

The functions of ``fusedpo.kernels.tail_terms`` are held to what is defined here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fusedpo.losses.scores import RATIO_LIMIT

# exp(80) times a weight still fits single precision
MAP_LIMIT = 80.0


def identity(delta: Tensor, tau: Tensor | float = 1.0) -> Tensor:
    """delta; tau plays no part."""
    return delta


def arctan_log(delta: Tensor, tau: Tensor | float) -> Tensor:
    """arctan(tau delta) / tau, within +-pi / (2 tau)."""
    return torch.atan(tau * delta) / tau


def sigmoid_ratio(delta: Tensor, tau: Tensor | float) -> Tensor:
    """log(4 / tau) + log sigmoid(tau (r - 1)) with r = exp(delta), below log(4 / tau).

    Above delta = 20 it is constant and has no gradient.
    """
    # not expm1: autograd forms its derivative as expm1 + 1, rounding noise for a small ratio, and
    # beside log(4 / tau) its digits are lost anyway
    ratio = delta.clamp(max=RATIO_LIMIT).exp()
    return torch.log(4.0 / _tensor(tau, delta)) + torch.nn.functional.logsigmoid(
        tau * (ratio - 1.0)
    )


def softsign_log(delta: Tensor, tau: Tensor | float) -> Tensor:
    """delta / (1 + tau |delta|), within +-1 / tau."""
    return delta / (1.0 + tau * delta.abs())


def erf_log(delta: Tensor, tau: Tensor | float) -> Tensor:
    """sqrt(pi) / (2 tau) erf(tau delta), within +-sqrt(pi) / (2 tau)."""
    return math.sqrt(math.pi) / 2.0 * torch.erf(tau * delta) / tau


def tanh_log(delta: Tensor, tau: Tensor | float) -> Tensor:
    """tanh(tau delta) / tau, within +-1 / tau."""
    return torch.tanh(tau * delta) / tau


def clip_log(delta: Tensor, tau: Tensor | float) -> Tensor:
    """One-sided clip: min(delta, tau) for a bound tau > 0, max(delta, tau) for tau < 0.

    tau = c sign(A), for an advantage A, is the pessimistic clip to [-c, c]: sign(A) times the
    smaller of sign(A) delta and sign(A) clip(delta, -c, c). For A = 0 that is 0 without gradient,
    and so is this for tau = 0. The gradient passes at the bound itself.
    """
    bound = _tensor(tau, delta)
    none = (bound == 0) & ~delta.isnan()
    clipped = ((bound > 0) & (delta > bound)) | ((bound < 0) & (delta < bound)) | none
    return torch.where(clipped, bound, delta)


def _tensor(tau: Tensor | float, like: Tensor) -> Tensor:
    return tau if isinstance(tau, Tensor) else like.new_full((), tau)


# from log-ratios and temperatures, which broadcast, to numbers of the log-ratios' shape
GATES: Mapping[str, Callable[[Tensor, Tensor | float], Tensor]] = MappingProxyType(
    {
        gate.__name__: gate
        for gate in (
            identity,
            arctan_log,
            sigmoid_ratio,
            softsign_log,
            erf_log,
            tanh_log,
            clip_log,
        )
    }
)


def exponential(score: Tensor) -> Tensor:
    """exp(S), the geometric mean of the gates where S is the mean of their logarithms.

    Above S = 80 it is constant and has no gradient.
    """
    return score.clamp(max=MAP_LIMIT).exp()


def _same(score: Tensor) -> Tensor:
    return score


# from the score of a sequence to what is compared or weighted
MAPS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"identity": _same, "exp": exponential}
)
