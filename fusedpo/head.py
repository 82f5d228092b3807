"""A language-model head: a weight, and what is done to the logits before the softmax."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.checks import tracing
from fusedpo.distributed import checked_group
from fusedpo.vocab_shards import VocabShard, is_dtensor, local_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Head:
    """A language-model head: z = hidden weight^T + bias, softcap tanh(z / softcap), times
    logit_scale.

    Attributes:
        weight: [V, H]; with a vocab_group this rank's slice of it; or a DTensor.
        bias: [V] or None, likewise.
        softcap: bound of the logits, or None.
        logit_scale: factor of the logits, after softcap.
        vocab_group: the ranks whose slices make up the vocabulary, or None.
        shard: those slices, once ``local`` has looked.

    Raises:
        TypeError, ValueError: for an attribute that cannot be, naming it; not when it is made, but
            from ``local``, ``check`` and the functions that take the head or its ``options``.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    vocab_group: ProcessGroup | None = None
    shard: VocabShard | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        weight: Tensor | Head,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        vocab_group: ProcessGroup | None,
    ) -> Head:
        """The head that a public function is called with: whole, or as loose arguments.

        Raises:
            ValueError: for a loose argument beside a Head, naming it.
        """
        if not isinstance(weight, Head):
            return cls(weight, bias, softcap, logit_scale, vocab_group)
        loose = {
            "bias": bias is not None,
            "softcap": softcap is not None,
            "logit_scale": not isinstance(logit_scale, (int, float)) or logit_scale != 1.0,
            "vocab_group": vocab_group is not None,
        }
        for name, passed in loose.items():
            if passed:
                raise checks.bad_value(
                    name,
                    "its default where weight is a Head, which has its own",
                    "another value",
                    f"make it part of the Head: Head(weight, {name}=...)",
                )
        return weight

    def local(self, prefix: str = "", labels: object = None) -> Head:
        """The head with plain tensors, this rank's, and the slices of the vocabulary known.

        labels: what is to be the same on every rank of a DTensor's mesh.
        """
        if self.vocab_group is None and not is_dtensor(self.weight) and not is_dtensor(self.bias):
            return self
        if tracing():
            raise checks.bad_value(
                "vocab_group",
                "a whole head of plain tensors inside torch.compile",
                "one in slices, or a DTensor",
                "call the loss outside of the graph, under torch.compiler.disable",
            )
        group = checked_group("vocab_group", self.vocab_group)
        weight, bias, shard = local_head(self.weight, self.bias, group, prefix, labels)
        return replace(self, weight=weight, bias=bias, shard=shard)

    @property
    def vocab(self) -> int:
        """Entries of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.total

    @property
    def widest(self) -> int:
        """Entries of the largest slice: what every rank plans for."""
        return self.weight.shape[0] if self.shard is None else self.shard.largest

    def check(self, hidden: object, prefix: str = "") -> None:
        """Raise a TypeError or ValueError unless this head fits hidden [..., H]."""
        checks.head_inputs(hidden, self.weight, self.bias, prefix=prefix)
        self.check_logits()

    def check_logits(self) -> None:
        """Raise a TypeError or ValueError for what is done to the logits."""
        if self.softcap is not None:
            checks.positive("softcap", self.softcap)
        checks.positive("logit_scale", self.logit_scale)

    def options(self) -> dict[str, Any]:
        """The keyword arguments that carry this head into the public functions, weight apart."""
        options = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        return options if self.vocab_group is None else {**options, "vocab_group": self.vocab_group}

    def logits(self, hidden: Tensor) -> Tensor:
        """The full logits [..., V], fp32 (fp64 for fp64 inputs): the naive program, for checks."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        z = z.double() if z.dtype == torch.float64 else z.float()
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z * self.logit_scale
