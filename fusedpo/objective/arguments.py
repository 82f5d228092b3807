"""The arguments of a loss: further inputs, advantages, importance weights and denominators.

Letters: B sequences, P examples, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.checks import tracing
from fusedpo.losses import Input, Loss, PolicyLoss, PreferenceLoss
from fusedpo.objective.layout import Layout

Count = int | float | Tensor | None
"""A denominator as a public function is called with it."""


@dataclass(frozen=True)
class PreferenceArguments:
    """The arguments of a preference loss, checked.

    Attributes:
        examples: P.
        inputs: the loss's own, [P] or as they are.
        denominator: of the sum over examples.
        nll_denominator: of the sum over chosen tokens.
    """

    loss: PreferenceLoss
    examples: int
    inputs: Mapping[str, Tensor]
    denominator: float | Tensor
    nll_denominator: float | Tensor

    @classmethod
    def of(
        cls,
        loss: PreferenceLoss,
        layout: Layout,
        inputs: Mapping[str, Tensor | float],
        num_items: Count,
        num_tokens: Count,
    ) -> PreferenceArguments:
        """The arguments of a call."""
        examples = _count_examples(loss, layout)
        return cls(
            loss,
            examples,
            _check_inputs(loss, inputs, examples, layout.device),
            _denominator("num_items", num_items, examples, layout.device),
            _nll_denominator(loss, num_items, num_tokens, layout, examples),
        )


def _count_examples(loss: PreferenceLoss, layout: Layout) -> int:
    """P, from the number of sequences and the loss's roles."""
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
    loss: Loss, inputs: Mapping[str, Tensor | float], examples: int, device: torch.device
) -> dict[str, Tensor]:
    """The loss's further inputs, detached, with their defaults."""
    values: dict[str, Tensor] = {}
    for name, about in loss.inputs.items():
        shape = f"a tensor [{examples}]" if about.per == "example" else "a number or a tensor"
        value = inputs.get(name, about.default)
        if value is None:
            raise checks.bad_type(
                name, f"{shape} for {type(loss).__name__}", "nothing", f"pass {name}=..."
            )
        if isinstance(value, Real):
            value = torch.full((), float(value), dtype=torch.float64, device=device)
            values[name] = value.expand(examples) if about.per == "example" else value
        else:
            value = checks.is_tensor(name, value).detach()
            if value.is_complex():
                raise checks.bad_type(name, "real numbers", str(value.dtype))
            if about.per == "example":
                checks.shaped(name, value, (examples,), "one number a pair,")
            elif not value.numel():
                raise checks.bad_value(name, "at least one number", str(list(value.shape)))
            checks.same_device(hidden=device, **{name: value})
            values[name] = value.double()
        _check_range(name, values[name], about)
    return values


def _check_range(name: str, value: Tensor, about: Input) -> None:
    """Raise for a number out of range, where reading it does not wait for a device."""
    if value.device.type != "cpu" or tracing():
        return
    wrong = ~((value >= about.low) & (value <= about.high))
    expected = f"numbers in [{about.low:g}, {about.high:g}]"
    if about.binary:
        wrong, expected = (value != 0) & (value != 1), "0 or 1"
    if bool(wrong.any()):
        first = float(value.reshape(-1)[wrong.reshape(-1)][0])
        raise checks.bad_value(name, expected, f"{first:g}")


@dataclass(frozen=True)
class PolicyArguments:
    """The arguments of a policy loss, checked; every tensor is [N] fp64.

    Attributes:
        advantage: of each token.
        weight: of the token's loss in the mean.
        old: log-probability under the policy that sampled; None: under the policy itself.
        correction: factor of the token's loss, or None.
        log_correction: logarithm of its response's, for a loss that has it inside.
        entropy_weight: of each token's entropy, which is subtracted.
    """

    loss: PolicyLoss
    advantage: Tensor
    weight: Tensor
    old: Tensor | None
    correction: Tensor | None
    log_correction: Tensor | None
    entropy_weight: float | Tensor

    @classmethod
    def of(
        cls,
        loss: PolicyLoss,
        layout: Layout,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        importance_weights: Tensor | None,
        num_items: Count,
        num_tokens: Count,
    ) -> PolicyArguments:
        """The arguments of a call."""
        advantage = _of_tokens("advantages", advantages, layout)
        _check_range("advantages", advantage, _FINITE)
        old = None
        if old_logprobs is not None:
            old = _of_tokens("old_logprobs", old_logprobs, layout, per_sequence=False)
        correction = None
        if importance_weights is not None:
            correction = _of_tokens("importance_weights", importance_weights, layout)
            _check_range("importance_weights", correction, replace(_FINITE, low=0.0))
        _check_per_response(loss, layout, advantages, importance_weights)
        log_correction = None
        if correction is not None and loss.absorbs_correction:
            sequences = layout.sequences
            log_correction = loss.log_correction(correction)
            assert importance_weights is not None, "the correction comes from it"
            if importance_weights.shape != (sequences.count,):
                log_correction = sequences.sum(log_correction)[sequences.index]
            correction = None
        items, tokens = _policy_denominators(loss, layout, num_items, num_tokens)
        return cls(
            loss,
            advantage,
            _mean_weight(loss, layout, tokens if loss.aggregation == "token_mean" else items),
            old,
            correction,
            log_correction,
            loss.entropy_bonus / tokens if loss.entropy_bonus else 0.0,
        )


_LARGEST = torch.finfo(torch.float64).max
_FINITE = Input("any number", low=-_LARGEST, high=_LARGEST)


def _of_tokens(name: str, value: object, layout: Layout, *, per_sequence: bool = True) -> Tensor:
    """[N] fp64 from numbers per sequence [B] or per token, detached."""
    values = checks.floating(name, value)
    count, shape = layout.sequences.count, layout.labels.shape
    checks.same_device(hidden=layout.device, **{name: values})
    if per_sequence and values.shape == (count,):
        return values.detach().double()[layout.sequences.index]
    if values.shape != shape:
        expected = f"per token {list(shape)}"
        if per_sequence:
            expected = f"one number a response [{count}] or " + expected
        raise checks.bad_value(name, expected, str(list(values.shape)))
    return layout.rows.gather(values.detach().double())


def _check_per_response(
    loss: PolicyLoss, layout: Layout, advantages: Tensor, importance_weights: Tensor | None
) -> None:
    """Raise for numbers per token where the loss takes them per response."""
    if loss.formula_structure.scope == "token":
        return
    whole = {"advantages": advantages}
    if importance_weights is not None and not loss.absorbs_correction:
        whole["importance_weights"] = importance_weights
    for name, value in whole.items():
        if value.shape != (layout.sequences.count,):
            raise checks.bad_value(
                name,
                f"one number a response [{layout.sequences.count}] for {type(loss).__name__}",
                str(list(value.shape)),
                "pass one number a response; numbers per token are for losses such as GRPO",
            )


def _policy_denominators(
    loss: PolicyLoss, layout: Layout, num_items: Count, num_tokens: Count
) -> tuple[float | Tensor, float | Tensor]:
    """The responses and the scored tokens that a policy loss and its entropy are means over."""
    per_tokens = loss.aggregation == "token_mean"
    counts, device = layout.counts, layout.device
    items = _denominator("num_items", num_items, layout.sequences.count, device)
    # a mean over no tokens is 0
    scored = layout.sequences.lengths.sum().clamp(min=1) if counts is None else max(1, sum(counts))
    tokens = _denominator("num_tokens", num_tokens, scored, device)
    for name, value, used in (
        ("num_items", num_items, not per_tokens),
        ("num_tokens", num_tokens, per_tokens or bool(loss.entropy_bonus)),
    ):
        if value is not None and not used:
            raise checks.bad_value(
                name,
                f"None, as {loss!r} is a mean over {'tokens' if per_tokens else 'responses'}",
                str(value),
                f"pass {'num_tokens' if per_tokens else 'num_items'}",
            )
    if loss.entropy_bonus and num_items is not None and num_tokens is None:
        raise checks.bad_value(
            "num_tokens",
            "the scored tokens of the whole step, to go with num_items",
            "None",
            "the entropy bonus is a mean over tokens, not over responses: pass it too",
        )
    return items, tokens


def _mean_weight(loss: PolicyLoss, layout: Layout, denominator: float | Tensor) -> Tensor:
    """[N] fp64, the weight of each token's loss in the mean."""
    sequences = layout.sequences
    weight = torch.ones_like(sequences.index, dtype=torch.float64)
    if loss.aggregation == "sequence_mean":
        weight = weight / sequences.lengths[sequences.index]
    if layout.rows.scored is not None:
        weight = torch.where(layout.rows.scored, weight, 0.0)
    return weight / (denominator * loss.divisor)


def _denominator(
    argument: str, value: Count, default: int | Tensor, device: torch.device
) -> float | Tensor:
    """A positive number, of a tensor in fp64; the default for None."""
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
    num_items: Count,
    num_tokens: Count,
    layout: Layout,
    examples: int,
) -> float | Tensor:
    """The chosen tokens that an added cross-entropy is a mean over; 1 without one."""
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
            "the cross-entropy is a mean over tokens, not over pairs: pass it too",
        )
    tokens: int | Tensor
    if layout.counts is None:
        tokens = layout.sequences.lengths[:examples].sum()
    else:
        tokens = sum(layout.counts[:examples])
    return _denominator("num_tokens", num_tokens, tokens, layout.labels.device)
