"""The state of a head, its model and its configuration, as a key that compares equal while nothing
has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from fusedpo.model_head.override import ForwardOverride, is_override_hook

_PLAIN = (str, int, float, bool, type(None), torch.dtype)


class Identity:
    """A key that equals only keys of the same living object, without keeping that object alive
    where its type allows weak references."""

    def __init__(self, value: Any) -> None:
        self.number = id(value)
        try:
            self.value: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.value = lambda: value

    def __eq__(self, other: object) -> bool:
        # a dead object's id may be in use again
        value = self.value()
        return isinstance(other, Identity) and value is not None and value is other.value()

    def __hash__(self) -> int:
        return self.number


def head_state(
    module: Any, kind: str, embedding: Any, model: Any, forward: Callable[..., Any]
) -> tuple[Any, Any]:
    """Functions, and hooks and numbers, that together tell apart states of a model's head.

    Most hooks and numbers have no part in the logits, so a state with the same functions probably
    treats them the same. A number that is kept elsewhere is not seen here; the check of every call
    (``HeadCall.matches``) finds its effect.

    Args:
        module: the module whose call makes the logits.
        kind: how its weight is made.
        embedding: the model's output embedding: the module, or what wraps it.
        model: the causal language model.
        forward: the model's forward.
    """
    base = getattr(module, "base_layer", module)
    # dtype only: the weight itself may be sharded
    weight = base._parameters.get("weight")
    parts = [*embedding.modules()]
    functions = (
        kind,
        Identity(module),
        base.out_features,
        None if weight is None else weight.dtype,
        *(identity for part in parts for identity in _forwards(part)),
        _identity(type(model).forward),
        _identity(forward),
    )
    hooks = tuple(identity for part in parts for identity in _hooks(part))
    return functions, (hooks, _plain_attributes(model), _comparable(vars(model.config)))


def _comparable(value: Any) -> Any:
    """A key that compares equal as long as a value of a configuration is unchanged."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return tuple((name, _comparable(each)) for name, each in value.items())
    # a configuration within the configuration
    return _comparable(vars(value)) if hasattr(value, "to_dict") else Identity(value)


def _plain_attributes(module: Any) -> tuple[Any, ...]:
    """The module's attributes of plain types, its training mode among them."""
    return tuple((n, v) for n, v in vars(module).items() if isinstance(v, _PLAIN))


def _forwards(module: Any) -> tuple[Identity | None, ...]:
    """The functions that run when a module is called: its class's forward, and its own."""
    forward = vars(module).get("forward")
    forward = forward.original if isinstance(forward, ForwardOverride) else forward
    return _identity(type(module).forward), _identity(forward)


def _hooks(module: Any) -> tuple[Identity | None, ...]:
    """The forward hooks of a module, but for those of overrides."""
    return tuple(_identity(h) for h in module._forward_hooks.values() if not is_override_hook(h))


def _identity(function: Any) -> Identity | None:
    # a bound method is a new object each time it is looked up
    return None if function is None else Identity(getattr(function, "__func__", function))
