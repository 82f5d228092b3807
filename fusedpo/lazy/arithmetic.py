"""Operations number by number of two tensors, of which one may be a number or have one a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedpo.lazy import expressions
from fusedpo.lazy.expressions import Expression, RowValues
from fusedpo.lazy.masks import kept
from fusedpo.lazy.registry import derived, handles, in_order
from fusedpo.lazy.tensor import LazyTensor

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
}
# torch's names of these, of those with the operands the other way about, and of those in place
_NAMES = {
    "add": ("add", "__add__", "__radd__"),
    "sub": ("sub", "subtract", "__sub__"),
    "mul": ("mul", "multiply", "__mul__", "__rmul__"),
    "div": ("div", "divide", "true_divide", "__div__", "__truediv__"),
}
_REVERSED = {"sub": ("rsub", "__rsub__"), "div": ("__rdiv__", "__rtruediv__")}
_IN_PLACE = {
    "mul": ("mul_", "multiply_", "__imul__"),
    "div": ("div_", "divide_", "true_divide_", "__itruediv__"),
}


def _by_name(names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {name: operation for operation, every in names.items() for name in every}


_OPERATIONS, _TURNED = _by_name(_NAMES), _by_name(_REVERSED)
_SCALINGS = _by_name(_IN_PLACE)


@handles(*_OPERATIONS, *_TURNED, anywhere=True)
def _binary(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs:  # alpha, rounding_mode
        return NotImplemented
    if func.__name__ in _TURNED:
        a, b = b, a
    name = {**_OPERATIONS, **_TURNED}[func.__name__]
    lazy = a if isinstance(a, LazyTensor) else b
    if not lazy.recipe.dtype.is_floating_point:
        return NotImplemented
    if lazy.recipe.wide or (isinstance(b, LazyTensor) and b.recipe.wide):
        return _wide(name, a, b)
    return _narrow(name, a, b)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wide(name: str, a: Any, b: Any) -> Any:
    lazy = a if isinstance(a, LazyTensor) and a.recipe.wide else b
    other = b if lazy is a else a
    recipe, expression = lazy.recipe, lazy.recipe.expression
    if _number(other):
        if name in ("mul", "div") and lazy is a and other != 0 and math.isfinite(other):
            result = expressions.scaled(expression, 1 / other if name == "div" else other)
        elif name == "mul":
            result = expressions.scaled(expression, other)
        else:
            operands = (expression, other) if lazy is a else (other, expression)
            result = Expression(name, operands, function=_FUNCTIONS[name])
        return derived(lazy, result, axis=recipe.axis)
    if not isinstance(other, Tensor) or not in_order(lazy):
        return NotImplemented
    if isinstance(other, LazyTensor):
        return _wide_and_lazy(name, a, b, lazy, other)
    rows = rows_of(lazy, other)
    if rows is None:
        return NotImplemented
    dtype = torch.result_type(torch.empty(1, dtype=recipe.dtype), other)
    if name == "div" and lazy is a:
        result = expressions.divided(expression, rows)
    else:
        result = _with_rows(name, expression, rows, turned=lazy is b)
    return derived(lazy, result, dtype=dtype)


def _with_rows(name: str, expression: Expression, rows: RowValues, *, turned: bool) -> Expression:
    operate = _FUNCTIONS[name]

    def function(value: Tensor, rows: Tensor) -> Tensor:
        column = rows.to(value.dtype)[:, None]
        return operate(column, value) if turned else operate(value, column)

    return Expression(f"{name} rows", (expression,), rows=rows, function=function)


def rows_of(lazy: LazyTensor, values: Tensor) -> RowValues | None:
    """Numbers that are the same for all entries of a row; None if they are not, or have a
    gradient."""
    recipe = lazy.recipe
    index = recipe.index
    if values.requires_grad or values.device not in (recipe.source.device, torch.device("cpu")):
        return None
    if values.dim() > index.dim() + 1 or (values.dim() and values.shape[-1] != 1):
        return None
    try:
        return RowValues.of(index, values.expand(*index.shape, 1))
    except RuntimeError:  # shapes that do not go together, which torch will say
        return None


def _wide_and_lazy(name: str, a: Any, b: Any, lazy: LazyTensor, other: LazyTensor) -> Any:
    """Of two lazy tensors of the same rows."""
    mine, theirs = lazy.recipe, other.recipe
    index = theirs.index
    if not theirs.wide:
        if not index.dim() or index.shape[-1] != 1:
            return NotImplemented
        index = index[..., 0]
    elif not in_order(other):
        return NotImplemented
    if mine.source is not theirs.source or not torch.equal(mine.index, index):
        return NotImplemented
    operands = tuple(
        without_gradient(each.recipe.expression)
        if torch.is_grad_enabled() and mine.grad != theirs.grad and not each.recipe.grad
        else each.recipe.expression
        for each in (a, b)
    )
    if name == "sub":
        result = expressions.subtracted(*operands)
    else:
        result = Expression(name, operands, function=_FUNCTIONS[name])
    dtype = torch.promote_types(mine.dtype, theirs.dtype)
    grad = (mine.grad or theirs.grad) and torch.is_grad_enabled()
    return derived(lazy, result, dtype=dtype, grad=grad)


def without_gradient(expression: Expression) -> Expression:
    """An expression that is a constant in one that has a gradient."""
    return Expression("detach", (expression,), function=Tensor.detach, wide=expression.wide)


def _narrow(name: str, a: Any, b: Any) -> Any:
    """Of one number a row: with a mask, only what it keeps is scored."""
    if isinstance(a, LazyTensor) and isinstance(b, LazyTensor):
        one, two = a.recipe, b.recipe
        if (
            one.source is not two.source
            or (torch.is_grad_enabled() and one.grad != two.grad)
            or name not in ("add", "sub")
            or one.index.shape != two.index.shape
            or not torch.equal(one.index, two.index)
        ):
            return NotImplemented
        operands = one.expression, two.expression
        result = Expression(name, operands, wide=False, function=_FUNCTIONS[name])
        return derived(a, result, dtype=torch.promote_types(one.dtype, two.dtype))
    lazy, other = (a, b) if isinstance(a, LazyTensor) else (b, a)
    expression = lazy.recipe.expression
    if _number(other):
        if name == "div" and lazy is a and other != 0:
            name, other = "mul", 1 / other
        elif name == "div":
            return NotImplemented
        operands = (expression, other) if lazy is a else (other, expression)
        result = Expression(name, operands, wide=False, function=_FUNCTIONS[name])
        return derived(lazy, result)
    if name == "mul" and isinstance(other, Tensor) and not other.requires_grad:
        keep = kept(lazy, other != 0)
        if keep is not None:
            return lazy.score(keep) * other
    return NotImplemented


# in place


@handles(*_SCALINGS)
def _scale_in_place(func: Any, lazy: LazyTensor, other: Any, **kwargs: Any) -> Any:
    """logits.div_(temperature): views of the same memory see it too."""
    if kwargs or not lazy.recipe.wide or not in_order(lazy):
        return NotImplemented
    recipe, root = lazy.recipe, lazy.recipe.root
    name, expression = _SCALINGS[func.__name__], recipe.expression
    if not isinstance(expression, expressions.Logits) or expression.divisor is not None:
        return NotImplemented
    # a change that autograd is not to see, or which views of single entries are to see
    if recipe.source.requires_grad and not (recipe.grad and torch.is_grad_enabled()):
        return NotImplemented
    if root.memory.has_entries():
        return NotImplemented
    whole = recipe.index.numel() == root.index.numel()
    if _number(other) and whole and 0 < other < math.inf:
        factor = 1 / other if name == "div" else other
        recipe.memory.replace(expressions.scaled(expression, factor))
        return lazy
    if _number(other):
        other = torch.full((1,), float(other), device=recipe.source.device)
    if not isinstance(other, Tensor) or isinstance(other, LazyTensor):
        return NotImplemented
    rows = rows_of(lazy, other)
    if rows is None or not rows.positive():
        return NotImplemented
    if name == "mul":
        rows = RowValues(tuple((index, 1 / values) for index, values in rows.pieces))
    recipe.memory.replace(expressions.divided(expression, rows))
    return lazy
