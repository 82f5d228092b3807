"""``fusedpo train``: train a model on preferences or rewards."""

from __future__ import annotations

import argparse
import contextlib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fusedpo import losses
from fusedpo.checks import bad_choice, bad_value
from fusedpo.trainers import job as jobs
from fusedpo.trainers import methods
from fusedpo.trainers.layout_choice import parse_columns

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

  on two GPUs, logging to a tracker (any that transformers knows), see docs/training.md:
    torchrun --nproc_per_node 2 -m fusedpo train --model ./my-model --dataset pairs.jsonl \\
        --report-to wandb --run-name first --output out

  the five methods, each with data of its own making (demo) or yours:
    fusedpo train --loss sspo|s-sppo|sapo|solopo|simpo --model demo --dataset demo --output out

  the options of another loss:
    fusedpo train --loss dpo --help
"""


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """words: the command line, as the loss decides which further options there are."""
    chosen = _chosen(words)
    # what is not given is left to the defaults of TrainJob and of the loss
    parser.argument_default = argparse.SUPPRESS
    parser.set_defaults(chosen=chosen)
    _add_required(parser)
    _add_training(parser, chosen.method)
    _add_machine(parser)
    _add_tracking(parser)
    for name, part in chosen.parts:
        _add_settings(parser, name, part)


def run(parsed: argparse.Namespace) -> int:
    with jobs.ranks().together():
        job = _job(vars(parsed))
    jobs.run(job)
    return 0


def _job(given: dict[str, Any]) -> jobs.TrainJob:
    chosen: _Chosen = given.pop("chosen")
    del given["loss"]
    given.pop("base", None)
    given["loss"], given["method"] = chosen.make(given)
    if "columns" in given:
        given["columns"] = parse_columns(given["columns"])
    given["output"] = Path(given["output"]).expanduser().resolve()
    return jobs.TrainJob(**given)


# papers share acronyms; on the command line this one is the method that writes its own pairs
_SELF_AUGMENTED = ("sapo", "self-augmented", "self_augmented", "selfaugmented")
_BASES = ("dpo", "simpo", "orpo")


@dataclass(frozen=True)
class _Chosen:
    """The loss that was asked for, the loss within it if it has one, and its method."""

    loss: type[losses.Loss]
    base: type[losses.Loss] | None
    method: type[methods.Pairs]
    fixed: dict[str, Any]  # hyperparameters that the name stands for
    factor: float

    @property
    def parts(self) -> list[tuple[str, type[Any]]]:
        """(name of its options' destinations, class) of everything with settings of its own."""
        inner = [] if self.base is None else [("base", self.base)]
        return [("loss", self.loss), *inner, ("method", self.method)]

    def make(self, given: dict[str, Any]) -> tuple[losses.Loss, methods.Pairs]:
        """The loss and the method; their settings are taken out of what was given."""
        settings = {
            name: {
                f.name: given.pop(f"{name}_{f.name}")
                for f in _settable(part)
                if f"{name}_{f.name}" in given
            }
            for name, part in self.parts
        }
        own = {**self.fixed, **settings["loss"]}
        if self.base is not None:
            own["base"] = self.base(**settings["base"])
        loss = self.loss(**own)
        if self.factor != 1.0 and isinstance(loss, losses.PreferenceLoss):
            loss = self.factor * loss
        return loss, self.method(**settings["method"])


def _chosen(words: Sequence[str]) -> _Chosen:
    """The loss decides which further options there are, so it is read first."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--loss", default="simpo")
    first.add_argument("--base", default=None)
    found, _ = first.parse_known_args(words)
    inner = found.base
    if inner is not None and inner not in _BASES:
        raise bad_choice("base", inner, _BASES)
    if found.loss.lower() in _SELF_AUGMENTED:
        return _Chosen(type(losses.get(inner or "orpo")), None, methods.SelfAugmented, {}, 1.0)
    loss, fixed, factor = losses.find(found.loss)
    method = _method_for(loss)
    within = None
    if issubclass(loss, losses.ShortToLong):
        within = type(losses.get(inner or "simpo"))
    elif inner is not None:
        raise bad_value("base", f"no such option with --loss {found.loss}", repr(inner))
    return _Chosen(loss, within, method, fixed, factor)


def _method_for(loss: type[losses.Loss]) -> type[methods.Pairs]:
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


def _add_required(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to train")
    group.add_argument(
        "--model",
        required=True,
        metavar="PATH|NAME|demo",
        help="folder or Hub name of a causal language model; demo: a small Llama, random weights",
    )
    group.add_argument(
        "--dataset",
        required=True,
        metavar="FILE|NAME|demo",
        help=".jsonl or .json file, a file or folder that `datasets` reads, a Hub name; "
        "in one of the layouts of docs/training.md; "
        "demo: pairs from the standard library of Python",
    )
    group.add_argument(
        "--columns",
        metavar="NAME=COLUMN[,...]",
        help="columns of the dataset that have other names than those that are read, such as "
        "prompt=question,chosen=yes,rejected=no; NAME= leaves one out (docs/training.md)",
    )
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
    group.add_argument(
        "--output", required=True, metavar="FOLDER", help="made whole at the end, or not at all"
    )


def _add_training(parser: argparse.ArgumentParser, method: type[methods.Pairs]) -> None:
    group = parser.add_argument_group("training")
    tuned, scratch = methods.TUNED, method.from_scratch

    def add(flag: str, kind: type, help: str) -> None:
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=help)

    def both(name: str) -> str:
        usual, demo = getattr(tuned, name), getattr(scratch, name)
        return f"default: {'none' if usual is None else usual}; {demo} for --model demo"

    add("--learning-rate", float, f"highest learning rate ({both('learning_rate')})")
    add("--epochs", float, f"passes over the data (default: {tuned.epochs:g})")
    add("--max-steps", int, f"optimizer steps, in place of epochs ({both('max_steps')})")
    add(
        "--batch-size",
        int,
        "pairs a device and batch, responses for kto, or prompts for a loss of sampled responses "
        f"({both('batch_size')})",
    )
    add(
        "--accumulation",
        int,
        f"batches an optimizer step ({_default('accumulation')}, the only one for a loss of "
        "sampled responses)",
    )
    add("--warmup", float, f"share of the steps with a rising rate ({_default('warmup')})")
    add("--max-length", int, f"tokens of prompt and response ({_default('max_length')})")
    add(
        "--eval-fraction",
        float,
        "share of the rows to hold out, if the dataset has no split for it "
        f"({_default('eval_fraction')})",
    )
    add("--evaluations", int, f"how many after the start ({_default('evaluations')})")
    add("--save-steps", int, "steps between checkpoints in OUTPUT-checkpoints (default: none)")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest of these checkpoints, with as many processes as wrote it",
    )
    add("--seed", int, f"of weights, split and order ({_default('seed')})")
    group.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="at the end, run one batch with full logits beside the fused loss; for losses of the "
        "dataset's own pairs, without further columns (default: these, if model and dataset are "
        "demo)",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and precision")
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="what the head may hold at a time, such as 512MiB (default: 256MiB; on a GPU 3 %% of "
        "its memory, 4GiB at most)",
    )
    group.add_argument(
        "--gradient-tolerance",
        type=float,
        metavar="FLOAT",
        help="the relative error that a gradient of the head may have, for less time: 2e-3 is what "
        "rounding to bfloat16 costs (default: 0, exact)",
    )
    group.add_argument(
        "--dtype",
        choices=typing.get_args(jobs.Dtype),
        help=f"of the weights ({_default('dtype')})",
    )
    group.add_argument(
        "--autocast",
        choices=typing.get_args(jobs.Autocast),
        help="compute dtype over float32 weights (default: bfloat16 where a GPU has it)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute the layers in the backward pass rather than keep them",
    )
    group.add_argument("--cpu", action="store_true", help="do not use an accelerator")


def _add_tracking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tracking")
    group.add_argument(
        "--report-to",
        type=_names,
        metavar="NAME[,NAME]",
        help="trackers that transformers knows and that are installed, such as tensorboard, "
        "trackio, wandb, mlflow (default: none)",
    )
    group.add_argument(
        "--run-name",
        metavar="NAME",
        help="how the trackers are to call the run (default: the name of OUTPUT)",
    )


def _names(text: str) -> tuple[str, ...]:
    names = (name.strip() for name in text.split(","))
    return tuple(name for name in names if name and name != "none")


def _default(name: str) -> str:
    default = next(f.default for f in fields(jobs.TrainJob) if f.name == name)
    return f"default: {default}"


def _add_settings(parser: argparse.ArgumentParser, name: str, part: type[Any]) -> None:
    """One option for each setting of a loss or a method; its range is checked by that."""
    settable = _settable(part)
    if not settable:
        return
    title = "the method" if name == "method" else "the loss"
    group = parser.add_argument_group(f"{title} {part.__name__}")
    kinds = typing.get_type_hints(part)
    for f in settable:
        about = f"{f.metadata['meaning']} (default: {f.default})".replace("%", "%%")
        options: dict[str, Any] = {"dest": f"{name}_{f.name}", "help": about}
        kind = _plain(kinds[f.name])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def _plain(kind: Any) -> Any:
    """The type of what is written; ``float | None`` is written as a float."""
    others = [one for one in typing.get_args(kind) if one is not type(None)]
    return others[0] if type(None) in typing.get_args(kind) and len(others) == 1 else kind


def _settable(part: type[Any]) -> list[Field[Any]]:
    """What can be written on a command line."""
    kinds = {name: _plain(kind) for name, kind in typing.get_type_hints(part).items()}
    return [
        f
        for f in fields(part)
        if f.default is not MISSING
        and (
            kinds[f.name] in (int, float, bool, str) or typing.get_origin(kinds[f.name]) is Literal
        )
    ]
