"""The losses of this library in TRL's trainers: TRL's own numbers where TRL has the loss, and the
loss of the very batch where it has not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

pytest.importorskip("trl")

import peft
import trl.trainer.utils
from oracles import relative
from trainers import trl_runs
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from fusedpo import losses, policy_loss, preference_loss
from fusedpo.model_head import add_fused_head, aligned_labels, hidden_and_head
from fusedpo.trainers.trl import (
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedGRPOConfig,
    FusedGRPOTrainer,
)
from fusedpo.trainers.trl.collator import Collator

COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "disable_tqdm": True,
}
ROWS = tiny.text_rows(12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """TRL loads its reference from where the model came from."""
    folder = tiny.save(tmp_path_factory.mktemp("model"))
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    timed = ("runtime", "per_second", "time")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in timed)}
        for entry in trainer.state.log_history
    ]


def pairs(model: Any, folder: Path, trainer: Any, config: Any, rows: Any = ROWS, **options: Any):
    torch.manual_seed(0)
    return trainer(
        model=model,
        args=config(str(folder), **COMMON, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )


def letters(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 5) for text in completions]


def groups(model: Any, folder: Path, trainer: Any, config: Any, **options: Any):
    torch.manual_seed(0)
    settings = {
        "num_generations": 4,
        "num_iterations": 2,
        "temperature": 0.7,
        "max_completion_length": 8,
        **options,
    }
    return trainer(
        model=model,
        args=config(str(folder), **COMMON, **settings),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tiny.tokenizer(),
        reward_funcs=letters,
    )


def same(ours: list[dict[str, float]], theirs: list[dict[str, float]], bound: float = 2e-5) -> bool:
    """Whether all that both log agrees, but for what equal policies make a toss-up."""
    for own, other in zip(ours, theirs, strict=True):
        for name in own.keys() & other.keys() - {"rewards/accuracies"}:
            if abs(own[name] - other[name]) > bound * max(1.0, abs(other[name])):
                return False
    return True


@pytest.mark.holds(45)
@pytest.mark.parametrize(
    ("loss", "hyperparameters", "theirs"),
    [
        ("dpo", {"beta": 0.3}, {"beta": 0.3}),
        ("ipo", '{"beta": 0.3}', {"beta": 0.3, "loss_type": ["ipo"]}),
        ("hinge", {"beta": 0.3}, {"beta": 0.3, "loss_type": ["hinge"]}),
        ("dpo", None, {"gradient_accumulation_steps": 2}),
        ("dpo", None, {"precompute_ref_log_probs": True}),
    ],
)
def test_pairs_equal_trl_where_it_has_the_loss(
    model, tmp_path, loss: str, hyperparameters: Any, theirs: dict[str, Any]
) -> None:
    shared = {k: v for k, v in theirs.items() if k not in ("beta", "loss_type")}
    named = {"fused_loss": loss, "fused_loss_args": hyperparameters, **shared}
    plain = history(pairs(model(), tmp_path, DPOTrainer, DPOConfig, **theirs))
    found = history(pairs(model(), tmp_path, FusedDPOTrainer, FusedDPOConfig, **named))
    assert same(found, plain)
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "num_tokens"):
        assert name in found[0] and name in plain[0]
    halved = [{**entry, "loss": 0.9 * entry.get("loss", 1.0)} for entry in found]
    assert not same(halved, plain)


@pytest.mark.holds(45)
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("grpo", {"beta": 0.04, "gradient_accumulation_steps": 2}),
        ("grpo", {"beta": 0.04, "use_bias_correction_kl": False}),
        ("dapo", {"gradient_accumulation_steps": 2}),
        ("dr_grpo", {}),
        ("cispo", {"epsilon_high": 5.0}),
    ],
)
def test_groups_equal_trl_where_it_has_the_loss(
    model, tmp_path, loss: str, options: dict[str, Any]
) -> None:
    theirs = {"loss_type": loss, **options}
    plain = history(groups(model(), tmp_path, GRPOTrainer, GRPOConfig, **theirs))
    given: dict[str, Any] = {}
    if loss == "dr_grpo":
        given = {"max_completion_length": 8}
    if loss == "cispo":
        given = {"epsilon_high": 5.0}
    if loss == "dapo":
        given = {"epsilon_high": 0.2}
    shared = {k: v for k, v in options.items() if k != "epsilon_high"}
    named = {**shared, "fused_loss": loss, "fused_loss_args": given}
    found = history(groups(model(), tmp_path, FusedGRPOTrainer, FusedGRPOConfig, **named))
    assert same(found, plain)
    assert "entropy" in found[0]
    assert any(entry.get("reward_std", 0) > 0 for entry in found)


def recorded(trainer: Any) -> list[tuple[dict[str, Any], float]]:
    """Every batch of a training run and its loss; the model does not move."""
    seen: list[tuple[dict[str, Any], float]] = []
    inner = trainer._compute_loss

    def noting(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        loss = inner(model, inputs, *rest)
        seen.append((inputs, float(loss)))
        return loss

    trainer._compute_loss = noting
    trainer.args.learning_rate = 0.0
    trainer.train()
    return seen


def expected_of_pairs(model: Any, loss: Any, batch: dict[str, Any], reference: Any) -> float:
    of_model = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = aligned_labels(batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100))
    extra = {name: batch[name] for name in loss.inputs if name in batch}
    with torch.no_grad():
        hidden, head = hidden_and_head(model, **of_model)
        if loss.needs_reference:
            states, own = hidden_and_head(reference, **of_model)
            extra |= {"ref_hidden": states, "ref_weight": own.weight}
        return float(preference_loss(loss, hidden, head.weight, labels, **extra).loss)


COLUMNS = {
    "sppo": {"win_rate_chosen": 0.9, "win_rate_rejected": 0.2},
    "s-sppo": {"win_rate_chosen": 0.9, "win_rate_rejected": 0.2, "similarity": 0.6},
    "simpo": {},
    "solopo": {},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_other_losses_are_those_of_the_batch(model, tmp_path, name: str) -> None:
    rows = []
    for i, row in enumerate(ROWS):
        numbers = {column: value - 0.01 * i for column, value in COLUMNS[name].items()}
        rows.append({**row, **numbers, "long_prompt": "red cat sun " + row["prompt"]})
    policy, reference = model(), tiny.model(seed=1)
    options = {"fused_loss": name}
    torch.manual_seed(0)
    loss = losses.get(name)
    subject = FusedDPOTrainer(
        model=policy,
        ref_model=reference if loss.needs_reference else None,
        args=FusedDPOConfig(str(tmp_path), **COMMON, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    assert loss.needs_reference or subject.ref_model is None
    seen = recorded(subject)
    assert len(seen) == 3
    for batch, found in seen:
        assert batch["input_ids"].shape[0] == (12 if name == "solopo" else 8)
        for column in COLUMNS[name]:
            assert batch[column].shape == (4,)
        assert found == pytest.approx(expected_of_pairs(policy, loss, batch, reference), rel=1e-5)
    if name == "solopo":
        assert "gap" in " ".join(subject.state.log_history[0])


@pytest.mark.parametrize("loss", ["solopo", "dpo"])
def test_length_groups_are_the_padded_batch(model, tmp_path, loss: str) -> None:
    """In float64, on prompts of very unequal lengths; of a reference too."""
    rows = [
        {**row, "prompt": "cat " * (12 * (i % 2)) + row["prompt"], "long_prompt": "sun " * 15}
        for i, row in enumerate(ROWS[:4])
    ]
    outcomes = []
    for grouped in (False, None if loss == "solopo" else True):
        subject = pairs(
            model().double(),
            tmp_path,
            FusedDPOTrainer,
            FusedDPOConfig,
            rows,
            fused_loss=loss,
            length_groups=grouped,
        )
        if subject.ref_model is not None:
            subject.ref_model = tiny.model(seed=1).double()
            add_fused_head(subject.ref_model)
        widths: list[int] = []
        policy = subject.model.train()
        batch = next(iter(subject.get_train_dataloader()))
        subject.compute_loss(policy, dict(batch))
        policy.get_input_embeddings().register_forward_hook(
            lambda module, args, output, seen=widths: seen.append(args[0].numel())
        )
        value = subject.compute_loss(policy, dict(batch))
        value.backward()
        gradient = policy.lm_head.weight.grad
        outcomes.append((value.detach(), gradient, sum(widths)))
    (expected, whole, padded), (found, own, tokens) = outcomes
    assert abs(found / expected - 1) < 1e-12 and whole.any()
    assert relative(own, whole) < 1e-9
    real = int(batch["attention_mask"].sum())
    assert real <= tokens <= 1.1 * real < padded


def test_length_groups_of_trls_own_losses_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^length_groups: expected None or False without fused_"):
        FusedDPOConfig(str(tmp_path), **COMMON, length_groups=True)


def test_soft_sequences_are_those_of_the_batch(model, tmp_path) -> None:
    """SSPO, on samples of an earlier policy."""
    policy = model()
    options = {"fused_loss": "sspo", "fused_loss_args": {"tau_neg": 1.2}}
    subject = groups(policy, tmp_path, FusedGRPOTrainer, FusedGRPOConfig, **options)
    for inputs, found in recorded(subject):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        before = inputs["prompt_ids"].shape[1]
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :before] = -100
        with torch.no_grad():
            hidden, head = hidden_and_head(policy, input_ids=ids, attention_mask=mask)
            old = inputs.get("old_per_token_logps")
            if old is not None:
                old = torch.nn.functional.pad(old, (before - 1, 1))
            loss = policy_loss(
                losses.get("sspo", tau_neg=1.2),
                hidden,
                head.weight,
                labels,
                shift=True,
                advantages=inputs["advantages"],
                old_logprobs=old,
                temperature=0.7,
            ).loss
        assert found == pytest.approx(float(loss), rel=1e-4, abs=1e-6)


def test_the_model_writes_its_own_rejected_responses(model, tmp_path) -> None:
    rows = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in ROWS]
    settings = {"segment_length": 4, "ref_every": 3}
    options = {"self_augmented": True, "beta": 0.5, "self_augmented_args": settings}
    subject = pairs(model(), tmp_path, FusedDPOTrainer, FusedDPOConfig, rows, **options)
    found = history(subject)
    assert "buffer/reuse" in found[0] and subject.fused_loss == losses.DPO(beta=0.5)
    source = subject.train_dataset.source
    assert source.average.updates == 3
    for own, average in zip(
        subject.ref_model.parameters(), source.average.module.parameters(), strict=True
    ):
        assert torch.equal(own, average)


@pytest.mark.parametrize(
    ("make", "theirs", "ours"),
    [
        (pairs, (DPOTrainer, DPOConfig), (FusedDPOTrainer, FusedDPOConfig)),
        (groups, (GRPOTrainer, GRPOConfig), (FusedGRPOTrainer, FusedGRPOConfig)),
    ],
)
def test_without_a_name_the_trainer_is_trls(model, tmp_path, make, theirs, ours) -> None:
    plain = history(make(model(), tmp_path, *theirs))
    found = history(make(model(), tmp_path, *ours))
    assert same(found, plain)
    assert found[0].keys() == plain[0].keys()


TOLERANT = {"gradient_tolerance": 2e-3}


@pytest.mark.parametrize(
    ("make", "trainer", "config", "options", "text"),
    [
        (pairs, DPOTrainer, FusedDPOConfig, {"fused_loss": "simpo"}, "simpo, of FusedDPOT"),
        (pairs, DPOTrainer, FusedDPOConfig, {"self_augmented": True}, "self_augmented, of FusedD"),
        (groups, GRPOTrainer, FusedGRPOConfig, {"fused_loss": "gspo"}, "gspo, of FusedGRPOT"),
        (pairs, DPOTrainer, FusedDPOConfig, TOLERANT, "sigmoid with gradient_tolerance, of FusedD"),
        (
            *(pairs, DPOTrainer, FusedDPOConfig, {**TOLERANT, "loss_type": "ipo"}),
            "ipo with gradient_tolerance, of FusedD",
        ),
        (groups, GRPOTrainer, FusedGRPOConfig, TOLERANT, "dapo with gradient_tolerance, of FusedG"),
    ],
)
def test_trls_own_trainers_refuse_a_loss_by_name(
    model, tmp_path, make, trainer, config, options, text
) -> None:
    """They know nothing of it, and would train with another."""
    subject = make(model(), tmp_path, trainer, config, **options)
    with pytest.raises(ValueError, match=f"Unknown loss type: {text}"):
        subject.train()
    given = {} if make is pairs else {"num_generations": 4}
    given["loss_type"] = subject.args.loss_type
    again = config(str(tmp_path), **COMMON, **{**options, **given})
    assert again.the_loss() == subject.args.the_loss()
    assert again.loss_type == subject.args.loss_type


@pytest.mark.parametrize(("make", "config"), [(pairs, FusedDPOConfig), (groups, FusedGRPOConfig)])
def test_a_trainer_of_this_library_has_trls_loss_within_the_tolerance(
    model, tmp_path, make, config
) -> None:
    cls = FusedDPOTrainer if make is pairs else FusedGRPOTrainer
    exact = make(model(), tmp_path, cls, config)
    subject = make(model(), tmp_path, cls, config, **TOLERANT)
    assert subject.args.loss_type == exact.args.loss_type
    assert subject.args.gradient_tolerance == 2e-3 and exact.args.gradient_tolerance == 0.0
    found, plain = (history(each) for each in (subject, exact))
    assert found[0]["loss"] == plain[0]["loss"]


def test_configurations_are_parsed_from_the_command_line() -> None:
    words = ["--output_dir", "x", "--fused_loss", "simpo", "--fused_loss_args"]
    (config,) = HfArgumentParser(FusedDPOConfig).parse_args_into_dataclasses(
        [*words, json.dumps({"beta": 2.5}), "--use_cpu", "--bf16", "False"]
    )
    assert config.the_loss() == losses.SimPO(beta=2.5)
    (config,) = HfArgumentParser(FusedGRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "x", "--fused_loss", "gspo", "--use_cpu", "--bf16", "False"]
    )
    assert config.the_loss() == losses.GSPO()


@pytest.mark.parametrize(
    ("config", "options", "error", "text"),
    [
        (FusedDPOConfig, {"fused_loss": "grpo"}, ValueError, "a loss of pairs.*FusedGRPOConfig"),
        (FusedDPOConfig, {"fused_loss": "kto"}, ValueError, "a loss of pairs.*FusedKTOTrainer"),
        (FusedDPOConfig, {"fused_loss": "simpoo"}, ValueError, "loss: expected one of"),
        (FusedDPOConfig, {"fused_loss_args": {}, "fused_loss": 3}, ValueError, "loss"),
        (FusedDPOConfig, {"fused_loss_args": {"beta": 1}}, ValueError, "fused_loss: expected"),
        (
            FusedDPOConfig,
            {"fused_loss": "dpo", "fused_loss_args": "{"},
            ValueError,
            "fused_loss_args: expected valid JSON",
        ),
        (FusedGRPOConfig, {"fused_loss": "dpo"}, ValueError, "a policy loss"),
        (
            FusedGRPOConfig,
            {"fused_loss": "sspo", "top_entropy_quantile": 0.2},
            ValueError,
            "top_entropy_quantile: expected 1.0",
        ),
    ],
)
def test_wrong_names_are_refused(tmp_path, config, options, error, text) -> None:
    with pytest.raises(error, match=text):
        config(str(tmp_path), **{**COMMON, "per_device_train_batch_size": 8}, **options)


def test_a_missing_column_is_named(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="a column 'long_prompt'"):
        pairs(model(), tmp_path, FusedDPOTrainer, FusedDPOConfig, fused_loss="solopo")


# of TRL's formulas, each with a value that TRL takes
OF_DPO = {
    "loss_type": ["ipo"],
    "loss_weights": [0.5],
    "beta": 0.5,
    "label_smoothing": 0.1,
    "discopop_tau": 0.5,
    "ld_alpha": 0.3,
    "use_weighting": True,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.7,
}
OF_GRPO = {
    "loss_type": "grpo",
    "epsilon": 0.5,
    "epsilon_high": 0.9,
    "delta": 2.0,
    "importance_sampling_level": "sequence",
    "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "top_entropy_quantile": 0.2,
    "off_policy_mask_threshold": 0.5,
    "entropy_coef": 0.1,
    "use_adaptive_entropy": True,
    "entropy_coef_min": 0.1,
    "entropy_coef_max": 0.9,
    "entropy_coef_delta": 0.1,
    "entropy_target": 0.3,
}
# of the models, the data, the samples, the reference, and the KL term, which do what they do in TRL
OF_ALL = """model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout
pad_to_multiple_of sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"""
BESIDE_DPO = """dataset_num_proc max_length truncation_mode padding_free precompute_ref_log_probs
precompute_ref_batch_size activation_offloading pad_token"""
BESIDE_GRPO = """beta use_bias_correction_kl num_iterations cast_lm_head_to_fp32 num_generations
num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset
generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs
chat_template_kwargs repetition_penalty cache_implementation reward_weights scale_rewards
multi_objective_aggregation mask_truncated_completions max_tool_calling_iterations log_completions
log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
use_transformers_continuous_batching transformers_continuous_batching_config
use_transformers_paged"""


@pytest.mark.parametrize(
    ("theirs", "of_formulas", "beside"),
    [(DPOConfig, OF_DPO, BESIDE_DPO), (GRPOConfig, OF_GRPO, BESIDE_GRPO)],
)
def test_every_option_of_trl_is_known(theirs, of_formulas, beside) -> None:
    """A new one is of a formula, and then refused, or not."""
    of_training = {f.name for f in fields(TrainingArguments)}
    own = {f.name for f in fields(theirs)} - of_training - set(of_formulas)
    own = {name for name in own if not name.startswith(("use_vllm", "vllm_"))}
    assert own <= {*OF_ALL.split(), *beside.split()}


def refused(tmp_path: Path, config: Any, name: str, remedy: str, options: dict[str, Any]) -> None:
    settings = {**COMMON, "per_device_train_batch_size": 8}
    with pytest.raises(ValueError, match=f"^{name}: expected .* with this fused_loss.*; {remedy}"):
        config(str(tmp_path), **settings, **options)


@pytest.mark.parametrize("name", OF_DPO)
def test_options_of_trls_own_formulas_of_pairs_are_refused(tmp_path, name: str) -> None:
    given = {name: OF_DPO[name]}
    for loss in ({"fused_loss": "dpo"}, {"self_augmented": True, "fused_loss": "simpo"}):
        refused(tmp_path, FusedDPOConfig, name, "use fused_loss_args", {**loss, **given})
    taken = FusedDPOConfig(str(tmp_path), **COMMON, **given)
    assert getattr(taken, name) == OF_DPO[name]


@pytest.mark.parametrize("name", OF_GRPO)
def test_options_of_trls_own_policy_losses_are_refused(tmp_path, name: str) -> None:
    settings = {**COMMON, "per_device_train_batch_size": 8}
    if name not in {f.name for f in fields(GRPOConfig)}:
        pytest.skip("this TRL has no such option")
    given = {name: OF_GRPO[name]}
    options = {"fused_loss": "grpo", **given}
    refused(tmp_path, FusedGRPOConfig, name, "use fused_loss_args", options)
    taken = FusedGRPOConfig(str(tmp_path), **settings, **given)
    assert getattr(taken, name) == OF_GRPO[name]


@pytest.mark.parametrize(
    ("config", "options", "name"),
    [
        (
            FusedDPOConfig,
            {"fused_loss": "simpo", "precompute_ref_log_probs": True},
            "precompute_ref_log_probs",
        ),
        (
            FusedDPOConfig,
            {"self_augmented": True, "precompute_ref_log_probs": True},
            "precompute_ref_log_probs",
        ),
        (FusedDPOConfig, {"fused_loss": "simpo", "sync_ref_model": True}, "sync_ref_model"),
        (FusedDPOConfig, {"self_augmented": True, "sync_ref_model": True}, "sync_ref_model"),
        (
            FusedGRPOConfig,
            {
                "fused_loss": "grpo",
                "beta": 0.04,
                "fused_loss_args": {"kl_estimator": "k2"},
                "use_bias_correction_kl": False,
            },
            "use_bias_correction_kl",
        ),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, config, options, name) -> None:
    refused(tmp_path, config, name, "", options)


def test_arguments_of_the_loss_stay_with_a_model_that_writes(tmp_path) -> None:
    def config(**options: Any) -> FusedDPOConfig:
        return FusedDPOConfig(str(tmp_path), **COMMON, self_augmented=True, **options)

    smooth = {"label_smoothing": 0.1}
    found = config(fused_loss_args=smooth)
    assert found.the_loss() == losses.DPO(beta=0.1, label_smoothing=0.1)
    found = config(fused_loss_args=json.dumps(smooth), beta=0.5)
    assert found.the_loss() == losses.DPO(beta=0.5, label_smoothing=0.1)
    assert replace(found).the_loss() == found.the_loss()
    assert config(fused_loss_args={"beta": 0.3}).the_loss() == losses.DPO(beta=0.3)
    twice = {"self_augmented": True, "fused_loss_args": {"beta": 0.3}, "beta": 0.5}
    refused(tmp_path, FusedDPOConfig, "beta", "use fused_loss_args", twice)


def test_a_loss_is_named_and_not_given(tmp_path) -> None:
    message = r"^fused_loss: expected the name of a loss, as text, got SimPO\(.*; its hyperparam"
    with pytest.raises(ValueError, match=message):
        FusedDPOConfig(str(tmp_path), **COMMON, fused_loss=losses.SimPO())
    with pytest.raises(ValueError, match=r"^fused_loss: expected one of .* did you mean 'simpo'"):
        FusedDPOConfig(str(tmp_path), **COMMON, fused_loss="simop")


def test_settings_of_a_model_that_writes_need_one(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"self_augmented_args: expected None.*segment_length"):
        FusedDPOConfig(str(tmp_path), **COMMON, self_augmented_args={"segment_length": 4})
    with pytest.raises(ValueError, match=r"self_augmented_args: .* got 'segment'; did you mean '"):
        FusedDPOConfig(
            str(tmp_path), **COMMON, self_augmented=True, self_augmented_args={"segment": 4}
        )


def test_settings_of_a_reference_need_one_that_can_be_renewed(model, tmp_path) -> None:
    options = {"self_augmented": True, "self_augmented_args": {"ref_every": 5}}
    with pytest.raises(ValueError, match="ref_every: expected 108 without a reference"):
        FusedDPOConfig(str(tmp_path), **COMMON, fused_loss="simpo", **options)

    def trained(settings: Any) -> Any:
        return FusedDPOTrainer(
            model=model(),
            args=FusedDPOConfig(
                str(tmp_path), **COMMON, self_augmented=True, self_augmented_args=settings
            ),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tiny.tokenizer(),
            peft_config=lora(),
        )

    with pytest.raises(ValueError, match="ref_mode: expected 'fixed' for a reference that is the"):
        trained(None)
    history(trained({"ref_mode": "fixed", "segment_length": 4}))


def test_the_kl_estimator_is_trls_wherever_its_weight_stands(tmp_path) -> None:
    settings = {**COMMON, "per_device_train_batch_size": 8, "fused_loss": "grpo", "beta": 0.04}
    for given in (None, {"kl_weight": 0.04}):
        for corrected, estimator in ((True, "k3_corrected"), (False, "k3")):
            config = FusedGRPOConfig(
                str(tmp_path),
                **settings,
                fused_loss_args=given,
                use_bias_correction_kl=corrected,
            )
            assert config.the_loss() == losses.GRPO(kl_weight=0.04, kl_estimator=estimator)


def test_a_kl_estimator_of_ones_own_stays(tmp_path) -> None:
    settings = {**COMMON, "per_device_train_batch_size": 8}
    named = {"fused_loss": "grpo", "beta": 0.04}
    config = FusedGRPOConfig(
        str(tmp_path), **settings, **named, fused_loss_args={"kl_estimator": "k2"}
    )
    assert config.the_loss() == losses.GRPO(kl_weight=0.04, kl_estimator="k2")


def test_no_reference_is_loaded_where_none_is_needed(tmp_path) -> None:
    """TRL would look for the folder that the model came from; this one came from none."""
    subject = pairs(tiny.model(), tmp_path, FusedDPOTrainer, FusedDPOConfig, fused_loss="simpo")
    assert subject.ref_model is None
    assert history(subject)[0]["loss"] > 0


def test_long_prompts_that_do_not_fit_are_left_out_with_their_rows(model, tmp_path) -> None:
    rows = [
        {**row, "long_prompt": "sun " * (60 if i == 1 else 2) + row["prompt"]}
        for i, row in enumerate(ROWS)
    ]
    options = {"fused_loss": "solopo", "max_length": 32}
    subject = pairs(model(), tmp_path, FusedDPOTrainer, FusedDPOConfig, rows, **options)
    data = subject.train_dataset
    assert len(data) == len(ROWS) - 1
    tokenizer = tiny.tokenizer()
    for row in data:
        short, longer = row["prompt_ids"], row["long_prompt_ids"]
        assert len(longer) > len(short)
        text, whole = (tokenizer.decode(i, skip_special_tokens=True) for i in (short, longer))
        assert whole == f"sun sun {text}"


def test_streams(model, tmp_path) -> None:
    rows = [{**row, "win_rate_chosen": 0.8} for row in ROWS]
    stream = Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row)
    assert stream.column_names is None

    def trainer(name: str) -> Any:
        return FusedDPOTrainer(
            model=model(),
            args=FusedDPOConfig(str(tmp_path), **COMMON, fused_loss=name),
            train_dataset=stream,
            processing_class=tiny.tokenizer(),
        )

    assert len(history(trainer("sppo"))) == 4
    with pytest.raises(ValueError, match="a column 'long_prompt'"):
        trainer("solopo")


def test_completions_of_one_token(model, tmp_path) -> None:
    options = {"max_completion_length": 1, "beta": 0.04}
    plain = groups(model(), tmp_path, GRPOTrainer, GRPOConfig, loss_type="grpo", **options)
    ours = groups(
        model(), tmp_path, FusedGRPOTrainer, FusedGRPOConfig, fused_loss="grpo", **options
    )
    assert same(history(ours), history(plain))


def test_prediction_has_no_logits(model, tmp_path) -> None:
    subject = pairs(model(), tmp_path, FusedDPOTrainer, FusedDPOConfig, fused_loss="simpo")
    found = subject.predict(subject.train_dataset)
    assert found.predictions is None and found.metrics["test_loss"] > 0


# mixtures of experts


def experts() -> Any:
    made = trl_runs.model("mixtral")
    # the trainers ask for what the auxiliary loss needs in the calls whose loss has it
    made.config.output_router_logits = False
    return made


def auxiliary(batch: dict[str, Any]) -> float:
    """Of a batch of pairs, the auxiliary loss that the model itself makes."""
    of_model = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return float(experts()(**of_model, output_router_logits=True).aux_loss)


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_the_auxiliary_loss_of_experts_is_added_to_that_of_pairs(tmp_path, weight: float) -> None:
    options = {"fused_loss": "simpo", "router_aux_loss_coef": weight}
    subject = pairs(experts(), tmp_path, FusedDPOTrainer, FusedDPOConfig, **options)
    seen = recorded(subject)
    assert len(seen) == 3
    for (batch, found), logged in zip(seen, subject.state.log_history, strict=False):
        alone = expected_of_pairs(experts(), losses.SimPO(), batch, None)
        added = weight * auxiliary(batch)
        assert found == pytest.approx(alone + added, rel=1e-5)
        assert logged["loss"] == pytest.approx(alone + added, rel=1e-4)
        if weight:
            assert added > 0.1 and logged["aux_loss"] == pytest.approx(auxiliary(batch), rel=1e-5)
        else:
            assert "aux_loss" not in logged


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_experts_are_trained_as_by_trl(tmp_path, method: str) -> None:
    shared = {"router_aux_loss_coef": 0.3, "gradient_accumulation_steps": 2}
    named = {"fused_loss": method, **shared}
    if method == "dpo":
        theirs = history(pairs(experts(), tmp_path, DPOTrainer, DPOConfig, **shared))
        ours = history(pairs(experts(), tmp_path, FusedDPOTrainer, FusedDPOConfig, **named))
    else:
        plain = {"loss_type": "grpo", **shared}
        theirs = history(groups(experts(), tmp_path, GRPOTrainer, GRPOConfig, **plain))
        ours = history(groups(experts(), tmp_path, FusedGRPOTrainer, FusedGRPOConfig, **named))
    assert same(ours, theirs)
    for own, other in zip(ours[:3], theirs[:3], strict=True):
        assert own["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-5)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


# adapters


def lora() -> peft.LoraConfig:
    """Adapters that do something from the start: else policy and reference would be the same."""
    return peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False
    )


def virtual_tokens() -> peft.PromptTuningConfig:
    """In front of every prompt."""
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


@pytest.mark.parametrize("adapter", [lora, virtual_tokens])
def test_the_reference_of_an_adapted_policy_is_its_base_model(model, tmp_path, adapter) -> None:
    def trained(trainer: Any, config: Any, ref_model: Any = None, **options: Any) -> Any:
        torch.manual_seed(0)
        subject = trainer(
            model=model(),
            ref_model=ref_model,
            args=config(str(tmp_path), **COMMON, **options),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tiny.tokenizer(),
            peft_config=adapter(),
        )
        assert subject.ref_model is ref_model
        return history(subject)

    found = trained(FusedDPOTrainer, FusedDPOConfig, fused_loss="dpo")
    assert same(found, trained(FusedDPOTrainer, FusedDPOConfig, model(), fused_loss="dpo"))
    assert same(found, trained(DPOTrainer, DPOConfig))
    assert abs(found[0]["rewards/chosen"]) > 1e-3
    other = trained(FusedDPOTrainer, FusedDPOConfig, tiny.model(seed=1), fused_loss="dpo")
    assert not same(found, other)


@pytest.mark.parametrize("adapter", [lora, virtual_tokens])
def test_the_reference_of_adapters_trained_before_is_a_copy_of_them(
    model, tmp_path, adapter
) -> None:
    def adapted() -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model(), adapter())

    plain = pairs(adapted(), tmp_path, DPOTrainer, DPOConfig)
    found = pairs(adapted(), tmp_path, FusedDPOTrainer, FusedDPOConfig, fused_loss="dpo")
    ours = history(found)
    assert same(ours, history(plain))
    assert ours[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert abs(ours[2]["rewards/chosen"]) > 1e-3


@pytest.mark.parametrize("adapter", [lora, virtual_tokens])
def test_groups_of_an_adapted_policy_equal_trl(model, tmp_path, adapter) -> None:
    def adapted() -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model(), adapter())

    plain = {"loss_type": "grpo", "beta": 0.04}
    theirs = history(groups(adapted(), tmp_path, GRPOTrainer, GRPOConfig, **plain))
    named = {"fused_loss": "grpo", "beta": 0.04}
    ours = history(groups(adapted(), tmp_path, FusedGRPOTrainer, FusedGRPOConfig, **named))
    assert same(ours, theirs)
    for own, other in zip(ours[:3], theirs[:3], strict=True):
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


# evaluation, and what samples bring with them


def evaluated(trainer: Any, config: Any, source: Any, folder: Path, **options: Any) -> Any:
    subject = groups(source, folder, trainer, config, **options)
    subject.eval_dataset = subject.train_dataset.select(range(4))
    found = history(subject)
    torch.manual_seed(2)
    metrics = subject.evaluate()
    return found, {name: metrics[name] for name in ("eval_loss", "eval_entropy", "eval_reward")}


@pytest.mark.parametrize(
    ("loss", "theirs", "hyperparameters"),
    [
        ("grpo", {"entropy_coef": 0.3}, {"entropy_bonus": 0.3}),
        ("dapo", {"entropy_coef": 0.3}, {"entropy_bonus": 0.3, "epsilon_high": 0.2}),
        ("dapo", {}, {"epsilon_high": 0.2}),
    ],
)
def test_groups_are_evaluated_as_by_trl(model, tmp_path, loss, theirs, hyperparameters) -> None:
    shared = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4, "beta": 0.04}
    named = {"fused_loss": loss, "fused_loss_args": hyperparameters}
    plain, expected = evaluated(
        GRPOTrainer, GRPOConfig, model(), tmp_path, loss_type=loss, **shared, **theirs
    )
    found, metrics = evaluated(
        FusedGRPOTrainer, FusedGRPOConfig, model(), tmp_path, **shared, **named
    )
    assert same(found, plain)
    for own, other in zip(found[:3], plain[:3], strict=True):
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_pairs_are_evaluated_on_columns_of_their_own(model, tmp_path) -> None:
    rows = [{**row, "win_rate_chosen": 0.9 - 0.02 * i} for i, row in enumerate(ROWS)]
    options = {"fused_loss": "sppo", "fused_loss_args": {"beta": 0.1}}
    policy = model()
    subject = pairs(policy, tmp_path, FusedDPOTrainer, FusedDPOConfig, rows, **options)
    recorded(subject)
    seen = []
    inner = subject._compute_loss

    def noting(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        seen.append(inputs)
        return inner(model, inputs, *rest)

    subject._compute_loss = noting
    tokens = subject._total_train_tokens
    found = subject.evaluate(subject.train_dataset)
    assert [batch["win_rate_chosen"].numel() for batch in seen] == [8, 4]
    each = [expected_of_pairs(policy, losses.SPPO(beta=0.1), b, subject.ref_model) for b in seen]
    assert subject._signature_columns.count("win_rate_chosen") == 1
    # into a record of their own, and as no tokens of training
    assert {name for name in found if "margins" in name} == {"eval_rewards/margins"}
    assert not subject._metrics["train"] and subject._total_train_tokens == tokens
    assert found["eval_loss"] == pytest.approx((2 * each[0] + each[1]) / 3, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_means_of_tokens_are_those_of_the_step(model, tmp_path, accumulation: int) -> None:
    """DAPO divides by the tokens of a generation batch, which serves several steps."""
    shared = {"steps_per_generation": 4, "gradient_accumulation_steps": accumulation}
    named = {"fused_loss": "dapo", "fused_loss_args": {"epsilon_high": 0.2}}
    ours = groups(model(), tmp_path, FusedGRPOTrainer, FusedGRPOConfig, **named, **shared)
    theirs = groups(model(), tmp_path, GRPOTrainer, GRPOConfig, loss_type="dapo", **shared)
    batches = list(recorded(ours))
    theirs.current_gradient_accumulation_steps = ours.current_gradient_accumulation_steps
    assert ours.current_gradient_accumulation_steps == accumulation
    sizes = []
    for batch, _ in batches:
        for each in (ours, theirs):
            each.model.train()
        (own, gradient), (other, expected) = (of_the_batch(each, batch) for each in (ours, theirs))
        sizes.append(float(expected.norm()))
        assert own == pytest.approx(other, rel=1e-4, abs=1e-6)
        assert float((gradient - expected).norm()) <= 1e-4 * sizes[-1]
    assert max(sizes) > 0.01


def of_the_batch(subject: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Its loss, and the gradient of the head."""
    subject.model.zero_grad()
    value = subject._compute_loss(subject.model, batch)
    value.backward()
    return float(value.detach()), subject.model.lm_head.weight.grad


@pytest.mark.parametrize(
    ("loss", "level", "name", "per_token"),
    [
        ("grpo", "token", "importance_sampling_ratio", True),
        ("grpo", "token", "importance_sampling_ratio", False),
        ("gspo", "sequence", "importance_sampling_ratio", False),
        ("grpo", "token", "advantages", True),
        ("grpo", "token", "tool_mask", True),
        ("gspo", "sequence", "tool_mask", True),
    ],
)
def test_what_comes_with_samples_counts_as_in_trl(
    model, tmp_path, loss: str, level: str, name: str, per_token: bool
) -> None:
    """Ratios to the probabilities under vLLM, advantages of tokens, and what tools wrote."""
    clipped = {"epsilon_low": 0.2, "epsilon_high": 0.2} if loss == "gspo" else None
    named = {"fused_loss": loss, "fused_loss_args": clipped}
    ours = groups(model(), tmp_path, FusedGRPOTrainer, FusedGRPOConfig, **named)
    given = {"loss_type": "grpo", "importance_sampling_level": level}
    theirs = groups(model(), tmp_path, GRPOTrainer, GRPOConfig, **given)
    (batch, _), *_ = recorded(ours)
    theirs.current_gradient_accumulation_steps = ours.current_gradient_accumulation_steps
    _, without = of_the_batch(ours, batch)
    rows, tokens = batch["completion_ids"].shape
    torch.manual_seed(3)
    values = 0.5 + torch.rand(rows, tokens if per_token else 1)
    batch[name] = (values > 0.8).long() if name == "tool_mask" else values
    if name == "importance_sampling_ratio":
        ours.use_vllm = theirs.use_vllm = True
    (own, gradient), (other, expected) = (of_the_batch(each, batch) for each in (ours, theirs))
    assert own == pytest.approx(other, rel=1e-4, abs=1e-6)
    size = float(expected.norm())
    assert float((gradient - expected).norm()) < 1e-4 * size
    assert float((gradient - without).norm()) > 0.05 * size


# what is refused


def says(error: type[Exception], text: str) -> Any:
    """The whole message."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_metrics_of_logits_are_refused(model, tmp_path) -> None:
    text = "compute_metrics: expected None with fused_loss, as no logits are made, got one"
    given = {
        "args": FusedDPOConfig(str(tmp_path), **COMMON, fused_loss="simpo"),
        "train_dataset": Dataset.from_list(ROWS),
        "processing_class": tiny.tokenizer(),
    }
    with says(ValueError, text):
        FusedDPOTrainer(model(), compute_metrics=trl_runs.numbers, **given)
    in_order = (None, given["args"], None, given["train_dataset"], None, tiny.tokenizer())
    with says(ValueError, text):
        FusedDPOTrainer(model(), *in_order, trl_runs.numbers)
    (batch, _), *_ = recorded(subject := FusedDPOTrainer(model(), **given))
    text = "return_outputs: expected False with fused_loss, as no logits are made, got True"
    with says(ValueError, text):
        subject.compute_loss(subject.model, batch, return_outputs=True)


def test_images_in_prompts_are_refused(model, tmp_path) -> None:
    subject = groups(model(), tmp_path, FusedGRPOTrainer, FusedGRPOConfig, fused_loss="grpo")
    (batch, _), *_ = recorded(subject)
    got = repr(subject.args.the_loss())
    text = f"fused_loss: expected None with images in the prompts, got {got}; leave it out"
    with says(ValueError, text):
        subject._compute_loss(subject.model, {**batch, "num_images": [1, 1, 1, 1]})


def test_columns_that_the_loss_needs_are_asked_for(model, tmp_path) -> None:
    @dataclass(frozen=True)
    class Needing(losses.SimPO):
        inputs = MappingProxyType({"votes": losses.Input("how many voted for the chosen response")})

    class Config(FusedDPOConfig):
        def the_loss(self) -> Any:
            return Needing()

    with says(
        ValueError,
        "train dataset: expected a column 'votes': how many voted for the chosen response, got "
        "['prompt', 'chosen', 'rejected']",
    ):
        pairs(model(), tmp_path, FusedDPOTrainer, Config)
    rows = [{**row, "votes": 3} for row in ROWS]
    subject = pairs(model(), tmp_path, FusedDPOTrainer, Config, rows)
    assert "votes" in subject.train_dataset.column_names


def test_long_prompts_are_not_taken_from_a_stream(model, tmp_path) -> None:
    rows = [{**row, "long_prompt": "sun " + row["prompt"]} for row in ROWS]
    with says(TypeError, "train dataset: expected a datasets.Dataset, got IterableDataset"):
        FusedDPOTrainer(
            model=model(),
            args=FusedDPOConfig(str(tmp_path), **COMMON, fused_loss="solopo"),
            train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
            processing_class=tiny.tokenizer(),
        )


def test_long_rows_are_those_of_the_roles() -> None:
    """After the short ones: chosen alone, or chosen and rejected."""

    def plain(rows: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"] for row in rows])
        ids = torch.cat([ids, ids + 100])  # rejected
        masks = {name: torch.ones_like(ids) for name in ("attention_mask", "completion_mask")}
        return {"input_ids": ids, **masks}

    rows = [{"prompt_ids": [i], "long_prompt_ids": [i + 10], "chosen_ids": [7]} for i in (1, 2)]
    for roles, long in ((3, [11, 12]), (4, [11, 12, 111, 112])):
        batch = Collator(plain, (), roles)([{**row, "kl": 0.5} for row in rows])
        assert batch["input_ids"][:, 0].tolist() == [1, 2, 101, 102, *long]
    with pytest.raises(TypeError, match=r"^row 2 of the batch, w: expected a number"):
        Collator(plain, ("w",), 2)(
            [{**row, "w": w} for row, w in zip(rows, (1, None), strict=True)]
        )


@pytest.mark.parametrize("both", [False, True])
def test_responses_that_are_cut_after_the_long_prompt_only_are_refused(
    model, tmp_path, both: bool
) -> None:
    """Where a long prompt fits, but not the response after it."""
    rows = [
        {**row, "long_prompt": "sun " * (9 if i == 5 else 2) + row["prompt"]}
        for i, row in enumerate(ROWS)
    ]
    named = {"fused_loss": "solopo", "fused_loss_args": {"both": both}, "max_length": 18}
    subject = pairs(model(), tmp_path, FusedDPOTrainer, FusedDPOConfig, rows, **named)
    assert len(subject.train_dataset) == len(ROWS)
    lengths = [len(row["long_prompt_ids"] + row["chosen_ids"]) for row in subject.train_dataset]
    assert [length > 18 for length in lengths] == [i == 5 for i in range(len(ROWS))]
    with says(
        ValueError,
        "max_length: expected room for the whole response after the long prompt, got responses "
        "that are cut there and not after the short one; raise max_length, or shorten the long "
        "prompts",
    ):
        subject.train()


GROUPED = {**COMMON, "per_device_train_batch_size": 8}


def test_a_kl_weight_beside_another_beta_is_refused(tmp_path) -> None:
    given = {"fused_loss": "grpo", "fused_loss_args": {"kl_weight": 0.1}}
    for beta in (0.0, 0.04):
        expected = f"kl_weight: expected {beta}, as beta, by which TRL loads a reference"
        with says(ValueError, f"{expected}, got 0.1; set beta"):
            FusedGRPOConfig(str(tmp_path), **GROUPED, **given, beta=beta)
    assert FusedGRPOConfig(str(tmp_path), **GROUPED, **given, beta=0.1).the_loss().kl_weight == 0.1


def test_ratios_of_tokens_are_refused_for_losses_of_whole_responses(tmp_path) -> None:
    def config(loss: str, mode: str, **options: Any) -> FusedGRPOConfig:
        named = {"fused_loss": loss, "vllm_importance_sampling_mode": mode, "use_vllm": True}
        return FusedGRPOConfig(str(tmp_path), **{**GROUPED, **named, **options})

    for mode in ("token_truncate", "token_mask"):
        with says(
            ValueError,
            "vllm_importance_sampling_mode: expected sequence_truncate or sequence_mask, as the "
            f"loss has one ratio a response, got {mode}",
        ):
            config("gspo", mode)
        # of tokens, with the correction in its formula, and not corrected at all
        assert config("sapo", mode).the_loss() == losses.get("sapo")
        assert config("vespo", mode).the_loss() == losses.get("vespo")
        off = {"vllm_importance_sampling_correction": False}
        assert config("gspo", mode, **off).the_loss() == losses.GSPO()
    assert config("gspo", "sequence_mask").the_loss() == losses.GSPO()


@pytest.mark.parametrize("given", [[1], "[1]", "3"])
def test_hyperparameters_that_are_no_dictionary_are_refused(tmp_path, given: Any) -> None:
    got = repr(json.loads(given) if isinstance(given, str) else given)
    with says(TypeError, f"fused_loss_args: expected a dictionary, or one as JSON, got {got}"):
        FusedDPOConfig(str(tmp_path), **COMMON, fused_loss="dpo", fused_loss_args=given)


def test_a_model_that_writes_has_no_columns_for_the_loss(tmp_path) -> None:
    got = repr(losses.SPPO())
    expected = "a loss that takes no further columns, which self-augmented pairs lack"
    text = f"fused_loss: expected {expected}, got {got}; leave self_augmented out"
    with says(ValueError, text):
        FusedDPOConfig(str(tmp_path), **COMMON, self_augmented=True, fused_loss="sppo")


def test_names_are_refused_where_trl_has_no_seam_for_them(tmp_path, monkeypatch) -> None:
    monkeypatch.delattr(trl.trainer.utils, "add_fused_lm_head")
    with says(ValueError, "fused_loss: expected None with TRL before 1.15, got simpo; update TRL"):
        FusedDPOConfig(str(tmp_path), **COMMON, fused_loss="simpo")
    assert FusedDPOConfig(str(tmp_path), **COMMON).the_loss() is None


@pytest.mark.parametrize(
    ("make", "classes", "loss"),
    [
        (pairs, (FusedDPOTrainer, FusedDPOConfig), "simpo"),
        (groups, (FusedGRPOTrainer, FusedGRPOConfig), "sspo"),
    ],
    ids=["pairs", "groups"],
)
def test_a_gradient_tolerance_is_an_option_and_what_it_does_is_logged(
    model, tmp_path, make, classes, loss
) -> None:
    parts = ("columns_kept", "dropped_mass", "gradient_error", "breaches")
    options = {"fused_loss": loss, "gradient_tolerance": 2e-3}
    logged = history(make(model(), tmp_path, *classes, **options))
    steps = [entry for entry in logged if "loss" in entry]
    assert len(steps) == COMMON["max_steps"]
    assert all(f"head/{part}" in entry for entry in steps for part in parts)
    without = history(make(model(), tmp_path, *classes, fused_loss=loss))
    assert not any(name.startswith("head/") for entry in without for name in entry)


def test_a_trainers_gradient_tolerance_is_used_rather_than_its_configurations(
    model, tmp_path
) -> None:
    args = FusedDPOConfig(str(tmp_path), **COMMON, fused_loss="simpo", gradient_tolerance=1e-2)
    rows = Dataset.from_list(ROWS)
    given = {"train_dataset": rows, "processing_class": tiny.tokenizer(), "args": args}
    for options, expected in (({}, 1e-2), ({"gradient_tolerance": 0.0}, 0.0)):
        trainer = FusedDPOTrainer(model(), **given, **options)
        assert vars(trainer.model)["forward"].gradient_tolerance == expected


@pytest.mark.parametrize("config", [FusedDPOConfig, FusedGRPOConfig])
@pytest.mark.parametrize(("value", "error"), [(1e-6, ValueError), ("2e-3", TypeError)], ids=str)
def test_a_wrong_gradient_tolerance_is_refused_by_the_configuration(
    tmp_path, config, value, error
) -> None:
    with pytest.raises(error, match=r"^gradient_tolerance: expected"):
        config(str(tmp_path), **COMMON, gradient_tolerance=value)
