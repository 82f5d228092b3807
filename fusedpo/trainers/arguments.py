"""What of a training run ``transformers.Trainer`` is told."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedpo.checks import bad_value
from fusedpo.data.messages import first_line
from fusedpo.trainers import processes
from fusedpo.trainers.config import TrainJob

if TYPE_CHECKING:
    from transformers import TrainingArguments


def training_arguments(job: TrainJob, rows: int, folder: Path) -> TrainingArguments:
    """What the trainer of a job on so many rows is told; ``folder`` is for what it leaves.

    Raises:
        ValueError: for an argument of ``job.training`` that transformers does not take.
    """
    from transformers import TrainingArguments

    use_cpu = (
        job.cpu or processes.asked("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )
    autocast = _autocast(job, use_cpu)
    batch_size = job.batch_size or job.defaults.batch_size
    steps = _steps(job, math.ceil(rows / (batch_size * processes.count())))
    arguments = {
        "output_dir": str(job.logs if job.save_steps or job.report_to else folder),
        "run_name": job.run_name or job.output.name,
        "learning_rate": job.learning_rate or job.defaults.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(job.warmup * steps),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "bf16": autocast == "bfloat16",
        "fp16": autocast == "float16",
        "use_cpu": use_cpu,
        # every parameter takes part in every step
        "ddp_find_unused_parameters": False,
        # nothing is gained where there is no copy to a device
        "dataloader_pin_memory": not use_cpu,
        # a run that goes on has evaluated then
        "eval_on_start": not job.resume,
        "eval_strategy": "steps",
        "eval_steps": math.ceil(steps / job.evaluations),
        "logging_steps": max(1, steps // 60),
        # a NaN is shown, not replaced by the mean so far
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if job.save_steps else "no",
        "save_steps": job.save_steps or steps,
        # the trackers are added last, so that they get what other callbacks add to the logs
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
        **job.training,
    }
    with _as_asked_for(job):
        return TrainingArguments(**arguments)


def check_training(job: TrainJob) -> None:
    """Refuse, before there is a model, arguments that any model would be refused with."""
    args = training_arguments(job, 1, job.output)
    if args.optim_target_modules is not None:  # which layers there are is not known yet
        args.optim_target_modules = "all-linear"
    check_optimizer(job, args, torch.nn.Sequential(torch.nn.Linear(1, 1)))


def check_optimizer(job: TrainJob, args: TrainingArguments, model: Any) -> None:
    """Refuse now an optimizer that is not installed and a schedule that lacks an argument."""
    from transformers import Trainer, get_scheduler

    with _as_asked_for(job):
        Trainer.get_optimizer_cls_and_kwargs(args, model)
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)]),
            args.get_warmup_steps(args.max_steps),
            args.max_steps,
            args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )


@contextlib.contextmanager
def _as_asked_for(job: TrainJob) -> Iterator[None]:
    """What transformers raises, as an error of what it was told by name."""
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if not job.training:
            raise
        told = ", ".join(f"{name}={value!r}" for name, value in job.training.items())
        reason = first_line(error)
        expected = "arguments that transformers.TrainingArguments takes"
        raise bad_value("training", expected, f"{told} ({reason})") from error


def _steps(job: TrainJob, batches: int) -> int:
    """Optimizer steps of a run with so many batches to an epoch on each process."""
    steps = job.max_steps
    if steps is None and job.epochs is None:
        steps = job.defaults.max_steps
    if steps is None:
        epoch = math.ceil(batches / job.accumulation)
        steps = math.ceil((job.epochs or job.defaults.epochs) * epoch)
    return steps


def _autocast(job: TrainJob, use_cpu: bool) -> str:
    if job.autocast != "auto":
        return job.autocast
    half = not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bfloat16" if half and job.dtype == "float32" else "none"
