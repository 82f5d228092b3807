"""The command on two processes: the numbers of one, one voice, and one end for all of them.

Most runs share two processes, which import everything once: this file is their program too. What a
launcher does (start, signals, a process that fails) is tested with torchrun and accelerate.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import integration_utils

from fusedpo.cli import main
from fusedpo.files import read_file
from fusedpo.trainers import processes, responses
from fusedpo.trainers.transformers import PreferenceTrainer

pytestmark = pytest.mark.xdist_group("launch")


class Tracker(TrainerCallback):
    """What transformers has for a tracker, writing lines to where the environment says."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            line = {**kwargs["logs"], "run": args.run_name, "step": state.global_step}
            with Path(os.environ["TRACKED"]).open("a") as file:
                file.write(json.dumps(line) + "\n")


class Missing(TrainerCallback):
    def __init__(self) -> None:
        raise RuntimeError("this one requires a package. Run `pip install package`.")


def register_trackers() -> None:
    integration_utils.INTEGRATION_TO_CALLBACK.update(stub=Tracker, missing=Missing)


def parity(row: Any, response: Sequence[int]) -> float:
    """A reward that responses of any model differ in."""
    return float(sum(response) % 7)


@dataclass
class Case:
    """A command; ``others`` replaces words of it on the second process."""

    command: list[str]
    others: dict[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()


STEPS = "--max-steps 6 --evaluations 2 --eval-fraction 0.2 --learning-rate 5e-3"
TWO = f"--batch-size 2 {STEPS}"
SAVED = f"{TWO} --save-steps"
METHODS = {
    "simpo": "--loss simpo",
    "dpo": "--loss dpo",
    "s-sppo": "--loss s-sppo",
    "solopo": "--loss solopo",
    "kto": "--loss kto",
    "sapo": "--loss sapo --base dpo --segment-length 3 --ref-every 3",
    "sspo": "--loss sspo --group-size 3 --max-new-tokens 5 --reward test_launch:parity",
}
# a mean over the tokens of all processes
METHODS["dapo"] = METHODS["sspo"].replace("sspo", "dapo").replace("tokens 5", "tokens 50")
# 2, 3 and 5 rows to hold out, by fraction: accelerate repeats some for the second process
UNEVEN = ("0.03", "0.04", "0.06")
ALIKE = ("simpo", "dpo", "s-sppo", "solopo", "kto")
# of models that were trained before; 5 rows are shared out unevenly
EVALUATIONS = {
    "evaluate simpo": "--model {simpo} --loss simpo --eval-fraction 0.06",
    "evaluate dpo": "--model {dpo} --reference {model} --loss dpo",
}


def command(folder: Path, output: str, words: str) -> list[str]:
    files = {"solopo": "contexts.jsonl", "kto": "responses.jsonl"}
    rows = next((file for name, file in files.items() if name in words), "pairs.jsonl")
    return [
        *("train", "--cpu", "--model", str(folder / "model")),
        *("--dataset", str(folder / rows), "--output", str(folder / output), *words.split()),
    ]


def evaluation(folder: Path, name: str, size: int) -> list[str]:
    places = {each: str(folder / each) for each in ("model", "simpo", "dpo")}
    words = EVALUATIONS[name].format(**places).split()
    of_rows = ("--dataset", str(folder / "pairs.jsonl"), "--batch-size", str(size))
    return ["evaluate", "--cpu", *words, *of_rows]


def cases(folder: Path) -> dict[str, Case]:
    def case(output: str, words: str, **more: Any) -> Case:
        return Case(command(folder, output, words), **more)

    def newest(output: str, kept: int, *files: str) -> tuple[str, ...]:
        """All checkpoints after one, and files of others."""
        later = [f"checkpoint-{step}" for step in range(kept + 1, 7)]
        return tuple(f"{output}-checkpoints/{name}" for name in (*later, *files))

    found = {name: case(name, f"{METHODS[name]} {TWO}") for name in ALIKE}
    for fraction in UNEVEN:
        found[fraction] = case(f"uneven{fraction}", TWO.replace("0.2", fraction))
    found["dapo"] = case("dapo", f"{METHODS['dapo']} {SAVED} 1 --max-steps 1")
    found["dpo"].command += ["--compare"]
    tracked = "--report-to stub --run-name tried"
    found["simpo"] = case("simpo", f"{METHODS['simpo']} {SAVED} 2 {tracked}")
    # of the two that are left, the newer one is not whole
    found["simpo again"] = case(
        "simpo",
        f"{METHODS['simpo']} {SAVED} 2 --resume",
        remove=newest("simpo", 4, "checkpoint-4/rng_state_1.pth"),
    )
    found["sapo"] = case("sapo", f"{METHODS['sapo']} {SAVED} 2")
    found["sapo again"] = case(
        "sapo",
        f"{METHODS['sapo']} {SAVED} 2 --resume",
        remove=newest("sapo", 4, "checkpoint-4/self_augmented/ahead-1.safetensors"),
    )
    # in the middle of the two updates on one batch of samples
    found["sspo"] = case("sspo", f"{METHODS['sspo']} {SAVED} 3")
    found["sspo again"] = case(
        "sspo", f"{METHODS['sspo']} {SAVED} 3 --resume", remove=newest("sspo", 3)
    )
    found |= {name: Case(evaluation(folder, name, 2)) for name in EVALUATIONS}
    model = str(folder / "model")
    compared = evaluation(folder, "evaluate dpo", 2)
    found["reference elsewhere"] = Case(compared, others={model: f"{model}/no"})
    for name, (words, _) in MISTAKES.items():
        found[name] = case("new", f"{METHODS['simpo']} {TWO} {words}")
    found["not a run"] = case("thesis", f"{METHODS['simpo']} {TWO}")
    found["model elsewhere"] = case("new", TWO, others={model: str(folder / "none")})
    found["rows elsewhere"] = case("new", TWO, others={"pairs.jsonl": "none.jsonl"})
    found["words elsewhere"] = case("new", TWO, others={"--max-steps": "--max-step"})
    found["fewer elsewhere"] = case("new", TWO, others={"pairs.jsonl": "fewer.jsonl"})
    found["bug elsewhere"] = case("new", TWO, others={"5e-3": "0.123"})
    return found


MISTAKES = {
    "unknown loss": ("--loss simpoo", "loss: expected one of .*; did you mean 'simpo'"),
    "unknown option": ("--gama 1", "unknown argument --gama; did you mean --gamma"),
    "no range": ("--beta -1", "beta: expected a number above 0, got -1"),
    "no model": ("--model ./none", "model: expected a folder .*, which is not a folder"),
    "no checkpoint": ("--resume", "resume: expected a checkpoint in .*, got none"),
    "unknown tracker": ("--report-to stubb", "report_to: expected one of .*did you mean 'stub'"),
    "missing tracker": ("--report-to missing", r"got 'missing' \(this one requires a package"),
}


# the two processes


def work(folder: Path, ports: list[int]) -> None:
    """Run every case; what came of it goes to RANK.json."""
    register_trackers()
    rank = int(os.environ["RANK"])
    if rank:
        leave = processes.leave
        processes.leave = lambda error: (time.sleep(0.5), leave(error))
    results = {}
    for (name, case), port in zip(cases(folder).items(), ports, strict=True):
        if rank == 0 and case.remove:
            output = folder / name.split()[0]
            shutil.copytree(output, f"{output}-whole")
            for path in case.remove:
                remove(folder / path)
        os.environ.update(MASTER_PORT=str(port), TRACKED=str(folder / f"{name}.tracked"))
        words = case.command
        if rank:
            for old, new in case.others.items():
                words = [word.replace(old, new) for word in words]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bug_at(0.123):
            code = outcome(words)
        told = {"out": out.getvalue(), "err": err.getvalue(), "ended": time.monotonic()}
        results[name] = {"code": code, **told}
        processes.disconnect()
    (folder / f"{rank}.json").write_text(json.dumps(results))


def outcome(words: list[str]) -> int | str:
    try:
        return main(words)
    except SystemExit as exit:
        return int(exit.code or 0)
    except Exception:
        return traceback.format_exc()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def bug_at(learning_rate: float) -> Iterator[None]:
    """A trainer that cannot be made at this learning rate."""
    make = PreferenceTrainer.__init__

    def broken(self: Any, model: Any, args: Any, **options: Any) -> None:
        if args.learning_rate == learning_rate:
            torch.zeros(2) @ torch.zeros(3)
        make(self, model, args, **options)

    PreferenceTrainer.__init__ = broken
    try:
        yield
    finally:
        PreferenceTrainer.__init__ = make


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


# what came of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows to learn from."""
    path = tmp_path_factory.mktemp("launch")
    tiny.save(path / "model", initializer_range=0.02)
    rows = tiny.text_rows(80)
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "fewer.jsonl").write_text("\n".join(map(json.dumps, rows[:40])))
    contexts = [
        {
            "context": row["prompt"],
            "long_context": f"sun moon star {row['prompt']}",
            "instruction": " red",
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in rows
    ]
    (path / "contexts.jsonl").write_text("\n".join(map(json.dumps, contexts)))
    (path / "responses.jsonl").write_text("\n".join(map(json.dumps, tiny.response_rows(80))))
    (path / "thesis").mkdir()
    (path / "thesis" / "thesis.txt").write_text("years of work")
    return path


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By case, what each of two processes ended with."""
    ports = free_ports(len(cases(folder)))
    program = [sys.executable, __file__, str(folder), *map(str, ports)]
    processes = [
        subprocess.Popen(
            program,
            env=environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="localhost"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, error = process.communicate(timeout=240)
            assert process.returncode == 0, error[-3000:]
    finally:
        for process in processes:
            process.kill()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [each[name] for each in found] for name in found[0]}


def environment(**more: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[1])
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": root,
        **{name: str(value) for name, value in more.items()},
    }


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def numbers(output: Path) -> list[dict[str, float]]:
    """The log without what depends on the clock or on padding."""
    return [
        {
            name: value
            for name, value in entry.items()
            if not re.search("runtime|per_second|flos", name)
        }
        for entry in metrics(output)["log"]
    ]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def ended(runs: dict[str, Any], name: str) -> list[int | str]:
    return [each["code"] for each in runs[name]]


@pytest.mark.parametrize("name", [*METHODS, "simpo again", "sapo again", "sspo again"])
def test_a_run_ends_well_and_the_first_process_alone_speaks(runs, folder, name):
    assert ended(runs, name) == [0, 0], runs[name]
    first, second = runs[name]
    assert "saved: " in first["out"] and "2 processes" in " ".join(first["out"].split())
    assert second["out"] == ""
    output = folder / name.split()[0]
    assert metrics(output)["processes"] == 2
    assert not any(torch.isnan(tensor).any() for tensor in weights(output).values())


@pytest.mark.holds(32)
@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_equal_one_of_twice_the_batch(runs, folder, name, tmp_path, monkeypatch):
    # each process has mismatched rows of its own batch
    shift = responses.mismatched
    monkeypatch.setattr(responses, "mismatched", lambda all_: shift(all_[:2]) + shift(all_[2:]))
    words = f"{METHODS[name]} --batch-size 4 {STEPS}"
    shutil.copytree(folder / "model", tmp_path / "model")
    for rows in folder.glob("*.jsonl"):
        shutil.copy(rows, tmp_path)
    assert main(command(tmp_path, "one", words)) == 0
    whole = folder / f"{name}-whole"
    one, two = numbers(tmp_path / "one"), numbers(whole if whole.exists() else folder / name)
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    assert [entry["step"] for entry in one if "eval_loss" in entry] == [0, 3, 6]
    for ours, theirs in zip(two, one, strict=True):
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            assert value == pytest.approx(theirs[key], rel=1e-4), (key, ours, theirs)


@pytest.mark.parametrize("fraction", UNEVEN)
def test_rows_repeated_for_another_process_do_not_count(runs, folder, fraction, tmp_path):
    whole = command(folder, "new", f"--batch-size 4 {STEPS.replace('0.2', fraction)}")
    whole[whole.index("--output") + 1] = str(tmp_path / "one")
    assert main(whole) == 0
    one, two = numbers(tmp_path / "one"), numbers(folder / f"uneven{fraction}")
    for ours, theirs in zip(two, one, strict=True):
        for key, value in ours.items():
            if key.startswith("eval_"):
                assert value == pytest.approx(theirs[key], rel=1e-4), key


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluating_on_two_processes_equals_one(runs, folder, name, capsys):
    def printed(text: str) -> dict[str, float]:
        lines = (line.split() for line in text.splitlines() if line.startswith("  eval_"))
        return {key: float(value) for key, value in lines}

    assert ended(runs, name) == [0, 0], runs[name]
    first, second = runs[name]
    assert second["out"] == ""
    assert main(evaluation(folder, name, 4)) == 0
    one, two = printed(capsys.readouterr().out), printed(first["out"])
    assert {"eval_loss", "eval_rewards/accuracies"} <= one.keys()
    assert two == pytest.approx(one, rel=1e-4)


def test_the_comparison_is_the_first_process_s(runs, folder):
    assert "gradients differ" in runs["dpo"][0]["out"]
    ways = metrics(folder / "dpo")["comparison"]["ways"]
    assert len({round(way["loss"], 5) for way in ways.values()}) == 1


def test_nothing_is_left_beside_outputs_and_checkpoints(runs, folder):
    resumed = ("simpo", "sapo", "sspo")
    outputs = {*METHODS, "dapo-checkpoints", *(f"uneven{fraction}" for fraction in UNEVEN)}
    outputs |= {f"{name}-{kind}" for name in resumed for kind in ("checkpoints", "whole")}
    made = {path.name for path in folder.iterdir() if path.is_dir()}
    assert made == {"model", "thesis"} | outputs


# going on


@pytest.mark.holds(46)
@pytest.mark.parametrize(
    ("name", "steps"), [("simpo", (2, 4, 6)), ("sapo", (2, 4, 6)), ("sspo", (3, 6))]
)
def test_resuming_equals_going_on(runs, folder, name, steps):
    """To the last bit, from a checkpoint that is not the newest where that one is not whole."""
    checkpoints = folder / f"{name}-checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {f"checkpoint-{n}" for n in steps}
    whole, again = (folder / f"{name}-whole", folder / name)
    *logged, total = numbers(whole)
    assert total["step"] == 6 and "train_loss" in total
    assert numbers(again)[: len(logged)] == logged
    ours, theirs = weights(again), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_each_process_keeps_pairs_of_its_own_and_the_same_average(runs, folder):
    saved = folder / "sapo-checkpoints" / "checkpoint-6" / "self_augmented"
    ours, theirs = (read_file(saved / f"self_augmented-{rank}.safetensors")[0] for rank in range(2))
    assert not torch.equal(ours["buffer.tokens"], theirs["buffer.tokens"])
    assert any(name.startswith("average.") for name in ours)
    assert not any(name.startswith("average.") for name in theirs)
    assert [any(name.startswith("reference.") for name in each) for each in (ours, theirs)] == [
        1,
        0,
    ]
    sizes = [len(each["buffer.counts"]) for each in (ours, theirs)]
    logged = [entry["buffer/size"] for entry in numbers(folder / "sapo") if "buffer/size" in entry]
    assert logged[-1] <= sum(sizes) / 2 and sum(sizes) / 2 - logged[-1] <= 2


def test_each_process_samples_differently(runs, folder):
    saved = folder / "sspo-checkpoints" / "checkpoint-3"
    ours, theirs = (read_file(saved / f"samples-{rank}.safetensors")[0] for rank in range(2))
    assert ours["labels"].shape[0] == theirs["labels"].shape[0] == 6
    assert ours["input_ids"].shape != theirs["input_ids"].shape or not torch.equal(
        ours["input_ids"], theirs["input_ids"]
    )


def test_a_mean_over_tokens_is_over_those_of_all_processes(runs, folder):
    """By hand for the step right after sampling, where every ratio is 1."""
    weighted, tokens, own = 0.0, 0, []
    for rank in range(2):
        saved = folder / "dapo-checkpoints" / "checkpoint-1" / f"samples-{rank}.safetensors"
        samples, _ = read_file(saved)
        lengths = (samples["labels"] != -100).sum(1)
        weighted += float((samples["advantages"] * lengths).sum())
        tokens += int(lengths.sum())
        own.append(float((samples["advantages"] * lengths).sum() / lengths.sum()))
    logged = next(entry for entry in numbers(folder / "dapo") if "loss" in entry)
    assert logged["loss"] == pytest.approx(-weighted / tokens, rel=1e-4)
    assert sum(own) / 2 != pytest.approx(weighted / tokens, rel=1e-2)


def test_another_number_of_processes_does_not_go_on(runs, folder, capsys):
    assert main(command(folder, "simpo", f"{METHODS['simpo']} {SAVED} 2 --resume")) == 2
    told = capsys.readouterr().err
    assert "resume: expected a checkpoint of 1 process" in told and "checkpoints of 2" in told


# trackers


def test_metrics_arrive_in_the_tracker(runs, folder):
    lines = (folder / "simpo.tracked").read_text().splitlines()
    tracked = [json.loads(line) for line in lines]
    logged = metrics(folder / "simpo-whole")["log"]
    assert {line.pop("run") for line in tracked} == {"tried"}
    assert tracked == logged
    assert "loss" in tracked[1] and "eval_rewards/margins" in tracked[0]


def test_a_tracker_gets_what_callbacks_add_under_the_name_of_the_output(
    folder, tmp_path, monkeypatch
):
    register_trackers()
    monkeypatch.setenv("TRACKED", str(tmp_path / "tracked"))
    words = f"{METHODS['sapo']} --batch-size 4 --max-steps 1 --report-to none,stub"
    whole = command(folder, "new", words)
    whole[whole.index("--output") + 1] = str(tmp_path / "named")
    assert main(whole) == 0
    tracked = [json.loads(line) for line in (tmp_path / "tracked").read_text().splitlines()]
    assert {line["run"] for line in tracked} == {"named"}
    assert any("buffer/size" in line for line in tracked)
    # a tracker that wrote no files leaves no folder
    assert {path.name for path in tmp_path.iterdir()} == {"named", "tracked"}


# mistakes


def one_line(run: dict[str, Any]) -> str:
    lines = [line for line in run["err"].splitlines() if re.match(r"fusedpo \w+: error", line)]
    assert len(lines) == 1, run
    return lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_once_and_ends_both(runs, folder, name):
    assert ended(runs, name) == [2, 2]
    assert re.search(MISTAKES[name][1], one_line(runs[name][0]))
    assert runs[name][1]["err"] == runs[name][1]["out"] == ""
    assert not (folder / "new").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_folder_of_something_else_is_not_replaced(runs, folder):
    assert ended(runs, "not a run") == [2, 2]
    assert "output: expected a new folder" in one_line(runs["not a run"][0])
    assert [path.name for path in (folder / "thesis").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("what", ["model", "rows", "words"])
def test_what_one_process_refuses_ends_both(runs, what):
    name = f"{what} elsewhere"
    assert ended(runs, name) == [2, 2], runs[name]
    assert one_line(runs[name][0]).startswith("fusedpo train: error: process 1: ")
    assert runs[name][1]["err"] == ""


def test_what_one_process_refuses_to_evaluate_ends_both(runs):
    assert ended(runs, "reference elsewhere") == [2, 2], runs["reference elsewhere"]
    told = one_line(runs["reference elsewhere"][0])
    assert told.startswith("fusedpo evaluate: error: process 1: reference: expected a folder that")
    assert runs["reference elsewhere"][1]["err"] == ""


def test_a_bug_of_one_process_ends_both_with_its_traceback(runs):
    first, second = ended(runs, "bug elsewhere")
    assert "RuntimeError: process 1 failed: " in first
    assert "torch.zeros(2) @ torch.zeros(3)" in second


# what processes agree on


def test_held_out_rows_of_different_numbers_end_both(runs):
    assert ended(runs, "fewer elsewhere") == [2, 2]
    assert one_line(runs["fewer elsewhere"][0]).endswith(
        "held-out rows: expected the same on every process, got 16, 8 of them; "
        "processes of one run need the same files and the same kind of device"
    )
    assert runs["fewer elsewhere"][1]["err"] == ""


def test_processes_that_agreed_to_end_wait_for_each_other(runs):
    """A launcher kills the rest as soon as one has ended; here the second one leaves late."""
    first, second = (each["ended"] for each in runs["no range"])
    assert ended(runs, "no range") == [2, 2]
    assert abs(first - second) < 0.4


def test_a_process_that_is_gone_is_told_where_nothing_worse_is(tmp_path):
    program = [sys.executable, "-c", GONE]
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_ports(1)[0], "WORLD_SIZE": 2}
    processes = [
        subprocess.Popen(
            program, env=environment(RANK=i, LOCAL_RANK=i, **variables), stdout=subprocess.PIPE
        )
        for i in range(2)
    ]
    told, _ = (process.communicate(timeout=100)[0] for process in processes)
    # what the connection said is left out, if there is an error of one's own
    assert json.loads(told) == ["RuntimeError", "KeyError", True]


GONE = """\
import json, os
from fusedpo.trainers import processes

processes.gather("here", cpu=True)
if os.environ["RANK"] == "1":
    os._exit(0)
found = []
for own in (None, KeyError("own")):
    try:
        with processes.together():
            if own is not None:
                raise own
    except Exception as error:
        found.append(type(error).__name__)
print(json.dumps([*found, own.__suppress_context__]), flush=True)
os._exit(0)
"""


# launchers


def torchrun(*words: str) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    return [*run, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *words]


def accelerate(*words: str) -> list[str]:
    run = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
    return [*run, f"--main_process_port={free_ports(1)[0]}", *words]


@pytest.mark.parametrize("launch", [torchrun, lambda *words: accelerate("--multi_gpu", *words)])
def test_launchers_start_it(folder, tmp_path, launch: Callable[..., list[str]]):
    words = command(folder, "new", f"{TWO} --max-steps 2 --evaluations 1 --loss simpo")
    words[words.index("--output") + 1] = str(tmp_path / "out")
    run = launch("-m", "fusedpo", *words)
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved: ") == done.stdout.count("2 processes") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_launcher_that_starts_one_process_is_refused(folder, tmp_path):
    words = command(folder, "new", TWO)
    words[words.index("--output") + 1] = str(tmp_path / "out")
    run = accelerate("--cpu", "-m", "fusedpo", *words)
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "accelerate launch: expected a launcher of several processes" in done.stderr
    assert "torchrun --nproc_per_node N -m fusedpo train --cpu" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_whole_checkpoints_and_nothing_else(folder, tmp_path, number):
    """A real signal to the launcher, once training is under way."""
    words = command(folder, "new", "--max-steps 100000 --evaluations 10000 --save-steps 5")
    words[words.index("--output") + 1] = str(tmp_path / "out")
    process = subprocess.Popen(
        torchrun("-m", "fusedpo", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONUNBUFFERED=1),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and "held-out" in line and not line.startswith("step      0"):
            break
    process.send_signal(number)
    started = time.monotonic()
    out, error = process.communicate(timeout=100)
    assert process.returncode != 0
    # a launcher kills after 30 s what has not ended by then
    assert time.monotonic() - started < 25
    assert {path.name for path in tmp_path.iterdir()} == {"out-checkpoints"}
    if number == signal.SIGINT:
        assert error.count("fusedpo train: interrupted; no incomplete output was left") == 1
        assert " ".join(out.split()).count("go on from the last one with --resume") == 1


FAILS = """\
import os, sys
from fusedpo.cli import main
from fusedpo.trainers.transformers import PreferenceTrainer

step = PreferenceTrainer.training_step


def broken(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 2:
        raise RuntimeError("out of luck")
    return step(self, *args, **kwargs)


PreferenceTrainer.training_step = broken
sys.exit(main())
"""


def test_a_process_that_fails_in_training_ends_both(folder, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    words = command(folder, "new", TWO)
    words[words.index("--output") + 1] = str(tmp_path / "out")
    run = torchrun(str(tmp_path / "fails.py"), *words)
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "RuntimeError: out of luck" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"fails.py"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]), [int(port) for port in sys.argv[2:]])
