"""GroupTrainer: it samples, keeps its samples for a few updates, and raises the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import relative
from transformers import TrainerCallback, TrainingArguments

from fusedpo import linear_logprobs
from fusedpo.data.sampling import generate_segments
from fusedpo.engine.plan import BudgetTooSmall
from fusedpo.files import read_file
from fusedpo.losses import DAPO, DPO, GRPO, SoftSequence
from fusedpo.model_head import evaluating, hidden_and_head
from fusedpo.trainers.groups import GroupTrainer


def trainer(folder: Path, loss: Any = None, **options: Any) -> GroupTrainer:
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        **options.pop("args", {}),
    }
    rows = tiny.token_rows(24)
    defaults = {
        "train_dataset": rows,
        "eval_dataset": rows[:6],
        "processing_class": tiny.tokenizer(),
        "group_size": 4,
        "max_new_tokens": 8,
    }
    return GroupTrainer(
        options.pop("model", None) or tiny.model(),
        TrainingArguments(str(folder), **given),
        loss=SoftSequence() if loss is None else loss,
        reward=options.pop("reward", longest_word),
        **{**defaults, **options},
    )


WANTED = 40


def longest_word(row: Any, response: Any) -> float:
    """Share of the tokens that are among the first of the vocabulary."""
    return sum(token < WANTED for token in response) / max(1, len(response))


def test_the_reward_rises(tmp_path: Path) -> None:
    model = tiny.model(initializer_range=0.02)
    args = {"max_steps": 60, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    made = trainer(tmp_path, model=model, args=args)
    before = made.evaluate()["eval_reward"]
    made.train()
    after = made.evaluate()["eval_reward"]
    assert after > before + 0.2
    logged = [entry for entry in made.state.log_history if "reward" in entry]
    assert logged[-1]["reward"] > logged[0]["reward"] + 0.2
    for name in ("ratio/mean", "reward_std", "completions/mean_length", "kl_old"):
        assert name in logged[0], name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_is_on_policy_and_the_next_are_not(
    tmp_path: Path, temperature: float
) -> None:
    made = trainer(tmp_path, updates=3, temperature=temperature)
    made.train()
    ratios = [e["kl_old"] for e in made.state.log_history if "kl_old" in e]
    assert len(ratios) == 6
    assert ratios[0] == ratios[3] == 0.0
    assert all(ratio > 0 for i, ratio in enumerate(ratios) if i % 3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_old_log_probabilities_are_the_policys(tmp_path: Path, temperature: float) -> None:
    made = trainer(tmp_path, temperature=temperature)
    rows = made.train_dataset[:2]
    batch = made._sample(made.model, rows)
    assert batch["input_ids"].shape[0] == 8 and batch["rewards"].shape == (8,)
    for i in range(8):
        prompt = rows[i // 4]["prompt_ids"].tolist()
        assert batch["input_ids"][i, : len(prompt)].tolist() == prompt
    states = made.model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    _, head = hidden_and_head(made.model, input_ids=batch["input_ids"])
    expected = linear_logprobs(states, head.weight, labels, temperature=temperature).detach()
    assert torch.equal(batch["old_logprobs"], expected)
    assert not batch["old_logprobs"].requires_grad, "or every sample keeps a graph"


def test_processes_and_steps_sample_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path)
    found = []
    for process, step in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0)):
        monkeypatch.setattr(TrainingArguments, "process_index", process)
        made.state.global_step = step
        ids = made._sample(made.model, made.train_dataset[:2])["input_ids"]
        found.append(str(ids.tolist()))
    assert len(set(found)) == 4 and found[0] == found[-1]
    monkeypatch.setattr(TrainingArguments, "process_index", 0)
    made = trainer(tmp_path, args={"seed": 43})
    assert str(made._sample(made.model, made.train_dataset[:2])["input_ids"].tolist()) != found[0]


def test_a_low_temperature_samples_the_likeliest_response_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path, temperature=1e-4)
    batch = made._sample(made.model, made.train_dataset[:2])
    for group in batch["input_ids"].view(2, 4, -1):
        assert torch.equal(group, group[:1].expand_as(group))


def test_rewards_are_of_their_prompts_and_vary_within_groups(tmp_path: Path) -> None:
    """A prompt that is easier than another says nothing about its responses."""

    def reward(row: Any, response: Any) -> float:
        return 10.0 * int(row["prompt_ids"][1]) + longest_word(row, response)

    made = trainer(tmp_path, reward=reward)
    rows = made.train_dataset[:3]
    made._sampled = made._sample(made.model, rows)
    groups = made._sampled["rewards"].view(3, 4)
    apart = groups.double() - groups.double().mean(1, keepdim=True)
    advantages = apart / (groups.double().std(1, keepdim=True) + 1e-6)
    assert relative(made._sampled["advantages"].view(3, 4), advantages) < 1e-5
    for row, group in zip(rows, groups, strict=True):
        assert torch.all(group >= 10 * int(row["prompt_ids"][1]))
        assert torch.all(group <= 10 * int(row["prompt_ids"][1]) + 1)
    logged = made._further_metrics(made._sampled)
    assert float(logged["reward"]) == pytest.approx(float(groups.mean()), rel=1e-6)
    within = sum(float(torch.tensor(group.tolist()).std()) for group in groups) / 3
    assert float(logged["reward_std"]) == pytest.approx(within, rel=1e-5)
    lengths = (made._sampled["labels"] != -100).sum(1).tolist()
    assert float(logged["completions/mean_length"]) == pytest.approx(sum(lengths) / 12)


def test_processes_share_the_held_out_prompts_and_their_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five prompts on two processes: three and two of them, and means over five."""
    rewarded: list[int] = []

    def reward(row: Any, response: Any) -> float:
        rewarded.append(int(row["prompt_ids"][1]))
        return float(len(response))

    made = trainer(tmp_path, reward=reward, eval_prompts=5)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    sums, own = [], []
    for process in (0, 1):
        monkeypatch.setattr(TrainingArguments, "process_index", process)
        monkeypatch.setattr(made.accelerator, "reduce", lambda t, how: (sums.append(t), t)[1])
        made.evaluate()
        own.append(list(rewarded))
        rewarded.clear()
    prompts = [int(row["prompt_ids"][1]) for row in made.eval_dataset]
    assert own == [prompts[0:5:2], prompts[1:5:2]]
    total = sums[0] + sums[1]
    assert total[0] == total[1] > 0

    def reduce(tensor: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return total

    monkeypatch.setattr(made.accelerator, "reduce", reduce)
    found = made.evaluate()
    assert found["eval_reward"] == pytest.approx(float(total[0]) / 5, rel=1e-12)
    assert found["eval_completions/mean_length"] == pytest.approx(float(total[1]) / 5, rel=1e-12)


@pytest.mark.parametrize("loss", [SoftSequence(), DAPO(), GRPO(entropy_bonus=0.1)], ids=repr)
def test_processes_divide_by_what_all_of_them_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    """The other one has three times as many responses, and tokens: a mean of twice as many."""
    made = trainer(tmp_path, loss)
    rows = made.train_dataset[:2]

    def gradient() -> torch.Tensor:
        """On-policy the loss itself is near 0."""
        made._left = 2 if made._sampled else 0
        loss = made.compute_loss(made.model, {"rows": rows})
        return torch.autograd.grad(loss, made.model.lm_head.weight)[0]

    alone = gradient()
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    seen = []

    def reduce(tensor: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "mean"
        seen.append(tensor.tolist())
        return 2 * tensor

    monkeypatch.setattr(made.accelerator, "reduce", reduce)
    halved = gradient()
    assert (2 * halved - alone).abs().max() <= 1e-5 * alone.abs().max() != 0
    assert seen == [[8, int((made._sampled["labels"] != -100).sum())]]


def test_several_sets_of_held_out_prompts_are_evaluated_by_name(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    rows = made.eval_dataset
    found = made.evaluate({"a": rows[:2], "b": rows[2:]})
    assert {"eval_a_reward", "eval_b_completions/mean_length"} <= set(found)
    assert found["eval_b_reward"] == made.evaluate(rows[2:])["eval_reward"]


def test_a_model_is_not_trained_on_the_samples_of_the_one_before(tmp_path: Path) -> None:
    args = trainer(tmp_path, args={"max_steps": 1}).args
    sampled = []

    def reward(row: Any, response: Any) -> float:
        sampled.append(response)
        return float(len(sampled) % 3)

    subject = GroupTrainer(
        None,
        args,
        loss=GRPO(),
        reward=reward,
        group_size=2,
        max_new_tokens=4,
        updates=4,
        model_init=lambda: tiny.model(),
        train_dataset=tiny.token_rows(8),
        processing_class=tiny.tokenizer(),
    )
    for number in (1, 2):
        subject.train()
        assert len(sampled) == 8 * number and subject._left == 3


def test_a_training_does_not_begin_with_the_samples_of_the_one_before(tmp_path: Path) -> None:
    """Nor one that goes on from a checkpoint without samples, nor with a smaller batch size."""
    rewarded: list[int] = []

    def counted(row: Any, response: Any) -> float:
        rewarded.append(len(response))
        return longest_word(row, response)

    args = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    made = trainer(tmp_path, args=args, reward=counted, updates=4)
    for number in (1, 2):
        made.train()
        assert len(rewarded) == 16 * number and made._left == 3
    (tmp_path / "checkpoint-1" / "samples-0.safetensors").unlink()
    made.args.max_steps = 2
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(rewarded) == 16 * 3


def test_a_smaller_batch_size_is_tried_with_samples_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    original = GroupTrainer.compute_loss

    def full(self: Any, model: Any, inputs: Any, *rest: Any, **given: Any) -> Any:
        loss = original(self, model, inputs, *rest, **given)
        sizes.append(len(self._sampled["labels"]))
        if len(sizes) == 1:
            raise RuntimeError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(GroupTrainer, "compute_loss", full)
    made = trainer(tmp_path, args={"max_steps": 2, "auto_find_batch_size": True})
    made.train()
    assert sizes[0] > sizes[1] == sizes[2]


@pytest.mark.parametrize("how", ["evaluation", "without gradients"])
def test_a_loss_that_is_only_looked_at_takes_no_samples(tmp_path: Path, how: str) -> None:
    made = trainer(tmp_path)
    rows = made.train_dataset
    made.compute_loss(made.model.train(), {"rows": rows[:2]})
    left, sampled = made._left, made._sampled
    assert left == made.updates - 1
    for _ in range(3):
        with torch.no_grad():
            model = made.model.train(how != "evaluation")
            _, metrics = made.compute_loss(model, {"rows": rows[2:5]}, return_outputs=True)
        # of the rows that it was asked for, and on policy
        assert metrics["kl_old"] == 0.0
    assert made._left == left and made._sampled is sampled
    made.compute_loss(made.model.train(), {"rows": rows[5:7]})
    assert made._left == left - 1 and made._sampled is sampled


def test_tokens_of_prompts_that_the_model_has_no_row_for_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=tiny.model(vocab_size=30))
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected tokens in \[0, 30\), .*, got"):
        made.evaluate()


def test_prompts_of_text_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    options = {"processing_class": tiny.tokenizer(), "train_dataset": tiny.text_rows(2)}
    with pytest.raises(ValueError, match="train_dataset: expected rows with prompt_ids, got prom"):
        GroupTrainer(tiny.model(), args, loss=GRPO(), reward=longest_word, **options)


def test_a_checkpoint_without_samples_is_gone_on_from_with_new_ones(tmp_path: Path) -> None:
    """As one of another trainer; the next of the updates on a batch would have used the old."""
    rewarded: list[int] = []

    def counted(row: Any, response: Any) -> float:
        rewarded.append(len(response))
        return longest_word(row, response)

    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, args=args).train()
    found = []
    for samples in (True, False):
        if not samples:
            (tmp_path / "checkpoint-1" / "samples-0.safetensors").unlink()
        rewarded.clear()
        made = trainer(tmp_path, args=args, reward=counted)
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert made.state.global_step == 2
        found.append(len(rewarded))
    # 4 prompts, 4 responses each
    assert found == [0, 16]


def test_evaluation_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        trainer(tmp_path).evaluate([])
    assert str(error.value) == "eval_dataset: expected at least one row, got none"
    for rows in (None, iter(())):
        with pytest.raises(TypeError, match=r"^eval_dataset: expected rows whose number is known"):
            trainer(tmp_path, eval_dataset=None).evaluate(rows)


def test_a_prediction_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with pytest.raises(NotImplementedError, match=r"predict: .* call evaluate\(rows\)"):
        made.predict(made.train_dataset)


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupTrainer, "_sharded", property(lambda self: True))
    with pytest.raises(ValueError) as error:
        trainer(tmp_path)
    assert str(error.value) == (
        "args: expected whole weights, for every process to sample by itself, "
        "got FSDP or DeepSpeed; use DistributedDataParallel"
    )


def test_evaluation_repeats_itself(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert made.evaluate() == made.evaluate()


def test_evaluation_is_of_a_response_to_each_of_so_many_prompts(tmp_path: Path) -> None:
    """The same samples at any step, and means over the prompts."""
    seen: list[tuple[Any, int, float]] = []

    def noted(row: Any, response: Any) -> float:
        seen.append((row, len(response), longest_word(row, response)))
        return seen[-1][2]

    made = trainer(tmp_path, reward=noted, eval_prompts=3, model=tiny.model(initializer_range=0.02))
    found = made.evaluate()
    assert [row for row, _, _ in seen] == made.eval_dataset[:3]
    assert found["eval_reward"] == pytest.approx(sum(reward for _, _, reward in seen) / 3)
    assert found["eval_completions/mean_length"] == sum(length for _, length, _ in seen) / 3
    made.state.global_step = 7
    assert made.evaluate() == found


def test_each_process_evaluates_prompts_of_its_own(tmp_path: Path, monkeypatch) -> None:
    """And what is reported is over those of all: here of 2 that do the same."""
    seen: list[Any] = []
    made = trainer(tmp_path, reward=lambda row, response: seen.append(row) or 1.0, eval_prompts=5)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(made.accelerator, "reduce", lambda sums, how: {"sum": 2.5}[how] * sums)
    found = made.evaluate()
    assert seen == [made.eval_dataset[1], made.eval_dataset[3]]
    assert found["eval_reward"] == 1.0


def test_samples_are_of_the_policy_that_is_trained(tmp_path: Path, monkeypatch) -> None:
    """Of its whole distribution, at the temperature of the loss, without dropout."""
    asked: list[Any] = []

    def noted(model: Any, prompts: Any, lengths: Any, **options: Any) -> Any:
        asked.append(options["settings"])
        assert lengths == [8] * 8
        assert options["pad_token_id"] == tiny.tokenizer().pad_token_id
        assert options["eos_token_id"] == tiny.tokenizer().eos_token_id != options["pad_token_id"]
        return generate_segments(model, prompts, lengths, **options)

    monkeypatch.setattr("fusedpo.trainers.groups.generate_segments", noted)
    model = tiny.model(attention_dropout=0.5)
    # two prompts of one length, so that the reward of each is told by its first token
    made = trainer(
        tmp_path, model=model, temperature=0.5, reward=lambda row, _: float(row["prompt_ids"][1])
    )
    rows = made.train_dataset[:2]
    assert rows[0]["prompt_ids"][1] != rows[1]["prompt_ids"][1]
    made.model.train()
    batch = made._sample(made.model, rows)
    assert (asked[0].temperature, asked[0].top_k, asked[0].top_p) == (0.5, 0, 1.0)
    expected = [float(row["prompt_ids"][1]) for row in rows for _ in range(4)]
    assert batch["rewards"].tolist() == expected
    with torch.no_grad(), evaluating(made.model) as quiet:
        logits = quiet(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logp = (logits / 0.5).log_softmax(-1)[:, :-1]
    scored = batch["labels"][:, 1:] != -100
    each = logp.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    assert relative(batch["old_logprobs"][:, :-1][scored], each[scored]) < 1e-5


def test_a_resumed_run_samples_when_it_would_have(tmp_path: Path) -> None:
    rewarded: list[int] = []

    def counted(row: Any, response: Any) -> float:
        rewarded.append(made.state.global_step)
        return longest_word(row, response)

    args = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    made = trainer(tmp_path, args=args, reward=counted)
    made.train()
    assert set(rewarded) == {0, 2}
    rewarded.clear()
    made = trainer(tmp_path, args=args, reward=counted)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert set(rewarded) == {2}


def test_a_reference_is_compared_with(tmp_path: Path) -> None:
    made = trainer(tmp_path, GRPO(kl_weight=0.1), args={"max_steps": 2})
    made.train()
    logged = [entry["kl"] for entry in made.state.log_history if "kl" in entry]
    assert logged[0] == 0.0 and logged[1] > 0
    given = trainer(
        tmp_path, GRPO(kl_weight=0.1), args={"max_steps": 1}, ref_model=tiny.model(seed=1)
    )
    given.train()
    assert given.state.log_history[0]["kl"] > 0


def test_the_first_update_is_on_policy_under_autocast_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, args={"max_steps": 2, "bf16": True})
    made.train()
    ratios = [e["kl_old"] for e in made.state.log_history if "kl_old" in e]
    assert ratios[0] == 0.0 < ratios[1]


def test_old_log_probabilities_are_made_within_the_budget(tmp_path: Path) -> None:
    made = trainer(tmp_path, memory_budget=1)
    with pytest.raises(BudgetTooSmall):
        made._sample(made.model, made.train_dataset[:1])


def test_a_checkpoint_has_the_samples_that_are_left_of_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, args={"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    made.train()
    tensors, meta = read_file(tmp_path / "checkpoint-1" / "samples-0.safetensors")
    assert meta["left"] == 1 and torch.equal(tensors["rewards"], made._sampled["rewards"])
    assert read_file(tmp_path / "checkpoint-2" / "samples-0.safetensors")[0] == {}
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    assert made._samples(tmp_path).name == "samples-1.safetensors"


def test_evaluation_is_logged_and_callbacks_hear_of_it(tmp_path: Path) -> None:
    """As one that stops early, or keeps the best checkpoint."""
    heard: list[dict[str, float]] = []

    class Listening(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            heard.append(more["metrics"])

    made = trainer(tmp_path)
    made.add_callback(Listening())
    found = made.evaluate()
    assert heard == [found]
    assert found.items() <= made.state.log_history[-1].items()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"loss": DPO()}, TypeError, "loss: expected a policy loss"),
        ({"group_size": 1}, ValueError, "group_size: expected at least 2, got 1"),
        ({"data_collator": list}, ValueError, "data_collator: expected None, as batches are sampl"),
        ({"updates": 0}, ValueError, "updates: expected at least 1, got 0"),
        ({"updates": 1.5}, TypeError, "updates: expected a whole number, got 1.5"),
        (
            {"processing_class": None},
            ValueError,
            "processing_class: expected the tokenizer, got none",
        ),
        (
            {"args": {"gradient_accumulation_steps": 2}},
            ValueError,
            "gradient_accumulation_steps: expected 1, as responses are sampled for one batch",
        ),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        trainer(tmp_path, **options)


def test_a_gradient_tolerance_reaches_the_head_and_is_logged(tmp_path):
    subject = trainer(tmp_path, gradient_tolerance=2e-3, args={"max_steps": 2})
    subject.train()
    logged = [entry for entry in subject.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all("head/columns_kept" in entry for entry in logged)
