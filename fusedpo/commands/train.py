"""``fusedpo train``: train a model on preferences or rewards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from fusedpo.commands.loss_choice import Chosen, add_loss_options, chosen_loss
from fusedpo.commands.options import Group, parser_of
from fusedpo.trainers import processes
from fusedpo.trainers.adapters import AdapterSettings
from fusedpo.trainers.config import ADAPTED, SERVED, TrainJob
from fusedpo.trainers.layout_choice import parse_columns
from fusedpo.trainers.methods.base import TUNED
from fusedpo.trainers.run import require
from fusedpo.trainers.run import run as run_job

SUMMARY = "train a model on preferences or rewards"
DESCRIPTION = (
    "Train a causal language model, and save a model that transformers loads, with metrics.json "
    "and training.png beside it."
)

EXAMPLES = """\
examples:
  a model and data that need nothing but this machine, in about two minutes:
    fusedpo train --model demo --dataset demo --loss simpo --output build/demo

  your own, with a file of rows like {"prompt": "...", "chosen": "...", "rejected": "..."}
  (texts, or lists of {"role": "...", "content": "..."}):
    fusedpo train --model ./my-model --dataset pairs.jsonl --loss simpo --beta 2.5 --gamma 1.0 \\
        --memory-budget 512MiB --output ./tuned

  single responses, each liked or not: {"prompt": "...", "completion": "...", "label": true}
    fusedpo train --model ./my-model --dataset liked.jsonl --loss kto --output ./tuned

  a loss with a reference, checkpoints, and going on after a stop:
    fusedpo train --model owner/name --dataset pairs.jsonl --loss dpo --save-steps 100 --output out
    ... the same again, and --resume

  adapters in place of whole weights, on a real model that is a package; and these merged:
    fusedpo train --model smollm2 --dataset pairs.jsonl --loss dpo --lora-rank 16 --output adapter
    fusedpo train --model adapter --dataset more.jsonl --merge-adapter --output whole

  another optimizer and schedule, by the names of transformers.TrainingArguments:
    fusedpo train --model owner/name --dataset pairs.jsonl --optim adafactor --output out
    ... the same, and --lr-scheduler-type linear --warmup-steps 20 --max-grad-norm 0.5

  on two GPUs, logging to a tracker (any that transformers knows), see docs/training.md:
    torchrun --nproc_per_node 2 -m fusedpo train --model ./my-model --dataset pairs.jsonl \\
        --report-to wandb --run-name first --output out

  the five methods, each with data of its own making (demo) or yours:
    fusedpo train --loss sspo|s-sppo|sapo|solopo|simpo --model demo --dataset demo --output out

  the options of another loss:
    fusedpo train --loss dpo --help
"""

# the fields of TrainJob under their titles
_TITLES = {
    "what to train": ("model", "dataset", "columns", "output"),
    "training": (
        *("learning_rate", "epochs", "max_steps", "batch_size", "accumulation", "warmup"),
        *("max_length", "eval_fraction", "evaluations", "save_steps", "resume", "seed", "compare"),
    ),
    "memory and precision": (
        *("memory_budget", "gradient_tolerance", "length_groups", "dtype", "autocast"),
        *("gradient_checkpointing", "cpu"),
    ),
    "tracking": ("report_to", "run_name"),
}
_ADAPTERS = Group("adapters (LoRA), in place of whole weights", AdapterSettings)
# of TrainingArguments, where they are not its own
_OTHER_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "logging_steps": "60 times a run",
    "per_device_eval_batch_size": "that of training",
    "warmup_steps": "by --warmup",
}


def options(words: Sequence[str]) -> argparse.ArgumentParser:
    """The options that this command line may have: the loss in it has some of its own."""
    require("transformers", "accelerate")
    from transformers import TrainingArguments

    chosen = chosen_loss(words)
    groups = [Group(title, TrainJob, names) for title, names in _TITLES.items()]
    names = tuple(f.name for f in fields(TrainingArguments) if f.init)
    trainer = Group("of transformers.TrainingArguments", TrainingArguments, names, SERVED)
    scratch = asdict(chosen.method.from_scratch)
    told = {
        name: f"{'none' if usual is None else usual}; {scratch[name]} for --model demo"
        for name, usual in asdict(TUNED).items()
    }
    told |= _OTHER_DEFAULTS
    told["learning_rate"] += f"; {ADAPTED.learning_rate:g} for adapters"
    parser = parser_of([*groups, _ADAPTERS, *chosen.groups, trainer], told)
    parser.set_defaults(chosen=chosen, trainer=trainer)
    add_loss_options(parser)
    return parser


def run(parsed: argparse.Namespace) -> int:
    with processes.together():
        job = _job(vars(parsed))
    run_job(job)
    return 0


def _job(given: dict[str, Any]) -> TrainJob:
    chosen: Chosen = given.pop("chosen")
    trainer: Group = given.pop("trainer")
    del given["loss"], given["base"]
    given["loss"], given["method"] = chosen.make(given)
    own = Group("", TrainJob, (*sum(_TITLES.values(), ()), "loss", "method")).take(given)
    if "columns" in own:
        own["columns"] = parse_columns(own["columns"])
    if "report_to" in own:
        names = (name.strip() for name in own["report_to"].split(","))
        own["report_to"] = tuple(name for name in names if name and name != "none")
    own["adapters"] = AdapterSettings(**_ADAPTERS.take(given))
    own["output"] = own["output"].expanduser().resolve()
    return TrainJob(**own, training=trainer.take(given))
