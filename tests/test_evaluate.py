"""``fusedpo evaluate``: the numbers of a run's last evaluation, from what the run has saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from rich.console import Console

from fusedpo.cli import main
from fusedpo.data.reading import load
from fusedpo.losses import DPO, SimPO
from fusedpo.trainers import evaluation
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.evaluation import evaluate

SHORT = "--cpu --batch-size 4 --eval-fraction 0.2 --seed 3"
TRAIN = "--max-steps 3 --evaluations 1 --learning-rate 1e-2"
# by name: options of both commands, of training, and of evaluation
RUNS = {
    "simpo": ("--loss simpo --beta 3", "", ""),
    "dpo": ("--loss dpo", "", "--reference {base}"),
    "adapter": ("--loss dpo", "--lora-rank 4", ""),
    "kto": ("--loss kto --dataset {kto}", "", "--reference {base}"),
    "grpo": ("--loss grpo --group-size 8 --max-new-tokens 12", "--learning-rate 1", ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluate")
    tiny.save(made / "model", initializer_range=0.02)
    (made / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (made / "bare" / name).write_bytes((made / "model" / name).read_bytes())
    for name, rows in (("pairs", tiny.text_rows(40)), ("kto", tiny.response_rows(40))):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def command(folder: Path, name: str, model: str, words: str) -> int:
    places = {"base": folder / "model", "bare": folder / "bare", "kto": folder / "kto.jsonl"}
    told = f"--dataset {folder / 'pairs.jsonl'} --model {folder / model} {words}"
    return main([name, *told.format(**places).split()])


def printed(text: str) -> dict[str, float]:
    """The metrics in what the command has printed, a line each."""
    lines = (line.split() for line in text.splitlines() if line.startswith("  eval_"))
    return {name: float(value) for name, value in lines}


@pytest.mark.parametrize("name", RUNS)
def test_it_has_the_numbers_of_the_last_evaluation(name: str, folder: Path, capsys: Any) -> None:
    both, training, evaluation = RUNS[name]
    to = f"--output {folder / name}"
    assert command(folder, "train", "model", f"{SHORT} {both} {TRAIN} {training} {to}") == 0
    log = json.loads((folder / name / "metrics.json").read_text())["log"]
    first, *_, last = (e for e in log if "eval_loss" in e or "eval_reward" in e)
    capsys.readouterr()
    assert command(folder, "evaluate", name, f"{SHORT} {both} {evaluation}") == 0
    found = printed(capsys.readouterr().out)
    of_time = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert found.keys() == {k for k in last if k.startswith("eval_") and k not in of_time}
    # six digits are printed
    assert found == pytest.approx({key: last[key] for key in found}, rel=1e-5)
    assert any(found[key] != pytest.approx(first[key], rel=1e-3) for key in found)


def test_all_rows_are_evaluated_on_unless_a_fraction_is_asked_for(folder: Path) -> None:
    said = io.StringIO()
    job = TrainJob(
        str(folder / "model"), str(folder / "pairs.jsonl"), Path(), SimPO(), cpu=True, batch_size=4
    )
    metrics = evaluate(job, console=Console(file=said))
    assert ", 40 pairs on cpu" in said.getvalue() and "eval_rewards/accuracies" in metrics
    assert "pairs.jsonl, 40 pairs to evaluate on, " in " ".join(said.getvalue().split())
    evaluate(job, split=True, console=Console(file=said))
    assert ", 2 pairs on cpu" in said.getvalue()
    assert "pairs.jsonl, 2 pairs to evaluate on, " in " ".join(said.getvalue().split())
    assert "to train on" not in said.getvalue()


def test_one_row_is_enough(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(tiny.text_rows(1)[0]))
    job = TrainJob(
        str(folder / "model"), str(tmp_path / "one.jsonl"), Path(), SimPO(), cpu=True, batch_size=4
    )
    quiet = Console(quiet=True)
    assert evaluate(job, split=True, console=quiet) == evaluate(job, console=quiet)


@pytest.mark.parametrize("splits", [("test",), ("validation", "more"), ("prefs",)])
def test_a_dataset_of_held_out_rows_alone_is_evaluated_on(
    splits: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """Of one split whatever it is called; of several the one that is held out."""
    rows = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    own = {name: rows.select(range(6)) if i == 0 else rows for i, name in enumerate(splits)}
    datasets.DatasetDict(own).save_to_disk(tmp_path / "held-out")
    given = (str(folder / "model"), str(tmp_path / "held-out"), Path(), SimPO())
    job = TrainJob(*given, cpu=True, batch_size=4)
    said = io.StringIO()
    found = evaluate(job, console=Console(file=said, width=200))
    assert "6 pairs to evaluate on" in said.getvalue() and "layout: TRL" in said.getvalue()
    # there is nothing to take a fraction of
    assert evaluate(job, split=True, console=Console(quiet=True)) == found
    with pytest.raises(ValueError, match=r"expected a split named train, got .*; save the split"):
        load(job.dataset)


def test_of_several_splits_one_has_to_be_held_out(folder: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    datasets.DatasetDict({"one": rows, "two": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"expected a split named train or test, got one, two;"):
        load(str(tmp_path / "splits"), to_train=False)


def test_below_an_adapter_over_8_bits_is_its_reference(folder: Path, monkeypatch: Any) -> None:
    """No copy of the adapter is made, which such weights would not share."""
    words = f"{SHORT} --loss dpo --lora-rank 4 {TRAIN} --output {folder / 'below'}"
    assert command(folder, "train", "model", words) == 0
    job = TrainJob(str(folder / "below"), str(folder / "pairs.jsonl"), Path(), DPO(), cpu=True)
    whole = evaluate(job, console=Console(quiet=True))
    load = evaluation.load_model

    def of_few_bits(job: TrainJob) -> Any:
        model, tokenizer = load(job)
        model.get_base_model().is_loaded_in_8bit = True
        return model, tokenizer

    monkeypatch.setattr(evaluation, "load_model", of_few_bits)
    assert evaluate(job, console=Console(quiet=True)) == whole
    assert whole["eval_rewards/margins"] != 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--loss dpo", "reference: expected the model that training began with, which DPO comp"),
        ("--loss simpo --reference {base}", "reference: expected none, as SimPO is evaluated wi"),
        ("--loss sapo", "loss: expected one of rows that stay, got SelfAugmented"),
        ("--max-length 0", "max_length: expected at least 2, got 0"),
        ("--loss dpo --reference {base}/no", "evaluate: error: reference: expected a folder that"),
        ("--loss dpo --reference {bare}", "evaluate: error: reference: expected a tokenizer besid"),
        ("--quantize 8bit", "quantize: expected none without adapters, as weights of few bits"),
        ("--learning-rate 1", "unknown argument --learning-rate"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: str, message: str, folder: Path, capsys: Any
) -> None:
    assert command(folder, "evaluate", "model", words) == 2
    assert message in capsys.readouterr().err


def test_a_model_does_not_differ_from_itself(folder: Path) -> None:
    model = str(folder / "model")
    job = TrainJob(model, str(folder / "pairs.jsonl"), Path(), DPO(), cpu=True)
    assert evaluate(job, model, console=Console(quiet=True))["eval_rewards/margins"] == 0
