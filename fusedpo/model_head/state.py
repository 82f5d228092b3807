"""In which state a head, its model and its configuration are, as keys that compare equal."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from fusedpo.model_head.stand_in import _StandIn


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
