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
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fusedpo.benchmarks import toys
from fusedpo.machine import ROOT, host

TRAINERS = {
    "TRL 0.24, DPO": ("trl-0.24", "dpo"),
    "TRL 0.24, SimPO": ("trl-0.24", "simpo"),
    "LLaMA-Factory 0.9.5, DPO": ("llamafactory", "dpo"),
}
WAYS = ("as it is", "lazy logits")
SIZES = ("pairs", "tokens", "prompt", "vocab", "hidden")
STEPS = 3  # the first of them warms up


def model(options: argparse.Namespace, seed: int) -> Any:
    return toys.llama(options.vocab, options.hidden, 2, seed, feed_forward=2)


def rows(options: argparse.Namespace) -> list[dict[str, str]]:
    return toys.rows(options.pairs * STEPS, options.prompt, options.tokens)


class Clock:
    """Times the steps and takes the first loss; made a callback of transformers in the worker."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.losses: list[float] = []
        self.before = 0

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.before = peak()
                clock.stamps.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.stamps.append(time.perf_counter())

            def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
                if "loss" in logs:
                    clock.losses.append(logs["loss"])

        return Callback()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def arguments(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": f"{folder}/out",
        "max_steps": STEPS,
        "per_device_train_batch_size": options.pairs,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
    }


def with_trl(options: argparse.Namespace, folder: str, clock: Clock) -> None:
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")  # an earlier one than the types are of

    length = options.prompt + options.tokens + 1
    given = {
        **arguments(options, folder),
        "max_length": length,
        "max_prompt_length": options.prompt,
        "bf16": False,
        "gradient_checkpointing": True,
    }
    common = {
        "model": model(options, 0),
        "train_dataset": Dataset.from_list(rows(options)),
        "processing_class": toys.tokenizer(),
        "callbacks": [clock.callback()],
    }
    if options.loss == "dpo":
        reference = model(options, 1)
        trainer = trl.DPOTrainer(**common, ref_model=reference, args=trl.DPOConfig(**given))
    else:
        given |= {"loss_type": "simpo", "cpo_alpha": 0.0, "remove_unused_columns": False}
        trainer = trl.CPOTrainer(**common, args=trl.CPOConfig(**given))
    trainer.train()


def with_llamafactory(options: argparse.Namespace, folder: str, clock: Clock) -> None:
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    import transformers.trainer  # noqa: F401  which looks for what is installed

    importlib.import_module("real_trainers.stubs").stub("torchaudio", "omegaconf")
    from llamafactory.train.tuner import run_exp

    for name, seed in (("model", 0), ("reference", 1)):
        model(options, seed).save_pretrained(f"{folder}/{name}")
        toys.tokenizer().save_pretrained(f"{folder}/{name}")
    Path(folder, "pairs.json").write_text(json.dumps(rows(options)))
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    described = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    Path(folder, "dataset_info.json").write_text(json.dumps(described))
    given = {
        **arguments(options, folder),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": f"{folder}/model",
        "ref_model": f"{folder}/reference",
        "dataset_dir": folder,
        "dataset": "pairs",
        "template": "empty",
        "cutoff_len": options.prompt + options.tokens + 1,
        "preprocessing_num_workers": 1,
        "overwrite_cache": True,
        "plot_loss": False,
        "fp16": False,
    }
    run_exp(given, [clock.callback()])


def work(options: argparse.Namespace) -> None:
    """One training; its numbers as JSON in the last line."""
    if options.way == WAYS[1]:
        import fusedpo

        fusedpo.lazy_logits(memory_budget=options.budget, unknown="raise")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = with_trl if options.trainer.startswith("trl") else with_llamafactory
        run(options, folder, clock)
    seconds = [b - a for a, b in zip(clock.stamps[1:], clock.stamps[2:], strict=False)]
    numbers = {"seconds": seconds, "bytes": peak() - clock.before, "loss": clock.losses[0]}
    print("\n" + json.dumps(numbers))


def measured(options: argparse.Namespace, trainer: str, loss: str, way: str) -> dict[str, Any]:
    folder = ROOT / "build" / "trainers" / trainer
    if not (folder / "ready").exists():
        sys.exit(f'install it first: make test-trainers TRAINERS="{trainer}"')
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "TQDM_DISABLE": "1"}
    command = [
        sys.executable,
        "-m",
        "fusedpo.benchmarks.lazy",
        "--trainer",
        trainer,
        "--loss",
        loss,
        "--way",
        way,
    ]
    for name in ("pairs", "tokens", "prompt", "vocab", "hidden", "budget"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=448, help="of a response")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--budget", default="64MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="trainers whose titles have this")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    for name in ("--trainer", "--loss", "--way"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        work(options)
        return
    results: dict[str, Any] = {
        "machine": host(),
        "shape": {n: getattr(options, n) for n in SIZES},
        "budget": options.budget,
        "trainers": {},
    }
    print("| trainer | step | beyond the trainer | loss |\n|---|--:|--:|--:|")
    for title, (trainer, loss) in TRAINERS.items():
        if options.only not in title:
            continue
        outcomes: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                outcomes[way].append(measured(options, trainer, loss, way))
        summary = {
            way: {
                "seconds": statistics.median(s for each in of_way for s in each["seconds"]),
                "bytes": statistics.median(each["bytes"] for each in of_way),
                "loss": of_way[0]["loss"],
            }
            for way, of_way in outcomes.items()
        }
        plain, lazy = (summary[way] for way in WAYS)
        # a trainer logs four digits behind the point
        if abs(plain["loss"] - lazy["loss"]) > 1.01e-4 + 2e-4 * abs(plain["loss"]):
            sys.exit(f"{title}: another loss, {lazy['loss']} for {plain['loss']}")
        results["trainers"][title] = summary
        for way in WAYS:
            seconds, memory = summary[way]["seconds"], summary[way]["bytes"]
            print(
                f"| {title}, {way} | {seconds:.2f} s ({seconds / plain['seconds']:.2f} x) "
                f"| {memory / 2**20:.0f} MiB ({memory / plain['bytes']:.2f} x) "
                f"| {summary[way]['loss']:.5f} |"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
