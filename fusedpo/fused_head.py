"""A causal language model's own forward, without its logits.

    add_fused_head(model)
    stats = model(input_ids, attention_mask=mask, labels=labels, fused=True)
    loss = -stats.logprob.sum()

The model's forward is run as it is, wrappers and hooks included, up to its head. Where the head
would make logits [B, T, V] of hidden states [B, T, H], it is called all the same, but does what the
caller wants done with its input: score labels, or a whole loss. So whatever a family does before
its head (norms, scales, images, experts) needs no knowledge here, and a head whose weight is
gathered for its own forward only (FSDP, ZeRO) is gathered.

What a family does *after* its head is found by experiment at the first call: the model's forward is
run once more, without gradients, with made-up logits in place of the head's, and has to be a soft
cap and a factor of them; see ``_after_head``. That is kept for the state that head, model and
configuration were in (``_Scorer.state``), and held in every later call to what becomes of a few
made-up logits. Where only numbers or hooks are others, what was known last is tried first.

Threads may run one model at a time each its own way: what stands in for a head does so in the
thread that put it there, and for all others the head does what it does.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo.checks import bad_choice, bad_value
from fusedpo.engine.backend import check_name
from fusedpo.engine.plan import Plan
from fusedpo.engine.stats import STATS, TokenStats
from fusedpo.functional import linear_token_stats
from fusedpo.head import Head
from fusedpo.kernels.logit_map import LogitMap
from fusedpo.sizes import parse_budget

IGNORED = -100

AtHead = Callable[[Tensor, Head], Any]
"""What is done with the hidden states [B, T, H] that feed a head, and the head."""

# under which wrappers keep what they wrap: torch.compile, FSDP, DDP and DeepSpeed, checkpointing
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "module", "_checkpoint_wrapped_module")
_COMPARED = 16  # positions that are compared with the model's own logits
_TINY, _HUGE = 2.0**-10, 1e4  # made-up logits: where a soft cap does nothing, and where it is all
_STATES = 8  # of a head that are kept, each with the hooks and the functions it had


class UnsupportedHead(ValueError):
    """A model whose logits are not those of a weight, a bias, a soft cap and a factor."""


def add_fused_head(
    model: Any,
    *,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    unsupported: Literal["raise", "fallback"] = "raise",
) -> None:
    """Let ``model(..., labels=labels, fused=True)`` return statistics of the labels, not logits.

    Called that way, the forward takes its usual arguments, wrapped or not, and besides:

        labels: [B, T], unshifted as in Hugging Face, -100 where nothing is scored. Of an
            encoder-decoder they are aligned with the decoder's positions, as in Hugging Face, and
            make the decoder's input where that is not given.
        shift_labels: [B, T] instead, aligned with the hidden states already.
        stats: names of the statistics, of ``fusedpo.engine.stats.STATS``; the log-probability if
            not given.
        temperature: what the logits are divided by.

    and returns a ``TokenStats`` of tensors [B, T - 1] ([B, T] with shift_labels, and of an
    encoder-decoder), with the ``aux_loss`` of a mixture of experts whose router's logits are asked
    for. ``fused`` may also be
    a function of the hidden states [B, T, H] and the ``Head``, which is run in place of the head;
    the forward then returns {"result": what it returned, "aux_loss": a scalar or None}.

    Without ``fused`` the model is as it was: ``generate``, saving, loading, copying and pickling
    are unchanged, and the state dict has no new keys. Calling this twice changes the options only.

    Args:
        model: a causal language model or an encoder-decoder of transformers, or one wrapped by
            PEFT, DDP or the like.
        memory_budget, backend: as of ``linear_token_stats``.
        unsupported: what to do where the head turns out not to be a weight, a bias, a soft cap and
            a factor: raise, at the first call, or make the model's own logits, with one warning.

    Raises:
        ValueError, TypeError: if the model has no output embedding, or for an unknown option.
    """
    check_options(memory_budget, backend)
    if unsupported not in ("raise", "fallback"):
        raise bad_choice("unsupported", unsupported, ("raise", "fallback"))
    causal = causal_model(model)
    if not callable(getattr(causal, "get_output_embeddings", None)) or (
        unsupported == "raise" and causal.get_output_embeddings() is None
    ):
        raise bad_value(
            "model", "a causal language model with an output embedding", type(model).__name__
        )
    install(causal, FusedForward, memory_budget, backend, unsupported)


def check_options(memory_budget: int | float | str | Plan | None, backend: str) -> None:
    """Refuse now what the first call would; whether the backend can run is known only there.

    Raises:
        ValueError, TypeError: for an unknown one.
    """
    if not isinstance(memory_budget, Plan):
        parse_budget(memory_budget)
    check_name(backend)


def install(causal: Any, kind: type[FusedForward], *options: Any) -> None:
    """Put a forward of this kind in the place of the model's, or of an earlier one."""
    earlier, before = fused_forward(causal), vars(causal).get("forward")
    if earlier is None:
        causal.forward = kind(causal, before, *options)
    elif _function(before) is earlier:
        causal.forward = kind(causal, earlier.original, *options)
    else:  # what wraps it holds on to it
        earlier.__class__ = kind
        kind.__init__(earlier, causal, earlier.original, *options)


class _OfModel:
    """What accelerate makes methods of: the fused forward of the model that it is called with, so
    that a copy of a model that was prepared runs its own weights."""

    def __init__(self, forward: FusedForward) -> None:
        self.forward = forward

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return (fused_forward(model) or self.forward)(*args, **kwargs)


def _function(forward: Any) -> Any:
    """What a method was made of, as accelerate does when it unwraps a model; or what it is."""
    if isinstance(forward, FusedForward):
        return forward
    function = getattr(forward, "__func__", forward)
    return function.forward if isinstance(function, _OfModel) else function


def remove_fused_head(model: Any) -> None:
    """Undo ``add_fused_head``. Does nothing to a model that has no fused head.

    Raises:
        ValueError: if the forward was wrapped since (by ``Accelerator.prepare``, say).
    """
    causal = causal_model(model)
    fused = fused_forward(causal)
    if fused is None:
        return
    if _function(vars(causal).get("forward")) is fused:
        if fused.original is None:
            del causal.forward
        else:
            causal.forward = fused.original
    else:
        raise bad_value(
            "model",
            "a forward that was not wrapped since",
            "one wrapped by accelerate",
            "first call accelerator.unwrap_model(model, keep_fp32_wrapper=False)",
        )


def causal_model(model: Any) -> Any:
    """The causal language model below wrappers and adapters."""
    # a wrapper that passes attributes on has no such method of its own
    while not hasattr(type(model), "get_output_embeddings"):
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
            continue
        children = getattr(model, "_modules", {})
        names = [name for name in _WRAPPED if name in children]
        if not names:
            return model
        model = children[names[0]]
    return model


def fused_forward(model: Any) -> FusedForward | None:
    """What ``add_fused_head`` put in the place of the model's forward, if it did."""
    causal = causal_model(model)
    for name in ("forward", "_original_forward"):  # accelerate wraps the one and keeps the other
        found = _function(vars(causal).get(name))
        if isinstance(found, FusedForward):
            if found.model is not causal:
                # a method is copied with its model, but not what the method was made of
                found = found.of(causal)
                setattr(causal, name, found)
            return found
    return None


def _forward_of(causal: Any) -> FusedForward:
    """The model's, which keeps what is found of its head; or else one that is not put into it."""
    return fused_forward(causal) or FusedForward(causal, vars(causal).get("forward"))


def after_head(model: Any, **inputs: Any) -> AfterHead:
    """What a model does with the output of its head, found on these inputs and verified.

    Raises:
        UnsupportedHead: if it is more than a soft cap and a factor.
    """
    _refuse_labels(inputs)
    fused = _forward_of(causal_model(model))
    return _after_head(fused, (), {**inputs, **fused.settings()})


def at_head(model: Any, task: AtHead, **inputs: Any) -> tuple[Any, Tensor | None]:
    """Run a task at the head of a model that has a fused one, entered through its wrapper.

    Args:
        model: wrapped or not; with a fused head.
        task: what to do with hidden states and head. Returns a tree of tensors.
        inputs: of the model's forward, without labels.

    Returns:
        What the task returned, and the aux_loss of a mixture of experts, or None.

    Raises:
        ValueError: for a model without a fused head, and for labels among the inputs.
        UnsupportedHead: if the head is more than a weight, a bias, a soft cap and a factor, also
            after ``add_fused_head(model, unsupported="fallback")``: a task needs the head itself;
            and if the model's call does not run its forward.
    """
    _refuse_labels(inputs)
    done: list[Any] = []

    def noted(hidden: Tensor, head: Head) -> Any:
        done.append(task(hidden, head))
        return done[-1]

    output = model(**inputs, fused=noted)
    if not done:
        if fused_forward(model) is None:
            remedy = "call add_fused_head(model) first"
            raise bad_value("model", "one with a fused head", type(model).__name__, remedy)
        raise UnsupportedHead(
            "model: expected one whose call runs its forward, got an output of "
            f"{type(model).__name__} without that"
        )
    return _uncast(done[-1], output["result"]), output["aux_loss"]


def _refuse_labels(inputs: Mapping[str, Any]) -> None:
    """A model that gets labels makes a loss of the logits that it takes what is carried for."""
    for name in ("labels", "shift_labels"):
        if inputs.get(name) is not None:
            raise bad_value(
                name,
                "none among the inputs of the model, as nothing is scored there but what the task "
                "scores",
                "some",
                "leave them out, and score them in the task",
            )


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


def hidden_and_head(model: Any, **inputs: Any) -> tuple[Tensor, Head]:
    """The states [B, T, H] that feed a model's head, and the head, verified on these inputs.

    For models whose weights are whole outside of a forward, that is, not under FSDP or ZeRO-3. The
    model needs no fused head, and is left as it was.

    Raises:
        UnsupportedHead: if the head is more than a weight, a bias, a soft cap and a factor.
    """
    fused = _forward_of(causal_model(model))
    found, _ = fused.run(lambda hidden, head: (hidden, head), (), inputs, carry=False)
    return found


class FusedForward:
    """Stands in for a model's forward.

    An object of a class, where a closure would do, so that models are pickled and copied with it.
    """

    def __init__(
        self,
        model: Any,
        original: Any = None,
        memory_budget: int | float | str | Plan | None = None,
        backend: str = "auto",
        unsupported: str = "raise",
    ) -> None:
        _keep_compiler_out()
        self.model = model
        self.original = original  # what was in the model's dict; None: its class's forward
        self.memory_budget = memory_budget
        self.backend = backend
        self.unsupported = unsupported
        self.known: dict[Any, AfterHead] = {}
        self.reason = ""  # why the head is not supported, if it is not

    def __getstate__(self) -> dict[str, Any]:
        # a copy has modules of its own; and hooks that are gone need not be copied, nor pickled
        return {**vars(self), "known": {}}

    def of(self, copied: Any) -> FusedForward:
        """The same for a copy of the model, which runs its own weights."""
        own = copy.copy(self)
        own.model = copied
        if getattr(self.original, "__self__", None) is self.model:
            own.original = types.MethodType(self.original.__func__, copied)
        return own

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward that this one stands in for."""
        if self.original is not None:
            return self.original
        return type(self.model).forward.__get__(self.model)

    @property
    def __func__(self) -> _OfModel:
        # accelerate wraps the functions of methods, and closures over anything else
        return _OfModel(self)

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() and Trainer read the forward's
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, fused: bool | AtHead = False, **kwargs: Any) -> Any:
        # accelerate, when it unwraps a model, makes a method of what is no function
        if args and isinstance(args[0], torch.nn.Module):
            return (fused_forward(args[0]) or self)(*args[1:], fused=fused, **kwargs)
        if not fused:
            return self.forward(*args, **kwargs)
        if callable(fused):
            result, aux_loss = self.run(fused, args, kwargs)
            return {"result": result, "aux_loss": aux_loss}
        return self.token_stats(args, kwargs)

    def token_stats(self, args: Sequence[Any], kwargs: dict[str, Any]) -> TokenStats:
        """What ``model(..., fused=True)`` returns."""
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        stats = kwargs.pop("stats", ("logprob",))
        temperature = kwargs.pop("temperature", 1.0)
        if (labels is None) == (shifted is None):
            got = "neither" if labels is None else "both"
            raise bad_value("labels", "labels or shift_labels with fused=True", got)
        if getattr(self.model.config, "is_encoder_decoder", False):
            shifted, labels = labels if shifted is None else shifted, None
            kwargs = {**kwargs, **self._decoder_input(shifted, args, kwargs)}
        aligned = shifted if labels is None else aligned_labels(labels)
        task = Score(aligned, tuple(stats), temperature, self.memory_budget, self.backend)
        if self.reason:
            found, aux_loss = self._by_logits(task, args, kwargs)
        else:
            try:
                found, aux_loss = self.run(task, args, kwargs)
            except UnsupportedHead as error:
                if self.unsupported == "raise":
                    raise
                warnings.warn(f"{error}; its own logits are made instead", stacklevel=3)
                self.reason = str(error)
                found, aux_loss = self._by_logits(task, args, kwargs)
        if labels is not None:
            found = on_stats(found, lambda t: t[:, :-1])
        return found._replace(aux_loss=aux_loss)

    def _decoder_input(
        self, labels: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """What an encoder-decoder makes of labels [B, T] where the decoder is fed nothing else."""
        fed = self._by_name(args, kwargs)
        if any(fed.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds")):
            return {}
        make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if make is None:
            expected = f"some, as {type(self.model).__name__} makes none of labels"
            raise bad_value("decoder_input_ids", expected, "none")
        made = {"decoder_input_ids": make(labels)}
        if getattr(self.model.config, "model_type", "") == "encoder-decoder" and (
            fed.get("decoder_attention_mask") is None
        ):  # which masks all that looks like padding, in what it makes
            ids = made["decoder_input_ids"]
            made["decoder_attention_mask"] = (ids != self.model.config.pad_token_id).to(ids)
        return made

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = [*inspect.signature(self.forward).parameters] if args else []
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _by_logits(
        self, task: Score, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[TokenStats, Tensor | None]:
        output = self.forward(*args, **{**kwargs, **self.settings()})
        return task.by_logits(output.logits), getattr(output, "aux_loss", None)

    def run(
        self, task: AtHead, args: Sequence[Any], kwargs: Mapping[str, Any], *, carry: bool = True
    ) -> tuple[Any, Tensor | None]:
        """Run the model's forward with the task in place of the head.

        Args:
            carry: whether gradients pass through the output of the head's own call, on which
                wrappers of the head hang their hooks. Without, nothing is copied.

        Returns:
            What the task returned, and the output's aux_loss.
        """
        _refuse_labels(self._by_name(args, kwargs))
        kwargs = {**kwargs, **self.settings()}
        scorer = _Scorer.of(self.model)
        state, after, sure = self._recall(scorer)
        if after is not None and not sure:
            if (done := self._attempt(scorer, after, task, args, kwargs, carry)) is not None:
                self._keep(state, after)
                return done
            after = None
        if after is None:
            after = _after_head(self, args, kwargs)
            self._keep(state, after)
        call, output = self._call(scorer, after, task, args, kwargs, carry)
        result = call.result()
        if not call.holds(after, output):
            self.known.pop(state, None)
            raise UnsupportedHead(
                "model: expected logits that are capped and scaled as at an earlier call, got some "
                "that are not; call it again, and it is looked at anew"
            )
        return result, getattr(output, "aux_loss", None)

    def _recall(self, scorer: _Scorer) -> tuple[Any, AfterHead | None, bool]:
        """The head's state; what is known of it, or else of the last whose functions were the same;
        and whether it is this state's."""
        state = scorer.state(self.model, self.forward)
        if (after := self.known.get(state)) is not None:
            return state, after, True
        alike = [after for other, after in [*self.known.items()] if other[0] == state[0]]
        return state, alike[-1] if alike else None, False

    def _keep(self, state: Any, after: AfterHead) -> None:
        for oldest in [*self.known][: 1 - _STATES]:
            self.known.pop(oldest, None)
        self.known[state] = after

    def _call(
        self,
        scorer: _Scorer,
        after: AfterHead,
        task: AtHead,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        carry: bool,
    ) -> tuple[_Call, Any]:
        """The head's call in one forward of the model, and the forward's output."""

        def at_head(hidden: Tensor) -> Any:
            states, weight, bias = scorer.inputs(hidden)
            call.width = weight.shape[0]
            return task(states, after.head(weight, bias))

        call = _Call(at_head, carry)
        with scorer.replaced(call, call.hook):
            output = self.forward(*args, **kwargs)
        return call, output

    def _attempt(
        self, scorer: _Scorer, after: AfterHead, *of_call: Any
    ) -> tuple[Any, Tensor | None] | None:
        """What a run with what was known last comes to, as numbers and hooks that have no part in
        the logits may change at every step; None where it does not hold."""
        _, args, kwargs, _ = of_call
        if any(map(_is_changeable, [*args, *kwargs.values()])):  # it would be once more
            return None
        try:
            call, output = self._call(scorer, after, *of_call)
            result = call.result()
        except Exception:  # which the experiment, or the run after it, meets again and explains
            return None
        # a hook that makes another output may learn something
        if call.returned is not call.sent or not call.holds(after, output):
            return None
        return result, getattr(output, "aux_loss", None)

    def settings(self) -> dict[str, Any]:
        given = {"use_cache": False, "return_dict": True}
        parameters = inspect.signature(type(self.model).forward).parameters
        return {name: value for name, value in given.items() if name in parameters}


def aligned_labels(labels: Tensor) -> Tensor:
    """[B, T] with labels[t] what the states at t predict, from labels as Hugging Face gives them;
    nothing is predicted at the last position."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def of_tokens(values: Tensor, labels: Tensor) -> Tensor:
    """[B, T, ...] like labels, from what may have the virtual tokens of prompt tuning in front."""
    return values[:, -labels.shape[1] :]


def on_stats(stats: TokenStats, function: Callable[[Tensor], Tensor]) -> TokenStats:
    """The statistics with a function applied to each that there is."""
    return pytree.tree_map(lambda v: None if v is None else function(v), stats)


@dataclass(frozen=True)
class Score:
    """At the head: statistics of labels [B, T] that are aligned with the hidden states."""

    labels: Tensor
    stats: tuple[str, ...] = ("logprob",)
    temperature: float | Tensor = 1.0
    memory_budget: int | float | str | Plan | None = None
    backend: str = "auto"

    def __call__(self, hidden: Tensor, head: Head) -> TokenStats:
        return linear_token_stats(
            hidden,
            head.weight,
            self.labels.to(hidden.device),
            stats=self.stats,
            temperature=self.temperature,
            memory_budget=self.memory_budget,
            backend=self.backend,
            **head.options(),
        )

    def by_logits(self, logits: Tensor) -> TokenStats:
        """The same from logits [B, T, V]."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        temperature = self.temperature
        z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
        logp = z.log_softmax(-1)
        labels = self.labels.to(z.device)
        scored = labels != IGNORED
        target = labels.clamp(min=0)[..., None]
        own = logp.gather(-1, target)[..., 0]
        makers: dict[str, Callable[[], Tensor]] = {
            "logprob": lambda: own,
            # 0 log 0 = 0, also of tokens that are ruled out
            "entropy": lambda: -(logp.exp() * logp.clamp(min=-1e4)).sum(-1),
            "logsumexp": lambda: z.detach().logsumexp(-1),
            "mean_logit": lambda: z.detach().mean(-1),
            "log_sum_sq_probs": lambda: (2 * logp.detach()).logsumexp(-1),
            "top1": lambda: z.gather(-1, target)[..., 0] >= z.amax(-1),
        }
        values = {name: makers[name]().masked_fill(~scored, 0) for name in self.stats}
        return TokenStats(**{name: values.get(name) for name in STATS})


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


class _StandIn:
    """The forward of a head that some threads have do something else, and its last hook."""

    lock = threading.Lock()  # for what stands in a module's dict

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name
        self.own = vars(module).get(name)  # None: its class's forward
        self.calls = 0  # of all threads
        self.own_call = threading.local()  # .last: forward and hook of this thread's
        setattr(module, name, self)
        self.handle = module.register_forward_hook(self.hook)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward, _ = getattr(self.own_call, "last", (self.forward, None))
        return forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the head does."""
        # not a bound method that is kept: torch.compile would look it up anew, and find this
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def hook(self, module: Any, args: Any, output: Any) -> None:
        """What comes out of the head's call, after the hooks of others."""
        _, hook = getattr(self.own_call, "last", (None, None))
        if hook is not None:
            hook(output)

    def remove(self) -> None:
        self.handle.remove()
        if self.own is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.own)


class _Same:
    """An object that is equal to itself alone, and to nothing once it is gone; it is not held on
    to, as far as its kind allows that."""

    def __init__(self, value: Any) -> None:
        self.number = id(value)
        try:
            self.value: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.value = lambda: value

    def __eq__(self, other: object) -> bool:
        # another may have taken its number in memory
        alive = self.value()
        return isinstance(other, _Same) and alive is not None and alive is other.value()

    def __hash__(self) -> int:
        return self.number


_PLAIN = (str, int, float, bool, type(None), torch.dtype)


def _frozen(value: Any) -> Any:
    """Something that compares equal as long as a value of a configuration is what it was."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(each)) for name, each in value.items())
    # one within a configuration
    return _frozen(vars(value)) if hasattr(value, "to_dict") else _Same(value)


def _plain_numbers(module: Any) -> tuple[Any, ...]:
    """The plain values among what a module has, its mode among them."""
    return tuple((n, v) for n, v in vars(module).items() if isinstance(v, _PLAIN))


def _forwards(module: Any) -> tuple[_Same | None, ...]:
    """What runs when a module is called."""
    forward = vars(module).get("forward")
    forward = forward.own if isinstance(forward, _StandIn) else forward
    return _same(type(module).forward), _same(forward)


def _hooks(module: Any) -> tuple[_Same | None, ...]:
    """What runs behind that."""
    hooks = module._forward_hooks.values()
    return tuple(_same(h) for h in hooks if not isinstance(getattr(h, "__self__", None), _StandIn))


def _same(function: Any) -> _Same | None:
    # a method is made anew whenever it is asked for
    return None if function is None else _Same(getattr(function, "__func__", function))


@dataclass(frozen=True)
class _Scorer:
    """The module whose call makes logits, and what its weight is.

    Attributes:
        module: takes hidden states [B, T, H] and returns [B, T, V].
        kind: "linear", or "lora": a linear layer and low-rank adapters.
    """

    module: Any
    kind: str

    def state(self, model: Any, forward: Callable[..., Any]) -> Any:
        """What tells apart the states in which a model may do other things to its logits: modules
        and functions; and hooks and numbers, most of which have no part in them.

        Not all that there may be: a number may stand anywhere. What is missing here is found in
        what becomes of made-up logits, after the call.
        """
        base = getattr(self.module, "base_layer", self.module)
        # not of the weight, which may be sharded
        weight = base._parameters.get("weight")
        parts = [*model.get_output_embeddings().modules()]
        functions = (
            self.kind,
            _Same(self.module),
            base.out_features,
            None if weight is None else weight.dtype,
            *(same for part in parts for same in _forwards(part)),
            _same(type(model).forward),
            _same(forward),
        )
        hooks = tuple(same for part in parts for same in _hooks(part))
        return functions, (hooks, _plain_numbers(model), _frozen(vars(model.config)))

    @classmethod
    def of(cls, model: Any) -> _Scorer:
        """Look it up: adapters and wrappers come and go.

        Raises:
            UnsupportedHead: if the output embedding is none, or of an unknown kind.
        """
        module = model.get_output_embeddings()
        while module is not None:
            inner = vars(module).get("_modules", {})
            if "modules_to_save" in inner and "original_module" in inner:  # PEFT trains a copy
                copies, active = inner["modules_to_save"], module.active_adapters
                in_use = not module.disable_adapters and active and active[0] in copies
                module = copies[active[0]] if in_use else inner["original_module"]
            elif "lora_A" in inner and "base_layer" in inner:
                if module.disable_adapters or not _active(module) or module.merged:
                    module = inner["base_layer"]
                else:
                    _check_adapters(module)
                    return cls(module, "lora")
            else:
                names = [name for name in _WRAPPED if name in inner]
                if not names:
                    break
                module = inner[names[0]]
        if module is None:
            raise UnsupportedHead("model: expected one with an output embedding, got none")
        _check_linear(module)
        return cls(module, "linear")

    @property
    def _attribute(self) -> str:
        # accelerate's hooks keep the forward that theirs calls
        return "_old_forward" if "_hf_hook" in vars(self.module) else "forward"

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of hidden states, whatever stands in for it."""
        forward = getattr(self.module, self._attribute)
        forward = forward.forward if isinstance(forward, _StandIn) else forward
        return forward(hidden)

    @contextmanager
    def replaced(self, forward: Any, hook: Any) -> Iterator[None]:
        """For a while, have the module do something else in this thread, and a hook behind all
        others."""
        name = self._attribute
        with _StandIn.lock:
            stand_in = vars(self.module).get(name)
            if not isinstance(stand_in, _StandIn):
                stand_in = _StandIn(self.module, name)
            stand_in.calls += 1
        # one that is under way in this thread is gone on with afterwards
        before = getattr(stand_in.own_call, "last", None)
        stand_in.own_call.last = (forward, hook)
        try:
            yield
        finally:
            if before is None:
                del stand_in.own_call.last
            else:
                stand_in.own_call.last = before
            with _StandIn.lock:
                stand_in.calls -= 1
                if not stand_in.calls:
                    stand_in.remove()

    def inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """States, weight and bias of the product that makes the logits. To be asked for within the
        module's call, as a sharded weight is whole only there."""
        if self.kind == "linear":
            return hidden, self.module.weight, self.module.bias
        # W h + s B A h is one product, of [h, s A h] and [W, B]: a copy of the weight, as many
        # columns wider as the rank is high, is what an adapted head costs
        base = self.module.base_layer
        weights, states = [base.weight], [hidden]
        for name in _active(self.module):
            low, high = self.module.lora_A[name], self.module.lora_B[name]
            dropped = self.module.lora_dropout[name](hidden.to(low.weight.dtype))
            states.append((low(dropped) * self.module.scaling[name]).to(hidden.dtype))
            weights.append(high.weight.to(base.weight.dtype))
        return torch.cat(states, -1), torch.cat(weights, 1), base.bias


def _active(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _check_adapters(module: Any) -> None:
    _check_linear(module.base_layer)
    variants = getattr(module, "lora_variant", {})
    for name in _active(module):
        if not isinstance(module.lora_A[name], torch.nn.Linear):
            raise UnsupportedHead(f"model: expected LoRA on the head, got {type(module).__name__}")
        if name in variants or getattr(module, "use_dora", {}).get(name):
            raise UnsupportedHead(f"model: expected plain LoRA on the head, got {variants or name}")
        if module.lora_B[name].bias is not None or getattr(module, "fan_in_fan_out", False):
            raise UnsupportedHead("model: expected LoRA without bias on the head, got one with it")


def _check_linear(module: Any) -> None:
    if module._backward_hooks or module._backward_pre_hooks:
        raise UnsupportedHead(
            "model: expected a head without backward hooks, which are of the gradient of logits, "
            f"got {type(module).__name__} with some; hook the layer before it"
        )
    if getattr(type(module), "forward", None) is not torch.nn.Linear.forward:
        raise UnsupportedHead(
            f"model: expected an output embedding that is a torch.nn.Linear, got "
            f"{type(module).__name__}; merge adapters into the head, or leave it out of adaptation "
            "and quantisation"
        )
    from torch.distributed.tensor import DTensor

    # not as module.weight: what is asked for outside of its module's call DeepSpeed gathers, and
    # from then on for the whole of the model's forward and backward
    weight = module._parameters.get("weight")
    weight = module.weight if weight is None else weight
    if type(weight) not in (Tensor, torch.nn.Parameter, DTensor) and not isinstance(
        getattr(weight, "data", None), DTensor
    ):
        raise UnsupportedHead(
            f"model: expected an output embedding of plain numbers, got a weight of type "
            f"{type(weight).__name__}; leave the head out of quantisation"
        )


@dataclass(frozen=True)
class AfterHead:
    """What a model does with the output of its head: softcap tanh(z / softcap) logit_scale of the
    first ``vocab`` columns. Found with a precision of ``eps``."""

    softcap: float | None
    logit_scale: float
    vocab: int
    eps: float = field(default=torch.finfo(torch.float32).eps, repr=False, compare=False)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        if weight.shape[0] != self.vocab:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return Head(weight, bias, self.softcap, self.logit_scale)

    def apply(self, z: Tensor) -> Tensor:
        return LogitMap(None, self.softcap, self.logit_scale).apply(z.clone())

    def gap(self, made: Tensor, logits: Tensor) -> float:
        """How far off the worst of the logits [rows, vocab] is that were made of the head's output
        [rows, V]; 0 if all are right but for rounding."""
        eps = max(self.eps, torch.finfo(logits.dtype).eps, torch.finfo(made.dtype).eps)
        expected = self.apply(made[:, : self.vocab])
        # of its own size each, so that nothing may be added, however small
        return _gap(logits.to(made.dtype), expected, 8 * eps * expected.abs())


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


@functools.cache
def _keep_compiler_out() -> None:
    """Have torch.compile leave alone what is known of heads: compiled code would compare other
    objects at every call, and run the experiment anew. Not by decorators, which import the compiler
    with the package."""
    owners: tuple[tuple[Any, str], ...] = (
        (FusedForward, "_recall"),
        (FusedForward, "_keep"),
        (sys.modules[__name__], "_after_head"),
    )
    for owner, name in owners:
        function = torch.compiler.disable(getattr(owner, name))  # type: ignore[no-untyped-call]
        setattr(owner, name, function)


def _after_head(fused: FusedForward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AfterHead:
    """Find out what a model does with the output of its head, and verify all of it.

    The forward is run once, without gradients. In place of the head's output it meets made-up
    logits of great range, and the head's own at a few positions. What becomes of the first has to
    be a soft cap and a factor, in every column; what becomes of the second, the logits that
    ``Head`` makes of the hidden states.
    """
    model = fused.model
    scorer = _Scorer.of(model)
    experiment = _Experiment(scorer)
    with unnoticed(model), evaluating(scorer.module):
        # a cache grows in a forward
        args = [_own(value) for value in args]
        kwargs = {name: _own(value) for name, value in kwargs.items()}
        try:
            with scorer.replaced(experiment, experiment.hook):
                output = fused.forward(*args, **kwargs)
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


def _spread(vocab: int, like: Tensor) -> Tensor:
    """[V], numbers of both signs and of a range as logits have it; in full precision."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.linspace(-64.0, 64.0, vocab, dtype=dtype, device=like.device)


def _fit(found: Tensor, eps: float, known: Sequence[float]) -> AfterHead:
    """Soft cap and factor from what became of a tiny and a huge logit [rows, V].

    known: numbers of the configuration, which are preferred to measured ones.
    """
    tiny, huge = (float(found[i].double().median()) for i in (0, 1))
    factor, limit = tiny / _TINY, huge
    if not (math.isfinite(factor) and factor > 0 and math.isfinite(limit) and limit > 0):
        raise UnsupportedHead(
            f"model: expected logits that are scaled and capped, got {tiny} for {_TINY} and {huge} "
            f"for {_HUGE}"
        )
    capped = limit < 0.99 * factor * _HUGE
    if capped:  # a tiny logit is capped a little, too
        factor = limit * math.atanh(tiny / limit) / _TINY
    near = 2 * eps
    inverse = [1 / v for v in known]
    factor = _snap(factor if capped else limit / _HUGE, (1.0, *known, *inverse), near)
    if not capped:
        return AfterHead(None, factor, found.shape[1], eps)
    limit = _snap(limit, (*known, *(v * factor for v in known)), near)
    return AfterHead(limit / factor, factor, found.shape[1], eps)


def _snap(value: float, known: Sequence[float], near: float) -> float:
    closest = min(known, key=lambda v: abs(v - value), default=value)
    return closest if abs(closest - value) <= near * abs(value) else value


def _numbers(config: Any) -> list[float]:
    """Every positive number of the text model's configuration."""
    values = vars(config.get_text_config()).values()
    return [float(v) for v in values if isinstance(v, int | float) and 0 < v < math.inf]


def _gap(found: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest difference, or 0 where each is within its bound."""
    gap = (found - expected).abs()
    return 0.0 if bool((gap <= bound).all()) else float(gap.amax())


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
