"""A saved model on held-out rows: what ``fusedpo evaluate`` does, callable from Python.

metrics = evaluate(TrainJob("out", "held-out.jsonl", Path(), SimPO()))
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedpo.checks import bad_value, called
from fusedpo.losses import PreferenceLoss
from fusedpo.trainers import processes
from fusedpo.trainers.adapters import AdapterSettings, is_adapter
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.inputs import (
    check_model,
    load_model,
    read_rows,
    split_rows,
    token_rows,
    tokens_a_response,
)
from fusedpo.trainers.run import (
    check_held_out,
    check_sharding,
    make_trainer,
    quiet_console,
    require,
)

if TYPE_CHECKING:
    from rich.console import Console

# of the clock, not of the model
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def evaluate(
    job: TrainJob,
    reference: str | None = None,
    *,
    split: bool = False,
    console: Console | None = None,
) -> dict[str, float]:
    """The metrics of a model on held-out rows, as a run of training has them at its end.

    Every process of a launch calls this with the same job, as of ``run``.

    Args:
        job: ``model`` is evaluated; what is of training alone, and ``output``, is not looked at.
        reference: the model that training began with, named as ``model`` is, for a loss of rows
            with a reference; by default the model below an adapter.
        split: evaluate on the rows that training on this dataset holds out by ``eval_fraction``
            and ``seed``, where the dataset holds out none itself; if False on all of them.
        console: where to print.

    Returns:
        By name, ``eval_loss`` and what is logged beside it; ``eval_reward`` for a loss of sampled
        responses.

    Raises:
        ImportError: without the packages that training needs.
        ValueError, TypeError, OSError: for what cannot be evaluated.
    """
    metrics = _evaluate(job, reference, split, console)
    processes.disconnect()
    return metrics


def _evaluate(
    job: TrainJob, reference: str | None, split: bool, console: Console | None
) -> dict[str, float]:
    with processes.together(job.cpu):
        require("transformers", "accelerate", "tokenizers", "datasets", "rich")
        from fusedpo.trainers.progress import shown

        processes.check_launcher()
        check_sharding(job)
        _check_method(job)
        _check_reference(job, reference)
        check_model(job.model, job.adapters)
        if reference is not None:
            with called("reference", "model"):
                check_model(reference, AdapterSettings())
    console = quiet_console(console)
    with processes.together():
        name, rows, held_out = read_rows(job, console, to_train=False)
    with processes.together():
        model, tokenizer = _loaded(job)
        ref_model = _reference(job, model, reference)
    with processes.together():
        if split or held_out is not None:
            others, held_out = split_rows(job, rows, held_out, model, tokenizer, console)
        else:
            others, held_out = [], token_rows(job, rows, model, tokenizer, console)
        if not held_out:
            raise bad_value("dataset", "at least one row to evaluate on", f"none in {name}")
        length = tokens_a_response(job, held_out)
        console.print(f"dataset: {name}, {len(held_out)} {job.way.unit} to evaluate on, {length}")
    with tempfile.TemporaryDirectory() as folder:
        with processes.together():
            given = (model, tokenizer, others or held_out, held_out, Path(folder))
            trainer = make_trainer(job, *given, ref_model=ref_model)
        check_held_out(trainer.eval_dataset)
        console.print(
            f"evaluating: {job.loss}, {len(held_out)} {job.way.unit} on {trainer.args.device}",
            highlight=False,
        )
        found = trainer.evaluate()
    metrics = {
        key: value
        for key, value in sorted(found.items())
        if key.startswith("eval_") and key.removeprefix("eval_") not in _SPEED
    }
    console.print(shown(job.way.signals, metrics), highlight=False)
    width = max(map(len, metrics))
    for key, value in metrics.items():
        console.print(f"  {key:<{width}}  {value:.6g}", highlight=False)
    return metrics


def _loaded(job: TrainJob) -> tuple[Any, Any]:
    """A model and its tokenizer; the weights of a model by name are those of training."""
    torch.manual_seed(job.seed)
    return load_model(job)


def _reference(job: TrainJob, model: Any, name: str | None) -> Any:
    """What the trainer takes for the reference: without a name, the model below its adapters."""
    from fusedpo.trainers.transformers.reference import BASE

    if name is None:
        below = job.loss.needs_reference and hasattr(model, "disable_adapter")
        return BASE if below else None
    with called("reference", "model"):
        # few bits are for weights below adapters
        adapters = job.adapters if is_adapter(Path(name).expanduser()) else AdapterSettings()
        return _loaded(replace(job, model=name, adapters=adapters))[0]


def _check_method(job: TrainJob) -> None:
    """Refuse a method whose held-out pairs the model writes itself."""
    if job.way.writes and isinstance(job.loss, PreferenceLoss):
        remedy = f"evaluate {type(job.loss).__name__} itself, by --loss, on pairs that are kept"
        raise bad_value("loss", "one of rows that stay", type(job.way).__name__, remedy)


def _check_reference(job: TrainJob, reference: str | None) -> None:
    # sampled responses are evaluated by their rewards
    compared = job.loss.needs_reference and isinstance(job.loss, PreferenceLoss)
    name = type(job.loss).__name__
    if reference is not None and not compared:
        raise bad_value("reference", f"none, as {name} is evaluated without", repr(reference))
    if compared and reference is None and not job.trains_adapters:
        raise bad_value(
            "reference",
            f"the model that training began with, which {name} compares with",
            "none",
            "name its folder or its name on the Hub",
        )
