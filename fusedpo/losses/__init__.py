"""The losses, one file each: a file of this folder that defines a loss is all that it takes.

``get`` finds them by name. Losses of pairs can be added and multiplied by numbers, and changed by
``FDivergence``, ``WPO`` and ``LengthDesensitized``. ``fusedpo.losses.base`` has what the file of a
loss is written with.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fusedpo.checks import bad_choice
from fusedpo.losses.loss import Input as Input
from fusedpo.losses.loss import Loss as Loss
from fusedpo.losses.mixture import Mixture as Mixture
from fusedpo.losses.modifiers import WPO as WPO
from fusedpo.losses.modifiers import FDivergence as FDivergence
from fusedpo.losses.modifiers import LengthDesensitized as LengthDesensitized
from fusedpo.losses.policy import PolicyLoss as PolicyLoss
from fusedpo.losses.preference import MarginLoss as MarginLoss
from fusedpo.losses.preference import PreferenceLoss as PreferenceLoss
from fusedpo.losses.preference import ResponseLoss as ResponseLoss

PairLoss = PreferenceLoss  # the name of a former subclass of it without behaviour

if TYPE_CHECKING:  # what the walk below finds, for type checkers: `make losses` writes these lines
    from fusedpo.losses.alphapo import AlphaPO as AlphaPO
    from fusedpo.losses.aot import AOT as AOT
    from fusedpo.losses.apo import APODown as APODown
    from fusedpo.losses.apo import APOZero as APOZero
    from fusedpo.losses.bco import BCO as BCO
    from fusedpo.losses.cispo import CISPO as CISPO
    from fusedpo.losses.cpo import CPO as CPO
    from fusedpo.losses.dapo import DAPO as DAPO
    from fusedpo.losses.discopop import DiscoPOP as DiscoPOP
    from fusedpo.losses.dpo import DPO as DPO
    from fusedpo.losses.dr_grpo import DrGRPO as DrGRPO
    from fusedpo.losses.exo import EXO as EXO
    from fusedpo.losses.gmpo import GMPO as GMPO
    from fusedpo.losses.grpo import GRPO as GRPO
    from fusedpo.losses.gspo import GSPO as GSPO
    from fusedpo.losses.ipo import IPO as IPO
    from fusedpo.losses.kto import KTO as KTO
    from fusedpo.losses.luspo import LUSPO as LUSPO
    from fusedpo.losses.nca import NCA as NCA
    from fusedpo.losses.orpo import ORPO as ORPO
    from fusedpo.losses.reinforce import REINFORCE as REINFORCE
    from fusedpo.losses.robust_dpo import RobustDPO as RobustDPO
    from fusedpo.losses.semantic_sppo import SemanticSPPO as SemanticSPPO
    from fusedpo.losses.sft import SFT as SFT
    from fusedpo.losses.short_to_long import ShortToLong as ShortToLong
    from fusedpo.losses.simpo import SimPO as SimPO
    from fusedpo.losses.slic import SLiC as SLiC
    from fusedpo.losses.soft_adaptive import SoftAdaptive as SoftAdaptive
    from fusedpo.losses.soft_sequence import SoftSequence as SoftSequence
    from fusedpo.losses.sppo import SPPO as SPPO
    from fusedpo.losses.vespo import VESPO as VESPO

# what losses are made of; every other file of the folder defines some
_PARTS = frozenset(
    {
        "base",
        "forwarding",
        "gates",
        "hyperparameters",
        "links",
        "loss",
        "mixture",
        "modifiers",
        "policy",
        "preference",
        "scores",
    }
)

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


def _walk() -> dict[str, type[Loss]]:
    """Name in lower case -> class, of the losses that the files of the folder define."""
    known: dict[str, type[Loss]] = {}
    for file in pkgutil.iter_modules(__path__):
        if file.name in _PARTS:
            continue
        module = importlib.import_module(f"{__name__}.{file.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Loss)
                and value.__module__ == module.__name__
            ):
                name = value.__name__.lower()
                if name in known:
                    raise ImportError(
                        f"two losses are called {name!r}: "
                        f"{known[name].__module__} and {module.__name__}"
                    )
                known[name] = value
    return known


_OTHERS = (
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
    "WPO",
    "aliases",
    "available",
    "find",
    "get",
)
_LOSSES = {cls.__name__: cls for cls in _walk().values()}
# __all__ this way, as type checkers would take a list that they cannot read for an empty one
globals().update(_LOSSES, __all__=sorted((*_LOSSES, *_OTHERS)))


def available() -> dict[str, type[Loss]]:
    """Name -> class of every loss, names in lower case, in alphabetical order."""
    return dict(sorted(_walk().items()))


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
        listed = "fusedpo losses lists them"
        raise bad_choice("loss", str(name).lower(), (*known, *_ALIASES), listed)
    return known[target], dict(fixed), factor
