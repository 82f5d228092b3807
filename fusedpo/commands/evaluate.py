"""``fusedpo evaluate``: the metrics of a saved model on held-out rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedpo.commands.loss_choice import Chosen, add_loss_options, chosen_loss
from fusedpo.commands.options import Group, parser_of
from fusedpo.trainers import processes
from fusedpo.trainers.adapters import AdapterSettings
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.evaluation import evaluate
from fusedpo.trainers.layout_choice import parse_columns
from fusedpo.trainers.methods.base import TUNED
from fusedpo.trainers.run import require

SUMMARY = "evaluate a saved model on preferences or rewards"
DESCRIPTION = (
    "Print the metrics of a model, or of an adapter, on held-out rows: those of fusedpo train."
)
EXAMPLES = """\
examples:
  a model that was trained, on rows that it has not seen:
    fusedpo evaluate --model ./tuned --dataset held-out.jsonl --loss simpo --beta 2.5 --gamma 1.0

  a loss with a reference, the model that training began with (an adapter finds its own):
    fusedpo evaluate --model ./tuned --reference ./my-model --dataset held-out.jsonl --loss dpo
    fusedpo evaluate --model ./adapter --dataset held-out.jsonl --loss dpo

  on the rows that training held out of its file, with the numbers of its last evaluation:
    fusedpo evaluate --model ./tuned --dataset pairs.jsonl --loss simpo --eval-fraction 0.05
"""

_JOB = (
    *("model", "dataset", "columns", "batch_size", "max_length", "eval_fraction", "seed"),
    *("memory_budget", "length_groups", "dtype", "autocast", "cpu"),
)
_ADAPTERS = Group("adapters", AdapterSettings, ("quantize",))


def options(words: Sequence[str]) -> argparse.ArgumentParser:
    """The options that this command line may have: the loss in it has some of its own."""
    require("transformers", "accelerate")
    chosen = chosen_loss(words)
    told = {"eval_fraction": "evaluate on all rows", "batch_size": str(TUNED.batch_size)}
    job = Group("what to evaluate, as of fusedpo train", TrainJob, _JOB)
    parser = parser_of([job, _ADAPTERS, *chosen.groups], told)
    parser.set_defaults(chosen=chosen)
    add_loss_options(parser)
    parser.add_argument(
        "--reference",
        metavar="STR",
        help="the model that training began with, for a loss with a reference "
        "(default: the model below an adapter)",
    )
    return parser


def run(parsed: argparse.Namespace) -> int:
    with processes.together():
        given: dict[str, Any] = vars(parsed)
        chosen: Chosen = given.pop("chosen")
        reference: str | None = given.pop("reference")
        given["loss"], given["method"] = chosen.make(given)
        own = Group("", TrainJob, (*_JOB, "loss", "method")).take(given)
        if "columns" in own:
            own["columns"] = parse_columns(own["columns"])
        adapters = AdapterSettings(**_ADAPTERS.take(given))
        job = TrainJob(**own, output=Path("evaluation"), adapters=adapters)
    evaluate(job, reference, split="eval_fraction" in own)
    return 0
