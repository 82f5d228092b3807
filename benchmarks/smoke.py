"""Is every route right on this device? The first question, before anything is timed.

Every route in bf16 and fp32 against full logits in float64, from the same numbers; then
log-probabilities where a device may differ from the interpreter: a last block of one row, hidden
states that are a slice, and products over long rows. Errors of gradients are relative to their
norm; those of log-probabilities are the largest of all tokens, over what is promised for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fusedpo
from fusedpo.benchmarks import routes
from fusedpo.benchmarks.section import Cell, Section, Setting
from fusedpo.benchmarks.shapes import Shape, make_inputs
from fusedpo.benchmarks.timing import Deadline

SHAPE = Shape(pairs=2, tokens=75, hidden=256, vocab=5000)
_DRY = Shape(pairs=2, tokens=4, hidden=32, vocab=300)

# of a gradient's norm: a Jacobian rounded to bf16, and fp32, in which TF32 would show
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 5e-5}
# the loss, relative; log-probabilities, over max(10, largest logit)
LOSS_BOUND = 2e-5
LOGPROB_BOUND = 2e-6

Check = Callable[[], dict[str, float]]
"""Errors by what they are of, each as a multiple of its bound."""


def smoke(setting: Setting, deadline: Deadline) -> Section:
    """Whether every route gives what float64 gives."""

    def worst(row: Mapping[str, Any]) -> str:
        return max(row["errors"], key=lambda what: _size(row["errors"][what]))

    columns: dict[str, Cell] = {
        "what": "name",
        "worst error / bound": lambda row: f"{row['errors'][worst(row)]:.2g}",
        "of": worst,
    }
    section = Section("right or wrong, against float64", columns)
    known = dict(checks(setting))
    for name in section.in_time(known, deadline):
        with section.attempt(name):
            errors = known[name]()
            section.add(name=name, errors=errors)
            section.wrong += [
                f"{name}: the error of its {what} is {error:.1e} of the bound"
                for what, error in errors.items()
                if not error <= 1.0
            ]
    return section


def _size(error: float) -> float:
    return float("inf") if error != error else error


def checks(setting: Setting) -> Iterator[tuple[str, Check]]:
    """All checks by name, the routes first."""
    shape = _DRY if setting.dry else SHAPE
    for dtype in BOUNDS:
        name = str(dtype).removeprefix("torch.")
        for way in (*routes.KERNEL_WAYS, routes.Way("forward", "triton", fused=True)):
            yield f"{way}, {name}", _of_route(replace(setting, dtype=dtype, shape=shape), way)
    rows, size = (33, 32) if setting.dry else (1025, 256)
    for dtype in BOUNDS:
        name = str(dtype).removeprefix("torch.")
        flat, batch = (rows, size), (4, rows // 4 + 1, size)
        yield f"{rows} rows, {name}", _of_logprobs(setting, dtype, flat, shape.vocab)
        yield f"a slice, {name}", _of_logprobs(setting, dtype, batch, shape.vocab, cut=True)
        for long in (64, 128) if setting.dry else (4096, 8192):
            vocab = 300 if setting.dry else 8192
            yield (
                f"H {long}, {name}",
                _of_logprobs(setting, dtype, (8 if setting.dry else 512, long), vocab),
            )


def _of_route(setting: Setting, way: routes.Way) -> Check:
    def check() -> dict[str, float]:
        inputs = make_inputs(routes.case_of(setting, setting.shape))
        exact = inputs._replace(
            hidden=inputs.hidden.detach().double().requires_grad_(),
            weight=inputs.weight.detach().double().requires_grad_(),
        )
        truth = routes.Reference.of(replace(setting, dtype=torch.float64), exact)
        chosen = way.plan(setting, setting.shape)
        errors = truth.differences(way, chosen, setting.shape, inputs)
        bound = BOUNDS[setting.dtype]
        return {k: e / (LOSS_BOUND if k == "loss" else bound) for k, e in errors.items()}

    return check


def _of_logprobs(
    setting: Setting, dtype: torch.dtype, size: tuple[int, ...], vocab: int, cut: bool = False
) -> Check:
    """linear_logprobs with both gradients; cut: all but the last position of each row."""

    def check() -> dict[str, float]:
        generator = torch.Generator(setting.device).manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, device=setting.device, generator=generator)

        hidden = drawn(*size).to(dtype).requires_grad_()
        weight = (drawn(vocab, size[-1]) * size[-1] ** -0.5).to(dtype).requires_grad_()
        part = hidden[:, :-1] if cut else hidden
        rows = part.shape[:-1]
        labels = torch.randint(vocab, rows, device=setting.device, generator=generator)
        share = drawn(*labels.shape)
        got = fusedpo.linear_logprobs(part, weight, labels, backend="triton")
        torch.autograd.backward((got * share).sum())

        h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
        logits = (h[:, :-1] if cut else h) @ w.T
        truth = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        torch.autograd.backward((truth * share.double()).sum())
        largest = max(10.0, float(logits.detach().abs().max()))
        gap = float((got.detach().double() - truth.detach()).abs().max())
        return {
            "logprob": gap / (LOGPROB_BOUND * largest),
            "hidden": routes.relative(hidden.grad, h.grad) / BOUNDS[dtype],
            "weight": routes.relative(weight.grad, w.grad) / BOUNDS[dtype],
        }

    return check
