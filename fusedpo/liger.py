"""Modules in the shape of Liger-Kernel 0.8.5's chunked losses: only an import changes.

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss      # before
    from fusedpo.liger import LigerFusedLinearDPOLoss                  # after

Constructor keywords with their defaults and order, the order of a call, what is returned and what
it means are Liger's; so are sums where this library has means, and a cross-entropy that ORPO, CPO
and SimPO add unless told not to. Added are loss types of TRL's trainers and, as keywords only, the
last five of the options that all or many classes have:

    ignore_index             label of the positions to leave out
    beta                     strength of the pull towards the reference; without one, scale of
                             log-probabilities; weight of ORPO's odds ratio, of GRPO's divergence
    compute_nll_loss, alpha  whether the chosen responses' cross-entropy is added, and times what
    label_smoothing          probability that a preference is recorded the wrong way round
    use_ref_model            whether there is a reference; without, its log-probabilities are 0
    average_log_prob         means over tokens, not sums, of policy and reference, in any loss
    compiled, chunk_size     no effect: the memory budget says how a batch is cut
    softcap                  bound of the logits, softcap tanh(z / softcap), or None
    logit_scale              factor of the logits, after softcap; both hold for the reference too
    memory_budget            bytes, or a text such as "512MiB", of a call; else by the device
    backend                  "auto", "torch" or "triton"
    gradient_tolerance       relative error a gradient may have, as of linear_logprobs; 0: none

A wrong option raises a TypeError or ValueError that names it when the module is made, a wrong
argument before any work; there ``_input``, ``lin_weight`` and ``target`` may be called hidden,
weight and labels. Calls return the loss (a scalar in fp32; fp64 for fp64 inputs), which alone is
differentiable, and a tuple of what to log; logits there are those of ignored positions, too.

Liger's mistakes are not repeated: a response without a token to score is refused in the preference
losses (there: NaN for averages); KTO's ``kl`` may be one number a response (there only with all in
one chunk); neither "luspo", a response's length times the mean over its tokens, nor importance
weights enter sums over padding; those of tokens are refused where ratios are of whole responses.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedpo import checks, losses
from fusedpo.distributed import global_count
from fusedpo.engine.plan import Plan
from fusedpo.functional import LossOutput, linear_logprobs, policy_loss, preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses.base import one_of
from fusedpo.losses.modifiers import ByResponse, ComparedWith, PerToken
from fusedpo.model_head import check_options, mean_logits

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]

Returned = tuple[Tensor, tuple[Tensor, ...]]
States = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_STATES: States = (None, None, None)

_DPO = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop"),  # so far Liger's
    *("ipo", "aot", "aot_unpaired", "sft", "sigmoid_norm"),
)
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # Liger's and TRL's "sigmoid" is not
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # whose ratios may be of whole responses
_GRPO = (*_CLIPPED, "cispo", "sapo", "vespo")


@dataclass(eq=False, kw_only=True)
class _Fused(torch.nn.Module):
    """Options that are attributes, as in Liger, which may be changed."""

    softcap: float | None = None
    logit_scale: float = 1.0
    memory_budget: int | float | str | None = None
    backend: str = "auto"
    gradient_tolerance: float = 0.0

    ignore_index = IGNORE_INDEX

    def __post_init__(self) -> None:
        super().__init__()
        if isinstance(self.memory_budget, Plan):
            raise checks.bad_type("memory_budget", "a number or a text", "a Plan, of one call")
        check_options(self.memory_budget, self.backend, self.gradient_tolerance)
        self._head(torch.empty(0), None).check_logits()
        self._formula()

    def _formula(self) -> losses.Loss:
        """The loss, from the options as they are now; raises if they are wrong."""
        raise NotImplementedError

    def _head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.softcap, self.logit_scale)

    @property
    def _options(self) -> dict[str, Any]:
        """What every call is given."""
        names = ("ignore_index", "memory_budget", "backend", "gradient_tolerance")
        return {name: getattr(self, name) for name in names}


@dataclass(eq=False)
class _Preference(_Fused):
    """Modules of preference losses."""

    ignore_index: int = -100
    beta: float = 0.1

    use_ref_model = False
    average_log_prob = False

    def _call(
        self, hidden: Tensor, head: Head, target: Tensor, states: States, nll: float, **inputs: Any
    ) -> LossOutput:
        """The loss, with metrics of each response."""
        formula, options = self._formula(), {**self._options, **inputs}
        assert isinstance(formula, losses.PreferenceLoss), "its subclasses have no other"
        if formula.needs_reference and self.use_ref_model:
            options |= _of_states("ref_input", *states)
        elif formula.needs_reference:
            options["ref_logprobs"] = torch.zeros(target.shape[0], device=target.device)
        if nll:
            formula = formula + nll * losses.SFT()
        if self.average_log_prob:
            formula = PerToken(formula)
        return preference_loss(ByResponse(formula), hidden, head, target, **options)

    def _mean_logits(self, hidden: Tensor, head: Head) -> Tensor:
        budget, backend = self.memory_budget, self.backend
        return mean_logits(hidden, head, memory_budget=budget, backend=backend).double()


class _Paired(_Preference):
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
        _check_rows(hidden, target, "target")
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


@dataclass(eq=False)
class LigerFusedLinearKTOLoss(_Preference):
    """Liger's KTO: single responses that are desirable or not.

    Args:
        loss_type: Liger's "kto", or TRL's "apo_zero_unpaired", for which ``kl`` plays no part.
    """

    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1
    _: KW_ONLY
    loss_type: str = "kto"

    def _formula(self) -> losses.Loss:
        one_of("kto", "apo_zero_unpaired")("loss_type", self.loss_type)
        return ComparedWith(losses.KTO(self.beta, variant="apo_zero"))

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Returned:
        """As LigerFusedLinearDPOLoss, for any B: the loss, a mean over responses, and what to log.

        Args:
            preference_labels: [B], whether a response is desirable: bool, or 1 and 0. Not optional.
            kl: what log-ratios are compared with, a scalar, [1] or [B], which may be below 0; 0 if
                not given. Not differentiated.

        Returns:
            The loss, and chosen_logps_sum, rejected_logps_sum, chosen_logits_sum,
            rejected_logits_sum, chosen_rewards_sum, rejected_rewards_sum, chosen being desirable.
        """
        _check_rows(_input, target, "target")
        labels = checks.is_tensor("preference_labels", preference_labels)
        checks.shaped("preference_labels", labels, target.shape[:1], "one a response,")
        inputs: dict[str, Any] = {"desirable": labels}
        if kl is not None and self.loss_type == "kto":
            if checks.is_tensor("kl", kl).numel() != 1:
                checks.shaped("kl", kl, target.shape[:1], "one number, or one a response")
            inputs["z0"] = kl.reshape(-1).expand(target.shape[0])
        head, states = self._head(lin_weight, bias), (ref_input, ref_weight, ref_bias)
        out = self._call(_input, head, target, states, 0.0, **inputs)
        logits = self._mean_logits(_input, head).sum(1) * lin_weight.shape[0]
        return out.loss, tuple(
            torch.where(which, values, 0).sum().to(out.loss.dtype)
            for values in (out.metrics["logps/response"], logits, out.metrics["rewards/response"])
            for which in (labels.bool(), ~labels.bool())
        )


@dataclass(eq=False)
class LigerFusedLinearGRPOLoss(_Fused):
    """Liger's GRPO: a policy-gradient loss of sampled responses.

    Args:
        epsilon_low, epsilon_high: how far below and above 1 a ratio counts; for "cispo"
            epsilon_high is the most that it counts.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: what "dr_grpo" divides the sum over a response by.
        importance_sampling_level: "token", or "sequence" for ratios of whole responses, which
            "cispo", "sapo" and "vespo" have not.
        temperature: divides the logits, the reference's too.
        delta: the most that a ratio counts, clipped or not; above 1, or None.
        use_bias_correction_kl: whether the divergence is multiplied by the ratio.
        sapo_temperature_pos, sapo_temperature_neg: of "sapo".
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of "vespo".
    """

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def _check_options(self) -> None:
        kind = one_of(*_GRPO)("loss_type", self.loss_type)
        clipped = kind in _CLIPPED  # and only then of whole responses
        levels = ("token", "sequence") if clipped else ("token",)
        one_of(*levels)(f"importance_sampling_level of {kind!r}", self.importance_sampling_level)
        if kind == "dr_grpo":
            checks.positive("max_completion_length", self.max_completion_length)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
            checks.positive(name, getattr(self, name))
        if self.delta is not None and checks.positive("delta", self.delta) <= 1 and clipped:
            raise checks.bad_value("delta", "a number above 1, or None", f"{self.delta:g}")

    def _formula(self) -> losses.PolicyLoss:
        """What a token loses. Liger's clipped types differ in what the sum is divided by alone."""
        self._check_options()
        kind, whole = self.loss_type, self.importance_sampling_level == "sequence"
        shared: dict[str, Any] = {
            "kl_weight": self.beta if self.use_ref_model else 0.0,
            "kl_estimator": "k3_corrected" if self.use_bias_correction_kl else "k3",
        }
        if kind == "cispo":
            return losses.CISPO(epsilon_high=self.epsilon_high, **shared)
        if kind == "sapo":
            shared["tau_pos"] = self.sapo_temperature_pos
            return losses.SoftAdaptive(tau_neg=self.sapo_temperature_neg, **shared)
        if kind == "vespo":
            shared |= {"k_pos": self.vespo_k_pos, "k_neg": self.vespo_k_neg}
            # a decay below 1e-4 is 1e-4, as in Liger and TRL
            above, below = (max(x, 1e-4) for x in (self.vespo_lambda_pos, self.vespo_lambda_neg))
            return losses.VESPO(lambda_pos=above, lambda_neg=below, **shared)
        shared |= {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        averaged, summed = (losses.GSPO, losses.LUSPO) if whole else (losses.GRPO, losses.DAPO)
        return (averaged if kind == "grpo" else summed)(ratio_cap=self.delta, **shared)

    def _denominator(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor | float | None:
        """What the sum over all tokens is divided by; None: the mean that the formula is."""
        kind, responses = self.loss_type, mask.shape[0]
        if kind in ("grpo", "sapo"):
            return None
        if kind in ("luspo", "dr_grpo"):
            length = self.max_completion_length if kind == "dr_grpo" else None
            return float(responses * (length or 1))
        tokens = mask.sum()
        if kind != "bnpo" and num_items is None:
            tokens = global_count(tokens)
        elif kind != "bnpo":
            ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            tokens = torch.as_tensor(num_items, device=mask.device).detach().double() / ranks
        return tokens.double().clamp(min=1.0)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Returned:
        """As LigerFusedLinearDPOLoss, for any B: the loss, and what to log.

        Args:
            selected_token_ids, attention_mask: [B, T], what _input predicts; 1 if it counts, or 0.
            advantages: [B].
            ref_per_token_logps, old_per_token_logps: [B, T], under the reference, in place of
                ref_input, and under the policy that sampled; the policy itself if not given.
            vllm_is_ratio: importance weights, [B] or [B, 1]; [B, T] for ratios of tokens, but not
                in "vespo".
            num_items_in_batch: tokens of the whole step, on all processes, for "dapo", "cispo" and
                "vespo"; those of this call, on all processes, if not given.

        Returns:
            The loss; the mean divergence from the reference, if beta is not 0; and the share of
            tokens, under "sequence" of responses, whose ratio was clipped.
        """
        ids, loss = selected_token_ids, self._formula()
        _check_rows(_input, ids, "selected_token_ids")
        mask = checks.is_tensor("attention_mask", attention_mask) != 0
        checks.shaped("attention_mask", mask, ids.shape, "that of selected_token_ids")
        checks.same_device(_input=_input, attention_mask=mask)
        if mask.device.type == "cpu" and not bool((attention_mask == mask).all()):
            raise checks.bad_value("attention_mask", "1 or 0", "other numbers")
        checks.shaped("advantages", checks.floating("advantages", advantages), ids.shape[:1], "[B]")
        options = {"temperature": self.temperature, "advantages": advantages, **self._options}
        options["old_logprobs"] = old_per_token_logps
        if vllm_is_ratio is not None:
            whole = self.importance_sampling_level == "sequence" or self.loss_type == "vespo"
            options["importance_weights"] = _importance_weights(vllm_is_ratio, ids.shape, whole)
        if loss.kl_weight and ref_per_token_logps is not None:
            options["ref_logprobs"] = ref_per_token_logps
        elif loss.kl_weight:
            either = "ref_per_token_logps or ref_input"
            options |= _of_states(either, ref_input, ref_weight, ref_bias)
        counted = "num_tokens" if loss.aggregation == "token_mean" else "num_items"
        options[counted] = self._denominator(mask, num_items_in_batch)
        # an id that is the ignored label by chance is to be refused like any other wrong one
        labels = ids.clamp(min=-1).masked_fill(~mask, self.ignore_index)
        out = policy_loss(loss, _input, self._head(lin_weight, bias), labels, **options)
        zero = torch.zeros_like(out.loss)
        divergence = (out.metrics.get("kl", zero),) if self.beta else ()
        names = ("clip_ratio/region_mean", "cispo_clip_ratio")
        clipped = next((out.metrics[name] for name in names if name in out.metrics), zero)
        return out.loss, (*divergence, clipped)


def _check_rows(hidden: object, labels: object, name: str) -> None:
    """Padded rows, before anything else looks at them."""
    hidden, labels = checks.floating("_input", hidden), checks.is_tensor(name, labels)
    if hidden.dim() != 3:
        raise checks.bad_value("_input", "[B, T, H]", str(list(hidden.shape)))
    checks.shaped(name, labels, hidden.shape[:2], "that of _input without its last axis,")


def _of_states(
    expected: str, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> dict[str, Any]:
    """The arguments of a reference by its states, which have to be there."""
    if hidden is None:
        raise checks.bad_value("reference", expected, "None", "or make use_ref_model=False")
    return {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias}


def _importance_weights(ratios: object, shape: torch.Size, whole: bool) -> Tensor:
    """[B], or [B, T] unless ratios are of whole responses."""
    weights, rows = checks.floating("vllm_is_ratio", ratios), shape[0]
    if weights.shape in ((rows,), (rows, 1)):
        return weights.reshape(-1)
    if whole or weights.shape != shape:
        expected = f"[{rows}] or [{rows}, 1]" + " of ratios of whole responses" * whole
        expected += f" or {list(shape)}" * (not whole)
        raise checks.bad_value("vllm_is_ratio", expected, str(list(weights.shape)))
    return weights
