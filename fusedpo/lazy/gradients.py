"""Gradients of what was computed of lazy logits, other than the engine's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.engine.precision import accumulated_dtype
from fusedpo.lazy.expressions import NO_LABEL, Expression, Logits, evaluate

if TYPE_CHECKING:
    from fusedpo.lazy.source import Pass, Source


def gradient(
    source: Source, expression: Expression, rows: Tensor, g: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [R, H], weight [V, H] and bias [V] from one, g, for the expression's
    values of rows [n]."""
    hidden, weight, bias = source.tensors(grad=False)
    trained = [
        t is not None and t.requires_grad
        for t in (source.hidden, source.head.weight, source.head.bias)
    ]
    full = accumulated_dtype(hidden.dtype)
    of_hidden = torch.zeros_like(hidden, dtype=full) if trained[0] else None
    of_weight = torch.zeros_like(weight, dtype=full) if trained[1] else None
    of_bias = None if bias is None or not trained[2] else torch.zeros_like(bias, dtype=full)
    for start, stop in source.chunks(rows):
        part = rows[start:stop]
        z = source.logits(part, Logits(), grad=False).requires_grad_()
        with torch.enable_grad():
            value = evaluate(expression, z if z.dtype == full else z.to(full), part, source.count)
        if not value.requires_grad:  # such as of an argmax
            continue
        (dz,) = torch.autograd.grad(value, z, g[start:stop].to(value.dtype))
        dz = dz.to(full)
        if of_hidden is not None:
            of_hidden.index_add_(0, part, dz.to(weight.dtype).mm(weight).to(full))
        if of_weight is not None:
            of_weight.addmm_(dz.T, hidden[part].to(full))
        if of_bias is not None:
            of_bias += dz.sum(0)
    return (
        None if of_hidden is None else of_hidden.to(hidden.dtype),
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )


class ByChunks(torch.autograd.Function):
    """A narrow expression whose backward makes the logits anew, a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: Source,
        expression: Expression,
        rows: Tensor,
    ) -> Tensor:
        ctx.arguments = source, expression, rows
        ctx.save_for_backward(hidden, weight, bias)  # that a change in place is noticed
        value = source.by_chunks(expression, rows, grad=False)
        if not value.is_floating_point():
            ctx.mark_non_differentiable(value)
        return value

    @staticmethod
    @checks.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        source, expression, rows = ctx.arguments
        return (*gradient(source, expression, rows, g), None, None, None)


class ScoredEntropy(torch.autograd.Function):
    """The entropy as it was scored beside the log-probability, which costs no product. Only a
    gradient that arrives costs what a pass for the entropy does."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, source: Source, scored: Pass
    ) -> Tensor:
        ctx.arguments = source, scored
        ctx.save_for_backward(hidden, weight, bias)
        return scored.stats["entropy"].detach().clone()

    @staticmethod
    @checks.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        source, scored = ctx.arguments
        leaves = [
            None if t is None else t.detach().requires_grad_(t.requires_grad)
            for t in (hidden, weight, bias)
        ]
        labels = torch.where(scored.rows & (g != 0), 0, NO_LABEL)
        with torch.enable_grad():
            stats = source.token_stats(
                (leaves[0], leaves[1], leaves[2]), scored.logits, labels, ["entropy"], ("entropy",)
            )
        trained = [t for t in leaves if t is not None and t.requires_grad]
        gradients = iter(torch.autograd.grad(stats.entropy, trained, g))
        return (
            *(next(gradients) if t is not None and t.requires_grad else None for t in leaves),
            None,
            None,
        )


# places in the graph


def placed_gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias from one of a lazy tensor, which ctx has the
    recipe of, and the expression that it was then."""
    recipe = ctx.recipe
    if recipe.wide:
        g = g.movedim(recipe.axis, -1).reshape(-1, recipe.source.vocab)
    else:
        g = g.reshape(-1)
    return gradient(recipe.source, ctx.expression, recipe.rows, g)


class Moved(torch.autograd.Function):
    """A lazy tensor's place after a change in place that is an expression."""

    @staticmethod
    def forward(ctx: Any, lazy: Any, hidden: Tensor, weight: Tensor, bias: Any, recipe: Any) -> Any:
        ctx.recipe, ctx.expression = recipe, recipe.expression
        ctx.mark_dirty(lazy)
        return lazy

    @staticmethod
    @checks.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *placed_gradient(ctx, g), None)


class Changed(torch.autograd.Function):
    """A lazy tensor's place after a change of the real tensor in place."""

    @staticmethod
    def forward(ctx: Any, lazy: Any, real: Tensor) -> Any:
        ctx.mark_dirty(lazy)
        return lazy

    @staticmethod
    @checks.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, g
