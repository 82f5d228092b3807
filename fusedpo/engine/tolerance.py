"""The tolerance of a gradient: its limits, and what earlier calls with it have shown.

How many columns of the vocabulary matter depends on the model and on its text, and the error of
leaving the others out is measured after the fact. So each kind of call keeps a record, from which
the next one aims. A record decides how much work is done, never whether the tolerance holds: that
is measured in each backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real

import torch

from fusedpo import checks

LEAST_TOLERANCE = 1e-5
"""Of fp32: below it, the measured error would be rounding."""

# The first guesses, of a trained model of 50,000 tokens (benchmarks/compact.py prints what is
# measured): the share of its columns that a product takes, and the squared error of a gradient over
# the squares of what it left out
GUESSED_SHARE = 0.15
_GUESSED_COHERENCE = {"hidden": 2.0, "head": 0.2}

# aimed at, as a part of the tolerance: the rest is for the noise of an estimate
_AIM = 0.8

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
class Record:
    """What the calls of one kind have shown.

    Attributes:
        tolerance: theirs.
        share: the share of columns that a product took last.
        coherence: of a gradient, its squared error over the squares of what it left out.
        errors: of a gradient, its relative error as estimated in the last backward.
        breaches: backwards whose estimate was above the tolerance, and that were done exactly.
        skipped: calls since the last one by ``compact``.
        kept: the share of columns that a product of the last backward took; 1 of an exact one.
        dropped: the probability that its rows left out, a mean.
    """

    tolerance: float
    share: float = GUESSED_SHARE
    coherence: dict[str, float] = field(default_factory=_GUESSED_COHERENCE.copy)
    errors: dict[str, float] = field(default_factory=dict)
    breaches: int = 0
    skipped: int = 0
    kept: float = 1.0
    dropped: float = 0.0

    def allowed(self, gradient: str) -> float:
        """The sum of squares that a gradient may leave out, relative to its own."""
        return (_AIM * self.tolerance) ** 2 / self.coherence[gradient]

    def expected_share(self) -> float:
        """The share of columns that the next call will take."""
        return min(self.share, GUESSED_SHARE) if self.skipped >= _PATIENCE else self.share

    def skip(self) -> None:
        """Note a call that went another way, whose gradients are exact."""
        self.skipped += 1
        self.kept, self.dropped, self.errors = 1.0, 0.0, {}

    def note(
        self,
        share: float,
        left_out: dict[str, float],
        errors: dict[str, float],
        *,
        kept: float,
        dropped: float,
    ) -> bool:
        """Note a backward; whether its gradients are within the tolerance.

        Args:
            share: of the columns, that a product would have taken with the smallest slabs.
            left_out: the sum of squares that a gradient left out, relative to its own.
            errors: of each gradient, relative, as estimated.
            kept: of the columns, the share that a product took.
            dropped: the probability that a row left out, a mean.
        """
        self.share, self.errors, self.skipped = share, errors, 0
        self.kept, self.dropped = kept, dropped
        for name, error in errors.items():
            if not math.isfinite(error):
                continue
            # where nothing was left out, nothing is seen: towards the guess, or it would stay so
            seen = min(_GUESSED_COHERENCE[name], self.coherence[name])
            if left_out[name] > 0:
                seen = max(error**2 / left_out[name], 1e-6)
            # up at once, down slowly: too much kept costs time, too little a backward
            self.coherence[name] = max(seen, math.sqrt(self.coherence[name] * seen))
        within = all(error <= self.tolerance for error in errors.values())
        self.breaches += not within
        return within

    def metrics(self) -> dict[str, float]:
        """What the last backward left out, by the names that are logged."""
        return {
            "head/columns_kept": self.kept,
            "head/dropped_mass": self.dropped,
            "head/gradient_error": max(self.errors.values(), default=0.0),
            "head/breaches": float(self.breaches),
        }


_records: dict[tuple[object, ...], Record] = {}
_MOST_RECORDS = 64


def record_of(tolerance: float, *kind: object) -> Record:
    """The record of the calls of a kind, by all that tells kinds apart."""
    key = (tolerance, *kind)
    found = _records.pop(key, None) or Record(tolerance)
    _records[key] = found
    while len(_records) > _MOST_RECORDS:
        _records.pop(next(iter(_records)))
    return found


def forget() -> None:
    """Forget all records, as for a model that is unlike the last."""
    _records.clear()
