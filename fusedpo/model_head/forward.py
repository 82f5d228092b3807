"""The forward that replaces a model's: with ``fused`` it runs a task in place of the head."""

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
from fusedpo.engine.stats import DIFFERENTIABLE, TokenStats
from fusedpo.head import Head
from fusedpo.labels import aligned_labels
from fusedpo.model_head.cap_and_scale import AfterHead
from fusedpo.model_head.carry import HeadCall
from fusedpo.model_head.decoder import decoder_input
from fusedpo.model_head.errors import UnsupportedHead, unsupported
from fusedpo.model_head.experiment import find_after_head, is_mutable
from fusedpo.model_head.modules import HeadModule, causal_model
from fusedpo.model_head.score import Score, map_stats

AtHead = Callable[[Tensor, Head], Any]
"""A task at the head: a function of the hidden states [B, T, H] that feed it, and of the head;
returns a tree of tensors."""

_STATES = 8  # states of a head whose AfterHead is kept


class FusedForward:
    """Replaces a model's forward, and runs it.

    An object of a class, where a closure would do, so that models are pickled and copied with it.
    A subclass may change what a call returns; see ``install_forward``.

    Args:
        model: the causal language model (see ``causal_model``).
        original: the ``forward`` in the model's ``__dict__``; None for its class's forward.
        memory_budget, backend, unsupported, gradient_tolerance: as of ``add_fused_head``.

    Attributes:
        known: ``AfterHead`` by the state of the head, for at most eight states.
        reason: why the head is not supported; "" if it is, as far as is known.
    """

    def __init__(
        self,
        model: Any,
        original: Any = None,
        memory_budget: int | float | str | Plan | None = None,
        backend: str = "auto",
        unsupported: str = "raise",
        gradient_tolerance: float = 0.0,
    ) -> None:
        _keep_compiler_out()
        self.model = model
        self.original = original
        self.memory_budget = memory_budget
        self.backend = backend
        self.unsupported = unsupported
        self.gradient_tolerance = gradient_tolerance
        self.known: dict[Any, AfterHead] = {}
        self.reason = ""

    def __getstate__(self) -> dict[str, Any]:
        # a copy has other modules, and hooks that are gone need not be copied or pickled
        return {**vars(self), "known": {}}

    def of(self, model: Any) -> FusedForward:
        """The same for a copy of the model, which runs the copy's weights."""
        clone = copy.copy(self)
        clone.model = model
        if getattr(self.original, "__self__", None) is self.model:
            clone.original = types.MethodType(self.original.__func__, model)
        return clone

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward that this one replaces."""
        if self.original is not None:
            return self.original
        return type(self.model).forward.__get__(self.model)

    @property
    def options(self) -> dict[str, Any]:
        """Those that a function of the public ones takes, called at this model's head."""
        return {
            "memory_budget": self.memory_budget,
            "backend": self.backend,
            "gradient_tolerance": self.gradient_tolerance,
        }

    @property
    def __func__(self) -> _UnboundForward:
        # accelerate wraps the functions of methods, and closures over anything else
        return _UnboundForward(self)

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
        """Statistics of labels, as ``add_fused_head`` says of ``model(..., fused=True)``.

        Args:
            args: of the model's forward.
            kwargs: the same, and labels or shift_labels, stats, differentiable and temperature,
                which are removed.

        Raises:
            ValueError: unless there is exactly one of labels and shift_labels.
            UnsupportedHead: if the head is not supported, without ``unsupported="fallback"``.
        """
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        stats = kwargs.pop("stats", ("logprob",))
        differentiable = kwargs.pop("differentiable", DIFFERENTIABLE)
        temperature = kwargs.pop("temperature", 1.0)
        if (labels is None) == (shift_labels is None):
            got = "neither" if labels is None else "both"
            remedy = "pass labels as in Hugging Face, or shift_labels aligned with the states"
            raise bad_value("labels", "either labels or shift_labels with fused=True", got, remedy)
        if getattr(self.model.config, "is_encoder_decoder", False):
            shift_labels, labels = labels if shift_labels is None else shift_labels, None
            decoder = decoder_input(self.model, shift_labels, self._by_name(args, kwargs))
            kwargs = {**kwargs, **decoder}
        aligned = shift_labels if labels is None else aligned_labels(labels)
        passed_on = tuple(differentiable)
        task = Score(aligned, tuple(stats), temperature, differentiable=passed_on, **self.options)
        if self.reason:
            scores, aux_loss = self._by_logits(task, args, kwargs)
        else:
            try:
                scores, aux_loss = self.run(task, args, kwargs)
            except UnsupportedHead as error:
                if self.unsupported == "raise":
                    raise
                warnings.warn(f"{error.reason}; its own logits are made instead", stacklevel=3)
                self.reason = str(error)
                scores, aux_loss = self._by_logits(task, args, kwargs)
        if labels is not None:
            scores = map_stats(scores, lambda t: t[:, :-1])
        return scores._replace(aux_loss=aux_loss)

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = [*inspect.signature(self.forward).parameters] if args else []
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _by_logits(
        self, task: Score, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[TokenStats, Tensor | None]:
        output = self.forward(*args, **{**kwargs, **self.settings()})
        return task.from_logits(output.logits), getattr(output, "aux_loss", None)

    def run(
        self, task: AtHead, args: Sequence[Any], kwargs: Mapping[str, Any], *, carry: bool = True
    ) -> tuple[Any, Tensor | None]:
        """Run the model's forward with the task in place of the head.

        Args:
            task: see ``AtHead``.
            args, kwargs: of the model's forward, without labels.
            carry: whether gradients pass through the output of the head's own call, on which
                wrappers of the head hang their hooks. Without, nothing is copied.

        Returns:
            The task's result, and the output's aux_loss.

        Raises:
            ValueError: for labels among the arguments.
            UnsupportedHead: if the head is more than a weight, a bias, a soft cap and a scale.
        """
        refuse_labels(self._by_name(args, kwargs))
        kwargs = {**kwargs, **self.settings()}
        head = HeadModule.of(self.model)
        state, after, certain = self._recall(head)
        if after is not None and not certain:
            if (outcome := self._attempt(head, after, task, args, kwargs, carry)) is not None:
                self._keep(state, after)
                return outcome
            after = None
        if after is None:
            after = self.after_head(args, kwargs)
            self._keep(state, after)
        call, output = self._call(head, after, task, args, kwargs, carry)
        result = call.result()
        if not call.matches(after, output):
            self.known.pop(state, None)
            raise unsupported(
                "logits that are capped and scaled as at an earlier call",
                "another soft cap or scale",
                "call it again, and they are found anew",
            )
        return result, getattr(output, "aux_loss", None)

    def after_head(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AfterHead:
        """The function of its head's output that the model's logits are, found anew."""
        return find_after_head(self.model, self.forward, args, kwargs)

    def _recall(self, head: HeadModule) -> tuple[Any, AfterHead | None, bool]:
        """The head's state; its ``AfterHead``, or else that of the last state with the same
        functions, or None; and whether it is this state's."""
        state = head.state(self.model, self.forward)
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
        head: HeadModule,
        after: AfterHead,
        task: AtHead,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        carry: bool,
    ) -> tuple[HeadCall, Any]:
        """The head's call in one forward of the model, and the forward's output."""

        def at_head(hidden: Tensor) -> Any:
            states, weight, bias = head.operands(hidden)
            call.vocab = weight.shape[0]
            return task(states, after.head(weight, bias))

        call = HeadCall(at_head, carry)
        with head.override(call, call.hook):
            output = self.forward(*args, **kwargs)
        return call, output

    def _attempt(
        self, head: HeadModule, after: AfterHead, *call_arguments: Any
    ) -> tuple[Any, Tensor | None] | None:
        """The outcome of ``run`` with the ``AfterHead`` of a state with other numbers and hooks,
        which may change at every step without a part in the logits; None if it does not hold."""
        _, args, kwargs, _ = call_arguments
        if any(map(is_mutable, [*args, *kwargs.values()])):  # it would be changed twice
            return None
        try:
            call, output = self._call(head, after, *call_arguments)
            result = call.result()
        except Exception:  # which the experiment, or the run after it, meets again and explains
            return None
        # a hook that returns another tensor may depend on a parameter
        if call.hooked_output is not call.output or not call.matches(after, output):
            return None
        return result, getattr(output, "aux_loss", None)

    def settings(self) -> dict[str, Any]:
        """Arguments of the model's forward: no cache, and an output with named fields."""
        settings = {"use_cache": False, "return_dict": True}
        parameters = inspect.signature(type(self.model).forward).parameters
        return {name: value for name, value in settings.items() if name in parameters}


class _UnboundForward:
    """A function of the model, for accelerate to make methods of: runs the fused forward of the
    model it is called with, so that a copy of a prepared model runs its own weights."""

    def __init__(self, forward: FusedForward) -> None:
        self.forward = forward

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return (fused_forward(model) or self.forward)(*args, **kwargs)


def forward_function(forward: Any) -> Any:
    """The function below a bound method, or the fused forward that accelerate made it of."""
    if isinstance(forward, FusedForward):
        return forward
    function = getattr(forward, "__func__", forward)
    return function.forward if isinstance(function, _UnboundForward) else function


def fused_forward(model: Any) -> FusedForward | None:
    """The forward that ``add_fused_head`` or ``install_forward`` gave a model, or None.

    Args:
        model: wrapped or not; may be a copy of a model with a fused head.
    """
    causal = causal_model(model)
    for name in ("forward", "_original_forward"):  # accelerate wraps the one and keeps the other
        forward = forward_function(vars(causal).get(name))
        if isinstance(forward, FusedForward):
            if forward.model is not causal:
                # a method is copied with its model, but not the function it was made of
                forward = forward.of(causal)
                setattr(causal, name, forward)
            return forward
    return None


def refuse_labels(inputs: Mapping[str, Any]) -> None:
    """Refuse labels beside a task: the model would make a loss of what stands in for its logits.

    Raises:
        ValueError: for labels or shift_labels that are not None.
    """
    for name in ("labels", "shift_labels"):
        if inputs.get(name) is not None:
            raise bad_value(
                name,
                "none among the model's inputs, as the task alone scores labels",
                "some",
                "leave them out, and score them in the task",
            )


@functools.cache
def _keep_compiler_out() -> None:
    """Exclude the experiment and its results from torch.compile: compiled code would compare other
    objects at every call, and run the experiment anew. Not by decorators, which import the compiler
    with the package."""
    for name in ("_recall", "_keep", "after_head"):
        function = torch.compiler.disable(getattr(FusedForward, name))  # type: ignore[no-untyped-call]
        setattr(FusedForward, name, function)
