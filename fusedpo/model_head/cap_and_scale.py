"""The soft cap and the scale between a head's output and a model's logits.

They are measured by probes: made-up logits that the model's forward meets in place of the head's
output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedpo.head import Head
from fusedpo.kernels.logit_map import LogitMap
from fusedpo.model_head.errors import unsupported

# constant probes: one that a soft cap leaves as it is, and one that it caps entirely
TINY, HUGE = 2.0**-10, 1e4


@dataclass(frozen=True)
class AfterHead:
    """A model's logits as a function of its head's output z [rows, V]:
    softcap tanh(z / softcap) logit_scale, of the first ``vocab`` columns.

    Attributes:
        softcap: above 0, or None without one.
        logit_scale: above 0.
        vocab: the number of columns that the model keeps.
        eps: the relative precision with which the other values were measured.
    """

    softcap: float | None
    logit_scale: float
    vocab: int
    eps: float = field(default=torch.finfo(torch.float32).eps, repr=False, compare=False)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The head with this weight [V, H] and bias [V] that makes the model's logits."""
        if weight.shape[0] != self.vocab:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return Head(weight, bias, self.softcap, self.logit_scale)

    def apply(self, z: Tensor) -> Tensor:
        """The logits for a head's output, both [rows, vocab]; z is not modified."""
        return LogitMap(None, self.softcap, self.logit_scale).apply(z.clone())

    def gap(self, probes: Tensor, logits: Tensor) -> float:
        """The largest error of this function where the model made the logits [rows, vocab] of the
        probes [rows, V]; 0 if all errors are within rounding."""
        eps = max(self.eps, torch.finfo(logits.dtype).eps, torch.finfo(probes.dtype).eps)
        expected = self.apply(probes[:, : self.vocab])
        # each bound in proportion to its own logit, so that no constant may be added, however small
        return worst_gap(logits.to(probes.dtype), expected, 8 * eps * expected.abs())


def worst_gap(actual: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest absolute difference; 0 if each is within its bound."""
    gap = (actual - expected).abs()
    return 0.0 if bool((gap <= bound).all()) else float(gap.amax())


def probe_logits(vocab: int, like: Tensor) -> Tensor:
    """[V], evenly spaced from -64 to 64, fp32 or, for a double tensor, fp64; on its device."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.linspace(-64.0, 64.0, vocab, dtype=dtype, device=like.device)


def fit(logits: Tensor, eps: float, constants: Sequence[float]) -> AfterHead:
    """The soft cap and scale that explain a model's logits for constant probes.

    Args:
        logits: [rows, vocab], the first row for a probe of ``TINY``, the second for one of
            ``HUGE``.
        eps: their relative precision.
        constants: of the model's configuration; preferred to measured values that are near.

    Raises:
        UnsupportedHead: if the logits have another sign than the probes, or are not finite.
    """
    tiny, huge = (float(logits[i].double().median()) for i in (0, 1))
    scale, limit = tiny / TINY, huge
    if not (math.isfinite(scale) and scale > 0 and math.isfinite(limit) and limit > 0):
        raise unsupported(
            "logits that are a positive scale and a soft cap of the head's output",
            f"{tiny} for {TINY} and {huge} for {HUGE}",
        )
    capped = limit < 0.99 * scale * HUGE
    if capped:  # a tiny logit is capped a little, too
        scale = limit * math.atanh(tiny / limit) / TINY
    near = 2 * eps
    inverse = [1 / v for v in constants]
    scale = _snap(scale if capped else limit / HUGE, (1.0, *constants, *inverse), near)
    if not capped:
        return AfterHead(None, scale, logits.shape[1], eps)
    limit = _snap(limit, (*constants, *(v * scale for v in constants)), near)
    return AfterHead(limit / scale, scale, logits.shape[1], eps)


def _snap(value: float, constants: Sequence[float], near: float) -> float:
    """The closest of the constants if it is within a relative distance, else the value."""
    closest = min(constants, key=lambda v: abs(v - value), default=value)
    return closest if abs(closest - value) <= near * abs(value) else value


def configured_constants(config: Any) -> list[float]:
    """The positive finite numbers of the text model's configuration."""
    values = vars(config.get_text_config()).values()
    return [float(v) for v in values if isinstance(v, int | float) and 0 < v < math.inf]
