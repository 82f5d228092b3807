"""Operations along the vocabulary: softmax, labels, reductions and cross-entropies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedpo.lazy import expressions
from fusedpo.lazy.expressions import Expression, RowValues
from fusedpo.lazy.registry import derived, handles, in_order, last
from fusedpo.lazy.tensor import LazyTensor

# softmax


@handles("log_softmax", "softmax")
def _softmax(func: Any, lazy: LazyTensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not last(lazy, dim):
        return NotImplemented
    dtype = kwargs.get("dtype")
    for each in args:
        dtype = each if isinstance(each, torch.dtype) else dtype
    expression = _unshifted(lazy.recipe.expression)
    build = expressions.log_softmax if func.__name__ == "log_softmax" else expressions.softmax
    return derived(lazy, build(expression), dtype=dtype or _autocast(lazy))


def _unshifted(expression: Expression) -> Expression:
    """An expression without what is taken from a whole row, such as its largest logit."""
    if expression.name == "sub" and expression.wide:
        a, b = expression.inputs
        if isinstance(a, Expression) and isinstance(b, Expression) and a.wide and not b.wide:
            return a
    return expression


def _autocast(lazy: LazyTensor) -> torch.dtype:
    """The dtype of a softmax or a loss, which autocast takes in full precision."""
    recipe = lazy.recipe
    enabled = torch.is_autocast_enabled(recipe.source.device.type)
    return torch.float32 if enabled and recipe.dtype != torch.float64 else recipe.dtype


# labels


def take(
    lazy: LazyTensor,
    labels: Tensor,
    *,
    index: Tensor | None = None,
    view: Callable[[Tensor], Tensor] | None = None,
) -> LazyTensor:
    """The entry of each row's label.

    Args:
        labels: shaped like the rows.
        index: of some rows, for all.
        view: as of ``derived``.

    Raises:
        IndexError: for a label that is no token's. On another device whoever scores it raises.
    """
    recipe = lazy.recipe
    index = recipe.index if index is None else index
    outside = (labels < 0) | (labels >= recipe.source.vocab)
    if labels.device.type == "cpu" and bool(outside.any()):
        label, vocab = int(labels[outside][0]), recipe.source.vocab
        raise IndexError(f"index {label} is out of bounds for logits of {vocab} tokens")
    rows = RowValues.of(index, labels.long())
    entry = expressions.gathered(recipe.expression, rows)
    return derived(lazy, entry, index=index, view=view)


@handles("gather", "take_along_dim")
def _gather(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    names = ("dim", "index") if func.__name__ == "gather" else ("indices", "dim")
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    dim, labels = arguments.get("dim"), arguments.get("index", arguments.get("indices"))
    index = lazy.recipe.index
    if not last(lazy, dim) or not isinstance(labels, Tensor) or isinstance(labels, LazyTensor):
        return NotImplemented
    if labels.dim() != index.dim() + 1 or labels.shape[-1] != 1:
        return NotImplemented
    shape = labels.shape[:-1]
    if any(few > many for few, many in zip(shape, index.shape, strict=True)):
        return NotImplemented
    if func.__name__ == "take_along_dim" and shape != index.shape:
        return NotImplemented
    rows = derived(lazy, index=index[tuple(slice(0, size) for size in shape)])
    entries = take(rows, labels[..., 0])
    return derived(entries, index=entries.recipe.index[..., None])


# reductions


def _dims(arguments: dict[str, Any]) -> tuple[Any, bool, Any]:
    """dim, keepdim and dtype of a reduction's arguments."""
    dim = arguments.get("dim", arguments.get("axis"))
    if isinstance(dim, tuple | list) and len(dim) == 1:
        (dim,) = dim
    return dim, bool(arguments.get("keepdim", False)), arguments.get("dtype")


_REDUCTIONS = (
    *("logsumexp", "sum", "mean", "nansum", "nanmean", "std", "var"),
    *("amax", "amin", "argmax", "argmin", "any", "all", "count_nonzero"),
)


@handles(*_REDUCTIONS)
def _reduce(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    if not lazy.recipe.wide or not in_order(lazy):
        return NotImplemented
    name = func.__name__
    spread = ("unbiased", "correction") if name in ("std", "var") else ()
    names = ("dim", *spread[:1], "keepdim")
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    dim, keepdim, dtype = _dims(arguments)
    if not last(lazy, dim):
        return _of_all(name, lazy) if not args and not kwargs else NotImplemented
    if len(args) > len(names) or not {*kwargs} <= {*names, *spread, "dtype", "axis"}:
        return NotImplemented
    options = {each: arguments[each] for each in spread if each in arguments}

    def function(value: Tensor) -> Tensor:
        return func(value, dim=-1, **options)

    like = function(torch.zeros(1, 2).to(lazy.recipe.dtype))
    if name == "logsumexp":
        like = like.to(_autocast(lazy))
    reduction = expressions.reduced(name, lazy.recipe.expression, function)
    narrow = derived(lazy, reduction, dtype=dtype or like.dtype)
    return derived(narrow, index=narrow.recipe.index[..., None]) if keepdim else narrow


def _of_all(name: str, lazy: LazyTensor) -> Any:
    """A reduction of everything to one number."""
    recipe = lazy.recipe

    def rows(reduction: str) -> Tensor:
        of_rows = _reduce(getattr(torch, reduction), lazy, dim=-1)
        full = torch.promote_types(of_rows.recipe.dtype, torch.float32)
        # rounded once, at the end
        return derived(of_rows, dtype=full if of_rows.is_floating_point() else None).materialize()

    if name in ("sum", "mean", "nansum", "amax", "amin", "any", "all"):
        total = getattr(rows(name), name)()
        return total.to(recipe.dtype) if total.is_floating_point() else total
    if name == "count_nonzero":
        return rows(name).sum()
    if name == "std" and recipe.index.numel():
        # of all numbers, by the means and variances of the rows
        vocab, count = recipe.source.vocab, recipe.index.numel() * recipe.source.vocab
        means, squares = rows("mean").double(), _variance(lazy).double() * vocab
        total = squares.sum() + vocab * (means - means.mean()).square().sum()
        variance = total / (count - 1)
        # of numbers that are all the same, a gradient of 0, as torch's
        zero = variance == 0
        return variance.masked_fill(zero, 1).sqrt().masked_fill(zero, 0).to(recipe.dtype)
    return NotImplemented


def _variance(lazy: LazyTensor) -> Tensor:
    reduction = expressions.reduced(
        "var uncorrected", lazy.recipe.expression, lambda value: value.var(-1, correction=0)
    )
    return derived(lazy, reduction).materialize()


@handles("max", "min")
def _extreme(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    if not lazy.recipe.wide or not in_order(lazy):
        return NotImplemented
    name = func.__name__
    if not args and not kwargs:
        return _of_all(f"a{name}", lazy)
    dim, keepdim, _ = _dims({**dict(zip(("dim", "keepdim"), args, strict=False)), **kwargs})
    if not last(lazy, dim):
        return NotImplemented

    def largest(value: Tensor) -> Tensor:
        return func(value, -1).values

    values = derived(lazy, expressions.reduced(f"{name} values", lazy.recipe.expression, largest))
    if keepdim:
        values = derived(values, index=values.recipe.index[..., None])
    places = _reduce(getattr(torch, f"arg{name}"), lazy, dim=-1, keepdim=keepdim)
    return getattr(torch.return_types, name)((values, places))


@handles("topk")
def _topk(func: Any, lazy: LazyTensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    if not last(lazy, dim):
        return NotImplemented
    recipe = lazy.recipe

    def function(value: Tensor) -> Tensor:
        return func(value, k, -1, *args, **kwargs).indices

    places_of = Expression("topk", (recipe.expression,), wide=False, function=function)
    places = recipe.source.by_chunks(places_of, recipe.rows, grad=False)
    by_row = RowValues(((recipe.index.reshape(-1), places),))

    def gather(value: Tensor, rows: Tensor) -> Tensor:
        return value.gather(-1, rows)

    values = Expression("topk", (recipe.expression,), rows=by_row, wide=False, function=gather)
    with torch.set_grad_enabled(recipe.grad and torch.is_grad_enabled()):
        largest = recipe.source.by_chunks(values, recipe.rows, grad=torch.is_grad_enabled())
        largest = recipe.source.hooked(largest)
    shape = (*recipe.index.shape, k)
    return torch.return_types.topk((largest.view(shape).to(recipe.dtype), places.view(shape)))


# losses


def _has_classes(lazy: LazyTensor, target: Any, *further: object) -> bool:
    """Whether a loss is of one class a row, along the axis where torch has the classes, and has no
    weights of classes nor arguments of old."""
    given = isinstance(target, LazyTensor) or any(each is not None for each in further)
    if given or not lazy.recipe.wide:
        return False
    index, axis = lazy.recipe.index, lazy.recipe.axis
    return (
        not target.is_floating_point()
        and target.device == lazy.recipe.source.device
        and target.shape == index.shape
        and axis == min(1, index.dim())
    )


@handles("cross_entropy", "cross_entropy_loss", "nll_loss")
def _cross_entropy(
    func: Any,
    lazy: LazyTensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not _has_classes(lazy, target, weight, size_average, reduce):
        return NotImplemented
    scored = target != ignore_index
    log_probs = derived(lazy)
    if func.__name__ != "nll_loss":
        log_softmax = expressions.log_softmax(_unshifted(lazy.recipe.expression))
        log_probs = derived(lazy, log_softmax, dtype=_autocast(lazy))
    nll = -take(log_probs, target.masked_fill(~scored, 0))
    if label_smoothing:
        of_all = -_reduce(torch.mean, log_probs, dim=-1)
        nll = (1 - label_smoothing) * nll + label_smoothing * of_all
    return _reduced(nll, scored, reduction)


def _reduced(nll: Any, scored: Tensor, reduction: str) -> Any:
    """Losses of the rows, 0 where ignored, reduced as torch does."""
    if reduction not in ("none", "mean", "sum"):
        return NotImplemented
    losses = nll.score(scored).masked_fill(~scored, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / scored.sum() if reduction == "mean" else losses.sum()


@handles("register_hook")
def _register_hook(func: Any, lazy: LazyTensor, hook: Any) -> Any:
    """A wrapper's hook, which takes the time of a gradient and not its numbers, is hung on what is
    made of the logits; another one needs them."""
    module = getattr(getattr(hook, "__func__", hook), "__module__", "") or ""
    if not module.startswith(("torch.distributed", "torch.nn.parallel", "deepspeed", "accelerate")):
        return NotImplemented
    hooks = lazy.recipe.source.hooks
    handle = torch.utils.hooks.RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
