"""One training run from names to files: what ``fusedpo train`` does, callable from Python.

run(TrainJob("meta-llama/Llama-3.2-1B", "pairs.jsonl", Path("out"), SimPO()))
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedpo.checks import bad_choice, bad_value
from fusedpo.data.messages import first_line
from fusedpo.files import write_json
from fusedpo.trainers import checkpoints, one_run, output, processes
from fusedpo.trainers.adapters import check_weights
from fusedpo.trainers.arguments import check_optimizer, check_training, training_arguments
from fusedpo.trainers.comparison import add_comparison
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.inputs import check_model, load_model, read_rows, tokenize_rows
from fusedpo.trainers.one_run import of_options

if TYPE_CHECKING:
    from rich.console import Console

    from fusedpo.trainers.transformers import FusedTrainerMixin


def run(job: TrainJob, console: Console | None = None) -> dict[str, Any]:
    """Train, save, and report to the console and to ``job.output``.

    Under torchrun or accelerate every process calls this with the same job. The first one prints,
    draws and saves; one that cannot do its part ends all of them.

    Returns:
        What was written to metrics.json.

    Raises:
        ImportError: without the packages that training needs.
        ValueError, TypeError, OSError: for a job that cannot be done, before training starts.
    """
    metrics = _run(job, console)
    # the trainer is gone, whose gradients are reduced over the group
    processes.disconnect()
    return metrics


def _run(job: TrainJob, console: Console | None) -> dict[str, Any]:
    started = time.perf_counter()
    with processes.together(job.cpu):
        require("transformers", "accelerate", "tokenizers", "datasets", "matplotlib", "rich")
        processes.check_launcher()
        check_sharding(job)
    console = quiet_console(console)
    with processes.together():
        trackers = _trackers(job)
        check_model(job.model, job.adapters)
        check_training(job)
    of_run = _of_run(job)
    checkpoint = processes.of_first(lambda: _check_folders(job, of_run))
    if checkpoint is not None:
        console.print(f"going on from: {checkpoint}", markup=False)
    # rows before the model: a mistake in them is found in seconds
    with processes.together():
        rows = read_rows(job, console)
        of_run["dataset"] = one_run.of_rows(rows[1]), job.dataset
        if checkpoint is not None:
            one_run.check(Path(checkpoint), "job", of_run)
    with output.staging(job.output) as staging:
        torch.manual_seed(job.seed)
        with processes.together():
            model, tokenizer = load_model(job)
        console.print(
            f"model: {type(model).__name__} {job.model}, "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, "
            f"vocabulary {model.get_output_embeddings().weight.shape[0]}"
        )
        _tell_of_rounding(model, console)
        with processes.together():
            train, held_out = tokenize_rows(job, *rows, model, tokenizer, console)
        del rows
        with processes.together():
            trainer = make_trainer(job, model, tokenizer, train, held_out, staging / "trainer")
        check_held_out(trainer.eval_dataset)
        trainer.job_of_run = of_run
        fit(job, trainer, trackers, checkpoint, console)
        metrics = {
            "model": job.model,
            "dataset": job.dataset,
            "loss": repr(job.loss),
            "training_pairs": len(train),
            "held_out_pairs": len(held_out),
            "processes": processes.count(),
            "seconds": round(time.perf_counter() - started, 1),
            "log": trainer.state.log_history,
            "versions": _versions(),
        }
        output.save(job, trainer, metrics, staging, console)
    with processes.together():
        if job.compares and trainer.is_fsdp_enabled:
            console.print("comparison: left out under FSDP, where no process has the whole head")
        elif job.compares and processes.is_first():
            metrics["comparison"] = add_comparison(job, trainer, train, console)
            write_json(job.output / output.METRICS, metrics)
            console.print(f"saved: {job.output / 'comparison.png'}")
    if processes.is_first() and job.report_to and not job.save_steps:
        # empty, where no tracker wrote a file there
        with contextlib.suppress(OSError):
            job.logs.rmdir()
    console.print(f"done in {time.perf_counter() - started:.0f} s")
    return metrics


def require(*packages: str) -> None:
    """Raise for packages that training needs and that are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"training needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"not installed: pip install 'fusedpo[demo]'"
        )


def check_sharding(job: TrainJob) -> None:
    """Refuse what needs whole weights, where FSDP leaves each process a part of them."""
    if not processes.asked("ACCELERATE_USE_FSDP"):
        return
    remedy = "leave --use_fsdp out, for DistributedDataParallel"
    if job.way.writes:
        got = f"FSDP, with {type(job.way).__name__}"
        expected = "whole weights, as the model writes what it is trained on"
        raise bad_value("accelerate launch", expected, got, remedy)
    if job.loss.needs_reference:
        got = f"FSDP, with {type(job.loss).__name__}"
        remedy += ", or take a loss without one, such as simpo"
        expected = "whole weights, as the loss has a reference"
        raise bad_value("accelerate launch", expected, got, remedy)
    if job.compare:
        expected = "False under FSDP, where no process has the head"
        raise bad_value("compare", expected, "True", "leave it out")
    if job.adapters.merge_output:
        expected = "False under FSDP, where no process has all weights"
        remedy = "merge the saved adapter afterwards, with merge_adapter"
        raise bad_value("merge_output", expected, "True", remedy)


def quiet_console(console: Console | None) -> Console:
    """The first process's console; progress bars of the libraries would break its own."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from rich.console import Console
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    if console is None or not processes.is_first():
        console = Console(quiet=not processes.is_first())
    # a log file has no width of its own, and 80 columns would break the lines
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console


def _trackers(job: TrainJob) -> list[Any]:
    """The callbacks of the trackers, each of which says now what it is missing."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    made = []
    for name in job.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise bad_choice("report_to", name, sorted(INTEGRATION_TO_CALLBACK))
        try:
            made.append(INTEGRATION_TO_CALLBACK[name]())
        except (RuntimeError, ImportError) as error:
            reason = first_line(error)
            raise bad_value(
                "report_to",
                "a tracker that is installed",
                f"{name!r} ({reason})",
                "install it, or leave it out",
            ) from error
    return made


def _of_run(job: TrainJob) -> dict[str, Any]:
    """By option, what a run that goes on from a checkpoint has to have in common with the first."""
    model = Path(job.model).expanduser()
    adapters = of_options("adapters", job.adapters)
    for name in ("adapters", "merge_output"):
        del adapters[name]
    return {
        "model": (one_run.of_files(model), job.model) if model.is_dir() else job.model,
        **of_options("loss", job.loss),
        **of_options("method", job.way),
        **adapters,
        **{name: getattr(job, name) for name in ("dtype", "max_length", "eval_fraction", "seed")},
        "data_seed": job.training.get("data_seed"),
    }


def _check_folders(job: TrainJob, of_run: Mapping[str, Any]) -> str | None:
    """The checkpoint to go on from, if that is asked for; folders can be written."""
    output.check(job.output)
    if job.resume:
        found = checkpoints.to_resume(job.checkpoints, job.way, processes.count())
        one_run.check(Path(found), "job", of_run)
        return found
    if job.save_steps:
        checkpoints.check_none(job.checkpoints, job.way)
    return None


def _tell_of_rounding(model: Any, console: Console) -> None:
    """Say that weights of half precision may stay as they are, however long they are trained."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    for dtype in trained & {torch.bfloat16, torch.float16}:
        console.print(
            f"note: weights trained in {str(dtype).removeprefix('torch.')} lose steps that are "
            f"small beside them; --dtype float32 keeps them, and --autocast bfloat16 the time"
        )


def make_trainer(
    job: TrainJob,
    model: Any,
    tokenizer: Any,
    train: list[Any],
    held_out: list[Any],
    folder: Path,
    ref_model: Any = None,
) -> FusedTrainerMixin:
    """The trainer of the method, on these rows.

    Args:
        folder: for what it leaves.
        ref_model: the reference, where that is not the model as it is now.
    """
    from transformers import PrinterCallback

    check_weights(model)
    args = training_arguments(job, len(train), folder)
    check_optimizer(job, args, model)
    if job.gradient_checkpointing:
        # the newer name first; TrainingArguments has the same two and warns of the older
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    asked = {"length_groups": job.length_groups, "ref_model": ref_model}
    trainer = job.way.trainer(
        model,
        args,
        loss=job.loss,
        train_dataset=train,
        eval_dataset=held_out,
        **{name: value for name, value in asked.items() if value is not None},
        memory_budget=job.memory_budget,
        gradient_tolerance=job.gradient_tolerance,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_held_out(rows: Any) -> None:
    """Processes with different numbers of rows would wait for each other in evaluation."""
    with processes.together():
        sizes = processes.gather(len(rows))
        if len(set(sizes)) > 1:
            counts = ", ".join(map(str, sizes))
            raise bad_value(
                "held-out rows",
                "the same on every process",
                f"{counts} of them",
                "processes of one run need the same files and the same kind of device",
            )


def fit(
    job: TrainJob,
    trainer: FusedTrainerMixin,
    trackers: list[Any],
    checkpoint: str | None,
    console: Console,
) -> None:
    """Train to the end, and evaluate there."""
    from fusedpo.trainers.progress import Progress

    world = trainer.args.world_size
    size = trainer.args.train_batch_size * job.accumulation * world
    with Progress(console, job.way.signals) as progress:
        for callback in (progress, *trackers):
            trainer.add_callback(callback)
        console.print(
            f"training: {job.loss}, {trainer.args.max_steps} steps of {size} {job.way.unit} "
            f"on {trainer.args.device}" + (f", {world} processes" if world > 1 else "")
        )
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            if job.save_steps:
                folder = job.checkpoints
                console.print(f"checkpoints: {folder}; go on from the last one with --resume")
            raise
        if not evaluated_at_the_end(trainer):
            trainer.evaluate()


def evaluated_at_the_end(trainer: FusedTrainerMixin) -> bool:
    """Whether the last step has been evaluated."""
    step = trainer.state.global_step
    return any(
        entry["step"] == step and any(name.startswith("eval_") for name in entry)
        for entry in trainer.state.log_history
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("fusedpo", "torch", "transformers", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
