"""Losses of pairs: DPO, CPO, SimPO, ORPO."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo import checks, losses
from fusedpo.functional import linear_logprobs
from fusedpo.head import Head
from fusedpo.liger.base import NO_STATES, Preference, Returned, States, check_rows
from fusedpo.losses.base import one_of

_DPO = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop"),  # so far Liger's
    *("ipo", "aot", "aot_unpaired", "sft", "sigmoid_norm"),
)
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # Liger's and TRL's "sigmoid" is not


class _Paired(Preference):
    """Modules of losses of pairs, with or without a cross-entropy."""

    alpha = 1.0
    compute_nll_loss: bool
    _also_logged: tuple[str, ...] = ()

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Returned:
        """The loss, and what to log.

        Args:
            lin_weight, bias: [V, H] and [V], the head; float64, float32, bfloat16 or float16.
            _input: [B, T, H], its inputs, likewise: P chosen rows, then the P rejected ones.
            target: [B, T], int64 or int32, aligned: target[b, t] is what _input[b, t] predicts.

        Returns:
            The loss, and chosen_logps [P], rejected_logps [P], chosen_logits_mean,
            rejected_logits_mean, nll_loss (0 if it is not computed), chosen_rewards [P],
            rejected_rewards [P]. SimPO's and ORPO's logps and rewards are per token.
        """
        return self._of_pairs(_input, self._head(lin_weight, bias), target, NO_STATES)

    def _of_pairs(
        self, hidden: Tensor, head: Head, target: Tensor, states: States, nll_target: Any = None
    ) -> Returned:
        check_rows(hidden, target, "target")
        if nll_target is not None:
            checks.shaped("nll_target", nll_target, target.shape, "the shape of target")
        pairs = target.shape[0] // 2
        # the cross-entropy of other positions than target's is another call
        in_one_call = self.compute_nll_loss and nll_target is None
        out = self._call(hidden, head, target, states, self.alpha if in_one_call else 0.0)
        loss, nll = out.loss, torch.zeros_like(out.loss)
        if self.compute_nll_loss:
            labels, logprobs = target[:pairs], out.logprobs[:pairs]
            if nll_target is not None:
                labels = nll_target[:pairs]
                logprobs = linear_logprobs(hidden[:pairs], head, labels, **self._options)
            nll = (-logprobs.double().sum() / (labels != self.ignore_index).sum()).to(loss.dtype)
            if not in_one_call:
                loss = loss + self.alpha * nll
        logits = (half.mean().to(loss.dtype) for half in self._mean_logits(hidden, head).chunk(2))
        logps = (out.metrics[name] for name in ("logps/chosen", "logps/rejected"))
        names = ("rewards/chosen", "rewards/rejected", *self._also_logged)
        return loss, (*logps, *logits, nll.detach(), *(out.metrics[name] for name in names))


@dataclass(eq=False)
class LigerFusedLinearDPOLoss(_Paired):
    """Liger's DPO: a loss of pairs with a reference.

    Args:
        loss_type: Liger's, or TRL's "ipo", "aot", "aot_unpaired", "sft" or "sigmoid_norm". Labels
            are smoothed in "exo_pair" (where they have to be), "robust", "aot" and "aot_unpaired".
        discopop_tau: temperature of "discopop".
    """

    alpha: float = 1.0
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def _formula(self) -> losses.Loss:
        kind = one_of(*_DPO)("loss_type", self.loss_type)
        if kind == "sft":  # nothing but a cross-entropy, with the rewards of every other type
            return 0.0 * losses.DPO(self.beta) + losses.SFT()
        read = {"label_smoothing": self.label_smoothing} if kind in _SMOOTHED else {}
        if kind == "discopop":
            read["tau"] = self.discopop_tau
        return losses.get(kind, beta=self.beta, **read)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Returned:
        """As LigerFusedLinearCPOLoss, with a reference.

        Args:
            ref_input: [B, T, H'], the reference's. Not differentiated.
            ref_weight, ref_bias: its head; the policy's own, bias included, if neither is given.
        """
        states = (ref_input, ref_weight, ref_bias)
        return self._of_pairs(_input, self._head(lin_weight, bias), target, states)


@dataclass(eq=False)
class LigerFusedLinearCPOLoss(_Paired):
    """Liger's CPO: a loss of pairs without a reference, plus a cross-entropy.

    Args:
        loss_type: Liger's "sigmoid", or TRL's "hinge" or, of means over tokens, as are then the
            logps and rewards, "ipo", "simpo" or "alphapo" (in TRL with compute_nll_loss=False).
            Labels cannot be smoothed in "hinge" and "ipo".
        simpo_gamma: target margin of "simpo" and "alphapo", absolute.
        alphapo_alpha: shape of the reward of "alphapo"; 0 is "simpo".
    """

    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    _: KW_ONLY
    loss_type: str = "sigmoid"
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25

    def _formula(self) -> losses.Loss:
        kind = one_of("sigmoid", "hinge", "ipo", "simpo", "alphapo")("loss_type", self.loss_type)
        shared: dict[str, Any] = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        if kind == "simpo":
            return losses.SimPO(gamma=self.simpo_gamma, **shared)
        if kind == "alphapo":
            return losses.AlphaPO(gamma=self.simpo_gamma, alpha=self.alphapo_alpha, **shared)
        return losses.CPO(nll_weight=0.0, link=kind, **shared)


@dataclass(eq=False)
class LigerFusedLinearSimPOLoss(_Paired):
    """Liger's SimPO: means over tokens with a target margin, plus a cross-entropy.

    Args:
        gamma: target margin, absolute.
    """

    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1

    def _formula(self) -> losses.Loss:
        return losses.SimPO(self.beta, self.gamma, self.label_smoothing)


@dataclass(eq=False)
class LigerFusedLinearORPOLoss(_Paired):
    """Liger's ORPO: an odds ratio of means over tokens, plus a cross-entropy."""

    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1

    _also_logged = ("log_odds_ratio", "log_odds_chosen")

    def _formula(self) -> losses.Loss:
        return losses.ORPO(self.beta, nll_weight=0.0)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Returned:
        """As LigerFusedLinearCPOLoss, and two scalars more: log_odds_ratio, the mean of log sigmoid
        of the log-odds' difference, and log_odds_chosen, the mean of the difference.

        Args:
            nll_target: [B, T], labels of the cross-entropy if it is to be of other positions than
                target, such as the prompts' too. It costs another pass over the chosen rows.
        """
        head = self._head(lin_weight, bias)
        return self._of_pairs(_input, head, target, NO_STATES, nll_target)
