"""The two forms of the public functions' arguments: whole records, and loose keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedpo
from fusedpo import (
    FusedLoss,
    Head,
    LossOutput,
    Reference,
    TokenStats,
    linear_logprobs,
    linear_token_stats,
    losses,
    policy_loss,
    preference_loss,
)

VOCAB, WIDTH, ROWS, LENGTH = 37, 8, 4, 7
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 0.25])
LOOSE = {"softcap": 3.0, "logit_scale": 0.5}

Call = Callable[..., LossOutput]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB, (ROWS, LENGTH), generator=g)
    labels[:, 0] = -100
    return {
        "hidden": torch.randn(ROWS, LENGTH, WIDTH, generator=g),
        "weight": torch.randn(VOCAB, WIDTH, generator=g),
        "bias": torch.randn(VOCAB, generator=g),
        "labels": labels,
        "ref_hidden": torch.randn(ROWS, LENGTH, WIDTH + 1, generator=g),
        "ref_weight": torch.randn(VOCAB, WIDTH + 1, generator=g),
        "ref_bias": torch.randn(VOCAB, generator=g),
        "ref_logprobs": -torch.rand(ROWS, LENGTH, generator=g),
    }


def of_pairs(loss: losses.Loss = losses.DPO()) -> Call:  # noqa: B008
    return lambda *args, **options: preference_loss(loss, *args, **options)


def of_samples(loss: losses.Loss = losses.GRPO(kl_weight=0.1)) -> Call:  # noqa: B008
    return lambda *args, **options: policy_loss(loss, *args, advantages=ADVANTAGES, **options)


def of_module(loss: losses.Loss = losses.DPO()) -> Call:  # noqa: B008
    return lambda *args, **options: FusedLoss(loss, **options)(*args)


LOSSES = {"preference_loss": of_pairs, "policy_loss": of_samples, "FusedLoss": of_module}
of_every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=list(LOSSES))


def bits(result: LossOutput | TokenStats | Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    """All numbers of a result, and the gradients of the leaves."""
    if isinstance(result, Tensor):
        numbers, total = [result], result.sum()
    elif isinstance(result, TokenStats):
        numbers = [value for value in result if value is not None]
        total = result.logprob.sum() + result.entropy.sum()
    else:
        numbers = [result.loss, result.per_example, result.logprobs, *result.metrics.values()]
        total = result.loss
    return [t.detach() for t in (*numbers, *torch.autograd.grad(total, list(leaves.values())))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def both(call: Callable[..., Any], loose: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether a call with a Head is that with loose arguments, bit for bit.

    Args:
        loose, whole: further keywords of the two.
    """
    t = tensors()
    leaves = {name: t[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    hidden, weight, bias = leaves.values()
    of_loose = call(hidden, weight, t["labels"], bias=bias, **LOOSE, **loose)
    of_whole = call(hidden, Head(weight, bias, **LOOSE), t["labels"], **whole)
    return same(bits(of_whole, leaves), bits(of_loose, leaves))


# heads


@pytest.mark.parametrize("function", [linear_logprobs, linear_token_stats])
def test_a_head_scores_as_its_parts(function: Callable[..., Any], backend: str) -> None:
    options = {"temperature": 0.7, "backend": backend}
    assert both(function, options, options)


@of_every_loss
def test_a_head_in_a_loss_is_its_parts(make: Callable[[], Call], backend: str) -> None:
    options = {"ref_logprobs": tensors()["ref_logprobs"], "backend": backend}
    assert both(make(), options, options)


PARTS = {"bias": torch.zeros(VOCAB), "softcap": 2.0, "logit_scale": 2.0, "vocab_group": object()}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("function", [linear_logprobs, linear_token_stats, *LOSSES.values()])
def test_a_part_beside_a_head_is_refused(function: Callable[..., Any], name: str) -> None:
    t = tensors()
    call = function() if function in LOSSES.values() else function
    with pytest.raises(ValueError, match=rf"^{name}: expected its default.*Head\(weight, {name}="):
        call(t["hidden"], Head(t["weight"]), t["labels"], **{name: PARTS[name]})


def test_a_default_beside_a_head_is_none() -> None:
    t = tensors()
    defaults = {"bias": None, "softcap": None, "logit_scale": 1, "vocab_group": None}
    whole = linear_logprobs(t["hidden"], Head(t["weight"], **LOOSE), t["labels"], **defaults)
    assert torch.equal(whole, linear_logprobs(t["hidden"], t["weight"], t["labels"], **LOOSE))


def test_a_faulty_head_is_named() -> None:
    t = tensors()
    with pytest.raises(ValueError, match=r"^softcap: expected a number above 0"):
        linear_logprobs(t["hidden"], Head(t["weight"], softcap=-1.0), t["labels"])


# references


def forms() -> dict[str, tuple[dict[str, Any], Any]]:
    """Loose arguments of a reference, and the same in one."""
    t = tensors()
    states = {"ref_hidden": t["ref_hidden"], "ref_weight": t["ref_weight"]}
    head = Head(t["ref_weight"], **LOOSE)
    logprobs, own = t["ref_logprobs"], tensors(1)["hidden"]
    biased = Head(t["ref_weight"], t["ref_bias"], **LOOSE)
    return {
        "tensor": ({"ref_logprobs": logprobs}, logprobs),
        "logprobs": ({"ref_logprobs": logprobs}, Reference(logprobs)),
        "states": ({"ref_hidden": own}, Reference(hidden=own)),
        "head": (states, Reference(hidden=t["ref_hidden"], head=head)),
        "bias": (
            {**states, "ref_bias": t["ref_bias"]},
            Reference(hidden=t["ref_hidden"], head=biased),
        ),
    }


@of_every_loss
@pytest.mark.parametrize("form", forms())
def test_a_reference_is_its_loose_arguments(
    make: Callable[[], Call], form: str, backend: str
) -> None:
    loose, whole = forms()[form]
    options = {"temperature": 0.7, "backend": backend}
    assert both(make(), {**loose, **options}, {"reference": whole, **options})


def test_a_reference_per_sequence_is_its_loose_argument() -> None:
    sums = tensors()["ref_logprobs"].double().sum(1)
    for whole in (sums, Reference(sums)):
        assert both(of_pairs(), {"ref_logprobs": sums}, {"reference": whole})


def test_the_head_of_a_reference_keeps_its_own_options() -> None:
    """Other ones than the policy's, which loose arguments cannot say."""
    t = tensors()
    head = Head(t["ref_weight"], t["ref_bias"], softcap=2.0, logit_scale=3.0)
    logprobs = linear_logprobs(t["ref_hidden"], head, t["labels"], temperature=0.7)
    call = of_pairs()
    options = {"temperature": 0.7, **LOOSE}
    arguments = t["hidden"], t["weight"], t["labels"]
    scored = call(*arguments, reference=Reference(hidden=t["ref_hidden"], head=head), **options)
    expected = call(*arguments, ref_logprobs=logprobs, **options)
    assert torch.equal(scored.per_example, expected.per_example)


def test_no_gradient_goes_into_a_reference() -> None:
    t = tensors()
    leaves = [t[name].requires_grad_() for name in ("ref_hidden", "ref_weight", "ref_bias")]
    reference = Reference(hidden=leaves[0], head=Head(*leaves[1:]))
    hidden = t["hidden"].requires_grad_()
    of_pairs()(hidden, t["weight"], t["labels"], reference=reference).loss.backward()
    assert hidden.grad is not None and all(leaf.grad is None for leaf in leaves)


@of_every_loss
@pytest.mark.parametrize("name", ["ref_logprobs", "ref_hidden", "ref_weight", "ref_bias"])
def test_two_forms_of_a_reference_are_refused(make: Callable[[], Call], name: str) -> None:
    t = tensors()
    with pytest.raises(ValueError, match=f"^{name}: expected None beside reference"):
        make()(
            t["hidden"],
            t["weight"],
            t["labels"],
            reference=Reference(t["ref_logprobs"]),
            **{name: t[name]},
        )


def faulty() -> list[tuple[Any, type[Exception], str]]:
    t = tensors()
    logprobs, states = t["ref_logprobs"], t["ref_hidden"]
    head = Head(t["ref_weight"])
    small = Head(t["ref_weight"][1:])
    return [
        ("policy", TypeError, "^reference: expected log-probabilities.*got str"),
        (head, TypeError, "^reference: .*got Head"),
        (Reference(), ValueError, "^reference: .*got neither"),
        (Reference(logprobs, states), ValueError, "^reference: .*got both"),
        (Reference(logprobs, head=head), ValueError, "^reference.head: expected None"),
        (Reference(hidden=states, head=t["ref_weight"]), TypeError, "^reference.head: .*Head"),
        (Reference(logprobs.long()), TypeError, "^reference.logprobs: expected one of"),
        (logprobs.long(), TypeError, "^reference: expected one of"),
        (logprobs[:, 1:], ValueError, "^reference: expected per token"),
        (Reference(logprobs[:, 1:]), ValueError, "^reference.logprobs: expected per token"),
        (Reference(hidden=states), ValueError, "^reference.hidden: expected"),
        (Reference(hidden=states[:1], head=head), ValueError, "^reference.hidden: expected the"),
        (Reference(hidden=states, head=small), ValueError, "^reference.weight: expected a voc"),
    ]


@pytest.mark.parametrize("which", range(len(faulty())))
def test_a_faulty_reference_is_named(which: int) -> None:
    reference, error, message = faulty()[which]
    t = tensors()
    for call in (of_pairs(), of_samples()):
        with pytest.raises(error, match=message):
            call(t["hidden"], t["weight"], t["labels"], reference=reference)


def test_a_reference_is_refused_by_a_loss_without_one() -> None:
    t = tensors()
    for call in (of_pairs(losses.SimPO()), of_samples(losses.GRPO())):
        with pytest.raises(ValueError, match=r"^reference: expected None, as .* has no reference"):
            call(t["hidden"], t["weight"], t["labels"], reference=t["ref_logprobs"])


def test_a_policy_loss_takes_no_reference_per_sequence() -> None:
    t = tensors()
    sums = t["ref_logprobs"].sum(1)
    with pytest.raises(ValueError, match=r"^reference: expected per token \[4, 7\], got \[4\]"):
        of_samples()(t["hidden"], t["weight"], t["labels"], reference=sums)


# planned once, and the backend resolved once


@pytest.mark.parametrize("form", forms())
def test_a_call_plans_each_scored_head_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"plan_for": 0, "resolve": 0}

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        return counted

    objective = fusedpo.objective
    for module, name in (
        (objective.run, "plan_for"),
        (objective.scoring, "plan_for"),
        (objective.layout, "resolve"),
        (fusedpo.engine.batch, "resolve"),
    ):
        monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    t = tensors()
    of_samples()(t["hidden"], t["weight"], t["labels"], **LOOSE, reference=forms()[form][1])
    scored = 1 if form in ("tensor", "logprobs") else 2
    assert calls == {"plan_for": scored, "resolve": scored}


@pytest.mark.compiled
def test_records_are_traced() -> None:
    t = tensors()
    hidden = t["hidden"].requires_grad_()

    def call(head: Head, reference: Reference) -> Tensor:
        return preference_loss(losses.DPO(), hidden, head, t["labels"], reference=reference).loss

    head = Head(t["weight"], t["bias"], **LOOSE)
    reference = Reference(hidden=t["ref_hidden"], head=Head(t["ref_weight"], softcap=2.0))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, found = call(head, reference), compiled(head, reference)
    assert torch.equal(expected, found)


# an entropy that is only looked at


def test_an_entropy_without_a_gradient_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors()
    hidden, weight = t["hidden"].requires_grad_(), t["weight"].requires_grad_()
    plans = []
    plan_for = fusedpo.objective.scoring.plan_for

    def noted(*args: Any, **options: Any) -> Any:
        plans.append(plan_for(*args, **options))
        return plans[-1]

    monkeypatch.setattr(fusedpo.objective.scoring, "plan_for", noted)
    alone = linear_token_stats(hidden, weight, t["labels"], stats=("logprob",))
    beside = linear_token_stats(hidden, weight, t["labels"], differentiable=("logprob",))
    both = linear_token_stats(hidden, weight, t["labels"])
    assert [each.products for each in plans] == [3, 3, 5]
    assert alone.logprob is not None and beside.logprob is not None
    assert beside.entropy is not None and both.entropy is not None
    assert not beside.entropy.requires_grad and both.entropy.requires_grad
    assert torch.equal(beside.logprob, alone.logprob)
    assert torch.equal(beside.entropy, both.entropy)
    gradients = [
        torch.autograd.grad(each.logprob.sum(), (hidden, weight)) for each in (alone, beside)
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"differentiable: expected .*, got 'logsumexp'"):
        linear_token_stats(hidden, weight, t["labels"], differentiable=("logsumexp",))
