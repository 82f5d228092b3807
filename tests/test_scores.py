"""Sums over sequences keep the digits that a difference from a reference needs."""

from __future__ import annotations

import pytest
import torch

from fusedpo import preference_loss
from fusedpo.losses import DPO
from fusedpo.scores import Sequences


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


def test_a_reference_in_double_precision_changes_no_dtype() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 4, generator=g), torch.randn(9, 4, generator=g)
    labels = torch.randint(9, (2, 5), generator=g)
    ref = torch.full((2,), -10.0, dtype=torch.float64)
    out = preference_loss(DPO(), hidden, weight, labels, ref_logprobs=ref)
    tensors = (out.loss, out.per_example, out.logprobs, *out.metrics.values())
    assert {t.dtype for t in tensors} == {torch.float32}
