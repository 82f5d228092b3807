"""The source of lazy logits: the states that fed one call of a head, and the head.

Letters: R rows of the source, n rows at hand, V vocabulary, H hidden size.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fusedpo import checks
from fusedpo.devices import as_device
from fusedpo.engine.precision import accumulated_dtype
from fusedpo.engine.rows import blocks
from fusedpo.engine.stats import TokenStats
from fusedpo.functional import linear_token_stats
from fusedpo.head import Head
from fusedpo.lazy.expressions import NO_LABEL, Expression, Logits, evaluate
from fusedpo.lazy.gradients import ByChunks, ScoredEntropy
from fusedpo.lazy.statistics import Combination, combination
from fusedpo.model_head.score import uncapped_mean_logits
from fusedpo.sizes import parse_budget

# tensors as wide as the vocabulary that an expression may hold at a time, with its gradient
_WIDE_TENSORS = 8


@dataclass(frozen=True)
class Options:
    """The options of ``lazy_logits``, as of it."""

    memory_budget: int | float | str | None = None
    backend: str = "auto"
    unknown: str = "warn"
    gradient_tolerance: float = 0.0


@dataclass
class Pass:
    """Statistics of some rows that were scored together.

    Attributes:
        logits: whose statistics.
        rows: [R] bool.
        labels: [R] int64, those of the rows.
        stats: [R] each, by name; 0 elsewhere.
        differentiable: whether the log-probability passes a gradient on.
    """

    logits: Logits
    rows: Tensor
    labels: Tensor
    stats: dict[str, Tensor]
    differentiable: bool


class Source:
    """What one call of a head was given, in place of its output.

    Args:
        hidden: [..., H], the input of the head.
        head: weight and bias, whole and on this device.
        options: of ``lazy_logits``.

    Attributes:
        calls: how often anything was scored, of all sources.
        hidden: [R, H].
        dtype: of the head's output, also under autocast.
        requires_grad: whether the output would.
        pending: narrow lazy tensors that nobody has asked a number of so far.
        severed: those without a gradient, though the logits have one: what a program keeps to read.
        hooks: functions that wrappers have hung on the output's gradient.
    """

    calls: ClassVar[int] = 0

    def __init__(self, hidden: Tensor, head: Head, options: Options) -> None:
        self.head, self.options = head, options
        self.device = hidden.device
        kind = hidden.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.dtype = self.autocast[1] if self.autocast[0] else hidden.dtype
        tensors = (hidden, head.weight, head.bias)
        self.requires_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.count, self.vocab = self.hidden.shape[0], head.weight.shape[0]
        self.versions = _versions(self.hidden, head.weight, head.bias)
        self.pending: weakref.WeakSet[Any] = weakref.WeakSet()
        self.severed: list[weakref.ref[Any]] = []
        self.passes: list[Pass] = []
        self.hooks: OrderedDict[int, Callable[[Tensor], Any]] = OrderedDict()

    def at(self, rows: Tensor) -> Source:
        """Another source, of these rows [n]: for rows that are repeated."""
        with torch.set_grad_enabled(self.requires_grad):
            source = Source(self.hidden[rows.to(self.device)], self.head, self.options)
        source.hooks = self.hooks
        return source

    def tensors(self, *, grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias; without gradients, detached.

        Raises:
            RuntimeError: where a wrapper has freed the weight since.
        """
        weight, bias = self.head.weight, self.head.bias
        if self.versions != _versions(self.hidden, weight, bias):
            raise RuntimeError(
                "lazy logits: the hidden states or the head have been changed in place since, by "
                "an optimizer's step for example; read what is kept of them before"
            )
        if weight.shape != (self.vocab, self.hidden.shape[1]) or (
            weight.numel() and weight.device.type != "meta" and not weight.untyped_storage().size()
        ):
            raise RuntimeError(
                str(
                    checks.bad_value(
                        "model",
                        "a head whose weight is whole after its forward, for lazy logits",
                        "one that its wrapper (FSDP, ZeRO-3) has freed",
                        "keep the head in the root unit with reshard_after_forward=False (FSDP), "
                        "or score within the head's own call: add_fused_head, and "
                        "fusedpo.lazy.at_head.with_lazy_logits",
                    )
                )
            )
        if grad:
            return self.hidden, weight, bias
        return self.hidden.detach(), weight.detach(), None if bias is None else bias.detach()

    @contextlib.contextmanager
    def as_called(self) -> Iterator[None]:
        """The autocast of the head's call."""
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            yield

    def hooked(self, value: Tensor) -> Tensor:
        """A result, with the hooks of wrappers on its gradient."""
        if value.requires_grad:
            for hook in self.hooks.values():
                value.register_hook(lambda g, hook=hook: (hook(g), None)[1])  # type: ignore[no-untyped-call]
        return value

    # the logits

    def logits(self, rows: Tensor | None, expression: Expression, *, grad: bool) -> Tensor:
        """[n, V], a wide expression's values of rows [n], or of all; as a program makes them that
        makes all logits."""
        hidden, weight, bias = self.tensors(grad=grad)
        with self.as_called():
            z = functional.linear(hidden if rows is None else hidden[rows], weight, bias)
        if isinstance(expression, Logits) and expression.same(Logits()):
            return z
        if rows is None:
            rows = torch.arange(self.count, device=self.device)
        wide = z if z.dtype == torch.float64 else z.float()
        return evaluate(expression, wide, rows, self.count)

    # any expression, a few rows at a time

    def chunks(self, rows: Tensor) -> Iterator[tuple[int, int]]:
        """Ranges of rows [n] whose logits fit the budget."""
        default = as_device(self.device).budget
        budget = parse_budget(self.options.memory_budget, default=default)
        step = max(1, budget // (_WIDE_TENSORS * self.vocab * 4))
        return blocks(0, rows.shape[0], step)

    def by_chunks(self, expression: Expression, rows: Tensor, *, grad: bool) -> Tensor:
        """[n] or [n, k], a narrow expression's values of rows [n], exact and in bounded memory. A
        gradient costs three products."""
        if grad:
            tensors = self.tensors(grad=True)
            return ByChunks.apply(*tensors, self, expression, rows)  # type: ignore[no-untyped-call]
        parts = []
        with torch.no_grad():
            for start, stop in self.chunks(rows):
                part = rows[start:stop]
                z = self.logits(part, Logits(), grad=False)
                z = z if z.dtype == torch.float64 else z.float()
                parts.append(evaluate(expression, z, part, self.count))
            if not parts:
                z = self.hidden.new_zeros(0, self.vocab)
                parts.append(evaluate(expression, z.float(), rows, self.count))
        return torch.cat(parts)

    # the engine's statistics

    def statistics(self, combined: Combination, rows: Tensor, *, grad: bool) -> dict[str, Tensor]:
        """[R] each of the statistics of a combination, for rows [R] bool; 0 or anything elsewhere.

        A row that an earlier pass has scored is not scored again, and one pass over the head serves
        whatever is pending for the same logits too.
        """
        if {*combined.weights} == {"mean_logit"} and combined.logits.softcap is None:
            return {"mean_logit": self._mean_logit(combined.logits, grad=grad)}
        names = set(combined.weights)
        labels = None
        if combined.labels is not None:
            labels = combined.labels.full(self.count, self.device).long()
        # under activation checkpointing, which saves the same tensors when it does all again
        alone = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        parts: list[tuple[Pass, Tensor]] = []
        for earlier in [] if alone else self.passes:
            if (
                earlier.logits.same(combined.logits)
                and names <= {*earlier.stats}
                and (earlier.differentiable or not grad or names <= {"entropy"})
                and bool((here := rows & _scored(earlier, labels)).any())  # waits for the device
            ):
                parts.append((earlier, here))
                rows = rows & ~here
        if parts and not bool(rows.any()):
            return self._joined(parts, names, grad=grad)
        for other in [] if alone else [*self.pending]:
            also = combination(other.expression, self.vocab)
            if also is None or not also.logits.same(combined.logits):
                continue
            if also.labels is not None:
                theirs = also.labels.full(self.count, self.device).long()
                if labels is None:
                    labels = theirs
                elif bool(((labels != theirs) & rows).any()):
                    continue
            names |= {*also.weights}
        scored = self._score(combined.logits, names, rows, labels, grad=grad)
        if not alone:
            self.passes.append(scored)
        return self._joined([*parts, (scored, rows)], [*combined.weights], grad=grad)

    def _score(
        self, logits: Logits, names: set[str], rows: Tensor, labels: Tensor | None, *, grad: bool
    ) -> Pass:
        """Score rows by the engine."""
        if labels is None:
            labels = torch.zeros(self.count, dtype=torch.long, device=self.device)
        # a row without a label is scored too: only that no token is its label
        unlabelled = labels == NO_LABEL
        with torch.set_grad_enabled(grad):
            tensors = self.tensors(grad=grad)
            masked = labels.masked_fill(unlabelled, 0).masked_fill(~rows, NO_LABEL)
            stats = self.token_stats(tensors, logits, masked, sorted(names), ("logprob",))
        values = {name: getattr(stats, name) for name in names}
        if "top1" in values:
            values["top1"] = values["top1"] & ~unlabelled
        return Pass(logits, rows, labels, values, grad)

    def token_stats(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        logits: Logits,
        labels: Tensor,
        names: list[str],
        differentiable: tuple[str, ...],
    ) -> TokenStats:
        """Statistics [R] of hidden, weight and bias, with what follows this source's head."""
        hidden, weight, bias = tensors
        temperature: float | Tensor = 1.0
        if logits.divisor is not None:
            temperature = logits.divisor.full(self.count, self.device, fill=1.0).to(
                accumulated_dtype(hidden.dtype)
            )
        Source.calls += 1
        with self.as_called():
            return linear_token_stats(
                hidden,
                Head(weight, bias, logits.softcap, logits.scale),
                labels,
                ignore_index=NO_LABEL,
                stats=names,
                differentiable=differentiable,
                temperature=temperature,
                memory_budget=self.options.memory_budget,
                backend=self.options.backend,
                gradient_tolerance=self.options.gradient_tolerance,
            )

    def _mean_logit(self, logits: Logits, *, grad: bool) -> Tensor:
        """[R], the mean of logits without a soft cap, which takes no product."""
        hidden, weight, bias = self.tensors(grad=grad)
        mean = uncapped_mean_logits(hidden, Head(weight, bias, None, logits.scale))
        if logits.divisor is not None:
            mean = mean / logits.divisor.full(self.count, self.device, fill=1.0).to(mean.dtype)
        return mean

    def _joined(
        self, parts: Sequence[tuple[Pass, Tensor]], names: Iterable[str], *, grad: bool
    ) -> dict[str, Tensor]:
        """[R] each of the statistics of passes, each pass's in rows [R] bool."""
        (first, _), *others = parts
        values = {name: self._value(first, name, grad=grad) for name in names}
        for scored, rows in others:
            for name, value in values.items():
                values[name] = torch.where(rows, self._value(scored, name, grad=grad), value)
        return values

    def _value(self, scored: Pass, name: str, *, grad: bool) -> Tensor:
        value = scored.stats[name]
        if not grad:
            return value.detach()
        if name != "entropy":
            return value
        tensors = self.tensors(grad=True)
        return ScoredEntropy.apply(*tensors, self, scored)  # type: ignore[no-untyped-call]


def _versions(*tensors: Tensor | None) -> list[int | None]:
    """How often tensors were changed in place, where torch counts it."""
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def _scored(earlier: Pass, labels: Tensor | None) -> Tensor:
    """[R] bool, the rows that a pass has scored with these labels."""
    return earlier.rows if labels is None else earlier.rows & (labels == earlier.labels)
