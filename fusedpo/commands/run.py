"""``fusedpo run``: a program of somebody else's, with lazy logits in every model that it makes."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from fusedpo.checks import bad_value
from fusedpo.lazy.everywhere import environment
from fusedpo.model_head import check_options

SUMMARY = "run another program with lazy logits in its models"
DESCRIPTION = (
    "Run a program, and whatever Python it starts, with fusedpo.lazy_logits in every model of "
    "transformers that it makes. Nothing of the program is changed."
)
EXAMPLES = """\
examples:
  fusedpo run llamafactory-cli train dpo.yaml
  fusedpo run --memory-budget 1GiB -- torchrun --nproc-per-node 2 train.py --config config.yaml
  fusedpo run --unknown raise python train.py
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory that the head may take at a time: 512MiB, ... (default: 256MiB, or on a GPU "
        "3 %% of its memory, 4GiB at most)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="auto, torch or triton (default: auto, triton on a GPU that it can run on)",
    )
    parser.add_argument(
        "--unknown",
        choices=("warn", "raise"),
        default="warn",
        help="what an operation does that needs the real logits (default: warn)",
    )
    parser.add_argument(
        "--gradient-tolerance",
        type=float,
        default=0.0,
        metavar="FLOAT",
        help="relative error that a gradient of the head may have: 2e-3, ... (default: 0, exact)",
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help="the program and its arguments")


def run(arguments: argparse.Namespace) -> int:
    program = arguments.program[arguments.program[:1] == ["--"] :]
    check_options(arguments.memory_budget, arguments.backend, arguments.gradient_tolerance)
    if not program:
        remedy = "fusedpo run python train.py, for one"
        raise bad_value("program", "a program and its arguments", "nothing", remedy)
    if shutil.which(program[0]) is None:
        remedy = "give its path, or activate the environment that it is installed in"
        if program[0].endswith(".py"):
            remedy = f"fusedpo run python {program[0]}, for a script"
        raise bad_value("program", "one on the PATH", program[0], remedy)
    options = {
        "memory_budget": arguments.memory_budget,
        "backend": arguments.backend,
        "unknown": arguments.unknown,
        "gradient_tolerance": arguments.gradient_tolerance,
    }
    sys.stdout.flush()
    os.execvpe(program[0], program, environment(options))
