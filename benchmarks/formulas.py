"""The losses that are compared, as a plain program writes them, from log-probabilities.

Rows are chosen responses, then rejected ones. ``logprobs`` are per token [B, T], ``ref`` is [B] or
None, ``scored`` marks [B, T] the tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpo.benchmarks.shapes import Inputs


@dataclass(frozen=True)
class Tokens:
    """What a formula sees."""

    logprobs: Tensor
    scored: Tensor
    ref: Tensor | None
    inputs: Inputs

    @property
    def sums(self) -> Tensor:
        return (self.logprobs * self.scored).sum(-1)

    @property
    def means(self) -> Tensor:
        return self.sums / self.scored.sum(-1)

    @property
    def log_ratios(self) -> Tensor:
        return self.sums if self.ref is None else self.sums - self.ref


def sft(t: Tokens) -> Tensor:
    """Cross-entropy, the mean over tokens: all that some libraries have."""
    return -(t.logprobs * t.scored).sum() / t.scored.sum()


def simpo(t: Tokens, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    chosen, rejected = t.means.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()


def dpo(t: Tokens, beta: float = 0.1) -> Tensor:
    chosen, rejected = t.log_ratios.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def orpo(t: Tokens, beta: float = 0.1) -> Tensor:
    means = t.means
    chosen, rejected = (means - torch.log1p(-means.exp())).chunk(2)
    half = len(means) // 2
    nll = -(t.logprobs * t.scored)[:half].sum() / t.scored[:half].sum()
    return nll - beta * F.logsigmoid(chosen - rejected).mean()


def kto(t: Tokens, beta: float = 0.1) -> Tensor:
    """The first half of the rows is desirable; z0 is 0."""
    desirable, undesirable = t.log_ratios.chunk(2)
    losses = 1 - torch.cat([beta * desirable, -beta * undesirable]).sigmoid()
    return losses.mean()


def sspo(t: Tokens, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """Soft sequence policy optimization, gates arctan(tau d) / tau under a geometric mean."""
    old, advantages = t.inputs.old_logprobs, t.inputs.advantages
    assert old is not None and advantages is not None
    # in the dtype of log-probabilities: of two numbers, torch.where would make one in float32
    positive = torch.full_like(advantages, tau_pos, dtype=t.logprobs.dtype)
    tau = torch.where(advantages > 0, positive, tau_neg)[:, None]
    gated = torch.atan(tau * (t.logprobs - old)) / tau * t.scored
    weights = (gated.sum(-1) / t.scored.sum(-1)).exp()
    return -(advantages * weights).mean()


FORMULAS: dict[str, Callable[[Tokens], Tensor]] = {
    "sft": sft,
    "simpo": simpo,
    "dpo": dpo,
    "orpo": orpo,
    "kto": kto,
    "sspo": sspo,
}
WITH_REFERENCE = ("dpo", "kto")
TITLES = {
    "sft": "SFT",
    "simpo": "SimPO",
    "dpo": "DPO",
    "orpo": "ORPO",
    "kto": "KTO",
    "sspo": "SSPO (soft sequence)",
}
