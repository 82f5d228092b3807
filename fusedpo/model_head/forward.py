"""The forward that stands in for a model's."""

from __future__ import annotations

import copy
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.engine.plan import Plan
from fusedpo.engine.stats import TokenStats
from fusedpo.head import Head
from fusedpo.model_head.cap_and_scale import AfterHead
from fusedpo.model_head.carry import _Call
from fusedpo.model_head.errors import UnsupportedHead
from fusedpo.model_head.experiment import _after_head, _is_changeable
from fusedpo.model_head.modules import _Scorer, causal_model
from fusedpo.model_head.score import Score, aligned_labels, on_stats

AtHead = Callable[[Tensor, Head], Any]
"""What is done with the hidden states [B, T, H] that feed a head, and the head."""

_STATES = 8  # of a head that are kept, each with the hooks and the functions it had


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
            after = self.after_head(args, kwargs)
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

    def after_head(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AfterHead:
        """What the model does with the output of its head, found anew and verified."""
        return _after_head(self.model, self.forward, args, kwargs)

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


@functools.cache
def _keep_compiler_out() -> None:
    """Have torch.compile leave alone what is known of heads: compiled code would compare other
    objects at every call, and run the experiment anew. Not by decorators, which import the compiler
    with the package."""
    owners: tuple[tuple[Any, str], ...] = (
        (FusedForward, "_recall"),
        (FusedForward, "_keep"),
        (FusedForward, "after_head"),
    )
    for owner, name in owners:
        function = torch.compiler.disable(getattr(owner, name))  # type: ignore[no-untyped-call]
        setattr(owner, name, function)
