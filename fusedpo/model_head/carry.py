"""Carrying what a task returns through the head's own call, and so through the hooks on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo.model_head.cap_and_scale import AfterHead, _spread
from fusedpo.model_head.errors import UnsupportedHead


class _Call:
    """What stands in for the head's forward during one forward of the model."""

    def __init__(self, task: Callable[[Tensor], Any], carry: bool) -> None:
        self.task, self.carry = task, carry
        self.found: Any = None
        self.packed: Tensor | None = None  # [1, n, V]
        self.sent: Tensor | None = None  # what is packed, and made-up logits
        self.returned: Tensor | None = None  # of the head's call
        self.made: Tensor | None = None  # [2, V], made-up logits behind what is packed
        self.calls = 0
        self.width = 1  # of the vocabulary

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if args or kwargs:  # adapters by row, say
            raise UnsupportedHead(
                "model: expected a head that is called with hidden states alone, got "
                f"{[*kwargs] or len(args)} besides"
            )
        if self.calls > 1:
            raise UnsupportedHead("model: expected a head that is called once in a forward")
        self.found = self.task(hidden)
        carried = self._carried()
        # as wide as the vocabulary, for the code that takes it for logits
        flat = torch.cat([t.reshape(-1) for t in carried]) if carried else hidden.new_zeros(0)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % self.width))
        self.packed = padded.view(1, -1, self.width)
        spread = _spread(self.width, padded)
        # some near zero, where a soft cap shows least, and some that it is all of
        self.made = torch.stack([spread / 16, spread.flip(0) * 16])
        self.sent = torch.cat([self.packed.to(self.made.dtype), self.made[None]], 1)
        return self.sent

    def hook(self, output: Tensor) -> None:
        """What comes out of the head's call, after the hooks of others."""
        self.returned = output

    def _carried(self) -> list[Tensor]:
        leaves = pytree.tree_leaves(self.found) if self.carry else []
        return [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]

    def result(self) -> Any:
        if not self.calls:
            raise UnsupportedHead(
                "model: expected a forward that calls its output embedding, got one that does not"
            )
        carried = self._carried()
        if not carried:
            return self.found
        assert self.packed is not None and self.returned is not None, "the head was called"
        out = _uncast(self.packed, self.returned[:, : self.packed.shape[1]]).reshape(-1)
        sizes = [t.numel() for t in carried]
        parts = iter(out[: sum(sizes)].split(sizes))

        def back(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                return next(parts).reshape(leaf.shape)
            return leaf

        return pytree.tree_map(back, self.found)

    @torch.no_grad()
    def holds(self, after: AfterHead, output: Any) -> bool:
        """Whether the model did to its logits what is known of it. Waits for the device."""
        logits = getattr(output, "logits", None)
        assert self.made is not None and self.packed is not None, "the head was called"
        shape = (1, self.packed.shape[1] + len(self.made), after.vocab)
        if logits is None or logits.shape != shape:
            return False
        return after.gap(self.made, logits[0, -len(self.made) :]) == 0


def _uncast(exact: Any, got: Any) -> Any:
    """The values that a task returned, with the gradient of what came back through the wrappers.

    A wrapper with mixed precision (FSDP) casts what a forward returns, which would round
    log-probabilities to bfloat16.
    """

    def both(value: Any, back: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == back.dtype:
            return back
        back = back.to(value.dtype)
        return value.detach() + (back - back.detach())

    leaves, structure = pytree.tree_flatten(exact)
    backs = pytree.tree_leaves(got)
    return pytree.tree_unflatten([both(*p) for p in zip(leaves, backs, strict=True)], structure)
