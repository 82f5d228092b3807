"""The ``fusedpo`` command."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import signal
import sys
import threading
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import fusedpo
from fusedpo import losses
from fusedpo.trainers import job as jobs

_USER_ERROR = 2
_INTERRUPTED = 130

_EXAMPLES = """\
examples:
  a model and data that need nothing but this machine, in about two minutes:
    fusedpo train --model demo --dataset demo --loss simpo --output build/demo

  your own, with a file of rows like {"prompt": "...", "chosen": "...", "rejected": "..."}
  (texts, or lists of {"role": "...", "content": "..."}):
    fusedpo train --model ./my-model --dataset pairs.jsonl --loss simpo --beta 2.5 --gamma 1.0 \\
        --memory-budget 512MiB --output ./tuned

  a loss with a reference, checkpoints, and going on after a stop:
    fusedpo train --model owner/name --dataset pairs.jsonl --loss dpo --save-steps 100 --output out
    ... the same again, and --resume

  the options of another loss:
    fusedpo train --loss dpo --help
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with near matches for what was not understood."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Words that no option took; the value after an unknown option is one of them."""
        word = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
        near = difflib.get_close_matches(word, self._option_string_actions, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        self.error(f"unknown argument {word}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for a user's error, 130 for an interruption."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with _terminable():
            return _train(argv)
    except KeyboardInterrupt:
        print("fusedpo train: interrupted; no incomplete output was left", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        print(f"fusedpo train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _USER_ERROR


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, as from a job scheduler, clean up like any other way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_for_the_user(error: Exception) -> bool:
    """Whether this package raised it on purpose; anything else is a bug and keeps its traceback."""
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("fusedpo")


def _train(argv: list[str]) -> int:
    loss_class = _chosen_loss(argv)
    parser, train = _parsers(loss_class)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        train.refuse(unknown)
    given = vars(parsed)
    given.pop("command")
    given["loss"] = losses.get(
        given["loss"],
        **{
            f.name: given.pop(_destination(f))
            for f in _settable(loss_class)
            if _destination(f) in given
        },
    )
    given["output"] = Path(given["output"]).expanduser().resolve()
    jobs.run(jobs.TrainJob(**given))
    return 0


def _chosen_loss(argv: list[str]) -> type[losses.Loss]:
    """The loss decides which further options there are, so it is read first."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--loss", default="simpo")
    name = first.parse_known_args(argv)[0].loss
    return type(losses.get(name))


def _parsers(loss_class: type[losses.Loss]) -> tuple[_Parser, _Parser]:
    """The parser of the command line, and the one of ``train`` within it."""
    parser = _Parser(
        prog="fusedpo",
        description="Preference optimization without logits.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fusedpo {fusedpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train")
    train = commands.add_parser(
        "train",
        help="train a model on preference pairs",
        description="Train a causal language model on preference pairs, and save a model that "
        "transformers loads, with metrics.json and training.png beside it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # what is not given is left to the defaults of TrainJob and of the loss
        argument_default=argparse.SUPPRESS,
    )
    _add_required(train)
    _add_training(train)
    _add_machine(train)
    _add_loss(train, loss_class)
    return parser, train


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
        "demo: pairs from the standard library of Python",
    )
    group.add_argument(
        "--loss",
        default="simpo",
        metavar="NAME",
        help=f"one of {', '.join(losses.available())} (default: simpo)",
    )
    group.add_argument(
        "--output", required=True, metavar="FOLDER", help="made whole at the end, or not at all"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    tuned, scratch = jobs.TUNED, jobs.FROM_SCRATCH

    def add(flag: str, kind: type, help: str) -> None:
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=help)

    def both(name: str) -> str:
        usual, demo = getattr(tuned, name), getattr(scratch, name)
        return f"default: {'none' if usual is None else usual}; {demo} for --model demo"

    add("--learning-rate", float, f"highest learning rate ({both('learning_rate')})")
    add("--epochs", float, f"passes over the data (default: {tuned.epochs:g})")
    add("--max-steps", int, f"optimizer steps, in place of epochs ({both('max_steps')})")
    add("--batch-size", int, f"pairs a device and batch ({both('batch_size')})")
    add("--accumulation", int, f"batches an optimizer step ({_default('accumulation')})")
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
        "--resume", action="store_true", help="go on from the newest of these checkpoints"
    )
    add("--seed", int, f"of weights, split and order ({_default('seed')})")
    group.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="at the end, run one batch with full logits beside the fused loss (default: for demo)",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and precision")
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="what the head may hold at a time, such as 512MiB (default: 256MiB)",
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


def _default(name: str) -> str:
    default = next(f.default for f in fields(jobs.TrainJob) if f.name == name)
    return f"default: {default}"


def _add_loss(parser: argparse.ArgumentParser, loss_class: type[losses.Loss]) -> None:
    """One option for each hyperparameter; its range is checked by the loss."""
    group = parser.add_argument_group(f"the loss {loss_class.__name__}")
    kinds = typing.get_type_hints(loss_class)
    for f in _settable(loss_class):
        about = f"{f.metadata['meaning']} (default: {f.default})".replace("%", "%%")
        options: dict[str, Any] = {"dest": _destination(f), "help": about}
        kind = kinds[f.name]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def _settable(loss_class: type[losses.Loss]) -> list[Field[Any]]:
    """Hyperparameters that can be written on a command line."""
    kinds = typing.get_type_hints(loss_class)
    return [
        f
        for f in fields(loss_class)
        if f.default is not MISSING
        and (
            kinds[f.name] in (int, float, bool, str) or typing.get_origin(kinds[f.name]) is Literal
        )
    ]


def _destination(f: Field[Any]) -> str:
    return f"loss_{f.name}"
