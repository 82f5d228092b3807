"""The module whose call makes the logits: below its wrappers, linear or with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.model_head.errors import UnsupportedHead
from fusedpo.model_head.stand_in import _StandIn
from fusedpo.model_head.state import _forwards, _frozen, _hooks, _plain_numbers, _Same, _same

# under which wrappers keep what they wrap: torch.compile, FSDP, DDP and DeepSpeed, checkpointing
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "module", "_checkpoint_wrapped_module")


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
