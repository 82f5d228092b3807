"""Checkpoints say what run they are of, and no other run goes on from them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import TrainingArguments

from fusedpo.cli import main
from fusedpo.losses import DPO, GRPO, KTO, Loss, ShortToLong, SimPO
from fusedpo.trainers import output
from fusedpo.trainers.groups import GroupTrainer
from fusedpo.trainers.one_run import NAME, of_files, of_options, of_rows
from fusedpo.trainers.responses import ResponseTrainer
from fusedpo.trainers.transformers import PreferenceTrainer


def trainer(folder: Path, **options: Any) -> PreferenceTrainer:
    arguments = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-3}
    arguments |= options.pop("arguments", {})
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        save_strategy="steps",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    given = {"loss": DPO(), "train_dataset": tiny.token_rows(8), "model": tiny.model(), **options}
    return PreferenceTrainer(args=args, processing_class=tiny.tokenizer(), **given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_run")
    trainer(folder).train()
    return folder


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss": SimPO()}, r"loss: expected DPO, as in .*checkpoint-1, got SimPO; "),
    "option": ({"loss": DPO(beta=0.3)}, r"beta: expected 0\.1, as in .*checkpoint-1, got 0\.3; "),
    "rows": (
        {"train_dataset": tiny.token_rows(8, seed=1)},
        r"train_dataset: expected 8 rows of checksum \w+, as in .*, got 8 rows of checksum \w+; ",
    ),
    "fewer rows": (
        {"train_dataset": tiny.token_rows(7)},
        "train_dataset: expected 8 rows of checksum .*, got 7 rows",
    ),
    # its own weights come from the checkpoint, those of the reference do not
    "reference": (
        {"model": tiny.model(1)},
        "model: expected LlamaForCausalLM of .* parameters, checksum .*, got LlamaForCausalLM of ",
    ),
    "size": ({"model": tiny.model(num_hidden_layers=2)}, "model: expected LlamaForCausalLM of "),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_another_run_does_not_go_on(
    trained: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    made = trainer(tmp_path, **options)
    before = {name: weight.clone() for name, weight in made.model.named_parameters()}
    with pytest.raises(ValueError, match=message) as raised:
        made.train(resume_from_checkpoint=str(trained / "checkpoint-1"))
    assert str(trained / "checkpoint-1" / NAME) in str(raised.value)
    # before any work: nothing was loaded
    assert all(torch.equal(before[name], w) for name, w in made.model.named_parameters())
    assert made.state.global_step == 0


def test_the_newest_checkpoint_of_the_folder_is_held_to_it_too(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    with pytest.raises(ValueError, match=r"beta: expected 0\.1, as in .*checkpoint-2, got 0\.3"):
        trainer(tmp_path / "out", loss=DPO(beta=0.3)).train(resume_from_checkpoint=True)


def test_what_is_changed_on_purpose_stays_free(trained: Path, tmp_path: Path) -> None:
    arguments = {"max_steps": 3, "learning_rate": 5e-4, "logging_steps": 1, "save_steps": 3}
    made = trainer(tmp_path, arguments=arguments, memory_budget="1MiB")
    made.train(resume_from_checkpoint=str(trained / "checkpoint-2"))
    assert made.state.global_step == 3


def test_a_person_may_correct_what_a_checkpoint_says(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / NAME
    record = json.loads(path.read_text())
    record["trainer"]["beta"] = 0.3
    path.write_text(json.dumps(record))
    trainer(tmp_path, loss=DPO(beta=0.3)).train(resume_from_checkpoint=str(path.parent))
    path.write_text("[]")
    with pytest.raises(ValueError, match=f"{NAME}: expected what is saved under this name"):
        trainer(tmp_path).train(resume_from_checkpoint=str(path.parent))
    # as of version 0.1, and of other programs
    path.unlink()
    trainer(tmp_path, loss=SimPO()).train(resume_from_checkpoint=str(path.parent))


def test_new_weights_that_are_trained_may_have_been_drawn_anew(
    trained: Path, tmp_path: Path
) -> None:
    """Without a reference all that a run depends on is in its checkpoint."""
    trainer(tmp_path / "first", loss=SimPO()).train()
    made = trainer(tmp_path / "again", loss=SimPO(), model=tiny.model(1))
    made.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert made.state.global_step == 2


def test_frozen_weights_below_adapters_are_those_of_the_run(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int) -> Any:
        model = tiny.model(seed)
        torch.manual_seed(17 + seed)  # of the adapters, which come from the checkpoint
        return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))

    trainer(tmp_path, model=adapted(0)).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    torch.manual_seed(5)
    again = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    trainer(tmp_path / "again", model=again).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="model: expected PeftModelForCausalLM of "):
        trainer(tmp_path / "b", model=adapted(1)).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("kind", ["responses", "samples"])
def test_every_trainer_has_it(tmp_path: Path, kind: str) -> None:
    def made(other: bool) -> Any:
        args = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            save_steps=1,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows: Any = tiny.token_rows(4)
        options = {"processing_class": tiny.tokenizer(), "train_dataset": rows}
        if kind == "samples":
            loss: Loss = GRPO(epsilon_low=0.1) if other else GRPO()
            options |= {"reward": lambda row, ids: float(len(ids)), "max_new_tokens": 2}
            return GroupTrainer(tiny.model(), args, loss=loss, **options)
        for i, row in enumerate(rows):
            row["completion_ids"] = row["chosen_ids"]
            row["inputs"] = {"desirable": float(i % 2)}
        loss = KTO(beta=0.3) if other else KTO()
        return ResponseTrainer(tiny.model(), args, loss=loss, **options)

    made(other=False).train()
    with pytest.raises(ValueError, match=r"(beta|epsilon_low): expected .*, as in the run that"):
        made(other=True).train(resume_from_checkpoint=True)


# what a record is made of


def test_options_are_told_by_name() -> None:
    found = of_options("loss", ShortToLong(base=SimPO(beta=3.0)))
    assert found["loss"] == "ShortToLong" and found["base"] == "SimPO"
    assert found["base.beta"] == 3.0 and "beta" not in found
    assert json.loads(json.dumps(found)) == found


def test_rows_are_told_by_what_is_in_them_and_not_by_how_they_are_held() -> None:
    datasets = pytest.importorskip("datasets")
    ids = [[1, 2, 3], [4, 5], [6]]
    plain = [{"prompt_ids": each, "label": 1.0} for each in ids]
    told = of_rows(plain)
    arrays = [{"label": 1.0, "prompt_ids": np.array(each, dtype=np.int32)} for each in ids]
    assert of_rows(arrays) == told == of_rows(datasets.Dataset.from_list(plain))
    for other in (
        plain[::-1],
        plain[:2],
        [{**row, "label": 0.0} for row in plain],
        [{**row, "more": None} for row in plain],
        [{"prompt_ids": each, "label": 1.0} for each in ([1, 2], [3, 4, 5], [6])],
    ):
        assert of_rows(other) != told
    # a last digit may be another machine's
    noisy = [[{"similarity": 0.1 + noise}] for noise in (0.0, 1e-17)]
    assert of_rows(noisy[0]) == of_rows(noisy[1])
    assert of_rows(iter(plain)) == "a stream"
    half = [{"prompt": "\ud800"}]
    assert of_rows(half) == of_rows(half)


def test_weights_are_told_by_their_files_wherever_these_are(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny.model(seed).save_pretrained(tmp_path / name)
    (tmp_path / "b" / "README.md").write_text("moved")
    first, moved, other = (of_files(tmp_path / name) for name in "abc")
    assert first == moved != other


# the command line


def words(folder: Path, *more: str) -> list[str]:
    given = {
        "model": folder / "model",
        "dataset": folder / "pairs.jsonl",
        "loss": "simpo",
        "output": folder / "out",
        **{"max-steps": 2, "save-steps": 1, "batch-size": 2, "evaluations": 1},
        "eval-fraction": 0.25,
    }
    pairs = zip(more[::2], more[1::2], strict=True)
    given |= {name.removeprefix("--"): value for name, value in pairs}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["train", "--cpu", *options]


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commanded")
    for name in ("model", "other-model"):
        tiny.save(folder / name)
    tiny.model(1).save_pretrained(folder / "other-model")
    for name, seed in (("pairs", 0), ("other", 1)):
        rows = tiny.text_rows(8, seed=seed)
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(output, "draw_training", lambda *anything: None)
        assert main(words(folder)) == 0
    return folder


REFUSED = {
    "model": ("--model {0}/other-model", r"model: expected weights of checksum .*/model\), as in"),
    "dataset": ("--dataset {0}/other.jsonl", r"dataset: expected 8 rows of .*pairs.jsonl\), as in"),
    "loss": ("--loss dpo", "loss: expected SimPO, as in .*, got DPO;"),
    "option of the loss": ("--gamma 3", "gamma: expected .*, as in .*, got 3.0;"),
    "method": (
        "--loss sapo --base simpo",
        "got checkpoint-2 without what SelfAugmented goes on from",
    ),
    "adapters": ("--lora-rank 2", "lora_rank: expected 0, as in .*, got 2;"),
    "length": ("--max-length 30", "max_length: expected 1024, as in .*, got 30;"),
    "split": ("--eval-fraction 0.5", "eval_fraction: expected 0.25, as in .*, got 0.5;"),
    "seed": ("--seed 3", "seed: expected 0, as in .*, got 3;"),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_resume_of_another_run_is_refused_before_the_model_is_loaded(
    commanded: Path,
    more: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fusedpo.trainers.run.load_model", lambda job: pytest.fail("was loaded"))
    given = [*words(commanded, *more.format(commanded).split()), "--resume"]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert NAME in told or "checkpoint-2 without" in told


def test_the_same_run_goes_on_wherever_it_was_moved(
    commanded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "draw_training", lambda *anything: None)
    shutil.copytree(commanded, tmp_path / "moved")
    more = ("--max-steps", "3", "--learning-rate", "1e-4")
    assert main([*words(tmp_path / "moved", *more), "--resume"]) == 0
    assert (tmp_path / "moved" / "out-checkpoints" / "checkpoint-3" / NAME).is_file()


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_the_trainers_on_trl_have_it(tmp_path: Path, method: str) -> None:
    pytest.importorskip("trl")
    from trainers.trl_runs import build, quiet

    from fusedpo.trainers import trl

    kind = getattr(trl, f"Fused{method.upper()}Trainer")
    given = {"trainer_class": kind, "output": str(tmp_path), "max_steps": 1}
    given |= {"save_strategy": "steps", "save_steps": 1}
    with quiet():
        build(method, **given).train()
        build(method, **given).train(resume_from_checkpoint=True)
        for more, named in (
            ({"beta": 0.2}, r"beta: expected 0\.\d+, as in .*, got 0\.2;"),
            ({"loss_type": "ipo" if method == "dpo" else "bnpo"}, "loss_type: expected "),
            ({"make": "qwen2"}, "model: expected LlamaForCausalLM of .*, got Qwen2ForCausalLM of"),
        ):
            with pytest.raises(ValueError, match=named):
                build(method, **given, **more).train(resume_from_checkpoint=True)
