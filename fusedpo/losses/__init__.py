"""The losses, one file each. A file that defines a ``Loss`` is found by being in this folder."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from typing import Any

from fusedpo.checks import bad_choice
from fusedpo.losses._base import Loss, PairLoss
from fusedpo.losses.dpo import DPO
from fusedpo.losses.ipo import IPO
from fusedpo.losses.simpo import SimPO

__all__ = ["DPO", "IPO", "Loss", "PairLoss", "SimPO", "available", "get"]


def _discover() -> dict[str, type[Loss]]:
    found: dict[str, type[Loss]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Loss)
                and value.__module__ == module.__name__
            ):
                name = value.__name__.lower()
                if name in found:
                    raise ImportError(
                        f"two losses are called {name!r}: "
                        f"{found[name].__module__} and {module.__name__}"
                    )
                found[name] = value
    return found


# a loss whose file was dropped into the folder is an attribute of this module like the others
globals().update({cls.__name__: cls for cls in _discover().values()})


def available() -> dict[str, type[Loss]]:
    """Name -> class of every loss, names in lower case, in alphabetical order."""
    return dict(sorted(_discover().items()))


def get(name: str, **hyperparameters: Any) -> Loss:
    """A loss by its name, which may be written in any case.

    Raises:
        ValueError: for an unknown name, with near matches.
        TypeError: for a hyperparameter the loss does not have, with those it has.
    """
    known = available()
    if not isinstance(name, str) or name.lower() not in known:
        raise bad_choice("loss", str(name).lower(), known)
    cls = known[name.lower()]
    names = [f.name for f in fields(cls)]
    for given in hyperparameters:
        if given not in names:
            raise TypeError(str(bad_choice(f"{cls.__name__}'s hyperparameter", given, names)))
    return cls(**hyperparameters)
