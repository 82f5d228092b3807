"""The problems that processes solve together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from losses.shared import inputs_for
from oracles import Case
from torch import Tensor

from fusedpo.losses import Loss, PolicyLoss

VOCAB, WIDTH, LENGTH = 23, 6, 9


def splits(vocab: int, ranks: int) -> list[list[int]]:
    """Sizes of slices of a vocabulary: about equal, and with but one entry on the last or first."""
    if vocab < ranks:
        return []
    share, more = divmod(vocab, ranks)
    rest = vocab - ranks + 1
    ones = [1] * (ranks - 1)
    return [[share + (r < more) for r in range(ranks)], [rest, *ones], [*ones, rest]]


EXTREMES = (
    "plain",
    "bias",
    "one entry last",
    "one entry first",
    "target never first",
    "first far below",
    "last far below",
    "only the target is large",
    "last of no use",
    "offset",
    "temperature",
    "capped",
    "tight cap",
    "frozen",
    "entropy",
    "entropy, capped and frozen",
    "ignored",
    "packed",
)


def extreme(name: str, dtype: torch.dtype) -> tuple[Case, list[int]]:
    """A case, and the slices of its vocabulary on two ranks."""
    assert name in EXTREMES
    g = torch.Generator().manual_seed(EXTREMES.index(name))
    tokens, vocab, width = 37, 37, 12
    sizes = [20, 17]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(tokens, width), normal(vocab, width) / width**0.5
    labels = torch.randint(vocab, (tokens,), generator=g)
    case = Case(name, hidden, weight, labels, (normal(tokens) * 0.1 / tokens).float())
    bias = normal(vocab)
    far = 900.0 if dtype == torch.float64 else 200.0
    if name == "one entry last":
        sizes = [36, 1]
        labels[::3] = 36
    elif name == "one entry first":
        sizes = [1, 36]
        labels[::3] = 0
    elif name == "target never first":
        labels.clamp_(min=20)
    elif name == "first far below":
        bias[:20] -= far
    elif name == "last far below":
        bias[20:] -= far
    elif name == "last of no use":  # as padding of a vocabulary is
        bias[20:] = -torch.inf
        labels.clamp_(max=19)
    elif name == "only the target is large":
        case.weight *= 0.1
        for i in range(tokens):
            case.weight[labels[i]] = 25.0 * hidden[i] / hidden[i].square().sum()
    elif name == "offset":
        bias += 1e4 if dtype in (torch.float32, torch.float64) else 200.0
    elif name == "temperature":
        case.temperature, case.logit_scale = (normal(tokens).abs() + 0.4).float(), 0.8
    elif name in ("capped", "tight cap"):
        case.softcap = 5.0 if name == "capped" else 0.7
    elif name == "ignored":
        labels[5:20] = -100
    elif name == "packed":  # a rectangle of rows with gaps between
        wide = normal(4, 10, width)
        case.hidden, case.labels = wide[:, :9], labels[:36].view(4, 9)
        case.upstream = case.upstream[:36].view(4, 9)
    if name.startswith("entropy"):
        case.upstream_entropy = (normal(tokens) * 0.1 / tokens).float()
    if name in ("bias", "first far below", "last far below", "last of no use", "offset"):
        case.bias = bias.to(dtype)
        case.needs = ("hidden", "weight", "bias")
    if name.endswith("frozen"):
        case.needs = ("hidden",)
        case.softcap = 5.0 if "capped" in name else None
    case.hidden, case.weight = case.hidden.to(dtype), case.weight.to(dtype)
    return case, sizes


@dataclass
class Batch:
    """Ragged responses after prompts and all that a loss takes; per token [B, T]."""

    loss: Loss
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    ref: Tensor
    old: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    temperature: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)
    reference: str = "token"
    seed: int = 0

    def parts(self, ranks: int) -> list[slice]:
        """Columns of each rank; of some seeds one without any, or without a scored token."""
        if ranks == 1:
            return [slice(0, LENGTH)]
        border = (4, 0, LENGTH)[self.seed % 3]
        return [slice(0, border), slice(border, LENGTH)]

    def cut(self, columns: slice) -> Batch:
        names = ("hidden", "labels", "ref", "old", "ref_hidden", "temperature")
        inputs = {
            name: value[:, columns] if isinstance(value, Tensor) and value.dim() > 1 else value
            for name, value in self.inputs.items()
        }
        return replace(
            self, inputs=inputs, **{name: getattr(self, name)[:, columns] for name in names}
        )

    def arguments(self, rows: slice = slice(0, VOCAB)) -> dict[str, Any]:
        """What the loss takes beside hidden states, head and labels; rows of the vocabulary."""
        found: dict[str, Any] = {**self.inputs, "temperature": self.temperature}
        if self.loss.needs_reference:
            if self.reference == "hidden":
                found |= {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight[rows]}
            else:
                found["ref_logprobs"] = self.ref
        if isinstance(self.loss, PolicyLoss):
            found["old_logprobs"] = self.old
        return found


def batch(loss: Loss, seed: int, dtype: torch.dtype, reference: str = "token") -> Batch:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    policy = isinstance(loss, PolicyLoss)
    count = 4 if policy else 3 * len(loss.roles)
    hidden, weight = normal(count, LENGTH, WIDTH), normal(VOCAB, WIDTH) / 2
    labels = torch.randint(VOCAB, (count, LENGTH), generator=g)
    # two of three are cut by the border of parts, of the others every second is before it
    for i, row in enumerate(labels):
        prompt, end = torch.randint(4, (2,), generator=g).tolist()
        if i % 3 == 2:
            prompt, end = (prompt, 4) if i % 2 else (4 + prompt, LENGTH)
        else:
            end = LENGTH - end
        row[:prompt] = -100
        row[end:] = -100
    if policy:
        labels[-1] = -100  # a response may be empty
        # one of the two passes a gradient on, wherever a ratio is clipped
        hidden[1], labels[1] = hidden[0], labels[0]
    taken = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    ref, old = (taken + 0.3 * normal(*taken.shape) for _ in range(2))
    inputs = {} if policy else inputs_for(loss, 3, seed)
    if policy:
        ref[1], old[1] = ref[0], old[0]
        inputs = {"advantages": normal(count), "importance_weights": normal(count).abs() + 0.5}
        inputs["advantages"][:2] = torch.tensor([1.3, -0.7])
        # per token where the loss takes it
        if loss.absorbs_correction or loss.formula_structure.scope == "token":
            inputs["importance_weights"] = normal(count, LENGTH).abs() + 0.5
        if loss.formula_structure.scope == "token":
            inputs["advantages"] = normal(count, LENGTH)
        inputs["log_entropy"] = True
    return Batch(
        loss,
        hidden.to(dtype),
        weight.to(dtype),
        (normal(VOCAB) / 2).to(dtype),
        labels,
        ref.to(dtype),
        old.to(dtype),
        normal(count, LENGTH, WIDTH).to(dtype),
        normal(VOCAB, WIDTH).to(dtype),
        (normal(LENGTH).abs() + 0.5).expand(count, LENGTH).to(dtype),
        inputs,
        reference,
        seed,
    )
