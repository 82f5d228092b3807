"""Losses made of losses say of themselves all that there is to say: forwarded, or their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest

from fusedpo import losses
from fusedpo.engine.structure import GradientStructure
from fusedpo.losses import DPO, IPO, Loss, Mixture, PolicyLoss, PreferenceLoss, ShortToLong
from fusedpo.losses.forwarding import forwards, interface
from fusedpo.losses.modifiers import ByResponse, ComparedWith, Modifier, PerToken


def below(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        if sub.__module__.startswith("fusedpo."):
            yield sub
            yield from below(sub)


COMPOSITES = [
    cls for cls in below(PreferenceLoss) if {"base", "parts"} & {f.name for f in fields(cls)}
]
every_composite = pytest.mark.parametrize("cls", COMPOSITES, ids=lambda cls: cls.__name__)


def left_at_its_default(cls: type) -> set[str]:
    """What the losses inside a composite might say, and it would not pass on."""
    return {name for name in interface() if getattr(cls, name) is getattr(PreferenceLoss, name)}


def test_there_are_composites() -> None:
    named = {ByResponse, ComparedWith, Modifier, PerToken}
    assert named | {Mixture, ShortToLong, losses.WPO} <= set(COMPOSITES)


@every_composite
def test_a_composite_says_everything(cls: type) -> None:
    assert not left_at_its_default(cls)


@every_composite
def test_a_new_member_is_noticed(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a loss may define, a property or a method, and that no composite knows of yet."""
    monkeypatch.setattr(PreferenceLoss, "sharpness", property(lambda self: 0.0), raising=False)
    monkeypatch.setattr(PreferenceLoss, "of_prompt", lambda self, prompt: prompt, raising=False)
    assert left_at_its_default(cls) == {"sharpness", "of_prompt"}


def test_what_is_forwarded_is_looked_up_when_it_is_asked_for() -> None:
    loss = losses.LengthDesensitized(IPO(average=False))
    assert loss.is_square and loss.formula_structure == IPO(average=False).formula_structure
    assert Modifier.reward.__doc__ == PreferenceLoss.reward.__doc__
    assert Modifier.roles.__doc__ == PreferenceLoss.roles.__doc__


@pytest.mark.parametrize("name", ["rewards", "gradient_structure", "_private", "own"])
def test_no_other_name_is_forwarded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(PreferenceLoss):
        own = base = DPO()

    monkeypatch.setattr(PreferenceLoss, "own", property(lambda self: None), raising=False)
    with pytest.raises(TypeError, match=f"Own cannot forward '{name}'"):
        forwards("base", name)(Own)


@pytest.mark.parametrize(
    ("loss", "structure"),
    [
        (DPO(), GradientStructure("pair", 1, "margin")),
        (losses.CPO(), GradientStructure("pair", 2)),
        (losses.WPO(losses.CPO()), GradientStructure("pair", 2)),
        (losses.SFT(), GradientStructure("sequence")),
        (losses.LengthDesensitized(DPO()), GradientStructure("pair", 1, "margin")),
        (losses.LengthDesensitized(losses.CPO()), GradientStructure("batch", 2)),
        (losses.LengthDesensitized(losses.SFT()), GradientStructure("batch")),
        (losses.GRPO(kl_weight=0.1), GradientStructure("token", unit="gate")),
        (losses.GRPO(entropy_bonus=0.1), GradientStructure("batch", unit="gate")),
        (losses.GSPO(), GradientStructure("sequence", unit="gate")),
        (losses.GSPO(kl_weight=0.1), GradientStructure("batch", unit="gate")),
    ],
    ids=str,
)
def test_what_is_added_to_a_formula_counts(loss: Loss, structure: GradientStructure) -> None:
    """A cross-entropy beside a margin and beside weighted tokens; KL terms and an entropy bonus."""
    assert loss.gradient_structure == structure


def test_the_whole_gradients_structure_follows_from_the_formulas() -> None:
    """What is added to a formula is added in one place, not by each loss."""
    mine = {cls for cls in (Loss, *below(Loss)) if "gradient_structure" in vars(cls)}
    assert mine == {Loss, PreferenceLoss, PolicyLoss}
