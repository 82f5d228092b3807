"""Lazy logits in a model: its head's forward returns a lazy tensor."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fusedpo.checks import bad_choice, bad_type
from fusedpo.head import Head
from fusedpo.lazy import flash_attention
from fusedpo.lazy.everywhere import NewModels
from fusedpo.lazy.expressions import Logits
from fusedpo.lazy.memory import Memory, Recipe
from fusedpo.lazy.source import Options, Source
from fusedpo.lazy.tensor import LazyTensor, settle
from fusedpo.model_head.errors import UnsupportedHead
from fusedpo.model_head.install import check_options
from fusedpo.model_head.modules import HeadModule, causal_model


def lazy_output(hidden: Tensor, head: Head, options: Options) -> LazyTensor:
    """The lazy tensor [..., V] in place of a head's output.

    Args:
        hidden: [..., H].
        head: whole and on this device. In a model's own call, where the code behind it adds soft
            cap and scale, without them.
        options: of ``lazy_logits``.
    """
    flash_attention.replace()
    source = Source(hidden, head, options)
    index = torch.arange(source.count).view(hidden.shape[:-1])
    memory = Memory(Logits(softcap=head.softcap, scale=head.logit_scale))
    return LazyTensor.of(
        Recipe(source, memory, index, source.dtype, source.requires_grad, index.dim())
    )


class LazyHead:
    """The forward of a head that returns lazy logits.

    An object of a class, where a closure would do, so that models are pickled and copied with it.

    Args:
        module: that makes logits: a linear layer, or one with low-rank adapters.
        original: the forward in the module's ``__dict__``; None for its class's.
        options: of ``lazy_logits``.
    """

    def __init__(self, module: Any, original: Any, options: Options) -> None:
        self.module, self.original, self.options = module, original, options

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the forward that this one replaces."""
        if self.original is not None:
            return self.original(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        one_position = hidden.dim() > 2 and hidden.shape[-2] == 1  # as generation takes it
        traced = torch.compiler.is_compiling()
        if args or kwargs or one_position or traced or not hidden.numel():
            return self.plain(hidden, *args, **kwargs)
        try:
            head = HeadModule.of_module(self.module)
        except UnsupportedHead as error:  # adapters that came later
            warnings.warn(f"{error.reason}; its logits are made", stacklevel=2)
            return self.plain(hidden)
        if head.module is not self.module:  # its adapters are off: the layer below is called
            return self.plain(hidden)
        states, weight, bias = head.operands(hidden)
        return lazy_output(states, Head(weight, bias), self.options)


class LazyLogits:
    """A model's lazy logits, until ``remove`` or the end of a ``with`` block."""

    def __init__(self, heads: list[Any]) -> None:
        self._heads = heads

    def remove(self) -> None:
        """Give the head its own forward back; a second time, nothing."""
        for module in self._heads:
            for attribute in ("forward", "_old_forward"):
                forward = vars(module).get(attribute)
                if not isinstance(forward, LazyHead):
                    continue
                if forward.original is None:
                    delattr(module, attribute)
                else:
                    setattr(module, attribute, forward.original)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Refused: ``model = lazy_logits(model)`` is a mistake that is easily made."""
        expected = "the model, which lazy_logits has changed in place, to be called"
        raise bad_type("model", expected, "what lazy_logits returns", "keep the model's own name")

    def __repr__(self) -> str:
        return f"LazyLogits({', '.join(map(repr, self._heads))})"

    def __enter__(self) -> LazyLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def lazy_logits(
    model: Any = None,
    *,
    memory_budget: int | float | str | None = None,
    backend: str = "auto",
    unknown: Literal["warn", "raise"] = "warn",
    gradient_tolerance: float = 0.0,
) -> LazyLogits | NewModels:
    """Let ``model(...).logits`` be a tensor that is not there, for code that is not to be changed.

    Shape [B, T, V], dtype, device and gradient are those of real logits. What a program does to
    them is done to the hidden states instead, and what ends in one number a token is scored without
    them: log-probabilities (``log_softmax`` and ``gather``, ``gather`` and ``logsumexp``,
    ``cross_entropy``), entropies, accuracies, means. Of log-probabilities that a mask is multiplied
    to, only those that it keeps are scored; several uses of the same logits share one pass over the
    head. docs/trainers.md has the list. Two things differ: nothing at a position that a mask leaves
    out shows, not even a NaN; and of tokens with equal logits each counts as the likeliest where
    argmax is compared with labels.

    Anything else makes the real logits, once, with a warning that names the operation and the place
    in the caller's code. So does a call with one position a sequence, as in generation, without a
    warning; and a head that torch.compile compiles.

    Args:
        model: a causal language model of transformers, wrapped or not. Its head has to be a linear
            layer, with or without LoRA. Soft cap and scale that its forward adds are followed.
            None: every model of transformers that is made from now on.
        memory_budget: bytes or a text, as of ``linear_logprobs``.
        backend: as of ``linear_logprobs``.
        unknown: what an operation does that needs the real logits: "warn", or "raise" an error.
        gradient_tolerance: as of ``linear_logprobs``, for gradients through log-probabilities;
            those through entropies are exact, and what is evaluated a few rows at a time is.

    Returns:
        An object with a method ``remove``, and a context manager that calls it. Calling this again
        changes the options only.

    Raises:
        ValueError, TypeError: for a model without such a head, or an unknown option. Where a
            wrapper frees the weight after the head's call (FSDP with the head in a unit of its own,
            ZeRO-3), the first operation that needs it raises.
    """
    check_options(memory_budget, backend, gradient_tolerance)
    if unknown not in ("warn", "raise"):
        raise bad_choice("unknown", unknown, ("warn", "raise"))
    options = Options(memory_budget, backend, unknown, gradient_tolerance)
    if model is None:
        return NewModels(functools.partial(_install, options))
    return _install(options, model)


def _install(options: Options, model: Any) -> LazyLogits:
    causal = causal_model(model)
    HeadModule.of(causal)  # refuses what it cannot be
    _settle_before_steps()
    heads = [*_heads(causal.get_output_embeddings())]
    for module in heads:
        attribute = HeadModule(module, "linear", module).attribute
        current = vars(module).get(attribute)
        original = current.original if isinstance(current, LazyHead) else current
        setattr(module, attribute, LazyHead(module, original, options))
    return LazyLogits(heads)


@functools.cache
def _settle_before_steps() -> None:
    register_optimizer_step_pre_hook(settle)


def _heads(module: Any) -> Iterator[Any]:
    """The layers whose call may make the logits: below wrappers, with and without adapters."""
    children = vars(module).get("_modules", {})
    if "modules_to_save" in children and "original_module" in children:  # PEFT's copies
        yield from _heads(children["original_module"])
        for copy in children["modules_to_save"].values():
            yield from _heads(copy)
    elif "lora_A" in children and "base_layer" in children:
        yield module
        yield from _heads(children["base_layer"])
    elif isinstance(module, torch.nn.Linear):
        yield module
    else:
        for child in children.values():
            yield from _heads(child)
