"""The truth, the yardstick, and the one place where tolerances live.

The truth is the naive program in float64. The yardsticks are the naive program in the case's own
dtype, and what merely rounding the true gradient to that dtype costs ("cast only"). A gradient is
judged by its relative error, per tensor and per row, against these; never by an absolute tolerance,
which at the scale a preference loss sends (beta over the number of tokens) would accept zero.

Where a gradient is what is left of terms that cancel, no program has small relative errors: there
the terms are the measure, to a tenth of the accuracy that log-probabilities are held to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One problem for the engine. Everything is given in the case's dtype."""

    name: str
    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [...]
    upstream: Tensor  # [...], dL/dlogprob
    upstream_error: Tensor | None = None  # [...], how far off it may be by the loss's own doing
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float | Tensor = 1.0
    ignore_index: int = -100
    upstream_entropy: Tensor | None = None
    upstream_hidden: Tensor | None = None  # [..., H], gradient of the states by another way
    needs: tuple[str, ...] = ("hidden", "weight")

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def scored(self) -> Tensor:
        return self.labels != self.ignore_index

    @property
    def options(self) -> dict:
        return {
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
        }

    def leaves(self) -> dict[str, Tensor]:
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: t for name, t in tensors.items() if t is not None and name in self.needs}


@dataclass
class Result:
    logprob: Tensor
    entropy: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    largest_logit: float = 0.0


def logits(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., V], with all that the head does to them; in fp32 from a product in half precision."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z.float() if z.dtype in HALF else z
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    temperature = case.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype)[..., None]
    return z * case.logit_scale / temperature


def naive(case: Case, dtype: torch.dtype) -> Result:
    """The program that fusedpo replaces: full logits, in the given dtype, under autograd."""

    def cast(t: Tensor | None, name: str) -> Tensor | None:
        if t is None:
            return None
        return t.detach().to(dtype, copy=True).requires_grad_(name in case.needs)

    hidden, weight, bias = (
        cast(case.hidden, "hidden"),
        cast(case.weight, "weight"),
        cast(case.bias, "bias"),
    )
    z = logits(case, hidden, weight, bias)
    largest = float(z.detach().abs()[z.isfinite()].max()) if z.numel() else 0.0
    log_p = z.log_softmax(-1)
    safe = case.labels.long().masked_fill(~case.scored, 0)[..., None]
    logprob = log_p.gather(-1, safe)[..., 0].masked_fill(~case.scored, 0.0)
    total = (logprob * case.upstream.to(z.dtype)).sum()
    entropy = None
    if case.upstream_entropy is not None:
        entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~case.scored, 0.0)
        total = total + (entropy * case.upstream_entropy.to(z.dtype)).sum()
    if case.upstream_hidden is not None:
        total = total + (hidden * case.upstream_hidden.to(dtype)).sum()
    leaves = {
        n: t
        for n, t in (("hidden", hidden), ("weight", weight), ("bias", bias))
        if t is not None and n in case.needs
    }
    found = torch.autograd.grad(total, list(leaves.values())) if leaves else ()
    gradients = dict(zip(leaves, found, strict=True))
    return Result(
        logprob.detach(), None if entropy is None else entropy.detach(), gradients, largest
    )


def relative(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; 0 if both are 0."""
    got, exact = got.detach().double(), exact.detach().double()
    gap, size = float((got - exact).norm()), float(exact.norm())
    return 0.0 if gap == 0.0 else gap / size if size else float("inf")


def same_bits(a: Any, b: Any) -> bool:
    """Of tensors, or of collections of them; a NaN equals itself."""
    if not isinstance(a, Tensor):
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def row_errors(got: Tensor, exact: Tensor, slack: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(relative error of the rows that matter, error of the others over the largest row).

    A row that is within its slack has none.
    """
    got, exact = got.double().flatten(0, -2), exact.double().flatten(0, -2)
    size, gap = exact.norm(dim=1), (got - exact).norm(dim=1)
    if slack is not None:
        gap = gap.masked_fill(gap <= slack.flatten(), 0.0)
    largest = size.max() if size.numel() else size.new_ones(())
    matter = size > 1e-3 * largest
    return gap[matter] / size[matter], gap[~matter] / largest.clamp(min=1e-300)


def faults(got: Result, case: Case, *, roundings: int = 1) -> list[str]:
    """What is wrong with a result, in words; empty if it is acceptable.

    roundings=2 allows the hidden gradient of half-precision inputs one rounding more, which is what
    the smallest budgets cost.
    """
    exact = naive(case, torch.float64)
    # a weight may have another dtype than the states, under autocast
    same = {dtype: naive(case, dtype) for dtype in {t.dtype for t in case.leaves().values()}}
    found = []
    eps = 1e-12 if case.dtype == torch.float64 else 2e-6
    bound = eps * max(10.0, exact.largest_logit)
    terms = of_terms(case, 0.1 * bound)
    for name in ("logprob", "entropy"):
        mine, truth = getattr(got, name), getattr(exact, name)
        if truth is None:
            continue
        gap = float((mine.double() - truth).abs().max()) if truth.numel() else 0.0
        if not gap <= bound:
            found.append(f"{name}: error {gap:.2e}, allowed {bound:.2e}")
        if bool((mine[~case.scored] != 0).any()):
            found.append(f"{name}: not 0 where ignored")
    for name, truth in exact.gradients.items():
        dtype = case.leaves()[name].dtype
        found += gradient_faults(
            name,
            got.gradients.get(name),
            truth,
            same[dtype].gradients[name],
            exact.largest_logit,
            roundings if name == "hidden" else 1,
            None if dtype in HALF else terms[name],
        )
    return found


def of_terms(case: Case, accuracy: float) -> dict[str, Tensor]:
    """How far off each row of a gradient is if the terms that it adds up are: [N], [V], [V].

    A term has this relative accuracy. Errors of one position add up over the vocabulary, those of
    several positions are independent.
    """
    hidden, weight, bias = (
        None if t is None else t.detach().double() for t in (case.hidden, case.weight, case.bias)
    )
    z = logits(case, hidden, weight, bias)
    log_p = z.log_softmax(-1)
    p, labels = log_p.exp(), case.labels.long().masked_fill(~case.scored, 0)
    error = accuracy * case.upstream.double().abs()
    if case.upstream_error is not None:
        error = error + case.upstream_error
    terms = p.scatter_add(-1, labels[..., None], torch.ones_like(p)) * error[..., None]
    if case.upstream_entropy is not None:
        surprise = log_p.masked_fill(p == 0, 0.0)
        entropy = -(p * surprise).sum(-1, keepdim=True)
        moved = p * (2 + (surprise + entropy).abs())
        terms = terms + accuracy * moved * case.upstream_entropy.double().abs()[..., None]
    scale = case.logit_scale / torch.as_tensor(case.temperature, dtype=torch.float64)
    terms = terms * scale.expand(case.labels.shape)[..., None].abs()
    if case.softcap is not None:
        # the slope 1 - tanh^2 is itself what is left of 1
        slope = 1 - (z / scale.expand(case.labels.shape)[..., None] / case.softcap) ** 2
        terms = terms * (slope + 0.1)
    terms = terms.masked_fill(~case.scored[..., None], 0.0)
    square = terms.flatten(0, -2) ** 2
    norms = hidden.masked_fill(~case.scored[..., None], 0.0).norm(dim=-1).flatten()
    return {
        "hidden": (terms @ weight.abs()).norm(dim=-1),
        "weight": (square.T @ norms**2).sqrt(),
        "bias": square.sum(0).sqrt(),
    }


def gradient_faults(
    name: str,
    mine: Tensor | None,
    truth: Tensor,
    yardstick: Tensor,
    largest_logit: float,
    roundings: int = 1,
    slack: Tensor | None = None,
) -> list[str]:
    """Judge one gradient against the true one and the naive program's, per tensor and per row.

    slack is an error that no row is blamed for, of the shape of the gradient without the last axis
    (a bias has one a number).
    """
    if mine is None or mine.shape != truth.shape or mine.dtype != yardstick.dtype:
        return [f"d{name}: missing, or of another shape or dtype"]
    if not bool(mine.isfinite().all()):
        return [f"d{name}: not finite"]
    dtype = mine.dtype
    error, naive_error = relative(mine, truth), relative(yardstick, truth)
    cast_error = relative(truth.to(dtype), truth)
    hot = max(1.0, largest_logit / 100)
    if dtype == torch.float64:
        bound = max(1e-12 * hot, 1.25 * naive_error)
    elif dtype == torch.float32:
        bound = max(5e-6 * hot, 1.25 * naive_error)
    else:
        # no larger than the naive program's; nothing can be better than rounding the true gradient
        bound = max(min(naive_error, 2.5 * cast_error), 1.05 * cast_error)
        if roundings == 2:
            bound = max(bound, torch.finfo(dtype).eps)
    found = []
    excused = slack is not None and float((mine.double() - truth).norm()) <= float(slack.norm())
    if not error <= bound and not excused:
        found.append(f"d{name}: relative error {error:.2e}, allowed {bound:.2e}")
    if truth.dim() > 1 and truth.numel():
        rows, small = row_errors(mine, truth, slack)
        naive_rows, _ = row_errors(yardstick, truth)
        limit = max(2 * float(naive_rows.max()) if naive_rows.numel() else 0.0, 4 * bound)
        if rows.numel() and not float(rows.max()) <= limit:
            found.append(f"d{name}: a row is off by {float(rows.max()):.2e}, allowed {limit:.2e}")
        if small.numel() and not float(small.max()) <= 1e-3:
            found.append(f"d{name}: a small row is off by {float(small.max()):.2e} of the largest")
    return found
