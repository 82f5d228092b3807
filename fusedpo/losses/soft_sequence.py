r"""Soft Sequence Policy Optimization (SSPO; Glazyrina et al., arXiv 2602.19327).

A reconstruction from the paper's abstracts and third-party accounts, as its formulas could not be
read and there is no code: the geometric mean of soft gates over token ratios as the importance
weight of a sequence. Whether the gate's logarithm is what is averaged, as here, is not said.

    delta_t = log pi(y_t) - log pi_old(y_t)
    tau     = tau_pos if A > 0 else tau_neg
    s       = exp(mean over tokens of phi(delta_t; tau))
    L       = mean over responses of -A s

    gate            phi(delta; tau)
    arctan_log      arctan(tau delta) / tau                       (assumed default of v3)
    sigmoid_ratio   log(4 / tau) + log sigmoid(tau (r - 1))       (v1: the gate of SoftAdaptive)
    softsign_log    delta / (1 + tau |delta|)
    erf_log         sqrt(pi) / (2 tau) erf(tau delta)
    tanh_log        tanh(tau delta) / tau
    clip_log        delta, clipped at tau on the side that the advantage rewards: GMPO
    identity        delta: GSPO without its clip

Every gate has slope 1 at delta = 0 but for sigmoid_ratio, whose s times slope is 1 there. The
temperatures are borrowed from SoftAdaptive (assumed). A response without tokens adds nothing,
but counts among the responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusedpo.checks import positive
from fusedpo.losses.base import (
    GATES,
    PolicyLoss,
    Tail,
    Tokens,
    advantage_sign,
    exponential,
    hyperparameter,
    one_of,
)

Gate = Literal[
    "arctan_log",
    "sigmoid_ratio",
    "softsign_log",
    "erf_log",
    "tanh_log",
    "clip_log",
    "identity",
]
_WITH_TAU = tuple(gate for gate in GATES if gate != "identity")


@dataclass(frozen=True)
class SoftSequence(PolicyLoss):
    """Soft Sequence Policy Optimization: soft token gates under a geometric mean."""

    tau_pos: float = hyperparameter(
        1.0, "temperature of the gate where A > 0 (assumed)", positive, only={"gate": _WITH_TAU}
    )
    tau_neg: float = hyperparameter(
        1.05, "temperature elsewhere (assumed)", positive, only={"gate": _WITH_TAU}
    )
    gate: Gate = hyperparameter("arctan_log", "from a token's ratio to its weight", one_of(*GATES))

    @property
    def tail(self) -> Tail:
        return Tail(self.gate, "mean", "exp", combine="single", link="linear")

    def tau(self, advantage: Tensor) -> Tensor | None:
        if self.gate == "identity":
            return None
        tau = advantage_sign(advantage, self.tau_pos, self.tau_neg)
        return tau * torch.sign(advantage) if self.gate == "clip_log" else tau

    def gated(self, t: Tokens) -> Tensor:
        tau = self.tau(t.advantage)
        return GATES[self.gate](t.delta, 1.0 if tau is None else tau)

    def sequence_weight(self, t: Tokens) -> Tensor:
        """[N], s of each token's response."""
        return exponential(t.mean(self.gated(t)))

    def per_token(self, t: Tokens) -> Tensor:
        return -t.advantage * self.sequence_weight(t)
