r"""Semantic SPPO (Chen, Zhu, Wang et al., arXiv 2606.01561): SPPO with softened targets.

A reconstruction from the paper's abstract and third-party accounts, as its text could not be read.

    P'(y) = 1/2 + (1 - s) (P(y) - 1/2)         s: similarity of the two responses, in [0, 1]
    L     = SPPO's loss with P' in place of P, plus repulsion_weight R(h_w, h_l)

If P_w + P_l = 1, so is the sum of the softened ones. Softening is towards 1/2, whatever SPPO's
``baseline``: above 1/2, two responses that say the same both become less likely. h is the hidden
state that predicts the last scored token of a response. With u = h / |h|, c = u_w . u_l and
d = |h_w - h_l|, the repulsion R is

    unit_sq_euclid   -|u_w - u_l|^2 = 2 c - 2      (assumed default)
    cosine           c
    hinge_sq         max(0, margin - d)^2
    gauss            exp(-d^2 / (2 kappa^2))
    none             0

At beta = 1e-3 the first term's gradient is larger by orders of magnitude; ``scaled`` (times beta^2)
brings the two to one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fusedpo.checks import non_negative, positive
from fusedpo.losses.base import Input, hyperparameter, one_of
from fusedpo.losses.sppo import SPPO, WIN_RATES

Repulsion = Literal["unit_sq_euclid", "cosine", "hinge_sq", "gauss", "none"]

# a hidden state shorter than this has no direction, and no gradient
_LEAST_NORM = 1e-8


@dataclass(frozen=True)
class SemanticSPPO(SPPO):
    """Semantic SPPO: win rates drawn to 1/2 where responses say the same, states pushed apart."""

    repulsion_weight: float = hyperparameter(
        1.0,
        "weight of the repulsion (assumed)",
        non_negative,
        only={"repulsion": ("unit_sq_euclid", "cosine", "hinge_sq", "gauss")},
    )
    repulsion: Repulsion = hyperparameter(
        "unit_sq_euclid",
        "form of the repulsion",
        one_of("unit_sq_euclid", "cosine", "hinge_sq", "gauss", "none"),
    )
    margin: float = hyperparameter(
        1.0,
        "distance of the hidden states that is enough",
        positive,
        only={"repulsion": ("hinge_sq",)},
    )
    kappa: float = hyperparameter(
        1.0, "width of the bell", positive, only={"repulsion": ("gauss",)}
    )

    @property
    def inputs(self) -> Mapping[str, Input]:
        meaning = "semantic overlap of the two responses; 0 if the win rates are softened already"
        return MappingProxyType({**WIN_RATES, "similarity": Input(meaning, 0.0, 0.0, 1.0)})

    def target(self, role: str, **inputs: Any) -> Tensor:
        rate = super().target(role, **inputs)
        return 0.5 + (1.0 - inputs["similarity"]) * (rate - 0.5)

    @property
    def uses_states(self) -> bool:
        return self.repulsion != "none" and self.repulsion_weight > 0

    def of_states(self, *states: Any) -> Tensor | None:
        if not self.uses_states:
            return None
        return self.repulsion_weight * self._repulsion(*states)

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        """With the similarity and the win rates aimed at, as means over the pairs."""
        return {
            **SPPO.metrics(self, *responses, **inputs),
            "similarity": inputs["similarity"].double().mean(),
            "targets/chosen": self.target("chosen", **inputs).double().mean(),
            "targets/rejected": self.target("rejected", **inputs).double().mean(),
        }

    def _repulsion(self, h_w: Tensor, h_l: Tensor) -> Tensor:
        if self.repulsion in ("hinge_sq", "gauss"):
            square = (h_w - h_l).square().sum(-1)
            if self.repulsion == "gauss":
                return torch.exp(-square / (2 * self.kappa**2))
            # equal states have no direction to part in: no gradient, rather than NaN
            apart = square > 0
            distance = torch.where(apart, square, 1.0).sqrt() * apart
            return torch.relu(self.margin - distance).square()
        u_w, u_l = _unit(h_w), _unit(h_l)
        if self.repulsion == "cosine":
            return (u_w * u_l).sum(-1)
        # the difference itself, as 2 c - 2 would cancel for states that are close
        return -(u_w - u_l).square().sum(-1)


def _unit(h: Tensor) -> Tensor:
    square = h.square().sum(-1, keepdim=True)
    known = square > _LEAST_NORM**2
    return torch.where(known, h, 0.0) / torch.where(known, square, 1.0).sqrt()
