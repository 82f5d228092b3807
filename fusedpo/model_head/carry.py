"""The head's call in a forward that makes no logits.

What the task returns leaves the head's module as part of its output, so that its gradient passes
through the hooks that wrappers (FSDP, DDP, DeepSpeed) hang on the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo.model_head.cap_and_scale import AfterHead, probe_logits
from fusedpo.model_head.errors import unsupported


class HeadCall:
    """Runs a task in place of the head's forward, in one forward of the model.

    The output in place of logits is [1, n + 2, V]: n rows with the numbers of the task's result
    that require a gradient, then two rows of probes.

    Args:
        task: a function of the hidden states; returns a tree of tensors.
        carry: whether gradients pass through the module's output. Without, nothing is copied.

    Attributes:
        vocab: V; the task sets it.
        output: what the module returned before its hooks.
        hooked_output: and after them.
    """

    def __init__(self, task: Callable[[Tensor], Any], carry: bool) -> None:
        self.task, self.carry = task, carry
        self.task_result: Any = None
        self.payload: Tensor | None = None  # [1, n, V]
        self.probes: Tensor | None = None  # [2, V]
        self.output: Tensor | None = None
        self.hooked_output: Tensor | None = None
        self.calls = 0
        self.vocab = 1

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        refuse_further_arguments(args, kwargs)  # adapters by row, say
        if self.calls > 1:
            raise unsupported("a forward that calls its head once", "a second call")
        self.task_result = self.task(hidden)
        leaves = self._carried()
        # as wide as the vocabulary, for the code that takes it for logits
        flat = torch.cat([t.reshape(-1) for t in leaves]) if leaves else hidden.new_zeros(0)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % self.vocab))
        self.payload = padded.view(1, -1, self.vocab)
        probes = probe_logits(self.vocab, padded)
        # some near zero, where a soft cap shows least, and some that it caps entirely
        self.probes = torch.stack([probes / 16, probes.flip(0) * 16])
        self.output = torch.cat([self.payload.to(self.probes.dtype), self.probes[None]], 1)
        return self.output

    def hook(self, output: Tensor) -> None:
        """Take the output of the module's call after its hooks."""
        self.hooked_output = output

    def _carried(self) -> list[Tensor]:
        leaves = pytree.tree_leaves(self.task_result) if self.carry else []
        return [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]

    def result(self) -> Any:
        """The task's result, with gradients that pass through the module's output."""
        if not self.calls:
            raise never_called()
        leaves = self._carried()
        if not leaves:
            return self.task_result
        assert self.payload is not None and self.hooked_output is not None, "the head was called"
        payload = self.hooked_output[:, : self.payload.shape[1]]
        flat = restore_precision(self.payload, payload).reshape(-1)
        sizes = [t.numel() for t in leaves]
        parts = iter(flat[: sum(sizes)].split(sizes))

        def unpack(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                return next(parts).reshape(leaf.shape)
            return leaf

        return pytree.tree_map(unpack, self.task_result)

    @torch.no_grad()
    def matches(self, after: AfterHead, output: Any) -> bool:
        """Whether the model did to the probes what ``after`` says. Waits for the device.

        Args:
            after: the function of the head's output that is expected.
            output: of the model's forward.
        """
        logits = getattr(output, "logits", None)
        assert self.probes is not None and self.payload is not None, "the head was called"
        shape = (1, self.payload.shape[1] + len(self.probes), after.vocab)
        if logits is None or logits.shape != shape:
            return False
        return after.gap(self.probes, logits[0, -len(self.probes) :]) == 0


def refuse_further_arguments(args: Any, kwargs: Any) -> None:
    """Refuse a call of the head with more than the hidden states, which may change the logits."""
    if args or kwargs:
        names = ", ".join(kwargs) or f"{len(args)} by position"
        raise unsupported(
            "a head that is called with the hidden states alone", f"further arguments: {names}"
        )


def never_called() -> ValueError:
    """The error for a model whose forward did not call its head."""
    return unsupported("a forward that calls its output embedding", "one that does not")


def restore_precision(exact: Any, cast: Any) -> Any:
    """A tree of tensors with the values of ``exact`` and the gradients of ``cast``.

    A wrapper with mixed precision (FSDP) casts what a forward returns, which would round
    log-probabilities to bfloat16.
    """

    def restore(value: Any, rounded: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == rounded.dtype:
            return rounded
        rounded = rounded.to(value.dtype)
        return value.detach() + (rounded - rounded.detach())

    leaves, structure = pytree.tree_flatten(exact)
    pairs = zip(leaves, pytree.tree_leaves(cast), strict=True)
    return pytree.tree_unflatten([restore(*pair) for pair in pairs], structure)
