"""Operations number by number of one tensor, and tensors that are made like another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedpo.lazy import expressions
from fusedpo.lazy.arithmetic import without_gradient
from fusedpo.lazy.expressions import NO_LABEL, Expression, RowValues
from fusedpo.lazy.registry import derived, handles, in_order
from fusedpo.lazy.statistics import combination
from fusedpo.lazy.tensor import LazyTensor


@handles("nan_to_num")
def _finite(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    if not lazy.recipe.wide:
        return NotImplemented
    expression = lazy.recipe.expression
    if expression.name in ("log_softmax", "softmax"):
        expression = expression.inputs[0]  # type: ignore[assignment]
    if isinstance(expression, expressions.Logits):
        # finite as long as the model is, and then what they were
        return derived(lazy, axis=lazy.recipe.axis)
    return _elementwise(func, lazy, *args, **kwargs)


_UNARY: dict[str, Callable[[Expression], Expression]] = {
    "tanh": expressions.tanh,
    "exp": expressions.exp,
    "log": expressions.log,
}


@handles("tanh", "exp", "log", "neg", "negative", "__neg__")
def _unary(func: Any, lazy: LazyTensor, **kwargs: Any) -> Any:
    if kwargs or not lazy.recipe.dtype.is_floating_point:
        return NotImplemented
    name, expression = func.__name__, lazy.recipe.expression
    if name in _UNARY:
        # what is scored by the engine is real from here on
        if not expression.wide and combination(expression, lazy.recipe.source.vocab):
            return NotImplemented
        return derived(lazy, _UNARY[name](expression), axis=lazy.recipe.axis)
    result = Expression("neg", (expression,), function=torch.neg, wide=expression.wide)
    return derived(lazy, result, axis=lazy.recipe.axis)


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ELEMENTWISE = (
    *("abs", "square", "sqrt", "pow", "__pow__", "exp2", "expm1", "log1p", "log2", "special_entr"),
    *("clamp", "clamp_min", "clamp_max", "clip", "relu", "sigmoid", "logsigmoid", "softplus"),
    *("isfinite", "isinf", "isnan", "logical_not"),
    *_COMPARISONS,
    *(f"__{name}__" for name in _COMPARISONS),
)


@handles(*_ELEMENTWISE, anywhere=True)
def _elementwise(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """Number by number, with numbers for arguments: an expression like others, for a reduction."""
    arguments = (*args, *kwargs.values())
    if not isinstance(lazy, LazyTensor) or not lazy.recipe.wide or not in_order(lazy):
        if isinstance(lazy, LazyTensor) and func.__name__ in ("eq", "__eq__"):
            return _match(lazy, *args)
        if args and isinstance(args[0], LazyTensor) and func.__name__ in ("eq", "__eq__"):
            return _match(args[0], lazy)
        return NotImplemented
    if func.__name__ in ("eq", "ne", "__eq__", "__ne__") and isinstance(args[0], LazyTensor):
        return _compared(func, lazy, *args)
    if any(isinstance(each, Tensor) for each in arguments):
        return NotImplemented
    if func.__name__ in ("clamp", "clip", "clamp_min") and _lowest(lazy, *args, **kwargs):
        return derived(lazy)
    like = func(torch.empty(1, dtype=lazy.recipe.dtype), *args, **kwargs)

    def function(value: Tensor) -> Tensor:
        return func(value, *args, **kwargs)

    result = Expression(f"{func.__name__}{arguments}", (lazy.recipe.expression,), function=function)
    return derived(lazy, result, dtype=like.dtype)


def _lowest(lazy: LazyTensor, *args: Any, **kwargs: Any) -> bool:
    """Whether log-probabilities are clamped to what is finite, as they are."""
    bounds = [*args, *kwargs.values()]
    smallest = torch.finfo(lazy.recipe.dtype).min if lazy.is_floating_point() else None
    by_name = "max" not in kwargs and len(bounds) == 1
    return lazy.recipe.expression.name == "log_softmax" and by_name and bounds[0] == smallest


def _compared(func: Any, lazy: LazyTensor, other: LazyTensor) -> Any:
    """Whether two are equal, or one is to itself, as no NaN is."""
    one, two = lazy.recipe, other.recipe
    if not two.wide or not in_order(other) or one.source is not two.source:
        return NotImplemented
    if not torch.equal(one.index, two.index):
        return NotImplemented
    operands = without_gradient(one.expression), without_gradient(two.expression)
    return derived(lazy, Expression(func.__name__, operands, function=func), dtype=torch.bool)


_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
_NEW = ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")


@handles(*_LIKE, *_NEW)
def _like(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    """A tensor of other numbers, for which these need not be there."""
    recipe = lazy.recipe
    shape = () if func.__name__ in _NEW else recipe.shape
    like = torch.empty((), dtype=recipe.dtype, device=recipe.source.device).expand(shape)
    return func(like, *args, **kwargs)


def _match(lazy: LazyTensor, labels: Any) -> Any:
    """Whether the likeliest token is the label: also a label that shares the largest logit, of
    which argmax takes the first."""
    recipe = lazy.recipe
    if recipe.expression.name != "argmax" or not isinstance(labels, Tensor):
        return NotImplemented
    if isinstance(labels, LazyTensor) or labels.shape != recipe.index.shape:
        return NotImplemented
    if labels.dtype not in (torch.int64, torch.int32) or labels.device != recipe.source.device:
        return NotImplemented
    # no token is the label of an ignored position
    outside = (labels < 0) | (labels >= recipe.source.vocab)
    rows = RowValues.of(recipe.index, labels.long().masked_fill(outside, NO_LABEL))

    def function(value: Tensor, rows: Tensor) -> Tensor:
        return value == rows

    result = Expression("eq", (recipe.expression,), rows=rows, wide=False, function=function)
    return derived(lazy, result, dtype=torch.bool)
