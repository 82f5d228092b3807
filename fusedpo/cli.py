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


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with near matches for what was not understood."""

    def error(self, message: str) -> NoReturn:
        raise _Misuse(self.prog, f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if processes.is_first():
            super()._print_message(message, file)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Words that no option took; the value after an unknown option is one of them."""
        word = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
        # --max_steps is --max-steps, and no other option
        known = [option for option in self._option_string_actions if "_" not in option]
        # --lr for --learning-rate
        near = [option for option in known if re.sub(r"([a-z])[a-z]*-?", r"\1", option) == word]
        near = near[:2] or difflib.get_close_matches(word, known, n=2)
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
        found[name] = one
        if meant and not parents:
            command.add_arguments(one)
    return parser, found
