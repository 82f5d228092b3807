"""The experiment that finds what a model does with the output of its head.

The model's forward is run once, without gradients. In place of the head's output it meets probes,
made-up logits of a great range, and the head's own logits at a few positions. The forward's logits
for the probes have to be a soft cap and a scale of them, in every column; those for the head's own,
what ``Head`` makes of the hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpo.model_head.cap_and_scale import (
    HUGE,
    TINY,
    AfterHead,
    configured_constants,
    fit,
    probe_logits,
    worst_gap,
)
from fusedpo.model_head.carry import never_called, refuse_further_arguments
from fusedpo.model_head.contexts import evaluating, no_side_effects
from fusedpo.model_head.errors import UnsupportedHead, unsupported
from fusedpo.model_head.modules import HeadModule

_POSITIONS = 16  # at which the head's own logits are compared


class _Probe:
    """Runs in place of the head's forward, and returns probes and the head's own logits.

    Attributes:
        rows: [rows, V], probes, then the head's own logits at a few positions.
        shared: the copy of them that the forward gets, and may write into.
        product: [positions, V], the product of the head's operands at those positions.
        eps: the precision of the head's own logits.
        hooked: whether hooks returned another output.
    """

    def __init__(self, head: HeadModule) -> None:
        self.head = head
        self.rows: Tensor | None = None
        self.shared: Tensor | None = None
        self.product: Tensor | None = None
        self.eps = 0.0
        self.hooked = False

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        refuse_further_arguments(args, kwargs)
        if self.rows is not None:
            raise unsupported("a forward that calls its head once", "a second call")
        if hidden.dim() != 3:
            raise unsupported("a head that is called with states [B, T, H]", f"{[*hidden.shape]}")
        states = hidden[:1, :_POSITIONS]
        logits = self.head.logits(states)
        # here, as a sharded weight is whole only within the head's call
        self.product = torch.nn.functional.linear(*self.head.operands(states))[0]
        self.eps = torch.finfo(logits.dtype).eps
        logits = logits if logits.dtype == torch.float64 else logits.float()
        spread = probe_logits(logits.shape[-1], logits)
        constant = (torch.full_like(spread, value) for value in (TINY, HUGE, 0.0))
        probes = torch.stack([*constant, spread, spread.flip(0), spread / 16])
        self.rows = torch.cat([probes, logits[0]])
        self.shared = self.rows.clone()
        # from here on, so that logits that depend on a parameter behind the head require a gradient
        torch.set_grad_enabled(True)
        return self.shared[None]

    def hook(self, output: Any) -> None:
        """Compare the output of the module's call after its hooks."""
        assert self.shared is not None, "the head was called"
        # a wrapper with mixed precision casts it
        same = isinstance(output, Tensor) and torch.equal(output, self.shared[None].to(output))
        self.hooked = not same


def find_after_head(
    model: Any, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> AfterHead:
    """The function of its head's output that a model's logits are, found and verified.

    Args:
        model: the causal language model.
        forward: its forward.
        args, kwargs: what the forward is called with; caches among them are copied.

    Raises:
        UnsupportedHead: if the logits are not a soft cap and a scale of a linear head's.
    """
    head = HeadModule.of(model)
    probe = _Probe(head)
    with no_side_effects(model), evaluating(head.module):
        args = [_detached_copy(value) for value in args]
        kwargs = {name: _detached_copy(value) for name, value in kwargs.items()}
        try:
            with head.override(probe, probe.hook):
                output = forward(*args, **kwargs)
        except Exception as error:
            if probe.rows is None or isinstance(error, UnsupportedHead):
                raise
            raise unsupported(
                "a forward that does nothing to its logits but scale and soft-cap them",
                f"{type(error).__name__}: {error}",
            ) from error
        finally:
            torch.set_grad_enabled(False)
        return _explain(probe, getattr(output, "logits", None), configured_constants(model.config))


def _explain(probe: _Probe, logits: Tensor | None, constants: Sequence[float]) -> AfterHead:
    """The function that makes the model's logits of the probe's output, verified."""
    inputs, product = probe.rows, probe.product
    if inputs is None or product is None or probe.shared is None:
        raise never_called()
    if probe.hooked:
        raise unsupported("a head whose forward hooks leave its output unchanged", "a changed one")
    if not torch.equal(inputs, probe.shared):
        raise unsupported(
            "a forward that does not write into its head's output", "one that writes into it"
        )
    rows, vocab = inputs.shape
    if logits is None or logits.shape[:-1] != (1, rows) or logits.shape[-1] > vocab:
        raise unsupported(
            f"logits {[1, rows, vocab]} that its head made",
            "none" if logits is None else str([*logits.shape]),
        )
    if logits.requires_grad:
        raise unsupported(
            "only a soft cap and a constant scale after the LM head", "a trainable parameter there"
        )
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(inputs.dtype).eps)
    after = fit(logits[0], eps, constants)
    probes = rows - product.shape[0]
    actual = logits[0, probes:].to(inputs.dtype)
    expected = after.apply(product[:, : after.vocab].to(inputs.dtype))
    bound = 8 * max(eps, probe.eps) + 1e-5
    gap = after.gap(inputs[:probes], logits[0, :probes])
    if gap := gap or worst_gap(actual, expected, bound * actual.abs().amax()):
        raise unsupported(
            "logits that are a weight, a bias, a soft cap and a scale of its hidden states",
            f"some that differ from that by up to {gap:.3g}",
        )
    return after


def is_mutable(value: Any) -> bool:
    """Whether an argument is an object that a forward may change, as it does a cache."""
    return hasattr(value, "__dict__") and not isinstance(value, Tensor) and not callable(value)


def _detached_copy(value: Any) -> Any:
    """A copy without gradients of an argument that a forward may change; others as they are."""
    if not is_mutable(value):
        return value
    # copied here: a learned prefix is the result of operations, which deepcopy refuses
    tensors = {id(tensor): tensor.detach().clone() for tensor in _tensors(value, set())}
    return copy.deepcopy(value, tensors)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in an object."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return
    seen.add(id(value))
    parts: list[Any] = [*vars(value).values()] if hasattr(value, "__dict__") else []
    if isinstance(value, Mapping):
        parts += value.values()
    elif isinstance(value, list | tuple):
        parts += value
    for part in parts:
        yield from _tensors(part, seen)
