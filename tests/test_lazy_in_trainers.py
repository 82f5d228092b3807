"""What other people's trainers do to lazy logits that was once done wrong, in a few lines each.

Found by ``make test-trainers``, which needs the trainers.
"""

from __future__ import annotations

import ctypes
import sys
import types

import pytest
import tiny
import torch
from torch.utils.checkpoint import checkpoint

from fusedpo.lazy import LogitsNeeded, lazy_logits, operations

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """As verl and OpenRLHF spell it."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def test_entropy_without_a_gradient_of_logits_with_one():
    """For logging, beside a log-probability that is trained: verl, under no_grad."""
    model = tiny.model()
    with torch.no_grad():
        expected = entropy(model(IDS).logits)
    with lazy_logits(model, unknown="raise"):
        logits = model(IDS).logits
        with torch.no_grad():
            found = entropy(logits)
    assert near(found + 0, expected)


def test_a_checkpointed_entropy_says_that_it_makes_logits():
    """The gradient that a reentrant checkpoint asks for is one of logits: verl, with
    entropy_checkpointing."""
    model = tiny.model()
    entropy(model(IDS).logits).sum().backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with lazy_logits(model), pytest.warns(UserWarning, match="needs the real logits"):
        checkpoint(entropy, model(IDS).logits, use_reentrant=True).sum().backward()
    assert near(model.lm_head.weight.grad, expected)
    with lazy_logits(model, unknown="raise"), pytest.raises(LogitsNeeded):
        checkpoint(entropy, model(IDS).logits, use_reentrant=True).sum().backward()


class Kernel(torch.autograd.Function):
    """The loss of a kernel that is given the address of logits, and writes their gradient there."""

    @staticmethod
    def forward(ctx, logits, labels):
        address = logits.data_ptr()
        torch.full(logits.shape, 7.0)  # what was freed would be taken for this
        there = (ctypes.c_float * logits.numel()).from_address(address)
        given = torch.frombuffer(there, dtype=torch.float32).view(logits.shape)
        probs = given.softmax(-1)
        losses = -probs.gather(-1, labels[:, None])[:, 0].log()
        given.copy_(probs - torch.nn.functional.one_hot(labels, given.shape[-1]))
        ctx.save_for_backward(logits)
        return losses

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g[:, None], None


@pytest.mark.parametrize("rows", [slice(None), slice(1, None)])
def test_a_kernel_that_takes_the_address_of_logits(rows):
    """flash_attn's cross-entropy, on a view of logits: verl and OpenRLHF, where it is installed."""
    model, labels = tiny.model(), IDS[:, rows].reshape(-1)

    def loss():
        logits = model(IDS).logits[:, rows]
        return Kernel.apply(logits.reshape(-1, logits.shape[-1]), labels).sum()

    expected = loss()
    expected.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with lazy_logits(model), pytest.warns(UserWarning, match="data_ptr needs the real logits"):
        operations._reported.clear()
        found = loss()
    assert abs(found / expected - 1) <= 1e-6
    found.backward()
    assert (model.lm_head.weight.grad - gradient).norm() <= 1e-5 * gradient.norm()


class KernelOnRealLogits(torch.autograd.Function):
    """In the place of flash-attn's kernel, which needs a GPU."""

    @staticmethod
    def forward(ctx, logits, labels, *options):
        raise AssertionError("it was called")


def cross_entropy_loss(logits, labels, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0):
    """As flash-attn writes it: its function is looked up in its module."""
    module = sys.modules["flash_attn.ops.triton.cross_entropy"]
    return module.CrossEntropyLoss.apply(
        logits, labels, None, label_smoothing, logit_scale, lse_square_scale, -100, False, None
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"logit_scale": 0.5}, {"lse_square_scale": 1e-2}],
    ids=str,
)
def test_the_cross_entropy_of_flash_attention(options, monkeypatch):
    module = types.ModuleType("flash_attn.ops.triton.cross_entropy")
    module.CrossEntropyLoss = KernelOnRealLogits
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model, labels = tiny.model(), IDS.reshape(-1).clone()
    labels[:3] = -100
    logits = model(IDS).logits.reshape(len(labels), -1) * options.get("logit_scale", 1.0)
    expected = torch.nn.functional.cross_entropy(
        logits, labels, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    squares = options.get("lse_square_scale", 0.0) * logits.logsumexp(-1).square()
    squares = squares.masked_fill(labels == -100, 0)
    (expected + squares).sum().backward()
    weight = model.lm_head.weight
    gradient, weight.grad = weight.grad, None
    with lazy_logits(model, unknown="raise"):
        losses, of_squares = cross_entropy_loss(
            model(IDS).logits.reshape(len(labels), -1), labels, **options
        )
    losses.sum().backward()
    assert near(losses, expected + squares) and near(of_squares + 1, squares + 1)
    assert near(weight.grad, gradient)
    with pytest.raises(AssertionError, match="it was called"):
        cross_entropy_loss(logits, labels)
