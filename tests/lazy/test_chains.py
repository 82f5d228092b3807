"""Whatever is done to lazy logits, in whatever order, they are like real ones to whoever looks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from lazy.harness import agree
from torch import Tensor
from torch.nn import functional

from fusedpo.head import Head
from fusedpo.lazy.install import lazy_output
from fusedpo.lazy.source import Options

SIZES = 3, 4, 7  # sequences, positions, tokens
H = 3

Operation = Callable[[Tensor, Tensor, int], Any]


def rows_like(t: Tensor, n: int) -> Tensor:
    """A number above 0 for each row of t."""
    count = t[..., :1].numel()
    return (torch.arange(count) * (n + 1) % 5 + 1.0).view(t[..., :1].shape)


def mask_like(shape: Any, n: int) -> Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * (n + 3)) % 4 > n % 3).view(shape)


def labels_like(t: Tensor, n: int) -> Tensor:
    return (torch.arange(t[..., 0].numel()) * (n + 1) % t.shape[-1]).view(t[..., 0].shape)


def gather(t: Tensor, n: int) -> Tensor:
    return t.gather(-1, labels_like(t, n).unsqueeze(-1)).squeeze(-1)


def write(t: Tensor, key: Any, value: Any) -> Tensor:
    t[key] = value
    return t


def picked(parts: Any, n: int) -> Tensor:
    return parts[n % len(parts)]


ALLOWED: dict[str, Operation] = {
    "tail": lambda t, u, n: t[:, 1:],
    "head": lambda t, u, n: t[:, :-1],
    "step": lambda t, u, n: t[::2],
    "one": lambda t, u, n: t[n % 3],
    "last": lambda t, u, n: t[-1],
    "ellipsis": lambda t, u, n: t[..., :, :],
    "new axis": lambda t, u, n: t[:, None],
    "of a tensor": lambda t, u, n: t[torch.tensor(n % 2)],
    "mask": lambda t, u, n: t[mask_like(t.shape[:-1], n)],
    "first mask": lambda t, u, n: t[mask_like(t.shape[:1], n)],
    "rows twice": lambda t, u, n: t[torch.tensor([0, 0, n % 2])],
    "list": lambda t, u, n: t[[0, -1]],
    "pairs": lambda t, u, n: t[torch.tensor([0, 1]), torch.tensor([1, n % 2])],
    "triples": lambda t, u, n: t[torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([n, -1])],
    "entry": lambda t, u, n: t[..., n % 3],
    "entry from the end": lambda t, u, n: t[..., -1 - n % 3],
    "unsqueeze": lambda t, u, n: t.unsqueeze(n % 2),
    "squeeze": lambda t, u, n: t.squeeze(),
    "flatten": lambda t, u, n: t.flatten(0, -2),
    "reshape": lambda t, u, n: t.reshape(-1, t.shape[-1]),
    "view": lambda t, u, n: t.view(-1, t.shape[-1]),
    "transpose": lambda t, u, n: t.transpose(0, 1),
    "turn": lambda t, u, n: t.transpose(-1, -2),
    "permute": lambda t, u, n: t.permute(1, 0, 2),
    "chunk": lambda t, u, n: picked(t.chunk(2), n),
    "split": lambda t, u, n: picked(t.split(2, dim=n % 2), n),
    "unbind": lambda t, u, n: picked(t.unbind(0), n),
    "iterate": lambda t, u, n: picked([*t], n),
    "narrow": lambda t, u, n: t.narrow(0, 1, 1),
    "select": lambda t, u, n: t.select(n % 3, 0),
    "expand": lambda t, u, n: t.unsqueeze(0).expand(2, *t.shape),
    "index_select": lambda t, u, n: t.index_select(n % 3, torch.tensor([1, 0])),
    "flip": lambda t, u, n: t.flip(n % 3),
    "roll": lambda t, u, n: t.roll(1, n % 3),
    "repeat": lambda t, u, n: t.repeat_interleave(2, dim=0),
    "cat": lambda t, u, n: torch.cat([t, u], n % 2),
    "stack": lambda t, u, n: torch.stack([t, u], n % 4),
    "contiguous": lambda t, u, n: t.contiguous(),
    "clone": lambda t, u, n: t.clone(),
    "detach": lambda t, u, n: t.detach(),
    "double": lambda t, u, n: t.double(),
    "float": lambda t, u, n: t.float(),
    "divide": lambda t, u, n: t / (n - 1.5),
    "scale": lambda t, u, n: (n - 1) * t,
    "temperatures": lambda t, u, n: t / rows_like(t, n),
    "minus": lambda t, u, n: -t,
    "shift": lambda t, u, n: n - t + 0.5,
    "masked": lambda t, u, n: t * mask_like(t.shape, n),
    "row mask": lambda t, u, n: t * mask_like(t[..., :1].shape, n),
    "sum of two": lambda t, u, n: t + u,
    "difference of two": lambda t, u, n: t - u,
    "product of two": lambda t, u, n: t * u,
    "tanh": lambda t, u, n: torch.tanh(t),
    "log_softmax": lambda t, u, n: t.log_softmax(-1),
    "softmax": lambda t, u, n: functional.softmax(t, dim=-1),
    "log of softmax": lambda t, u, n: t.tanh().softmax(-1).log(),
    "logsumexp": lambda t, u, n: t.logsumexp(-1),
    "kept logsumexp": lambda t, u, n: t - t.logsumexp(-1, keepdim=True),
    "gather": lambda t, u, n: gather(t, n),
    "label's log-probability": lambda t, u, n: gather(t.log_softmax(-1), n),
    "entropy": lambda t, u, n: -(t.softmax(-1) * t.log_softmax(-1)).sum(-1),
    "argmax": lambda t, u, n: t.argmax(-1),
    "hits": lambda t, u, n: t.argmax(-1) == labels_like(t, n),
    "max": lambda t, u, n: t.max(-1).values,
    "row sum": lambda t, u, n: t.sum(-1, keepdim=bool(n % 2)),
    "mean": lambda t, u, n: t.mean(),
    "row std": lambda t, u, n: t.std(-1, n % 2 == 0),
    "std": lambda t, u, n: t.std(),
    "largest": lambda t, u, n: t.topk(2).values,
    "cross-entropy": lambda t, u, n: functional.cross_entropy(
        t.reshape(-1, t.shape[-1]),
        labels_like(t, n).reshape(-1).masked_fill(mask_like(t[..., 0].shape, n).reshape(-1), -100),
        reduction="sum",
        label_smoothing=0.1 * (n % 2),
    ),
    "where": lambda t, u, n: torch.where(mask_like(t.shape, n), t, 0.0),
    "masked_fill": lambda t, u, n: t.masked_fill(mask_like(t.shape, n), 1.0),
    "divide in place": lambda t, u, n: t.div_(n + 1.0),
    "scale in place": lambda t, u, n: t.mul_(n / 2),
    "temperatures in place": lambda t, u, n: t.div_(rows_like(t, n)),
}
OTHERS: dict[str, Operation] = {
    "cumsum": lambda t, u, n: t.cumsum(-1),
    "sort": lambda t, u, n: t.sort(-1).values,
    "T": lambda t, u, n: t.mT,
    "diagonal": lambda t, u, n: t.diagonal(0, 0, 1),
    "product of matrices": lambda t, u, n: t @ torch.ones(t.shape[-1], 2, dtype=t.dtype),
    "some entries": lambda t, u, n: t[..., 1 : 3 + n],
    "norm": lambda t, u, n: t.norm(dim=-1),
    "add in place": lambda t, u, n: t.add_(torch.arange(t.shape[-1]) / 2),
    "subtract in place": lambda t, u, n: t.sub_(0.5),
    "write an entry": lambda t, u, n: write(t, (..., n % 3), -1.0),
    "write a row": lambda t, u, n: write(t, n % 2, 0.5),
    "write a mask": lambda t, u, n: write(t, mask_like(t.shape, n), 2.0),
    "fill in place": lambda t, u, n: t.masked_fill_(mask_like(t.shape[-1:], n), -1.5),
    "clamp in place": lambda t, u, n: t.clamp_(-1, 1),
    "copy in place": lambda t, u, n: t.copy_(u),
    "zero": lambda t, u, n: t[:1].zero_(),
    "through detach": lambda t, u, n: t.detach().mul_(2),
    "through data": lambda t, u, n: t.data.add_(1),
    "augmented": lambda t, u, n: augmented(t, n),
}


def augmented(t: Tensor, n: int) -> Tensor:
    t /= n + 1
    t += 1
    return t


FLAGS: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.shape,
    lambda t: t.dtype,
    lambda t: t.device,
    lambda t: t.requires_grad,
    lambda t: t.grad_fn is None,
    lambda t: t.numel(),
    lambda t: t.dim(),
)


def is_usable(t: Tensor) -> bool:
    """Whether torch still allows what is one of several views, of what was changed since."""
    try:
        return (t * 1).dim() >= 0
    except RuntimeError as error:
        assert "multiple views" in str(error)
        return False


def compare_looks(name: str, lazy: Tensor, plain: Tensor) -> None:
    for i, flag in enumerate(FLAGS):
        assert flag(lazy) == flag(plain), (name, i, flag(lazy), flag(plain))


def chain(steps: list[tuple[str, int, int, int, bool]], sizes: tuple[int, ...] = SIZES) -> None:
    """Run operations on plain and lazy logits alike; what comes of each is there for the next."""
    chooser = torch.Generator().manual_seed(0)
    b, t, v = sizes
    start = [torch.randn(size, generator=chooser) for size in ((b, t, H), (v, H), (v,))]
    leaves = [[t.clone().requires_grad_() for t in start] for _ in range(2)]
    plain = [functional.linear(*leaves[0])]
    hidden, weight, bias = leaves[1]
    lazy: list[Tensor] = [lazy_output(hidden, Head(weight, bias), Options("64KiB", "auto", "warn"))]
    for name, first, second, n, graded in steps:
        operation = ALLOWED.get(name) or OTHERS[name]
        i, j = first % len(plain), second % len(plain)
        mode = contextlib.nullcontext if graded else torch.no_grad
        before = [t.detach().clone() if is_usable(t) else None for t in plain]
        try:
            with mode():
                outcome = operation(plain[i], plain[j], n)
        except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError):
            # a write may have been done in part
            for t, value in zip(plain, before, strict=True):
                hypothesis.assume(value is None or torch.equal(t.detach(), value))
            continue
        with mode():
            mine = operation(lazy[i], lazy[j], n)
        itself = [k for k, t in enumerate(plain) if t is outcome]
        assert itself == [k for k, t in enumerate(lazy) if t is mine]
        if not graded and not itself:  # torch says of a view that it requires what is not passed on
            outcome, mine = outcome.detach(), mine.detach()
        compare_looks(name, mine, outcome)
        if outcome._base is plain[0]:
            assert mine.stride() == outcome.stride(), name
        plain.append(outcome)
        lazy.append(mine)
    usable = [is_usable(t) and is_usable(u) for t, u in zip(plain, lazy, strict=True)]
    plain, lazy = ([t for t, use in zip(ts, usable, strict=True) if use] for ts in (plain, lazy))
    totals = []
    for tensors in (plain, lazy):
        parts = [
            t.double().tanh().sum() * (i + 1) for i, t in enumerate(tensors) if t.requires_grad
        ]
        totals.append(sum(parts, torch.zeros((), dtype=torch.float64)))
    for value, expected in zip(lazy, plain, strict=True):
        agree(value, expected, 1e-4)
    if not totals[0].requires_grad or not totals[0].isfinite():
        return
    if any(name == "through data" for name, *_ in steps):  # autograd does not know what it misses
        return
    try:
        expected_gradients = torch.autograd.grad(totals[0], leaves[0], allow_unused=True)
    except RuntimeError:  # what is needed for it was written over
        return
    gradients = torch.autograd.grad(totals[1], leaves[1], allow_unused=True)
    for gradient, truth in zip(gradients, expected_gradients, strict=True):
        if truth is not None:
            assert gradient is not None
            agree(gradient, truth, 1e-3)


def steps_of(names: list[str]) -> Any:
    number = st.integers(0, 5)
    step = st.tuples(st.sampled_from(names), number, number, st.integers(0, 4), st.integers(0, 5))
    return st.lists(step.map(lambda s: (*s[:4], s[4] != 5)), min_size=1, max_size=6)


def quietly(steps: Any, sizes: tuple[int, ...] = SIZES) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            chain(steps, sizes)
        except RuntimeError as error:  # torch's, of a part that is changed as part of a whole
            assert "multiple views" in str(error)


@pytest.mark.parametrize("name", [*ALLOWED, *OTHERS])
def test_each_operation_beside_others(name: str) -> None:
    """Before and after a view, a change in place and another operation."""
    for n in range(3):
        quietly([("tail", 0, 0, 0, True), (name, 0, 0, n, True), (name, 1, 0, n, True)])
        quietly([(name, 0, 0, n, True), ("divide in place", 0, 0, 1, True)])
        quietly([("divide in place", 0, 0, 1, True), (name, 0, 0, n, False)])
        quietly([("log_softmax", 0, 0, 0, True), (name, 1, 0, n, True), ("clone", 2, 0, 0, True)])
        quietly(
            [("logsumexp", 0, 0, 0, True), (name, 1, 1, n, True), ("write a row", 1, 0, 0, True)]
        )


@hypothesis.given(steps_of([*ALLOWED]))
@hypothesis.settings(max_examples=60)
def test_chains_of_known_operations(steps: Any) -> None:
    quietly(steps)


@hypothesis.given(steps_of([*ALLOWED, *OTHERS, *OTHERS]))
@hypothesis.settings(max_examples=60)
def test_chains_with_unknown_operations(steps: Any) -> None:
    quietly(steps)


@hypothesis.given(
    steps_of([*ALLOWED, *OTHERS]), st.sampled_from([(3, 7, 7), (7, 1, 7), (1, 4, 7), (3, 4, 1)])
)
@hypothesis.settings(max_examples=60)
def test_chains_where_sizes_coincide(steps: Any, sizes: tuple[int, ...]) -> None:
    quietly(steps, sizes)


@hypothesis.given(steps_of([*ALLOWED, *OTHERS]))
@hypothesis.settings(max_examples=1000)
def test_many_chains(steps: Any) -> None:
    quietly(steps)
