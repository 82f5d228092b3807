"""Programs on logits, run twice: on real ones and on lazy ones, with the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedpo.head import Head
from fusedpo.lazy import source
from fusedpo.lazy.install import lazy_output
from fusedpo.lazy.source import Options
from fusedpo.lazy.tensor import LazyTensor

B, T, V, H = 4, 24, 211, 16
ROWS = 64  # the most rows of the vocabulary that may be there at a time


class NoLogits(TorchDispatchMode):
    """Fails where a float tensor of many rows of the vocabulary is made."""

    def __init__(self, vocab: int = V) -> None:
        super().__init__()
        self.vocab = vocab

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if type(t) is not Tensor or not t.is_floating_point() or t.is_meta:
                continue
            wide = t.dim() > 1 and self.vocab in t.shape
            assert not wide or t.numel() <= ROWS * self.vocab, f"{func} made {list(t.shape)}"
        return result


@dataclass
class Inputs:
    """What a program may use besides logits [B, T, V].

    Attributes:
        tokens: [B, T], the label of each position.
        mask: [B, T] bool, which positions count; all of them in programs without a mask.
        old, reference: [B, T], log-probabilities of other policies.
        temperatures: [B, 1, 1].
    """

    tokens: Tensor
    mask: Tensor
    old: Tensor
    reference: Tensor
    temperatures: Tensor

    @property
    def labels(self) -> Tensor:
        """With -100 where the mask is off."""
        return self.tokens.masked_fill(~self.mask, -100)


def inputs(*, masked: bool = True) -> Inputs:
    chooser = torch.Generator().manual_seed(1)
    mask = torch.rand(B, T, generator=chooser) < 0.6
    mask[:, -2] = True  # each sequence has something, also after a shift
    return Inputs(
        torch.randint(V, (B, T), generator=chooser),
        mask if masked else torch.ones_like(mask),
        -5 + torch.rand(B, T, generator=chooser),
        -5 + torch.rand(B, T, generator=chooser),
        torch.tensor([0.7, 1.0, 1.3, 0.9]).view(B, 1, 1),
    )


def parameters(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, T, H], weight [V, H] and bias [V], the same numbers in each dtype of bf16
    and those above."""
    chooser = torch.Generator().manual_seed(0)
    tensors = (
        torch.randn(B, T, H, generator=chooser),
        torch.randn(V, H, generator=chooser) / 2,
        torch.randn(V, generator=chooser) / 2,
    )
    hidden, weight, bias = (t.bfloat16().to(dtype).requires_grad_() for t in tensors)
    return hidden, weight, bias


@dataclass
class Outcome:
    """Attributes:
    values: what a program returned, all tensors, detached.
    gradients: of hidden states, weight and bias.
    """

    values: list[Tensor]
    gradients: list[Tensor | None] = field(default_factory=list)


def numbers(t: Tensor) -> Tensor:
    """A copy that is real."""
    return (t.materialize() if isinstance(t, LazyTensor) else t).detach().clone()


def agree(value: Tensor | None, expected: Tensor | None, bound: float) -> None:
    """Two tensors are the same but for rounding, relative to the larger of 1 and their numbers."""
    assert (value is None) == (expected is None)
    if value is None or expected is None:
        return
    assert value.shape == expected.shape and value.dtype == expected.dtype
    value, expected = numbers(value).double(), numbers(expected).double()
    finite = expected.isfinite()
    assert str(value[~finite].tolist()) == str(expected[~finite].tolist())
    value, expected = value[finite], expected[finite]
    scale = max([1.0, *expected.abs().reshape(-1).tolist()])
    assert (value - expected).abs().max().item() <= bound * scale if finite.any() else True


Program = Callable[[Tensor, Inputs], Any]


def run(
    program: Program, *, lazy: bool, dtype: torch.dtype, masked: bool = True, unknown: str = "raise"
) -> Outcome:
    """A program's values, and the gradients of the sum of those that have one."""
    hidden, weight, bias = parameters(dtype)
    guard = NoLogits() if lazy and unknown == "raise" else contextlib.nullcontext()
    with guard:
        if lazy:
            logits = lazy_output(hidden, Head(weight, bias), Options("64KiB", "auto", unknown))
        else:
            logits = functional.linear(hidden, weight, bias)
        returned = tree_leaves(program(logits, inputs(masked=masked)))
        total = sum((t.double().sum() for t in returned if t.requires_grad), torch.zeros(()))
        if not total.requires_grad:
            return Outcome([numbers(t) for t in returned])
        values = [numbers(t) for t in returned]
        leaves = (hidden, weight, bias)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return Outcome(values, list(gradients))


@contextlib.contextmanager
def passes(monkeypatch: Any) -> Iterator[list[int]]:
    """How many rows each pass of the engine over the head scores."""
    scored: list[int] = []
    original = source.linear_token_stats

    def counted(hidden: Tensor, head: Head, labels: Tensor, **options: Any) -> Any:
        scored.append(int((labels != options["ignore_index"]).sum()))
        return original(hidden, head, labels, **options)

    with monkeypatch.context() as patched:
        patched.setattr(source, "linear_token_stats", counted)
        yield scored
