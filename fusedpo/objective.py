"""From hidden states to the loss: layout, reference, formula, denominator, metrics.

Letters: B sequences, T positions of a padded row, P examples of R responses, N scored tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.distributed import checked_group
from fusedpo.engine.plan import Plan
from fusedpo.engine.score import plan_for, score, score_in_graph
from fusedpo.head import Head
from fusedpo.layout import Layout, lay_out
from fusedpo.losses import Input, Loss, PolicyLoss, PreferenceLoss
from fusedpo.policy import PolicyGroups, PolicyProblem
from fusedpo.preference import PreferenceGroups, PreferenceProblem, Side, group_sizes
from fusedpo.reference import check_reference, reference_logprobs
from fusedpo.scored import tracing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LossOutput:
    """What a loss call returns.

    Attributes:
        loss: scalar, fp32 (fp64 for fp64 inputs). The one differentiable output.
        per_example: [P], the loss of each example, without an added cross-entropy, detached. Of a
            policy loss [B], the mean of its tokens' losses for each response, KL term and
            importance weights included: not times the length (LUSPO), nor over a constant (DrGRPO),
            and without the entropy bonus.
        metrics: detached scalars by the names that TRL logs.
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
    weight: Tensor,
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
        weight: [V, H], the head's weight.
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
            temperature of the call apply to it too: give a reference with others as ref_logprobs.
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
        raise checks.bad_type("loss", "a preference loss, such as fusedpo.losses.DPO()", repr(loss))
    head = Head(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels)
    shared = _sequence_group(sequence_group, head, shift)
    layout = lay_out(
        hidden,
        head,
        labels,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        temperature=temperature,
        num_scored=num_scored,
        backend=backend,
        empty=False,
        sequence_group=shared,
    )
    examples = _examples(loss, layout)
    given = _check_inputs(loss, inputs, examples, hidden)
    denominator = _denominator("num_items", num_items, examples, hidden.device)
    nll_denominator = _nll_denominator(loss, num_items, num_tokens, layout, examples)
    reference = check_reference(
        loss,
        hidden,
        head,
        layout.labels,
        layout.sequences.count,
        ref_logprobs,
        ref_hidden,
        ref_weight,
        ref_bias,
    )

    wanted = plan_options(loss, layout.sequences.count, layout.counts, shared=shared is not None)
    stats = wanted["stats"]
    planned: Plan | None = None
    if layout.counts is not None:
        planned = plan_for(
            hidden, head, layout.rows, memory_budget, backend=layout.backend, **wanted
        )
        if planned.route == "one_pass" and examples > 1 and loss.coupling != "response":
            # an example's rows side by side, so that its gradient is known as early as can be
            layout = layout.by_example(len(loss.roles))

    sequences, rows = layout.sequences, layout.rows
    token_weight = _token_weight(loss, layout, examples)
    # a graph that is traced has the formula itself, for the compiler to fuse
    by_kernel = (
        layout.backend == "triton"
        and layout.counts is not None
        and loss.tail is not None
        and token_weight is None
        and not given
        and shared is None
    )
    problem = PreferenceProblem(
        loss=loss,
        sequences=sequences,
        sides=tuple(
            Side(role, slice(r * examples, (r + 1) * examples), slice(0, examples))
            for r, role in enumerate(loss.roles)
        ),
        inputs=given,
        ref_logp=None,
        token_weight=token_weight,
        denominator=denominator,
        nll_denominator=nll_denominator,
        tail=loss.tail if by_kernel else None,
    )
    behind = reference.logprobs
    # as many tokens as sequences: what is shaped like labels is per token
    if behind is not None and behind.shape != layout.labels.shape:
        if token_weight is not None:
            raise checks.bad_value(
                "ref_logprobs",
                f"per token, as {type(loss).__name__} weights tokens",
                f"per sequence [{sequences.count}]",
            )
        problem = replace(problem, ref_logp=behind.double())
    else:
        behind = reference_logprobs(
            reference, rows, temperature, memory_budget, planned, layout.backend
        )
        if behind is not None:
            # to the last bit as the policy's scores are summed
            total = sequences.sum_by_kernel if by_kernel else problem.weighted
            problem = replace(problem, ref_logp=total(behind))
    groups = None
    if planned is not None and layout.counts is not None and planned.route == "one_pass":
        groups = PreferenceGroups(problem, layout.counts)
    options = {
        "stats": stats,
        "differentiable": ("logprob",),
        "temperature": temperature,
        "backend": layout.backend,
        "states": layout.last_rows if loss.uses_states else None,
    }
    if planned is None:
        found, states = score_in_graph(hidden, head, rows, memory_budget, **options)
    else:
        found, states = score(hidden, head, rows, planned, groups=groups, **options)
    by_name = {name: getattr(found, name) for name in stats}
    if states is not None and sequences.parts is not None:
        states = sequences.parts.of_last(states)
    total_loss, per_example, scores, of_states = problem.evaluate(by_name, states)
    logprob = by_name["logprob"].detach()
    return LossOutput(
        loss=total_loss,
        per_example=per_example,
        metrics=problem.metrics(logprob, scores, of_states),
        logprobs=rows.scatter(logprob),
    )


def plan_options(
    loss: Loss,
    sequences: int,
    counts: list[int] | None = None,
    *,
    shared: bool = False,
    log_entropy: bool = False,
) -> dict[str, Any]:
    """What decides a plan and comes from the loss: keyword arguments of ``plan_for``.

    Args:
        loss: a preference or policy loss.
        sequences: responses of the call.
        counts: their scored tokens, if these are known; of all ranks that have parts of them.
        shared: whether several ranks have parts of each sequence.
        log_entropy: whether the entropy is wanted for a metric.
    """
    if shared:
        counts = None  # only parts of these rows are here
    if isinstance(loss, PolicyLoss):
        bonus = bool(loss.entropy_bonus)
        return {
            "stats": ("logprob", "entropy") if bonus or log_entropy else ("logprob",),
            "differentiable": ("logprob", "entropy") if bonus else ("logprob",),
            "scope": "batch" if shared else loss.scope,
            "groups": max(1, sequences) if counts is None else counts,
        }
    assert isinstance(loss, PreferenceLoss), "there is no third kind"
    roles = len(loss.roles)
    examples = sequences // roles
    found = sequences if loss.coupling == "response" else examples
    return {
        "stats": ("logprob", *loss.stats),
        "differentiable": ("logprob",),
        "scope": "batch" if shared else loss.scope,
        "groups": found if counts is None else group_sizes(loss, counts),
        "factors": loss.factors,
        "reordered": examples > 1 and roles > 1 and loss.scope == "pair",
    }


def policy_loss(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor,
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
        ref_logprobs, ref_hidden, ref_weight, ref_bias: the reference of a loss with a
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
        cu_seqlens, shift, ..., sequence_group: as in preference_loss. A loss of whole responses
            adds an all-reduce of B numbers in the backward.

    Returns:
        A LossOutput. Only its ``loss`` is differentiable.

    Raises:
        TypeError, ValueError: for a wrong argument, before any large allocation, naming it. Whether
            advantages are finite, importance weights not below 0 and tensors as denominators above
            0 is looked at on the CPU only: elsewhere, and in torch.compile, reading would wait.
    """
    if not isinstance(loss, PolicyLoss):
        raise checks.bad_type("loss", "a policy loss, such as fusedpo.losses.GRPO()", repr(loss))
    head = Head(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels)
    shared = _sequence_group(sequence_group, head, shift)
    layout = lay_out(
        hidden,
        head,
        labels,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        temperature=temperature,
        num_scored=num_scored,
        backend=backend,
        empty=True,
        sequence_group=shared,
    )
    rows, sequences = layout.rows, layout.sequences
    advantage = _of_tokens("advantages", advantages, layout, hidden)
    _check_range("advantages", advantage, _FINITE)
    old = None
    if old_logprobs is not None:
        old = _of_tokens("old_logprobs", old_logprobs, layout, hidden, per_sequence=False)
    correction = None
    if importance_weights is not None:
        correction = _of_tokens("importance_weights", importance_weights, layout, hidden)
        _check_range("importance_weights", correction, replace(_FINITE, low=0.0))
    for name, value in (("advantages", advantages), ("importance_weights", importance_weights)):
        whole = loss.sees_sequences and (name == "advantages" or not loss.absorbs_correction)
        if whole and value is not None and value.shape != (sequences.count,):
            raise checks.bad_value(
                name,
                f"one number a response [{sequences.count}] for {type(loss).__name__}",
                str(list(value.shape)),
            )
    log_correction = None
    if correction is not None and loss.absorbs_correction:
        log_correction = loss.log_correction(correction)
        assert importance_weights is not None, "it is what the correction came from"
        if importance_weights.shape != (sequences.count,):
            log_correction = sequences.sum(log_correction)[sequences.index]
        correction = None
    per_tokens = loss.aggregation == "token_mean"
    items = _denominator("num_items", num_items, sequences.count, hidden.device)
    # a mean over no tokens is 0
    counts = layout.counts
    scored = sequences.lengths.sum().clamp(min=1) if counts is None else max(1, sum(counts))
    tokens = _denominator("num_tokens", num_tokens, scored, hidden.device)
    for name, given, used in (
        ("num_items", num_items, not per_tokens),
        ("num_tokens", num_tokens, per_tokens or bool(loss.entropy_bonus)),
    ):
        if given is not None and not used:
            raise checks.bad_value(
                name,
                f"None, as {loss!r} is a mean over {'tokens' if per_tokens else 'responses'}",
                str(given),
                f"pass {'num_tokens' if per_tokens else 'num_items'}",
            )
    if loss.entropy_bonus and num_items is not None and num_tokens is None:
        raise checks.bad_value(
            "num_tokens",
            "the scored tokens of the whole step, to go with num_items",
            "None",
            "the entropy bonus is a mean over tokens, not over responses",
        )
    reference = check_reference(
        loss,
        hidden,
        head,
        layout.labels,
        None,
        ref_logprobs,
        ref_hidden,
        ref_weight,
        ref_bias,
    )

    wanted = plan_options(
        loss, sequences.count, layout.counts, shared=shared is not None, log_entropy=log_entropy
    )
    stats, differentiable = wanted["stats"], wanted["differentiable"]
    planned: Plan | None = None
    if layout.counts is not None:
        planned = plan_for(hidden, head, rows, memory_budget, backend=layout.backend, **wanted)
    behind = reference_logprobs(
        reference, rows, temperature, memory_budget, planned, layout.backend
    )
    kernel = (
        layout.backend == "triton"
        and layout.counts is not None
        and loss.tail is not None
        and shared is None
    )
    problem = PolicyProblem(
        loss=loss,
        sequences=sequences,
        advantage=advantage,
        weight=_mean_weight(loss, layout, tokens if per_tokens else items),
        old=old,
        reference=None if behind is None else behind.double(),
        correction=correction,
        log_correction=log_correction,
        entropy_weight=loss.entropy_bonus / tokens if loss.entropy_bonus else 0.0,
        scored=rows.scored,
        by_kernel=kernel and not loss.kl_weight,
    )
    groups = None
    if planned is not None and layout.counts is not None and planned.route == "one_pass":
        groups = PolicyGroups(problem, layout.counts)
    options = {
        "stats": stats,
        "differentiable": differentiable,
        "temperature": temperature,
        "backend": layout.backend,
    }
    if planned is None:
        found, _ = score_in_graph(hidden, head, rows, memory_budget, **options)
    else:
        found, _ = score(hidden, head, rows, planned, groups=groups, **options)
    by_name = {name: getattr(found, name) for name in stats}
    total, per_sequence = problem.evaluate(by_name)
    detached = {name: value.detach() for name, value in by_name.items()}
    return LossOutput(
        loss=total,
        per_example=per_sequence.detach(),
        metrics=problem.metrics(detached),
        logprobs=rows.scatter(detached["logprob"]),
    )


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
        known = [
            name
            for name, p in inspect.signature(self.function).parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        for name in options:
            if name not in known and name not in loss.inputs:
                raise TypeError(str(checks.bad_choice("option of FusedLoss", name, known)))
        self.loss = loss
        self.options = options

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, **arguments: Any
    ) -> LossOutput:
        """As preference_loss or policy_loss."""
        return self.function(self.loss, hidden, weight, labels, **{**self.options, **arguments})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.loss), *(f"{k}={v!r}" for k, v in self.options.items())])


_LARGEST = torch.finfo(torch.float64).max
_FINITE = Input("any number", low=-_LARGEST, high=_LARGEST)


def _sequence_group(group: Any, head: Head, shift: bool) -> ProcessGroup | None:
    """The ranks that share the sequences, checked; None for none or one."""
    if group is None:
        return None
    if tracing():
        raise checks.bad_value(
            "sequence_group",
            "None inside torch.compile",
            "a group",
            "call the loss outside of the graph, under torch.compiler.disable",
        )
    if shift:
        raise checks.bad_value(
            "shift",
            "False beside sequence_group",
            "True",
            "shift the labels before they are cut: a part's last token predicts the next part's "
            "first",
        )
    shared = checked_group("sequence_group", group)
    if shared is not None and head.shard is not None and shared is head.shard.group:
        raise checks.bad_value(
            "sequence_group",
            "another group than vocab_group, whose ranks have the same tokens",
            "the same group",
        )
    return shared


def _examples(loss: PreferenceLoss, layout: Layout) -> int:
    """How many examples the sequences are."""
    count, roles = layout.sequences.count, loss.roles
    if count == 0 or count % len(roles):
        expected = "at least one sequence"
        if roles == ("chosen", "rejected"):
            expected = (
                "an even number of sequences above 0, the chosen half first, then the rejected half"
            )
        elif len(roles) > 1:
            expected = f"a multiple of {len(roles)} sequences above 0, first all {roles[0]} ones"
            expected += f", then {', '.join(roles[1:])}"
        raise checks.bad_value("labels", expected, f"{count} sequence{'s' * (count != 1)}")
    empty = [i for i, n in enumerate(layout.counts or []) if n == 0]
    if empty:
        raise checks.bad_value(
            "labels",
            "at least one scored token in every sequence",
            f"none in sequence{'s' * (len(empty) > 1)} {', '.join(map(str, empty[:8]))}",
            "drop the pair; truncation may have cut its response away",
        )
    return count // len(roles)


def _check_inputs(
    loss: Loss, inputs: dict[str, Tensor | float], examples: int, hidden: Tensor
) -> dict[str, Tensor]:
    """The loss's further inputs, detached, with their defaults."""
    for name in inputs:
        if name not in loss.inputs:
            parameters = inspect.signature(preference_loss).parameters.values()
            named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
            argument = f"argument of preference_loss with {type(loss).__name__}"
            raise TypeError(str(checks.bad_choice(argument, name, (*named, *loss.inputs))))
    found: dict[str, Tensor] = {}
    for name, about in loss.inputs.items():
        shape = f"a tensor [{examples}]" if about.per == "example" else "a number or a tensor"
        value = inputs.get(name, about.default)
        if value is None:
            raise checks.bad_type(name, f"{shape} for {type(loss).__name__}", "nothing")
        if isinstance(value, Real):
            value = torch.full((), float(value), dtype=torch.float64, device=hidden.device)
            found[name] = value.expand(examples) if about.per == "example" else value
        else:
            value = checks.is_tensor(name, value).detach()
            if value.is_complex():
                raise checks.bad_type(name, "real numbers", str(value.dtype))
            if about.per == "example":
                checks.shaped(name, value, (examples,), "one number a pair,")
            elif not value.numel():
                raise checks.bad_value(name, "at least one number", str(list(value.shape)))
            checks.same_device(hidden=hidden, **{name: value})
            found[name] = value.double()
        _check_range(name, found[name], about)
    return found


def _check_range(name: str, value: Tensor, about: Input) -> None:
    """Where reading the numbers does not wait for a device."""
    if value.device.type != "cpu" or tracing():
        return
    wrong = ~((value >= about.low) & (value <= about.high))
    expected = f"numbers in [{about.low:g}, {about.high:g}]"
    if about.binary:
        wrong, expected = (value != 0) & (value != 1), "0 or 1"
    if bool(wrong.any()):
        first = float(value.reshape(-1)[wrong.reshape(-1)][0])
        raise checks.bad_value(name, expected, f"{first:g}")


def _token_weight(loss: PreferenceLoss, layout: Layout, examples: int) -> Tensor | None:
    """[N], how much each token counts."""
    if not loss.weights_tokens:
        return None
    lengths = layout.sequences.lengths.view(len(loss.roles), examples)
    shortest = lengths.amin(0)[layout.sequences.index % examples]
    return loss.token_weight(layout.positions, shortest)


def _of_tokens(
    name: str, value: object, layout: Layout, hidden: Tensor, *, per_sequence: bool = True
) -> Tensor:
    """[N] fp64 from numbers per sequence [B] or per token, detached."""
    given = checks.floating(name, value)
    count, shape = layout.sequences.count, layout.labels.shape
    checks.same_device(hidden=hidden, **{name: given})
    if per_sequence and given.shape == (count,):
        return given.detach().double()[layout.sequences.index]
    if given.shape != shape:
        expected = f"per token {list(shape)}"
        if per_sequence:
            expected = f"one number a response [{count}] or " + expected
        raise checks.bad_value(name, expected, str(list(given.shape)))
    return layout.rows.gather(given.detach().double())


def _mean_weight(loss: PolicyLoss, layout: Layout, denominator: float | Tensor) -> Tensor:
    """[N] fp64, what each token's loss counts in the mean."""
    sequences = layout.sequences
    weight = torch.ones_like(sequences.index, dtype=torch.float64)
    if loss.aggregation == "sequence_mean":
        weight = weight / sequences.lengths[sequences.index]
    if layout.rows.scored is not None:
        weight = torch.where(layout.rows.scored, weight, 0.0)
    return weight / (denominator * loss.divisor)


def _denominator(
    argument: str,
    value: int | float | Tensor | None,
    default: int | Tensor,
    device: torch.device,
) -> float | Tensor:
    if value is None:
        return default
    if isinstance(value, Tensor):
        value = checks.at_hand(argument, value, device)
        checks.shaped(argument, value, (), "a number or a tensor of shape")
        # elsewhere reading it would wait for the device
        if value.device.type == "cpu" and not tracing():
            checks.positive(argument, value.item())
        return value.detach().double()
    return checks.positive(argument, value)


def _nll_denominator(
    loss: PreferenceLoss,
    num_items: int | float | Tensor | None,
    num_tokens: int | float | Tensor | None,
    layout: Layout,
    examples: int,
) -> float | Tensor:
    if num_tokens is not None and not loss.nll_weight:
        raise checks.bad_value(
            "num_tokens", "a loss with an added cross-entropy", repr(loss), "leave num_tokens out"
        )
    if not loss.nll_weight:
        return 1.0
    if num_items is not None and num_tokens is None:
        raise checks.bad_value(
            "num_tokens",
            "the chosen tokens of the whole step, to go with num_items",
            "None",
            "the cross-entropy is a mean over tokens, not over pairs",
        )
    tokens: int | Tensor
    if layout.counts is None:
        tokens = layout.sequences.lengths[:examples].sum()
    else:
        tokens = sum(layout.counts[:examples])
    return _denominator("num_tokens", num_tokens, tokens, layout.labels.device)
