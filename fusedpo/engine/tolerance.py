"""The tolerance of a gradient: its limits, and what earlier calls with it have shown.

How many columns of the vocabulary matter depends on the model and on its text, and the error of
leaving the others out is measured after the fact. So each kind of call keeps a record, from which
the next one aims. A record decides how much work is done, never whether the tolerance holds: that
is measured in each backward.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.vocab_shards import VocabShard

LEAST_TOLERANCE = 1e-5
"""Of fp32: below it, the measured error would be rounding."""

# The first guesses, of a trained model of 50,000 tokens (benchmarks/compact.py prints what is
# measured): the share of its columns that a product takes, and the squared error of a gradient over
# the squares of what it left out
GUESSED_SHARE = 0.15
_GUESSED_COHERENCE = {"hidden": 2.0, "head": 0.2}

# coherence goes no further below the guess: what little is left out tells little of more
_LEAST = 64

# aimed at, as a part of the tolerance: the rest is for the noise of an estimate
_AIM = 0.8

# parts of the columns that are kept where nothing waits: no fewer than, and so much over what was
# needed last, as steps differ
_LEAST_PART, _ROOM = 1 / 16, 1.1

# calls by an exact route after which the columns of a model that had too many are looked at again
_PATIENCE = 64


def check_tolerance(tolerance: object, dtype: torch.dtype | None = None) -> float:
    """A tolerance as a float.

    Args:
        dtype: of the hidden states, if it is known.

    Raises:
        TypeError: unless it is a number.
        ValueError: unless it is 0, or from 1e-5 to below 1; or if it is above 0 in double
            precision.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise checks.bad_type("gradient_tolerance", "a number", type(tolerance).__name__)
    value = float(tolerance)
    if value == 0.0:
        return 0.0
    if not LEAST_TOLERANCE <= value < 1.0:
        raise checks.bad_value(
            "gradient_tolerance",
            f"0 (exact), or a relative error from {LEAST_TOLERANCE} to below 1",
            str(tolerance),
            "2e-3 is what rounding a gradient to bfloat16 costs",
        )
    if dtype == torch.float64:
        raise checks.bad_value(
            "gradient_tolerance", "0 in double precision", str(value), "use float32 or lower"
        )
    return value


@dataclass
class Seen:
    """What a backward has seen. Numbers, or on a device numbers yet to come.

    Attributes:
        rows: that had an upstream gradient.
        share: of the columns, that a product took.
        dropped: the probability that a row left out, a mean.
        left_out: of "hidden" and "head", the sum of squares that it left out, relative to its own.
        needed: of these, the share of columns that would be enough for the slab with the most.
        errors: of the gradients that were wanted, relative, as estimated.
    """

    rows: Any
    share: Any
    dropped: Any
    left_out: dict[str, Any]
    needed: dict[str, Any]
    errors: dict[str, Any]

    def tensor(self) -> Tensor:
        """All numbers in one tensor."""
        groups = (self.left_out, self.needed, self.errors)
        every = [v for each in groups for v in each.values()]
        first = self.rows, self.share, self.dropped
        return torch.stack([value.double().reshape(()) for value in (*first, *every)])

    def read(self, numbers: list[float]) -> Seen:
        """The same, with the numbers of ``tensor``."""
        left = iter(numbers)
        rows, share, dropped = next(left), next(left), next(left)
        groups = (self.left_out, self.needed, self.errors)
        return Seen(rows, share, dropped, *({name: next(left) for name in each} for each in groups))


@dataclass
class Record:
    """What the calls of one kind have shown.

    Attributes:
        tolerance: theirs.
        together: whether ranks decide by their records together, so that what one has read of the
            device the others have to have read too.
        share: the share of columns that a product took last, had its slabs been the smallest.
        coherence: of a gradient, its squared error over the squares of what it left out.
        needed: of a gradient, the share of columns that was enough for the slab with the most.
        parts: of a gradient, the part of the columns that the next backward keeps, where it cannot
            wait to be told how many matter: a sixteenth, or that doubled.
        errors: of a gradient, its relative error as estimated in the last backward.
        breaches: backwards whose estimate was above the tolerance. Where a backward waits for its
            estimate, it was made again, exactly; elsewhere the next call is exact.
        skipped: calls since the last one by ``compact``.
        known: whether any backward has been seen.
        kept: the share of columns that a product of the last backward took; 1 of an exact one.
        dropped: the probability that its rows left out, a mean.
    """

    tolerance: float
    together: bool = False
    share: float = GUESSED_SHARE
    coherence: dict[str, float] = field(default_factory=_GUESSED_COHERENCE.copy)
    needed: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=lambda: {"hidden": 0.5, "head": 0.5})
    errors: dict[str, float] = field(default_factory=dict)
    breaches: int = 0
    skipped: int = 0
    known: bool = False
    kept: float = 1.0
    dropped: float = 0.0
    _breached: bool = False
    _went_exactly: bool = False
    _coming: list[tuple[Seen, float, Tensor, Any]] = field(default_factory=list)

    def allowed(self, gradient: str) -> float:
        """The sum of squares that a gradient may leave out, relative to its own."""
        return (_AIM * self.tolerance) ** 2 / self.coherence[gradient]

    def capacities(self, vocab: int, slab: int) -> dict[str, int]:
        """How many of V columns the next backward keeps, where it cannot wait to be told; every
        target of a slab has room."""

        def columns(gradient: str) -> int:
            return min(vocab, max(slab, math.ceil(self.parts[gradient] * vocab)))

        hidden, head = columns("hidden"), columns("head")
        return {"hidden": max(hidden, head), "head": head}

    def _change_parts(self) -> None:
        """Up as far as needed, and down by a half, where the error leaves room for what that does:
        it is multiplied by 2 to 3."""
        for name, error in self.errors.items():
            part = self.parts[name]
            needed = _LEAST_PART
            while needed < min(1.0, _ROOM * self.needed.get(name, 0.0)):
                needed *= 2
            if not error <= self.tolerance:
                part = min(1.0, 2 * part)
            elif error <= self.tolerance / 4:
                part = max(_LEAST_PART, part / 2)
            self.parts[name] = max(part, needed)

    def next_call(self) -> tuple[float, float]:
        """The tolerance of the next call, and the share of columns that it will take."""
        if self.owes_exact():
            return 0.0, self.share
        rested = self.skipped >= _PATIENCE
        return self.tolerance, min(self.share, GUESSED_SHARE) if rested else self.share

    def owes_exact(self) -> bool:
        """Whether this call is to be exact, as the last backward was found not to be within the
        tolerance when it was over; True once."""
        self._catch_up()
        breached, self._breached = self._breached, False
        return breached

    def skip(self) -> None:
        """Note a call that goes another way, whose gradients are exact."""
        self._catch_up()
        self.skipped += 1
        self._went_exactly = True

    def note(self, seen: Seen, growth: float) -> bool:
        """Note a backward; whether its gradients are within the tolerance.

        Args:
            growth: of the share, with the slabs of this backward over the smallest.
        """
        self.skipped, self._went_exactly = 0, False
        self.kept, self.dropped, self.errors = seen.share, seen.dropped, seen.errors
        # a gradient of zeros, or of what is no number, tells nothing of the next one
        if seen.rows and not any(map(math.isnan, seen.errors.values())):
            self._learn(seen, growth)
        within = all(error <= self.tolerance for error in seen.errors.values())
        self.breaches += not within
        return within

    def _learn(self, seen: Seen, growth: float) -> None:
        self.share, self.needed, self.known = min(1.0, seen.share / growth), seen.needed, True
        for name, error in seen.errors.items():
            if not math.isfinite(error):
                continue
            floor = _GUESSED_COHERENCE[name] / _LEAST
            if seen.left_out[name] > 0:
                found = max(error**2 / seen.left_out[name], floor)
            else:  # nothing is seen where all is kept, and it would stay so
                found = max(min(_GUESSED_COHERENCE[name], self.coherence[name]) / 4, floor)
            # up at once, down slowly: too much kept costs time, too little a backward
            self.coherence[name] = max(found, self.coherence[name] ** (2 / 3) * found ** (1 / 3))
        self._change_parts()

    def note_later(self, seen: Seen, growth: float) -> None:
        """Note a backward whose numbers the device has yet to make, without waiting for them."""
        numbers = seen.tensor()
        host, arrived = numbers, None
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._coming.append((seen, growth, host, arrived))

    def _catch_up(self) -> None:
        """Take what the calls before this one have shown, as far as it has arrived."""
        if self._went_exactly:
            self.kept, self.dropped, self.errors = 1.0, 0.0, {}
            self._went_exactly = False
        while self._coming:
            seen, growth, host, arrived = self._coming[0]
            if arrived is not None and self.together:
                arrived.synchronize()
            if arrived is not None and not arrived.query():
                break
            del self._coming[0]
            self._breached |= not self.note(seen.read(host.tolist()), growth)

    def metrics(self) -> dict[str, float]:
        """What the last backward left out, by the names that are logged."""
        return {
            "head/columns_kept": self.kept,
            "head/dropped_mass": self.dropped,
            "head/gradient_error": max(self.errors.values(), default=0.0),
            "head/breaches": float(self.breaches),
        }


# of a process alone, and of the ranks that share a vocabulary: what one of them does alone is not
# to change, nor to push out, a record by which all decide
_records: dict[tuple[int, ...] | None, dict[tuple[object, ...], Record]] = {}
_MOST_RECORDS = 64
# backwards may run in threads of their own
_lock = threading.Lock()


def record_of(
    tolerance: float, device: str, vocab: int, width: int, shard: VocabShard | None = None
) -> Record:
    """The record of the calls of a kind, by all that tells kinds apart.

    Args:
        device: the type of it.
        vocab: entries of the head, of the largest slice.
        shard: of the vocabulary.
    """
    key, ranks = (tolerance, device, vocab, width), None if shard is None else shard.ranks
    with _lock:
        records = _records.setdefault(ranks, {})
        found = records.pop(key, None) or Record(tolerance, together=ranks is not None)
        records[key] = found
        if len(records) > _MOST_RECORDS:
            records.pop(next(iter(records)))
    return found


def forget() -> None:
    """Forget all records, as for a model that is unlike the last."""
    with _lock:
        _records.clear()
