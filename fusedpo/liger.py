"""Modules in the shape of Liger-Kernel 0.8.5's chunked losses: only an import changes.

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss      # before
    from fusedpo.liger import LigerFusedLinearDPOLoss                  # after

Constructor keywords with their defaults and order, the order of a call, what is returned and what
it means are Liger's; so are sums where this library has means, and a cross-entropy that ORPO, CPO
and SimPO add unless told not to. Added, as keywords only, are loss types of TRL's trainers and the
last five of the options that all or many classes have:

    ignore_index        label of the positions to leave out
    compute_nll_loss    whether alpha times the cross-entropy of the chosen responses is added
    label_smoothing     probability that a preference is recorded the wrong way round
    use_ref_model       whether there is a reference; without, its log-probabilities are 0
    average_log_prob    means over tokens instead of sums, of policy and reference, in any loss
    compiled            no effect, as of chunk_size: the memory budget says how a batch is cut
    softcap             bound of the logits, softcap tanh(z / softcap), or None
    logit_scale         factor of the logits, after softcap; both hold for the reference too
    memory_budget       bytes, or a text such as "512MiB", that a call may hold; else by the device
    backend             "auto", "torch" or "triton"
    gradient_tolerance  relative error that a gradient may have, as of ``linear_logprobs``; 0: none

A wrong option raises a TypeError or ValueError that names it when the module is made, a wrong
argument before any work; there ``_input``, ``lin_weight`` and ``target`` may be called hidden,
weight and labels. Calls return the loss (a scalar in fp32; fp64 for fp64 inputs), which alone is
differentiable, and a tuple of what to log; logits there are those of ignored positions, too.

Liger's mistakes are not repeated. A response without a token to score is refused in the preference
losses (there: NaN for averages). KTO's ``kl`` may be one number a response (there only with all in
one chunk). "luspo" is a response's length times the mean over its tokens (there over the padding,
too, unless beta is 0 and ratios are of whole responses). Importance weights of tokens are refused
where the ratio is one of a whole response (there they enter sums over padding). Hyperparameters are
checked as ``fusedpo.losses`` checks them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedpo import checks, losses
from fusedpo.engine.plan import Plan
from fusedpo.functional import LossOutput, linear_logprobs, policy_loss, preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses.base import Input, Scores, Tail, one_of
from fusedpo.losses.modifiers import Modifier, PerToken
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
Reference = tuple[Tensor | None, Tensor | None, Tensor | None]

_DPO = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop"),  # so far Liger's
    *("ipo", "aot", "aot_unpaired", "sft", "sigmoid_norm"),
)
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # Liger's and TRL's "sigmoid" is not
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # whose ratios may be of whole responses
_GRPO = (*_CLIPPED, "cispo", "sapo", "vespo")


@dataclass(eq=False, repr=False, kw_only=True)
class _Fused(torch.nn.Module):
    """Options that are attributes, as in Liger, which may be changed."""

    softcap: float | None = None
    logit_scale: float = 1.0
    memory_budget: int | float | str | None = None
    backend: str = "auto"
    gradient_tolerance: float = 0.0

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

    def extra_repr(self) -> str:
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.softcap, self.logit_scale)

    @property
    def _options(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("memory_budget", "backend", "gradient_tolerance")}

    def _mean_logits(self, hidden: Tensor, head: Head) -> Tensor:
        return mean_logits(hidden, head, memory_budget=self.memory_budget, backend=self.backend)


@dataclass(eq=False, repr=False)
class _Preference(_Fused):
    """Modules of preference losses."""

    ignore_index: int = -100
    beta: float = 0.1

    use_ref_model = False
    average_log_prob = False

    def _call(
        self,
        hidden: Tensor,
        head: Head,
        target: Tensor,
        reference: Reference = (None, None, None),
        added_nll: float = 0.0,
        **inputs: Tensor,
    ) -> LossOutput:
        """The loss, with metrics of each response."""
        formula = self._formula()
        assert isinstance(formula, losses.PreferenceLoss), "its subclasses have no other"
        options: dict[str, Any] = {"ignore_index": self.ignore_index, **self._options, **inputs}
        if formula.needs_reference and self.use_ref_model:
            options |= _of_states("ref_input", *reference)
        elif formula.needs_reference:
            options["ref_logprobs"] = torch.zeros(target.shape[0], device=target.device)
        if added_nll:
            formula = formula + added_nll * losses.SFT()
        if self.average_log_prob:
            formula = PerToken(formula)
        return preference_loss(_Logged(formula), hidden, head, target, **options)


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
        return self._of_pairs(lin_weight, _input, target, bias)

    def _of_pairs(
        self,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        reference: Reference = (None, None, None),
        nll_target: Tensor | None = None,
    ) -> Returned:
        _check_rows(hidden, target, "target")
        if nll_target is not None:
            checks.shaped("nll_target", nll_target, target.shape, "the shape of target")
        head, pairs = self._head(weight, bias), target.shape[0] // 2
        # the cross-entropy of other positions than target's is another call
        in_one_call = self.compute_nll_loss and nll_target is None
        out = self._call(hidden, head, target, reference, self.alpha if in_one_call else 0.0)
        loss, nll = out.loss, torch.zeros_like(out.loss)
        if self.compute_nll_loss:
            labels, logprobs = target[:pairs], out.logprobs[:pairs]
            if nll_target is not None:
                labels, options = nll_target[:pairs], self._options
                options["ignore_index"] = self.ignore_index
                logprobs = linear_logprobs(hidden[:pairs], head, labels, **options)
            nll = (-logprobs.double().sum() / (labels != self.ignore_index).sum()).to(loss.dtype)
            if not in_one_call:
                loss = loss + self.alpha * nll
        logits = self._mean_logits(hidden, head).double().chunk(2)
        return loss, (
            *(out.metrics[name] for name in ("logps/chosen", "logps/rejected")),
            *(half.mean().to(loss.dtype) for half in logits),
            nll.detach(),
            *(out.metrics[n] for n in ("rewards/chosen", "rewards/rejected", *self._also_logged)),
        )


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(_Paired):
    """Liger's DPO: a loss of pairs with a reference.

    Args:
        beta: strength of the pull towards the reference.
        loss_type: Liger's, or TRL's "ipo", "aot", "aot_unpaired", "sft" or "sigmoid_norm".
        label_smoothing: of "exo_pair" (to be above 0), "robust", "aot" and "aot_unpaired".
        discopop_tau: temperature of "discopop".
        ignore_index, alpha, compute_nll_loss, compiled, use_ref_model, average_log_prob, softcap,
            chunk_size, logit_scale, memory_budget, backend, gradient_tolerance: see the module.
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
        return self._of_pairs(lin_weight, _input, target, bias, (ref_input, ref_weight, ref_bias))


@dataclass(eq=False, repr=False)
class LigerFusedLinearCPOLoss(_Paired):
    """Liger's CPO: a loss of pairs without a reference, plus a cross-entropy.

    Args:
        beta: scale of the log-probabilities.
        label_smoothing: see the module; under "hinge" and "ipo" 0.
        loss_type: Liger's "sigmoid", or TRL's "hinge" or, of means over tokens, as are then the
            logps and rewards, "ipo", "simpo" or "alphapo" (in TRL with compute_nll_loss=False).
        simpo_gamma: target margin of "simpo" and "alphapo", absolute.
        alphapo_alpha: shape of the reward of "alphapo"; 0 is "simpo".
        ignore_index, alpha, compiled, average_log_prob, chunk_size, softcap, logit_scale,
            memory_budget, backend, gradient_tolerance: see the module.
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


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(_Paired):
    """Liger's SimPO: means over tokens with a target margin, plus a cross-entropy.

    Args:
        beta: scale of the log-probabilities per token.
        gamma: target margin, absolute.
        ignore_index, alpha, label_smoothing, compute_nll_loss, compiled, chunk_size, softcap,
            logit_scale, memory_budget, backend, gradient_tolerance: see the module.
    """

    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1

    def _formula(self) -> losses.Loss:
        return losses.SimPO(self.beta, self.gamma, self.label_smoothing)


@dataclass(eq=False, repr=False)
class LigerFusedLinearORPOLoss(_Paired):
    """Liger's ORPO: an odds ratio of means over tokens, plus a cross-entropy.

    Args:
        beta: weight of the odds-ratio term.
        ignore_index, compute_nll_loss, compiled, chunk_size, softcap, logit_scale, memory_budget,
            backend, gradient_tolerance: see the module.
    """

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
        return self._of_pairs(lin_weight, _input, target, bias, nll_target=nll_target)


@dataclass(eq=False, repr=False)
class LigerFusedLinearKTOLoss(_Preference):
    """Liger's KTO: single responses that are desirable or not.

    Args:
        beta: strength of the pull towards the reference.
        loss_type: Liger's "kto", or TRL's "apo_zero_unpaired", for which ``kl`` plays no part.
        ignore_index, compiled, use_ref_model, average_log_prob, chunk_size, softcap, logit_scale,
            memory_budget, backend, gradient_tolerance: see the module.
    """

    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1
    _: KW_ONLY
    loss_type: str = "kto"

    def _formula(self) -> losses.Loss:
        one_of("kto", "apo_zero_unpaired")("loss_type", self.loss_type)
        return _GivenKTO(self.beta, variant="apo_zero")

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
        """The loss, a mean over all responses, and sums to log.

        Args:
            _input, lin_weight, ..., ref_bias: as of LigerFusedLinearDPOLoss, for any B.
            preference_labels: [B], whether a response is desirable: bool, or 1 and 0. Not optional.
            kl: what log-ratios are compared with, a scalar, [1] or [B], which may be below 0; 0 if
                not given. Not differentiated.

        Returns:
            The loss, and sums over desirable and other responses: chosen_logps_sum,
            rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum,
            rejected_rewards_sum.
        """
        _check_rows(_input, target, "target")
        labels = checks.is_tensor("preference_labels", preference_labels)
        checks.shaped("preference_labels", labels, target.shape[:1], "one a response,")
        inputs: dict[str, Any] = {"desirable": labels}
        if kl is not None and self.loss_type == "kto":
            if checks.is_tensor("kl", kl).numel() != 1:
                checks.shaped("kl", kl, target.shape[:1], "one number, or one a response")
            inputs["kl"] = kl.reshape(-1).expand(target.shape[0])
        head, reference = self._head(lin_weight, bias), (ref_input, ref_weight, ref_bias)
        out = self._call(_input, head, target, reference, **inputs)
        logits = self._mean_logits(_input, head).double().sum(1) * lin_weight.shape[0]
        return out.loss, tuple(
            torch.where(which, values, 0).sum().to(out.loss.dtype)
            for values in (out.metrics["logps/response"], logits, out.metrics["rewards/response"])
            for which in (labels.bool(), ~labels.bool())
        )


@dataclass(eq=False, repr=False)
class LigerFusedLinearGRPOLoss(_Fused):
    """Liger's GRPO: a policy-gradient loss of sampled responses.

    Args:
        beta: weight of the KL divergence from the reference, if there is one.
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
        compiled, use_ref_model, chunk_size, softcap, logit_scale, memory_budget, backend,
            gradient_tolerance: see the module.
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
        levels = ("token", "sequence") if kind in _CLIPPED else ("token",)
        one_of(*levels)(f"importance_sampling_level of {kind!r}", self.importance_sampling_level)
        if kind == "dr_grpo":
            checks.positive("max_completion_length", self.max_completion_length)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
            checks.positive(name, getattr(self, name))
        capped = self.delta is not None and checks.positive("delta", self.delta) <= 1.0
        if capped and kind in _CLIPPED:
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
        shared["ratio_cap"] = self.delta
        if kind == "grpo":
            return losses.GSPO(**shared) if whole else losses.GRPO(**shared)
        return losses.LUSPO(**shared) if whole else losses.DAPO(**shared)

    def _denominator(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor | float | None:
        """What the sum over all tokens is divided by; None: the mean that the formula is."""
        kind, responses = self.loss_type, mask.shape[0]
        fixed = {"grpo": None, "sapo": None, "luspo": float(responses)}
        fixed["dr_grpo"] = responses * float(self.max_completion_length or 0)
        if kind in fixed:
            return fixed[kind]
        tokens = mask.sum().double()
        if kind != "bnpo":
            if num_items is not None:
                tokens = torch.as_tensor(num_items, device=mask.device).detach().double()
            if dist.is_available() and dist.is_initialized():
                if num_items is None:
                    dist.all_reduce(tokens)
                tokens = tokens / dist.get_world_size()
        return tokens.clamp(min=1.0)

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
        """The loss, and what to log.

        Args:
            _input, lin_weight, bias, ref_input, ...: as of LigerFusedLinearDPOLoss, for any B.
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
        options["importance_weights"] = self._importance_weights(vllm_is_ratio, ids)
        if loss.kl_weight and ref_per_token_logps is not None:
            options["ref_logprobs"] = ref_per_token_logps
        elif loss.kl_weight:
            either = "ref_per_token_logps or ref_input"
            options |= _of_states(either, ref_input, ref_weight, ref_bias)
        counted = "num_tokens" if loss.aggregation == "token_mean" else "num_items"
        options[counted] = self._denominator(mask, num_items_in_batch)
        # an id that is the ignored label by chance is to be refused like any other wrong one
        labels = ids.clamp(min=-1).masked_fill(~mask, IGNORE_INDEX)
        out = policy_loss(loss, _input, self._head(lin_weight, bias), labels, **options)
        zero = torch.zeros_like(out.loss)
        divergence = (out.metrics.get("kl", zero),) if self.beta else ()
        names = ("clip_ratio/region_mean", "cispo_clip_ratio")
        clipped = next((out.metrics[name] for name in names if name in out.metrics), zero)
        return out.loss, (*divergence, clipped)

    def _importance_weights(self, ratios: Tensor | None, ids: Tensor) -> Tensor | None:
        """[B], or [B, T] where a ratio is one of a token."""
        if ratios is None:
            return None
        rows, width = ids.shape
        shapes, reason = [[rows], [rows, 1], [rows, width]], ""
        if self.importance_sampling_level == "sequence" or self.loss_type == "vespo":
            shapes, reason = shapes[:2], " of ratios of whole responses"
        shape = [*checks.floating("vllm_is_ratio", ratios).shape]
        if shape not in shapes:
            expected = " or ".join(map(str, shapes)) + reason
            raise checks.bad_value("vllm_is_ratio", expected, str(shape))
        return ratios.reshape(-1) if shape == [rows, 1] else ratios


@dataclass(frozen=True)
class _Logged(Modifier):
    """A loss whose logged log-probabilities and rewards are [P], one a response, not means."""

    @property
    def tail(self) -> Tail | None:
        return self.base.tail

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        values = self.base.metrics(*responses, **inputs)
        for role, s in zip(self.roles, responses, strict=True):
            values |= {f"logps/{role}": self.logged_logp(s), f"rewards/{role}": self.reward(s)}
        return values


@dataclass(frozen=True)
class _GivenKTO(losses.KTO):
    """KTO whose z0 is what it is given, one number a response."""

    @property
    def inputs(self) -> Mapping[str, Input]:
        z0 = Input("what the log-ratio is compared with", default=0.0)
        return MappingProxyType({**super().inputs, "kl": z0})

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        return super().of_response(role, replace(s, ref_logp=s.given_ref + inputs["kl"]), **inputs)


def _check_rows(hidden: object, labels: object, name: str) -> None:
    """Padded rows, before anything else looks at them."""
    hidden, labels = checks.floating("_input", hidden), checks.is_tensor(name, labels)
    if hidden.dim() != 3:
        raise checks.bad_value("_input", "[B, T, H]", str(list(hidden.shape)))
    checks.shaped(name, labels, hidden.shape[:2], "that of _input without its last axis,")


def _of_states(
    expected: str, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> dict[str, Any]:
    if hidden is None:
        raise checks.bad_value("reference", expected, "None", "or make use_ref_model=False")
    return {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias}
