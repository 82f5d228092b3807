"""KTO: its loss is the formula on the model's own logits, with z0 from mismatched rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import relative
from trainers.plain import plain_sgd
from transformers import AutoModelForCausalLM

from fusedpo.cli import main
from fusedpo.data.reading import Splits
from fusedpo.losses import DPO, KTO, SimPO
from fusedpo.recipes.stdlib_pairs import hold_out, read_passages
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.methods.pairs import Pairs
from fusedpo.trainers.methods.responses import Responses
from fusedpo.trainers.responses import ResponseCollator, ResponseTrainer

LOSS = KTO(beta=0.5, desirable_weight=1.2, undesirable_weight=0.7)


def token_rows(count: int, labels: str = "", seed: int = 0) -> list[dict[str, Any]]:
    """Rows in token ids; labels, if they are not to be drawn, as + and -."""
    texts = tiny.response_rows(count, seed)
    for row, label in zip(texts, labels, strict=False):
        row["label"] = label == "+"
    method = Responses()
    checked = method.checked(texts, Splits(texts, None, "here"), LOSS)
    return method.tokenized(checked, tiny.tokenizer(), 64).rows


def trainer(folder: Path, model: Any, rows: Any, loss: Any = LOSS, **options: Any) -> Any:
    arguments = plain_sgd(folder, options)
    return ResponseTrainer(
        model,
        arguments,
        loss=loss,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny.tokenizer(),
        **options,
    )


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# the same, written out


def ratio(model: Any, reference: Any, prompt: Any, response: Any) -> torch.Tensor:
    """log pi(response | prompt) - log pi_ref(response | prompt), of logits in float64."""
    ids = torch.tensor([*prompt, *response])[None]
    own, other = (
        each(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for each in (model, reference)
    )
    places = torch.tensor([*response])[:, None]
    return (own.gather(1, places) - other.detach().gather(1, places)).sum()


def reference_point(model: Any, reference: Any, batches: list[list[Any]]) -> float:
    """z0 before it is clamped: over the batches of one step of several processes."""
    found = [
        ratio(model, reference, row["prompt_ids"], batch[i - 1]["completion_ids"]).item()
        for batch in batches
        for i, row in enumerate(batch)
        if len(batch) > 1
    ]
    return sum(found) / len(found) if found else 0.0


def naive(model: Any, reference: Any, rows: list[Any], z0: float) -> list[torch.Tensor]:
    """The loss of each row."""
    losses = []
    for row in rows:
        a = ratio(model, reference, row["prompt_ids"], row["completion_ids"])
        good = row["inputs"]["desirable"] == 1.0
        weight = LOSS.desirable_weight if good else LOSS.undesirable_weight
        u = LOSS.beta * ((a - z0) if good else (z0 - a))
        losses.append(weight * (1 - torch.sigmoid(u)))
    return losses


def models() -> tuple[Any, Any]:
    """A policy and a reference of z0 above 0, in float64 but for what Llama does in float32."""
    return tiny.model(3).double(), tiny.model(4).double()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_loss_and_gradient_are_those_of_the_models_own_logits(
    tmp_path: Path, swapped: bool, packed: bool
) -> None:
    rows = token_rows(5, "+-++-")
    model, reference = models()[:: -1 if swapped else 1]
    z0 = reference_point(model, reference, [rows])
    assert z0 < -0.1 if swapped else z0 > 0.1  # clamped in one of the two cases
    losses = naive(model, reference, rows, max(0.0, z0))
    expected = torch.stack(losses).mean()
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(expected, list(model.parameters()))]
    )
    before = parameters(model)
    options = {"data_collator": ResponseCollator(0, packed=True)} if packed else {}
    subject = trainer(
        tmp_path, model, rows, ref_model=reference, per_device_train_batch_size=5, **options
    )
    subject.train()
    log = next(entry for entry in subject.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert log["kl"] == pytest.approx(max(0.0, z0), rel=1e-6)
    assert relative((before - parameters(model)) / 0.5, gradient) < 1e-6


def test_z0_of_an_accumulation_is_each_batchs_own(tmp_path: Path) -> None:
    rows = token_rows(4, "+--+")
    model, reference = models()
    batches = [rows[:2], rows[2:]]
    points = [max(0.0, reference_point(model, reference, [each])) for each in batches]
    losses = [
        loss
        for each, z0 in zip(batches, points, strict=True)
        for loss in naive(model, reference, each, z0)
    ]
    subject = trainer(
        tmp_path,
        model,
        rows,
        ref_model=reference,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    subject.train()
    log = next(entry for entry in subject.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert log["kl"] == pytest.approx(sum(points) / 2, rel=1e-6)


def test_evaluation_is_of_all_rows_and_a_row_alone_is_compared_with_zero(tmp_path: Path) -> None:
    """Batches of both kinds, of one, and of one row."""
    rows = token_rows(7, "++----+")
    model, reference = models()
    batches = [rows[:3], rows[3:6], rows[6:]]
    points = [max(0.0, reference_point(model, reference, [each])) for each in batches]
    assert points[0] > 0.1 and points[1:] == [0, 0]
    losses = [
        loss.item()
        for each, z0 in zip(batches, points, strict=True)
        for loss in naive(model, reference, each, z0)
    ]
    rewards = [
        LOSS.beta * ratio(model, reference, row["prompt_ids"], row["completion_ids"]).item()
        for row in rows
    ]
    found = trainer(
        tmp_path, model, rows, ref_model=reference, per_device_eval_batch_size=3
    ).evaluate()
    chosen = (rewards[0] + rewards[1] + rewards[6]) / 3
    rejected = sum(rewards[2:6]) / 4
    expected = {
        "eval_loss": sum(losses) / 7,
        "eval_rewards/chosen": chosen,
        "eval_rewards/rejected": rejected,
        "eval_rewards/margins": chosen - rejected,
        "eval_kl": 3 * (points[0] + points[1]) / 7,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert "eval_share" not in found and not any(map(math.isnan, found.values()))


def test_z0_is_a_mean_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process brings three rows with log-ratios of 7 in all."""
    rows = token_rows(2, "+-")
    model, reference = models()
    own = 2 * reference_point(model, reference, [rows])
    subject = trainer(tmp_path, model, rows, ref_model=reference)
    monkeypatch.setattr(subject.accelerator, "reduce", lambda sums, how: sums + others(how))

    def others(how: str) -> torch.Tensor:
        assert how == "sum"
        return torch.tensor([7.0, 3.0])

    batch = subject.data_collator(rows)

    def z0() -> float:
        return subject.compute_loss(model, dict(batch), return_outputs=True)[1]["kl"].item()

    assert z0() == pytest.approx((own + 7) / 5, rel=1e-6)
    # of rows that are there to give every process as many, none counts, or one of two
    model.eval()
    for kept in (0, 1):
        monkeypatch.setattr(subject, "_not_repeated", lambda rows, kept=kept: kept)
        assert z0() == pytest.approx((own * kept / 2 + 7) / (3 + kept), rel=1e-6)


def test_a_kind_that_is_not_there_is_not_logged(tmp_path: Path) -> None:
    found = trainer(tmp_path, tiny.model(), token_rows(4, "++++")).evaluate()
    assert "eval_rewards/chosen" in found
    assert not {"eval_rewards/rejected", "eval_rewards/margins", "eval_logps/rejected"} & {*found}


# batches

PLAIN = [
    {"prompt_ids": [1, 2], "completion_ids": [3], "inputs": {"desirable": 1.0}},
    {"prompt_ids": [6], "completion_ids": [7, 8, 9], "inputs": {"desirable": 0.0}},
    {"prompt_ids": [4, 5, 1], "completion_ids": [2, 4], "inputs": {"desirable": 1.0}},
]


def test_each_prompt_gets_the_response_of_the_row_before() -> None:
    batch = ResponseCollator(0)(PLAIN)
    assert batch["desirable"].tolist() == [1.0, 0.0, 1.0]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [6, 7, 8, 9, 0], [4, 5, 1, 2, 4]]
    assert batch["kl_input_ids"].tolist() == [
        [1, 2, 2, 4, 0, 0],
        [6, 3, 0, 0, 0, 0],
        [4, 5, 1, 7, 8, 9],
    ]
    assert batch["kl_labels"].tolist() == [
        [-100, -100, 2, 4, -100, -100],
        [-100, 3, -100, -100, -100, -100],
        [-100, -100, -100, 7, 8, 9],
    ]
    packed = ResponseCollator(0, packed=True)(PLAIN)
    assert packed["kl_cu_seqlens"].tolist() == [0, 4, 6, 12]
    assert packed["kl_input_ids"].tolist() == [[1, 2, 2, 4, 6, 3, 4, 5, 1, 7, 8, 9]]
    assert not [name for name in ResponseCollator(0, mismatched=False)(PLAIN) if "kl" in name]


def test_a_long_mismatched_row_loses_the_start_of_its_prompt() -> None:
    batch = ResponseCollator(0, max_length=4)(PLAIN)
    assert batch["kl_input_ids"].tolist() == [[1, 2, 2, 4], [6, 3, 0, 0], [1, 7, 8, 9]]
    beginning = ResponseCollator(0, max_length=5, bos_token_id=4)(PLAIN)
    assert beginning["kl_input_ids"][2].tolist() == [4, 1, 7, 8, 9]
    # the end of a response that has no room
    assert ResponseCollator(0, max_length=3)(PLAIN)["kl_input_ids"][2].tolist() == [1, 7, 8]


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_alone_has_no_mismatched_labels(packed: bool) -> None:
    batch = ResponseCollator(0, packed=packed)(PLAIN[:1])
    assert (batch["kl_labels"] == -100).all() and (batch["labels"] != -100).any()


# what is refused


def test_a_batch_of_one_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 2, as KTO"):
        TrainJob("none", "none.jsonl", tmp_path / "out", KTO(), batch_size=1)
    TrainJob("none", "none.jsonl", tmp_path / "out", KTO(variant="apo_zero"), batch_size=1)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 2, as KTO"):
            trainer(tmp_path, tiny.model(), PLAIN, **{name: 1})


@pytest.mark.parametrize("loss", [DPO(), SimPO()], ids=repr)
def test_a_loss_of_pairs_is_refused(tmp_path: Path, loss: Any) -> None:
    with pytest.raises(ValueError, match="loss: expected a loss of single responses"):
        trainer(tmp_path, tiny.model(), PLAIN, loss=loss)
    with pytest.raises(ValueError, match="loss: expected a loss of single responses"):
        TrainJob("none", "none.jsonl", tmp_path / "out", loss, method=Responses())


def test_rows_of_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset: expected rows with prompt_ids, compl"):
        trainer(tmp_path, tiny.model(), tiny.token_rows(4))


# from the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("responses")
    tiny.save(path / "model", initializer_range=0.02)
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny.response_rows(97))))
    return path


def command(folder: Path, output: Path, *more: str) -> dict[str, Any]:
    words = ["train", "--cpu", "--model", str(folder / "model"), "--output", str(output)]
    words += ["--dataset", str(folder / "rows.jsonl"), "--loss", "kto", "--learning-rate", "5e-3"]
    assert main([*words, *more]) == 0
    return json.loads((output / "metrics.json").read_text())


def test_training_raises_desirable_responses_above_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--max-steps 30 --batch-size 16 --eval-fraction 0.2 --evaluations 3 --beta 0.5"
    log = command(folder, tmp_path / "out", *words.split())["log"]
    first, *_, last = (entry for entry in log if "eval_loss" in entry)
    assert first["eval_loss"] == pytest.approx(0.5, rel=1e-6)
    assert first["eval_kl"] == first["eval_rewards/margins"] == 0
    assert last["eval_loss"] < 0.9 * first["eval_loss"]
    assert last["eval_rewards/margins"] > 0.5 and last["eval_kl"] >= 0
    told = capsys.readouterr().out
    assert "layout: KTO, of prompt (text), completion (text), label (true or false)" in told
    assert "78 responses to train on and 19 held out" in told
    assert "30 steps of 16 responses on" in told and "z0" in told


def test_apo_zero_needs_no_mismatched_rows(folder: Path, tmp_path: Path) -> None:
    words = "--variant apo_zero --max-steps 2 --batch-size 1 --evaluations 1"
    log = command(folder, tmp_path / "out", *words.split())["log"]
    assert "eval_rewards/margins" in log[-2] | log[-1]
    assert not any("kl" in entry for entry in log)


def test_resuming_equals_going_on(folder: Path, tmp_path: Path) -> None:
    words = ["--max-steps", "4", "--batch-size", "4", "--evaluations", "1", "--save-steps", "2"]
    command(folder, tmp_path / "out", *words)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight
    (tmp_path / "out-checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    command(folder, tmp_path / "out", *words, "--resume")
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight
    assert torch.equal(resumed, whole)


def test_demonstration_rows_are_pairs_taken_apart() -> None:
    passages = hold_out(read_passages()[:4000], 0.1, 0)
    pairs, single = (method.demo(passages, 0) for method in (Pairs(), Responses()))
    assert len(single.train) == 2 * len(pairs.train)
    first = pairs.train[0]
    for name, row in (("chosen", single.train[0]), ("rejected", single.train[len(pairs.train)])):
        expected = {"prompt": first["prompt"], "completion": first[name]}
        assert row == {**expected, "label": name == "chosen"}
