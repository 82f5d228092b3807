"""One training run from names to files: what ``fusedpo train`` does, callable from Python.

run(TrainJob("meta-llama/Llama-3.2-1B", "pairs.jsonl", Path("out"), SimPO()))
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from fusedpo.benchmarks import compare as comparing
from fusedpo.checks import bad_choice, bad_value, in_range, positive
from fusedpo.losses import Loss
from fusedpo.model_head import Score, aligned_labels, at_head, check_options, hidden_and_head
from fusedpo.recipes import stdlib_pairs
from fusedpo.report import History, draw_training, training_table
from fusedpo.trainers.layout_choice import read_rows
from fusedpo.trainers.layouts import CONTEXTS
from fusedpo.trainers.methods import TUNED, Defaults, Pairs, Sampled, SelfAugmented, method_of
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

T = TypeVar("T")

# as from a job scheduler, and from a terminal that is closed, where there is such a thing
TERMINATING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)

# that of torchrun and accelerate first, then those of MPI's launchers
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# one process may read, tokenize or compare for as long as it takes; one that is gone is noticed
_PATIENCE = datetime.timedelta(days=7)


class ToldByFirst(ValueError):
    """An error that ends the run on every process and is the first one's to tell the user."""


class Ranks:
    """The processes of one launch, and what they agree on beside the training itself.

    They have a group of their own on the CPU. A process that ends closes its connections, which
    ends the wait of the others with an error.

    Attributes:
        rank: of this process; 0 prints, draws and saves.
        size: how many there are.
        agreed: whether this process is to end with an error that every process knows of.
    """

    def __init__(self) -> None:
        self.rank, self.size = _first_set(_RANK, 0), _first_set(_WORLD, 1)
        self.agreed = False
        self._group: Any = None
        self._store: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, which all call this; what JSON keeps as it is."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self._gathered(torch.tensor([len(data)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        found = self._gathered(padded)
        return [
            json.loads(each[:size].numpy().tobytes())
            for each, size in zip(found, sizes, strict=True)
        ]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one process fails on all of them, so that none waits for another.

        The first process raises its own error, or else that of another one. What is raised on the
        others says the same, and the first alone is to tell; a bug is raised where it is too.
        """
        if self.size == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        told = None if own is None else (is_for_the_user(own), str(own) or type(own).__name__)
        try:
            failures = {i: each for i, each in enumerate(self.gather(told)) if each is not None}
        except RuntimeError:
            # a process is gone, which is the lesser news
            if own is not None:
                raise own from None
            raise
        if not failures:
            return
        # some raise and some do not: a caller learns from this that all of them end
        self.agreed = True
        if own is not None and (self.first or not is_for_the_user(own)):
            raise own
        rank, (for_the_user, message) = next(iter(failures.items()))
        if not for_the_user:
            raise RuntimeError(f"process {rank} failed: {message}") from own
        if not self.first:
            raise ToldByFirst(message) from own
        raise ValueError(f"process {rank}: {message}")

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all of them."""
        made: Any = None
        with self.together():
            made = make() if self.first else None
        found: T = self.gather(made)[0]
        return found

    def leave(self) -> None:
        """Wait for the others where all end with an error, so that each has its own exit code.

        A launcher terminates the rest as soon as one process fails.
        """
        if self.size == 1 or not self.agreed:
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):
            self.gather(None)

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of one shape."""
        if self._group is None:
            dist: Any = torch.distributed
            where = dist.rendezvous("env://", self.rank, self.size)
            self._store, _, _ = next(where)
            own = dist.PrefixStore("fusedpo", self._store)
            self._group = dist.ProcessGroupGloo(own, self.rank, self.size, _PATIENCE)
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([found], [tensor]).wait()
        return found


def _first_set(names: Sequence[str], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), otherwise)


@functools.cache
def ranks() -> Ranks:
    """Those of this launch."""
    return Ranks()


def is_for_the_user(error: Exception) -> bool:
    """Whether this package raised it on purpose; anything else is a bug and keeps its traceback."""
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("fusedpo")


@dataclass(frozen=True)
class TrainJob:
    """Everything a run depends on.

    Attributes:
        model: a folder or a Hub name; ``demo`` for a small Llama with random weights.
        dataset: see ``rows.load``; ``demo`` for pairs from the standard library.
        output: folder to make. It appears when the run is complete.
        loss: one of ``fusedpo.losses``.
        method: how the loss gets its batches; None: as the loss has it. See ``trainers.methods``.
        learning_rate: see ``Defaults`` where None.
        batch_size: likewise; pairs, single responses, or prompts to sample from, on each device.
        epochs: how long, unless max_steps says so. See ``Defaults`` where both are None.
        max_steps: how long.
        accumulation: batches to an optimizer step; 1 where responses are sampled.
        warmup: share of the steps in which the learning rate rises; it then falls as a cosine.
        max_length: tokens of prompt and response.
        eval_fraction: share of the rows to hold out, if the dataset holds out none itself.
        evaluations: how many times to evaluate after the start.
        memory_budget: what the head may hold at a time, in bytes or as "512MiB".
        gradient_tolerance: the relative error that a gradient of the head may have; 0 is exact.
        dtype: of the weights; ``auto`` as they were saved.
        autocast: compute dtype over float32 weights; ``auto``: bfloat16 where a GPU has it.
        gradient_checkpointing: recompute the layers in the backward pass.
        save_steps: steps between checkpoints, 0 for none. They go beside ``output``.
        resume: go on from the last checkpoint, with as many processes as wrote it.
        report_to: trackers that transformers knows, such as "wandb"; for their files see ``logs``.
        run_name: how trackers are to call the run; None: the name of ``output``.
        compare: afterwards run one batch with full logits too, for a loss of the dataset's own
            pairs without further columns; None: for such a loss, if model and dataset are ``demo``.
        cpu: do not use an accelerator.
        seed: of weights, split and order.
        columns: of the dataset, under other names; see ``layout_choice.read_rows``.
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
    gradient_tolerance: float = 0.0
    dtype: Dtype = "float32"
    autocast: Autocast = "auto"
    gradient_checkpointing: bool = False
    save_steps: int = 0
    resume: bool = False
    report_to: Sequence[str] = ()
    run_name: str | None = None
    compare: bool | None = None
    cpu: bool = False
    seed: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)

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
        check_options(self.memory_budget, "auto", self.gradient_tolerance)
        if isinstance(self.report_to, str):
            got = repr(self.report_to)
            raise bad_value("report_to", "a sequence of names", got, f"write [{got}]")
        if self.compare and not self._comparable:
            raise bad_value("compare", "False for a loss that is not of pairs alone", "True")
        self.way.check(self.loss)
        self.way.check_batch(self.loss, self.batch_size or self.defaults.batch_size)
        if isinstance(self.way, Sampled) and self.accumulation != 1:
            raise bad_value(
                "accumulation",
                "1 for a loss of sampled responses",
                str(self.accumulation),
                "set batch_size, which counts their prompts",
            )
        if self.columns and self.dataset == DEMO:
            raise bad_value("columns", f"none beside dataset {DEMO!r}", repr(self.columns))
        needed = [n for n, about in self.way.numbers(self.loss).items() if about.default is None]
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
        return comparing.is_comparable(self.loss) and type(self.way) is Pairs

    @property
    def checkpoints(self) -> Path:
        return self.output.parent / f"{self.output.name}-checkpoints"

    @property
    def logs(self) -> Path:
        """Where a tracker of files, such as TensorBoard, writes."""
        if self.save_steps:
            return self.checkpoints
        return self.output.parent / f"{self.output.name}-logs"


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
    all_ranks = ranks()
    with all_ranks.together():
        _require("transformers", "accelerate", "tokenizers", "datasets", "matplotlib", "rich")
        _check_launch(job)
    from rich.console import Console

    from fusedpo.trainers.progress import Progress

    started = time.perf_counter()
    if console is None or not all_ranks.first:
        console = Console(quiet=not all_ranks.first)
    # a log file has no width of its own, and 80 columns would break the lines
    if not console.is_terminal:
        console.width = max(console.width, 120)
    _quiet()
    with all_ranks.together():
        trackers = _trackers(job)
    checkpoint = all_ranks.of_first(lambda: _check_folders(job, all_ranks.size))
    # rows before the model: a mistake in them is found in seconds
    with all_ranks.together():
        rows = _read_rows(job, console)
    with _staging(job.output, all_ranks) as staging:
        torch.manual_seed(job.seed)
        with all_ranks.together():
            model, tokenizer = _load_model(job)
        console.print(
            f"model: {type(model).__name__} {job.model}, "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, "
            f"vocabulary {model.get_output_embeddings().weight.shape[0]}"
        )
        with all_ranks.together():
            train, held_out = _tokenize_rows(job, *rows, model, tokenizer, console)
        del rows
        with all_ranks.together():
            trainer = _make_trainer(job, model, tokenizer, train, held_out, staging)
        _check_held_out(all_ranks, trainer)
        with Progress(console, job.way.signals) as progress:
            for callback in (progress, *trackers):
                trainer.add_callback(callback)
            _train(job, trainer, checkpoint, console)
        history = History.from_log(trainer.state.log_history)
        console.print(training_table(history, job.way.signals))
        metrics = {
            "model": job.model,
            "dataset": job.dataset,
            "loss": repr(job.loss),
            "training_pairs": len(train),
            "held_out_pairs": len(held_out),
            "processes": all_ranks.size,
            "seconds": round(time.perf_counter() - started, 1),
            "log": trainer.state.log_history,
            "versions": _versions(),
        }
        folder = staging / "model"
        if trainer.is_fsdp_enabled:
            # checkpoints may be of shards; this is for transformers to load
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(folder))
        with all_ranks.together():
            if all_ranks.first:
                # a pickle with this machine's paths, of use to nobody else
                (folder / "training_args.bin").unlink(missing_ok=True)
                title = f"{job.loss}: {len(train)} {job.way.unit}, and {len(held_out)} held out"
                draw_training(folder / "training.png", history, title, job.way.signals)
                _write_json(folder / METRICS, metrics)
                _publish(folder, job.output, staging)
                console.print(f"saved: {job.output}, with training.png and {METRICS}")
    with all_ranks.together():
        if job.compares and trainer.is_fsdp_enabled:
            console.print("comparison: left out under FSDP, where no process has the whole head")
        elif job.compares and all_ranks.first:
            comparison = comparing.compare(_comparison_batch(job, trainer, train))
            console.print(comparing.comparison_table(comparison))
            _add_comparison(job.output, metrics, comparison)
            console.print(f"saved: {job.output / 'comparison.png'}")
    if all_ranks.first and job.report_to and not job.save_steps:
        # empty, where no tracker wrote a file there
        with contextlib.suppress(OSError):
            job.logs.rmdir()
    console.print(f"done in {time.perf_counter() - started:.0f} s")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return metrics


def _train(
    job: TrainJob, trainer: FusedTrainerMixin, checkpoint: str | None, console: Console
) -> None:
    world = trainer.args.world_size
    size = trainer.args.train_batch_size * job.accumulation * world
    console.print(
        f"training: {job.loss}, {trainer.args.max_steps} steps of {size} {job.way.unit} "
        f"on {trainer.args.device}" + (f", {world} processes" if world > 1 else "")
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
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
        model: Any = stdlib_pairs.small_llama(tokenizer)
        return model if job.dtype == "auto" else model.to(getattr(torch, job.dtype)), tokenizer
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
            transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, trust_remote_code=False
            ),
            transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False),
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


def _read_rows(job: TrainJob, console: Console) -> tuple[str, list[Any], list[Any] | None]:
    """The dataset's name, its rows, and those it holds out itself; every row is checked."""
    if job.dataset == DEMO:
        splits = job.way.demo(_demo_passages(job.seed), job.seed)
    else:
        numbers = job.way.numbers(job.loss)
        splits, layout = read_rows(load(job.dataset), job.way.kind, job.columns, numbers)
        console.print(layout, markup=False)
    check = functools.partial(job.way.checked, splits=splits, loss=job.loss)
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
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def prepare(rows: list[Any]) -> list[Any]:
        done = job.way.tokenized(rows, tokenizer, max_length, vocabulary)
        if done.dropped:
            why = "do not fit" if job.way.kind == CONTEXTS else "have an empty response"
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
    lengths = [len(row[name]) for row in train for name in job.way.responses]
    console.print(
        f"dataset: {name}, {len(train)} {job.way.unit} to train on and {len(held_out)} held out, "
        f"{sum(lengths) / len(lengths):.0f} tokens a response"
    )
    return train, held_out


def _make_trainer(
    job: TrainJob, model: Any, tokenizer: Any, train: list[Any], held_out: list[Any], staging: Path
) -> FusedTrainerMixin:
    from transformers import PrinterCallback, TrainingArguments

    use_cpu = job.cpu or _asked("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    autocast = _autocast(job, use_cpu)
    batch_size = job.batch_size or job.defaults.batch_size
    world = ranks().size
    epoch = math.ceil(math.ceil(len(train) / (batch_size * world)) / job.accumulation)
    steps = job.max_steps
    if steps is None and job.epochs is None:
        steps = job.defaults.max_steps
    if steps is None:
        steps = math.ceil((job.epochs or job.defaults.epochs) * epoch)
    lasting = job.save_steps or job.report_to
    args = TrainingArguments(
        output_dir=str(job.logs if lasting else staging / "trainer"),
        run_name=job.run_name or job.output.name,
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
        # a run that goes on has evaluated then
        eval_on_start=not job.resume,
        eval_strategy="steps",
        eval_steps=math.ceil(steps / job.evaluations),
        logging_steps=max(1, steps // 60),
        # a NaN is shown, not replaced by the mean so far
        logging_nan_inf_filter=False,
        save_strategy="steps" if job.save_steps else "no",
        save_steps=job.save_steps or steps,
        # the trackers are added last, so that they get what other callbacks add to the logs
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
        gradient_tolerance=job.gradient_tolerance,
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


def _comparison_batch(
    job: TrainJob, trainer: FusedTrainerMixin, rows: list[Any]
) -> comparing.Batch:
    """Some training rows, as the trained model sees them."""
    from fusedpo.trainers.transformers import PreferenceCollator

    assert comparing.is_comparable(job.loss), "TrainJob refuses to compare another loss"
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
    options = (job.memory_budget, job.gradient_tolerance)
    return comparing.Batch(
        job.loss, hidden.to(head.weight.dtype), head, batch["labels"], reference, *options
    )


def _sequence_logprobs(
    model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    """[B], summed over the response."""
    found, _ = at_head(model, Score(aligned_labels(labels)), **inputs)
    return found.logprob.sum(1)


def _asked(name: str) -> bool:
    """Whether this variable of accelerate's is on."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _check_launch(job: TrainJob) -> None:
    """Refuse ways to launch that cannot train this job."""
    alone = not any(os.environ.get(name) for name in _RANK)
    if alone and _asked("ACCELERATE_USE_CPU") and os.environ.get("MASTER_ADDR"):
        raise bad_value(
            "accelerate launch",
            "a launcher of several processes",
            "one process, as --cpu starts whatever --num_processes says",
            "torchrun --nproc_per_node N -m fusedpo train --cpu ..., or accelerate launch "
            "--multi_gpu --num_processes N -m fusedpo train --cpu ...",
        )
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise bad_value(
            "accelerate launch",
            "DistributedDataParallel or FSDP",
            "DeepSpeed",
            "leave --use_deepspeed out, or use PreferenceTrainer in a script of your own",
        )
    if not _asked("ACCELERATE_USE_FSDP"):
        return
    remedy = "leave --use_fsdp out, for DistributedDataParallel"
    if isinstance(job.way, (SelfAugmented, Sampled)):
        got = f"FSDP, with {type(job.way).__name__}"
        raise bad_value("accelerate launch", "whole weights for a model that writes", got, remedy)
    if job.loss.needs_reference:
        got = f"FSDP, with {type(job.loss).__name__}"
        remedy += ", or take a loss without one, such as simpo"
        raise bad_value("accelerate launch", "whole weights for a loss's reference", got, remedy)
    if job.compare:
        raise bad_value("compare", "False under FSDP, where no process has the head", "True")


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
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise bad_value(
                "report_to", "a tracker that is installed", f"{name!r} ({reason})"
            ) from error
    return made


def _check_folders(job: TrainJob, processes: int) -> str | None:
    """Refuse now what could not be written after hours of training.

    Returns:
        The checkpoint to go on from, if that is asked for.
    """
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
        return _last_checkpoint(job, processes)
    # of two runs in one folder, the newest checkpoint may be the earlier one's
    earlier = [path for path in _checkpoints(job) if job.way.is_saved(path, _written_by(path))]
    if job.save_steps and earlier:
        raise bad_value(
            "output",
            f"no checkpoints of an earlier run in {job.checkpoints}",
            earlier[0].name,
            "go on from it with --resume, remove that folder, or choose another name",
        )
    return None


def _last_checkpoint(job: TrainJob, processes: int) -> str:
    """The newest checkpoint that every process has written whole."""
    found = _checkpoints(job)
    by = {path: _written_by(path) for path in found}
    saved = [path for path in found if by[path] == processes and job.way.is_saved(path, processes)]
    damaged = []
    for path in saved:
        file = next((file for file in sorted(path.rglob("*")) if not _is_whole(file)), None)
        if file is None:
            return str(path)
        damaged.append(file)
    if damaged:
        raise bad_value(
            "resume",
            f"a whole checkpoint in {job.checkpoints}",
            f"damaged files: {', '.join(map(str, damaged))}",
            "put back a good copy, or remove the folder and start anew",
        )
    others = sorted({count for count in by.values() if count not in (0, processes)})
    if others:
        raise bad_value(
            "resume",
            f"a checkpoint of {_processes(processes)} in {job.checkpoints}",
            f"checkpoints of {' and '.join(map(str, others))}",
            "go on with as many processes as wrote it",
        )
    raise bad_value(
        "resume",
        f"a checkpoint in {job.checkpoints}",
        "none",
        "checkpoints are written with save_steps",
    )


def _checkpoints(job: TrainJob) -> list[Path]:
    """Those with a trainer's state, which the first process writes last; the newest first."""
    found = [path.parent for path in job.checkpoints.glob("checkpoint-*/trainer_state.json")]
    # others are a person's, such as checkpoint-best
    steps = {path: path.name.rpartition("-")[2] for path in found}
    return sorted((p for p in found if steps[p].isdecimal()), key=lambda p: -int(steps[p]))


def _is_whole(path: Path) -> bool:
    """Whether a file was not cut off, as by a full disk, and those that it names are there."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            # compares what the header says with the size of the file
            with safe_open(path, framework="pt"):
                return True
        if path.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(path)
        if path.suffix != ".json":
            return True
        content = json.loads(path.read_text(encoding="utf-8"))
        names = content["weight_map"].values() if path.name.endswith(".index.json") else ()
        return all(Path(name).name == name and (path.parent / name).is_file() for name in names)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _written_by(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint: each leaves its random state."""
    if (checkpoint / "rng_state.pth").is_file():
        return 1
    return len(list(checkpoint.glob("rng_state_*.pth")))


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _check_held_out(all_ranks: Ranks, trainer: FusedTrainerMixin) -> None:
    """Processes with different numbers of rows would wait for each other in evaluation."""
    with all_ranks.together():
        held_out: Any = trainer.eval_dataset
        sizes = all_ranks.gather(len(held_out))
        if len(set(sizes)) > 1:
            counts = ", ".join(map(str, sizes))
            raise bad_value(
                "held-out rows",
                "the same on every process",
                f"{counts} of them",
                "processes of one run need the same files and the same kind of device",
            )


@contextlib.contextmanager
def _staging(output: Path, all_ranks: Ranks) -> Iterator[Path]:
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

    folder = Path(all_ranks.of_first(make))
    try:
        yield folder
    finally:
        if all_ranks.first:
            with _undisturbed():
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without signals: a launcher sends one when another process fails, whatever is under way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, *TERMINATING)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


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


def _add_comparison(
    output: Path, metrics: dict[str, Any], comparison: comparing.Comparison
) -> None:
    comparing.draw_comparison(output / "comparison.png", comparison)
    metrics["comparison"] = comparison.to_json()
    _write_json(output / METRICS, metrics)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("fusedpo", "torch", "transformers", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
