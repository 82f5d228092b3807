"""The public functions: from hidden states and labels to log-probabilities and losses.

Letters: B sequences, T positions of a padded row, P examples of R responses, N scored tokens,
V vocabulary, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.engine.plan import Plan
from fusedpo.engine.stats import DIFFERENTIABLE, TokenStats
from fusedpo.head import Head
from fusedpo.losses import Loss, PolicyLoss, PreferenceLoss
from fusedpo.objective.arguments import PolicyArguments, PreferenceArguments
from fusedpo.objective.layout import lay_out, lay_out_tokens
from fusedpo.objective.reference import Reference, ReferenceArguments
from fusedpo.objective.run import finish, policy_problem, preference_problem, prepare
from fusedpo.objective.scoring import check_stats, score_tokens

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    num_scored: int | None = None,
    vocab_group: ProcessGroup | None = None,
    gradient_tolerance: float = 0.0,
) -> Tensor:
    """Log-probability of each label under a language-model head, without holding the logits.

    Equal to, and differentiable like:

        z = hidden @ weight.T + bias
        z = softcap * tanh(z / softcap) * logit_scale / temperature
        logp = log_softmax(z.float(), -1).gather(-1, labels[..., None])[..., 0]

    but the logits are accumulated and kept in fp32 whatever the input's dtype (and whatever
    ``torch.set_float32_matmul_precision`` says), log-probabilities near zero keep their digits, and
    only tokens that are not ignored are projected. Gradients are of first order: a backward with
    ``create_graph`` or ``is_grads_batched`` is refused.

    Args:
        hidden: [..., H], the head's inputs; float64, float32, bfloat16 or float16.
        weight: [V, H], the head's weight; same dtype as hidden unless under autocast. A DTensor
            with ``Shard(0)`` on a mesh of one dimension brings its group along: see vocab_group.
            (One that FSDP has sharded is no such head: pass weight.full_tensor().) Or a whole Head,
            with its bias, softcap, logit_scale and vocab_group; these arguments keep their defaults
            then.
        labels: [...], int64 or int32, already aligned: labels[t] is the token that hidden[t]
            predicts.
        bias: [V] or None.
        softcap: bound of the logits, z = softcap tanh(z / softcap), or None.
        logit_scale: factor of the logits, after softcap.
        temperature: a number, or a floating-point tensor shaped like labels, aligned with hidden
            also where labels are shifted in the call (``shift=True``); divides the logits; above 0
            where scored. Not differentiated, and refused if it requires a gradient.
        ignore_index: label of the positions to leave out.
        memory_budget: bytes, a text such as ``"512MiB"``, or a Plan: what may be held beyond the
            outputs. By default 256 MiB on a CPU, and on a GPU 3 % of its memory, 4 GiB at most. A
            Plan made for a call that holds less is refused, with the one to make.
        backend: ``"torch"``, ``"triton"`` (a CUDA or ROCm device, not float64), or ``"auto"``: the
            Triton kernels where they can run.
        num_scored: how many labels are not ignored, if the caller knows it. On a GPU that is the
            one number that a call waits for; with it, wrong labels are asserted on the device.
        vocab_group: the ranks of a vocabulary-parallel head. weight [V_local, H] and bias [V_local]
            are then this rank's slice of the vocabulary; slices follow each other in the order of
            the group and may differ in size. Everything else, labels in the whole vocabulary among
            it, is the same on every rank, and so are the result and the gradient of hidden; the
            gradients of weight and bias are the slice's. Costs one all-gather of a few numbers a
            token, and one all-reduce of [N, H] in full precision for the gradient of hidden; and,
            once a weight tensor, an exchange of the sizes, which is read. ``memory_budget`` is each
            rank's. Not inside torch.compile.
        gradient_tolerance: the relative error, in the 2-norm, that each gradient tensor may have
            beside the exact one, before it is rounded to its dtype; 0 (exact), or from 1e-5 to
            below 1. 2e-3 is what rounding to bfloat16 costs. Log-probabilities are exact whatever
            it is. Of a trained model, the head then costs little more than its forward: see
            docs/approximate-gradients.md, and when not to use it. Of hidden states in float32 or
            lower; without effect on a gradient through the entropy. Inside torch.compile the head
            costs a product more than outside.

    Returns:
        Shaped like labels, fp32 (fp64 for fp64 inputs); exactly 0 where ignored.

    Raises:
        TypeError, ValueError: for a wrong argument, before any work, naming it.
    """
    head = Head.of(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels)
    batch = lay_out_tokens(hidden, head, labels, temperature, ignore_index, backend, num_scored)
    batch = batch.within(gradient_tolerance)
    values = score_tokens(batch, memory_budget)
    assert values.logprob is not None, "it is the statistic that was asked for"
    return batch.rows.scatter(values.logprob)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    *,
    stats: Sequence[str] = ("logprob", "entropy"),
    differentiable: Sequence[str] = ("logprob", "entropy"),
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    num_scored: int | None = None,
    vocab_group: ProcessGroup | None = None,
    gradient_tolerance: float = 0.0,
) -> TokenStats:
    """Per-token statistics of a language-model head, without holding the logits.

    Args:
        stats: which, of ``"logprob"``, ``"entropy"`` (both differentiable), ``"logsumexp"``,
            ``"mean_logit"``, ``"log_sum_sq_probs"`` and ``"top1"``. Beside a trained head the
            log-probability takes 3 to 4 products. With a differentiable ``"entropy"`` it takes 4,
            as ``recompute`` is then the only route; a backward through the entropy takes 5, or 6
            where the hidden gradient does not fit in full precision. Beside a frozen head it is 2
            without and 4 with a backward through the entropy. Under ``torch.no_grad`` it is 1.
        differentiable: which of log-probability and entropy pass a gradient on. An entropy that is
            only logged, ``differentiable=("logprob",)``, costs no product.
        hidden, weight, labels, ...: as in linear_logprobs.

    Returns:
        A TokenStats with the asked statistics.

    Raises:
        TypeError, ValueError: for a wrong argument, before any work, naming it.
    """
    names = check_stats(stats)
    with_gradient = check_stats(differentiable, "differentiable", DIFFERENTIABLE)
    head = Head.of(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels)
    batch = lay_out_tokens(hidden, head, labels, temperature, ignore_index, backend, num_scored)
    batch = batch.within(gradient_tolerance)
    values = score_tokens(batch, memory_budget, stats=names, differentiable=with_gradient)
    by_name = {name: getattr(values, name) for name in names}
    return TokenStats(**{name: batch.rows.scatter(value) for name, value in by_name.items()})


@dataclass(frozen=True)
class LossOutput:
    """The loss of a call, with its metrics and log-probabilities.

    Attributes:
        loss: scalar, fp32 (fp64 for fp64 inputs). The one differentiable output.
        per_example: [P], the loss of each example, without an added cross-entropy, detached. Of a
            policy loss [B], the mean of its tokens' losses for each response, KL term and
            importance weights included: not times the length (LUSPO), nor over a constant (DrGRPO),
            and without the entropy bonus.
        metrics: detached scalars by the names that TRL logs. With a ``gradient_tolerance`` also
            ``head/columns_kept``, the share of the vocabulary that a product of the head's
            gradients took, ``head/dropped_mass``, the mean probability of a row that was left out,
            ``head/gradient_error``, the largest relative error that was estimated, and
            ``head/breaches``, how often that was above the tolerance and the gradients were made
            again, exactly. They are known in a backward only: these are of the **last backward** of
            a call of this kind (tolerance, device, V and H) in this process; 1, 0 and 0 of an exact
            one, and before the first. Not where no gradient is wanted, nor in torch.compile.
        logprobs: log-probability of each scored token, shaped like labels, 0 elsewhere, detached.
            Aligned with hidden also under ``shift=True``: position t holds the token that hidden[t]
            predicts.

    All are of the loss's dtype and on the device of hidden.
    """

    loss: Tensor
    per_example: Tensor
    metrics: dict[str, Tensor] = field(repr=False)
    logprobs: Tensor = field(repr=False)


def preference_loss(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    num_items: int | float | Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    num_scored: Sequence[int] | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    reference: Tensor | Reference | None = None,
    gradient_tolerance: float = 0.0,
    **inputs: Tensor | float,
) -> LossOutput:
    """A preference loss and its gradients, from hidden states, without the logits.

    Rows are sequences: all chosen responses first, then all rejected ones in the same order, as in
    TRL and Liger, then what other responses the loss has (``loss.roles``). Either padded, hidden
    [B, T, H] with labels [B, T]; or packed, hidden [N, H] with labels [N] and ``cu_seqlens``
    [B + 1].

    Args:
        loss: one of ``fusedpo.losses``.
        hidden: [B, T, H] or packed [N, H] (or [1, N, H]), the inputs of the head.
        weight: [V, H], the head's weight; or a whole Head, as in linear_logprobs.
        labels: like hidden without H; ``ignore_index`` on prompt and padding.
        ref_logprobs: log-probabilities under the reference, per token (shaped like labels, aligned
            with hidden) or, if of another shape, per sequence [B]; float64, float32, bfloat16 or
            float16, where fp64 keeps the digits of sums. Detached here.
        ref_hidden: instead, the reference's hidden states, shaped like hidden up to H; scored in
            this call, tile for tile as the policy's, so that equal models give a log-ratio of
            exactly 0.
        ref_weight, ref_bias: the reference's head; the policy's own, bias included, if neither is
            given. A ref_weight alone is a head without bias. Its H is that of ref_hidden and may
            differ from the policy's; its vocabulary is at least as large. softcap, logit_scale and
            temperature of the call apply to it too: pass a reference with another softcap or
            logit_scale as a Reference.
        cu_seqlens: [B + 1] int, start of each packed sequence and the total, as FlashAttention
            takes it.
        shift: labels are as Hugging Face gives them, labels[t] being token t: they are shifted
            here.
        num_items: denominator of the mean over pairs, for accumulation over micro-batches: the
            pairs of the whole optimizer step. P if not given. A number or a tensor of shape [],
            above 0.
        num_tokens: likewise the chosen tokens of the whole step, for a loss with an added
            cross-entropy; has to be given with num_items then.
        bias, softcap, logit_scale, temperature, ignore_index, memory_budget, backend: as in
            linear_logprobs.
        num_scored: the scored tokens of each sequence, B numbers, if the caller knows them. On a
            GPU they are what a call waits for; with them, wrong labels are asserted on the device.
        vocab_group: the ranks of a vocabulary-parallel head, as in linear_logprobs; ref_weight and
            ref_bias are then slices over the same ranks, of sizes of their own.
        sequence_group: the ranks that share the sequences: each passes its own tokens of every
            sequence, hidden [B, T_local, H] or packed with its own ``cu_seqlens``, with labels that
            were shifted before they were cut (Hugging Face's ``shift_labels``). Parts follow each
            other in the order of the ranks, which matters to losses that look at positions only
            (LengthDesensitized, and SemanticSPPO's last states). A rank may have no scored token of
            a sequence, or none at all. Whatever is per token is the rank's own; whatever is per
            sequence or pair, and the counts that are not given, are of the whole, and the same on
            every rank, as are loss, per_example and metrics. hidden's gradient is that of the whole
            loss. A parameter's is the part of this rank's tokens: the parts have to be **added up**
            over the group. Where a wrapper averages over these ranks (DDP, FSDP), multiply the loss
            by their number. Costs an all-gather of B counts, which is read, and some all-reduces
            of B numbers; rules the route one_pass out. Not inside torch.compile.
        gradient_tolerance: as in linear_logprobs.
        reference: the reference, in place of the arguments ``ref_...``: a tensor, as ref_logprobs;
            or a Reference, of log-probabilities or of hidden states and a head with a softcap and
            logit_scale of its own.
        inputs: further tensors or numbers, as the loss declares them (``loss.inputs``), [P] each
            but for KTO's ``kl``; tensors of any real dtype. Detached here.

    Returns:
        A LossOutput. Only its ``loss`` is differentiable.

    Raises:
        TypeError, ValueError: for a wrong argument, before any large allocation, naming it. Ranges
            of inputs (``desirable``, win rates, similarity, ...) and of tensors as denominators are
            looked at on the CPU only: elsewhere, and in torch.compile, reading them would wait.
    """
    if not isinstance(loss, PreferenceLoss):
        raise _not_of_kind("a preference loss, such as fusedpo.losses.DPO()", "policy_loss", loss)
    _check_input_names(loss, inputs)
    layout = lay_out(
        hidden,
        Head.of(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels),
        labels,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        temperature=temperature,
        num_scored=num_scored,
        backend=backend,
        empty=False,
        sequence_group=sequence_group,
    ).within(gradient_tolerance)
    arguments = PreferenceArguments.of(loss, layout, inputs, num_items, num_tokens)
    of_reference = ReferenceArguments(reference, ref_logprobs, ref_hidden, ref_weight, ref_bias)
    run = prepare(loss, layout, of_reference, memory_budget)
    return LossOutput(*finish(run, preference_problem(run, arguments)))


def _check_input_names(loss: Loss, inputs: dict[str, Tensor | float]) -> None:
    """Raise for an argument that neither preference_loss nor the loss has."""
    for name in inputs:
        if name not in loss.inputs:
            parameters = inspect.signature(preference_loss).parameters.values()
            known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
            argument = f"argument of preference_loss with {type(loss).__name__}"
            raise TypeError(str(checks.bad_choice(argument, name, (*known, *loss.inputs))))


def _not_of_kind(expected: str, other: str, loss: object) -> TypeError:
    """The error for a loss that is none, or one that the function called ``other`` takes."""
    remedy = f"call {other}" if isinstance(loss, Loss) else ""
    if isinstance(loss, str):
        remedy = f"pass fusedpo.losses.get({loss!r})"
    return checks.bad_type("loss", expected, repr(loss), remedy)


def policy_loss(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    importance_weights: Tensor | None = None,
    log_entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    num_items: int | float | Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    num_scored: Sequence[int] | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    reference: Tensor | Reference | None = None,
    gradient_tolerance: float = 0.0,
) -> LossOutput:
    """A policy-gradient loss on sampled responses and its gradients, without the logits.

    Rows are sampled responses, padded or packed as in preference_loss. One without scored tokens
    adds nothing, but counts among the responses.

    Args:
        loss: one of ``fusedpo.losses``, such as ``GRPO()`` or ``SoftSequence()``.
        hidden, weight, labels: as in preference_loss.
        advantages: [B], or, if of another shape, per token (shaped like labels, aligned with
            hidden also under ``shift=True``) for a loss of tokens; floating point. Detached here.
        old_logprobs: log-probabilities under the policy that sampled, shaped like labels, aligned
            with hidden, floating point; None where that is this very policy: every ratio is then
            exactly 1, with its gradient.
        ref_logprobs, ref_hidden, ref_weight, ref_bias, reference: the reference of a loss with a
            ``kl_weight``, as in preference_loss, but per token.
        importance_weights: [B] or per token likewise, factors of the loss (not of its KL term) for
            the mismatch between the engine that sampled and the policy; a loss that has them in
            its formula (VESPO) takes them there. Not below 0.
        log_entropy: whether ``metrics`` are to have the mean entropy, which takes no product more.
        num_items: responses of the whole optimizer step, for a loss that is a mean over responses;
            B if not given. A number or a tensor of shape [], above 0.
        num_tokens: likewise the scored tokens of the whole optimizer step, in its place for a loss
            that is a mean over tokens (DAPO, CISPO, VESPO, REINFORCE), beside it for one with an
            entropy bonus.
        cu_seqlens, shift, ..., gradient_tolerance: as in preference_loss. A loss of whole responses
            adds an all-reduce of B numbers in the backward.

    Returns:
        A LossOutput. Only its ``loss`` is differentiable.

    Raises:
        TypeError, ValueError: for a wrong argument, before any large allocation, naming it. Whether
            advantages are finite, importance weights not below 0 and tensors as denominators above
            0 is looked at on the CPU only: elsewhere, and in torch.compile, reading would wait.
    """
    if not isinstance(loss, PolicyLoss):
        raise _not_of_kind("a policy loss, such as fusedpo.losses.GRPO()", "preference_loss", loss)
    layout = lay_out(
        hidden,
        Head.of(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels),
        labels,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        temperature=temperature,
        num_scored=num_scored,
        backend=backend,
        empty=True,
        sequence_group=sequence_group,
    ).within(gradient_tolerance)
    arguments = PolicyArguments.of(
        loss, layout, advantages, old_logprobs, importance_weights, num_items, num_tokens
    )
    of_reference = ReferenceArguments(reference, ref_logprobs, ref_hidden, ref_weight, ref_bias)
    run = prepare(loss, layout, of_reference, memory_budget, log_entropy=log_entropy)
    return LossOutput(*finish(run, policy_problem(run, arguments)))


class FusedLoss(torch.nn.Module):
    """``preference_loss`` or ``policy_loss`` as a module: the loss and its options are set once.

    Args:
        loss: one of ``fusedpo.losses``.
        options: keyword arguments of the function, passed on at every call; a call's own win. They
            may be the loss's own inputs, as in ``FusedLoss(KTO(), kl=0.0)``.

    Raises:
        TypeError: for a ``loss`` that is none, or an option that the function does not have. Values
            of options are checked at a call.
    """

    def __init__(self, loss: Loss, **options: Any) -> None:
        super().__init__()
        if not isinstance(loss, (PreferenceLoss, PolicyLoss)):
            raise checks.bad_type("loss", "a loss, such as fusedpo.losses.DPO()", repr(loss))
        self.function: Callable[..., LossOutput] = (
            policy_loss if isinstance(loss, PolicyLoss) else preference_loss
        )
        parameters = inspect.signature(self.function).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        for name in options:
            if name not in known and name not in loss.inputs:
                raise TypeError(str(checks.bad_choice("option of FusedLoss", name, known)))
        self.loss = loss
        self.options = options

    def forward(
        self, hidden: Tensor, weight: Tensor | Head, labels: Tensor, **arguments: Any
    ) -> LossOutput:
        """As preference_loss or policy_loss."""
        return self.function(self.loss, hidden, weight, labels, **{**self.options, **arguments})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.loss), *(f"{k}={v!r}" for k, v in self.options.items())])
