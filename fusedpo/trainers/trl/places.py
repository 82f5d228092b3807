"""Where TRL has a method's trainer, in whichever version is installed."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import warnings
from typing import Any

import trl

from fusedpo.trainers.replacements import tell

# where a method's trainer is, newest first
PLACES = ("trl.trainer.{0}_trainer", "trl.experimental.{0}.{0}_trainer")
METHODS = ("dpo", "kto", "grpo", "rloo", "sft", "cpo", "orpo", "tpo")
# the versions of TRL whose inside is known here
_OLDEST, _NEWEST = (0, 29), (1, 16)


def check_version() -> None:
    number = tuple(int(part) for part in re.findall(r"\d+", trl.__version__)[:2])
    expected = f"trl: expected a version from 0.29 to 1.16, got {trl.__version__}"
    if number < _OLDEST:
        raise RuntimeError(f"{expected}; update TRL")
    if number > _NEWEST:
        tell(f"{expected}, which fusedpo was not tried with; compare the first losses without it")


def title_of(method: str) -> str:
    return f"{method.upper()}Trainer"


def of_package(value: Any, *names: str) -> bool:
    """Whether a class or a function was written in a package; wrappers carry the name of what they
    wrap, but not its globals."""
    module = getattr(value, "__globals__", {}).get("__name__") or value.__module__
    return module.split(".")[0] in names


def shown_class(method: str) -> Any:
    """What stands under the name of a method's trainer in TRL, or None."""
    for place in PLACES:
        with contextlib.suppress(ModuleNotFoundError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cls = getattr(importlib.import_module(place.format(method)), title_of(method), None)
            if cls is not None:
                return cls
    return None


def trls(cls: Any, method: str) -> Any:
    """The class of a method's trainer that TRL has written, among those a class inherits from.

    Where a trainer has moved, its earlier place has a class that inherits from it.
    """
    own = [b for b in getattr(cls, "__mro__", ()) if b.__name__ == title_of(method)]
    return next((base for base in reversed(own) if of_package(base, "trl")), None)


def module_of(method: str) -> Any:
    """The module that a method's trainer is written in; None if there is none, or if somebody has
    put another class in its place."""
    own = trls(shown_class(method), method)
    if own is None:
        return None
    module = sys.modules[own.__module__]
    return module if trls(getattr(module, title_of(method), None), method) is own else None


def class_of(method: str) -> Any:
    """A method's trainer as TRL has written it, or None."""
    module = module_of(method)
    return None if module is None else trls(getattr(module, title_of(method)), method)


def still_trls(function: Any) -> bool:
    """Whether a function of TRL's is TRL's own; somebody else's stays, with a warning."""
    own = of_package(function, "trl")
    if not own:
        tell(
            f"trl: {getattr(function, '__qualname__', function)} was replaced by somebody else "
            "before patch(), and stays so: what calls it is not reached"
        )
    return own


def trainer_of(method: str) -> Any:
    """A method's trainer, or a class that says that this version of TRL has none."""
    module = module_of(method)
    if module is not None:
        return getattr(module, title_of(method))

    def missing(self: Any, *args: Any, **kwargs: Any) -> None:
        places = " or ".join(place.format(method) for place in PLACES)
        shown = shown_class(method)
        got = "none" if shown is None else f"{shown.__module__}.{shown.__qualname__}"
        remedy = "" if shown is None else "; import fusedpo.trainers.trl before what replaced it"
        raise ImportError(
            f"trl {trl.__version__}: expected {title_of(method)} in {places}, got {got}{remedy}"
        )

    return type(title_of(method), (), {"__init__": missing})
