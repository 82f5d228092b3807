"""The soft cap and the factor between a head's output and a model's logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedpo.head import Head
from fusedpo.kernels.logit_map import LogitMap
from fusedpo.model_head.errors import UnsupportedHead

_TINY, _HUGE = 2.0**-10, 1e4  # made-up logits: where a soft cap does nothing, and where it is all


@dataclass(frozen=True)
class AfterHead:
    """What a model does with the output of its head: softcap tanh(z / softcap) logit_scale of the
    first ``vocab`` columns. Found with a precision of ``eps``."""

    softcap: float | None
    logit_scale: float
    vocab: int
    eps: float = field(default=torch.finfo(torch.float32).eps, repr=False, compare=False)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        if weight.shape[0] != self.vocab:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return Head(weight, bias, self.softcap, self.logit_scale)

    def apply(self, z: Tensor) -> Tensor:
        return LogitMap(None, self.softcap, self.logit_scale).apply(z.clone())

    def gap(self, made: Tensor, logits: Tensor) -> float:
        """How far off the worst of the logits [rows, vocab] is that were made of the head's output
        [rows, V]; 0 if all are right but for rounding."""
        eps = max(self.eps, torch.finfo(logits.dtype).eps, torch.finfo(made.dtype).eps)
        expected = self.apply(made[:, : self.vocab])
        # of its own size each, so that nothing may be added, however small
        return _gap(logits.to(made.dtype), expected, 8 * eps * expected.abs())


def _spread(vocab: int, like: Tensor) -> Tensor:
    """[V], numbers of both signs and of a range as logits have it; in full precision."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.linspace(-64.0, 64.0, vocab, dtype=dtype, device=like.device)


def _fit(found: Tensor, eps: float, known: Sequence[float]) -> AfterHead:
    """Soft cap and factor from what became of a tiny and a huge logit [rows, V].

    known: numbers of the configuration, which are preferred to measured ones.
    """
    tiny, huge = (float(found[i].double().median()) for i in (0, 1))
    factor, limit = tiny / _TINY, huge
    if not (math.isfinite(factor) and factor > 0 and math.isfinite(limit) and limit > 0):
        raise UnsupportedHead(
            f"model: expected logits that are scaled and capped, got {tiny} for {_TINY} and {huge} "
            f"for {_HUGE}"
        )
    capped = limit < 0.99 * factor * _HUGE
    if capped:  # a tiny logit is capped a little, too
        factor = limit * math.atanh(tiny / limit) / _TINY
    near = 2 * eps
    inverse = [1 / v for v in known]
    factor = _snap(factor if capped else limit / _HUGE, (1.0, *known, *inverse), near)
    if not capped:
        return AfterHead(None, factor, found.shape[1], eps)
    limit = _snap(limit, (*known, *(v * factor for v in known)), near)
    return AfterHead(limit / factor, factor, found.shape[1], eps)


def _snap(value: float, known: Sequence[float], near: float) -> float:
    closest = min(known, key=lambda v: abs(v - value), default=value)
    return closest if abs(closest - value) <= near * abs(value) else value


def _numbers(config: Any) -> list[float]:
    """Every positive number of the text model's configuration."""
    values = vars(config.get_text_config()).values()
    return [float(v) for v in values if isinstance(v, int | float) and 0 < v < math.inf]


def _gap(found: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest difference, or 0 where each is within its bound."""
    gap = (found - expected).abs()
    return 0.0 if bool((gap <= bound).all()) else float(gap.amax())
