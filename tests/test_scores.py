"""Sums over sequences keep the digits that a difference from a reference needs."""

from __future__ import annotations

import pytest
import torch
from engine import KERNELS
from oracles import relative

from fusedpo import linear_logprobs, preference_loss
from fusedpo.losses import BCO, DPO, PreferenceLoss
from fusedpo.losses.scores import Scores
from fusedpo.objective.sequences import Sequences


def test_sums_are_kept_in_double_precision() -> None:
    """30,000 tokens of -6 nats: fp32 sums are apart by 0.016, the log-ratio is 0.3."""
    tokens = 30_000
    sequences = Sequences(
        torch.zeros(tokens, dtype=torch.long), torch.tensor([tokens]), torch.tensor([0])
    )
    logprob = torch.full((tokens,), -6.0)
    reference = logprob - 1e-5
    exact = (logprob.double() - reference.double()).sum()
    ratio = sequences.sum(logprob) - sequences.sum(reference)
    assert ratio.item() == pytest.approx(exact.item(), rel=1e-9)


def test_a_loss_of_long_responses_keeps_its_margin() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 20_000, 4, generator=g), torch.randn(40, 4, generator=g)
    labels = torch.randint(40, (2, 20_000), generator=g)
    out = preference_loss(
        DPO(), hidden, weight, labels, ref_hidden=hidden + 1e-4, memory_budget="4MiB"
    )
    log_p = [
        (h.double() @ weight.double().T).log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
        for h in (hidden, hidden + 1e-4)
    ]
    margin = 0.1 * ((log_p[0] - log_p[1])[0] - (log_p[0] - log_p[1])[1])
    assert out.metrics["rewards/margins"].item() == pytest.approx(margin.item(), abs=2e-5)
    assert out.per_example.dtype == out.loss.dtype == torch.float32


@pytest.mark.fault(36)
def test_a_reference_in_double_precision_changes_no_dtype() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 4, generator=g), torch.randn(9, 4, generator=g)
    labels = torch.randint(9, (2, 5), generator=g)
    ref = torch.full((2,), -10.0, dtype=torch.float64)
    out = preference_loss(DPO(), hidden, weight, labels, ref_logprobs=ref)
    tensors = (out.loss, out.per_example, out.logprobs, *out.metrics.values())
    assert {t.dtype for t in tensors} == {torch.float32}


@pytest.mark.fault(33)
@pytest.mark.parametrize("loss", [DPO(), BCO()], ids=repr)
def test_a_formula_without_the_reference_it_compares_with_says_so(loss: PreferenceLoss) -> None:
    side = Scores(torch.tensor([-3.0]), torch.tensor([2.0]))
    with pytest.raises(ValueError) as error:
        loss.per_example(side, side)
    expected = (
        "ref_logprobs: expected a reference, which this loss compares with, got none; pass "
        "ref_logprobs, or ref_hidden and ref_weight"
    )
    assert str(error.value) == expected


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_all_ways_to_sum_agree(order: list[int]) -> None:
    """By index, in order as on a GPU, and by the tail kernel; sequences in any order."""
    lengths = torch.tensor([3, 1, 700, 5])
    starts = torch.empty(4, dtype=torch.long)
    index, at = [], 0
    for b in order:
        starts[b] = at
        at += int(lengths[b])
        index += [b] * int(lengths[b])
    sequences = Sequences(torch.tensor(index), lengths, starts)
    values = torch.randn(at, generator=torch.Generator().manual_seed(0)) * 10
    truth = sequences.sum(values)
    assert relative(sequences._sum_in_order(values.double()), truth) < 1e-15
    if KERNELS:
        assert relative(sequences.sum_by_kernel(values), truth) < 1e-15
    leaf = values.double().requires_grad_()
    (gradient,) = torch.autograd.grad(sequences._sum_in_order(leaf)[2], leaf)
    assert torch.equal(gradient, (sequences.index == 2).double())


def test_a_long_reference_that_equals_its_policy_leaves_nothing(backend: str) -> None:
    """Sums over thousands of tokens, where the order of summation would show."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 1200, 4, generator=g), torch.randn(11, 4, generator=g)
    labels = torch.randint(11, (2, 1200), generator=g)
    tokens = linear_logprobs(hidden, weight, labels, backend=backend)
    for reference in ({"ref_hidden": hidden}, {"ref_logprobs": tokens}):
        out = preference_loss(DPO(), hidden, weight, labels, backend=backend, **reference)
        assert out.metrics["rewards/chosen"] == 0 == out.metrics["rewards/rejected"]
        assert out.loss == torch.tensor(2.0).log()
