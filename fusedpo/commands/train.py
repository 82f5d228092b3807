"""``fusedpo train``: train a model on preferences or rewards."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fusedpo import losses
from fusedpo.checks import bad_choice, bad_value
from fusedpo.commands.options import Group, parser_of
from fusedpo.trainers import methods, processes
from fusedpo.trainers.adapters import AdapterSettings
from fusedpo.trainers.config import ADAPTED, SERVED, TrainJob
from fusedpo.trainers.layout_choice import parse_columns
from fusedpo.trainers.methods.base import TUNED, Method
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
_BASES = ("dpo", "simpo", "orpo")


def options(words: Sequence[str]) -> argparse.ArgumentParser:
    """The options that this command line may have: the loss in it has some of its own."""
    require("transformers", "accelerate")
    from transformers import TrainingArguments

    chosen = _chosen(words)
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
    group = parser.add_argument_group("the loss")
    group.add_argument(
        "--loss",
        default="simpo",
        metavar="NAME",
        help=f"one of {', '.join(_trainable())}; or sspo, s-sppo, sapo (self-augmented), "
        "solopo (default: simpo)",
    )
    group.add_argument(
        "--base",
        metavar="NAME",
        help="the loss within sapo (default: orpo) or solopo (default: simpo): dpo, simpo, orpo",
    )
    return parser


def run(parsed: argparse.Namespace) -> int:
    with processes.together():
        job = _job(vars(parsed))
    run_job(job)
    return 0


def _job(given: dict[str, Any]) -> TrainJob:
    chosen: _Chosen = given.pop("chosen")
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


@dataclass(frozen=True)
class _Chosen:
    """The loss that was asked for, the loss within it if it has one, and its method."""

    loss: type[losses.Loss]
    base: type[losses.Loss] | None
    method: type[Method]
    fixed: dict[str, Any]  # hyperparameters that the name stands for
    factor: float

    @property
    def groups(self) -> list[Group]:
        """Of options: of everything with settings of its own."""
        inner = [] if self.base is None else [Group(f"the loss {self.base.__name__}", self.base)]
        method = Group(f"the method {self.method.__name__}", self.method)
        return [Group(f"the loss {self.loss.__name__}", self.loss), *inner, method]

    def make(self, given: dict[str, Any]) -> tuple[losses.Loss, Method]:
        """The loss and the method; their settings are taken out of what was given."""
        of_loss, *inner, of_method = (group.take(given) for group in self.groups)
        if self.base is not None:
            of_loss["base"] = self.base(**inner[0])
        loss = self.loss(**{**self.fixed, **of_loss})
        if self.factor != 1.0 and isinstance(loss, losses.PreferenceLoss):
            loss = self.factor * loss
        return loss, self.method(**of_method)


def _chosen(words: Sequence[str]) -> _Chosen:
    """The loss decides which further options there are, so it is read first."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--loss", default="simpo")
    first.add_argument("--base", default=None)
    found, _ = first.parse_known_args(words)
    if found.base is not None and found.base not in _BASES:
        raise bad_choice("base", found.base, _BASES)
    method = methods.named(found.loss)
    if method is not None and method.base is not None:
        return _Chosen(type(losses.get(found.base or method.base)), None, method, {}, 1.0)
    loss, fixed, factor = losses.find(found.loss)
    method = _method_for(loss)
    within = None
    if method.base is not None:
        within = type(losses.get(found.base or method.base))
    elif found.base is not None:
        raise bad_value("base", f"no such option with --loss {found.loss}", repr(found.base))
    return _Chosen(loss, within, method, fixed, factor)


def _method_for(loss: type[losses.Loss]) -> type[Method]:
    """The method of a loss; a ValueError if none serves it."""
    method = methods.method_of(loss)
    method().check(loss())
    return method


def _trainable() -> Iterator[str]:
    """Names of the losses that a method serves."""
    for name, loss in losses.available().items():
        with contextlib.suppress(ValueError):
            _method_for(loss)
            yield name
