"""Batches in length groups: loss and gradients of the padded batch, from a tenth more tokens than
the rows have at most."""

from __future__ import annotations

import itertools
import random
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import relative
from peft import PromptTuningConfig, get_peft_model
from trainers.plain import plain_sgd
from transformers import MixtralConfig, MixtralForCausalLM

from fusedpo.losses import DPO, GRPO, KTO, ORPO, Loss, ShortToLong, SimPO
from fusedpo.model_head import add_fused_head
from fusedpo.recipes.short_to_long import ShortToLongCollator
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.forwards import Batch
from fusedpo.trainers.length_groups import GroupedBatch, are_on, in_length_groups, length_groups
from fusedpo.trainers.responses import ResponseTrainer
from fusedpo.trainers.run import make_trainer
from fusedpo.trainers.transformers import PreferenceTrainer

LENGTHS = (3, 30, 5, 41)  # of prompts
LOSSES: dict[str, Loss] = {
    "short to long": ShortToLong(SimPO()),
    "short to long, reference, both": ShortToLong(DPO(), both=True),
    "pairs": DPO(),
    "pairs with a cross-entropy": ORPO(),
    "responses": KTO(),
}


def rows_of(loss: Loss) -> list[dict[str, Any]]:
    """Four rows of very unequal lengths, with long prompts of three times as many tokens."""
    chooser = random.Random(0)

    def some(count: int) -> list[int]:
        return [chooser.randrange(5, 200) for _ in range(count)]

    rows = []
    for i, length in enumerate(LENGTHS):
        row: dict[str, Any] = {"prompt_ids": some(length), "long_prompt_ids": some(3 * length)}
        row |= {"chosen_ids": some(2 + i), "rejected_ids": some(6 - i)}
        if isinstance(loss, KTO):
            row = {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"]}
            row["inputs"] = {"desirable": float(i % 2)}
        rows.append(row)
    return rows


def model_of(seed: int = 0) -> Any:
    return tiny.model(seed, max_position_embeddings=160).double()


def trainer(folder: Path, model: Any, loss: Loss, on: bool | None, **options: Any) -> Any:
    options |= {"train_dataset": rows_of(loss), "processing_class": tiny.tokenizer()}
    if isinstance(loss, ShortToLong):
        options["data_collator"] = ShortToLongCollator(0, both=loss.both)
    if loss.needs_reference:
        options["ref_model"] = model_of(1)
    options = {"per_device_train_batch_size": len(LENGTHS), **options}
    kind = ResponseTrainer if isinstance(loss, KTO) else PreferenceTrainer
    arguments = plain_sgd(folder, options)
    return kind(model, arguments, loss=loss, length_groups=on, **options)


def outcome(
    subject: Any, batch: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, its gradients, and the tokens that the policy was run on."""
    tokens = []
    model = subject.model.train()
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: tokens.append(args[0].numel())
    )
    # the forward that finds out what the model does to its logits
    subject.compute_loss(model, dict(batch))
    tokens.clear()
    loss = subject.compute_loss(model, dict(batch))
    hook.remove()
    model.zero_grad()
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), named, sum(tokens)


def batch_of(subject: Any) -> dict[str, Any]:
    return next(iter(subject.get_train_dataloader()))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_padded_batch(tmp_path, name: str) -> None:
    loss = LOSSES[name]
    plain = trainer(tmp_path, model_of(), loss, False)
    batch = batch_of(plain)
    expected, gradients, padded = outcome(plain, batch)
    found, own, tokens = outcome(trainer(tmp_path, model_of(), loss, True), batch)
    assert abs(found / expected - 1) < 1e-12
    assert gradients.keys() == own.keys()
    for parameter, gradient in gradients.items():
        assert gradient.any()
        assert relative(own[parameter], gradient) < 1e-9, parameter
    real = sum(int(m.sum()) for n, m in batch.items() if n.endswith("attention_mask"))
    assert real <= tokens <= 1.1 * real and padded > 1.5 * real


def test_it_is_on_for_short_and_long_and_off_for_pairs(tmp_path) -> None:
    for name, on in (("short to long", True), ("pairs", False), ("responses", False)):
        subject = trainer(tmp_path, tiny.model(), LOSSES[name], None)
        assert subject.length_groups is on, name


def test_virtual_tokens_stand_in_front_of_every_group(tmp_path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    outcomes = []
    for on in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(model_of(), config).double()
        subject = trainer(tmp_path, model, SimPO(), on)
        outcomes.append(outcome(subject, batch_of(subject)))
    (expected, gradients, _), (found, own, _) = outcomes
    assert abs(found / expected - 1) < 1e-12
    for name, gradient in gradients.items():
        assert gradient.any() and relative(own[name], gradient) < 1e-9


def test_evaluation_is_that_of_the_padded_batches(tmp_path) -> None:
    found = []
    for on in (False, True):
        rows = rows_of(SimPO())[:3]
        subject = trainer(
            tmp_path, model_of(), SimPO(), on, eval_dataset=rows, per_device_eval_batch_size=2
        )
        metrics = subject.evaluate()
        found.append({n: v for n, v in metrics.items() if n.startswith(("eval_l", "eval_rew"))})
    assert len(found[0]) > 4
    assert found[1] == pytest.approx(found[0], rel=1e-6)


# the groups


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_group_of_little_padding(seed: int) -> None:
    chooser = random.Random(seed)
    lengths = [int(2 ** chooser.uniform(0, 13)) for _ in range(chooser.randint(1, 40))]
    groups = length_groups(lengths)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    padded = sum(max(lengths[i] for i in rows) * len(rows) for rows in groups)
    assert padded <= 1.1 * sum(lengths)


def test_rows_of_nearly_one_length_are_one_group() -> None:
    assert length_groups([100, 95, 98, 97]) == [[0, 2, 3, 1]]
    assert length_groups([1100, 7500, 1080]) == [[1], [0, 2]]
    assert length_groups([1, 1, 1]) == [[0, 1, 2]]


def padded_batch(lengths: list[int]) -> Batch:
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    ids = torch.arange(mask.numel()).view(mask.shape) % 90 + 5
    labels = torch.where(mask == 1, ids, -100)
    return Batch.of({"input_ids": ids, "attention_mask": mask, "labels": labels})


def test_a_batch_that_cannot_be_cut_stays_as_it_is() -> None:
    batch = padded_batch([20, 4])
    assert isinstance(in_length_groups(batch), GroupedBatch)
    assert in_length_groups(padded_batch([20, 20])).cu_seqlens is None
    pictures = Batch({**batch.inputs, "pixel_values": torch.zeros(2, 3)}, batch.labels)
    with pytest.warns(UserWarning, match="^length_groups: batches with pixel_values beside the to"):
        assert in_length_groups(pictures) is pictures
    without = Batch({"input_ids": batch.inputs["input_ids"]}, batch.labels)
    with pytest.warns(UserWarning, match="^length_groups: batches without attention_mask are pad"):
        assert in_length_groups(without) is without
    left = padded_batch([20, 20])
    left.inputs["attention_mask"][1, :16] = 0
    assert in_length_groups(left) is left


def test_what_the_loss_sees_is_in_the_order_of_the_rows() -> None:
    """Also where another process has more groups, and where a row has no label."""

    class Two:
        num_processes = 2

        @staticmethod
        def gather(count: torch.Tensor) -> torch.Tensor:
            return torch.cat([count, count + 2])

    batch = padded_batch([5, 20, 5])
    batch.labels[2] = -100
    model = tiny.model()
    add_fused_head(model)
    hidden = model.model(**batch.inputs).last_hidden_state
    grouped = in_length_groups(batch, Two())
    assert isinstance(grouped, GroupedBatch) and len(grouped.groups) == 4
    states, _ = grouped.at_head(model, lambda hidden, head: hidden)
    picked = batch.labels != -100
    picked[2, 0] = True
    assert grouped.labels.tolist() == [batch.labels[picked].tolist()]
    assert grouped.cu_seqlens.tolist() == [0, 4, 23, 24]
    torch.testing.assert_close(states[0], hidden[picked], rtol=1e-5, atol=0)


# refusals


def test_what_is_no_bool_is_refused(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"^length_groups: expected True, False or None, got 2"):
        trainer(tmp_path, tiny.model(), SimPO(), 2)  # type: ignore[arg-type]


WHOLE = ["FSDP", "DeepSpeed", "the auxiliary loss of experts", "images", "packed rows"]


@pytest.mark.parametrize("where", WHOLE)
def test_where_a_batch_has_to_be_one_forward(where: str) -> None:
    made = types.SimpleNamespace(
        is_fsdp_enabled=where == "FSDP",
        is_deepspeed_enabled=where == "DeepSpeed",
        _is_vision_dataset=where == "images",
        data_collator=types.SimpleNamespace(packed=where == "packed rows"),
    )
    experts = "experts" in where
    assert not are_on(None, made, 3, experts=experts)
    assert not are_on(False, made, 3, experts=experts)
    with pytest.raises(
        ValueError, match=rf"^length_groups: expected None or False \w+ {where}, got"
    ):
        are_on(True, made, 2, experts=experts)


def test_experts_whose_load_is_balanced_are_run_in_one_forward(tmp_path) -> None:
    config = MixtralConfig(**tiny.model().config.to_diff_dict() | {"num_local_experts": 2})
    config.output_router_logits = True
    made = trainer(tmp_path, MixtralForCausalLM(config), LOSSES["short to long"], None)
    assert made.length_groups is False


def test_the_command_line_hands_it_on(tmp_path) -> None:
    demo: dict[str, Any] = {"model": "demo", "dataset": "demo", "output": tmp_path / "out"}
    job = TrainJob(**demo, loss=SimPO(), cpu=True, length_groups=True)
    rows = rows_of(SimPO())
    made = make_trainer(job, tiny.model(), tiny.tokenizer(), rows, rows[:2], tmp_path)
    assert made.length_groups is True
    with pytest.raises(ValueError, match=r"^length_groups: expected None for sampled responses"):
        TrainJob(**demo, loss=GRPO(), length_groups=True)
