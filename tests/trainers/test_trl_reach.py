"""What ``patch`` reaches of TRL, and that it says so where it does not.

Other programs replace TRL's classes and methods, or have trainers with a way of their own to the
loss. The stand-ins here do as LLaMA-Factory, ms-swift and unsloth do.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transformers

pytest.importorskip("trl")

import trl
import trl.trainer.dpo_trainer
from trainers import trl_runs
from trainers.trl_runs import build, check, plain

import fusedpo
from fusedpo.trainers import trl as ours
from fusedpo.trainers.trl import places, reach, trainers
from fusedpo.trainers.trl.lazy_models import NO_FLAG
from fusedpo.trainers.trl.replace import replaced

EVERY = tuple(trl_runs.KINDS)
CPO, ORPO, DPO = (places.class_of(method) for method in ("cpo", "orpo", "dpo"))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What of the warnings from here on is fusedpo's own."""
    monkeypatch.setattr(trl_runs, "quiet", warnings.catch_warnings)
    monkeypatch.delenv("RANK", raising=False)
    with warnings.catch_warnings(record=True, action="always") as caught:
        yield lambda: [t for w in caught if (t := str(w.message)).startswith(("trl: ", "model: "))]


# versions


@pytest.mark.parametrize("version", ["0.24.0", "0.28.1", "0.9.6"])
def test_earlier_versions_are_refused_before_anything_is_replaced(monkeypatch, version) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    before = CPO.concatenated_forward
    text = f"^trl: expected a version from 0.29 to 1.16, got {version}; update TRL$"
    for call in (ours.patch, fusedpo.patch):
        with pytest.raises(RuntimeError, match=text):
            call()
    assert CPO.concatenated_forward is before and not replaced
    with pytest.raises(RuntimeError, match=text), trl_runs.quiet():
        build("dpo", trainer_class=ours.FusedDPOTrainer)


@pytest.mark.parametrize(("version", "told"), [("1.17.0.dev0", 1), ("2.0.0", 1), ("1.16.3", 0)])
def test_later_versions_are_told(monkeypatch, heard, version, told) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    with ours.patched():
        pass
    assert len(heard()) == told
    assert all(f"expected a version from 0.29 to 1.16, got {version}" in text for text in heard())


def test_what_is_reached_is_returned_and_said(capsys) -> None:
    try:
        reached = fusedpo.patch()
        assert reached == dict.fromkeys(map(str.upper, EVERY), "")
        said = capsys.readouterr().err
        assert said.startswith(f"fusedpo: TRL {trl.__version__} without logits: ")
        assert fusedpo.patch(quiet=True) == reached
    finally:
        fusedpo.unpatch()
    assert not replaced and capsys.readouterr().err == ""


def test_conditions_are_said(monkeypatch) -> None:
    words = reach.in_words({"CPO": "", "ORPO": "", "DPO": NO_FLAG, "GRPO": NO_FLAG})
    expected = "without logits: CPO, ORPO; not with use_liger_kernel=True: DPO, GRPO; as ever: "
    assert words == expected + "KTO, RLOO, SFT, TPO"
    assert reach.in_words({"DPO": NO_FLAG}).startswith("without logits: none; not with ")


# trainers that somebody has put in the place of TRL's


class UnslothDPOTrainer:
    """A renamed class, with no ancestor of that name."""


class Elsewhere(DPO):
    """One that inherits from TRL's, under another name."""


def test_a_renamed_trainer_is_told_and_left_out(monkeypatch, heard) -> None:
    monkeypatch.setattr(trl.trainer.dpo_trainer, "DPOTrainer", UnslothDPOTrainer)
    with ours.patched():
        assert "training_step" not in vars(UnslothDPOTrainer)
        reached = ours.patch(quiet=True)
    assert "DPO" not in reached and "KTO" in reached
    assert {text for text in heard() if "DPOTrainer is" in text} == {
        f"trl: DPOTrainer is {__name__}.UnslothDPOTrainer, which is not TRL's and stays as it is; "
        "call patch() before what has replaced it is imported"
    }


def test_beside_a_renamed_trainer_the_module_is_imported(monkeypatch) -> None:
    monkeypatch.setattr(trl.trainer.dpo_trainer, "DPOTrainer", UnslothDPOTrainer)
    spec = importlib.util.spec_from_file_location("again", trainers.__file__)
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "again", again)
    spec.loader.exec_module(again)
    assert issubclass(again.FusedCPOTrainer, CPO)
    with pytest.raises(ImportError, match=r"got .*UnslothDPOTrainer; import fusedpo.trainers.trl"):
        places.trainer_of("dpo")(model=None)


def test_a_trainer_that_inherits_from_trls_is_reached(monkeypatch, heard) -> None:
    monkeypatch.setattr(trl.trainer.dpo_trainer, "DPOTrainer", Elsewhere)
    with ours.patched():
        assert "training_step" in vars(DPO) and "training_step" not in vars(Elsewhere)
        assert "DPO" in ours.patch(quiet=True)
    assert not heard()


# what somebody else has replaced


def test_somebody_elses_replacement_stays(monkeypatch, heard) -> None:
    original = CPO.concatenated_forward
    monkeypatch.setattr(CPO, "concatenated_forward", original)  # restored at the end

    def theirs(self: Any, model: Any, batch: Any) -> Any:
        return original(self, model, batch)

    for again in (lambda: ours.patch(quiet=True), ours.unpatch):
        ours.patch(quiet=True)
        CPO.concatenated_forward = theirs
        again()
        assert CPO.concatenated_forward is theirs
        assert any("CPOTrainer.concatenated_forward was replaced by somebody" in t for t in heard())
        ours.unpatch()
        assert CPO.concatenated_forward is theirs
        CPO.concatenated_forward = original


def test_what_was_replaced_before_is_neither_replaced_nor_announced(monkeypatch, heard) -> None:
    def theirs(self: Any, *args: Any) -> Any: ...

    theirs.__module__ = CPO.__module__  # as functools.wraps leaves it
    monkeypatch.setattr(CPO, "concatenated_forward", theirs)
    monkeypatch.setattr(trl.trainer.dpo_trainer, "add_fused_lm_head", theirs)
    with ours.patched():
        reached = ours.patch(quiet=True)
        assert CPO.concatenated_forward is theirs
        assert trl.trainer.dpo_trainer.add_fused_lm_head is theirs
    assert set(reached) == {m.upper() for m in EVERY} - {"CPO", "DPO"}
    assert len({text for text in heard() if "replaced by somebody else before" in text}) == 1


def test_what_was_removed_stays_so(monkeypatch, heard) -> None:
    monkeypatch.setattr(ORPO, "concatenated_forward", ORPO.concatenated_forward)
    ours.patch(quiet=True)
    del ORPO.concatenated_forward
    ours.unpatch()
    assert "concatenated_forward" not in vars(ORPO)
    assert [t for t in heard() if "ORPOTrainer.concatenated_forward was removed by somebody" in t]


def test_a_while_does_not_take_over_what_somebody_replaced(monkeypatch, heard) -> None:
    monkeypatch.setattr(CPO, "concatenated_forward", CPO.concatenated_forward)
    theirs = lambda self, model, batch: None  # noqa: E731
    ours.patch(quiet=True)
    try:
        CPO.concatenated_forward = theirs
        with ours.patched():
            assert CPO.concatenated_forward is theirs
    finally:
        ours.unpatch()
    assert CPO.concatenated_forward is theirs
    assert any("was replaced by somebody else" in text for text in heard())


# trainers with a way of their own


class CustomCPOTrainer(CPO):
    """With a forward of its own in the tests below, as LLaMA-Factory's trainers have one."""


@pytest.fixture
def own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    original = CPO.concatenated_forward

    def concatenated_forward(self: Any, model: Any, batch: Any) -> Any:
        return original(self, model, batch)

    monkeypatch.setattr(CustomCPOTrainer, "concatenated_forward", concatenated_forward)


class Replaying:
    """Runs the model itself, and has TRL's method meet the output, as ms-swift's do."""

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        rows = self.concatenated_inputs(batch, device=self.accelerator.device)
        outputs = model(
            rows["concatenated_input_ids"], attention_mask=rows["concatenated_attention_mask"]
        )
        call = type(model).__call__
        type(model).__call__ = lambda *args, **kwargs: outputs
        try:
            return super().concatenated_forward(model, batch)
        finally:
            type(model).__call__ = call


class ReplayingCPOTrainer(Replaying, CPO):
    pass


class ReplayingORPOTrainer(Replaying, ORPO):
    pass


NOTHING = "called nothing that patch() has replaced: it runs as ever"


def test_a_trainer_with_its_own_way_says_so_before_and_after_its_first_step(
    heard, own_forward
) -> None:
    reference = plain("cpo")
    with ours.patched():
        before = heard()
        for _ in range(2):
            found = trl_runs.run("cpo", trainer_class=CustomCPOTrainer)
    check(reference, found)
    name = f"{__name__}.CustomCPOTrainer"
    own = [text for text in before if name in text]
    assert own == [
        f"trl: {name} has its own concatenated_forward, which does not call that of TRL's "
        "CPOTrainer: it is not reached, and runs as ever"
    ]
    assert not [text for text in before if "Replaying" in text]
    expected = f"trl: the first step of {name} {NOTHING}; its own concatenated_forward does not "
    assert heard()[len(before) :] == [expected + "call TRL's"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_evaluation_alone_says_so_too_on_the_main_process(
    heard, own_forward, monkeypatch, rank
) -> None:
    with ours.patched():
        subject = build("cpo", trainer_class=CustomCPOTrainer, evaluated=True)
        monkeypatch.setattr(type(subject.args), "process_index", rank)
        before = len(heard())
        subject.evaluate()
        subject.evaluate()
    assert [NOTHING in text for text in heard()[before:]] == [True] * (rank == 0)


@pytest.mark.parametrize("method", EVERY)
def test_a_trainer_that_is_reached_says_nothing(heard, method) -> None:
    with ours.patched():
        before = len(heard())
        trl_runs.run(method, max_steps=1)
    assert not heard()[before:]


@pytest.mark.parametrize(("method", "loss"), [("dpo", "simpo"), ("grpo", "gspo")])
def test_a_loss_by_name_is_reached_too(heard, method, loss) -> None:
    kind, config = (getattr(ours, f"Fused{method.upper()}{n}") for n in ("Trainer", "Config"))
    given = {"fused_loss": loss}
    if method == "grpo":  # else the reference and the old policy are scored through TRL
        given |= {"beta": 0.0, "num_iterations": 1}
    with ours.patched():
        before = len(heard())
        trl_runs.run(method, trainer_class=kind, config=config, max_steps=1, **given)
    assert not heard()[before:]


class Plain(CPO):
    """Its methods stand in the place of TRL's in the test below."""


def by_name(self: Any, *args: Any) -> Any:
    return CPO.concatenated_forward(self, *args)


def by_module(self: Any, *args: Any) -> Any:
    return trl.experimental.cpo.CPOTrainer.concatenated_forward(self, *args)


def by_super(self: Any, *args: Any) -> Any:
    return super(Plain, self).concatenated_forward(*args)


def of_transformers(self: Any, *args: Any) -> Any:
    return transformers.Trainer.compute_loss(self, *args)


@functools.wraps(by_super)
def decorated(*args: Any) -> Any:
    return by_super(*args)


@pytest.mark.parametrize("method", [by_name, by_module, by_super, decorated, of_transformers])
def test_who_calls_trls_method_in_whatever_way_is_not_told_of(monkeypatch, method) -> None:
    monkeypatch.setattr(Plain, "concatenated_forward", method, raising=False)
    own = ["concatenated_forward"] if method is of_transformers else []
    assert reach.own_path(Plain, CPO) == own


@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_where_the_models_forward_never_runs_trls_own_is_taken(heard, method) -> None:
    """Three steps, one warning, and TRL's numbers."""
    kind = {"cpo": ReplayingCPOTrainer, "orpo": ReplayingORPOTrainer}[method]
    given = {"cpo_alpha": 0.5} if method == "cpo" else {}
    reference = plain(method, **given)
    with ours.patched():
        before = len(heard())
        found = trl_runs.run(method, trainer_class=kind, **given)
    check(reference, found)
    assert heard()[before:] == [
        "model: expected one whose call runs its forward, got an output of LlamaForCausalLM "
        "without that; its own logits are made instead"
    ]


@pytest.mark.parametrize("package, title", fusedpo.trainers._LAZY.items())
def test_other_programs_are_told_how_they_are_reached(
    package: str, title: str, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    try:
        fusedpo.patch()
    finally:
        fusedpo.unpatch()
    said = [line for line in capsys.readouterr().err.splitlines() if title in line]
    assert len(said) == 1 and "fusedpo.lazy_logits()" in said[0]
