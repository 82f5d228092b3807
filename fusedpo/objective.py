"""From hidden states to the loss: layout, reference, scores, formula, denominator, metrics.

Letters: B sequences, T positions of a padded row, P pairs, N scored tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.backend import resolve
from fusedpo.head import Head
from fusedpo.logprobs import plan_for, score
from fusedpo.losses import Loss, PairLoss
from fusedpo.losses._links import Tail
from fusedpo.plan import Plan
from fusedpo.scored import (
    Fault,
    assert_on_device,
    border_fault,
    count_scored,
    label_fault,
    temperature_faults,
    to_device,
    tracing,
)
from fusedpo.scores import Scores, Sequences
from fusedpo.sweeps import Rows


@dataclass(frozen=True)
class LossOutput:
    """What a loss call returns.

    Attributes:
        loss: scalar, fp32 (fp64 for fp64 inputs). The one differentiable output.
        per_example: [P], the loss of each pair, detached.
        metrics: detached scalars by the names that TRL logs.
        logprobs: log-probability of each scored token, shaped like labels, 0 elsewhere, detached.
            Aligned
            with hidden also under ``shift=True``: position t holds the token that hidden[t]
            predicts.
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
    **inputs: Tensor,
) -> LossOutput:
    """A preference loss and its gradients, from hidden states, without the logits.

    Rows are sequences: all chosen responses first, then all rejected ones in the same order, as in
    TRL and Liger. Either padded, hidden [B, T, H] with labels [B, T]; or packed, hidden [N, H] with
    labels [N] and ``cu_seqlens`` [B + 1].

    Args:
        loss: one of ``fusedpo.losses``.
        hidden: [B, T, H] or packed [N, H] (or [1, N, H]), the inputs of the head.
        weight: [V, H], the head's weight.
        labels: like hidden without H; ``ignore_index`` on prompt and padding.
        ref_logprobs: log-probabilities under the reference, per token (shaped like labels, aligned
            with
            hidden) or per sequence [B]. Detached here.
        ref_hidden: instead, the reference's hidden states, shaped like hidden up to H; scored in
            this call,
            tile for tile as the policy's, so that equal models give a log-ratio of exactly 0.
        ref_weight, ref_bias: the reference's head; the policy's own, bias included, if neither is
            given. A ref_weight alone is a head without bias.
        cu_seqlens: [B + 1] int, start of each packed sequence and the total, as FlashAttention
            takes it.
        shift: labels are as Hugging Face gives them, labels[t] being token t: they are shifted
            here.
        num_items: denominator of the mean over pairs, for accumulation over micro-batches: the
            pairs of the
            whole optimizer step. P if not given.
        num_tokens: likewise for a loss with an added cross-entropy: chosen tokens of the whole
            step.
        bias, softcap, logit_scale, temperature, ignore_index, memory_budget, backend: as in
            linear_logprobs.
        num_scored: the scored tokens of each sequence, B numbers, if the caller knows them. On a
            GPU they are what a call waits for; with them, wrong labels are asserted on the device.
        inputs: further tensors [P], as the loss declares them. Detached here.

    Returns:
        A LossOutput. Only its ``loss`` is differentiable.

    Raises:
        TypeError, ValueError: for a wrong argument, before any large allocation, naming it.
    """
    if not isinstance(loss, PairLoss):
        raise checks.bad_type("loss", "a pair loss, such as fusedpo.losses.DPO()", repr(loss))
    head = Head(weight, bias, softcap, logit_scale)
    head.check(hidden)
    labels = checks.label_tensor(
        labels, hidden, ignore_index, unshifted="pass shift=True with both at full length"
    )
    borders, faults = _borders(labels, cu_seqlens)
    faults.append(label_fault(labels, weight.shape[0], ignore_index))
    if shift:
        labels = _shifted(labels, borders, ignore_index)
    faults += temperature_faults(temperature, labels, ignore_index)
    counts: list[int] | None = None
    if tracing():
        assert_on_device(faults)
        rows = Rows.all_of(labels, ignore_index)
        sequences = _traced_sequences(rows, borders)
        pairs = _pairs([1] * sequences.count)
    else:
        backend = resolve(backend, hidden)
        counts = count_scored(labels, ignore_index, faults, borders=borders, num_scored=num_scored)
        pairs = _pairs(counts)
        rows = Rows.of(labels, ignore_index, sum(counts))
        sequences = _sequences(rows, borders, counts)
    per_pair = _check_inputs(loss, inputs, pairs, hidden)
    denominator = _denominator("num_items", num_items, pairs)
    nll_denominator = _nll_denominator(
        loss,
        num_items,
        num_tokens,
        sequences.lengths[:pairs].sum() if counts is None else sum(counts[:pairs]),
    )
    reference = _check_reference(
        loss, hidden, head, labels, sequences, ref_logprobs, ref_hidden, ref_weight, ref_bias
    )

    planned: Plan | None = None
    if counts is not None:
        planned = plan_for(
            hidden,
            head,
            rows,
            memory_budget,
            scope=loss.scope,
            groups=pairs,
            backend=backend,
            reordered=pairs > 1 and loss.scope == "pair",
        )
        if planned.route == "one_pass" and pairs > 1:
            # a pair's rows side by side, so that its gradient is known as early as can be
            by_pair = sequences.index % pairs * 2 + sequences.index // pairs
            order = torch.argsort(by_pair, stable=True)
            rows, index = rows.reorder(order), sequences.index[order]
            sequences = _laid_out(index, counts, sequences.lengths, side_by_side=True)

    # a graph that is traced has the formula itself, for the compiler to fuse
    by_kernel = backend == "triton" and counts is not None and not per_pair
    tail = loss.tail if by_kernel else None
    ref_logp = _reference_scores(
        reference,
        rows,
        sequences,
        temperature,
        memory_budget,
        planned,
        backend,
        by_kernel=tail is not None,
    )
    problem = _PairProblem(
        loss=loss,
        sequences=sequences,
        pairs=pairs,
        inputs=per_pair,
        ref_logp=ref_logp,
        denominator=denominator,
        nll_denominator=nll_denominator,
        tail=tail,
    )
    groups = None
    if planned is not None and counts is not None and planned.route == "one_pass":
        groups = _PairGroups(problem, counts)
    logprob = score(
        hidden,
        head,
        rows,
        temperature=temperature,
        memory_budget=memory_budget if planned is None else planned,
        groups=groups,
        backend=backend,
    ).logprob
    assert logprob is not None, "score() returns the log-probability by default"
    total, per_example, scores = problem.evaluate(logprob)
    return LossOutput(
        loss=total,
        per_example=per_example,
        metrics=problem.metrics(logprob.detach(), scores),
        logprobs=rows.scatter(logprob.detach()),
    )


class FusedLoss(torch.nn.Module):
    """``preference_loss`` as a module: the loss and its options are set once.

    Args:
        loss: one of ``fusedpo.losses``.
        options: keyword arguments of preference_loss, passed on at every call; a call's own win.
    """

    def __init__(self, loss: Loss, **options: Any) -> None:
        super().__init__()
        if not isinstance(loss, Loss):
            raise checks.bad_type("loss", "a loss, such as fusedpo.losses.DPO()", repr(loss))
        known = [
            name
            for name, p in inspect.signature(preference_loss).parameters.items()
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
        """As preference_loss."""
        return preference_loss(self.loss, hidden, weight, labels, **{**self.options, **arguments})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.loss), *(f"{k}={v!r}" for k, v in self.options.items())])


class _Tail(torch.autograd.Function):
    """The losses [P] and scores [B] of the tail kernel, with the gradient that came with them.

    The losses are differentiable as their sum is: by one number for all, since the kernel has added
    up the gradient of the sum. The scores are not.
    """

    @staticmethod
    def forward(ctx: Any, logprob: Tensor, tail: Tail, problem: _PairProblem) -> tuple[Tensor, ...]:
        # Triton is not there on every platform
        import fusedpo.kernels.tail as kernel

        sequences = problem.sequences
        losses, scores, gradient = kernel.tail(
            logprob,
            sequences.starts,
            sequences.lengths,
            reference=problem.ref_logp,
            **asdict(tail),
        )
        ctx.save_for_backward(gradient)
        total = losses.sum()
        ctx.mark_non_differentiable(losses, scores)
        return total, losses, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


@dataclass(frozen=True)
class _PairProblem:
    """A loss on the scored tokens of some pairs, as a function of their log-probabilities."""

    loss: PairLoss
    sequences: Sequences
    pairs: int
    inputs: dict[str, Tensor]  # [P] each
    ref_logp: Tensor | None  # [B]
    denominator: float | Tensor
    nll_denominator: float | Tensor
    tail: Tail | None  # for the kernel; None: the formula in PyTorch

    def scores(self, logprob: Tensor) -> Scores:
        """[B], from log-probabilities [N]."""
        return Scores(self.sequences.sum(logprob), self.sequences.lengths.double(), self.ref_logp)

    def evaluate(self, logprob: Tensor) -> tuple[Tensor, Tensor, Scores]:
        """The loss (scalar), the loss of each pair [P] and the scores [B]."""
        if self.tail is None:
            scores = self.scores(logprob)
            per_example = self.loss.per_example(
                scores[: self.pairs], scores[self.pairs :], **self.inputs
            )
            total = per_example.sum()
        else:
            total, per_example, score = _Tail.apply(  # type: ignore[no-untyped-call]
                logprob, self.tail, self
            )
            scores = self.scores_of(score, self.tail)
        total = total / self.denominator
        if self.loss.nll_weight:
            chosen_logp = self.sequences.sum(logprob)[: self.pairs]
            total = total - self.loss.nll_weight * chosen_logp.sum() / self.nll_denominator
        return total.to(logprob.dtype), per_example.detach().to(logprob.dtype), scores

    def scores_of(self, score: Tensor, tail: Tail) -> Scores:
        """[B], from what the tail kernel has summed."""
        length = self.sequences.lengths.double()
        logp = score * length if tail.aggregate == "mean" else score
        return Scores(
            logp if self.ref_logp is None else logp + self.ref_logp, length, self.ref_logp
        )

    def metrics(self, logprob: Tensor, scores: Scores) -> dict[str, Tensor]:
        with torch.no_grad():
            chosen, rejected = scores[: self.pairs], scores[self.pairs :]
            chosen_reward, rejected_reward = self.loss.reward(chosen), self.loss.reward(rejected)
            found = {
                "rewards/chosen": chosen_reward.mean(),
                "rewards/rejected": rejected_reward.mean(),
                "rewards/margins": (chosen_reward - rejected_reward).mean(),
                "rewards/accuracies": (chosen_reward > rejected_reward).double().mean(),
                "logps/chosen": self.loss.logged_logp(chosen).mean(),
                "logps/rejected": self.loss.logged_logp(rejected).mean(),
            }
            if self.loss.nll_weight:
                found["nll_loss"] = -chosen.logp.sum() / chosen.length.sum()
            return {name: value.to(logprob.dtype) for name, value in found.items()}


class _PairGroups:
    """Pairs as the groups of ``one_pass``: each a run of rows, chosen then rejected."""

    def __init__(self, problem: _PairProblem, counts: list[int]) -> None:
        self.problem = problem
        sequences, pairs = problem.sequences, problem.pairs
        rows_of_pair = [a + b for a, b in zip(counts[:pairs], counts[pairs:], strict=True)]
        self.starts: Sequence[int] = [0, *accumulate(rows_of_pair)]
        sign = torch.where(sequences.index < pairs, 1.0, -1.0)
        self.unit = sign / sequences.lengths[sequences.index] if problem.loss.averages else sign

    def units(self, start: int, stop: int) -> Tensor:
        return self.unit[start:stop]

    def gradient(self, first: int, last: int, logprob: Tensor) -> Tensor:
        problem = self.problem
        rows = slice(self.starts[first], self.starts[last])
        index = problem.sequences.index[rows]
        some = last - first
        # chosen first .. last become sequences 0 .. some, the rejected ones some .. 2 some
        local = index % problem.pairs - first + torch.where(index < problem.pairs, 0, some)
        which = torch.arange(first, last, device=index.device)
        which = torch.cat((which, which + problem.pairs))
        part = replace(
            problem,
            sequences=Sequences(
                local,
                problem.sequences.lengths[which],
                problem.sequences.starts[which] - rows.start,
            ),
            pairs=some,
            inputs={name: value[first:last] for name, value in problem.inputs.items()},
            ref_logp=None if problem.ref_logp is None else problem.ref_logp[which],
        )
        with torch.enable_grad():
            leaf = logprob.detach().requires_grad_()
            return torch.autograd.grad(part.evaluate(leaf)[0], leaf)[0]


def _check_inputs(
    loss: Loss, inputs: dict[str, Tensor], pairs: int, hidden: Tensor
) -> dict[str, Tensor]:
    """The loss's further inputs, each [P], detached."""
    for name in inputs:
        if name not in loss.inputs:
            parameters = inspect.signature(preference_loss).parameters.values()
            named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
            argument = f"argument of preference_loss with {type(loss).__name__}"
            raise TypeError(str(checks.bad_choice(argument, name, (*named, *loss.inputs))))
    for name in loss.inputs:
        if name not in inputs:
            raise checks.bad_type(name, f"a tensor [{pairs}] for {type(loss).__name__}", "nothing")
        value = checks.floating(name, inputs[name])
        checks.shaped(name, value, (pairs,), "one number a pair,")
        checks.same_device(hidden=hidden, **{name: value})
    return {name: value.detach() for name, value in inputs.items()}


def _borders(labels: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, list[Fault]]:
    """[B + 1] int64, where each sequence starts among the flattened positions; and what of it is
    still to be looked at."""
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise checks.bad_value(
                "labels",
                "[B, T], or packed [N] with cu_seqlens",
                str(list(labels.shape)),
                "pass cu_seqlens [B + 1]",
            )
        return torch.arange(labels.shape[0] + 1, device=labels.device) * labels.shape[1], []
    cu_seqlens = checks.is_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in checks.LABELS:
        raise checks.bad_type("cu_seqlens", "int32 or int64 [B + 1]", str(cu_seqlens.dtype))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise checks.bad_value("cu_seqlens", "[B + 1]", str(list(cu_seqlens.shape)))
    if labels.dim() != 1 and not (labels.dim() == 2 and labels.shape[0] == 1):
        raise checks.bad_value("labels", "[N] or [1, N] with cu_seqlens", str(list(labels.shape)))
    borders = to_device(cu_seqlens.long(), labels.device)
    return borders, [border_fault(borders, labels.numel())]


def _shifted(labels: Tensor, borders: Tensor, ignore_index: int) -> Tensor:
    """labels[t] <- labels[t + 1] within each sequence; nothing follows its last token."""
    flat = labels.reshape(-1)
    shifted = torch.full_like(flat, ignore_index)
    shifted[:-1] = flat[1:]
    if flat.numel():
        # without a fault the borders rise; with one, an error follows
        shifted[(borders[1:] - 1).clamp(0, flat.shape[0] - 1)] = ignore_index
    return shifted.view(labels.shape)


def _sequences(rows: Rows, borders: Tensor, counts: list[int]) -> Sequences:
    positions = rows.positions
    if positions is None:
        positions = torch.arange(rows.count, device=borders.device)
    index = torch.searchsorted(borders[1:].contiguous(), positions, right=True)
    return _laid_out(index, counts, to_device(torch.tensor(counts), borders.device))


def _traced_sequences(rows: Rows, borders: Tensor) -> Sequences:
    """Sequences of all positions, scored or not; what is not scored counts 0 in every sum."""
    assert rows.scored is not None, "these rows are every position"
    positions = torch.arange(rows.targets.shape[0], device=borders.device)
    index = torch.searchsorted(borders[1:].contiguous(), positions, right=True)
    # borders that end too early are a fault, but are not to be an index out of range
    index = index.clamp(max=borders.shape[0] - 2)
    none = torch.zeros_like(borders[:-1])
    lengths = none.index_add(0, index, rows.scored.long())
    torch._assert_async(
        (lengths > 0).all(), "labels: expected at least one scored token in every sequence"
    )
    return Sequences(index, lengths, borders[:-1])


def _laid_out(
    index: Tensor, counts: list[int], lengths: Tensor, *, side_by_side: bool = False
) -> Sequences:
    """Sequences one after the other; or each chosen one followed by its rejected one."""
    order = list(range(len(counts)))
    if side_by_side:
        pairs = len(counts) // 2
        order = [i for p in range(pairs) for i in (p, p + pairs)]
    starts = [0] * len(counts)
    for before, i in zip(accumulate((counts[i] for i in order), initial=0), order, strict=False):
        starts[i] = before
    return Sequences(index, lengths, to_device(torch.tensor(starts), index.device))


def _pairs(counts: list[int]) -> int:
    count = len(counts)
    if count == 0 or count % 2:
        raise checks.bad_value(
            "labels",
            "an even number of sequences above 0, the chosen half first, then the rejected half",
            f"{count} sequence{'s' * (count != 1)}",
        )
    empty = [i for i, n in enumerate(counts) if n == 0]
    if empty:
        raise checks.bad_value(
            "labels",
            "at least one scored token in every sequence",
            f"none in sequence{'s' * (len(empty) > 1)} {', '.join(map(str, empty[:8]))}",
            "drop the pair; truncation may have cut its response away",
        )
    return count // 2


def _denominator(
    argument: str, value: int | float | Tensor | None, default: int | Tensor
) -> float | Tensor:
    if value is None:
        return default
    if isinstance(value, Tensor):
        checks.shaped(argument, value, (), "a number or a tensor of shape")
        # elsewhere reading it would wait for the device
        if value.device.type == "cpu" and not tracing():
            checks.positive(argument, value.item())
        return value.detach().double()
    return checks.positive(argument, value)


def _nll_denominator(
    loss: Loss,
    num_items: int | float | Tensor | None,
    num_tokens: int | float | Tensor | None,
    chosen_tokens: int | Tensor,
) -> float | Tensor:
    if num_tokens is not None and not loss.nll_weight:
        raise checks.bad_value(
            "num_tokens", "a loss with an added cross-entropy", repr(loss), "leave num_tokens out"
        )
    if loss.nll_weight and num_items is not None and num_tokens is None:
        raise checks.bad_value(
            "num_tokens",
            "the chosen tokens of the whole step, to go with num_items",
            "None",
            "the cross-entropy is a mean over tokens, not over pairs",
        )
    return _denominator("num_tokens", num_tokens, chosen_tokens if loss.nll_weight else 1)


@dataclass(frozen=True)
class _Reference:
    """What the reference was given as: one of the two is set, or none."""

    logprobs: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None


def _check_reference(
    loss: Loss,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sequences: Sequences,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> _Reference:
    name = type(loss).__name__
    given = [
        argument
        for argument, value in (
            ("ref_logprobs", ref_logprobs),
            ("ref_hidden", ref_hidden),
            ("ref_weight", ref_weight),
            ("ref_bias", ref_bias),
        )
        if value is not None
    ]
    if not loss.needs_reference:
        if given:
            raise checks.bad_value(
                given[0], f"None, as {name} has no reference", "a tensor", "leave it out"
            )
        return _Reference()
    if (ref_logprobs is None) == (ref_hidden is None):
        got = "both" if ref_logprobs is not None else "neither"
        raise checks.bad_value(
            "ref_logprobs", f"a reference for {name}: either ref_logprobs or ref_hidden", got
        )
    if ref_logprobs is not None:
        if len(given) > 1:
            raise checks.bad_value(
                given[1], "None beside ref_logprobs", "a tensor", "it would have no effect"
            )
        ref_logprobs = checks.floating("ref_logprobs", ref_logprobs)
        checks.same_device(hidden=hidden, ref_logprobs=ref_logprobs)
        if ref_logprobs.shape not in (labels.shape, (sequences.count,)):
            raise checks.bad_value(
                "ref_logprobs",
                f"per token {list(labels.shape)} or per sequence [{sequences.count}]",
                str(list(ref_logprobs.shape)),
            )
        return _Reference(logprobs=ref_logprobs.detach())
    assert ref_hidden is not None, "one of the two was given"
    if ref_weight is None and ref_bias is not None:
        raise checks.bad_value(
            "ref_bias", "None without ref_weight", "a tensor", "pass ref_weight too"
        )
    if ref_weight is None:
        ref_head = replace(
            head,
            weight=head.weight.detach(),
            bias=None if head.bias is None else head.bias.detach(),
        )
    else:
        checks.is_tensor("ref_weight", ref_weight)
        if ref_bias is not None:
            checks.is_tensor("ref_bias", ref_bias)
        ref_head = replace(
            head, weight=ref_weight.detach(), bias=None if ref_bias is None else ref_bias.detach()
        )
    ref_head.check(ref_hidden, prefix="ref_")
    checks.shaped(
        "ref_hidden", ref_hidden[..., 0], labels.shape, "the shape of hidden without its last axis"
    )
    checks.same_device(hidden=hidden, ref_hidden=ref_hidden)
    if ref_head.weight.shape[0] < head.weight.shape[0]:
        raise checks.bad_value(
            "ref_weight",
            f"a vocabulary of at least {head.weight.shape[0]}, the policy's",
            str(ref_head.weight.shape[0]),
        )
    return _Reference(hidden=ref_hidden.detach(), head=ref_head)


def _reference_scores(
    reference: _Reference,
    rows: Rows,
    sequences: Sequences,
    temperature: float | Tensor,
    memory_budget: int | float | str | Plan | None,
    policy_plan: Plan | None,
    backend: str,
    by_kernel: bool,
) -> Tensor | None:
    """[B], the reference's log-probability of each sequence; None without a reference.

    by_kernel: summed as the tail kernel does.
    """
    total = sequences.sum_by_kernel if by_kernel else sequences.sum
    if reference.logprobs is not None:
        wide = reference.logprobs.double()
        return wide if wide.shape == (sequences.count,) else total(rows.gather(wide))
    if reference.hidden is None or reference.head is None:
        return None
    hidden, head = reference.hidden, reference.head
    with torch.no_grad():
        own = memory_budget
        if policy_plan is not None:
            if (*head.weight.shape, hidden.dtype) == (
                policy_plan.vocab,
                policy_plan.hidden,
                policy_plan.dtype,
            ):
                # the policy's own tiles: equal models then agree to the last bit
                own = replace(policy_plan, route="forward")
            elif isinstance(memory_budget, Plan):
                own = policy_plan.budget
        logprob = score(
            hidden, head, rows, temperature=temperature, memory_budget=own, backend=backend
        ).logprob
        assert logprob is not None, "score() returns the log-probability by default"
        return total(logprob)
