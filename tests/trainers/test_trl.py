"""TRL's own trainers, patched: the same numbers as without, and no logits.

Tiny random models on the CPU, three steps of each trainer with SGD, once as TRL is and once patched
(see trl_runs.py). The loss, the norm of the gradient, every other metric, and what was learned have
to agree, and nothing as large as the logits may be made.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys
import types
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import peft
import transformers
import trl
from datasets import Dataset
from tiny import tokenizer
from trainers import trl_runs
from trainers.trl_runs import (
    FAMILIES,
    KINDS,
    Run,
    Tall,
    build,
    check,
    classes,
    differences,
    plain,
    quiet,
)

import fusedpo.model_head.score
from fusedpo.engine import score
from fusedpo.trainers import trl as ours
from fusedpo.trainers.trl import patching, places

pytestmark = pytest.mark.filterwarnings("ignore")

BUDGET = "64KiB"  # eight rows of the vocabulary
# weights are of 16 rows and the experiment of the first call is of 22; logits are of twice as many
TALLEST = 24
OF_TYPES = {
    "dpo": [
        *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ],
    "cpo": ["sigmoid", "hinge", "ipo"],
    "kto": ["kto", "apo_zero_unpaired"],
    "tpo": ["sigmoid", "hinge", "ipo", "tpo-l"],
    "grpo": ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"],
    "sft": ["nll"],
}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo exo_pair": ("dpo", {"loss_type": "exo_pair", "label_smoothing": 0.1}),
    "dpo robust": ("dpo", {"loss_type": "robust", "label_smoothing": 0.1}),
    "dpo three at once": (
        "dpo",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    "dpo forward_kl": ("dpo", {"f_divergence_type": "forward_kl"}),
    "dpo js_divergence": ("dpo", {"f_divergence_type": "js_divergence"}),
    "dpo alpha_divergence": (
        "dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    ),
    "dpo ld_alpha": ("dpo", {"ld_alpha": 0.5}),
    "dpo use_weighting": ("dpo", {"use_weighting": True, "learning_rate": 10.0}),
    "dpo precomputed": ("dpo", {"precompute_ref_log_probs": True}),
    "kto precomputed": ("kto", {"precompute_ref_log_probs": True}),
    "kto class weights": ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    "cpo simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "cpo simpo with nll": ("cpo", {"loss_type": "simpo"}),
    "cpo alphapo": ("cpo", {"loss_type": "alphapo", "alpha": 0.3, "cpo_alpha": 0.0}),
    "cpo alone": ("cpo", {"cpo_alpha": 0.0}),
    "cpo smoothed": ("cpo", {"label_smoothing": 0.1}),
    "orpo": ("orpo", {}),
    "tpo without gold": ("tpo", {"tpo_alpha": 0.0}),
    "tpo smoothed": ("tpo", {"label_smoothing": 0.1}),
    "grpo luspo": ("grpo", {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    "grpo entropy": ("grpo", {"top_entropy_quantile": 0.5}),
    "grpo fp32 head": ("grpo", {"cast_lm_head_to_fp32": True}),
    "rloo": ("rloo", {}),
    "sft packed": ("sft", {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    # a token counts as much as it is likely, which here is next to nothing
    "sft dft": ("sft", {"loss_type": "dft", "learning_rate": 10.0}),
}
LOSSES = {
    **{
        f"{method} {kind}": (method, {"loss_type": kind})
        for method, kinds in OF_TYPES.items()
        for kind in kinds
    },
    **FURTHER,
}
EVERY = tuple(KINDS)
MODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "checkpointing": ({"gradient_checkpointing": True}, EVERY),
    "accumulation": (
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        ("dpo", "kto", "sft", "cpo", "orpo", "tpo"),
    ),
    "accumulation of samples": ({"gradient_accumulation_steps": 4}, ("grpo", "rloo")),
    "eval": ({"evaluated": True}, EVERY),
}


def lora(**options: Any) -> peft.LoraConfig:
    """Adapters that do something from the start: else the first rewards are rounding."""
    given = {"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**given, "init_lora_weights": False, **options})


def fused(method: str, make: Any = "llama", tallest: float = TALLEST, **given: Any) -> Run:
    """Patched, and without a tensor as large as the logits."""
    tall = Tall()
    with ours.patched(memory_budget=BUDGET):
        found = trl_runs.run(method, make, watch=tall, **given)
    assert tall.rows <= tallest, f"a float tensor of {tall.rows} rows of the vocabulary"
    return found


@pytest.mark.holds(20, 45)
@pytest.mark.parametrize("method, given", LOSSES.values(), ids=LOSSES)
def test_every_loss(method, given):
    check(plain(method, **given), fused(method, **given))


@pytest.mark.holds(20, 45)
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family(family, method):
    check(plain(method, family), fused(method, family))


@pytest.mark.holds(20, 45)
@pytest.mark.parametrize(
    "mode, method", [(mode, method) for mode, (_, methods) in MODES.items() for method in methods]
)
def test_every_mode(mode, method):
    given = MODES[mode][0]
    reference = plain(method, **given)
    assert (mode == "eval") == any("eval_loss" in log for log in reference.logs)
    check(reference, fused(method, **given))


@pytest.mark.holds(25, 45)
@pytest.mark.parametrize("method", EVERY)
def test_autocast(method):
    given: dict[str, Any] = {}
    if method == "grpo":  # small steps, after which ratios of probabilities mean something
        given["learning_rate"] = 1e-4
    if method == "rloo":  # of whole responses they hold the rounding of every token
        given["num_iterations"] = 1
    reference, found = plain(method, bf16=True, **given), fused(method, bf16=True, **given)
    check(reference, found, bound=2e-2, floor=1.0)


@pytest.mark.holds(34)
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_own_copy_as_reference(method):
    """Before anything was trained, there is nothing to tell the two apart, to the last bit."""
    given = {"ref_model": None}
    reference = plain(method, **given)
    with ours.patched():
        found = trl_runs.run(method, **given)
    check(reference, found)
    assert found.logs[0]["rewards/chosen"] == found.logs[0]["rewards/rejected"] == 0


ADAPTERS = {
    "lora": {},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.holds(45)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", EVERY)
def test_adapters(method, adapter):
    given = {"peft_config": lora(**ADAPTERS[adapter])}
    check(plain(method, **given), fused(method, **given))


@pytest.mark.parametrize("method", ["cpo", "orpo", "tpo"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapted_head(method, dropout):
    """A copy of the weight, a few columns wider, is what it costs."""
    given = {"peft_config": lora(target_modules=["q_proj", "lm_head"], lora_dropout=dropout)}
    check(plain(method, **given), fused(method, **given))


def test_adapted_tied_embedding():
    """Where plain LoRA is on the embedding, the tied head has it too."""
    given = {"peft_config": lora(target_modules=["q_proj", "embed_tokens"])}
    check(plain("cpo", "tied", **given), fused("cpo", "tied", **given))


@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_trained_tokens(method):
    given = {"peft_config": lora(trainable_token_indices=[3, 4])}
    check(plain(method, **given), fused(method, **given))


@pytest.mark.parametrize("method", ["dpo", "kto", "sft", "grpo"])
def test_prompt_tuning(method):
    """Virtual tokens in front. CPO, ORPO and TPO do not know them."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    given = {"peft_config": config, "learning_rate": 10.0}
    check(plain(method, **given), fused(method, **given))


def in_bf16() -> Any:
    return trl_runs.model().to(torch.bfloat16)


def test_fp32_head_of_a_bf16_model():
    given = {"cast_lm_head_to_fp32": True, "bf16": True, "learning_rate": 1e-4}
    check(plain("grpo", in_bf16, **given), fused("grpo", in_bf16, **given))


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_adapted_head_that_trl_refuses(method):
    given = {"peft_config": lora(target_modules=["q_proj", "lm_head"])}
    errors = []
    for patched in (False, True):
        with pytest.raises(ValueError) as caught, quiet():
            if patched:
                with ours.patched():
                    build(method, **given)
            else:
                build(method, **given)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def sizes(prediction: Any) -> dict[str, float]:
    """What a metric is given: logits, which have to be made for it."""
    parts = prediction.predictions
    parts = parts if isinstance(parts, tuple) else (parts,)
    return {f"part{i}": float(abs(part).mean()) for i, part in enumerate(parts)}


@pytest.mark.parametrize("method", ["dpo", "kto", "sft", "tpo"])
def test_compute_metrics_still_gets_logits(method):
    given = {"evaluated": True, "compute_metrics": sizes}
    reference = plain(method, **given)
    assert any("eval_part0" in log for log in reference.logs)
    check(reference, fused(method, tallest=1e9, **given))


@pytest.mark.parametrize("method", ["dpo", "cpo", "orpo", "tpo", "kto", "sft", "grpo"])
def test_logits_are_what_would_be_seen(method):
    """The control of ``TALLEST``: without the patch it is exceeded by far."""
    tall = Tall()
    trl_runs.run(method, watch=tall)
    assert tall.rows > 2 * TALLEST


# what a difference looks like


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo", "sft"])
def test_a_weaker_gradient_is_noticed(method, monkeypatch):
    exact = fusedpo.model_head.score.linear_token_stats

    def weaker(*args: Any, **kwargs: Any) -> Any:
        found = exact(*args, **kwargs)
        weak = 0.9 * found.logprob + 0.1 * found.logprob.detach()
        return found._replace(logprob=weak)

    monkeypatch.setattr(fusedpo.model_head.score, "linear_token_stats", weaker)
    found = fused(method)
    assert differences(plain(method), found)["grad_norm"] > 0.05
    with pytest.raises(AssertionError, match="grad_norm"):
        check(plain(method), found)


# heads that are not understood


class _OwnLinear(torch.nn.Linear):
    """Computes the same, for all that can be known of it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)


def unknown_head() -> Any:
    made = trl_runs.model()
    head = _OwnLinear(made.lm_head.in_features, made.lm_head.out_features, bias=False)
    head.weight = made.lm_head.weight
    made.lm_head = head
    return made


@pytest.mark.parametrize("method", EVERY)
def test_unknown_head_makes_its_own_logits(method):
    reference = plain(method, unknown_head)
    with warnings.catch_warnings(record=True) as caught, ours.patched():
        warnings.simplefilter("always")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trl_runs, "quiet", warnings.catch_warnings)
            found = trl_runs.run(method, unknown_head, output=trl_runs.scratch())
    check(reference, found)
    said = [str(w.message) for w in caught if "its own logits" in str(w.message)]
    assert len(said) == 1, said
    assert "_OwnLinear" in said[0]


@pytest.mark.parametrize("method", ["cpo", "orpo", "tpo"])
def test_dora_on_the_head(method):
    given = {"peft_config": lora(target_modules=["q_proj", "lm_head"], use_dora=True)}
    check(plain(method, **given), fused(method, tallest=1e9, **given))


@pytest.mark.parametrize("items", [None, 7])
def test_labels_that_are_shifted_already_are_scored_as_by_trl(items):
    """As they come where sequences are split over devices."""
    utils = importlib.import_module("trl.trainer.utils")
    ids = torch.arange(24).reshape(2, 12)
    shifted = ids + 5
    shifted[0, :4] = shifted[1, 7:] = -100
    names = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    found = []
    for patched in (False, True):
        model = trl_runs.model()
        with ours.patched() if patched else quiet():
            utils.add_fused_lm_head(model, temperature=0.7, outputs=names)
        given = {"labels": ids, "shift_labels": shifted, "num_items_in_batch": items}
        output = model(input_ids=ids, fused_lm_head=True, **given)
        output.loss.backward()
        found.append((output, model.lm_head.weight.grad))
    (theirs, expected), (own, gradient) = found
    assert torch.equal(own.label_mask, theirs.label_mask)
    assert float(own.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-5)
    assert float((gradient - expected).norm()) < 1e-4 * float(expected.norm())
    for name in names:
        of_each = (getattr(output, name)[theirs.label_mask].float() for output in (own, theirs))
        torch.testing.assert_close(*of_each, rtol=1e-4, atol=0)


# the patch itself


def everything_in_trl() -> dict[str, Any]:
    """Every name of TRL's modules and of their classes, and the object that it stands for."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "trl" or module is None:
            continue
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{own}": held for own, held in vars(value).items()}
    # where copy and pickle keep what they find out about a class the first time
    return {name: held for name, held in found.items() if not name.endswith(".__slotnames__")}


def changed(before: dict[str, Any]) -> set[str]:
    now = everything_in_trl()
    return {name for name in before.keys() | now.keys() if before.get(name) is not now.get(name)}


def test_unpatch_restores_what_was_imported_meanwhile():
    import trl.trainer.utils

    name = "trl.experimental.imported_meanwhile"
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType(name)
        with ours.patched():
            vars(module)["add_fused_lm_head"] = trl.trainer.utils.add_fused_lm_head
            patch.setitem(sys.modules, name, module)
        assert vars(module)["add_fused_lm_head"] is trl.trainer.utils.add_fused_lm_head


def test_unpatch_restores_trl():
    before = everything_in_trl()
    ours.patch(quiet=True)
    try:
        assert "trl.trainer.dpo_trainer.add_fused_lm_head" in changed(before)
        ours.patch(memory_budget=BUDGET, quiet=True)
    finally:
        ours.unpatch()
    assert not changed(before)
    ours.unpatch()
    assert not changed(before)


def test_patched_nests():
    before = everything_in_trl()
    with ours.patched(memory_budget="1MiB"):
        outer = everything_in_trl()
        with ours.patched(memory_budget="2MiB"):
            assert changed(outer)
        assert not changed(outer)
        with pytest.raises(KeyError), ours.patched():
            raise KeyError
        assert not changed(outer)
    assert not changed(before)


def test_the_second_patch_changes_options_only():
    before = everything_in_trl()
    ours.patch(memory_budget="1MiB", quiet=True)
    try:
        once = changed(before)
        ours.patch(memory_budget="2MiB", quiet=True)
        assert changed(before) == once
        with quiet():
            trainer = build("dpo")
        assert vars(trainer.model)["forward"].memory_budget == "2MiB"
        found = trl_runs.run("dpo")
    finally:
        ours.unpatch()
    check(plain("dpo"), found)


def test_an_unknown_option_is_refused_before_anything_is_replaced():
    before = everything_in_trl()
    for options, error in (
        ({"memory_budget": "nonsense"}, "memory_budget: expected"),
        ({"backend": "nonsense"}, "backend: expected one of"),
        ({"gradient_tolerance": 1e-6}, "gradient_tolerance: expected"),
    ):
        with pytest.raises(ValueError, match=error):
            ours.patch(**options)
        assert not changed(before)


@pytest.fixture
def planned(monkeypatch):
    """(tolerance, whether there is a gradient through the entropy) of each call with a gradient."""
    seen = []

    def plan(*sizes, **options):
        if options["needs"]:
            seen.append((options["gradient_tolerance"], options["entropy"]))
        return original(*sizes, **options)

    original = score.plan
    monkeypatch.setattr(score, "plan", plan)
    return seen


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo", "rloo", "sft", "cpo", "orpo", "tpo"])
def test_a_gradient_tolerance_reaches_every_method(method, planned):
    """And no gradient through an entropy that is only logged stands in its way."""
    with ours.patched(gradient_tolerance=2e-3):
        found = trl_runs.run(method, max_steps=1)
    assert {*planned} == {(2e-3, False)}
    assert found.logs[0]["loss"] == found.logs[0]["loss"]
    planned.clear()
    cls = getattr(ours, f"Fused{method.upper()}Trainer")
    trl_runs.run(method, trainer_class=cls, max_steps=1, gradient_tolerance=2e-3)
    assert {*planned} == {(2e-3, False)}
    planned.clear()
    trl_runs.run(method, trainer_class=cls, max_steps=1)
    assert {*planned} == {(0.0, False)}


def test_an_entropy_in_the_loss_has_its_gradient(planned):
    with ours.patched(gradient_tolerance=2e-3):
        trl_runs.run("grpo", max_steps=1, entropy_coef=0.1)
    assert {*planned} == {(2e-3, True)}


def test_a_class_with_its_own_part_in_the_loss_may_want_an_entropy(planned):
    trainer, _ = trl_runs.classes("dpo")

    class Mine(trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    class Other(trainer):
        def log(self, *args, **kwargs):
            return super().log(*args, **kwargs)

    for cls, wanted in ((Mine, True), (Other, False)):
        planned.clear()
        with ours.patched(gradient_tolerance=2e-3):
            trl_runs.run("dpo", trainer_class=cls, max_steps=1)
        assert {*planned} == {(2e-3, wanted)}


@pytest.mark.parametrize("method", ["dpo", "grpo", "cpo"])
def test_a_class_refuses_a_wrong_gradient_tolerance(method):
    cls = getattr(ours, f"Fused{method.upper()}Trainer")
    for value, error in ((1e-6, ValueError), ("2e-3", TypeError)):
        with pytest.raises(error, match=r"^gradient_tolerance: expected"):
            trl_runs.run(method, trainer_class=cls, gradient_tolerance=value)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("method", EVERY)
def test_a_class_refuses_a_dataset_without_rows(method, name):
    """TRL ends it by a StopIteration, or trains on nothing without a word."""
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    given = {"train_dataset": rows, name: rows.select([])}
    with pytest.raises(ValueError, match=rf"^{name}: expected at least one row, got none; see"):
        getattr(ours, f"Fused{method.upper()}Trainer")(None, **given)


WRONG = {
    "dpo": (["question", "choosen", "rejected"], "choosen", "chosen"),
    "cpo": (["prompt", "chosen", "reject"], "reject", "rejected"),
    "orpo": (["prompt", "chosen", "reject"], "reject", "rejected"),
    "tpo": (["prompt", "chosen", "rejected", "refference"], "refference", "reference"),
    "kto": (["prompt", "completions", "label"], "completions", "completion"),
    "sft": (["prompts", "completion"], "prompts", "prompt"),
    "grpo": (["prompts"], "prompts", "prompt"),
    "rloo": (["prompts"], "prompts", "prompt"),
}


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("method", EVERY)
def test_a_class_refuses_other_columns(method, name):
    """TRL ends them by a KeyError, after the model was loaded."""
    columns, near, missing = WRONG[method]
    good = trl_runs.data(KINDS[method])
    wrong = Dataset.from_list([dict.fromkeys(columns, "a")])
    given = {"train_dataset": good, name: wrong if name == "train_dataset" else {"held": wrong}}
    told = rf"^{name}: expected the columns .*{missing}.*, got {', '.join(columns)} "
    told += rf"\({missing} missing\); {missing}: did you mean '{near}'\?"
    with pytest.raises(ValueError, match=told):
        getattr(ours, f"Fused{method.upper()}Trainer")(None, **given)


@pytest.mark.parametrize("method", EVERY)
def test_a_class_looks_at_what_is_given_by_position(method):
    cls = getattr(ours, f"Fused{method.upper()}Trainer")
    names = list(inspect.signature(classes(method)[0].__init__).parameters)[1:]
    rows = trl_runs.data(KINDS[method])
    for chosen, message in ((rows.select([]), "at least one row"), (_OTHER, "the columns")):
        given = {"train_dataset": rows, "eval_dataset": chosen}
        words = [given.get(name) for name in names[: names.index("eval_dataset") + 1]]
        with pytest.raises(ValueError, match=rf"^eval_dataset: expected {message}"):
            cls(*words)


_OTHER = Dataset.from_list([{"other": "a"}])


def test_rows_of_every_kind_are_taken():
    for method in EVERY:
        kinds = getattr(ours, f"Fused{method.upper()}Trainer").columns
        names = set(trl_runs.data(KINDS[method]).column_names)
        assert any(set(kind) <= names for kind in kinds)


def test_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with ours.patched():
        pass
    ours.patch(quiet=True)
    assert capsys.readouterr() == ("", "")
    ours.patch()
    said = capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    ours.patch()
    ours.unpatch()
    assert said.out == "" and said.err.count("\n") == 1
    for name in map(str.upper, EVERY):
        assert name in said.err
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("method", EVERY)
def test_what_this_version_has_not_is_left_out(method, monkeypatch, capsys):
    before, module = everything_in_trl(), places.module_of
    monkeypatch.setattr(places, "module_of", lambda name: None if name == method else module(name))
    with ours.patched(quiet=False):
        name = module(method).__name__
        assert changed(before) and not {key for key in changed(before) if name in key}
    said = capsys.readouterr().err.strip().split("without logits: ")[1].split(", ")
    assert sorted(said) == sorted(other.upper() for other in EVERY if other != method)
    assert not changed(before)


@pytest.mark.parametrize("method", ["base", "unheard"])
def test_a_trainer_that_this_version_has_not_says_so_when_it_is_made(method):
    """``base`` has a module, but no trainer in it."""
    name = f"{method.upper()}Trainer"
    cls = places.trainer_of(method)
    assert cls.__name__ == name
    with pytest.raises(ImportError) as caught:
        cls(model=None)
    assert str(caught.value) == (
        f"trl {trl.__version__}: expected {name} in trl.trainer.{method}_trainer or "
        f"trl.experimental.{method}.{method}_trainer, got none"
    )


def test_a_version_in_which_nothing_is_known(monkeypatch):
    before = everything_in_trl()
    with ours.patched():
        outer = everything_in_trl()
        monkeypatch.setattr(patching, "_SEAMS", (lambda options: [],))
        with pytest.raises(RuntimeError, match="expected a version from"), ours.patched():
            pass
        assert not changed(outer)
    assert not changed(before)


@pytest.mark.holds(20, 45)
@pytest.mark.parametrize("method", EVERY)
def test_classes(method):
    cls = getattr(ours, f"Fused{method.upper()}Trainer")
    assert issubclass(cls, classes(method)[0])
    reference = plain(method)
    before = everything_in_trl()
    tall = Tall()
    found = trl_runs.run(method, trainer_class=cls, watch=tall, memory_budget=BUDGET)
    assert not changed(before)
    assert tall.rows <= TALLEST
    check(reference, found)


@pytest.mark.parametrize("method", ["cpo", "tpo", "dpo"])
def test_classes_while_patched(method):
    cls = getattr(ours, f"Fused{method.upper()}Trainer")
    with ours.patched():
        outer = everything_in_trl()
        found = trl_runs.run(method, trainer_class=cls)
        assert not changed(outer)
    check(plain(method), found)


def test_classes_need_no_option_of_ours():
    with quiet():
        trainer = build("dpo", trainer_class=ours.FusedDPOTrainer)
    assert vars(trainer.model)["forward"].memory_budget is None


# models and checkpoints


@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_resume(method, tmp_path):
    runs = []
    for patched in (False, True):
        folder = tmp_path / str(patched)
        with ours.patched() if patched else quiet():
            saving = {"save_strategy": "steps", "save_steps": 2}
            whole = trl_runs.run(method, output=str(folder), **saving)
            rest = trl_runs.run(method, output=str(folder), resume=str(folder / "checkpoint-2"))
        assert [log.get("step") for log in rest.logs[:3]] == [1, 2, 3]
        last = (Run(whole.logs[2:3]), Run(rest.logs[2:3]))
        gaps = differences(*last)
        gaps.pop("num_tokens", None)  # TRL counts anew
        assert not {name: gap for name, gap in gaps.items() if gap > 2e-4}
        runs.append(rest)
    assert not {name: gap for name, gap in differences(*runs).items() if gap > 2e-4}
    assert trl_runs.update_difference(*runs) < 1e-3


@pytest.mark.parametrize("method", ["dpo", "cpo", "grpo"])
def test_saved_models_are_those_of_trl(method, tmp_path):
    saved = []
    for patched in (False, True):
        folder = tmp_path / str(patched)
        with ours.patched(quiet=True) if patched else quiet():
            found = trl_runs.run(method, keep=True)
            found.trainer.save_model(str(folder))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded.forward).__name__ == "method"
        saved.append({path.name for path in folder.iterdir()})
        keys = set(found.trainer.model.state_dict())
        assert keys == set(loaded.state_dict()) == set(trl_runs.model().state_dict())
        ids = torch.arange(12)[None]
        with torch.no_grad():
            own = found.trainer.model(ids).logits
            torch.testing.assert_close(loaded(ids).logits, own, rtol=1e-5, atol=0)
    assert saved[0] == saved[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_models_are_copied_with_it(method, copied):
    with ours.patched(memory_budget=BUDGET):
        model = trl_runs.run(method, keep=True).trainer.model
    twin = copied(model)
    ids = torch.arange(12)[None]
    flag = "fused_lm_head" if method == "dpo" else "fused"

    def scores(of: Any) -> torch.Tensor:
        found = of(input_ids=ids, labels=ids, **{flag: True})
        return found.log_probs if method == "dpo" else found.logprob

    torch.testing.assert_close(scores(twin), scores(model), rtol=1e-5, atol=0)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    uniform = torch.full((1, 11), -torch.log(torch.tensor(float(trl_runs.VOCAB))).item())
    torch.testing.assert_close(scores(twin), uniform, rtol=1e-5, atol=0)
    assert not torch.equal(scores(model), uniform)


def test_one_model_in_two_trainers():
    runs = []
    for patched in (False, True):
        model = trl_runs.model()
        with ours.patched() if patched else quiet():
            trl_runs.run("dpo", lambda model=model: model)
            runs.append(trl_runs.run("cpo", lambda model=model: model))
    check(*runs)


def test_generate_is_unchanged():
    given = {"do_sample": False, "max_new_tokens": 8}
    ids = torch.tensor([tokenizer()("red cat").input_ids])
    expected = trl_runs.model().generate(ids, **given)
    with ours.patched(), quiet():
        trainer = build("grpo")
        assert torch.equal(trainer.model.generate(ids, **given), expected)
