"""The batch of a call to the engine: hidden states, the head, and the rows that are scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from fusedpo.engine.backend import resolve
from fusedpo.engine.cost import Backend, Needs
from fusedpo.engine.precision import accumulated_dtype, operand_dtype
from fusedpo.engine.problem import Options
from fusedpo.engine.rows import Rows, gathers
from fusedpo.engine.tolerance import Record, check_tolerance, record_of
from fusedpo.head import Head


@dataclass(frozen=True)
class Batch:
    """The scored rows of a call and what makes logits of them, checked.

    Attributes:
        hidden: [..., H].
        head: of plain tensors.
        rows: the scored tokens; in a graph that is traced, every position.
        temperature: a number, or [...].
        backend: the one that is used; in a graph that is traced, the argument.
        tolerance: relative error of a gradient tensor that is allowed.
    """

    hidden: Tensor
    head: Head
    rows: Rows
    temperature: float | Tensor
    backend: str
    tolerance: float = 0.0

    @property
    def device(self) -> torch.device:
        """The device of hidden, where all tensors are."""
        return self.hidden.device

    @property
    def accumulated(self) -> torch.dtype:
        """The dtype of sums and of numbers per token."""
        return accumulated_dtype(self.hidden.dtype)

    @property
    def operand(self) -> torch.dtype:
        """The dtype of the products' operands, under autocast as it is now."""
        return operand_dtype(self.hidden.dtype, self.device.type)

    @property
    def needs(self) -> list[Needs]:
        """The gradients that the call has to deliver."""
        if not torch.is_grad_enabled():
            return []
        tensors: dict[Needs, Tensor | None] = {
            "hidden": self.hidden,
            "weight": self.head.weight,
            "bias": self.head.bias,
        }
        return [name for name, t in tensors.items() if t is not None and t.requires_grad]

    @property
    def scale(self) -> float | Tensor:
        """The factor of the logits after softcap: a number, or [N]."""
        if not isinstance(self.temperature, Tensor):
            return self.head.logit_scale / self.temperature
        return self.head.logit_scale / self.rows.gather(self.temperature).to(self.accumulated)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, vocabulary (of the largest slice) and hidden size, as plan() takes them."""
        return self.rows.count, self.head.widest, self.head.weight.shape[1]

    @property
    def record(self) -> Record:
        """What earlier calls of this kind have shown about their gradients."""
        return record_of(self.tolerance, self.device.type, *self.sizes[1:], self.head.shard)

    @property
    def fusable(self) -> bool:
        """Whether a kernel can read rows of hidden and weight: their numbers lie side by side."""
        return self.hidden.stride(-1) == self.head.weight.stride(-1) == 1

    def options(self) -> Options:
        """The arguments of plan() that describe this batch, but for its sizes."""
        return {
            "dtype": self.hidden.dtype,
            "weight_dtype": self.head.weight.dtype,
            "operand_dtype": self.operand,
            "needs": self.needs,
            "softcap": self.head.softcap is not None,
            "gathered": gathers(self.hidden.shape, self.hidden.stride(), self.rows),
            "device": self.device,
            "backend": cast(Backend, self.backend),
            "shards": 1 if self.head.shard is None else len(self.head.shard.sizes),
            "gradient_tolerance": self.tolerance,
        }

    def within(self, gradient_tolerance: float) -> Batch:
        """The same batch, whose gradients may have this relative error.

        Raises:
            TypeError, ValueError: for a wrong one, naming ``gradient_tolerance``.
        """
        return replace(self, tolerance=check_tolerance(gradient_tolerance, self.hidden.dtype))

    def under(self, hidden: Tensor, head: Head) -> Batch:
        """The same rows under another model, such as the reference."""
        backend = self.backend
        if self.rows.scored is None:
            backend = resolve(backend, hidden, head.weight, head.bias)
        return replace(self, hidden=hidden, head=head, backend=backend)
