"""Expressions in a row of logits, and which of them the engine knows.

An expression is a function of one row of the head's output. It is wide, with a number for each
entry of the vocabulary (the logits themselves, their softmax), or narrow, with one number a row
(the log-probability of a label, the entropy). Rows never meet, so an expression can be evaluated on
any rows at a time.

Letters: R rows of the source, n rows at hand, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# of a row without a label: no vocabulary has it, nor does any program use it for another purpose
NO_LABEL = -(2**31)


@dataclass(frozen=True, eq=False)
class RowValues:
    """Numbers of some rows of the source, such as their labels.

    Attributes:
        pieces: which rows, [n] int64 on the CPU, and their numbers [n] or [n, k], on any device.
    """

    pieces: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, rows: Tensor, values: Tensor) -> RowValues:
        """values shaped like rows; copied, as a caller may change them."""
        return cls(((rows.reshape(-1), values.detach().reshape(-1).clone()),))

    def at(self, rows: Tensor) -> RowValues:
        """Those of some rows [n] alone."""
        if all(torch.equal(mine, rows) for mine, _ in self.pieces):
            return self
        pieces = []
        for mine, values in self.pieces:
            keep = torch.isin(mine, rows)
            pieces.append((mine[keep], values[keep.to(values.device)]))
        return RowValues(tuple(pieces))

    def positive(self) -> bool:
        """Whether they are finite and above 0. Waits for the device."""
        return all(bool(((v > 0) & v.isfinite()).all()) for _, v in self.pieces)

    def full(self, count: int, device: torch.device, fill: float = 0) -> Tensor:
        """[R], with the fill elsewhere."""
        first = self.pieces[0][1]
        shape = (count, *first.shape[1:])
        out = torch.full(shape, fill, dtype=first.dtype, device=device)
        for rows, values in self.pieces:
            out[rows.to(device)] = values.to(device)
        return out

    def same(self, other: RowValues) -> bool:
        """Whether both are known to hold the same, without a look at the device."""
        return self is other or (
            len(self.pieces) == len(other.pieces)
            and all(
                a[1] is b[1] and torch.equal(a[0], b[0])
                for a, b in zip(self.pieces, other.pieces, strict=True)
            )
        )


@dataclass(frozen=True, eq=False)
class Expression:
    """An operation on the values of other expressions.

    Attributes:
        name: of the operation.
        inputs: expressions, or numbers.
        rows: numbers of each row that it takes besides: labels, say.
        wide: whether it has a number for each entry of the vocabulary.
        function: evaluates it: from the inputs' values, and ``rows`` as [n].
    """

    name: str
    inputs: tuple[Expression | float, ...] = ()
    rows: RowValues | None = None
    wide: bool = True
    function: Callable[..., Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Logits(Expression):
    """The head's output z with what was done to it: softcap tanh(z / softcap) scale.

    Attributes:
        softcap: above 0, or None.
        scale: above 0; one number, or one a row (as a factor, or as a divisor).
    """

    name: str = "logits"
    softcap: float | None = None
    scale: float = 1.0
    divisor: RowValues | None = field(default=None)

    def same(self, other: Expression | float) -> bool:
        """Whether both are the same function."""
        return self is other or (
            isinstance(other, Logits)
            and self.softcap == other.softcap
            and self.scale == other.scale
            and (
                self.divisor is other.divisor
                if self.divisor is None or other.divisor is None
                else self.divisor.same(other.divisor)
            )
        )


def evaluate(
    expression: Expression | float,
    z: Tensor,
    rows: Tensor,
    count: int,
    memo: dict[int, Any] | None = None,
) -> Any:
    """The value for some rows: [n, V] of a wide expression, [n] of a narrow one.

    Args:
        z: [n, V], the head's output.
        rows: [n] int64, which rows of the source, on z's device.
        count: R.
    """
    if not isinstance(expression, Expression):
        return expression
    memo = {} if memo is None else memo
    if id(expression) in memo:
        return memo[id(expression)]
    if isinstance(expression, Logits):
        value = z
        if expression.softcap is not None:
            value = expression.softcap * torch.tanh(value / expression.softcap)
        if expression.scale != 1.0:
            value = value * expression.scale
        if expression.divisor is not None:
            divisor = expression.divisor.full(count, z.device, fill=1.0)[rows]
            value = value / divisor.to(z.dtype)[:, None]
    else:
        assert expression.function is not None, "only the logits have no function"
        values = [evaluate(each, z, rows, count, memo) for each in expression.inputs]
        if expression.wide:  # one number a row meets a row of numbers
            values = [v[:, None] if isinstance(v, Tensor) and v.dim() == 1 else v for v in values]
        if expression.rows is not None:
            values.append(expression.rows.full(count, z.device)[rows])
        value = expression.function(*values)
    memo[id(expression)] = value
    return value


def leaves(expression: Expression | float) -> Iterator[Logits]:
    """The logits that an expression is made of."""
    if isinstance(expression, Logits):
        yield expression
    elif isinstance(expression, Expression):
        for each in expression.inputs:
            yield from leaves(each)


# building, with what is the same said in one way


def scaled(expression: Expression, factor: float) -> Expression:
    """A wide expression times a number."""
    if isinstance(expression, Logits) and factor > 0 and 0 < expression.scale * factor < math.inf:
        return Logits(
            softcap=expression.softcap,
            scale=expression.scale * factor,
            divisor=expression.divisor,
        )
    return Expression("mul", (expression, factor), function=torch.mul, wide=expression.wide)


def divided(expression: Expression, divisor: RowValues) -> Expression:
    """A wide expression over one number a row."""
    # the engine divides by temperatures, which are above 0
    if isinstance(expression, Logits) and expression.divisor is None and divisor.positive():
        return Logits(softcap=expression.softcap, scale=expression.scale, divisor=divisor)
    return Expression(
        "div",
        (expression,),
        rows=divisor,
        function=lambda value, rows: value / rows.to(value.dtype)[:, None],
    )


def tanh(expression: Expression) -> Expression:
    """The hyperbolic tangent: of uncapped logits it is a soft cap."""
    if isinstance(expression, Logits) and expression.softcap is None and expression.divisor is None:
        return Logits(softcap=1 / expression.scale, scale=expression.scale)
    return Expression("tanh", (expression,), function=torch.tanh, wide=expression.wide)


def log_softmax(expression: Expression) -> Expression:
    if expression.name == "log_softmax":  # which is normalised already
        return expression
    return Expression("log_softmax", (expression,), function=lambda value: value.log_softmax(-1))


def softmax(expression: Expression) -> Expression:
    if expression.name == "log_softmax":
        (expression,) = expression.inputs  # type: ignore[assignment]
    return Expression("softmax", (expression,), function=lambda value: value.softmax(-1))


def exp(expression: Expression) -> Expression:
    if expression.name == "log_softmax":
        return softmax(expression)
    return Expression("exp", (expression,), function=torch.exp, wide=expression.wide)


def log(expression: Expression) -> Expression:
    if expression.name == "softmax":
        return log_softmax(expression.inputs[0])  # type: ignore[arg-type]
    return Expression("log", (expression,), function=torch.log, wide=expression.wide)


def subtracted(a: Expression | float, b: Expression | float) -> Expression:
    """a - b; of logits and their logsumexp, the log-probabilities."""
    wide = is_wide(a) or is_wide(b)
    if (
        isinstance(a, Logits)
        and isinstance(b, Expression)
        and b.name == "logsumexp"
        and a.same(b.inputs[0])
    ):
        return log_softmax(a)
    return Expression("sub", (a, b), function=torch.sub, wide=wide)


def gathered(expression: Expression, labels: RowValues) -> Expression:
    """The entry of each row's label."""

    def gather(value: Tensor, rows: Tensor) -> Tensor:
        return value.gather(-1, rows.long()[:, None])[:, 0]

    return Expression("gather", (expression,), rows=labels, wide=False, function=gather)


def reduced(name: str, expression: Expression, function: Callable[[Tensor], Tensor]) -> Expression:
    """A reduction of each row to one number."""
    return Expression(name, (expression,), wide=False, function=function)


def is_wide(value: Expression | float) -> bool:
    return isinstance(value, Expression) and value.wide


def merged(
    expressions: Sequence[Expression | float], rows: Sequence[Tensor]
) -> Expression | float | None:
    """One expression for rows of several, which differ only in the numbers of their rows; None if
    they are different functions.

    Args:
        rows: of each expression, [n] int64 on the CPU: it may have numbers of further ones.
    """
    first = expressions[0]
    if all(each is first for each in expressions):
        return first
    if not isinstance(first, Expression):
        return first if all(each == first for each in expressions) else None
    others: list[Expression] = []
    for each in expressions:
        if not isinstance(each, Expression) or each.name != first.name:
            return None
        others.append(each)
    if isinstance(first, Logits):
        return first if all(first.same(each) for each in others) else None
    if any(
        len(each.inputs) != len(first.inputs) or (each.rows is None) != (first.rows is None)
        for each in others
    ):
        return None
    if first.name not in NAMED and any(each.function is not first.function for each in others):
        return None
    inputs = [merged(group, rows) for group in zip(*(each.inputs for each in others), strict=True)]
    if any(each is None for each in inputs):
        return None
    values = None
    if first.rows is not None:
        parts = [e.rows.at(r) for e, r in zip(others, rows, strict=True) if e.rows is not None]
        values = RowValues(tuple(piece for part in parts for piece in part.pieces))
    return Expression(first.name, tuple(inputs), values, first.wide, first.function)  # type: ignore[arg-type]


# operations whose name says all of them, so that two with one name are one function
NAMED = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "exp", "log", "tanh", "eq"),
        *("log_softmax", "softmax", "gather", "argmax", "logsumexp", "mean", "sum"),
    )
)
