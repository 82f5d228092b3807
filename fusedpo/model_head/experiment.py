"""Finding out what a model does with the output of its head: one forward on made-up logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedpo.model_head.cap_and_scale import (
    _HUGE,
    _TINY,
    AfterHead,
    _fit,
    _gap,
    _numbers,
    _spread,
)
from fusedpo.model_head.errors import UnsupportedHead
from fusedpo.model_head.modules import _Scorer

_COMPARED = 16  # positions that are compared with the model's own logits


class _Experiment:
    """Stands in for the head in one forward, and makes up what comes out of it."""

    def __init__(self, scorer: _Scorer) -> None:
        self.scorer = scorer
        self.product: Tensor | None = None  # [positions, V], what we take for the head's logits
        self.met: Tensor | None = None  # [rows, V], what the rest of the forward was given
        self.given: Tensor | None = None  # the copy of it that was given
        self.hooked = False  # whether they made another of it
        self.eps = 0.0  # of the head's own logits

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise UnsupportedHead(
                "model: expected a head that is called with hidden states alone, got "
                f"{[*kwargs] or len(args)} besides"
            )
        if self.met is not None or hidden.dim() != 3:
            raise UnsupportedHead(
                "model: expected a head that is called once in a forward, with states [B, T, H], "
                f"got {list(hidden.shape)}, call {1 if self.met is None else 2}"
            )
        few = hidden[:1, :_COMPARED]
        own = self.scorer.logits(few)
        # now, as a sharded weight is whole only within the head's call
        states, weight, bias = self.scorer.inputs(few)
        self.product = torch.nn.functional.linear(states, weight, bias)[0]
        self.eps = torch.finfo(own.dtype).eps
        own = own if own.dtype == torch.float64 else own.float()
        spread = _spread(own.shape[-1], own)
        constant = (torch.full_like(spread, value) for value in (_TINY, _HUGE, 0.0))
        made = torch.stack([*constant, spread, spread.flip(0), spread / 16])
        self.met = torch.cat([made, own[0]])
        self.given = self.met.clone()
        # from here on, so that logits that something learned took part in can be told
        torch.set_grad_enabled(True)
        return self.given[None]

    def hook(self, output: Any) -> None:
        """What comes out of the head's call, after the hooks of others."""
        assert self.given is not None, "the head was called"
        # a wrapper with mixed precision casts it
        same = isinstance(output, Tensor) and torch.equal(output, self.given[None].to(output))
        self.hooked = not same


def _after_head(
    model: Any, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> AfterHead:
    """Find out what a model does with the output of its head, and verify all of it.

    The forward is run once, without gradients. In place of the head's output it meets made-up
    logits of great range, and the head's own at a few positions. What becomes of the first has to
    be a soft cap and a factor, in every column; what becomes of the second, the logits that
    ``Head`` makes of the hidden states.
    """
    scorer = _Scorer.of(model)
    experiment = _Experiment(scorer)
    with unnoticed(model), evaluating(scorer.module):
        # a cache grows in a forward
        args = [_own(value) for value in args]
        kwargs = {name: _own(value) for name, value in kwargs.items()}
        try:
            with scorer.replaced(experiment, experiment.hook):
                output = forward(*args, **kwargs)
        except Exception as error:
            if experiment.met is None or isinstance(error, UnsupportedHead):
                raise
            raise UnsupportedHead(
                "model: expected one that does nothing to its logits but scale and cap them, "
                f"got {type(error).__name__}: {error}"
            ) from error
        finally:
            torch.set_grad_enabled(False)
        met, product = experiment.met, experiment.product
        if met is None or product is None or experiment.given is None:
            raise UnsupportedHead(
                "model: expected a forward that calls its output embedding, got one that does not"
            )
        if experiment.hooked:
            raise UnsupportedHead(
                "model: expected a head whose hooks leave its output as it is, got one that a hook "
                "changes"
            )
        if not torch.equal(met, experiment.given):
            raise UnsupportedHead(
                "model: expected one that leaves its head's output as it is, got one that writes "
                "into it"
            )
        logits = getattr(output, "logits", None)
        rows, vocab = met.shape
        if logits is None or logits.shape[:-1] != (1, rows) or logits.shape[-1] > vocab:
            got = "none" if logits is None else list(logits.shape)
            raise UnsupportedHead(
                f"model: expected logits {[1, rows, vocab]} that its head made, got {got}"
            )
        if logits.requires_grad:
            raise UnsupportedHead(
                "model: expected logits that nothing is learned of behind their head, got some "
                "that depend on a parameter"
            )
        eps = max(torch.finfo(logits.dtype).eps, torch.finfo(met.dtype).eps)
        after = _fit(logits[0], eps, _numbers(model.config))
        made = rows - product.shape[0]
        theirs = logits[0, made:].to(met.dtype)
        ours = after.apply(product[:, : after.vocab].to(met.dtype))
        bound = 8 * max(eps, experiment.eps) + 1e-5
        gap = after.gap(met[:made], logits[0, :made])
        if gap := gap or _gap(theirs, ours, bound * theirs.abs().amax()):
            raise UnsupportedHead(
                "model: expected logits that are a weight, a bias, a soft cap and a factor of its "
                f"hidden states, got some that differ from that by up to {gap:.3g}"
            )
    return after


def _is_changeable(value: Any) -> bool:
    """Whether an argument is an object that a forward may change, as it does a cache."""
    return hasattr(value, "__dict__") and not isinstance(value, Tensor) and not callable(value)


def _own(value: Any) -> Any:
    """A copy of an argument that a forward may change, without gradients; others as they are."""
    if not _is_changeable(value):
        return value
    # those of a prefix that is learned are results, which deepcopy does not copy
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


@contextmanager
def unnoticed(model: Any) -> Iterator[None]:
    """Without gradients, for forwards after which nothing is to be other than without them."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    buffers = [(b, b.clone()) for b in model.buffers() if b.device.type != "meta"]
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
            # autocast may keep weights that were cast without gradients
            torch.clear_autocast_cache()


@contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """Without dropout; each module has its mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):
        yield model
        return
    model.eval()
    try:
        yield model
    finally:
        # a wrapper may do more than to set the mode
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training
