"""Modules that a trainer imports and the tested paths do not use: they need not be there."""

from __future__ import annotations

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any


class Nothing:
    """What is imported from a stub, to inherit from or to decorate with, which changes nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else super().__new__(cls)


class Stub(types.ModuleType):
    """A module that has whatever is imported from it: classes without anything in them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Nothing,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


def stub(*names: str) -> None:
    """Put a stub in the place of each module that is not installed, and of its parents."""
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            whole = ".".join(parts[:end])
            if whole in sys.modules or (end == 1 and importlib.util.find_spec(whole) is not None):
                continue
            sys.modules[whole] = made = Stub(whole)
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], made)
