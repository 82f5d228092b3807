"""The losses, one file each. A file that defines a ``Loss`` is found by being in this folder.

``get`` finds them by name. Losses of pairs can be added and multiplied by numbers, and changed by
``FDivergence``, ``WPO`` and ``LengthDesensitized``.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from typing import Any

from fusedpo.checks import bad_choice
from fusedpo.losses._base import Input, Loss, MarginLoss, PairLoss, PreferenceLoss, ResponseLoss
from fusedpo.losses._mixture import Mixture
from fusedpo.losses._modifiers import WPO, FDivergence, LengthDesensitized
from fusedpo.losses._policy import PolicyLoss
from fusedpo.losses.alphapo import AlphaPO
from fusedpo.losses.aot import AOT
from fusedpo.losses.apo import APODown, APOZero
from fusedpo.losses.bco import BCO
from fusedpo.losses.cispo import CISPO
from fusedpo.losses.cpo import CPO
from fusedpo.losses.dapo import DAPO
from fusedpo.losses.discopop import DiscoPOP
from fusedpo.losses.dpo import DPO
from fusedpo.losses.dr_grpo import DrGRPO
from fusedpo.losses.exo import EXO
from fusedpo.losses.gmpo import GMPO
from fusedpo.losses.grpo import GRPO
from fusedpo.losses.gspo import GSPO
from fusedpo.losses.ipo import IPO
from fusedpo.losses.kto import KTO
from fusedpo.losses.luspo import LUSPO
from fusedpo.losses.nca import NCA
from fusedpo.losses.orpo import ORPO
from fusedpo.losses.reinforce import REINFORCE
from fusedpo.losses.robust_dpo import RobustDPO
from fusedpo.losses.semantic_sppo import SemanticSPPO
from fusedpo.losses.sft import SFT
from fusedpo.losses.short_to_long import ShortToLong
from fusedpo.losses.simpo import SimPO
from fusedpo.losses.slic import SLiC
from fusedpo.losses.soft_adaptive import SoftAdaptive
from fusedpo.losses.soft_sequence import SoftSequence
from fusedpo.losses.sppo import SPPO
from fusedpo.losses.vespo import VESPO

__all__ = [
    "AOT",
    "BCO",
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "EXO",
    "GMPO",
    "GRPO",
    "GSPO",
    "IPO",
    "KTO",
    "LUSPO",
    "NCA",
    "ORPO",
    "REINFORCE",
    "SFT",
    "SPPO",
    "VESPO",
    "WPO",
    "APODown",
    "APOZero",
    "AlphaPO",
    "DiscoPOP",
    "DrGRPO",
    "FDivergence",
    "Input",
    "LengthDesensitized",
    "Loss",
    "MarginLoss",
    "Mixture",
    "PairLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "ResponseLoss",
    "RobustDPO",
    "SLiC",
    "SemanticSPPO",
    "ShortToLong",
    "SimPO",
    "SoftAdaptive",
    "SoftSequence",
    "aliases",
    "available",
    "find",
    "get",
]

# other names of a loss, as plain names are written: its name, hyperparameters, and a factor. First
# the ``loss_type`` strings of TRL's trainers that are not names of a loss here, then short names of
# papers that no other loss of the library shares.
_ALIASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "sigmoid": ("dpo", {}, 1.0),
    "sigmoidnorm": ("dpo", {"length_normalized": True}, 1.0),
    "robust": ("robustdpo", {}, 1.0),
    "hinge": ("slic", {}, 1.0),
    "exopair": ("exo", {}, 1.0),
    "ncapair": ("nca", {}, 1.0),
    "bcopair": ("bco", {}, 1.0),
    "sppohard": ("sppo", {}, 2.0),
    "aotunpaired": ("aot", {"paired": False}, 1.0),
    "apozerounpaired": ("kto", {"variant": "apo_zero"}, 1.0),
    "bnpo": ("dapo", {"epsilon_high": 0.2}, 1.0),
    "sapo": ("softadaptive", {}, 1.0),
    "spin": ("dpo", {}, 1.0),
    "sspo": ("softsequence", {}, 1.0),
    "ssppo": ("semanticsppo", {}, 1.0),
    "solopo": ("shorttolong", {}, 1.0),
}


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


def aliases() -> dict[str, str]:
    """Other name -> name of a loss, both as ``get`` takes them."""
    return {alias: name for alias, (name, _, _) in sorted(_ALIASES.items())}


def get(name: str, **hyperparameters: Any) -> Loss:
    """A loss by its name, or by TRL's ``loss_type`` for it.

    Case, hyphens and underscores do not matter: "SoftSequence", "soft_sequence" and "soft-sequence"
    are one. Papers share acronyms: "sapo" is what it is in TRL, ``SoftAdaptive``, and "sspo" is
    ``SoftSequence``. "sppo_hard" is ``2.0 * SPPO()``, as TRL has no factor 1/2.

    Raises:
        ValueError: for an unknown name, with near matches; for a hyperparameter out of range.
        TypeError: for a hyperparameter the loss does not have, with those it has; for one of
            another type.
    """
    cls, fixed, factor = find(name)
    names = [f.name for f in fields(cls)]
    for given in hyperparameters:
        if given not in names:
            raise TypeError(str(bad_choice(f"{cls.__name__}'s hyperparameter", given, names)))
    loss = cls(**{**fixed, **hyperparameters})
    return factor * loss if factor != 1.0 and isinstance(loss, PreferenceLoss) else loss


def find(name: str) -> tuple[type[Loss], dict[str, Any], float]:
    """The class that ``get`` takes for a name, the hyperparameters it stands for, and a factor.

    Raises:
        ValueError: for an unknown name, with near matches.
    """
    known = available()
    plain = name.lower().replace("-", "").replace("_", "") if isinstance(name, str) else ""
    target, fixed, factor = _ALIASES.get(plain, (plain, {}, 1.0))
    if target not in known:
        raise bad_choice("loss", str(name).lower(), (*known, *_ALIASES))
    return known[target], dict(fixed), factor
