"""Hyperparameters: dataclass fields that hold their default, meaning and range, once.

The fields of losses, and of other records of settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from numbers import Integral
from types import MappingProxyType
from typing import Any

from fusedpo.checks import bad_choice, bad_type, bad_value, in_range, positive

Check = Callable[[str, Any], Any]

Only = Mapping[str, tuple[Any, ...]]


def hyperparameter(
    default: Any, meaning: str, check: Check, *, only: Only = MappingProxyType({}), **options: Any
) -> Any:
    """A dataclass field with its default, its meaning and the check of its value.

    Args:
        default: its value where none is passed.
        meaning: a few words, which the command line shows.
        check: takes the field's name and a value; raises a ValueError or TypeError for a wrong one.
        only: choices, by name, beside which it has an effect; beside others it stays the default.
            That a weight of 0 turns off what belongs to it is no such choice.
        options: further ones of ``dataclasses.field``, such as ``kw_only``.
    """
    metadata = {"meaning": meaning, "check": check, "only": only}
    return field(default=default, metadata=metadata, **options)


def check_hyperparameters(of: Any) -> None:
    """Check every field of a dataclass whose fields are hyperparameters.

    Raises:
        ValueError, TypeError: for a value out of range, of another type, or without an effect.
    """
    for cls in type(of).__mro__:
        if any(isinstance(value, Field) for value in vars(cls).values()):
            # else its hyperparameters would be those of its base, without a word
            remedy = f"write @dataclass(frozen=True) above class {cls.__name__}"
            raise bad_type(cls.__name__, "a dataclass, as it has hyperparameters", "none", remedy)
    for f in fields(of):
        if "check" not in f.metadata:
            remedy = f"write {f.name} = fusedpo.losses.base.hyperparameter(default, meaning, check)"
            raise bad_type(f.name, "a field made by hyperparameter", "a plain one", remedy)
        f.metadata["check"](f.name, getattr(of, f.name))
    for f in fields(of):
        value = getattr(of, f.name)
        for name, choices in f.metadata["only"].items():
            if value != f.default and getattr(of, name) not in choices:
                raise bad_value(
                    f.name,
                    f"{f.default!r} with {name}={getattr(of, name)!r}, where it has no effect",
                    repr(value),
                    f"leave it out, or take {name}={' or '.join(map(repr, choices))}",
                )


def one_of(*choices: str) -> Check:
    """A check that a value is one of the choices."""

    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise bad_choice(name, value, choices)
        return value

    return check


def whole(name: str, value: Any, least: int) -> int:
    """An int of at least so much; one of numpy becomes one of Python."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise bad_type(name, "an int", type(value).__name__)
    if value < least:
        raise bad_value(name, f"an int of at least {least}", f"{value}")
    return int(value)


def at_least(least: int) -> Check:
    """A check that a value is an int of at least so much."""
    return lambda name, value: whole(name, value, least)


def flag(name: str, value: Any) -> bool:
    """The value, checked to be True or False."""
    if not isinstance(value, bool):
        raise bad_type(name, "True or False", repr(value))
    return value


def optional(check: Check) -> Check:
    """A check that lets None through, and everything else that ``check`` does."""
    return lambda name, value: None if value is None else check(name, value)


def label_smoothing(default: float = 0.0, **options: Any) -> Any:
    """The field that the losses with a flipped-label term share."""
    return hyperparameter(
        default,
        "probability that a preference is recorded the wrong way round, in [0, 0.5)",
        lambda name, value: in_range(name, value, 0.0, 0.5),
        **options,
    )


def inverse_temperature(default: float = 0.1) -> Any:
    """The beta that most losses with a reference share."""
    return hyperparameter(default, "strength of the pull towards the reference", positive)
