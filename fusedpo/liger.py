"""Modules in the shape of Liger-Kernel 0.8.5's chunked losses: only an import changes.

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss      # before
    from fusedpo.liger import LigerFusedLinearDPOLoss                  # after

Constructor keywords with their defaults and order, the order of a call, what is returned and what
it means are Liger's; so are sums where this library has means, and an ORPO, CPO or SimPO that adds
the cross-entropy unless told not to. What is added is keyword-only: further loss types, and four
options that every class has:

    softcap         bound of the logits, softcap tanh(z / softcap), or None
    logit_scale     factor of the logits, after softcap; both hold for the reference too
    memory_budget   bytes, or a text such as "512MiB", that a call may hold; 256 MiB by default
    backend         "auto", "torch" or "triton"

``compiled`` and ``chunk_size`` are taken and have no effect: nothing is compiled here, and how a
batch is cut follows from the memory budget. Arguments that do not fit raise a TypeError or
ValueError before any work, which calls ``_input``, ``lin_weight`` and ``target`` hidden, weight and
labels.

Liger's mistakes are not repeated. A response without a token to score is refused in the preference
losses (there: NaN for averages). KTO's ``kl`` may be one number a response (there only with all in
one chunk). "luspo" is a response's length times the mean over its tokens (there over the padding,
too, unless beta is 0 and ratios are of whole responses). Importance weights of tokens are refused
where the ratio is one of a whole response (there they enter sums over padding). Hyperparameters are
checked as ``fusedpo.losses`` checks them.

Letters: B sequences, P pairs, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fusedpo import checks, losses
from fusedpo.engine.plan import Plan
from fusedpo.functional import linear_logprobs, policy_loss, preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import Input, PolicyLoss, PreferenceLoss
from fusedpo.losses.base import GradientStructure, flag, hyperparameter
from fusedpo.losses.links import Tail
from fusedpo.losses.modifiers import Modifier
from fusedpo.losses.scores import Scores
from fusedpo.model_head import mean_logits
from fusedpo.sizes import parse_budget

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]

Budget = int | float | str | None
Returned = tuple[Tensor, tuple[Tensor, ...]]

# loss_type of DPO -> the options beside beta that its formula reads, by what the loss here calls
# them; Liger's and TRL's "sigmoid" ignores the smoothing
_SMOOTHED = {"label_smoothing": "label_smoothing"}
_DPO: dict[str, dict[str, str]] = {
    "sigmoid": {},
    "hinge": {},
    "exo_pair": _SMOOTHED,
    "nca_pair": {},
    "robust": _SMOOTHED,
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"tau": "discopop_tau"},
    "ipo": {},
    "aot": _SMOOTHED,
    "aot_unpaired": _SMOOTHED,
    "sft": {},
    "sigmoid_norm": {},
}
_CPO = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
_KTO = ("kto", "apo_zero_unpaired")
_GRPO = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# those of whole responses too; the others clip nothing
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")

# a module is a dataclass: its fields are the arguments of its constructor, in Liger's order
_module = dataclass(eq=False, repr=False)


@dataclass(eq=False, repr=False, kw_only=True)
class _Fused(torch.nn.Module):
    """Options that are attributes, as in Liger, which may be changed."""

    softcap: float | None = None
    logit_scale: float = 1.0
    memory_budget: Budget = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__init__()
        if self.softcap is not None:
            checks.positive("softcap", self.softcap)
        checks.positive("logit_scale", self.logit_scale)
        if isinstance(self.memory_budget, Plan):
            raise checks.bad_type("memory_budget", "a number or a text", "a Plan, of one call")
        parse_budget(self.memory_budget)
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
        return {"memory_budget": self.memory_budget, "backend": self.backend}

    def _logit_sums(self, hidden: Tensor, head: Head) -> Tensor:
        """[B] fp64, the sum of all logits of each row, of its ignored positions too."""
        means = mean_logits(hidden, head, **self._options)
        return means.double().sum(1) * head.weight.shape[0]


class _Preference(_Fused):
    """Modules of preference losses."""

    ignore_index: int
    beta: float
    use_ref_model = False
    average_log_prob = False

    def _loss(self, added_nll: float = 0.0) -> PreferenceLoss:
        formula = self._formula()
        assert isinstance(formula, PreferenceLoss), "these names are of losses of pairs"
        return _Shaped(formula, average=self.average_log_prob, added_nll=added_nll)

    def _reference(self, target: Tensor, *reference: Tensor | None) -> dict[str, Any]:
        """The arguments that say it; without one, its log-probabilities are 0, as in Liger."""
        if not self.use_ref_model:
            return {"ref_logprobs": torch.zeros(target.shape[0], device=target.device)}
        if reference[0] is None:
            raise checks.bad_value(
                "ref_input", "[B, T, H], the reference's", "None", "or make use_ref_model=False"
            )
        return dict(zip(("ref_hidden", "ref_weight", "ref_bias"), reference, strict=True))


class _Paired(_Preference):
    """Chosen rows first, then the rejected ones in the same order."""

    alpha = 1.0
    compute_nll_loss: bool

    def _call(
        self,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        reference: dict[str, Any] | None = None,
        nll_target: Tensor | None = None,
        further: tuple[str, ...] = (),
    ) -> Returned:
        _check_rows(hidden, target, "target")
        head = self._head(weight, bias)
        options: dict[str, Any] = {"ignore_index": self.ignore_index, **self._options}
        if nll_target is not None:
            checks.shaped("nll_target", nll_target, target.shape, "the shape of target")
        # the cross-entropy of other positions than target's is another call
        apart = self.compute_nll_loss and nll_target is not None
        added = self.alpha if self.compute_nll_loss and not apart else 0.0
        out = preference_loss(
            self._loss(added), hidden, head, target, **(reference or {}), **options
        )
        loss, pairs = out.loss, target.shape[0] // 2
        nll = torch.zeros_like(loss)
        if self.compute_nll_loss:
            logprobs, labels = out.logprobs[:pairs], target[:pairs]
            if apart:
                assert nll_target is not None, "so it was passed"
                labels = nll_target[:pairs]
                logprobs = linear_logprobs(hidden[:pairs], head, labels, **options)
            nll = (-logprobs.double().sum() / (labels != self.ignore_index).sum()).to(loss.dtype)
            if apart:
                loss = loss + self.alpha * nll
        logits = self._logit_sums(hidden, head).view(2, pairs).mean(1)
        logits = (logits / (hidden.shape[1] * weight.shape[0])).to(loss.dtype)
        logps = [out.metrics[f"logps/{side}"] for side in ("chosen", "rejected")]
        rewards = [out.metrics[f"rewards/{side}"] for side in ("chosen", "rejected")]
        others = [out.metrics[name] for name in further]
        return loss, (*logps, logits[0], logits[1], nll.detach(), *rewards, *others)


@_module
class LigerFusedLinearDPOLoss(_Paired):
    """Liger's DPO: a loss of pairs with a reference.

    Args:
        ignore_index: label of the positions to leave out.
        beta: strength of the pull towards the reference.
        alpha: weight of the cross-entropy of the chosen responses, a mean over all their tokens.
        compute_nll_loss: whether it is added.
        compiled, chunk_size: without effect.
        use_ref_model: whether there is a reference; without, its log-probabilities are 0.
        average_log_prob: means over tokens instead of sums, of policy and reference, in any loss.
        loss_type: Liger's "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair",
            "sppo_hard", "apo_zero", "apo_down" and "discopop", and the others of TRL's DPOTrainer:
            "ipo", "aot", "aot_unpaired", "sft" and "sigmoid_norm".
        label_smoothing: of "exo_pair" (to be above 0), "robust", "aot" and "aot_unpaired".
        discopop_tau: temperature of "discopop".
        softcap, logit_scale, memory_budget, backend: see the module.

    Raises:
        TypeError, ValueError: for a wrong option, naming it.
    """

    ignore_index: int = -100
    beta: float = 0.1
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
        if self.loss_type not in _DPO:
            raise checks.bad_choice("loss_type", self.loss_type, _DPO)
        if self.loss_type == "sft":
            # nothing but a cross-entropy, with the rewards of every other type
            return 0.0 * losses.DPO(self.beta) + losses.SFT()
        read = {name: getattr(self, own) for name, own in _DPO[self.loss_type].items()}
        return losses.get(self.loss_type, beta=self.beta, **read)

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
        """The loss, and what to log.

        Args:
            lin_weight: [V, H], the head; float64, float32, bfloat16 or float16.
            _input: [B, T, H], the head's inputs, B = 2 P; same dtype unless under autocast.
            target: [B, T], int64 or int32, aligned: target[b, t] is what _input[b, t] predicts.
            bias: [V] or None.
            ref_input: [B, T, H'], the reference's. Not differentiated.
            ref_weight, ref_bias: its head; the policy's own, bias included, if neither is given.

        Returns:
            The loss (scalar, fp32; fp64 for fp64 inputs), which alone is differentiable, and
            chosen_logps [P], rejected_logps [P], chosen_logits_mean, rejected_logits_mean,
            nll_loss (0 if it is not computed), chosen_rewards [P], rejected_rewards [P]. The means
            of logits are over the vocabulary and all T positions, ignored ones included.

        Raises:
            TypeError, ValueError: for a wrong argument, before any work, naming it.
        """
        _check_rows(_input, target, "target")
        reference = self._reference(target, ref_input, ref_weight, ref_bias)
        return self._call(lin_weight, _input, target, bias, reference)


@_module
class LigerFusedLinearCPOLoss(_Paired):
    """Liger's CPO: a loss of pairs without a reference, plus a cross-entropy.

    Args:
        ignore_index, alpha, compiled, chunk_size, average_log_prob: as of LigerFusedLinearDPOLoss.
        beta: scale of the log-probabilities.
        label_smoothing: probability that a preference is recorded the wrong way round; under
            "hinge" and "ipo" 0.
        compute_nll_loss: whether the cross-entropy is added.
        loss_type: "sigmoid", Liger's; or the others of TRL's CPOTrainer: "hinge", and "ipo",
            "simpo" and "alphapo", which are of means over tokens, as are then the returned logps
            and rewards. TRL's "alphapo" has no cross-entropy: compute_nll_loss=False.
        simpo_gamma: target margin of "simpo" and "alphapo", absolute.
        alphapo_alpha: shape of the reward of "alphapo"; 0 is "simpo".
        softcap, logit_scale, memory_budget, backend: see the module.

    Raises:
        TypeError, ValueError: for a wrong option, naming it.
    """

    ignore_index: int = -100
    beta: float = 0.1
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
        shared: dict[str, Any] = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        kind = self.loss_type
        if kind not in _CPO:
            raise checks.bad_choice("loss_type", kind, _CPO)
        if kind == "simpo":
            return losses.SimPO(gamma=self.simpo_gamma, **shared)
        if kind == "alphapo":
            return losses.AlphaPO(gamma=self.simpo_gamma, alpha=self.alphapo_alpha, **shared)
        return losses.get("cpo", nll_weight=0.0, link=kind, **shared)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Returned:
        """As LigerFusedLinearDPOLoss, without a reference."""
        return self._call(lin_weight, _input, target, bias)


@_module
class LigerFusedLinearSimPOLoss(_Paired):
    """Liger's SimPO: means over tokens with a target margin, plus a cross-entropy.

    Args:
        ignore_index, alpha, label_smoothing, compute_nll_loss: as of LigerFusedLinearCPOLoss.
        beta: scale of the log-probabilities per token.
        compiled, chunk_size: without effect.
        gamma: target margin, absolute.
        softcap, logit_scale, memory_budget, backend: see the module.

    Raises:
        TypeError, ValueError: for a wrong option, naming it.
    """

    average_log_prob = True
    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1

    def _formula(self) -> losses.Loss:
        return losses.SimPO(self.beta, self.gamma, self.label_smoothing)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Returned:
        """As LigerFusedLinearDPOLoss, without a reference; logps and rewards are per token."""
        return self._call(lin_weight, _input, target, bias)


@_module
class LigerFusedLinearORPOLoss(_Paired):
    """Liger's ORPO: an odds ratio of means over tokens, plus a cross-entropy with weight 1.

    Args:
        ignore_index, compute_nll_loss: as of LigerFusedLinearCPOLoss.
        beta: weight of the odds-ratio term.
        compiled, chunk_size: without effect.
        softcap, logit_scale, memory_budget, backend: see the module.

    Raises:
        TypeError, ValueError: for a wrong option, naming it.
    """

    average_log_prob = True
    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1

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
        """As LigerFusedLinearDPOLoss, without a reference; logps and rewards are per token.

        Args:
            nll_target: [B, T], labels of the cross-entropy if it is to be of other positions than
                target, such as the prompts' too. It costs another pass over the chosen rows.

        Returns:
            As there, and two scalars more: log_odds_ratio, the mean of log sigmoid of the log-odds'
            difference, and log_odds_chosen, the mean of the difference.
        """
        further = ("log_odds_ratio", "log_odds_chosen")
        return self._call(lin_weight, _input, target, bias, None, nll_target, further)


@_module
class LigerFusedLinearKTOLoss(_Preference):
    """Liger's KTO: single responses that are desirable or not.

    Args:
        ignore_index, beta, compiled, use_ref_model, average_log_prob, chunk_size: as of
            LigerFusedLinearDPOLoss.
        loss_type: "kto", Liger's; or TRL's "apo_zero_unpaired", for which ``kl`` plays no part.
        softcap, logit_scale, memory_budget, backend: see the module.

    Raises:
        TypeError, ValueError: for a wrong option, naming it.
    """

    ignore_index: int = -100
    beta: float = 0.1
    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1
    _: KW_ONLY
    loss_type: str = "kto"

    def _formula(self) -> losses.Loss:
        if self.loss_type not in _KTO:
            raise checks.bad_choice("loss_type", self.loss_type, _KTO)
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
            _input, lin_weight, target, bias: as of LigerFusedLinearDPOLoss, for any B.
            preference_labels: [B], whether a response is desirable: bool, or 1 and 0. It has to be
                given.
            ref_input, ref_weight, ref_bias: likewise, the reference's.
            kl: what log-ratios are compared with, a scalar, [1] or [B], taken as it is, not limited
                to 0 or more; 0 if not given. Not differentiated.

        Returns:
            The loss (scalar, fp32; fp64 for fp64 inputs), which alone is differentiable, and six
            sums, of the desirable responses and of the others: chosen_logps_sum,
            rejected_logps_sum, chosen_logits_sum, rejected_logits_sum (over the vocabulary and all
            T positions), chosen_rewards_sum, rejected_rewards_sum.

        Raises:
            TypeError, ValueError: for a wrong argument, before any work, naming it.
        """
        _check_rows(_input, target, "target")
        if preference_labels is None:
            raise checks.bad_type("preference_labels", "a tensor [B]", "nothing")
        checks.is_tensor("preference_labels", preference_labels)
        count = target.shape[0]
        checks.shaped("preference_labels", preference_labels, (count,), "one a response,")
        inputs: dict[str, Any] = {"desirable": preference_labels}
        if kl is not None and self.loss_type == "kto":
            kl = checks.is_tensor("kl", kl)
            if kl.numel() != 1 and kl.shape != (count,):
                expected = f"one number, or one a response [{count}]"
                raise checks.bad_value("kl", expected, str(list(kl.shape)))
            inputs["kl"] = kl.reshape(-1).expand(count)
        head = self._head(lin_weight, bias)
        inputs |= self._reference(target, ref_input, ref_weight, ref_bias) | self._options
        out = preference_loss(
            self._loss(), _input, head, target, ignore_index=self.ignore_index, **inputs
        )
        desirable = preference_labels.bool()
        logps, rewards = (out.metrics[f"{name}/response"] for name in ("logps", "rewards"))
        sums = (
            torch.where(which, values, 0).sum().to(out.loss.dtype)
            for values in (logps, self._logit_sums(_input, head), rewards)
            for which in (desirable, ~desirable)
        )
        return out.loss, tuple(sums)


@_module
class LigerFusedLinearGRPOLoss(_Fused):
    """Liger's GRPO: a policy-gradient loss of sampled responses.

    Args:
        beta: weight of the KL divergence from the reference.
        compiled, chunk_size: without effect.
        use_ref_model: whether there is a reference; without, the divergence is 0.
        epsilon_low, epsilon_high: how far below and above 1 a ratio counts; for "cispo"
            epsilon_high is the most that it counts.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: what "dr_grpo" divides the sum over a response by.
        importance_sampling_level: "token", or "sequence" for ratios of whole responses, which
            "cispo", "sapo" and "vespo" have not.
        sapo_temperature_pos, sapo_temperature_neg: of "sapo".
        temperature: divides the logits, the reference's too.
        delta: the most that a ratio counts, clipped or not; above 1, or None.
        use_bias_correction_kl: whether the divergence is multiplied by the ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of "vespo".
        softcap, logit_scale, memory_budget, backend: see the module.

    Raises:
        TypeError, ValueError: for a wrong option, naming it.
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
        kind, level = self.loss_type, self.importance_sampling_level
        if kind not in _GRPO:
            raise checks.bad_choice("loss_type", kind, _GRPO)
        if level not in ("token", "sequence"):
            raise checks.bad_choice("importance_sampling_level", level, ("token", "sequence"))
        if level == "sequence" and kind not in _CLIPPED:
            raise checks.bad_value(
                "importance_sampling_level",
                f'"token" for loss_type {kind!r}, as only {", ".join(map(repr, _CLIPPED))} have'
                " ratios of whole responses",
                repr(level),
            )
        if kind == "dr_grpo":
            if self.max_completion_length is None:
                raise checks.bad_type("max_completion_length", 'a number for "dr_grpo"', "None")
            checks.positive("max_completion_length", self.max_completion_length)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
            checks.positive(name, getattr(self, name))
        capped = self.delta is not None and checks.positive("delta", self.delta) <= 1.0
        if capped and kind in _CLIPPED:
            raise checks.bad_value("delta", "a number above 1, or None", f"{self.delta:g}")

    def _formula(self) -> PolicyLoss:
        """What a token loses. Liger's clipped types differ in what the sum is divided by alone."""
        self._check_options()
        kind, level = self.loss_type, self.importance_sampling_level
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
        clips = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        shared |= {**clips, "ratio_cap": self.delta}
        if level == "sequence":
            return losses.GSPO(**shared) if kind == "grpo" else losses.LUSPO(**shared)
        return losses.GRPO(**shared) if kind == "grpo" else losses.DAPO(**shared)

    def _denominator(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor | None:
        """What the sum over all tokens is divided by; None: as the formula has it."""
        rows = torch.full((), mask.shape[0], dtype=torch.float64, device=mask.device)
        if self.loss_type == "luspo" and self.importance_sampling_level == "token":
            return rows
        if self.loss_type in ("grpo", "sapo", "luspo"):
            return None
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None, "it was checked"
            return rows * self.max_completion_length
        tokens = mask.sum().double()
        if self.loss_type != "bnpo":
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            if num_items is not None:
                tokens = torch.as_tensor(num_items, device=mask.device).detach().double()
            elif distributed:
                torch.distributed.all_reduce(tokens)
            if distributed:
                tokens = tokens / torch.distributed.get_world_size()
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
            _input, lin_weight, bias: as of LigerFusedLinearDPOLoss, for any B.
            selected_token_ids: [B, T], int64 or int32; what _input[b, t] predicts.
            attention_mask: [B, T], which of them count: 1 or 0, any dtype.
            advantages: [B].
            ref_per_token_logps: [B, T], the reference's log-probabilities; preferred to ref_input.
            old_per_token_logps: [B, T], those of the policy that sampled; its own if not given.
            ref_input, ref_weight, ref_bias: the reference as [B, T, H'] and its head; the policy's
                own, bias included, if neither of the two is given.
            vllm_is_ratio: [B], [B, 1] or, for ratios of tokens but those of "vespo", [B, T],
                importance weights.
            num_items_in_batch: tokens of the whole step, for "dapo", "cispo" and "vespo"; those of
                this batch if not given. Divided by the number of processes.

        Returns:
            The loss (scalar, fp32; fp64 for fp64 inputs), which alone is differentiable, and the
            metrics: the mean divergence from the reference if beta is not 0, and the share of
            tokens, under "sequence" of responses, whose ratio was clipped.

        Raises:
            TypeError, ValueError: for a wrong argument, before any work, naming it.
        """
        ids, loss = selected_token_ids, self._formula()
        _check_rows(_input, ids, "selected_token_ids")
        checks.is_tensor("attention_mask", attention_mask)
        checks.shaped("attention_mask", attention_mask, ids.shape, "that of selected_token_ids")
        checks.same_device(_input=_input, attention_mask=attention_mask)
        mask = attention_mask != 0
        if mask.device.type == "cpu" and not bool((attention_mask == mask).all()):
            raise checks.bad_value("attention_mask", "1 or 0", "other numbers")
        checks.shaped("advantages", checks.floating("advantages", advantages), ids.shape[:1], "[B]")
        reference: dict[str, Any] = {}
        if loss.kl_weight and ref_per_token_logps is not None:
            reference = {"ref_logprobs": ref_per_token_logps}
        elif loss.kl_weight and ref_input is not None:
            pair = {"ref_weight": ref_weight, "ref_bias": ref_bias}
            reference = {"ref_hidden": ref_input, **pair}
        elif loss.kl_weight:
            raise checks.bad_value(
                "ref_per_token_logps",
                "a reference: ref_per_token_logps or ref_input",
                "neither",
                "or make use_ref_model=False",
            )
        counted = "num_tokens" if loss.aggregation == "token_mean" else "num_items"
        denominator: dict[str, Any] = {counted: self._denominator(mask, num_items_in_batch)}
        out = policy_loss(
            loss,
            _input,
            self._head(lin_weight, bias),
            # an id that is the ignored label by chance is to be refused like any other wrong one
            ids.clamp(min=-1).masked_fill(~mask, IGNORE_INDEX),
            advantages=advantages,
            old_logprobs=old_per_token_logps,
            importance_weights=self._importance(vllm_is_ratio, ids),
            temperature=self.temperature,
            **reference,
            **self._options,
            **denominator,
        )
        names = ("clip_ratio/region_mean", "cispo_clip_ratio")
        zero = torch.zeros_like(out.loss).detach()
        metrics = [next((out.metrics[name] for name in names if name in out.metrics), zero)]
        if self.beta != 0.0:
            metrics.insert(0, out.metrics.get("kl", zero))
        return out.loss, tuple(value.to(out.loss.dtype) for value in metrics)

    def _importance(self, ratios: Tensor | None, ids: Tensor) -> Tensor | None:
        """Importance weights [B] or [B, T]."""
        if ratios is None:
            return None
        ratios = checks.floating("vllm_is_ratio", ratios).detach()
        rows, width = ids.shape
        whole = self.importance_sampling_level == "sequence" or self.loss_type == "vespo"
        of_tokens = () if whole else ((rows, width),)
        if ratios.shape not in ((rows,), (rows, 1), *of_tokens):
            shapes = [f"[{rows}]", f"[{rows}, 1]", *([] if whole else [f"[{rows}, {width}]"])]
            reason = " of ratios of whole responses" if whole else ""
            raise checks.bad_value(
                "vllm_is_ratio", f"{' or '.join(shapes)}{reason}", str(list(ratios.shape))
            )
        return ratios if ratios.shape == (rows, width) else ratios.reshape(-1)


@dataclass(frozen=True)
class _Shaped(Modifier):
    """A loss as Liger has it: of averages if it is told to, and with metrics of each response."""

    average: bool = hyperparameter(False, "means over tokens rather than sums, in any loss", flag)
    added_nll: float = hyperparameter(0.0, "weight of an added cross-entropy", checks.number)

    @property
    def nll_weight(self) -> float:
        return self.base.nll_weight + self.added_nll

    @property
    def formula_structure(self) -> GradientStructure:
        structure = self.base.formula_structure
        of_means = self.average and structure.unit == "margin"
        return replace(structure, unit="mean_margin") if of_means else structure

    @property
    def tail(self) -> Tail | None:
        own = self.base.tail
        return replace(own, aggregate="mean") if own is not None and self.average else own

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        return self.base.per_example(*map(self._seen, responses), **inputs)

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        return self.base.of_response(role, self._seen(s), **inputs)

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        """The base's, but logps/ and rewards/ of each role are [P], one a response."""
        seen = [self._seen(s) for s in responses]
        values = self.base.metrics(*seen, **inputs)
        for role, s in zip(self.roles, seen, strict=True):
            values |= {f"logps/{role}": self.logged_logp(s), f"rewards/{role}": self.reward(s)}
        return values

    def _seen(self, s: Scores) -> Scores:
        if not self.average:
            return s
        behind = None if s.ref_logp is None else s.ref_logp / s.length
        return Scores(s.mean, torch.ones_like(s.length), behind, s.confidence)


@dataclass(frozen=True)
class _GivenKTO(losses.KTO):
    """KTO whose z0 is what it is given, one number a response."""

    @property
    def inputs(self) -> Mapping[str, Input]:
        z0 = Input("what the log-ratio is compared with", default=0.0)
        return MappingProxyType({**super().inputs, "kl": z0})

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        moved = replace(s, ref_logp=s.given_ref + inputs["kl"])
        return super().of_response(role, moved, **inputs)


def _check_rows(hidden: object, labels: object, name: str) -> None:
    """Padded rows, before anything else looks at them."""
    hidden, labels = checks.floating("_input", hidden), checks.is_tensor(name, labels)
    if hidden.dim() != 3:
        raise checks.bad_value("_input", "[B, T, H]", str(list(hidden.shape)))
    checks.shaped(name, labels, hidden.shape[:2], "that of _input without its last axis,")
