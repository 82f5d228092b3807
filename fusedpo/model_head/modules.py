"""The module whose call makes the logits, below wrappers and adapters; linear, or with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusedpo.model_head.errors import unsupported
from fusedpo.model_head.override import original_forward, override_forward
from fusedpo.model_head.state import head_state

# names under which wrappers keep a module: torch.compile, FSDP, DDP and DeepSpeed, checkpointing
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "module", "_checkpoint_wrapped_module")


def causal_model(model: Any) -> Any:
    """The model with the language-modelling head, below wrappers and PEFT's adapters.

    Args:
        model: a model of transformers, wrapped by PEFT, DDP, FSDP, DeepSpeed, torch.compile or not.

    Returns:
        The first module from the outside whose class has ``get_output_embeddings``; the innermost
        if none has.
    """
    # asked of the class, as wrappers pass attribute lookups on to what they wrap
    while not hasattr(type(model), "get_output_embeddings"):
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
            continue
        wrapped = _wrapped(getattr(model, "_modules", {}))
        if wrapped is None:
            return model
        model = wrapped
    return model


def _wrapped(children: dict[str, Any]) -> Any:
    """The module that a wrapper with these children wraps, or None if it is no wrapper."""
    return next((children[name] for name in _WRAPPED if name in children), None)


@dataclass(frozen=True)
class HeadModule:
    """The module whose call makes the logits.

    Attributes:
        module: takes hidden states [B, T, H] and returns [B, T, V].
        kind: "linear", or "lora": a linear layer with low-rank adapters.
        embedding: the model's output embedding: the module, or what wraps it.
    """

    module: Any
    kind: Literal["linear", "lora"]
    embedding: Any

    @classmethod
    def of(cls, model: Any) -> HeadModule:
        """Look it up. Not to be kept between calls: adapters and wrappers come and go.

        Raises:
            UnsupportedHead: if the model has no output embedding, or one of an unknown kind.
        """
        find = getattr(model, "get_output_embeddings", None)
        embedding = find() if callable(find) else None
        if embedding is None:
            raise unsupported("one with an output embedding", "none")
        return cls.of_module(embedding)

    @classmethod
    def of_module(cls, embedding: Any) -> HeadModule:
        """The module that an output embedding calls in the end.

        Raises:
            UnsupportedHead: for one of an unknown kind.
        """
        module = embedding
        while True:
            children = vars(module).get("_modules", {})
            if "modules_to_save" in children and "original_module" in children:  # PEFT's copies
                copies, active = children["modules_to_save"], module.active_adapters
                in_use = not module.disable_adapters and active and active[0] in copies
                module = copies[active[0]] if in_use else children["original_module"]
            elif "lora_A" in children and "base_layer" in children:
                if module.disable_adapters or not _active_adapters(module) or module.merged:
                    module = children["base_layer"]
                else:
                    _check_lora(module)
                    return cls(module, "lora", embedding)
            elif (wrapped := _wrapped(children)) is not None:
                module = wrapped
            else:
                _check_linear(module)
                return cls(module, "linear", embedding)

    @property
    def attribute(self) -> str:
        """The name under which the module's call finds its forward."""
        # accelerate's hooks keep the forward that theirs calls
        return "_old_forward" if "_hf_hook" in vars(self.module) else "forward"

    def state(self, model: Any, forward: Callable[..., Any]) -> tuple[Any, Any]:
        """The key of ``head_state`` for this head in a model with this forward."""
        return head_state(self.module, self.kind, self.embedding, model, forward)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output [B, T, V] of the module's original forward, overridden or not."""
        return original_forward(getattr(self.module, self.attribute))(hidden)

    def override(
        self, forward: Callable[..., Any], hook: Callable[[Any], None]
    ) -> AbstractContextManager[None]:
        """Run another forward in the module's place; see ``override_forward``."""
        return override_forward(self.module, self.attribute, forward, hook)

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """States, weight and bias of the one product that makes the logits.

        To be called within the module's call: a sharded weight is whole only there.
        """
        if self.kind == "linear":
            return hidden, self.module.weight, self.module.bias
        # W h + s B A h is one product, of [W, B] and [h, s A h]. It costs a copy of the weight, as
        # many columns wider as the ranks add up to.
        base = self.module.base_layer
        weights, states = [base.weight], [hidden]
        for name in _active_adapters(self.module):
            low, high = self.module.lora_A[name], self.module.lora_B[name]
            dropped = self.module.lora_dropout[name](hidden.to(low.weight.dtype))
            states.append((low(dropped) * self.module.scaling[name]).to(hidden.dtype))
            weights.append(high.weight.to(base.weight.dtype))
        return torch.cat(states, -1), torch.cat(weights, 1), base.bias


def _active_adapters(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _check_lora(module: Any) -> None:
    """Refuse adapters whose product is not that of ``HeadModule.operands``."""
    _check_linear(module.base_layer)
    variants = getattr(module, "lora_variant", {})
    for name in _active_adapters(module):
        if not isinstance(module.lora_A[name], torch.nn.Linear):
            raise unsupported("LoRA on the head", type(module).__name__)
        if name in variants or getattr(module, "use_dora", {}).get(name):
            raise unsupported("plain LoRA on the head", f"a variant of it in the adapter {name!r}")
        if module.lora_B[name].bias is not None or getattr(module, "fan_in_fan_out", False):
            raise unsupported(
                "LoRA without bias and without fan_in_fan_out on the head",
                f"one of them in the adapter {name!r}",
            )


def _check_linear(module: Any) -> None:
    """Refuse a module that is not a linear layer with a dense weight and without backward hooks."""
    if module._backward_hooks or module._backward_pre_hooks:
        raise unsupported(
            "a head without backward hooks, which need the gradient of logits that are not made",
            f"{type(module).__name__} with some",
            "hook the layer before it",
        )
    if getattr(type(module), "forward", None) is not torch.nn.Linear.forward:
        raise unsupported(
            "an output embedding that is a torch.nn.Linear",
            type(module).__name__,
            "merge adapters into the head, or exclude it from adaptation and quantisation",
        )
    from torch.distributed.tensor import DTensor

    # not as module.weight: what is asked for outside of its module's call DeepSpeed gathers, and
    # from then on for the whole of the model's forward and backward
    weight = module._parameters.get("weight")
    weight = module.weight if weight is None else weight
    if type(weight) not in (Tensor, torch.nn.Parameter, DTensor) and not isinstance(
        getattr(weight, "data", None), DTensor
    ):
        raise unsupported(
            "an output embedding with a dense weight",
            f"a weight of type {type(weight).__name__}",
            "exclude the head from quantisation",
        )
