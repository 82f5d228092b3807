"""Tune a real language model by DPO with LoRA, and run TRL's trainer beside it: ``make demo-real``.

    python -m fusedpo.benchmarks.demo_real [--model smollm2] [--steps 100] [--compared-steps 8] ...

Pairs are made of real text that every machine has, the docstrings of Python's standard library: the
model is asked to continue one, the chosen answer is how it goes on, the rejected one what the model
writes. ``fusedpo train`` tunes adapters on them; plain transformers and PEFT load these, and three
prompts that are not trained on are answered before and after.

TRL's DPOTrainer then takes some steps on the same rows, and FusedDPOTrainer takes the same steps:
one configuration, and the same batches in the same order, because a batch's longest row decides
its peak. Each of the two is a process of its own. Its peak is all that it holds, program and
weights included, and glibc hands free blocks back (``measure.MALLOC_ENV``): by default it keeps
hundreds of MiB of them, which depend on the order of calls more than on what is held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedpo import smollm2, tables
from fusedpo.benchmarks import measure
from fusedpo.recipes import stdlib_pairs
from fusedpo.trainers.pretrained import load

REQUEST = "Continue this text:\n\n"
_HELD_OUT, _SHOWN = 8, 3
_GENERATED = 24  # prompts at a time

Message = dict[str, str]
Row = dict[str, list[Message]]


@dataclass(frozen=True)
class Settings:
    """Of both trainings.

    Attributes:
        model: as of ``fusedpo train``.
        steps: of ``fusedpo train``.
        compared_steps: of TRL's trainer and of ours beside it; 0: neither is run.
        pairs: of a step.
        new_tokens: of an answer, at most.
        rank, rate: of the adapters, and their learning rate.
    """

    model: str = smollm2.NAME
    steps: int = 100
    compared_steps: int = 8
    pairs: int = 2
    new_tokens: int = 32
    rank: int = 8
    rate: float = 2e-4
    max_length: int = 256

    @property
    def rows(self) -> int:
        return self.steps * self.pairs + _HELD_OUT + _SHOWN


def train_command(given: Settings, rows: Path, output: Path) -> list[str]:
    """The words of ``fusedpo train``."""
    share = _HELD_OUT / (given.steps * given.pairs + _HELD_OUT)
    return [
        *("train", "--model", given.model, "--dataset", str(rows), "--loss", "dpo"),
        *("--lora-rank", str(given.rank), "--learning-rate", str(given.rate)),
        *("--batch-size", str(given.pairs), "--max-steps", str(given.steps)),
        *("--max-length", str(given.max_length), "--eval-fraction", f"{share:.4f}"),
        *("--evaluations", "2", "--cpu", "--output", str(output)),
    ]


# pairs and answers


def made_rows(model: Any, tokenizer: Any, given: Settings) -> list[Row]:
    """Rows of messages; those whose true continuation or whose answer is empty are left out."""
    prose = [p for p in stdlib_pairs.read_passages() if not p.text.startswith(("def ", "async "))]
    texts = stdlib_pairs.make_pairs(prose, prompt_chars=100, response_chars=120, seed=0)
    texts = texts[: given.rows]
    prompts = [[{"role": "user", "content": REQUEST + row["prompt"].strip()}] for row in texts]
    written = answers(model, tokenizer, prompts, given.new_tokens, sample=True)
    return [
        {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": text["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": answer}],
        }
        for prompt, text, answer in zip(prompts, texts, written, strict=True)
        if answer and text["chosen"].strip()
    ]


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[Message]], new: int, *, sample: bool = False
) -> list[str]:
    """What the model writes after each prompt: sampled from it, or its likeliest tokens."""
    tokenizer.padding_side = "left"
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    found: list[str] = []
    torch.manual_seed(0)
    for start in range(0, len(prompts), _GENERATED):
        asked = tokenizer.apply_chat_template(
            prompts[start : start + _GENERATED],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            written = model.generate(**asked, max_new_tokens=new, **(how or {"do_sample": False}))
        texts = tokenizer.batch_decode(
            written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
        )
        found += [text.strip() for text in texts]
    return found


# the trainings, each in a process of its own


def tune(given: Settings, rows: Path, output: Path) -> dict[str, float]:
    """Seconds a step of ``fusedpo train``; its adapters are in ``output``."""
    from fusedpo.cli import main as fusedpo

    if code := fusedpo(train_command(given, rows, output)):
        raise SystemExit(code)
    log = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["log"]
    return _costs(log, given.steps)


def compared(name: str, given: Settings, rows: Path, output: Path) -> dict[str, float]:
    """Seconds a step of a trainer of `COMPARED` on the rows."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    theirs: Any = trl  # it has types, but not of what it loads lazily
    if name == "TRL":
        trainer_class = theirs.DPOTrainer
    else:
        from fusedpo.trainers.trl import FusedDPOTrainer as trainer_class
    model, tokenizer = load(given.model)
    examples = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    args = theirs.DPOConfig(
        str(output),
        learning_rate=given.rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=given.pairs,
        max_steps=given.compared_steps,
        max_length=given.max_length,
        # as ``fusedpo train``: neither is TRL's default
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adapters = LoraConfig(
        r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=adapters,
    )
    trainer.train()
    return _costs(trainer.state.log_history, given.compared_steps)


def _costs(log: Sequence[Mapping[str, float]], steps: int) -> dict[str, float]:
    """Seconds of a step, evaluations taken off."""
    whole = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    off = sum(entry.get("eval_runtime", 0.0) for entry in log)
    return {"step": (whole - off) / steps}


COMPARED = {"fusedpo": "FusedDPOTrainer", "TRL": "TRL's DPOTrainer"}
Training = Callable[[Settings, Path, Path], dict[str, float]]
TRAININGS: dict[str, Training] = {
    "train": tune,
    **{name: partial(compared, name) for name in COMPARED},
}


def alone(name: str, given: Settings, rows: Path, output: Path) -> dict[str, float]:
    """Seconds of a step of one training, and its peak in bytes, in a process of its own."""
    job = {"name": name, "given": asdict(given), "rows": str(rows), "output": str(output)}
    result = output.parent / f"{name}.json"
    words = ["-m", "fusedpo.benchmarks.demo_real", "--child", json.dumps(job), str(result)]
    environment = {**os.environ, **(measure.MALLOC_ENV if name in COMPARED else {})}
    subprocess.run([sys.executable, *words], check=True, env=environment)
    found: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    return found


def _child(job: str, result: str) -> int:
    given = json.loads(job)
    train = TRAININGS[given["name"]]
    found = train(Settings(**given["given"]), Path(given["rows"]), Path(given["output"]))
    found["peak"] = measure.status_bytes("VmHWM")
    Path(result).write_text(json.dumps(found), encoding="utf-8")
    return 0


# the command


def run(given: Settings, folder: Path) -> None:
    """Make pairs, train, answer and compare, and print what came of it."""
    started, machine = time.perf_counter(), measure.machine()
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(given.model)
    rows = made_rows(model.eval(), tokenizer, given)
    asked, rows = rows[:_SHOWN], rows[_SHOWN:]
    prompts = [row["prompt"] for row in asked]
    before = answers(model, tokenizer, prompts, given.new_tokens)
    del model
    file, output = folder / "pairs.jsonl", folder / "adapter"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lengths = _lengths(rows, tokenizer)
    print(
        f"pairs: {len(rows)} in {file}, {sum(lengths) / len(lengths):.0f} tokens a row, the "
        f"longest {max(lengths)}; after {time.perf_counter() - started:.0f} s\n"
    )
    print("$ fusedpo", " ".join(train_command(given, file, output)), flush=True)
    tuned = alone("train", given, file, output)
    print(f"fusedpo train: {given.steps} steps, {tuned['step']:.2f} s each", flush=True)
    costs = {}
    if given.compared_steps:
        costs = {name: alone(name, given, file, folder / name.lower()) for name in COMPARED}
    after = answers(_loaded(given.model, output), tokenizer, prompts, given.new_tokens)
    for row, *both in zip(asked, before, after, strict=True):
        _show(row, *both)
    print()
    if costs:
        _compare(given, costs)
    print(measure.describe(machine))
    print(f"adapter: {output}; all of it took {time.perf_counter() - started:.0f} s")


def _lengths(rows: Sequence[Row], tokenizer: Any) -> list[int]:
    """Tokens of each prompt with each of its responses."""
    texts = [row["prompt"] + row[name] for row in rows for name in ("chosen", "rejected")]
    encoded = tokenizer.apply_chat_template(texts, return_dict=True)
    return [len(ids) for ids in encoded["input_ids"]]


def _loaded(name: str, folder: Path) -> Any:
    """The model with adapters, as plain transformers and PEFT load them."""
    from peft import PeftModel

    model, _ = load(name)
    return PeftModel.from_pretrained(model, folder).eval()


def _show(row: Row, before: str, after: str) -> None:
    texts = {
        "prompt": row["prompt"][0]["content"].removeprefix(REQUEST),
        "before": before,
        "after": after,
        "as it goes on": row["chosen"][0]["content"],
    }
    print("\na prompt that was not trained on")
    for name, text in texts.items():
        print(f"  {name}: {' '.join(text.split())}")


def _compare(given: Settings, costs: Mapping[str, Mapping[str, float]]) -> None:
    rows = [
        (COMPARED[name], f"{cost['step']:.2f}", f"{cost['peak'] / 2**20:,.0f}")
        for name, cost in costs.items()
    ]
    title = (
        f"DPO, LoRA of rank {given.rank}, the same {given.compared_steps} steps of {given.pairs} "
        "pairs, the whole process"
    )
    tables.show(title, ("", "seconds a step", "peak, MiB"), rows)
    ours, theirs = costs["fusedpo"], costs["TRL"]
    print(
        f"fusedpo: {theirs['step'] / ours['step']:.2f} x as fast, with "
        f"{ours['peak'] / theirs['peak']:.2f} x the peak"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--child"]:
        return _child(*words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m fusedpo.benchmarks.demo_real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = Settings()
    parser.add_argument("--model", default=own.model, help=f"default: {own.model}")
    for name in ("steps", "compared_steps", "pairs", "new_tokens", "rank"):
        default = getattr(own, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"default: {default}")
    parser.add_argument("--output", type=Path, default=Path("build/demo-real"))
    given = vars(parser.parse_args(words))
    output = given.pop("output")
    try:
        run(Settings(**given), output)
    except (ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
