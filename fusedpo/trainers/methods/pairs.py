"""Pairs as they are in the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedpo.losses import Loss
from fusedpo.trainers.methods.base import Method


@dataclass(frozen=True)
class Pairs(Method):
    """Pairs as they are in the dataset."""

    losses: ClassVar[tuple[type[Loss], ...]] = (Loss,)
    comparable: ClassVar[bool] = True
