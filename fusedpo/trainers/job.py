"""One training run from names to files: what ``fusedpo train`` does, callable from Python.

run(TrainJob("meta-llama/Llama-3.2-1B", "pairs.jsonl", Path("out"), SimPO()))
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fusedpo.checks import bad_value, in_range, positive
from fusedpo.compare import Batch, Comparison, compare
from fusedpo.fused_head import Score, aligned_labels, at_head, hidden_and_head
from fusedpo.losses import Loss, PairLoss
from fusedpo.plan import parse_budget
from fusedpo.recipes import stdlib_pairs
from fusedpo.report import (
    History,
    comparison_table,
    draw_comparison,
    draw_training,
    training_table,
)
from fusedpo.trainers.methods import TUNED, Defaults, Pairs, TwoContexts, method_of
from fusedpo.trainers.rows import load

if TYPE_CHECKING:
    from rich.console import Console

    from fusedpo.trainers.transformers import FusedTrainerMixin

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Autocast = Literal["auto", "none", "bfloat16", "float16"]

DEMO = "demo"
# in every output folder, and so the sign of a folder that may be replaced
METRICS = "metrics.json"


_VOCAB = 8192


@dataclass(frozen=True)
class TrainJob:
    """Everything a run depends on.

    Attributes:
        model: a folder or a Hub name; ``demo`` for a small Llama with random weights.
        dataset: see ``rows.load``; ``demo`` for pairs from the standard library.
        output: folder to make. It appears when the run is complete.
        loss: one of ``fusedpo.losses``.
        method: how the loss gets its batches; None: as the loss has it. See ``trainers.methods``.
        learning_rate, batch_size (pairs a device): see ``Defaults`` where None.
        epochs, max_steps: how long; max_steps wins. See ``Defaults`` where both are None.
        accumulation: batches to an optimizer step.
        warmup: share of the steps in which the learning rate rises; it then falls as a cosine.
        max_length: tokens of prompt and response.
        eval_fraction: share of the rows to hold out, if the dataset holds out none itself.
        evaluations: how many times to evaluate after the start.
        memory_budget: what the head may hold at a time, in bytes or as "512MiB".
        dtype: of the weights; ``auto`` as they were saved.
        autocast: compute dtype over float32 weights; ``auto``: bfloat16 where a GPU has it.
        gradient_checkpointing: recompute the layers in the backward pass.
        save_steps: steps between checkpoints, 0 for none. They go beside ``output``.
        resume: go on from the last checkpoint.
        compare: afterwards run one batch with full logits too; None: if model and dataset are
            ``demo``.
        cpu: do not use an accelerator.
        seed: of weights, split and order.
    """

    model: str
    dataset: str
    output: Path
    loss: Loss
    method: Pairs | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    max_steps: int | None = None
    epochs: float | None = None
    accumulation: int = 1
    warmup: float = 0.1
    max_length: int = 1024
    eval_fraction: float = 0.05
    evaluations: int = 8
    memory_budget: str | None = None
    dtype: Dtype = "float32"
    autocast: Autocast = "auto"
    gradient_checkpointing: bool = False
    save_steps: int = 0
    resume: bool = False
    compare: bool | None = None
    cpu: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)
        for name in ("batch_size", "max_steps", "accumulation", "evaluations"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise bad_value(name, "at least 1", str(count))
        if self.save_steps < 0:
            raise bad_value("save_steps", "at least 0", str(self.save_steps))
        in_range("warmup", self.warmup, 0.0, 1.0)
        if not 0 < self.eval_fraction < 1:
            raise bad_value("eval_fraction", "a number between 0 and 1", f"{self.eval_fraction:g}")
        parse_budget(self.memory_budget)
        if self.compare and not self._comparable:
            raise bad_value("compare", "False for a loss that is not of pairs alone", "True")
        self.way.check(self.loss)
        needed = [name for name, about in self.loss.inputs.items() if about.default is None]
        if needed and self.dataset == DEMO:
            raise bad_value("dataset", f"one with the columns {', '.join(needed)}", repr(DEMO))

    @property
    def way(self) -> Pairs:
        """The method."""
        return method_of(type(self.loss))() if self.method is None else self.method

    @property
    def defaults(self) -> Defaults:
        return self.way.from_scratch if self.model == DEMO else TUNED

    @property
    def compares(self) -> bool:
        if self.compare is not None:
            return self.compare
        return self.model == self.dataset == DEMO and self._comparable

    @property
    def _comparable(self) -> bool:
        """Whether the program with full logits is written for this loss."""
        plain = isinstance(self.loss, PairLoss) and not self.loss.inputs
        return plain and type(self.way) is Pairs

    @property
    def checkpoints(self) -> Path:
        return self.output.parent / f"{self.output.name}-checkpoints"


def run(job: TrainJob, console: Console | None = None) -> dict[str, Any]:
    """Train, save, and report to the console and to ``job.output``.

    Returns:
        What was written to metrics.json.

    Raises:
        ValueError, TypeError, OSError: for a job that cannot be done, before training starts.
    """
    _require("transformers", "accelerate", "tokenizers", "datasets", "matplotlib", "rich")
    from rich.console import Console

    from fusedpo.trainers.progress import Progress

    started = time.perf_counter()
    main = int(os.environ.get("RANK", "0")) == 0
    # a log file has no width of its own, and 80 columns would break the lines
    console = console or Console(quiet=not main)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    _quiet()
    _check_output(job)
    # rows before the model: a mistake in them is found in seconds
    rows = _read_rows(job)
    with _staging(job.output) as staging:
        torch.manual_seed(job.seed)
        model, tokenizer = _load_model(job)
        console.print(
            f"model: {type(model).__name__} {job.model}, "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, "
            f"vocabulary {model.get_output_embeddings().weight.shape[0]}"
        )
        train, held_out = _tokenize_rows(job, *rows, model, tokenizer, console)
        del rows
        trainer = _make_trainer(job, model, tokenizer, train, held_out, staging)
        with Progress(console, job.way.signals) as progress:
            trainer.add_callback(progress)
            _train(job, trainer, console)
        history = History.from_log(trainer.state.log_history)
        console.print(training_table(history, job.way.signals))
        metrics = {
            "model": job.model,
            "dataset": job.dataset,
            "loss": repr(job.loss),
            "training_pairs": len(train),
            "held_out_pairs": len(held_out),
            "seconds": round(time.perf_counter() - started, 1),
            "log": trainer.state.log_history,
            "versions": _versions(),
        }
        folder = staging / "model"
        trainer.save_model(str(folder))
        if main:
            # a pickle with this machine's paths, of use to nobody else
            (folder / "training_args.bin").unlink(missing_ok=True)
            title = f"{job.loss}: {len(train)} training pairs, {len(held_out)} held out"
            draw_training(folder / "training.png", history, title, job.way.signals)
            _write_json(folder / METRICS, metrics)
            _publish(folder, job.output, staging)
            console.print(f"saved: {job.output}, with training.png and {METRICS}")
    if main and job.compares:
        comparison = compare(_comparison_batch(job, trainer, train))
        console.print(comparison_table(comparison))
        _add_comparison(job.output, metrics, comparison)
        console.print(f"saved: {job.output / 'comparison.png'}")
    console.print(f"done in {time.perf_counter() - started:.0f} s")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return metrics


def _train(job: TrainJob, trainer: FusedTrainerMixin, console: Console) -> None:
    pairs = trainer.args.train_batch_size * job.accumulation * trainer.args.world_size
    console.print(
        f"training: {job.loss}, {trainer.args.max_steps} steps of {pairs} pairs "
        f"on {trainer.args.device}"
    )
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(job) if job.resume else None)
    except KeyboardInterrupt:
        if job.save_steps:
            console.print(f"checkpoints: {job.checkpoints}; go on from the last one with --resume")
        raise
    if not _evaluated_at_the_end(trainer):
        trainer.evaluate()


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"training needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"not installed: pip install 'fusedpo[demo]'"
        )


def _quiet() -> None:
    """Leave the console to this module: progress bars of the libraries would break its own."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()


def _load_model(job: TrainJob) -> tuple[Any, Any]:
    import transformers

    if job.model == DEMO:
        train, _ = _demo_passages(job.seed)
        tokenizer = stdlib_pairs.train_tokenizer((p.text for p in train), _VOCAB)
        return stdlib_pairs.small_llama(tokenizer), tokenizer
    path = Path(job.model).expanduser()
    if path.is_dir():
        name = str(path)
        if not (path / "config.json").is_file():
            raise bad_value("model", "a folder with a config.json", f"{path}, which has none")
    elif job.model.count("/") > 1 or job.model.startswith((".", "/", "~")) or path.is_file():
        raise FileNotFoundError(
            f"model: expected a folder that save_pretrained made or a name on the Hub, "
            f"got {job.model!r}, which is not a folder"
        )
    else:
        name = job.model
    dtype = job.dtype if job.dtype == "auto" else getattr(torch, job.dtype)
    try:
        return (
            transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype),
            transformers.AutoTokenizer.from_pretrained(name),
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise bad_value(
            "model",
            "a folder or a Hub name of a causal language model with its tokenizer",
            f"{job.model!r} ({reason})",
            "check the spelling, and the network for a Hub name",
        ) from error


@functools.lru_cache(maxsize=1)
def _demo_passages(
    seed: int,
) -> tuple[list[stdlib_pairs.Passage], list[stdlib_pairs.Passage]]:
    return stdlib_pairs.hold_out(stdlib_pairs.read_passages(), 0.1, seed)


def _read_rows(job: TrainJob) -> tuple[str, list[Any], list[Any] | None]:
    """The dataset's name, its rows, and those it holds out itself; every row is checked."""
    if job.dataset == DEMO:
        splits = job.way.demo(_demo_passages(job.seed), job.seed)
    else:
        splits = load(job.dataset)

    def check(rows: Sequence[Any]) -> list[Any]:
        return job.way.checked(rows, splits, job.loss)

    held_out = None if splits.held_out is None else check(splits.held_out)
    return splits.name, check(splits.train), held_out


def _tokenize_rows(
    job: TrainJob,
    name: str,
    rows: list[Any],
    rows_held_out: list[Any] | None,
    model: Any,
    tokenizer: Any,
    console: Console,
) -> tuple[list[Any], list[Any]]:
    """Rows to train on and rows held out."""
    limit = getattr(model.config, "max_position_embeddings", None) or job.max_length
    max_length = min(job.max_length, limit)

    def prepare(rows: list[Any]) -> list[Any]:
        done = job.way.tokenized(rows, tokenizer, max_length)
        if done.dropped:
            why = "have an empty response" if type(job.way) is not TwoContexts else "do not fit"
            console.print(
                f"dropped: {len(done.dropped)} of {len(rows)} rows {why} "
                f"(the first: {done.dropped[0]})"
            )
        if done.truncated:
            console.print(
                f"truncated: {done.truncated} of {len(rows)} rows are longer than {max_length} "
                f"tokens and lost the start of their prompt, or else the end of their response"
            )
        return done.rows

    train = prepare(rows)
    if rows_held_out is not None:
        held_out = prepare(rows_held_out)
    else:
        random.Random(job.seed).shuffle(train)
        size = max(1, round(job.eval_fraction * len(train)))
        train, held_out = train[size:], train[:size]
    if not train or not held_out:
        raise bad_value(
            "dataset",
            "at least one row to train on and one to hold out",
            f"{len(train)} and {len(held_out)} in {name}",
        )
    tokens = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in train) / (2 * len(train))
    console.print(
        f"dataset: {name}, {len(train)} pairs to train on and {len(held_out)} held out, "
        f"{tokens:.0f} tokens a response"
    )
    return train, held_out


def _make_trainer(
    job: TrainJob,
    model: Any,
    tokenizer: Any,
    train: list[Any],
    held_out: list[Any],
    staging: Path,
) -> FusedTrainerMixin:
    from transformers import PrinterCallback, TrainingArguments

    use_cpu = job.cpu or not torch.accelerator.is_available()
    autocast = _autocast(job, use_cpu)
    batch_size = job.batch_size or job.defaults.batch_size
    world = int(os.environ.get("WORLD_SIZE", "1"))
    epoch = math.ceil(math.ceil(len(train) / (batch_size * world)) / job.accumulation)
    steps = job.max_steps
    if steps is None and job.epochs is None:
        steps = job.defaults.max_steps
    if steps is None:
        steps = math.ceil((job.epochs or job.defaults.epochs) * epoch)
    args = TrainingArguments(
        output_dir=str(job.checkpoints if job.save_steps else staging / "trainer"),
        learning_rate=job.learning_rate or job.defaults.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(job.warmup * steps),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=job.accumulation,
        bf16=autocast == "bfloat16",
        fp16=autocast == "float16",
        use_cpu=use_cpu,
        # every parameter takes part in every step
        ddp_find_unused_parameters=False,
        # nothing is gained where there is no copy to a device
        dataloader_pin_memory=not use_cpu,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=math.ceil(steps / job.evaluations),
        logging_steps=max(1, steps // 60),
        # a NaN is shown, not replaced by the mean so far
        logging_nan_inf_filter=False,
        save_strategy="steps" if job.save_steps else "no",
        save_steps=job.save_steps or steps,
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
    )
    if job.gradient_checkpointing:
        # the newer name first; TrainingArguments has the same two and warns of the older
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    trainer = job.way.trainer(
        model,
        args,
        job.loss,
        train,
        held_out,
        memory_budget=job.memory_budget,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _evaluated_at_the_end(trainer: FusedTrainerMixin) -> bool:
    step = trainer.state.global_step
    return any(
        entry["step"] == step and any(name.startswith("eval_") for name in entry)
        for entry in trainer.state.log_history
    )


def _autocast(job: TrainJob, use_cpu: bool) -> str:
    if job.autocast != "auto":
        return job.autocast
    half = not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bfloat16" if half and job.dtype == "float32" else "none"


def _comparison_batch(job: TrainJob, trainer: FusedTrainerMixin, rows: list[Any]) -> Batch:
    """Some training rows, as the trained model sees them."""
    from fusedpo.trainers.transformers import PreferenceCollator

    assert isinstance(job.loss, PairLoss), "TrainJob refuses to compare another loss"
    collate = PreferenceCollator(pad_token_id=0)
    batch = {
        name: value.to(trainer.args.device)
        for name, value in collate(rows[: trainer.args.train_batch_size]).items()
    }
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden, head = hidden_and_head(model, **inputs)
        reference = None
        if trainer.ref_model is not None:
            reference = _sequence_logprobs(trainer.ref_model, inputs, batch["labels"])
    return Batch(
        job.loss,
        hidden.to(head.weight.dtype),
        head,
        batch["labels"],
        reference,
        job.memory_budget,
    )


def _sequence_logprobs(
    model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    """[B], summed over the response."""
    found, _ = at_head(model, Score(aligned_labels(labels)), **inputs)
    return found.logprob.sum(1)


def _check_output(job: TrainJob) -> None:
    """Refuse now what could not be written after hours of training."""
    output = job.output
    if output.exists() and not output.is_dir():
        raise bad_value("output", "a folder to make", f"{output}, which is a file")
    if output.is_dir() and any(output.iterdir()) and not (output / METRICS).is_file():
        raise bad_value(
            "output",
            "a new folder, or one of an earlier run",
            f"{output}, which holds other files",
            "choose another name",
        )
    if job.resume:
        _last_checkpoint(job)


def _last_checkpoint(job: TrainJob) -> str:
    """The newest whole checkpoint; the trainer's state is what it writes last."""
    whole = [path.parent for path in job.checkpoints.glob("checkpoint-*/trainer_state.json")]
    if not whole:
        raise bad_value(
            "resume",
            f"a checkpoint in {job.checkpoints}",
            "none",
            "checkpoints are written with save_steps",
        )
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder beside the output, so that it can be renamed there; removed in any case."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        got = f"{output} ({error.strerror})"
        raise bad_value("output", "a folder that can be made", got) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, output: Path, staging: Path) -> None:
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


def _add_comparison(output: Path, metrics: dict[str, Any], comparison: Comparison) -> None:
    draw_comparison(output / "comparison.png", comparison)
    metrics["comparison"] = comparison.to_json()
    _write_json(output / METRICS, metrics)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("fusedpo", "torch", "transformers", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
