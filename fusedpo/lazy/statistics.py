"""Which expressions are sums of the engine's statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpo.lazy.expressions import Expression, Logits, RowValues


@dataclass(frozen=True)
class Combination:
    """A narrow expression as a weighted sum of the engine's statistics.

    Attributes:
        logits: whose.
        labels: of the rows, if a statistic takes them.
        weights: by the statistic's name.
        constant: that is added.
    """

    logits: Logits
    labels: RowValues | None
    weights: dict[str, float]
    constant: float = 0.0

    @property
    def has_gradient(self) -> bool:
        """Whether the statistics pass a gradient on, or never have one."""
        names = {*self.weights}
        return names <= {"logprob", "entropy", "top1"} or (
            names == {"mean_logit"} and self.logits.softcap is None
        )

    def total(self, stats: dict[str, Tensor]) -> Tensor:
        """The value, of the statistics' values."""
        if "top1" in stats:  # a bool, which nothing is added to
            return stats["top1"]
        total = torch.stack([stats[name] * w for name, w in self.weights.items()]).sum(0)
        return total + self.constant if self.constant else total

    def times(self, factor: float) -> Combination:
        weights = {name: weight * factor for name, weight in self.weights.items()}
        return Combination(self.logits, self.labels, weights, self.constant * factor)

    def plus(self, other: Combination) -> Combination | None:
        """The sum; None where the two are of other logits, or of other labels."""
        if not self.logits.same(other.logits):
            return None
        labels = self.labels or other.labels
        if labels and other.labels and not labels.same(other.labels):
            return None
        weights = dict(self.weights)
        for name, weight in other.weights.items():
            weights[name] = weights.get(name, 0.0) + weight
        weights = {name: weight for name, weight in weights.items() if weight != 0.0}
        return Combination(self.logits, labels, weights, self.constant + other.constant)


def combination(expression: Expression | float, vocab: int) -> Combination | None:
    """The engine's statistics that make up a narrow expression, or None."""
    if not isinstance(expression, Expression) or expression.wide:
        return None
    parts = expression.inputs
    if expression.name == "gather":
        return _of_label(parts[0], expression.rows)
    if expression.name == "logsumexp" and isinstance(parts[0], Logits):
        return Combination(parts[0], None, {"logsumexp": 1.0})
    if expression.name in ("sum", "mean"):
        combined = _of_sum(parts[0], vocab)
        if combined is None or expression.name == "sum":
            return combined
        return combined.times(1 / vocab)
    if expression.name == "eq":
        return _of_match(parts[0], expression.rows)
    if expression.name in ("neg", "mul", "add", "sub"):
        combined = _of_arithmetic(expression, vocab)
        return combined if combined and combined.weights else None
    return None


def _of_label(expression: Expression | float, labels: RowValues | None) -> Combination | None:
    if isinstance(expression, Logits):
        return Combination(expression, labels, {"logprob": 1.0, "logsumexp": 1.0})
    logits = _log_probs_of(expression)
    return None if logits is None else Combination(logits, labels, {"logprob": 1.0})


def _log_probs_of(expression: Expression | float) -> Logits | None:
    """The logits whose log-probabilities these are."""
    if isinstance(expression, Expression) and expression.name == "log_softmax":
        child = expression.inputs[0]
        return child if isinstance(child, Logits) else None
    return None


def _of_sum(expression: Expression | float, vocab: int) -> Combination | None:
    if isinstance(expression, Logits):
        return Combination(expression, None, {"mean_logit": float(vocab)})
    if (logits := _log_probs_of(expression)) is not None:
        return Combination(logits, None, {"mean_logit": float(vocab), "logsumexp": -float(vocab)})
    if not isinstance(expression, Expression):
        return None
    if expression.name == "neg":
        of_positive = _of_sum(expression.inputs[0], vocab)
        return None if of_positive is None else of_positive.times(-1.0)
    if expression.name != "mul":
        return None
    for one, other in (expression.inputs, expression.inputs[::-1]):
        if isinstance(one, Expression) and one.name == "neg":
            product = Expression("mul", (one.inputs[0], other))
            of_positive = _of_sum(product, vocab)
            return None if of_positive is None else of_positive.times(-1.0)
    for p, other in (expression.inputs, expression.inputs[::-1]):
        if not isinstance(p, Expression) or p.name != "softmax":
            continue
        of_p = p.inputs[0]
        if not isinstance(of_p, Logits):
            continue
        log_probs = _log_probs_of(other)
        if log_probs is not None and of_p.same(log_probs):
            return Combination(of_p, None, {"entropy": -1.0})
        if of_p.same(other):
            return Combination(of_p, None, {"logsumexp": 1.0, "entropy": -1.0})
    return None


def _of_match(expression: Expression | float, labels: RowValues | None) -> Combination | None:
    if not isinstance(expression, Expression) or expression.name != "argmax":
        return None
    child = expression.inputs[0]
    if isinstance(child, Expression) and child.name in ("log_softmax", "softmax"):
        child = child.inputs[0]
    return Combination(child, labels, {"top1": 1.0}) if isinstance(child, Logits) else None


def _of_arithmetic(expression: Expression, vocab: int) -> Combination | None:
    numbers = [each for each in expression.inputs if not isinstance(each, Expression)]
    combined = [combination(e, vocab) for e in expression.inputs if isinstance(e, Expression)]
    parts = [each for each in combined if each is not None]
    if len(parts) != len(combined) or expression.rows is not None:
        return None
    if any("top1" in part.weights for part in parts):
        return None
    if expression.name == "neg":
        return parts[0].times(-1.0)
    if expression.name == "mul":
        return parts[0].times(numbers[0]) if len(parts) == 1 else None
    sign = -1.0 if expression.name == "sub" else 1.0
    if len(parts) == 2:
        return parts[0].plus(parts[1].times(sign))
    if isinstance(expression.inputs[0], Expression):
        first, constant = parts[0], sign * numbers[0]
    else:
        first, constant = parts[0].times(sign), numbers[0]
    return Combination(first.logits, first.labels, first.weights, first.constant + constant)
