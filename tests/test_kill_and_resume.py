"""A run killed at any moment, gone on with, ends as the run that nobody killed: bit by bit.

Runs are forked from a process that has imported everything: this file is its program too. Two runs
are killed in a normal run of the tests, FUSEDPO_KILLS=20 says how many otherwise.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch

from fusedpo.cli import main
from fusedpo.files import read_file
from fusedpo.trainers import output

pytestmark = pytest.mark.xdist_group("kills")

KILLS = int(os.environ.get("FUSEDPO_KILLS", "2"))
STEPS = 6
RUN = (
    f"--loss sapo --base dpo --segment-length 3 --buffer-size 9 --batch-size 2 --max-steps {STEPS} "
    "--evaluations 2 --eval-fraction 0.1 --learning-rate 5e-3 --save-steps 1 --ref-every 4"
)


# the process that runs are forked from


def serve() -> None:
    """For each line, a command: the pid of a process that runs it, and how that ended."""
    # what runs import as they go; and the pictures that they draw take longer than they do
    for name in ("progress", "self_augmented", "transformers"):
        importlib.import_module(f"fusedpo.trainers.{name}")
    importlib.import_module("transformers.trainer")
    output.draw_training = lambda *anything: None
    torch.set_num_threads(1)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            # answers alone are to come from here
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(main(json.loads(line)))
        print(child, flush=True)
        # until it is asked for, a process that ended keeps its number, and no other one is killed
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


@dataclass
class Runs:
    """Runs of one command in a folder, with other outputs."""

    folder: Path
    server: Any

    def start(self, output: str, *more: str) -> int:
        words = [
            *("train", "--cpu", "--model", str(self.folder / "model")),
            *("--dataset", str(self.folder / "pairs.jsonl")),
            *("--output", str(self.folder / output), *RUN.split(), *more),
        ]
        print(json.dumps(words), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def ended(self) -> int:
        print(file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def checkpoint(self, output: str, step: int) -> Path:
        return self.folder / f"{output}-checkpoints" / f"checkpoint-{step}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """With the run that nobody kills, whose output is "whole"."""
    folder = tmp_path_factory.mktemp("kills")
    tiny.save(folder / "model", initializer_range=0.02)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, tiny.text_rows(40))))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    server = subprocess.Popen(
        [sys.executable, __file__],
        env={
            **kept,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        found = Runs(folder, server)
        found.start("whole")
        assert found.ended() == 0
        yield found
    finally:
        server.kill()
        server.wait()


def state(run: Runs, output: str) -> dict[str, Any]:
    """What a run ended with: losses, weights, average, pairs, and the draws that would come."""
    last = run.checkpoint(output, STEPS)
    own = {
        name: read_file(last / "self_augmented" / f"{name}-0.safetensors")
        for name in ("self_augmented", "ahead")
    }
    parts = {name: tensors for name, (tensors, _) in own.items()}
    parts["model"] = safetensors.torch.load_file(last / "model.safetensors")
    tensors = {
        f"{part} {name}": tensor for part, held in parts.items() for name, tensor in held.items()
    }
    # with the totals of the whole run last, whose time and mean are of what ran in one go
    *log, _ = json.loads((run.folder / output / "metrics.json").read_text())["log"]
    clocks = re.compile("runtime|per_second|flos")
    return {
        "tensors": tensors,
        "about": [about for _, about in own.values()],
        "log": [
            {name: value for name, value in entry.items() if not clocks.search(name)}
            for entry in log
        ],
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    ours, theirs = found["tensors"], expected["tensors"]
    other = [
        name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])
    ]
    return [*other, *(name for name in ("about", "log") if found[name] != expected[name])]


def same_files(ours: Path, theirs: Path) -> bool:
    """Whether a checkpoint has what goes into a run that goes on from it, byte by byte."""
    names = [
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("self_augmented/self_augmented-0.safetensors", "self_augmented/ahead-0.safetensors"),
    ]
    try:
        # is there, and whole; it has the times that steps took
        json.loads((ours / "trainer_state.json").read_text())
        return all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    except (FileNotFoundError, ValueError):
        return False


def times(run: Runs, output: str) -> dict[int, int]:
    """By step, when its checkpoint was last written whole."""
    found = {}
    for step in range(1, STEPS + 1):
        path = run.checkpoint(output, step) / "trainer_state.json"
        if path.is_file():
            found[step] = path.stat().st_mtime_ns
    return found


def test_the_comparison_sees_a_pair_more_or_a_bit_less(runs: Runs) -> None:
    whole = state(runs, "whole")
    assert not differences(state(runs, "whole"), whole)
    assert len(whole["log"]) > STEPS and len(whole["tensors"]) > 10
    for name in (
        *("model lm_head.weight", "self_augmented reference.lm_head.weight"),
        *("self_augmented buffer.counts", "ahead ahead.tokens"),
    ):
        tensor = whole["tensors"][name]
        changed = tensor.clone()
        changed.view(torch.uint8).flatten()[0] ^= 1
        tensors = {**whole["tensors"], name: changed}
        assert differences({**whole, "tensors": tensors}, whole) == [name]


def per_step(run: Runs) -> float:
    """Seconds between two checkpoints of the run that nobody kills."""
    ends = times(run, "whole")
    return (ends[STEPS] - ends[1]) / (STEPS - 1) / 1e9


def killed(run: Runs, output: str, step: int, delay: float) -> int:
    """How a run ended that was killed so many seconds after it began this step's checkpoint."""
    child = run.start(output)
    deadline = time.monotonic() + 60
    while not run.checkpoint(output, step).is_dir():
        assert time.monotonic() < deadline, "the run does not get that far"
        time.sleep(1e-4)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return run.ended()


@pytest.mark.holds(46)
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_goes_on_as_if_it_had_not_been(runs: Runs, number: int) -> None:
    chooser = random.Random(number)
    output = f"killed{number}"
    # from when a checkpoint is begun: every other one while it is written, or else until the next
    step = chooser.randint(1, STEPS - 2)
    delay = chooser.uniform(0, 1.2 if number % 2 else 0.5) * per_step(runs)
    while killed(runs, output, step, delay) != -signal.SIGKILL:
        # it was faster than the run that was measured
        shutil.rmtree(runs.folder / output)
        shutil.rmtree(runs.folder / f"{output}-checkpoints")
        delay /= 2
    assert not (runs.folder / output).exists()

    there = [s for s in range(1, STEPS + 1) if runs.checkpoint(output, s).is_dir()]
    equal = [
        s for s in there if same_files(runs.checkpoint(output, s), runs.checkpoint("whole", s))
    ]
    newest, before = max(equal, default=0), times(runs, output)
    # there may be none yet, and then there is nothing to go on from
    runs.start(output, *(["--resume"] if newest else []))
    assert runs.ended() == 0
    after = times(runs, output)
    kept = {s for s in after if after[s] == before.get(s)}
    print(f"kill {number}: begun {there[-1]}, whole {newest}, {delay:.3f} s after {step}")
    assert kept == set(range(1, newest + 1)), "another checkpoint than the newest whole one"
    assert not differences(state(runs, output), state(runs, "whole"))


if __name__ == "__main__":
    serve()
