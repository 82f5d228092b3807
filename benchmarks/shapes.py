"""What is measured: shapes, cases, and the inputs made from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fusedpo.labels import IGNORE_INDEX
from fusedpo.model_shapes import HEADS

if TYPE_CHECKING:
    from typing_extensions import Self

MIB = 2**20

Reference = Literal["none", "same call", "precomputed"]
"""Where a loss with a reference has it from: states scored in the same call, or numbers."""


@dataclass(frozen=True)
class Shape:
    """``pairs`` pairs of ``tokens`` tokens a response, before a head of ``vocab`` x ``hidden``."""

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
        """From ``"N,H,V"`` or ``"N,MODEL"``; N is cut into two pairs."""
        first, *rest = text.split(",")
        if len(rest) == 1 and rest[0] in HEADS:
            hidden, vocab = HEADS[rest[0]].hidden, HEADS[rest[0]].vocab
        elif len(rest) == 2 and all(_is_count(part) for part in rest):
            hidden, vocab = map(int, rest)
        else:
            raise ValueError(
                f"--shapes: expected N,H,V or N,MODEL, got {text!r}; "
                f"models: {', '.join(sorted(HEADS))}"
            )
        if not _is_count(first) or int(first) % (2 * pairs):
            raise ValueError(
                f"--shapes: N: expected a multiple of {2 * pairs} ({pairs} pairs), got {first!r}"
            )
        return cls(pairs, int(first) // (2 * pairs), hidden, vocab)

    def shorter(self) -> Shape:
        """An eighth of the tokens, for a step that only warms up."""
        return replace(self, tokens=max(1, self.tokens // 8))


def _is_count(text: str) -> bool:
    return text.strip().isdecimal() and int(text) > 0


def head_of(model: str, positions: int, pairs: int = 2) -> Shape:
    """The head of a model, by its name."""
    found = HEADS[model]
    return Shape(pairs, positions // (2 * pairs), found.hidden, found.vocab)


TINY = Shape(pairs=2, tokens=5, hidden=16, vocab=300)
GPU = Shape(pairs=4, tokens=1024, hidden=4096, vocab=128_256)


@dataclass(frozen=True)
class Case:
    """One peer at one shape. Plain values only, so that it can be handed to another process.

    Attributes:
        masked: share of each response's positions, at its start, that are not scored.
        budget: bytes for programs that take a budget; None: what they do by themselves.
        loss: a name in benchmarks/formulas.py.
        tolerance: of gradients, for programs that take one.
        states: a name in benchmarks/states.py, whose first rows and head the inputs are; None:
            random ones.
        measured_by: what answers a request for its peak, as ``worker.in_fresh_process`` takes it.
    """

    measured_by: ClassVar[str] = "fusedpo.benchmarks.worker:answer"

    peer: str
    shape: Shape
    dtype: str = "float32"
    device: str = "cpu"
    frozen: bool = False
    masked: float = 0.0
    budget: int | None = None
    loss: str = "simpo"
    reference: Reference = "none"
    tolerance: float = 0.0
    states: str | None = None

    def __post_init__(self) -> None:
        assert self.reference in get_args(Reference), self.reference

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def loss_tolerance(self) -> float:
        """Relative difference of a loss that rounding may make.

        Log-probabilities from half-precision logits add up to this much in a long response.
        """
        return 1e-3 if self.dtype == "float32" else 0.1

    @property
    def masked_tokens(self) -> int:
        """Ignored positions at the start of every sequence, as a prompt would be."""
        return int(self.shape.tokens * self.masked)

    @property
    def flop(self) -> float:
        """Of one product over all positions."""
        return 2.0 * self.shape.positions * self.shape.vocab * self.shape.hidden

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "shape": Shape(**values["shape"])})

    def at(self, shape: Shape) -> Self:
        return replace(self, shape=shape)


class Inputs(NamedTuple):
    """What a loss is computed from; B = 2 * pairs rows, chosen first, then rejected.

    ref_hidden and ref_weight, or ref_logprobs [B], are there as the case's reference has them;
    old_logprobs and advantages are for losses of sampled responses.
    """

    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [B, T], already aligned
    ref_hidden: Tensor | None = None  # [B, T, H]
    ref_weight: Tensor | None = None  # [V, H]
    ref_logprobs: Tensor | None = None  # [B]
    old_logprobs: Tensor | None = None  # [B, T]
    advantages: Tensor | None = None  # [B]

    @property
    def desirable(self) -> Tensor:
        """[B] bool: the first half of the rows, as KTO's losses take them."""
        return torch.arange(len(self.labels), device=self.labels.device) < len(self.labels) // 2

    def for_case(self, case: Case) -> Inputs:
        """Leaves of their own on the same storage, asking for the case's gradients.

        All are tensors of their own: some programs leave marks on those that they are given.
        """
        taken = {name: t.detach() for name, t in self._asdict().items() if t is not None}
        own = Inputs(**taken)
        labels = own.labels
        if case.masked_tokens:
            labels = labels.clone()
            labels[:, : case.masked_tokens] = IGNORE_INDEX
        same_call = case.reference == "same call"
        return own._replace(
            hidden=own.hidden.requires_grad_(),
            weight=own.weight.requires_grad_(not case.frozen),
            labels=labels,
            ref_hidden=own.ref_hidden if same_call else None,
            ref_weight=own.ref_weight if same_call else None,
            ref_logprobs=own.ref_logprobs if case.reference == "precomputed" else None,
        )


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Inputs for the case: of its states, or random, with logits of about unit size.

    The reference has the policy's head, as it has under LoRA, and states a little off the policy's.
    """
    shape = case.shape
    if case.states is not None:
        return _of_states(case, case.states)
    generator = torch.Generator(case.device).manual_seed(seed)
    options: dict[str, Any] = {"device": case.device, "generator": generator}
    size = (2 * shape.pairs, shape.tokens)
    hidden = torch.randn(*size, shape.hidden, dtype=case.torch_dtype, **options)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=case.torch_dtype, **options)
    weight.mul_(shape.hidden**-0.5)
    labels = torch.randint(shape.vocab, size, **options)
    found = Inputs(hidden, weight, labels)
    if case.reference == "same call":
        noise = torch.randn(*size, shape.hidden, dtype=case.torch_dtype, **options)
        found = found._replace(ref_hidden=noise.mul_(0.1).add_(hidden), ref_weight=weight)
    elif case.reference == "precomputed":
        typical = -float(torch.tensor(shape.vocab).log()) * shape.tokens
        found = found._replace(ref_logprobs=typical + torch.randn(size[0], **options))
    advantages = torch.randn(size[0], **options)
    old = torch.randn(*size, **options).mul_(0.1).sub_(float(torch.tensor(shape.vocab).log()))
    return found._replace(advantages=advantages, old_logprobs=old).for_case(case)


def _of_states(case: Case, name: str) -> Inputs:
    """The first rows of states, cut into responses."""
    from fusedpo.benchmarks import states

    shape = case.shape
    found = states.made(name, rows=shape.positions).first(shape.positions)
    there = Shape(shape.pairs, len(found.labels) // (2 * shape.pairs), *found.weight.shape[::-1])
    if there != shape or found.bias is not None or case.reference != "none":
        raise ValueError(
            f"states {name}: expected a shape within {there}, no bias and no "
            f"reference, got {shape}, {case.reference}"
        )
    size = (2 * shape.pairs, shape.tokens)
    # copies: the file that they may be parts of is read-only, and its pages are small
    own = (t.to(case.device, case.torch_dtype, copy=True) for t in (found.hidden, found.weight))
    hidden, weight = own
    labels = found.labels.to(case.device, copy=True).view(size)
    return Inputs(hidden.view(*size, -1), weight, labels).for_case(case)
