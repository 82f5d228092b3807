"""The Trainer: its loss is the formula on the model's own logits, however the pairs are split."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import json
import math
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import transformers
from oracles import relative
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from trainers.plain import plain_sgd
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from fusedpo.losses import DPO, KTO, ShortToLong, SimPO
from fusedpo.model_head import aligned_labels, causal_model, fused_forward
from fusedpo.recipes.short_to_long import ShortToLongCollator
from fusedpo.trainers.forwards import Batch
from fusedpo.trainers.length_groups import length_groups
from fusedpo.trainers.packing import packing_gap
from fusedpo.trainers.responses import ResponseCollator
from fusedpo.trainers.transformers import (
    FusedTrainer,
    PreferenceCollator,
    PreferenceTrainer,
    PreferenceTrainerMixin,
    add_fused_head,
    padding_token,
    remove_fused_head,
)
from fusedpo.trainers.transformers.reference import check_new_adapters

ROWS = tiny.token_rows(7)


def trainer(
    folder: Path,
    model: Any = None,
    loss: Any = None,
    rows: Any = ROWS,
    trainer_class: type[PreferenceTrainer] = PreferenceTrainer,
    **options: Any,
) -> PreferenceTrainer:
    arguments = plain_sgd(folder, options)
    return trainer_class(
        tiny.model() if model is None else model,
        arguments,
        loss=loss or SimPO(),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny.tokenizer(),
        **options,
    )


def naive_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """SimPO(beta=2, gamma=0.5) written out on the model's logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = ((logp * mask).sum(1) / mask.sum(1)).chunk(2)
    return -torch.nn.functional.logsigmoid(2 * (chosen - rejected) - 0.5).mean()


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same(left: torch.Tensor, right: torch.Tensor, share: float = 1e-5) -> bool:
    """Equal up to a share of the largest entry."""
    return bool((left - right).abs().max() <= share * right.abs().max())


# batches


def test_collator_puts_chosen_first_and_masks_prompt_and_padding():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "inputs": {"w": 0.5}},
        {"prompt_ids": [6], "chosen_ids": [7, 8, 9], "rejected_ids": [10], "inputs": {"w": 2.0}},
    ]
    batch = PreferenceCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 0],
        [6, 7, 8, 9],
        [1, 2, 4, 5],
        [6, 10, 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [1, 1, 0, 0],
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, 3, -100],
        [-100, 7, 8, 9],
        [-100, -100, 4, 5],
        [-100, 10, -100, -100],
    ]
    assert batch["w"].tolist() == [0.5, 2.0]
    assert PreferenceCollator(0, pad_to_multiple_of=8)(rows)["labels"].shape == (4, 8)


def test_packed_rows_are_padded_behind_the_last():
    """What pads is a sequence of its own to attention, and of the last row to the loss."""
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
        {"prompt_ids": [6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
    ]
    batch = PreferenceCollator(0, packed=True, pad_to_multiple_of=8)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 6, 7, 8, 9, 1, 2, 4, 5, 6, 10, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch["labels"][0, 13:].tolist() == [-100] * 3
    assert batch["cu_seqlens"].tolist() == [0, 3, 7, 11, 16]
    plain = PreferenceCollator(0, packed=True)(rows)
    assert plain["cu_seqlens"].tolist() == [0, 3, 7, 11, 13]
    for multiple in (1, 13):
        found = PreferenceCollator(0, packed=True, pad_to_multiple_of=multiple)(rows)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


COLLATORS = {
    "padded": PreferenceCollator,
    "packed": functools.partial(PreferenceCollator, packed=True),
    "responses": ResponseCollator,
    "two contexts": ShortToLongCollator,
}


@pytest.mark.parametrize("name", COLLATORS)
@pytest.mark.parametrize("multiple", [-8, 2.0, True])
def test_a_multiple_that_is_none_is_refused(name, multiple):
    with pytest.raises((ValueError, TypeError), match=r"^pad_to_multiple_of: expected"):
        COLLATORS[name](0, pad_to_multiple_of=multiple)


@pytest.mark.parametrize("name", COLLATORS)
def test_rows_of_text_are_refused_with_what_makes_others(name):
    collator = COLLATORS[name](0)
    made_by = "short_to_long.tokenize_rows" if name == "two contexts" else "rows.tokenize"
    match = f"^row 1 of the batch: expected rows with {', '.join(collator.columns)}, got prompt, "
    with pytest.raises(
        ValueError, match=rf"{match}chosen; make rows .* with fusedpo\..*{made_by}$"
    ):
        collator([{"prompt": "1 + 1 =", "chosen": "2"}])


@pytest.mark.parametrize("name", ["padded", "packed", "responses"])
def test_further_inputs_are_one_number_of_each_row(name):
    """What only some rows have was left out of the batch, or no error that says where."""
    collator = COLLATORS[name](0)
    ids = {key: [1, 2] for key in collator.columns}
    batch = collator([{**ids, "inputs": {"w": True}}, {**ids, "inputs": {"w": 2}}])
    assert batch["w"].dtype == torch.float32 and batch["w"].tolist() == [1.0, 2.0]
    for rows in ([{}, {"inputs": {"w": 1.0}}], [{"inputs": {"w": 1.0}}, {"inputs": {}}]):
        with pytest.raises(ValueError, match="row 2 of the batch, inputs: expected those of the f"):
            collator([{**ids, **row} for row in rows])
    with pytest.raises(
        TypeError, match=r"^row 2 of the batch, w: expected a number, got NoneType$"
    ):
        collator([{**ids, "inputs": {"w": 1.0}}, {**ids, "inputs": {"w": None}}])


# the loss


@pytest.mark.holds(2)
def test_loss_and_gradient_are_those_of_the_models_own_logits(tmp_path):
    model = tiny.model()
    subject = trainer(tmp_path, model)
    batch = subject.data_collator(ROWS)
    loss = subject.compute_loss(model, dict(batch))
    loss.backward()
    gradients = parameters_gradient(model)
    model.zero_grad()
    expected = naive_loss(model, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert same(gradients, parameters_gradient(model))


def parameters_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.holds(31)
@pytest.mark.parametrize("loss", [SimPO(), SimPO(sft_weight=0.3), DPO()], ids=repr)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 7), (2, 4), (4, 2)])
def test_accumulation_equals_one_batch(tmp_path, loss, batch_size, accumulation):
    """Also where the last batch is smaller, and for the mean over tokens of the cross-entropy."""
    whole, split = tiny.model(), tiny.model()
    start = parameters(whole)
    trainer(tmp_path, whole, loss, per_device_train_batch_size=7).train()
    subject = trainer(
        tmp_path,
        split,
        loss,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    subject.train()
    assert same(parameters(split) - start, parameters(whole) - start)


def test_logged_training_loss_is_the_mean_over_pairs(tmp_path):
    model = tiny.model()
    subject = trainer(tmp_path, model, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    batch = subject.data_collator(ROWS)
    with torch.no_grad():
        expected = float(naive_loss(model, batch))
    subject.train()
    logged = subject.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["rewards/margins"] == pytest.approx(
        logged["rewards/chosen"] - logged["rewards/rejected"], rel=1e-5
    )


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    found = [trainer(tmp_path, per_device_eval_batch_size=size).evaluate() for size in (7, 3, 1)]
    names = [name for name in found[0] if "/" in name or name == "eval_loss"]
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} < set(names)
    for name in names:
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name
        assert found[2][name] == pytest.approx(found[0][name], rel=1e-5), name
    model = tiny.model()
    with torch.no_grad():
        expected = float(naive_loss(model, PreferenceCollator(0)(ROWS)))
    assert found[1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_memory_budget_reaches_the_head(tmp_path):
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        trainer(tmp_path, memory_budget=64).train()


def test_a_gradient_tolerance_reaches_the_head_and_is_logged(tmp_path):
    # sure of what comes next, so that few columns matter
    model = tiny.model(vocab_size=4096, initializer_range=1.0, hidden_size=64)
    subject = trainer(tmp_path, model, gradient_tolerance=2e-3, max_steps=3, learning_rate=1e-4)
    subject.train()
    first, *later = (entry for entry in subject.state.log_history if "loss" in entry)
    assert first["head/columns_kept"] == 1 and first["head/dropped_mass"] == 0
    for entry in later:
        assert 0 < entry["head/columns_kept"] < 1 and entry["head/dropped_mass"] > 0
        assert entry["head/breaches"] >= (entry["head/gradient_error"] > 2e-3)
    without = trainer(tmp_path)
    without.train()
    assert not any(n.startswith("head/") for entry in without.state.log_history for n in entry)


@pytest.mark.parametrize(
    ("value", "error"), [(1e-6, ValueError), ("2e-3", TypeError), (True, TypeError)], ids=str
)
def test_a_wrong_gradient_tolerance_is_refused_at_once(tmp_path, value, error):
    model = tiny.model()
    with pytest.raises(error, match=r"^gradient_tolerance: expected"):
        trainer(tmp_path, model, gradient_tolerance=value)
    assert fused_forward(model) is None


@pytest.mark.holds(27)
def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    plain, recomputed = tiny.model(), tiny.model()
    enable = getattr(recomputed, "activation_checkpointing_enable", None)
    (enable or recomputed.gradient_checkpointing_enable)({"use_reentrant": False})
    for model in (plain, recomputed):
        trainer(tmp_path, model, per_device_train_batch_size=7).train()
    assert same(parameters(recomputed), parameters(plain), 1e-6)


@pytest.mark.holds(25)
def test_autocast_holds_in_the_forward(tmp_path, monkeypatch):
    seen = []
    model = tiny.model()
    subject = trainer(tmp_path, model, bf16=True)
    original = subject.functional
    monkeypatch.setattr(
        subject,
        "functional",
        lambda *a, **k: (seen.append(torch.is_autocast_enabled("cpu")), original(*a, **k))[1],
    )
    subject.train()
    assert seen == [True]
    assert next(model.parameters()).dtype == torch.float32


# the reference


def test_reference_is_the_model_as_it_was(tmp_path):
    model = tiny.model()
    start = parameters(model)
    subject = trainer(tmp_path, model, DPO(), max_steps=3, per_device_train_batch_size=7)
    before = subject.evaluate()
    subject.train()
    after = subject.evaluate()
    # no margin yet: -log sigmoid(0)
    assert before["eval_loss"] == pytest.approx(0.6931472, rel=1e-6)
    assert before["eval_rewards/margins"] == 0
    assert after["eval_loss"] < before["eval_loss"]
    assert torch.equal(parameters(subject.ref_model), start)
    assert not torch.equal(parameters(model), start)


def test_given_reference_is_used(tmp_path):
    reference = tiny.model(seed=1)
    found = trainer(tmp_path, tiny.model(), DPO(), ref_model=reference).evaluate()
    assert found["eval_rewards/margins"] != 0
    assert not any(p.requires_grad for p in reference.parameters())


def adapted(targets: list[str], **settings: Any) -> Any:
    return get_peft_model(tiny.model(), LoraConfig(target_modules=targets, r=4, **settings))


def learn(model: Any) -> Any:
    """A model whose adapters, and what else is trained, are another one than without them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


ADAPTERS = {
    "layer": lambda: adapted(["q_proj"]),
    "head": lambda: adapted(["lm_head"]),
    "whole module": lambda: adapted(["q_proj"], modules_to_save=["lm_head"]),
    "weights": lambda: adapted(["q_proj"], use_dora=True),
    "prompt": lambda: get_peft_model(
        tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reference_of_adapters_is_a_copy_of_them(tmp_path, kind):
    """Of those that have learned something: without them the model is another one."""
    model = learn(ADAPTERS[kind]())
    start, names = copy.deepcopy(model), set(model.state_dict())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    options = {"max_steps": 3, "per_device_train_batch_size": 7}
    subject = trainer(tmp_path, model, DPO(), **options)
    before = subject.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert before["eval_rewards/margins"] == 0
    subject.train()
    after = subject.evaluate()
    assert after["eval_rewards/margins"] > 0
    # as with a whole model of its own
    expected = trainer(tmp_path, model, DPO(), ref_model=start).evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert after[name] == pytest.approx(expected[name], rel=1e-5), name
    # nothing of it is in the model, and nothing frozen is there twice
    assert set(model.state_dict()) == names
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    theirs = dict(subject.ref_model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (theirs[name] is parameter) == (name not in trained), name
        assert not theirs[name].requires_grad or name in trained


@pytest.mark.parametrize("kind", ["layer", "head", "whole module"])
def test_the_reference_of_new_adapters_is_the_model_without_them(tmp_path, kind):
    """No copy is made, and it gives what one gives."""
    model = ADAPTERS[kind]()
    start = copy.deepcopy(model)
    options = {"max_steps": 3, "per_device_train_batch_size": 7}
    subject = trainer(tmp_path, model, DPO(), **options)
    assert subject.ref_model is None
    before = subject.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert before["eval_rewards/margins"] == 0
    subject.train()
    after = subject.evaluate()
    assert after["eval_rewards/margins"] > 0
    expected = trainer(tmp_path, model, DPO(), ref_model=start).evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert after[name] == pytest.approx(expected[name], rel=1e-5), name


def test_another_adapter_below_the_trained_one_is_a_part_of_the_reference(tmp_path):
    model = learn(adapted(["q_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"], r=2))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("second" in name)
    subject = trainer(tmp_path, model, DPO())
    assert subject.evaluate()["eval_rewards/margins"] == 0
    assert subject.ref_model is not None


def test_learned_adapters_over_weights_of_8_bits_have_no_reference(tmp_path):
    model = learn(adapted(["q_proj"]))
    model.get_base_model().is_loaded_in_8bit = True
    with pytest.raises(ValueError, match="model: expected new adapters over weights of 8 bits"):
        trainer(tmp_path, model, DPO())


def test_the_model_below_may_be_the_reference_of_learned_adapters(tmp_path):
    model = learn(adapted(["q_proj"]))
    model.get_base_model().is_loaded_in_8bit = True
    subject = trainer(tmp_path, model, DPO(), ref_model="base")
    found = subject.evaluate()
    expected = trainer(tmp_path, model, DPO(), ref_model=tiny.model()).evaluate()
    assert subject.ref_model is None and found["eval_rewards/margins"] != 0
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    with pytest.raises(ValueError, match="ref_model: expected a model of its own, beside a model"):
        trainer(tmp_path, tiny.model(), DPO(), ref_model="base")


@pytest.mark.parametrize("way", ["before", "in place", "away"])
def test_adapters_merged_into_what_the_reference_shares_are_refused(tmp_path, way):
    """Else the reference follows the policy."""
    model = learn(adapted(["q_proj"]))
    if way == "before":
        model.merge_adapter()
    subject = trainer(tmp_path, model, DPO())
    if way == "in place":
        before = subject.evaluate()
        model.merge_adapter()
    elif way == "away":
        subject.model = model.merge_and_unload()
    with pytest.raises(ValueError) as error:
        subject.evaluate()
    got = "a model without them" if way == "away" else "merged ones"
    assert str(error.value) == (
        "model: expected adapters that are not merged into the frozen weights, which the reference "
        f"shares, got {got}; call model.unmerge_adapter(), or give a ref_model with weights of its "
        "own"
    )
    if way == "in place":
        model.unmerge_adapter()
        assert subject.evaluate()["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)


def test_adapters_are_saved_and_resumed_without_their_reference(tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch"}
    torch.manual_seed(5)
    start = learn(adapted(["q_proj"]))
    whole, resumed = copy.deepcopy(start), copy.deepcopy(start)
    subject = trainer(tmp_path / "a", whole, DPO(), **options, save_strategy="steps", save_steps=2)
    subject.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(get_peft_model_state_dict(start))
    assert not [path for path in checkpoint.iterdir() if path.is_dir()]
    subject = trainer(tmp_path / "b", resumed, DPO(), **options)
    subject.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(parameters(resumed), parameters(whole))


def test_virtual_tokens_of_prompt_tuning_are_left_out_of_the_loss(tmp_path):
    """They stand in front of every row."""
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny.model(), settings)
    plain = tiny.model()
    subject = trainer(tmp_path, model, DPO(), ref_model=plain, per_device_train_batch_size=4)
    batch = next(iter(subject.get_train_dataloader()))
    loss = subject.compute_loss(model, dict(batch))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def scores(given: Any) -> torch.Tensor:
        logits = given(**inputs).logits[:, -batch["labels"].shape[1] :][:, :-1]
        labels = batch["labels"][:, 1:]
        logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (logp * (labels != -100)).sum(-1)

    with torch.no_grad():
        reference = scores(plain)
    ratio = scores(model) - reference
    margin = ratio[:4] - ratio[4:]
    naive = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5) != math.log(2)
    prompt = [p for p in model.parameters() if p.requires_grad]
    mine, truth = (torch.autograd.grad(value, prompt)[0] for value in (loss, naive))
    assert same(mine, truth)


def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers find that they run under FSDP."""
    monkeypatch.setattr(PreferenceTrainer, "_sharded", property(lambda self: True))


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
def test_where_weights_are_sharded_the_reference_is_its_log_probabilities(
    tmp_path, monkeypatch, targets
):
    """Found within a forward, the only time when weights are whole; they are the same numbers."""
    model = adapted(targets)
    whole = trainer(tmp_path, model, DPO())
    sharded(monkeypatch)
    subject = trainer(tmp_path, model, DPO())
    assert subject.ref_model is None
    monkeypatch.undo()
    learn(model)
    batch = whole.data_collator(ROWS)
    expected = whole.compute_loss(model, dict(batch))
    gradients = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    sharded(monkeypatch)
    seen = []
    reference = subject._reference
    monkeypatch.setattr(subject, "_reference", lambda *a: (seen.append(reference(*a)), seen[-1])[1])
    found = subject.compute_loss(model, dict(batch))
    (logprobs,) = seen
    assert isinstance(logprobs, torch.Tensor) and logprobs.shape == batch["labels"].shape
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(found, [p for p in model.parameters() if p.requires_grad])
    for mine, theirs in zip(ours, gradients, strict=True):
        assert same(mine, theirs)


@pytest.mark.parametrize("kind", ["layer", "whole module", "weights", "prompt"])
def test_where_weights_are_sharded_adapters_have_to_be_new(tmp_path, monkeypatch, kind):
    """There the reference is the model without them."""
    sharded(monkeypatch)
    new = ADAPTERS[kind]()
    if kind != "prompt":
        assert trainer(tmp_path, new, DPO()).ref_model is None
        learn(new)
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, new, DPO())
    assert str(error.value).startswith(
        "model: expected new LoRA adapters under FSDP and DeepSpeed, where the reference is the "
        "model without them, got "
    )
    trainer(tmp_path, new, SimPO())


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_where_weights_are_sharded_a_module_trained_whole_has_to_be_new(
    tmp_path, monkeypatch, module
):
    sharded(monkeypatch)
    model = adapted(["q_proj"], modules_to_save=[module])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 1
    with pytest.raises(ValueError, match=f"{module}.modules_to_save.default.weight, which may"):
        trainer(tmp_path, model, DPO())


def test_where_weights_are_sharded_adapters_of_embeddings_have_to_be_new(tmp_path, monkeypatch):
    """Their first factor is 0 at first, not the second."""
    sharded(monkeypatch)
    model = adapted(["embed_tokens", "q_proj"])
    assert trainer(tmp_path, model, DPO()).ref_model is None
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.lora_embedding_A["default"] += 1
    with pytest.raises(ValueError, match=r"lora_embedding_A\.default, which may have learned"):
        trainer(tmp_path, model, DPO())


@pytest.mark.parametrize("learned", [False, True])
def test_parts_of_a_module_trained_whole_are_compared(learned):
    """As of ZeRO-3, which shows no rows of a weight."""
    model = adapted(["q_proj"], modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "lm_head" in name:
            parameter.ds_tensor = parameter.data[:2] + (learned and "modules_to_save" in name)
            parameter.data = torch.empty(0)
    told = pytest.raises(ValueError, match="which may") if learned else contextlib.nullcontext()
    with told:
        check_new_adapters(model)


def test_a_model_as_the_reference_is_refused_where_weights_are_sharded(tmp_path, monkeypatch):
    sharded(monkeypatch)
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, loss=DPO())
    assert str(error.value) == (
        "ref_model: expected none under FSDP and DeepSpeed, where it would be whole on every "
        "device, got LlamaForCausalLM; train new adapters, whose reference is the model without "
        "them, take a loss without a reference, or train under DistributedDataParallel"
    )


@pytest.mark.parametrize("placed", ["hf_device_map", "quantization_method"])
def test_a_reference_that_has_its_place_is_not_moved(tmp_path, monkeypatch, placed):
    reference = tiny.model(seed=1)
    moves = []
    monkeypatch.setattr(reference, "to", moves.append)
    trainer(tmp_path, loss=DPO(), ref_model=reference)
    assert moves == [torch.device("cpu")]
    setattr(reference, placed, {"": "cpu"})
    subject = trainer(tmp_path, loss=DPO(), ref_model=reference)
    assert subject.ref_model is reference and len(moves) == 1


@pytest.mark.parametrize(
    ("family", "own"),
    [("Gemma2", {"final_logit_softcapping": 2.0}), ("Granite", {"logits_scaling": 3.0})],
)
def test_a_reference_that_does_other_things_to_its_logits_keeps_them(tmp_path, family, own):
    """What is done to the reference's logits is its own affair."""
    config = getattr(transformers, f"{family}Config")
    sizes = {**tiny.model().config.to_dict(), "head_dim": 8}
    sizes = {n: sizes[n] for n in sizes if hasattr(config(), n) and n != "model_type"}
    torch.manual_seed(3)
    capped = getattr(transformers, f"{family}ForCausalLM")(config(**{**sizes, **own}))
    ids = PreferenceCollator(0)(ROWS)
    with torch.no_grad():
        logits = capped(ids["input_ids"], attention_mask=ids["attention_mask"]).logits[:, :-1]
    labels = ids["labels"][:, 1:]
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logp = (logp * (labels != -100)).sum(1)
    found = trainer(tmp_path, tiny.model(), DPO(beta=1.0), ref_model=capped).evaluate()
    chosen = found["eval_logps/chosen"] - found["eval_rewards/chosen"]
    assert chosen == pytest.approx(float(logp[: len(ROWS)].mean()), rel=1e-5)


# other models, batches and trainers


def update(subject: Trainer, model: Any) -> torch.Tensor:
    start = parameters(model)
    subject.train()
    return parameters(model) - start


@pytest.mark.holds(17)
def test_packed_batches_equal_padded_ones(tmp_path):
    """With a cross-entropy, whose denominator counts tokens, and accumulation."""
    loss, options = SimPO(sft_weight=0.3), {"per_device_train_batch_size": 2}
    options["gradient_accumulation_steps"] = 3
    updates = []
    for packed, multiple in ((False, None), (True, None), (True, 16)):
        model = tiny.model()
        collator = PreferenceCollator(tiny.tokenizer().pad_token_id, multiple, packed=packed)
        batch = collator(ROWS[:2])
        assert ("cu_seqlens" in batch) == packed
        folder = tmp_path / f"{packed} {multiple}"
        subject = trainer(folder, model, loss, data_collator=collator, **options)
        updates.append(update(subject, model))
    for packed in updates[1:]:
        assert same(packed, updates[0])
        assert not same(0.9 * packed, updates[0])


def rows_of(vocabulary: int) -> list[Any]:
    """Token rows of a few pairs."""
    generator = torch.Generator().manual_seed(4)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(3 + i), "chosen_ids": ids(6 - i), "rejected_ids": ids(4 + 2 * i)}
        for i in range(4)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "mixes"),
    [
        ("opt", True),
        ("gpt_oss", True),
        ("mamba", True),
        ("qwen3_5_text", True),
        ("llama", False),
        ("gemma2", False),
        ("qwen3_moe", False),
    ],
)
def test_a_model_that_mixes_packed_rows_is_refused(tmp_path, family, mixes, dtype):
    """Before anything is learned, and with nothing left of the comparison."""
    from test_families import build

    model = build(family).to(getattr(torch, dtype)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subject = trainer(
        tmp_path, model, rows=rows_of(90), data_collator=PreferenceCollator(0, packed=True)
    )
    batch = subject.data_collator(rows_of(90))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for _ in range(2):
        if not mixes:
            assert subject.compute_loss(model, dict(batch)).isfinite()
            continue
        with pytest.raises(ValueError) as error:
            subject.compute_loss(model, dict(batch))
        message = str(error.value)
        assert message.startswith(
            f"data_collator: expected one that pads, as {type(model).__name__} mixes packed rows: "
        )
        assert message.endswith(
            "got packed rows; leave out packed=True, or load the model with another "
            "attn_implementation"
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    if mixes:
        with pytest.raises(ValueError, match="mixes packed rows"):
            subject.evaluate()
        padded = trainer(tmp_path / "padded", model, rows=rows_of(90))
        assert padded.compute_loss(model, padded.data_collator(rows_of(90))).isfinite()


@pytest.mark.parametrize(
    ("family", "mixes"),
    [
        ("Qwen3_5Text", True),
        ("Bloom", True),
        ("Llama", False),
        ("Qwen3Moe", False),
    ],
)
def test_what_is_mixed_by_less_than_rounding_is_found(tmp_path, family, mixes):
    """In bfloat16, and with small weights: other tokens in the row before change nothing at all."""
    kind = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    options = {
        "Qwen3_5Text": {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        },
        "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    }.get(family, {})
    config = getattr(transformers, f"{family}Config")(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        **options,
        **({} if family == "Bloom" else {"num_key_value_heads": 2, "intermediate_size": 48}),
    )
    torch.manual_seed(0)
    model = kind(config).bfloat16()
    collator = PreferenceCollator(0, packed=True)
    subject = trainer(tmp_path, model, rows=rows_of(90), data_collator=collator)
    if not mixes:
        assert subject.compute_loss(model, collator(rows_of(90))).isfinite()
        return
    with pytest.raises(ValueError, match="from those it has behind another by"):
        subject.compute_loss(model, collator(rows_of(90)))


@pytest.mark.parametrize("multiple", [None, 8, 64])
@pytest.mark.parametrize("responses", [([20, 21, 22], [30]), ([5], [6]), ([5, 5, 5], [5])])
def test_short_packed_rows_are_compared_without_their_padding(tmp_path, responses, multiple):
    chosen, rejected = responses
    rows = [{"prompt_ids": [5, 5], "chosen_ids": chosen, "rejected_ids": rejected}]
    model = tiny.model().eval()
    losses = []
    for packed in (False, True):
        collator = PreferenceCollator(0, multiple, packed=packed)
        subject = trainer(tmp_path / str(packed), model, rows=rows, data_collator=collator)
        losses.append(subject.compute_loss(model, collator(rows)))
    assert relative(*losses) < 1e-5


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("borders", [[0, 9], [0, 9, 9], [0, 0, 9]])
def test_a_packed_row_that_is_alone_is_put_behind_itself(family, borders):
    """Every process takes part with as many forwards, whatever rows it has."""
    from test_families import build

    model = build(family)
    add_fused_head(model)
    inputs = {"input_ids": torch.arange(3, 12)[None], "position_ids": torch.arange(9)[None]}
    gaps, bounds = packing_gap(model, inputs, torch.tensor(borders))
    assert bool((gaps <= bounds).all()) == (family == "llama")


def test_models_of_earlier_trainings_are_not_held_on_to(tmp_path):
    """Those that packed rows were compared of."""
    made: list[Any] = []

    def model_init() -> Any:
        model = tiny.model()
        made.append(weakref.ref(model))
        return model

    collator = PreferenceCollator(tiny.tokenizer().pad_token_id, packed=True)
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
    )
    subject = PreferenceTrainer(
        None, args, loss=SimPO(), model_init=model_init, train_dataset=ROWS, data_collator=collator
    )
    for _ in range(3):
        subject.train()
    gc.collect()
    assert [reference() is not None for reference in made[:-1]] == [False] * (len(made) - 1)


def test_virtual_tokens_before_packed_rows_are_refused(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny.model(), config)
    collator = PreferenceCollator(tiny.tokenizer().pad_token_id, packed=True)
    subject = trainer(tmp_path, model, data_collator=collator)
    with pytest.raises(ValueError) as error:
        subject.compute_loss(model, collator(ROWS[:2]))
    assert str(error.value) == (
        "data_collator: expected one that pads, as PeftModelForCausalLM puts tokens of its own "
        "before the rows, got packed rows; leave out packed=True"
    )


def test_packed_rows_are_compared_once(tmp_path):
    """And anew for another attention."""
    model = tiny.model()
    collator = PreferenceCollator(tiny.tokenizer().pad_token_id, packed=True)
    subject = trainer(tmp_path, model, DPO(), data_collator=collator)
    runs: list[str] = []
    model.model.register_forward_hook(lambda *args: runs.append("policy"))
    subject.ref_model.model.register_forward_hook(lambda *args: runs.append("reference"))
    # of each: an experiment at the head, packed, alone and behind others; then the step's own
    for expected in ([5, 5], [1, 1], [1, 1]):
        runs.clear()
        subject.compute_loss(model, collator(ROWS[:2]))
        assert [runs.count(name) for name in ("policy", "reference")] == expected
    model.set_attn_implementation("eager")
    runs.clear()
    subject.compute_loss(model, collator(ROWS[:2]))
    assert [runs.count(name) for name in ("policy", "reference")] == [4, 1]


@pytest.mark.parametrize("mixes", [False, True])
def test_packed_rows_are_compared_under_autocast(tmp_path, mixes):
    """Which is entered within the model's own forward: rounding is bfloat16's all the same."""
    from test_families import build

    model = build("gpt_oss" if mixes else "llama")
    subject = trainer(
        tmp_path,
        model,
        DPO(),
        rows_of(90),
        bf16=True,
        data_collator=PreferenceCollator(0, packed=True),
    )
    if mixes:
        with pytest.raises(ValueError, match="as GptOssForCausalLM mixes packed rows"):
            subject.train()
        return
    subject.train()
    assert subject.state.global_step == 1
    assert subject.evaluate()["eval_loss"] > 0


def test_a_reference_that_mixes_packed_rows_is_refused(tmp_path):
    from test_families import build

    subject = trainer(
        tmp_path,
        build("llama"),
        DPO(),
        rows_of(90),
        ref_model=build("opt"),
        data_collator=PreferenceCollator(0, packed=True),
    )
    with pytest.raises(ValueError, match="as OPTForCausalLM mixes packed rows"):
        subject.evaluate()


def test_one_process_that_finds_rows_mixed_stops_all(tmp_path, monkeypatch):
    """Else the others would wait for it."""
    collator = PreferenceCollator(tiny.tokenizer().pad_token_id, packed=True)
    model = tiny.model()
    subject = trainer(tmp_path, model, data_collator=collator)
    monkeypatch.setattr(
        subject.accelerator, "gather", lambda gap: torch.cat([gap, torch.full_like(gap, 0.5)])
    )
    with pytest.raises(ValueError, match="by 50 %, got packed rows"):
        subject.compute_loss(model, collator(ROWS[:2]))


def test_a_trainer_of_ones_own_by_the_mixin(tmp_path):
    class Mine(PreferenceTrainerMixin, Trainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    whole, own = tiny.model(), tiny.model()
    expected = trainer(tmp_path, whole)
    subject = Mine(
        own,
        expected.args,
        loss=SimPO(),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tiny.tokenizer(),
    )
    assert torch.equal(update(subject, own), update(expected, whole))
    assert subject.steps == 1


def experts(**config: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = tiny.model().config.to_dict()
    sizes = {k: v for k, v in sizes.items() if k not in ("model_type", "architectures")}
    return MixtralForCausalLM(MixtralConfig(**{**sizes, "num_local_experts": 4, **config}))


def test_experts_add_their_balancing_loss(tmp_path):
    """In the same share whatever way the pairs of a step are split."""
    settings = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    plain, balanced = experts(), experts(**settings)
    one = trainer(tmp_path / "a", plain, per_device_train_batch_size=4)
    two = trainer(tmp_path / "b", balanced, per_device_train_batch_size=4)
    batch = two.data_collator(ROWS[:4])
    with torch.no_grad():
        aux = balanced(batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
        alone, found = (t.compute_loss(t.model, batch) for t in (one, two))
        counts = torch.tensor([8.0, 100.0], dtype=torch.float64)
        half = two.compute_loss(two.model, batch, num_items_in_batch=counts)
    assert float(found - alone) == pytest.approx(0.5 * float(aux), rel=1e-4)
    assert float(half) == pytest.approx(float(found) / 2, rel=1e-6)
    two.train()
    assert two.state.log_history[0]["aux_loss"] > 0


def test_what_is_not_the_losss_goes_to_the_model(tmp_path):
    """A collator may add what the model takes."""
    model, plain = tiny.model(), PreferenceCollator(tiny.tokenizer().pad_token_id)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = plain(rows)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    trainer(tmp_path, model, data_collator=collate).train()
    assert all(positions is not None for positions in seen)


def test_repeated_rows_are_those_beyond_the_last_of_a_round(tmp_path, monkeypatch):
    """Of the last 5 rows of 2 processes with batches of 4, the second process has one."""
    made = trainer(tmp_path, per_device_eval_batch_size=4)
    state = types.SimpleNamespace(end_of_dataloader=True, remainder=5)
    monkeypatch.setattr(made.accelerator, "gradient_state", state)
    for rank, kept in ((0, 4), (1, 1), (2, 0)):
        monkeypatch.setattr(TrainingArguments, "process_index", rank)
        assert made._not_repeated(4) == kept
    state.end_of_dataloader = False
    assert made._not_repeated(4) == 4


def test_an_evaluation_is_of_the_first_examples_where_the_rest_is_repeated(tmp_path, monkeypatch):
    """The loss of two pairs, weighed by two, of a batch of three."""
    made = trainer(tmp_path)
    batch = made.data_collator(ROWS[:3])
    expected, _ = trainer(tmp_path).compute_loss(
        made.model.eval(), made.data_collator(ROWS[:2]), return_outputs=True
    )
    monkeypatch.setattr(made, "_not_repeated", lambda count: 2)
    loss, *_ = made.prediction_step(made.model, batch, prediction_loss_only=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert made._eval_means.pairs == 2
    assert made._eval_means.take(made.accelerator)["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_reference_has_no_dropout(tmp_path, adapted):
    model = tiny.model(attention_dropout=0.5)
    batch = PreferenceCollator(0)(ROWS[:3])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = Batch(inputs, batch["labels"])
    with torch.no_grad():
        expected = model.eval().model(**inputs).last_hidden_state
    model.train()
    if adapted:
        config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
        model = get_peft_model(model, config).train()
    made = trainer(tmp_path, model, DPO())
    hidden, _ = made._reference(made.model.train(), own)
    assert torch.equal(hidden, expected)
    assert made.model.training


def test_the_model_without_its_adapters_is_a_reference_without_dropout(tmp_path):
    """As where weights are sharded, so that no copy serves."""
    model = tiny.model(attention_dropout=0.5)
    batch = PreferenceCollator(0)(ROWS[:3])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = Batch(inputs, batch["labels"])
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    scored = logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    expected = torch.where(batch["labels"] == -100, 0, scored)
    adapters = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
    made = trainer(tmp_path, get_peft_model(model, adapters).train(), DPO())
    made.ref_model, made.is_fsdp_enabled = None, True
    found = made._reference(made.model.train(), own)
    assert relative(found, expected) < 1e-5
    assert made.model.training


def test_means_are_of_what_came_since_the_last_time(tmp_path):
    made = trainer(tmp_path)
    for value, pairs in ((1.0, 3), (5.0, 1)):
        made._train_means.add({"loss": torch.tensor(value)}, pairs)
    assert made._train_means.take(made.accelerator) == {"loss": 2.0}
    made._train_means.add({"loss": torch.tensor(4.0)}, 2)
    assert made._train_means.take(made.accelerator) == {"loss": 4.0}
    assert made._train_means.take(made.accelerator) == {}


def test_no_label_of_a_packed_row_is_the_next_rows_first_token():
    """A prompt of one token predicts the first of the response; the last token predicts nothing."""
    rows: Any = [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]}]
    batch = PreferenceCollator(0, packed=True)(rows)
    # as if the second row had no prompt
    batch["labels"][0, 3] = 5
    found = aligned_labels(batch["labels"], batch["cu_seqlens"])
    assert found.tolist() == [[6, 7, -100, 8, -100]]


def test_evaluation_is_no_part_of_what_is_logged_of_training(tmp_path):
    made = trainer(tmp_path)
    made.evaluate()
    assert made._train_means.pairs == 0
    before = made.evaluate()["eval_loss"]
    # as if an evaluation had been broken off
    made._eval_means.add({"loss": torch.tensor(9.0)}, 5)
    assert made.evaluate()["eval_loss"] == before


def test_a_loss_that_is_only_looked_at_is_no_part_of_what_is_logged_of_training(tmp_path):
    made = trainer(tmp_path)
    batch = made.data_collator(ROWS)
    with torch.no_grad():
        made.compute_loss(made.model.train(), batch)
    assert made._train_means.pairs == 0
    made.compute_loss(made.model, batch)
    assert made._train_means.pairs == len(ROWS)


def test_neither_evaluation_nor_the_reference_makes_a_graph(tmp_path):
    """Of adapters over biases that are trained, the reference has them too."""
    adapters = LoraConfig(target_modules=["q_proj"], bias="all")
    model = get_peft_model(tiny.model(attention_bias=True), adapters)
    made = trainer(tmp_path, model, DPO(), ref_model="base")
    with_graph: list[bool] = []

    def noted(module: Any, args: Any, output: Any) -> None:
        with_graph.append(output.requires_grad)

    model.get_base_model().model.norm.register_forward_hook(noted)
    made.train()
    # the head is looked at, the reference run, and then the policy
    assert with_graph[-2:] == [False, True]
    with_graph.clear()
    made.evaluate()
    assert len(with_graph) >= 2 and not any(with_graph)


def test_an_evaluation_while_it_is_trained_leaves_the_reference_in_its_precision(tmp_path):
    """As it does the policy, which is cast for one that stands alone."""
    given = {"bf16_full_eval": True, "eval_strategy": "steps", "eval_steps": 1}
    made = trainer(tmp_path, None, DPO(), **given)
    made.train()
    assert any("eval_loss" in entry for entry in made.state.log_history)
    assert {p.dtype for p in made.ref_model.parameters()} == {torch.float32}
    made.evaluate()
    dtypes = [{p.dtype for p in each.parameters()} for each in (made.model, made.ref_model)]
    assert dtypes == [{torch.bfloat16}] * 2


def test_what_an_earlier_training_had_not_logged_is_no_part_of_the_next(tmp_path):
    """Where the last step of a training is not one of those that are logged at."""
    given = {"learning_rate": 0.0, "logging_steps": 2, "max_steps": 3}
    given["per_device_train_batch_size"] = 2
    subject = trainer(tmp_path, **given)
    logged = []
    for _ in range(2):
        subject.train()
        logged.append(subject.state.log_history[0])
    for name in ("rewards/chosen", "rewards/margins", "logps/rejected"):
        assert logged[1][name] == logged[0][name]


def test_an_attempt_that_was_given_up_is_no_part_of_what_is_logged(tmp_path):
    """As one out of memory, after which a smaller batch size is tried."""

    class Full(PreferenceTrainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.steps += 1
            if self.steps == 2:
                raise RuntimeError("CUDA out of memory.")
            return loss

    given = {"learning_rate": 0.0, "logging_steps": 2, "max_steps": 2}
    found = trainer(
        tmp_path,
        trainer_class=Full,
        per_device_train_batch_size=4,
        auto_find_batch_size=True,
        **given,
    )
    found.train()
    smaller = found._train_batch_size
    assert smaller < 4
    alone = trainer(tmp_path, per_device_train_batch_size=smaller, **given)
    alone.train()
    name = "rewards/chosen"
    assert found.state.log_history[0][name] == alone.state.log_history[0][name]


def test_a_loss_that_is_logged_without_a_batch_stands_alone(tmp_path):
    subject = trainer(tmp_path)
    subject.log({"loss": 2.0})
    assert subject.state.log_history == [{"loss": 2.0, "epoch": 0, "step": 0}]


def test_a_step_without_batches_has_no_counts(tmp_path):
    """Where the rows end before the step that Trainer asks for."""
    subject = trainer(tmp_path)
    assert subject.get_batch_samples(iter([]), 2, subject.args.device) == ([], None)


def test_options_of_the_fused_head_stay(tmp_path):
    model = tiny.model()
    add_fused_head(model, memory_budget="1MiB", unsupported="fallback")
    assert trainer(tmp_path, model).memory_budget == "1MiB"
    assert trainer(tmp_path, model, memory_budget="2MiB").memory_budget == "2MiB"
    both = trainer(tmp_path, model, gradient_tolerance=2e-3)
    assert (both.memory_budget, both.gradient_tolerance) == ("2MiB", 2e-3)
    assert trainer(tmp_path, model, memory_budget="1MiB").gradient_tolerance == 2e-3
    assert trainer(tmp_path, model).gradient_tolerance == 2e-3
    assert trainer(tmp_path, model, gradient_tolerance=0.0).gradient_tolerance == 0.0


def test_streams_are_not_cut_between_chosen_and_rejected(tmp_path):
    rows = [
        {name: row[name].tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for row in ROWS
    ]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    subject = trainer(tmp_path, rows=stream)
    assert subject.args.accelerator_config.dispatch_batches is False


# what Trainer does beside


def test_the_model_makes_logits_and_text_as_before(tmp_path):
    model = tiny.model()
    names = set(model.state_dict())
    trainer(tmp_path, model).train()
    ids = torch.tensor([[1, 5, 6]])
    fused = model(ids).logits
    text = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert set(model.state_dict()) == names
    remove_fused_head(model)
    assert "forward" not in vars(model)
    assert torch.equal(model(ids).logits, fused)
    assert torch.equal(model.generate(ids, max_new_tokens=2, do_sample=False), text)


def test_an_interrupted_forward_leaves_the_head(tmp_path, monkeypatch):
    model = tiny.model()
    subject = trainer(tmp_path, model)
    subject.compute_loss(model, subject.data_collator(tiny.token_rows(2)))

    def interrupted(*a: Any, **k: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, "functional", interrupted)
    with pytest.raises(KeyboardInterrupt):
        subject.train()
    assert "forward" not in vars(model.lm_head) and not model.lm_head._forward_hooks


def test_resuming_equals_going_on(tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch"}
    whole, resumed = tiny.model(), tiny.model()
    trainer(tmp_path / "a", whole, **options, save_strategy="steps", save_steps=2).train()
    subject = trainer(tmp_path / "b", resumed, **options)
    subject.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(parameters(resumed), parameters(whole))


def test_saved_model_is_loaded_by_transformers(tmp_path):
    model = tiny.model()
    subject = trainer(tmp_path, model, max_steps=2)
    subject.train()
    subject.save_model(str(tmp_path / "saved"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    before, after = subject.evaluate(), trainer(tmp_path, loaded).evaluate()
    assert after["eval_loss"] == before["eval_loss"]


@pytest.mark.holds(32)
def test_two_processes_equal_one(tmp_path):
    """Pairs of uneven number split over ranks, entered through DistributedDataParallel."""
    whole = tiny.model()
    start = parameters(whole)
    rows = tiny.token_rows(8)
    subject = trainer(tmp_path, whole, SimPO(sft_weight=0.3), rows, per_device_train_batch_size=8)
    subject.train()
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    worker = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [*run, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    update = torch.load(tmp_path / "update.pt")
    assert same(update, parameters(whole) - start)
    log = json.loads((tmp_path / "log.json").read_text())
    for name in ("loss", "rewards/margins", "nll_loss"):
        # the cross-entropy is a mean over tokens, which a mean over pairs does not quite give
        share = 2e-2 if name == "nll_loss" else 1e-5
        assert log[name] == pytest.approx(subject.state.log_history[0][name], rel=share), name
    for row in rows[4:6]:
        row["prompt_ids"] = row["prompt_ids"][-1:]
    sides = ("chosen_ids", "rejected_ids")
    first, second = (
        length_groups([len(row["prompt_ids"]) + len(row[side]) for row in part for side in sides])
        for part in (rows[:4], rows[4:])
    )
    assert len(first) < len(second)
    whole = tiny.model()
    trainer(tmp_path, whole, rows=rows, per_device_train_batch_size=8).train()
    assert same(torch.load(tmp_path / "grouped.pt"), parameters(whole) - start)


# refusals


class Shifting(LlamaForCausalLM):
    """Does something to its logits that a head's weight does not say."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


def test_a_head_that_does_more_is_refused(tmp_path):
    model = tiny.model()
    model.__class__ = Shifting
    with pytest.raises(ValueError, match="model: expected logits that are"):
        trainer(tmp_path, model).train()


def test_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="model: expected a decoder-only"):
        trainer(tmp_path, T5ForConditionalGeneration(config))


def test_unused_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ref_model: expected None, as SimPO has no reference"):
        trainer(tmp_path, ref_model=tiny.model())
    with pytest.raises(ValueError, match="compute_metrics: expected None"):
        trainer(tmp_path, compute_metrics=lambda prediction: {})
    with pytest.raises(TypeError, match="loss: expected a preference loss"):
        trainer(tmp_path, loss="simpo")
    model = tiny.model()
    with pytest.raises(ValueError, match="ref_model: expected a model of its own"):
        trainer(tmp_path, model, DPO(), ref_model=model)
    with pytest.raises(ValueError, match="processing_class: expected the tokenizer"):
        PreferenceTrainer(model, TrainingArguments(str(tmp_path)), loss=SimPO())


ARGUMENTS = {
    "label_smoothing_factor": (
        {"label_smoothing_factor": 0.3},
        "label_smoothing_factor: expected 0, as no logits are made, got 0.3; "
        "take label_smoothing of the loss",
    ),
    "label_names": (
        {"label_names": ["chosen"]},
        "label_names: expected None or ['labels'], got ['chosen']; leave it out",
    ),
    "liger": (
        {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
        "liger_kernel_config['fused_linear_cross_entropy']: expected False or nothing, as the "
        "head is fused here, got True; leave it out",
    ),
    "train_sampling_strategy": (
        {"train_sampling_strategy": "group_by_length"},
        "train_sampling_strategy: expected 'random', as train_dataset is no datasets.Dataset with "
        "the column length, got 'group_by_length'; add the column length, of tokens a row, or "
        "leave it out",
    ),
    "dispatch_batches": (
        {"accelerator_config": {"dispatch_batches": True}},
        "accelerator_config.dispatch_batches: expected None or False, as batches would be cut "
        "between chosen and rejected, got True; leave it out",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_would_do_nothing_are_refused(tmp_path, name):
    arguments, message = ARGUMENTS[name]
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("average_tokens_across_devices", False, "average_tokens_across_devices: expected True"),
        ("past_index", 2, "past_index: expected -1, as no states are kept, got 2"),
        (
            "parallelism_config",
            types.SimpleNamespace(cp_enabled=True, sp_enabled=False),
            "parallelism_config: expected whole sequences on every process",
        ),
    ],
)
def test_arguments_of_several_processes_are_refused(tmp_path, monkeypatch, name, value, message):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    setattr(args, name, value)
    options = {"train_dataset": ROWS, "processing_class": tiny.tokenizer()}
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(tiny.model(), args, loss=SimPO(), **options)


# what TrainingArguments has, and what becomes of it here
OBEYED = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16
    bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend
    torch_compile_mode use_liger_kernel use_cache neftune_noise_alpha torch_empty_cache_steps
    auto_find_batch_size eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start full_determinism seed data_seed use_cpu accelerator_config dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint resume_from_checkpoint local_rank
"""
REFUSED = """
    label_smoothing_factor label_names average_tokens_across_devices past_index liger_kernel_config
    parallelism_config
"""
# beside the loss: logs, files, the Hub; and of metrics of logits, which there are none of
BESIDE = """
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id prediction_loss_only
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision debug skip_memory_metrics do_train do_eval do_predict
    remove_unused_columns
"""


def test_every_argument_of_the_newest_transformers_has_been_decided_on():
    """A later version may bring one that changes the loss: obey or refuse it, and add it above."""
    if Version(transformers.__version__).release[:2] < (5, 23):
        pytest.skip("older versions have others, which were looked at where they are refused")
    names = {each.name for each in dataclasses.fields(TrainingArguments)}
    assert names <= set(f"{OBEYED} {REFUSED} {BESIDE}".split())


def test_ligers_layers_are_taken_and_its_heads_are_not(tmp_path):
    """One of its heads would take the place of the model's forward, by default."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    layers = {"rope": False, "rms_norm": False, "swiglu": False}  # they change classes for good
    model = tiny.model()
    subject = trainer(tmp_path, model, use_liger_kernel=True, liger_kernel_config=layers)
    forward = model.forward
    _apply_liger_kernel_to_instance(model=model, **subject.args.liger_kernel_config)
    assert model.forward is forward
    assert subject.args.liger_kernel_config.items() > layers.items()


def test_a_reference_has_ligers_layers_as_the_policy_has(tmp_path, monkeypatch):
    """Else equal models differ by what their layers round."""
    import liger_kernel.transformers

    seen: list[Any] = []
    name = "_apply_liger_kernel_to_instance"
    record = lambda model, **layers: seen.append((model, layers))  # noqa: E731
    monkeypatch.setattr(liger_kernel.transformers, name, record)
    layers = {"rope": False}
    options = {"use_liger_kernel": True, "liger_kernel_config": layers}
    for model in (tiny.model(), learn(adapted(["q_proj"]))):
        seen.clear()
        subject = trainer(tmp_path, model, DPO(), **options)
        given = subject.args.liger_kernel_config
        expected = [causal_model(each) for each in (subject.model, subject.ref_model)]
        assert all(a[0] is b for a, b in zip(seen, expected, strict=True))
        assert [each[1] for each in seen] == [given, given]


def test_noise_on_embeddings_is_in_training_alone(tmp_path):
    found = {}
    for noise in (None, 50.0):
        subject = trainer(tmp_path, loss=DPO(), neftune_noise_alpha=noise)
        evaluated = subject.evaluate()["eval_loss"]
        subject.train()
        found[noise] = evaluated, subject.state.log_history[-2]["loss"]
    assert found[50.0][0] == found[None][0]
    assert found[50.0][1] != found[None][1]


@pytest.mark.parametrize("model", [tiny.model, lambda: learn(adapted(["q_proj"]))])
def test_evaluation_in_half_precision_has_its_reference_too(tmp_path, model):
    found = trainer(tmp_path, model(), DPO(), bf16_full_eval=True).evaluate()
    assert found["eval_rewards/margins"] == 0


def test_a_compiled_model_is_trained_alike(tmp_path):
    whole, compiled = tiny.model(), tiny.model()
    expected = update(trainer(tmp_path, whole, DPO()), whole)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert same(update(trainer(tmp_path, compiled, DPO(), **options), compiled), expected)


@pytest.mark.parametrize(
    ("config", "index", "kept"),
    [
        ({}, 0, 2),
        ({}, 1, 1),
        ({"split_batches": True}, 0, 1),
        ({"split_batches": True}, 1, 1),
        ({"even_batches": False}, 1, 2),
    ],
)
def test_repeated_rows_are_told_however_rows_are_shared_out(
    tmp_path, monkeypatch, config, index, kept
):
    """Of 7 rows in rounds of 4: 3 are left, which two processes have by twos, or by ones of two."""
    subject = trainer(tmp_path, per_device_eval_batch_size=2, accelerator_config=config)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(TrainingArguments, "process_index", index)
    left = 3 if "split_batches" not in config else 2
    state = types.SimpleNamespace(end_of_dataloader=True, remainder=left)
    monkeypatch.setattr(subject.accelerator, "gradient_state", state)
    assert subject._not_repeated(1 if "split_batches" in config else 2) == kept


def test_models_are_made_anew_with_a_head_and_a_reference(tmp_path):
    """As Trainer's model_init does for each training."""
    made = []

    def make() -> LlamaForCausalLM:
        made.append(tiny.model(initializer_range=0.3 + 0.1 * len(made)))
        return made[-1]

    args = trainer(tmp_path, max_steps=2).args
    options = {"train_dataset": ROWS, "eval_dataset": ROWS, "processing_class": tiny.tokenizer()}
    subject = PreferenceTrainer(None, args, loss=DPO(), model_init=make, **options)
    for number in (1, 2):
        assert len(made) == number and subject.model is made[-1]
        assert subject.evaluate()["eval_rewards/margins"] == 0 or number > 1
        subject.train()
        start = tiny.model(initializer_range=0.3 + 0.1 * number)
        assert torch.equal(parameters(subject.ref_model), parameters(start))
        expected = trainer(tmp_path, start, DPO(), max_steps=2)
        assert torch.equal(
            update(expected, start), parameters(made[-1]) - parameters(subject.ref_model)
        )


def test_what_is_logged_of_a_model_is_none_of_the_one_before(tmp_path):
    """A training may end between two logs."""
    args = trainer(tmp_path, max_steps=3, logging_steps=2, per_device_train_batch_size=2).args
    options = {"train_dataset": ROWS, "processing_class": tiny.tokenizer()}
    subject = PreferenceTrainer(
        None, args, loss=SimPO(), model_init=lambda: tiny.model(), **options
    )
    logged = []
    for _ in range(2):
        subject.train()
        logged.append([each for each in subject.state.log_history if "rewards/margins" in each])
    for first, second in zip(*logged, strict=True):
        assert first["rewards/margins"] == second["rewards/margins"]


def test_rows_that_are_made_as_they_are_asked_for_are_taken(tmp_path):
    """Their columns are others than those of the table they are made of."""

    def tokenised(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [ROWS[number] for number in batch["number"]]
        return {name: [row[name] for row in rows] for name in ROWS[0]}

    table = datasets.Dataset.from_dict({"number": list(range(7))})
    lazy, text = table.with_transform(tokenised), datasets.Dataset.from_list(tiny.text_rows(2))
    expected = trainer(tmp_path, max_steps=1).train().training_loss
    found = trainer(tmp_path, rows=lazy, max_steps=1).train().training_loss
    assert found == pytest.approx(expected, rel=1e-6)
    for rows in (text, text.to_iterable_dataset(), table):
        with pytest.raises(ValueError, match="train_dataset: expected rows with prompt_ids"):
            trainer(tmp_path, rows=rows, max_steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "model: expected a model, or None and model_init, got neither"),
        ({"model": tiny.model(), "model_init": tiny.model}, "and model_init, got both"),
        (
            {"model": "owner/name"},
            "model: expected a causal language model of transformers, got 'owner/name'; load it "
            "with transformers.AutoModelForCausalLM.from_pretrained",
        ),
        (
            {"model": tiny.model(), "ref_model": "owner/name", "loss": DPO()},
            "ref_model: expected a causal language model of transformers, got 'owner/name'",
        ),
        (
            {"model": tiny.model(), "train_dataset": tiny.text_rows(2)},
            "train_dataset: expected rows with prompt_ids, chosen_ids, rejected_ids, got prompt, "
            "chosen, rejected; make rows of text into such with fusedpo.trainers.rows.tokenize",
        ),
        (
            {"model": tiny.model(), "eval_dataset": {"a": ROWS, "b": tiny.text_rows(2)}},
            "eval_dataset: expected rows with prompt_ids",
        ),
        (
            {
                "model": tiny.model(),
                "train_dataset": datasets.Dataset.from_list(tiny.text_rows(2)),
            },
            "train_dataset: expected rows with prompt_ids",
        ),
        ({"model": tiny.model(), "train_dataset": [[1, 2]]}, "train_dataset: .* got list; make"),
        ({"model": tiny.model(), "train_dataset": []}, "^train_dataset: expected at least one row"),
        (
            {"model": tiny.model(), "eval_dataset": {"a": ROWS, "b": []}},
            "^eval_dataset: expected at least one row, got none; see what",
        ),
        (
            {"model": tiny.model(), "loss": KTO()},
            "^data_collator: expected one that makes batches of other rows .*, got none; for "
            "single responses take fusedpo.trainers.responses.ResponseTrainer",
        ),
        (
            {"model": tiny.model(), "loss": ShortToLong()},
            "^data_collator: .*, got none; see fusedpo.recipes.short_to_long.ShortToLongCollator",
        ),
    ],
)
def test_what_is_not_a_model_or_rows_of_tokens_is_refused(tmp_path, changes, message):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    options = {"loss": SimPO(), "processing_class": tiny.tokenizer(), "train_dataset": ROWS}
    with pytest.raises((TypeError, ValueError), match=message):
        PreferenceTrainer(args=args, **{**options, **changes})


def test_an_evaluation_of_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^eval_dataset: expected at least one row, got none"):
        trainer(tmp_path).evaluate([])


def test_tokens_that_the_model_has_no_row_for_are_refused(tmp_path):
    largest = max(int(max(row["prompt_ids"])) for row in ROWS)
    subject = trainer(tmp_path, tiny.model(vocab_size=largest))
    with pytest.raises(
        ValueError, match=rf"row \d of the batch: expected tokens in \[0, {largest}\)"
    ):
        subject.train()
    wide = {**ROWS[0], "long_prompt_ids": [1, largest]}
    for rows, collator in (
        (ROWS, PreferenceCollator(0)),
        ([wide], ShortToLongCollator(0)),
        ([], PreferenceCollator(largest)),
    ):
        model = tiny.model(vocab_size=largest)
        given = trainer(tmp_path, model, rows=rows or ROWS, data_collator=collator)
        with pytest.raises(ValueError, match=rf"expected tokens in \[0, {largest}\), of which"):
            given.data_collator(rows)
    with pytest.raises(ValueError, match="row 2 of the batch: expected rows with prompt_ids"):
        PreferenceCollator(0)([ROWS[0], {"prompt_ids": [1]}])
    assert padding_token(types.SimpleNamespace(pad_token_id=9, eos_token_id=2), 9) == 2
    assert padding_token(types.SimpleNamespace(pad_token_id=9, eos_token_id=9), 9) == 0


def test_one_number_to_divide_by_is_refused(tmp_path):
    """A loss needs the pairs of the step or their tokens, and Trainer's own count is neither."""
    subject = trainer(tmp_path)
    batch = subject.data_collator(ROWS)
    with pytest.raises(TypeError) as error:
        subject.compute_loss(subject.model, batch, num_items_in_batch=7)
    assert str(error.value) == (
        "num_items_in_batch: expected [2], pairs and chosen tokens of the step, or None, got an int"
    )


def test_several_devices_of_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError) as error:
        trainer(tmp_path)
    assert str(error.value) == (
        "devices: expected one device a process, as DataParallel would split the pairs, "
        "got 2 devices; start with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES"
    )


def test_a_trainer_that_is_built_on_says_what_it_lacks(tmp_path):
    """Which loss it takes, and how it is called, is its subclass's."""
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError) as error:
        FusedTrainer(tiny.model(), args, loss="simpo")
    assert str(error.value) == (
        "loss: expected a loss, such as fusedpo.losses.SimPO(), got 'simpo'"
    )
    model = tiny.model()
    subject = FusedTrainer(model, args, loss=SimPO())
    batch = PreferenceCollator(0)(ROWS)
    for lacking in (subject.compute_loss, lambda model, batch: subject._examples(batch)):
        with pytest.raises(NotImplementedError):
            lacking(model, batch)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"pad_token_id": 3, "eos_token_id": 2}, 3),
        ({"pad_token_id": 0, "eos_token_id": 2}, 0),
        ({"pad_token_id": None, "eos_token_id": 2}, 2),
        ({"pad_token_id": None, "eos_token_id": None}, 0),
        ({}, 0),
    ],
)
def test_what_pads_is_masked_so_any_token_will_do(ids, expected):
    assert padding_token(types.SimpleNamespace(**ids)) == expected
