"""A run's parts, each by itself: what of a job reaches the trainer, and what is held out."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console

from fusedpo.losses import SimPO
from fusedpo.trainers import arguments as told
from fusedpo.trainers import checkpoints
from fusedpo.trainers import run as runs
from fusedpo.trainers.adapters import AdapterSettings
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.inputs import tokenize_rows
from fusedpo.trainers.methods.pairs import Pairs
from fusedpo.trainers.output import publish
from fusedpo.trainers.rows import check_row


def job(folder: Path, **options: Any) -> TrainJob:
    return TrainJob("model", "rows.jsonl", folder / "out", SimPO(), cpu=True, **options)


def arguments(folder: Path, rows: int = 50, **options: Any) -> Any:
    """What the trainer of a job on so many rows is told."""
    row = {name: [3, 4] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    given = (tiny.model(), tiny.tokenizer(), [row] * rows, [row], folder / "staging")
    return runs.make_trainer(job(folder, **options), *given).args


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # 50 rows are 13 batches of 4, so 7 steps of two batches
        ({"batch_size": 4, "accumulation": 2}, 7),
        ({"batch_size": 4, "accumulation": 2, "epochs": 2.5}, 18),
        ({"batch_size": 4, "epochs": 2.0, "max_steps": 5}, 5),
        ({"batch_size": 50}, 1),
    ],
)
def test_a_run_is_as_long_as_asked_for(tmp_path: Path, options: dict, steps: int) -> None:
    assert arguments(tmp_path, **options).max_steps == steps


def test_an_epoch_is_shared_out_among_the_processes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(told.processes, "count", lambda: 3)
    # 50 rows are 17 a process, so 5 batches of 4
    assert arguments(tmp_path, batch_size=4).max_steps == 5


def test_what_is_asked_for_reaches_the_trainer(tmp_path: Path) -> None:
    asked = {"learning_rate": 3e-4, "accumulation": 3, "max_steps": 10, "seed": 7}
    found = arguments(tmp_path, **asked, warmup=0.25, evaluations=4)
    assert (found.learning_rate, found.gradient_accumulation_steps) == (3e-4, 3)
    # none of the steps is left out of either
    assert (found.warmup_steps, found.eval_steps, found.seed) == (3, 3, 7)
    assert found.eval_on_start
    assert arguments(tmp_path, max_steps=3, evaluations=8).eval_steps == 1
    again = arguments(tmp_path, max_steps=3, save_steps=2, resume=True)
    assert not again.eval_on_start and again.save_steps == 2


def split(folder: Path, count: int, **options: Any) -> tuple[list[Any], list[Any], str]:
    """Rows to train on and held out of a dataset without a split, and what is told."""
    said = io.StringIO()
    given = (
        "here",
        checked(count),
        None,
        tiny.model(),
        tiny.tokenizer(),
        Console(file=said, width=200),
    )
    train, held_out = tokenize_rows(job(folder, **options), *given)
    return train, held_out, said.getvalue()


def checked(count: int) -> list[Any]:
    return [check_row(row, f"row {i}") for i, row in enumerate(tiny.text_rows(count))]


def as_text(rows: list[Any]) -> list[tuple[int, ...]]:
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [tuple(i for name in columns for i in (*row[name].tolist(), -1)) for row in rows]


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    train, held_out, said = split(tmp_path, 40, eval_fraction=0.25)
    every = as_text(tiny.token_rows(40))
    assert len(held_out) == 10 and sorted(as_text(train + held_out)) == sorted(every)
    # neither the first rows nor the last, and others with another seed
    assert as_text(held_out) not in (every[:10], every[-10:])
    assert as_text(split(tmp_path, 40, eval_fraction=0.25)[1]) == as_text(held_out)
    assert as_text(split(tmp_path, 40, eval_fraction=0.25, seed=1)[1]) != as_text(held_out)
    lengths = [len(row[name]) for row in train for name in ("chosen_ids", "rejected_ids")]
    assert f"{sum(lengths) / len(lengths):.0f} tokens a response" in said


def test_one_row_at_least_is_held_out(tmp_path: Path) -> None:
    train, held_out, _ = split(tmp_path, 5, eval_fraction=0.01)
    assert (len(train), len(held_out)) == (4, 1)


def test_rows_are_no_longer_than_the_model_can_read(tmp_path: Path) -> None:
    said = io.StringIO()
    given = (checked(8), None, tiny.model(max_position_embeddings=6), tiny.tokenizer())
    train, held_out = tokenize_rows(job(tmp_path), "here", *given, Console(file=said))
    longest = max(
        len(row["prompt_ids"]) + len(row[name])
        for row in train + held_out
        for name in ("chosen_ids", "rejected_ids")
    )
    assert longest == 6


@pytest.mark.parametrize(
    ("dtype", "asked", "cpu", "expected"),
    [
        ("float32", "auto", False, "bfloat16"),
        ("float32", "auto", True, "none"),
        # half precision is computed in as it is
        ("float16", "auto", False, "none"),
        ("float16", "bfloat16", False, "bfloat16"),
    ],
)
def test_autocast_is_for_full_precision_on_a_gpu_that_has_it(
    tmp_path: Path, monkeypatch, dtype: Any, asked: Any, cpu: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert told._autocast(job(tmp_path, dtype=dtype, autocast=asked), cpu) == expected


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_output_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch, error: Any) -> None:
    output, folder, staging = (tmp_path / name for name in ("out", "model", "staging"))
    for each in (output, folder, staging):
        each.mkdir()
    (output / "kept").touch()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == folder:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        publish(folder, output, staging)
    assert (output / "kept").is_file()


def test_a_note_says_that_half_precision_loses_steps() -> None:
    said = io.StringIO()
    runs._tell_of_rounding(tiny.model(), Console(file=said))
    # as below adapters
    runs._tell_of_rounding(tiny.model().bfloat16().requires_grad_(False), Console(file=said))
    assert not said.getvalue()
    runs._tell_of_rounding(tiny.model().bfloat16(), Console(file=said, width=200))
    assert said.getvalue().startswith("note: weights trained in bfloat16 lose steps")


def test_the_end_is_evaluated_once(tmp_path: Path) -> None:
    log = [{"step": 2, "eval_loss": 1.0}, {"step": 4, "loss": math.pi}]
    trainer: Any = SimpleNamespace(state=SimpleNamespace(global_step=4, log_history=log))
    assert not runs.evaluated_at_the_end(trainer)
    log.append({"step": 4, "eval_loss": 0.5})
    assert runs.evaluated_at_the_end(trainer)


def test_checkpoints_are_those_of_steps_the_newest_first(tmp_path: Path) -> None:
    names = ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-2")
    for name in names:
        (tmp_path / "out-checkpoints" / name).mkdir(parents=True)
        (tmp_path / "out-checkpoints" / name / "trainer_state.json").touch()
    (tmp_path / "out-checkpoints" / "checkpoint-11").mkdir()
    found = [path.name for path in checkpoints._checkpoints(job(tmp_path).checkpoints)]
    assert found == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]


def test_a_run_goes_on_with_as_many_processes_as_wrote_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "out-checkpoints" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    for rank in (0, 1):
        torch.save({}, folder / f"rng_state_{rank}.pth")
    assert checkpoints.to_resume(folder.parent, Pairs(), 2) == str(folder)
    for processes in (1, 3):
        with pytest.raises(ValueError, match=rf"resume: expected a checkpoint of {processes} proc"):
            checkpoints.to_resume(folder.parent, Pairs(), processes)


# arguments of transformers.TrainingArguments


def test_further_arguments_reach_the_trainer_in_the_place_of_defaults(tmp_path: Path) -> None:
    plain = arguments(tmp_path)
    assert (plain.lr_scheduler_type, plain.warmup_steps, plain.max_grad_norm) == ("cosine", 1, 1.0)
    asked = {
        "optim": "adafactor",
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": '{"num_cycles": 2}',
        "warmup_steps": 3,
        "weight_decay": 0.5,
    }
    found = arguments(tmp_path, training=asked)
    assert (found.optim, found.lr_scheduler_type) == ("adafactor", "cosine_with_restarts")
    assert (found.lr_scheduler_kwargs, found.warmup_steps) == ({"num_cycles": 2}, 3)
    assert found.weight_decay == 0.5


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"num_train_epochs": 2.0}, "num_train_epochs: expected epochs in its place, .*, got 2.0"),
        (
            {"fsdp": "full_shard"},
            "fsdp: expected left out, as fusedpo train cannot serve it, got 'full_shard'",
        ),
        ({"optimm": "sgd"}, "training: .*, got 'optimm'; did you mean 'optim'"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            r"training: expected arguments .*, got lr_scheduler_type=.* \(.*min_lr",
        ),
        (
            {"optim": "adam"},
            r"training: expected arguments .*, got optim='adam' \(adam",
        ),
        (
            {"optim": "lomo"},
            r"training: expected arguments .*, got optim='lomo' \(.*lomo",
        ),
    ],
)
def test_arguments_that_cannot_be_served_are_refused(
    tmp_path: Path, training: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        arguments(tmp_path, training=training)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": {"optim": "lomo"}}, r"training: .*, got optim='lomo' \(.*lomo"),
        (
            {"training": {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}},
            r"training: .*, got optim='galore_adamw', .*galore",
        ),
        (
            {"training": {"lr_scheduler_type": "cosine_with_min_lr"}},
            r"training: .*, got lr_scheduler_type=.* \(.*min_lr",
        ),
        ({"adapters": AdapterSettings(lora_rank=2)}, "adapters need peft, which is not installed"),
        (
            {"adapters": AdapterSettings(lora_rank=2, quantize="8bit")},
            "adapters need peft, which is not installed",
        ),
    ],
)
def test_what_is_not_installed_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    tiny.save(tmp_path / "model")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: find(name, *more) if name != "peft" else None,
    )
    for name in ("read_rows", "load_model"):
        monkeypatch.setattr(runs, name, lambda *anything: pytest.fail("was read"))
    asked = TrainJob(str(tmp_path / "model"), "rows.jsonl", tmp_path / "out", SimPO(), **options)
    with pytest.raises((ValueError, ImportError), match=f"^{message}"):
        runs.run(asked)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_name": "first"}, "run_name: expected none without report_to, .*, got 'first'; set"),
        (
            {"training": {"save_total_limit": 2}},
            "save_total_limit: expected none without save_steps, .*, got 2; set",
        ),
        ({"training": {"metric_for_best_model": "loss"}}, "metric_for_best_model: expected none"),
        ({"training": {"project": "mine"}}, "project: expected none without report_to"),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        job(tmp_path, **options)
    assert job(tmp_path, save_steps=3, report_to=["wandb"], **options)
