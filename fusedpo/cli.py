"""The ``fusedpo`` command: finds out which one is meant, and what its errors become.

A command is a module of ``fusedpo.commands`` with a ``SUMMARY``, ``EXAMPLES``, ``add_arguments``
(or ``options``, a parser of them) and ``run``, which raises what a user is to be told.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import fusedpo
from fusedpo.checks import bad_choice, bad_value
from fusedpo.commands import bench, doctor, env, evaluate, losses, plan, run, train
from fusedpo.trainers import processes

COMMANDS: dict[str, Any] = {
    "train": train,
    "evaluate": evaluate,
    "losses": losses,
    "plan": plan,
    "run": run,
    "bench": bench,
    "doctor": doctor,
    "env": env,
}

_USER_ERROR = 2
_INTERRUPTED = 130
_UNREAD = 141


class _Misuse(ValueError):
    """A command line that cannot be read."""

    def __init__(self, program: str, message: str) -> None:
        super().__init__(message)
        self.program = program


# what a word could not be read as
_KINDS = {int: "a whole number", float: "a number"}


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as those of ``fusedpo.checks``, with near matches for what was not
    understood.

    Attributes:
        decisive: words of the command line that decide which options there are.
    """

    decisive = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # argparse takes -1 for a value, and -1e-3 and -5MiB for options that it does not know
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        # argparse names both spellings
        message = re.sub(r"^argument (-[\w-]+)(?:/-[\w-]+)*: ", r"\1: ", message)
        raise _Misuse(self.prog, f"{message} (see {self.prog}{self.decisive} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0] if action.option_strings else action.dest
            self.error(str(bad_choice(name, value, map(str, action.choices))))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if not action.option_strings or action.type not in _KINDS:
                raise
            expected = _KINDS[action.type]
            self.error(str(bad_value(action.option_strings[0], expected, repr(arg_string))))

    def _print_message(self, message: str, file: Any = None) -> None:
        if processes.is_first():
            super()._print_message(message, file)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Words that no option took; the value after an unknown option is one of them."""
        word = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
        # --max_steps is --max-steps, and no other option; --no-cpu is not in the help
        known = {
            option.lstrip("-"): option
            for option, action in self._option_string_actions.items()
            if "_" not in option and action.help != argparse.SUPPRESS
        }
        plain = word.lstrip("-")
        # --lr for --learning-rate
        near = [name for name in known if re.sub(r"([a-z])[a-z]*-?", r"\1", name) == plain]
        near = near[:2] or difflib.get_close_matches(plain, known, n=2)
        near = [known[name] for name in near]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        self.error(f"unknown argument {word}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for a user's error, 130 for an interruption, 141 where
    nobody reads on.

    A command may have others of its own. Of several processes the first one alone prints, but for
    what another one alone knows.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    program = f"fusedpo {argv[0]}" if argv and argv[0] in COMMANDS else "fusedpo"
    try:
        with _terminable():
            code = _run(argv)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        if processes.is_first():
            print(f"{program}: interrupted; no incomplete output was left", file=sys.stderr)
        return _INTERRUPTED
    except processes.ToldByFirst as error:
        processes.leave(error)
        return _USER_ERROR
    except BrokenPipeError:
        # whoever reads has enough, such as head; Python would flush once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD
    except Exception as error:
        if not processes.is_for_the_user(error):
            raise
        program = error.program if isinstance(error, _Misuse) else program
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        processes.leave(error)
        return _USER_ERROR


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP clean up like any other way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {}
    for number in processes.TERMINATING:
        # nohup ignores SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(argv: list[str]) -> int:
    with processes.together(cpu="--cpu" in argv):
        parser, commands = _parsers(argv)
        # else the value of an option in front is taken for the command
        if argv and argv[0].startswith("-") and argv[0] not in parser._option_string_actions:
            parser.refuse(argv[:1])
        parsed, unknown = parser.parse_known_args(argv)
        name = parsed.command
        if unknown:
            commands[name].refuse(unknown)
        del parsed.command
    code: int = COMMANDS[name].run(parsed)
    return code


def _parsers(argv: Sequence[str]) -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command line, and those of the commands within it."""
    parser = _Parser(
        prog="fusedpo",
        description="Preference optimization without logits.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fusedpo {fusedpo.__version__}")
    names = "|".join(COMMANDS)
    choices = parser.add_subparsers(dest="command", required=True, metavar=names)
    found = {}
    for name, command in COMMANDS.items():
        # what the others take is of no interest, and some have much to import for it
        meant = name in argv
        # of a command with options of its words, such as the loss that is named there
        parents = [command.options(argv)] if meant and hasattr(command, "options") else []
        one = choices.add_parser(
            name,
            parents=parents,
            help=command.SUMMARY,
            description=getattr(command, "DESCRIPTION", command.SUMMARY),
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if parents:
            one.decisive = "".join(f" {option} {word}" for option, word in _decisive(argv))
        found[name] = one
        if meant and not parents:
            command.add_arguments(one)
    return parser, found


def _decisive(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The words that name a loss."""
    for option in ("--loss", "--base"):
        for i, word in enumerate(argv):
            if word == option and i + 1 < len(argv):
                yield option, argv[i + 1]
            elif word.startswith(f"{option}="):
                yield option, word.partition("=")[2]
