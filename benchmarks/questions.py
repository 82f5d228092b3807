"""All of the questions by name, asked one after the other."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from fusedpo.benchmarks import sweep, verify

# the most asked first
NAMES = (
    "length",
    "budget",
    "precision",
    "training",
    "references",
    "scored",
    "vocabulary",
    "batch",
    "kernels",
    "compact",
    "compact_errors",
)
LONG = ("compact_training",)
"""Asked by their own commands alone: an hour, or more."""
QUICK = ("length", "budget", "precision")
"""Those of the short version."""


def question(name: str) -> Any:
    return importlib.import_module(f"fusedpo.benchmarks.{name}").QUESTION


def ask(names: Sequence[str], options: sweep.Options, *, verified: bool = True) -> int:
    """Answer after answer, each saved as soon as it is there; 1 if what is measured is wrong."""
    if verified and not verify.passes(print_to_stderr=options.print_json):
        return 1
    for name in names:
        sweep.report(question(name).ask(options), options)
    return 0
