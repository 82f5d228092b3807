"""The command: a run from files to a saved model, and one line for every mistake."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from repository import heed_interrupts
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import fusedpo.commands.losses
from fusedpo import losses
from fusedpo.catalogue import table
from fusedpo.cli import main
from fusedpo.recipes import stdlib_pairs
from fusedpo.trainers import inputs
from fusedpo.trainers import output as outputs
from fusedpo.trainers import run as runs
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.methods.sampled import Sampled
from fusedpo.trainers.methods.two_contexts import TwoContexts
from fusedpo.trainers.rows import check_row, tokenize
from fusedpo.trainers.run import run
from fusedpo.trainers.transformers import PreferenceTrainer

OUTPUT_FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "metrics.json",
    "training.png",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and rows to learn from."""
    path = tmp_path_factory.mktemp("cli")
    tiny.save(path / "model", initializer_range=0.02)
    rows = [json.dumps(row) for row in tiny.text_rows(240)]
    (path / "pairs.jsonl").write_text("\n".join(rows))
    return path


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        *("train", "--cpu", "--model", str(folder / "model")),
        *("--dataset", str(folder / "pairs.jsonl"), "--output", str(output)),
        *more,
    ]


def quick(*more: str) -> list[str]:
    return ["--max-steps", "3", "--batch-size", "4", "--evaluations", "1", *more]


LEARN = "--learning-rate 5e-3 --max-steps 40 --batch-size 16 --eval-fraction 0.2 --evaluations 4"


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    output = folder / "trained"
    code = main(arguments(folder, output, *LEARN.split(), "--beta", "2.5", "--loss", "simpo"))
    assert code == 0
    return output


def held_out(metrics: dict) -> list[dict]:
    return [entry for entry in metrics["log"] if "eval_loss" in entry]


def test_training_improves_held_out_pairs(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    first, *_, last = held_out(metrics)
    assert [entry["step"] for entry in held_out(metrics)] == [0, 10, 20, 30, 40]
    assert last["eval_loss"] < 0.8 * first["eval_loss"]
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"] + 0.5
    assert last["eval_rewards/accuracies"] >= 0.9
    assert metrics["loss"].startswith("SimPO(beta=2.5, gamma=0.5")
    assert (metrics["training_pairs"], metrics["held_out_pairs"]) == (192, 48)


def test_saved_model_is_loaded_by_transformers_and_is_the_trained_one(trained, folder, tmp_path):
    assert {path.name for path in trained.iterdir()} >= OUTPUT_FILES
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    rows = [check_row(json.loads(line), f"{i}") for i, line in enumerate(lines)]
    every = tokenize(rows, tokenizer, 64).rows
    # held out as the run does it
    random.Random(0).shuffle(every)
    subject = PreferenceTrainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=16),
        loss=losses.SimPO(beta=2.5),
        processing_class=tokenizer,
        eval_dataset=every[:48],
    )
    last = held_out(json.loads((trained / "metrics.json").read_text()))[-1]
    assert subject.evaluate()["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-6)


def test_nothing_but_the_output_is_left(trained, folder):
    assert {path.name for path in folder.iterdir()} >= {"model", "pairs.jsonl", "trained"}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_run_is_replaced_by_the_next_one_and_repeats_it(folder, tmp_path):
    output = tmp_path / "out"
    weights = []
    for _ in range(2):
        assert main(arguments(folder, output, *quick())) == 0
        weights.append(AutoModelForCausalLM.from_pretrained(output).lm_head.weight)
    assert torch.equal(*weights)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_reference_memory_budget_and_comparison(folder, tmp_path):
    more = quick("--loss", "dpo", "--memory-budget", "1MiB", "--compare")
    assert main(arguments(folder, tmp_path / "out", *more)) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert held_out(metrics)[0]["eval_loss"] == pytest.approx(0.6931472, rel=1e-6)
    ways = metrics["comparison"]["ways"]
    assert metrics["comparison"]["memory_budget"] == 2**20
    assert len({round(way["loss"], 5) for way in ways.values()}) == 1
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_chat_messages_from_a_saved_dataset(folder, tmp_path):
    rows = [
        {
            "chosen": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["chosen"]},
            ],
            "rejected": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["rejected"]},
            ],
        }
        for row in tiny.text_rows(12)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    command = arguments(folder, tmp_path / "out", *quick())
    command[command.index("--dataset") + 1] = str(tmp_path / "rows")
    assert main(command) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_dataset_that_holds_rows_out_is_evaluated_on_those(folder, tmp_path):
    """All of the others are trained on; the numbers are those of a trainer on the held-out rows."""
    rows, held = tiny.text_rows(12), tiny.text_rows(5, seed=1)
    data = {"train": rows, "test": held}
    splits = {name: datasets.Dataset.from_list(each) for name, each in data.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "rows"))
    command = arguments(folder, tmp_path / "out", *quick())
    command[command.index("--dataset") + 1] = str(tmp_path / "rows")
    assert main(command) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["training_pairs"], metrics["held_out_pairs"]) == (12, 5)
    subject = PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        TrainingArguments(str(tmp_path), use_cpu=True),
        loss=losses.SimPO(),
        processing_class=tiny.tokenizer(),
        eval_dataset=tiny.token_rows(5, seed=1),
    )
    found = held_out(metrics)[0]["eval_loss"]
    assert subject.evaluate()["eval_loss"] == pytest.approx(found, rel=1e-6)


class Stopping(TrainerCallback):
    """A tracker that ends a run early, as one does whose sweep has seen enough."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize(
    ("more", "steps"), [(("--evaluations", "2"), [0, 2, 3]), (("--report-to", "stopping"), [0, 2])]
)
def test_the_end_is_evaluated_wherever_it_falls(folder, tmp_path, monkeypatch, more, steps):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "stopping", Stopping)
    assert main(arguments(folder, tmp_path / "out", *quick(*more))) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [entry["step"] for entry in held_out(metrics)] == steps


@pytest.fixture
def small_library(monkeypatch) -> Iterator[None]:
    """The demonstration's text is that of a part of the standard library, which is read sooner."""
    part = Path(sysconfig.get_path("stdlib"), "email")
    read = functools.partial(stdlib_pairs.read_passages, part)
    monkeypatch.setattr(stdlib_pairs, "read_passages", read)
    inputs.demo_passages.cache_clear()
    yield
    inputs.demo_passages.cache_clear()


DEMO = ["train", "--cpu", "--model", "demo", "--dataset", "demo", "--batch-size", "8"]


def test_the_demonstration_trains_saves_and_compares(small_library, tmp_path, capsys):
    output = tmp_path / "out"
    more = ["--max-steps", "2", "--evaluations", "1", "--loss", "simpo", "--output", str(output)]
    assert main([*DEMO, *more]) == 0
    told = capsys.readouterr().out
    assert "model: LlamaForCausalLM demo" in told and "dataset: the standard library" in told
    assert f"saved: {output / 'comparison.png'}" in told
    assert {path.name for path in output.iterdir()} >= {*OUTPUT_FILES, "comparison.png"}
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["training_pairs"] > 100 and metrics["held_out_pairs"] > 10
    first, last = held_out(metrics)
    assert (first["step"], last["step"]) == (0, 2)
    # random weights tell nothing apart: -log sigmoid(-gamma), gamma = 0.5
    assert first["eval_loss"] == pytest.approx(0.974077, rel=1e-2)
    assert last["eval_loss"] != first["eval_loss"]
    ways = metrics["comparison"]["ways"]
    assert len(ways) > 1 and len({round(way["loss"], 4) for way in ways.values()}) == 1
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(output))


@pytest.mark.holds(46)
def test_resuming_equals_going_on(folder, tmp_path, capsys):
    more = quick("--save-steps", "2")
    assert main(arguments(folder, tmp_path / "whole", *more)) == 0
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").lm_head.weight
    checkpoints = tmp_path / "whole-checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    # as after an interruption, the second one incomplete
    (checkpoints / "checkpoint-3" / "trainer_state.json").unlink()
    assert "going on from" not in capsys.readouterr().out
    assert main(arguments(folder, tmp_path / "whole", *more, "--resume")) == 0
    told = "".join(capsys.readouterr().out.split())
    assert f"goingonfrom:{checkpoints / 'checkpoint-2'}" in told
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").lm_head.weight
    assert torch.equal(resumed, weights)


def test_dropped_and_truncated_rows_are_counted(folder, tmp_path, capsys):
    rows = [*tiny.text_rows(12), {"prompt": "red", "chosen": "", "rejected": " blue"}]
    rows[3]["prompt"] = "red " * 80
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = arguments(folder, tmp_path / "out", *quick())
    command[command.index("--dataset") + 1] = str(tmp_path / "pairs.jsonl")
    assert main(command) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "dropped: 1 of 13 rows have an empty response (the first:" in told
    assert "pairs.jsonl line 13)" in told
    assert "truncated: 1 of 13 rows are longer than 64 tokens" in told


# mistakes


MISTAKES = {
    "unknown loss": (["--loss", "simpoo"], "loss: expected one of .*; did you mean 'simpo'"),
    "batch without mismatched rows": (
        ["--loss", "kto", "--batch-size", "1"],
        "batch_size: expected at least 2, as KTO sets each prompt .* got 1; raise it, or take KTO",
    ),
    "pairs for single responses": (
        ["--loss", "kto"],
        "expected single responses, each with a label, got TRL .* rows, which are pairs of a",
    ),
    "accumulated samples": (
        ["--loss", "sspo", "--accumulation", "2"],
        "accumulation: expected 1 for a loss of sampled responses, got 2; set batch_size",
    ),
    "loss option out of range": (["--beta", "-1"], "beta: expected a number above 0, got -1"),
    "loss option of another kind": (["--beta", "x"], "error: --beta: expected a number, got 'x'"),
    "negative in another notation": (
        ["--learning-rate", "-1e-3"],
        "learning_rate: expected a number above 0, got -0.001",
    ),
    "no value": (["--beta"], "error: --beta: expected one argument"),
    "choice": (["--dtype", "fp16"], "error: --dtype: expected one of .*; did you mean 'float16'"),
    "option of another loss": (
        ["--loss", "dpo", "--gamma", "1"],
        r"unknown argument --gamma \(see fusedpo train --loss dpo --help\)",
    ),
    "misspelt option": (
        ["--max-step", "3"],
        r"unknown argument --max-step; did you mean --max-steps( or --[^_]+)?\? ",
    ),
    "option by its initials": (["--lr", "1"], "argument --lr; did you mean --learning-rate or --"),
    "budget": (["--memory-budget", "lots"], "memory_budget: expected a number of bytes"),
    "budget too small": (["--memory-budget", "100"], "memory_budget: expected at least"),
    "tolerance": (["--gradient-tolerance", "1e-6"], "gradient_tolerance: expected 0 .exact.,"),
    "tolerance that is none": (["--gradient-tolerance", "x"], "expected a number, got 'x'"),
    "no steps": (["--max-steps", "0"], "max_steps: expected at least 1, got 0"),
    "no file": (["--dataset", "none.jsonl"], "dataset: expected a file, .*, which does not exist"),
    "no model": (["--model", "./none"], "model: expected a folder .*, which is not a folder"),
    "no rows that fit": (["--max-length", "0"], "error: max_length: expected at least 2, got 0"),
    "all held out": (
        ["--eval-fraction", "0.999"],
        r"got 0 and \d+ in .*; add rows, lower eval_fraction, which is 0.999, or",
    ),
    "no checkpoint": (["--resume"], "resume: expected a checkpoint in .*, got none"),
    "tracker": (["--report-to", "wandbb"], "report_to: expected one of .*did you mean 'wandb'"),
    "second tracker": (["--report-to", "none,x"], "report_to: expected one of .* got 'x'"),
    "fraction": (["--eval-fraction", "1"], "eval_fraction: expected a number between 0 and 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, folder, tmp_path, capsys):
    more, message = MISTAKES[name]
    try:
        code = main(arguments(folder, tmp_path / "out", *quick(), *more))
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("fusedpo train: error: ") and error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "dataset: expected at least one row, got none in"),
        ('{"prompt": "a", "chosen": "b"}\n', "columns of a layout: .*: --columns rejected=COLUMN"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n',
            "line 2: expected the columns .*rejected is missing",
        ),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"pro',
            "line 2: expected a JSON object",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "one to hold out, got 0 and 1"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "\\ud83d"}\n',
            r"line 1, rejected: expected text of whole characters, got half of .* '\\ud83d'",
        ),
    ],
)
def test_a_bad_dataset_is_one_line_and_exit_code_2(content, message, folder, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(content)
    command = arguments(folder, tmp_path / "out", *quick())
    command[command.index("--dataset") + 1] = str(tmp_path / "pairs.jsonl")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_the_demonstration_has_weights_of_the_dtype_that_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(
        inputs, "demo_passages", lambda seed: ([stdlib_pairs.Passage("", "red")], [])
    )
    job = TrainJob("demo", "demo", tmp_path / "out", losses.SimPO(), dtype="bfloat16")
    model, _ = inputs.load_model(job)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_with_the_row(
    folder, tmp_path, capsys
):
    tiny.save(tmp_path / "model", vocab_size=290)
    command = arguments(folder, tmp_path / "out", *quick())
    command[command.index("--model") + 1] = str(tmp_path / "model")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(r"pairs.jsonl line \d+: expected tokens in \[0, 290\), of which", error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(68)
def test_a_folder_of_something_else_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert main(arguments(folder, tmp_path / "out", *quick())) == 2
    assert "output: expected a new folder, or one of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_an_output_that_is_a_file_stays_one(folder, tmp_path, capsys):
    output = tmp_path / "out"
    output.write_text("years of work")
    assert main(arguments(folder, output, *quick())) == 2
    assert capsys.readouterr().err == (
        f"fusedpo train: error: output: expected a folder to make, got {output}, which is a file; "
        "choose another name\n"
    )
    assert output.read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "reason"), [("file/out", "File exists"), ("file/new/out", "Not a directory")]
)
def test_an_output_below_a_file_is_refused(folder, tmp_path, capsys, name, reason):
    (tmp_path / "file").touch()
    assert main(arguments(folder, tmp_path / name, *quick())) == 2
    assert capsys.readouterr().err == (
        "fusedpo train: error: output: expected a folder that can be made, "
        f"got {tmp_path / name} ({reason})\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_rename_that_fails_puts_back_what_was_there(tmp_path, earlier):
    output, staging = tmp_path / "out", tmp_path / "staging"
    staging.mkdir()
    if earlier:
        output.mkdir()
        (output / "metrics.json").write_text("of the run before")
    with pytest.raises(FileNotFoundError):
        outputs.publish(staging / "was never written", output, staging)
    assert output.exists() == earlier
    assert not list(staging.iterdir())
    if earlier:
        assert (output / "metrics.json").read_text() == "of the run before"


def test_a_folder_without_a_model_is_refused(folder, tmp_path, capsys):
    command = arguments(folder, tmp_path / "out", *quick())
    command[command.index("--model") + 1] = str(folder)
    assert main(command) == 2
    assert "model: expected a folder with a config.json" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(folder, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        return torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", broken)
    with pytest.raises(RuntimeError):
        main(arguments(folder, tmp_path / "out", *quick()))
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(61)
def test_missing_packages_are_named_with_the_extra(folder, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name)
    )
    assert main(arguments(folder, tmp_path / "out", *quick())) == 2
    assert "datasets, which is not installed: pip install 'fusedpo[demo]'" in (
        capsys.readouterr().err
    )


def told_by_help(*words, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*words, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [["--model", "./none"], ["--max-length", "0"], ["--loss", "grpo", "--reward", "no:such"]],
    ids=" ".join,
)
def test_what_can_be_refused_is_refused_before_rows_are_read(
    more, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(inputs, "load", lambda *_, **__: pytest.fail("rows were read"))
    assert main(arguments(folder, tmp_path / "out", *quick(), *more)) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--eval-fraction", "0.999"], ["--dataset", "one"]], ids=" ".join)
def test_too_few_rows_are_refused_before_the_model_is_loaded(
    more, folder, tmp_path, monkeypatch, capsys
):
    if "one" in more:
        (tmp_path / "one.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        more = ["--dataset", str(tmp_path / "one.jsonl")]
    monkeypatch.setattr(runs, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(arguments(folder, tmp_path / "out", *quick(), *more)) == 2
    assert "at least one row to train on and one to hold out" in capsys.readouterr().err


def test_help_says_beside_which_choice_an_option_has_an_effect(capsys):
    told = " ".join(told_by_help("train", "--loss", "s-sppo", capsys=capsys).split())
    assert "width of the bell, with repulsion gauss only (default: 1.0)" in told
    assert "--columns STR" in told and "--optim {adamw_torch," in told
    assert "%%" not in told


@pytest.mark.parametrize("name", sorted(losses.available()))
def test_every_loss_offers_its_hyperparameters(name, capsys):
    told = told_by_help("train", "--loss", name, capsys=capsys)
    assert f"the loss {losses.available()[name].__name__}:" in told
    assert "examples:" in told and "--memory-budget" in told
    assert re.search(rf"--loss NAME .*\b{name}\b.*; or sspo", " ".join(told.split()))


def test_examples_of_several_lines_keep_them(capsys):
    told = told_by_help("train", capsys=capsys)
    examples = told[told.index("examples:") :].splitlines()
    broken = [i for i, line in enumerate(examples) if line.endswith("\\")]
    assert len(broken) == 2
    for i in broken:
        assert examples[i + 1].startswith(" " * 8)
    assert not any(re.search(r"\S {3,}\S", line) for line in examples)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "command: expected one of 'train', .*, got 'trian'; did you mean 'train'"),
        (["--verison"], "unknown argument --verison; did you mean --version?"),
        # not of the command 'demo'
        (["--model", "demo"], "unknown argument --model "),
        (["--loss"], "unknown argument --loss "),
        (["env", "--budget", "-5MiB"], "unknown argument --budget "),
        (
            ["plan", "--model", "gpt2", "--budget", "-5MiB"],
            "--budget: expected a number of bytes .* got '-5MiB'",
        ),
        (["plan", "--hidden", "6.5"], "--hidden: expected a whole number, got '6.5'"),
        (["run", "train.py"], "got train.py; fusedpo run python train.py, for a script"),
    ],
)
def test_a_command_that_cannot_be_read_is_one_line(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.match(r"fusedpo( \w+)?: error: ", error) and error.count("\n") == 1, error
    assert re.search(message, error), error


def test_an_option_is_said_to_be_unknown_without_far_fetched_others(capsys):
    assert main(["evaluate", "--model", "m", "--dataset", "d", "--output", "o"]) == 2
    assert "unknown argument --output (see" in capsys.readouterr().err


def test_one_name_for_the_trackers_is_refused_from_python(tmp_path):
    with pytest.raises(ValueError, match=r"report_to: expected a sequence .* \['wandb'\]"):
        TrainJob("demo", "demo", tmp_path, losses.SimPO(), report_to="wandb")


class Weighted(losses.SimPO):
    """A loss with a column of its own."""

    inputs = types.MappingProxyType({"pair_weight": losses.Input("of the pair")})


JOBS = {
    "checkpoints": ({"save_steps": -1}, "save_steps: expected at least 0, got -1"),
    "seeds": ({"seed": -1}, "seed: expected at least 0, got -1"),
    "large seeds": ({"seed": 2**32}, "seed: expected below 2**32, got 4294967296"),
    "another loss's method": (
        {"method": TwoContexts()},
        f"loss: expected a ShortToLong, of a short and a long context, got {losses.SimPO()!r}",
    ),
    "another loss's samples": (
        {"method": Sampled()},
        f"loss: expected a policy loss, of sampled responses, got {losses.SimPO()!r}",
    ),
    "autocast": (
        {"autocast": "bf16"},
        "autocast: expected one of 'auto', 'none', 'bfloat16', 'float16', got 'bf16'; did you mean "
        "'bfloat16' or 'float16'?",
    ),
    "dtype": (
        {"dtype": "float8"},
        "dtype: expected one of 'auto', 'float32', 'bfloat16', 'float16', got 'float8'; did you "
        "mean 'float32' or 'float16' or 'bfloat16'?",
    ),
    "comparison": (
        {"loss": losses.get("s-sppo"), "compare": True},
        "compare: expected False with adapters, or with a loss of more than the dataset's own "
        "pairs, got True; leave it out",
    ),
    "prompts without responses": ({"max_length": 1}, "max_length: expected at least 2, got 1"),
    "rewards": (
        {"loss": losses.get("grpo"), "method": Sampled(reward="no_such:module")},
        'reward: expected "overlap", or module:function that can be imported, got '
        "'no_such:module' (No module named 'no_such')",
    ),
    "columns": (
        {"loss": Weighted()},
        "dataset: expected one with the columns pair_weight, which the loss takes, got 'demo'; "
        "name a dataset of your own",
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_cannot_be_done_is_refused_when_it_is_made(name, tmp_path):
    options, message = JOBS[name]
    with pytest.raises(ValueError) as error:
        TrainJob("demo", "demo", tmp_path, **{"loss": losses.SimPO(), **options})
    assert str(error.value) == message


OTHER_TYPES = {
    "model": (Path("model"), "a folder or a name, as text"),
    "dataset": (None, "a file, a folder or a name, as text"),
    "output": ("out", "a pathlib.Path"),
    "loss": ("simpo", "a loss, such as fusedpo.losses.SimPO()"),
    "method": ("sapo", "a Method, such as fusedpo.trainers.methods.Pairs()"),
    "adapters": ({"lora_rank": 4}, "an AdapterSettings"),
    "columns": ("prompt=question", "a mapping of names"),
    "training": (None, "a mapping of arguments by their names"),
    "report_to": (None, "a sequence of names"),
    "run_name": (3, "a name"),
    "cpu": ("no", "True or False"),
    "length_groups": ("yes", "True or False"),
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_a_field_of_a_job_has_its_type(name, tmp_path):
    value, expected = OTHER_TYPES[name]
    given = {"model": "demo", "dataset": "demo", "output": tmp_path, "loss": losses.SimPO()}
    message = f"^{name}: expected {re.escape(expected)}, got {re.escape(repr(value))}$"
    with pytest.raises(TypeError, match=message):
        TrainJob(**{**given, name: value})


@pytest.mark.parametrize("value", ["0.1", None])
def test_a_fraction_of_a_job_is_a_number(value, tmp_path):
    with pytest.raises(TypeError, match=r"^eval_fraction: expected a number, got "):
        TrainJob("demo", "demo", tmp_path, losses.SimPO(), eval_fraction=value)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 2.5}, {"max_steps": "2"}, {"seed": True}, {"seed": None}, {"max_length": "9"}],
)
def test_a_count_of_a_job_is_a_whole_number(options, tmp_path):
    with pytest.raises(TypeError, match=f"^{next(iter(options))}: expected a whole number, got "):
        TrainJob("demo", "demo", tmp_path, losses.SimPO(), **options)


def test_another_name_of_a_loss_trains_with_its_factor(folder, tmp_path):
    assert main(arguments(folder, tmp_path / "out", *quick("--loss", "sppo_hard"))) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["loss"] == repr(2.0 * losses.SPPO())
    # TRL's, while the policy is its reference: (0 - 1 / (2 beta))^2 + (0 + 1 / (2 beta))^2
    expected = 2 * (1 / (2 * losses.SPPO().beta)) ** 2
    assert held_out(metrics)[0]["eval_loss"] == pytest.approx(expected, rel=1e-6)


LAUNCHES = {
    "deepspeed": ([], {"ACCELERATE_USE_DEEPSPEED": "true"}, "FSDP, got DeepSpeed; leave"),
    "a reference": (["--loss", "dpo"], {"ACCELERATE_USE_FSDP": "true"}, "reference, got FSDP"),
    "samples": (["--loss", "sspo"], {"ACCELERATE_USE_FSDP": "true"}, "is trained on, got FSDP"),
    "own pairs": (["--loss", "sapo"], {"ACCELERATE_USE_FSDP": "true"}, "is trained on, got FSDP"),
    "logits": (["--compare"], {"ACCELERATE_USE_FSDP": "true"}, "compare: expected False"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_that_cannot_train_is_refused(name, folder, tmp_path, monkeypatch, capsys):
    more, variables, message = LAUNCHES[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert main(arguments(folder, tmp_path / "out", *quick(*more))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_whoever_reads_may_stop_as_head_does():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fusedpo", "losses"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_command_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "fusedpo", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("fusedpo ")


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "fusedpo train: interrupted; no incomplete output was left\n"),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_an_interruption_leaves_nothing_half_done(folder, tmp_path, number, code, message):
    """A real signal to a real process, once training is under way."""
    command = arguments(folder, tmp_path / "out", "--max-steps", "100000", "--evaluations", "10000")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fusedpo", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and "held-out" in line and not line.startswith("step      0"):
            break
    assert list(tmp_path.iterdir()), "the run writes beside its output first"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rank", "said"),
    [("0", "fusedpo losses: interrupted; no incomplete output was left\n"), ("1", "")],
)
def test_the_first_process_alone_tells_of_an_interruption(rank, said, monkeypatch, capsys):
    def interrupted(parsed):
        raise KeyboardInterrupt

    # of one process, so that there is nothing to agree on before
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(fusedpo.commands.losses, "run", interrupted)
    assert main(["losses"]) == 130
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_the_first_process_alone_prints_help(rank, prints, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        main(["losses", "--help"])
    assert left.value.code == 0
    assert ("usage: fusedpo losses" in capsys.readouterr().out) is prints


def test_a_command_runs_in_another_thread_than_the_main_one(capsys):
    """Where Python lets nobody handle signals."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["losses"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert capsys.readouterr().out.splitlines() == table()


def test_a_job_is_callable_from_python(folder, tmp_path):
    job = TrainJob(
        str(folder / "model"),
        str(folder / "pairs.jsonl"),
        tmp_path / "deep" / "out",
        losses.SimPO(),
        max_steps=2,
        cpu=True,
        gradient_checkpointing=True,
        dtype="bfloat16",
    )
    metrics = run(job)
    assert metrics == json.loads((tmp_path / "deep" / "out" / "metrics.json").read_text())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out", dtype="auto")
    assert saved.dtype == torch.bfloat16


def small_job(folder: Path, output: Path, **options) -> TrainJob:
    rows, loss = str(folder / "pairs.jsonl"), options.pop("loss", losses.SimPO())
    given = {"max_steps": 2, "batch_size": 4, "evaluations": 1, "cpu": True, **options}
    return TrainJob(str(folder / "model"), rows, output, loss, **given)


def test_a_job_may_run_in_a_thread_that_is_not_the_main_one(folder, tmp_path):
    """Signal handlers are the main thread's to set."""
    found = []
    job = small_job(folder, tmp_path / "out")
    thread = threading.Thread(target=lambda: found.append(run(job)))
    thread.start()
    thread.join()
    assert found == [json.loads((tmp_path / "out" / "metrics.json").read_text())]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("terminal", "width"), [(True, 70), (False, 120)])
def test_a_terminal_keeps_its_width_and_a_file_gets_one(folder, tmp_path, terminal, width):
    told = io.StringIO()
    console = Console(file=told, force_terminal=terminal, width=70)
    run(small_job(folder, tmp_path / "out"), console)
    assert console.width == width
    # a line of more than 70 characters
    whole = "saved: " + str(tmp_path / "out") + ", with training.png and metrics.json"
    assert len(whole) > 70
    assert (whole in told.getvalue()) == (len(whole) <= width)


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_autocast_is_what_the_job_says(folder, tmp_path, monkeypatch, autocast):
    seen = set()
    compute = PreferenceTrainer.functional

    def watched(*args, **options):
        seen.add(torch.is_autocast_enabled("cpu"))
        return compute(*args, **options)

    monkeypatch.setattr(PreferenceTrainer, "functional", staticmethod(watched))
    run(small_job(folder, tmp_path / "out", autocast=autocast))
    assert seen == {autocast == "bfloat16"}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == torch.float32


@pytest.fixture
def reset() -> Iterator[None]:
    """What accelerate keeps for the whole process is gone afterwards."""
    yield
    AcceleratorState._reset_state(True)


def test_under_fsdp_the_model_is_saved_whole_and_nothing_is_compared(
    small_library, tmp_path, monkeypatch, reset, capsys
):
    """By a trainer that says, once it has trained, that its checkpoints are of shards."""
    fit = runs.fit

    def sharded(job, trainer, *more):
        fit(job, trainer, *more)
        trainer.is_fsdp_enabled = True
        plugin = FullyShardedDataParallelPlugin(state_dict_type="SHARDED_STATE_DICT")
        trainer.accelerator.state.fsdp_plugin = plugin

    monkeypatch.setattr(runs, "fit", sharded)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main([*DEMO, "--max-steps", "1", "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "comparison: left out under FSDP, where no process has the whole head" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} >= OUTPUT_FILES
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "comparison" not in metrics
    names = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert "lm_head.weight" in names


def test_a_name_is_that_of_a_model_on_the_hub_whose_code_is_not_run(monkeypatch, tmp_path):
    asked = []

    def hub(kind):
        def load(name, **options):
            asked.append((kind, name, options))
            return kind

        return load

    for kind in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", hub(kind))
    job = TrainJob("owner/name", "demo", tmp_path / "out", losses.SimPO(), dtype="bfloat16")
    assert inputs.load_model(job) == (AutoModelForCausalLM, AutoTokenizer)
    refused = {"trust_remote_code": False}
    assert asked == [
        (AutoModelForCausalLM, "owner/name", {"dtype": torch.bfloat16, **refused}),
        (AutoTokenizer, "owner/name", refused),
    ]


def test_a_name_that_the_hub_does_not_have_is_refused_with_its_reason(monkeypatch, tmp_path):
    def hub(name, **options):
        raise OSError("no such model\nand more lines of it")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", hub)
    job = TrainJob("owner/nmae", "demo", tmp_path / "out", losses.SimPO())
    with pytest.raises(ValueError) as error:
        inputs.load_model(job)
    assert str(error.value) == (
        "model: expected a folder or a Hub name of a causal language model with its tokenizer, "
        "got 'owner/nmae' (no such model); check the spelling, and the network for a Hub name"
    )


def test_asking_for_help_imports_none_of_the_extras():
    code = (
        "import sys, fusedpo.cli; "
        "print(sorted({'transformers', 'datasets', 'tokenizers', 'matplotlib', 'rich'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
