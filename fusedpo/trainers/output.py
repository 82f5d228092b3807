"""The output folder of a run: made beside its place, and put there whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedpo.checks import bad_value
from fusedpo.files import write_json
from fusedpo.report import History, draw_training, training_table
from fusedpo.trainers import processes
from fusedpo.trainers.adapters import merged
from fusedpo.trainers.config import TrainJob

if TYPE_CHECKING:
    from rich.console import Console

    from fusedpo.trainers.transformers import FusedTrainerMixin

# in every output folder, and so the sign of a folder that may be replaced
METRICS = "metrics.json"


def check(output: Path) -> None:
    """Refuse now what could not be written after hours of training."""
    if output.exists() and not output.is_dir():
        got = f"{output}, which is a file"
        raise bad_value("output", "a folder to make", got, "choose another name")
    if output.is_dir() and any(output.iterdir()) and not (output / METRICS).is_file():
        raise bad_value(
            "output",
            "a new folder, or one of an earlier run",
            f"{output}, which holds other files",
            "choose another name",
        )


@contextlib.contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A folder beside the output, so that it can be renamed there; removed in any case.

    The first process makes and removes it; the others know its name.
    """

    def make() -> str:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            return tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent)
        except OSError as error:
            got = f"{output} ({error.strerror})"
            raise bad_value("output", "a folder that can be made", got) from error

    folder = Path(processes.of_first(make))
    try:
        yield folder
    finally:
        if processes.is_first():
            with processes.undisturbed():
                shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, output: Path, staging: Path) -> None:
    """Put the finished folder in the place of the output, whole or not at all."""
    before = staging / "before"
    replaced = output.exists()
    if replaced:
        output.rename(before)
    try:
        folder.rename(output)
    except BaseException:
        if replaced:
            before.rename(output)
        raise


def save(
    job: TrainJob,
    trainer: FusedTrainerMixin,
    metrics: dict[str, Any],
    staging: Path,
    console: Console,
) -> None:
    """Put the model, its metrics and their picture in the place of the output."""
    history = History.from_log(metrics["log"])
    console.print(training_table(history, job.way.signals))
    folder = staging / "model"
    if trainer.is_fsdp_enabled:
        # checkpoints may be of shards; this is for transformers to load
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if not job.adapters.merge_output:
        trainer.save_model(str(folder))
    with processes.together():
        if not processes.is_first():
            return
        if job.adapters.merge_output:
            merged(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(folder)
            tokenizer: Any = trainer.processing_class
            tokenizer.save_pretrained(folder)
        # a pickle with this machine's paths, of use to nobody else
        (folder / "training_args.bin").unlink(missing_ok=True)
        train, held_out = (metrics[f"{name}_pairs"] for name in ("training", "held_out"))
        title = f"{job.loss}: {train} {job.way.unit}, and {held_out} held out"
        draw_training(folder / "training.png", history, title, job.way.signals)
        write_json(folder / METRICS, metrics)
        publish(folder, job.output, staging)
        console.print(f"saved: {job.output}, with training.png and {METRICS}")
