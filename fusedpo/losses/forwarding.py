"""How a loss made of other losses hands on what it does not say itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from fusedpo.losses.preference import PreferenceLoss

Composite = TypeVar("Composite", bound=type[PreferenceLoss])

# what follows from the rest of the interface, and is not overridden
_DERIVED = frozenset({"gradient_structure"})


def interface() -> frozenset[str]:
    """Names of all that a preference loss may say of itself: a composite forwards or defines each.

    A test compares: a member that is added to ``PreferenceLoss`` would keep its default in a
    composite whatever the losses inside say.
    """
    members = {
        name
        for base in PreferenceLoss.__mro__
        for name, value in vars(base).items()
        if isinstance(value, property | FunctionType) and not name.startswith("_")
    }
    return frozenset(members - _DERIVED)


def forwards(to: str, *names: str) -> Callable[[Composite], Composite]:
    """A decorator of composites: these members are those of the loss that is the attribute ``to``.

    Raises:
        TypeError: for a name that is no member of a preference loss, or that the class defines.
    """

    def decorate(cls: Composite) -> Composite:
        for name in names:
            if name not in interface() or name in vars(cls):
                raise TypeError(f"{cls.__name__} cannot forward {name!r}: not there, or its own")
            setattr(cls, name, _forwarded(to, name))
        return cls

    return decorate


def _forwarded(to: str, name: str) -> Any:
    member = getattr(PreferenceLoss, name)
    if isinstance(member, property):
        return property(lambda self: getattr(getattr(self, to), name), doc=member.__doc__)

    @functools.wraps(member)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        return getattr(getattr(self, to), name)(*args, **options)

    return call
