"""Properties that every preference loss has by existing. Its own test file adds its formula."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from fusedpo.losses import (
    AOT,
    BCO,
    DPO,
    IPO,
    KTO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    WPO,
    APODown,
    FDivergence,
    LengthDesensitized,
    Loss,
    PreferenceLoss,
    SemanticSPPO,
    ShortToLong,
    SimPO,
    available,
)
from fusedpo.losses.scores import Scores


def preference_losses() -> list[PreferenceLoss]:
    """Every preference loss of the library, with its defaults."""
    return [cls() for cls in available().values() if issubclass(cls, PreferenceLoss)]


def kinds_of_losses() -> list[PreferenceLoss]:
    """One or more of everything that the engine tells apart."""
    return [
        DPO(),
        IPO(),
        SimPO(),
        SimPO(sft_weight=0.5),
        ORPO(),
        APODown(),
        NCA(beta=0.05),
        SPPO(beta=0.1),
        AOT(beta=0.3),
        KTO(beta=0.5, undesirable_weight=1.3),
        SemanticSPPO(beta=0.1, scaled=True),
        ShortToLong(DPO()),
        ShortToLong(ORPO(), distance="huber", both=True),
        WPO(DPO()),
        FDivergence(DPO(beta=0.5), "forward_kl"),
        LengthDesensitized(NCA(beta=0.05)),
        LengthDesensitized(ORPO()),
        ShortToLong(1.0 * ORPO()),
        0.8 * DPO() + 0.2 * BCO(beta=0.5) + 0.5 * SFT(),
    ]


def in_effect(loss: Loss, name: str) -> Loss:
    """The loss with what a hyperparameter needs beside it to have an effect."""
    (only,) = (f.metadata["only"] for f in fields(loss) if f.name == name)
    beside = {
        other: choices[0] for other, choices in only.items() if getattr(loss, other) not in choices
    }
    # a weight of 0 turns off what belongs to it
    return replace(loss, **beside, **({"kl_weight": 0.3} if name == "kl_estimator" else {}))


def made(cls: type[Loss], **options: Any) -> Loss:
    """With those of the hyperparameters that have an effect beside the others."""
    only = {f.name: f.metadata["only"].items() for f in fields(cls)}
    kept = {
        name: value
        for name, value in options.items()
        if all(options[choice] in choices for choice, choices in only[name])
    }
    return cls(**kept)


def name_of(loss: PreferenceLoss) -> str:
    base = getattr(loss, "base", None)
    return type(loss).__name__ + (f"-{type(base).__name__}" if base is not None else "")


def scores(
    seed: int,
    pairs: int = 5,
    *,
    reference: bool = True,
    dtype: torch.dtype = torch.float64,
    roles: int = 2,
) -> list[Scores]:
    """Ragged random scores of the responses of some examples, by role."""
    g = torch.Generator().manual_seed(seed)

    def side() -> Scores:
        length = torch.randint(1, 40, (pairs,), generator=g).to(dtype)
        logp = -torch.rand(pairs, generator=g, dtype=dtype) * 3 * length
        ref = logp + torch.randn(pairs, generator=g, dtype=dtype)
        confidence = -torch.rand(pairs, generator=g, dtype=dtype)
        return Scores(logp, length, ref if reference else None, confidence)

    return [side() for _ in range(roles)]


def for_loss(loss: PreferenceLoss, seed: int, **options) -> list[Scores]:
    return scores(seed, reference=loss.needs_reference, roles=len(loss.roles), **options)


def inputs_for(loss: PreferenceLoss, examples: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Some of every input that the loss takes."""
    g = torch.Generator().manual_seed(seed + 1)
    found = {}
    for name, about in loss.inputs.items():
        if name == "desirable":
            found[name] = torch.arange(examples) % 3 != 1
        elif about.per == "any":
            found[name] = torch.rand(3, generator=g)
        else:
            found[name] = torch.rand(examples, generator=g)
    return found
