"""What is measured: shapes, cases, and the inputs made from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """``pairs`` pairs of ``tokens`` tokens a side, before a head of ``vocab`` x ``hidden``."""

    pairs: int
    tokens: int
    hidden: int
    vocab: int

    @property
    def positions(self) -> int:
        return 2 * self.pairs * self.tokens

    def __str__(self) -> str:
        return (
            f"N {self.positions} ({self.pairs} pairs x 2 x {self.tokens}), "
            f"H {self.hidden}, V {self.vocab}"
        )

    @classmethod
    def parse(cls, text: str, pairs: int = 2) -> Shape:
        """From ``"N,H,V"``; N is cut into two pairs."""
        positions, hidden, vocab = (int(part) for part in text.split(","))
        if positions % (2 * pairs):
            raise ValueError(
                f"N: expected a multiple of {2 * pairs} ({pairs} pairs), got {positions}"
            )
        return cls(pairs, positions // (2 * pairs), hidden, vocab)


TINY = Shape(pairs=2, tokens=5, hidden=16, vocab=300)
QUICK = Shape(pairs=2, tokens=64, hidden=128, vocab=8192)
SPEED = Shape(pairs=2, tokens=256, hidden=512, vocab=50_257)
MEMORY = Shape(pairs=4, tokens=512, hidden=128, vocab=65_536)
GPU = Shape(pairs=4, tokens=1024, hidden=4096, vocab=128_256)


@dataclass(frozen=True)
class Case:
    """One peer at one shape. Plain values only, so that it can be handed to another process."""

    peer: str
    shape: Shape
    dtype: str = "float32"
    device: str = "cpu"
    frozen: bool = False
    masked: float = 0.0
    budget: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def scored(self) -> int:
        """Labels that are not ignored."""
        return 2 * self.shape.pairs * (self.shape.tokens - self.masked_tokens)

    @property
    def masked_tokens(self) -> int:
        """Ignored positions at the start of every sequence, as a prompt would be."""
        return int(self.shape.tokens * self.masked)

    @property
    def logits_bytes(self) -> int:
        return self.shape.positions * self.shape.vocab * self.torch_dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        return cls(**{**values, "shape": Shape(**values["shape"])})

    def at(self, shape: Shape) -> Case:
        return replace(self, shape=shape)


class Inputs(NamedTuple):
    hidden: Tensor  # [2 * pairs, tokens, H], chosen first, then rejected
    weight: Tensor  # [V, H]
    labels: Tensor  # [2 * pairs, tokens], already aligned

    def for_case(self, case: Case) -> Inputs:
        """Leaves of their own on the same storage, asking for the case's gradients."""
        labels = self.labels
        if case.masked_tokens:
            labels = labels.clone()
            labels[:, : case.masked_tokens] = IGNORE_INDEX
        return Inputs(
            self.hidden.detach().requires_grad_(),
            self.weight.detach().requires_grad_(not case.frozen),
            labels,
        )


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs for the case, with logits of about unit size."""
    shape = case.shape
    generator = torch.Generator(case.device).manual_seed(seed)
    options: dict[str, Any] = {"device": case.device, "generator": generator}
    size = (2 * shape.pairs, shape.tokens)
    hidden = torch.randn(*size, shape.hidden, dtype=case.torch_dtype, **options)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=case.torch_dtype, **options)
    labels = torch.randint(shape.vocab, size, **options)
    return Inputs(hidden, weight.mul_(shape.hidden**-0.5), labels).for_case(case)
