"""What do lazy logits gain in trainers that know nothing of them?

A step of three trainers as they are, and the same with ``fusedpo.lazy_logits()`` called before the
models are made. The trainers are of releases that make all logits: TRL 0.24's DPOTrainer and its
CPOTrainer (SimPO), and LLaMA-Factory's DPO. ``make test-trainers TRAINERS="trl-0.24 llamafactory"``
installs them; then

    .venv/bin/python -m fusedpo.benchmarks.lazy

Each training runs in a fresh process, the two ways of a trainer in turn. Memory is what the process
comes to hold beyond the trainer that it has built. The losses that are logged have to agree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusedpo import tables
from fusedpo.benchmarks import measure, toys
from fusedpo.benchmarks.shapes import MIB
from fusedpo.machine import ROOT

TRAINERS = {
    "TRL 0.24, DPO": ("trl-0.24", "dpo"),
    "TRL 0.24, SimPO": ("trl-0.24", "simpo"),
    "LLaMA-Factory 0.9.5, DPO": ("llamafactory", "dpo"),
}
WAYS = PLAIN, LAZY = "as it is", "lazy logits"
PAIRS, PROMPT, TOKENS, VOCAB, HIDDEN, BUDGET = 2, 64, 448, 50_304, 576, "64MiB"
STEPS = 3  # the first of them warms up
ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": PAIRS,
    "logging_steps": 1,
    "learning_rate": 1e-4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "optim": "sgd",
}


def model(seed: int) -> Any:
    return toys.llama(VOCAB, HIDDEN, 2, seed, feed_forward=2)


def rows() -> list[dict[str, str]]:
    return toys.rows(PAIRS * STEPS, PROMPT, TOKENS)


def watching() -> Any:
    """A callback of transformers that times the steps and takes the losses."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.stamps: list[float] = []
            self.losses: list[float] = []
            self.before = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.before = measure.status_bytes("VmHWM")
            self.stamps.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.stamps.append(time.perf_counter())

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            self.losses += [logs["loss"]] if "loss" in logs else []

    return Watch()


def with_trl(loss: str, folder: str, watch: Any) -> None:
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")  # an earlier one than the types are of

    given = {
        **ARGUMENTS,
        "output_dir": f"{folder}/out",
        "max_length": PROMPT + TOKENS + 1,
        "max_prompt_length": PROMPT,
        "bf16": False,
        "gradient_checkpointing": True,
    }
    common = {
        "model": model(0),
        "train_dataset": Dataset.from_list(rows()),
        "processing_class": toys.tokenizer(),
        "callbacks": [watch],
    }
    if loss == "dpo":
        trainer = trl.DPOTrainer(**common, ref_model=model(1), args=trl.DPOConfig(**given))
    else:
        given |= {"loss_type": "simpo", "cpo_alpha": 0.0, "remove_unused_columns": False}
        trainer = trl.CPOTrainer(**common, args=trl.CPOConfig(**given))
    trainer.train()


def with_llamafactory(loss: str, folder: str, watch: Any) -> None:
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    import transformers.trainer  # noqa: F401  which looks for what is installed

    importlib.import_module("real_trainers.stubs").stub("torchaudio", "omegaconf")
    from llamafactory.train.tuner import run_exp

    for name, seed in (("model", 0), ("reference", 1)):
        model(seed).save_pretrained(f"{folder}/{name}")
        toys.tokenizer().save_pretrained(f"{folder}/{name}")
    Path(folder, "pairs.json").write_text(json.dumps(rows()))
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    described = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    Path(folder, "dataset_info.json").write_text(json.dumps(described))
    given = {
        **ARGUMENTS,
        "output_dir": f"{folder}/out",
        "stage": loss,
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": f"{folder}/model",
        "ref_model": f"{folder}/reference",
        "dataset_dir": folder,
        "dataset": "pairs",
        "template": "empty",
        "cutoff_len": PROMPT + TOKENS + 1,
        "preprocessing_num_workers": 1,
        "overwrite_cache": True,
        "plot_loss": False,
        "fp16": False,
    }
    run_exp(given, [watch])


def work(trainer: str, loss: str, way: str) -> None:
    """One training; its numbers as JSON in the last line."""
    if way == LAZY:
        import fusedpo

        fusedpo.lazy_logits(memory_budget=BUDGET, unknown="raise")
    watch = watching()
    with tempfile.TemporaryDirectory() as folder:
        (with_trl if trainer.startswith("trl") else with_llamafactory)(loss, folder, watch)
    seconds = [b - a for a, b in pairwise(watch.stamps[1:])]
    held = measure.status_bytes("VmHWM") - watch.before
    print("\n" + json.dumps({"seconds": seconds, "bytes": held, "loss": watch.losses[0]}))


def measured(trainer: str, loss: str, way: str) -> dict[str, Any]:
    """The same in a process that sees the trainer's packages."""
    folder = ROOT / "build" / "trainers" / trainer
    if not (folder / "ready").exists():
        sys.exit(f'install it first: make test-trainers TRAINERS="{trainer}"')
    done = subprocess.run(
        [sys.executable, "-m", "fusedpo.benchmarks.lazy", "--work", trainer, loss, way],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def summary(trainer: str, loss: str, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of the rounds, by the way."""
    outcomes: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            outcomes[way].append(measured(trainer, loss, way))
    plain, lazy = (outcomes[way][0]["loss"] for way in WAYS)
    # a trainer logs four digits behind the point
    if abs(plain - lazy) > 1.01e-4 + 2e-4 * abs(plain):
        sys.exit(f"{trainer}, {loss}: another loss, {lazy} for {plain}")
    return {
        way: {
            "seconds": statistics.median(s for each in of_way for s in each["seconds"]),
            "bytes": statistics.median(each["bytes"] for each in of_way),
            "loss": of_way[0]["loss"],
        }
        for way, of_way in outcomes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    about = measure.machine()
    found = {title: summary(*each, options.rounds) for title, each in TRAINERS.items()}
    print(measure.describe(about))
    lines = [
        [
            f"{title}, {way}",
            *(f"{s['seconds']:.2f}", f"{s['seconds'] / ways[PLAIN]['seconds']:.2f}"),
            *(f"{s['bytes'] / MIB:.0f}", f"{s['bytes'] / ways[PLAIN]['bytes']:.2f}"),
            f"{s['loss']:.5f}",
        ]
        for title, ways in found.items()
        for way, s in ways.items()
    ]
    shape = f"{PAIRS} pairs of {PROMPT} + {TOKENS} tokens, H {HIDDEN}, V {VOCAB}, {BUDGET}"
    tables.show(shape, ("trainer", "s a step", "x", "MiB beyond the trainer", "x", "loss"), lines)
    if options.json:
        measure.save("lazy", {"machine": about, "shape": shape, "trainers": found}, options.json)


if __name__ == "__main__":
    main()
