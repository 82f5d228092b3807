"""Losses by name: every spelling, TRL's ``loss_type`` strings, and what an unknown name says."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from losses.exact import DEFAULTS

import fusedpo
from fusedpo import losses
from fusedpo.losses import aliases, available, base, get

# by trainer, what TRL's strings stand for
TRL = {
    "sigmoid": losses.DPO(),
    "sigmoid_norm": losses.DPO(length_normalized=True),
    "hinge": losses.SLiC(),
    "ipo": losses.IPO(),
    "exo_pair": losses.EXO(),
    "nca_pair": losses.NCA(),
    "robust": losses.RobustDPO(),
    "bco_pair": losses.BCO(),
    "sppo_hard": 2.0 * losses.SPPO(),
    "aot": losses.AOT(),
    "aot_unpaired": losses.AOT(paired=False),
    "apo_zero": losses.APOZero(),
    "apo_down": losses.APODown(),
    "discopop": losses.DiscoPOP(),
    "sft": losses.SFT(),
    "kto": losses.KTO(),
    "apo_zero_unpaired": losses.KTO(variant="apo_zero"),
    "simpo": losses.SimPO(),
    "alphapo": losses.AlphaPO(),
    "orpo": losses.ORPO(),
    "grpo": losses.GRPO(),
    "bnpo": losses.DAPO(epsilon_high=0.2),
    "dr_grpo": losses.DrGRPO(),
    "dapo": losses.DAPO(),
    "cispo": losses.CISPO(),
    "sapo": losses.SoftAdaptive(),
    "luspo": losses.LUSPO(),
    "vespo": losses.VESPO(),
}


def spellings(cls: type) -> set[str]:
    """SoftSequence, softsequence, SOFTSEQUENCE, soft_sequence, soft-sequence, SOFT-SEQUENCE."""
    name = cls.__name__
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    forms = {name, words, words.replace("_", "-")}
    return {f(x) for x in forms for f in (str, str.lower, str.upper)}


@pytest.mark.parametrize("cls", available().values(), ids=lambda cls: cls.__name__)
def test_every_spelling_is_found(cls: type) -> None:
    for name in spellings(cls):
        assert get(name) == cls() == getattr(losses, cls.__name__)()
    assert cls.__name__ in losses.__all__


@pytest.mark.parametrize("name", TRL)
def test_the_strings_of_trl(name: str) -> None:
    for form in (name, name.replace("_", "-"), name.upper()):
        assert get(form) == TRL[name]


def test_every_other_name_is_of_a_loss_and_of_no_other() -> None:
    assert set(aliases().values()) <= set(available())
    assert not set(aliases()) & set(available())
    for alias in aliases():
        get(alias)


# numbers of the papers and of TRL's configurations, where they have one; a change is another loss
@pytest.mark.parametrize("text", DEFAULTS, ids=lambda text: text.partition("(")[0])
def test_defaults_stay_what_they_are(text: str) -> None:
    name, _, given = text.removesuffix(")").partition("(")
    loss = getattr(losses, name)()
    for each in filter(None, given.split(", ")):
        field, _, value = each.partition("=")
        assert repr(getattr(loss, field)) == value, field
    assert (losses.WPO(losses.DPO()).base, losses.LengthDesensitized(losses.DPO()).alpha) == (
        losses.DPO(),
        0.5,
    )


def test_every_loss_has_defaults_that_stay() -> None:
    named = {text.partition("(")[0].lower() for text in DEFAULTS}
    assert set(available()) <= named


def test_win_rates_that_are_not_there_are_those_of_an_oracle() -> None:
    defaults = {name: about.default for name, about in losses.SPPO().inputs.items()}
    assert defaults == {"win_rate_chosen": 1.0, "win_rate_rejected": 0.0}


def test_hyperparameters_go_with_a_name() -> None:
    assert get("soft-sequence", gate="identity") == losses.SoftSequence(gate="identity")
    assert get("sppo_hard", beta=0.2) == 2.0 * losses.SPPO(0.2)
    assert get("aot_unpaired", beta=0.3) == losses.AOT(0.3, paired=False)
    # what is said wins over what the name stands for
    assert get("bnpo", epsilon_high=0.4) == losses.DAPO(epsilon_high=0.4)


@pytest.mark.fault(63)
@pytest.mark.parametrize(
    "name, near",
    [("simp0", "simpo"), ("soft_sequense", "softsequence"), ("gspo2", "gspo"), ("hing", "hinge")],
)
def test_an_unknown_name_says_what_is_near(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"loss: expected one of .*did you mean .*'{near}'"):
        get(name)


@pytest.mark.fault(63)
@pytest.mark.parametrize("name", ["", "wpo", "mixture", "_base", 3, None])
def test_what_is_no_loss_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="loss: expected one of"):
        get(name)


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    "name, given, near",
    [("dpo", "betta", "beta"), ("grpo", "epsilon_hi", "epsilon_high"), ("sapo", "tau", "tau_pos")],
)
def test_an_unknown_hyperparameter_says_what_is_near(name: str, given: str, near: str) -> None:
    cls = type(get(name)).__name__
    with pytest.raises(TypeError, match=rf"{cls}'s hyperparameter.*did you mean .*'{near}'"):
        get(name, **{given: 1.0})


def test_a_value_out_of_range_is_refused_by_name_too() -> None:
    with pytest.raises(ValueError, match="beta"):
        get("dpo", beta=-1.0)


def test_a_plain_field_is_refused_by_name() -> None:
    @dataclass(frozen=True)
    class Plain(losses.SimPO):
        extra: float = 0.3

    with pytest.raises(
        TypeError, match=r"^extra: expected a field made by hyperparameter, .*write"
    ):
        Plain()


def test_a_class_of_hyperparameters_that_is_no_dataclass_is_refused_by_name() -> None:
    """Its new default would be passed over for that of its base."""

    class Wide(losses.SimPO):
        gamma: float = base.hyperparameter(3.0, "target margin", lambda name, value: value)

    remedy = r"write @dataclass\(frozen=True\) above class Wide$"
    with pytest.raises(TypeError, match=rf"^Wide: expected a dataclass, .*, got none; {remedy}"):
        Wide()


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [("dpo", r"pass fusedpo\.losses\.get\('dpo'\)"), (losses.GRPO(), "call policy_loss"), (3, "3")],
)
def test_what_is_no_loss_of_pairs_is_sent_where_it_belongs(loss: object, remedy: str) -> None:
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(7, 4)
    with pytest.raises(TypeError, match=f"^loss: expected a preference loss, .*{remedy}$"):
        fusedpo.preference_loss(loss, hidden, weight, torch.zeros(2, 3, dtype=torch.long))
