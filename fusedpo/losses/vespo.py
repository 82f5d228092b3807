r"""VESPO (arXiv 2602.10693 and the authors' code): a gamma weight on the sequence's ratio.

    log W  = sum over tokens of (log pi(y_t) - log pi_old(y_t))
    phi(W) = exp(lambda) W^k exp(-lambda W)
    l_t    = -sg[phi(W)] A log pi(y_t)
    L      = mean of l_t over all tokens of the step

with (k, lambda) = (k_pos, lambda_pos) for A >= 0, else (k_neg, lambda_neg). A token's log-ratio is
limited to +-20 and log W to log 1e-8 .. 20. Importance weights are factors of W, limited likewise,
as in TRL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusedpo.checks import positive
from fusedpo.losses.base import RATIO_LIMIT, Aggregation, PolicyLoss, Tokens, hyperparameter, pick

_LEAST = math.log(1e-8)


@dataclass(frozen=True)
class VESPO(PolicyLoss):
    """VESPO: REINFORCE with a smooth weight on the ratio of the whole response."""

    aggregation: ClassVar[Aggregation] = "token_mean"

    k_pos: float = hyperparameter(2.0, "power of the ratio where A >= 0", positive)
    lambda_pos: float = hyperparameter(3.0, "decay where A >= 0", positive)
    k_neg: float = hyperparameter(3.0, "power of the ratio elsewhere", positive)
    lambda_neg: float = hyperparameter(2.0, "decay elsewhere", positive)

    def per_token(self, t: Tokens) -> Tensor:
        return -self.weight(t) * t.advantage * t.logprob

    def log_correction(self, weight: Tensor) -> Tensor:
        return weight.log().clamp(_LEAST, RATIO_LIMIT)

    def weight(self, t: Tokens) -> Tensor:
        """[N], phi(W) of each token's sequence."""
        log_w = t.sum(t.delta.detach().clamp(-RATIO_LIMIT, RATIO_LIMIT))
        if t.log_correction is not None:
            log_w = log_w + t.log_correction
        log_w = log_w.clamp(_LEAST, RATIO_LIMIT)
        k = pick(t.advantage >= 0, self.k_pos, self.k_neg)
        decay = pick(t.advantage >= 0, self.lambda_pos, self.lambda_neg)
        return torch.exp(decay + k * log_w - decay * log_w.exp())

    def metrics(self, t: Tokens) -> dict[str, Tensor]:
        return {"vespo/phi_seq_mean": t.average_of_sequences(self.weight(t))}
