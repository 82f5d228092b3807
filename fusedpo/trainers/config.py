"""What a training run depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fusedpo.benchmarks.compare import is_comparable
from fusedpo.checks import bad_choice, bad_type, bad_value, count, in_range, number, positive
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.model_head import check_options
from fusedpo.trainers.adapters import AdapterSettings, is_adapter
from fusedpo.trainers.methods import method_of
from fusedpo.trainers.methods.base import TUNED, Defaults, Method

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Autocast = Literal["auto", "none", "bfloat16", "float16"]

DEMO = "demo"

# the least of what is counted
_COUNTS = {
    **dict.fromkeys(("batch_size", "max_steps", "accumulation", "evaluations"), 1),
    # a prompt token and a response token
    "max_length": 2,
    **{"save_steps": 0, "seed": 0},
}
# what is neither a number nor a choice
_KINDS: dict[str, tuple[type[Any], str]] = {
    "model": (str, "a folder or a name, as text"),
    "dataset": (str, "a file, a folder or a name, as text"),
    "output": (Path, "a pathlib.Path"),
    "loss": (Loss, "a loss, such as fusedpo.losses.SimPO()"),
    "method": (Method, "a Method, such as fusedpo.trainers.methods.Pairs()"),
    "adapters": (AdapterSettings, "an AdapterSettings"),
    "columns": (Mapping, "a mapping of names"),
    "training": (Mapping, "a mapping of arguments by their names"),
    "report_to": (Sequence, "a sequence of names"),
    "run_name": (str, "a name"),
    **dict.fromkeys(
        ("length_groups", "gradient_checkpointing", "resume", "compare", "cpu"),
        (bool, "True or False"),
    ),
}

# adapters take larger steps than the weights below them
ADAPTED = replace(TUNED, learning_rate=10 * TUNED.learning_rate)

# of transformers.TrainingArguments, beside those that a run has under names of its own
SERVED = (
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("metric_for_best_model", "greater_is_better"),
    *("per_device_eval_batch_size", "data_seed", "full_determinism", "torch_empty_cache_steps"),
    *("logging_steps", "logging_first_step", "save_total_limit", "ddp_bucket_cap_mb"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
)
# what has no effect where another option is left out
_BESIDE = {
    "save_total_limit": "save_steps",
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), "save_steps"),
    **dict.fromkeys(("run_name", "project"), "report_to"),
    **{f"trackio_{kind}_id": "report_to" for kind in ("space", "bucket", "static_space")},
}
# what others of them are called here
INSTEAD = {
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "bf16": "autocast",
    "fp16": "autocast",
    "use_cpu": "cpu",
    "eval_strategy": "evaluations",
    "eval_steps": "evaluations",
    "eval_on_start": "evaluations",
    "save_strategy": "save_steps",
    "resume_from_checkpoint": "resume",
    "activation_checkpointing": "gradient_checkpointing",
}


@dataclass(frozen=True)
class TrainJob:
    """Everything a run depends on; the fields are the options of ``fusedpo train``.

    Attributes:
        model: a folder or a Hub name of a causal language model, or an adapter's folder;
            ``smollm2`` for a real one that is a package; ``demo`` for a small Llama with random
            weights.
        dataset: a .jsonl or .json file, a file or folder that ``datasets`` reads, or a Hub name, in
            one of the layouts of docs/training.md; ``demo`` for pairs from the standard library of
            Python.
        output: folder to make. It appears whole at the end, or not at all.
        loss: one of ``fusedpo.losses``.
        method: how the loss gets its batches; None: as the loss has it. See ``trainers.methods``.
        learning_rate: the highest one, which the schedule rises to and falls from.
        batch_size: pairs, single responses, or prompts to sample from, on each device.
        epochs: passes over the data, unless max_steps says how long.
        max_steps: optimizer steps, in the place of epochs.
        accumulation: batches to an optimizer step; 1 where responses are sampled.
        warmup: share of the steps in which the learning rate rises; it then falls as a cosine.
        max_length: tokens of prompt and response together, at most; a longer row loses the start of
            its prompt first.
        eval_fraction: share of the rows to hold out, if the dataset holds out none itself.
        evaluations: how many times to evaluate, beside the one before the first step.
        memory_budget: memory that the head may take at a time, in bytes or as 512MiB; by default
            256MiB, or on a GPU 3 % of its memory, 4GiB at most.
        gradient_tolerance: the relative error that a gradient of the head may have, for less time:
            2e-3 is what rounding to bfloat16 costs; 0 is exact.
        length_groups: run rows of nearly one length together, each group in a forward of its own
            length: the same loss with little padding; by default for short and long contexts.
        dtype: of the weights; ``auto`` as they were saved. Half precision loses small steps.
        autocast: compute dtype over float32 weights; ``auto`` for bfloat16 where a GPU has it.
        gradient_checkpointing: recompute the layers in the backward pass rather than keep them.
        save_steps: optimizer steps between checkpoints in OUTPUT-checkpoints; 0 for none.
        resume: go on from the newest checkpoint in OUTPUT-checkpoints, with as many processes as
            wrote it.
        report_to: trackers that transformers knows and that are installed, such as wandb,mlflow;
            their files go to OUTPUT-logs, or beside the checkpoints where there are some.
        run_name: how trackers are to call the run; by default the name of the output.
        compare: afterwards set one batch beside a program with full logits, in loss, gradients,
            time and memory; for pairs of the dataset's own without further columns, and by default
            for these if model and dataset are ``demo``.
        cpu: use the CPU, even where there is an accelerator.
        seed: of random numbers: new weights, which rows are held out, and the order of the others.
        columns: the dataset's own names of the columns that are read, where they have others, such
            as prompt=question,chosen=yes; in Python a mapping. NAME= leaves a column out
            (docs/training.md).
        adapters: those of LoRA that are trained in place of all weights, see ``trainers.adapters``.
        training: further arguments of ``transformers.TrainingArguments``, by their names there:
            those of ``SERVED``.
    """

    model: str
    dataset: str
    output: Path
    loss: Loss
    method: Method | None = None
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
    length_groups: bool | None = None
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
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_default = {f.name: f.default for f in fields(self)}
        # where None is none of the defaults, it is no value either
        given = {
            name: value
            for name, default in by_default.items()
            if (value := getattr(self, name)) is not None or default is not None
        }
        for name, (kind, expected) in _KINDS.items():
            if name in given and not isinstance(given[name], kind):
                raise bad_type(name, expected, repr(given[name]))
        for name in ("learning_rate", "epochs"):
            if name in given:
                positive(name, given[name])
        for name, least in _COUNTS.items():
            if name in given:
                count(name, given[name], least)
        if self.seed >= 2**32:
            raise bad_value("seed", "below 2**32", str(self.seed))
        for name, known in (("dtype", get_args(Dtype)), ("autocast", get_args(Autocast))):
            if getattr(self, name) not in known:
                raise bad_choice(name, getattr(self, name), known)
        in_range("warmup", self.warmup, 0.0, 1.0)
        if not 0 < number("eval_fraction", self.eval_fraction) < 1:
            raise bad_value("eval_fraction", "a number between 0 and 1", f"{self.eval_fraction:g}")
        check_options(self.memory_budget, "auto", self.gradient_tolerance)
        if self.length_groups is not None and not isinstance(self.loss, PreferenceLoss):
            expected, got = "None for sampled responses", str(self.length_groups)
            raise bad_value("length_groups", expected, got, "leave it out")
        if isinstance(self.report_to, str):
            got = repr(self.report_to)
            raise bad_value("report_to", "a sequence of names", got, f"write [{got}]")
        self.adapters.check_model(
            self.model, from_folder=self._from_adapter, kept=self.model != DEMO
        )
        if self.compare and not self._comparable:
            expected = "False with adapters, or with a loss of more than the dataset's own pairs"
            raise bad_value("compare", expected, "True", "leave it out")
        self.way.check(self.loss)
        size = self.batch_size or self.defaults.batch_size
        self.way.check_batch(self.loss, size, self.accumulation)
        if self.columns and self.dataset == DEMO:
            expected, remedy = f"none beside dataset {DEMO!r}", "name a dataset of your own"
            raise bad_value("columns", expected, repr(self.columns), remedy)
        needed = [n for n, about in self.way.numbers(self.loss).items() if about.default is None]
        if needed and self.dataset == DEMO:
            expected = f"one with the columns {', '.join(needed)}, which the loss takes"
            raise bad_value("dataset", expected, repr(DEMO), "name a dataset of your own")
        for name, value in self.training.items():
            if name not in SERVED:
                raise _not_served(name, value)
        for name, other in _BESIDE.items():
            value = getattr(self, name, self.training.get(name))
            if value is not None and not getattr(self, other):
                expected = f"none without {other}, where it has no effect"
                raise bad_value(name, expected, repr(value), f"set {other}, or leave it out")

    @property
    def way(self) -> Method:
        """The method."""
        return method_of(type(self.loss))() if self.method is None else self.method

    @property
    def defaults(self) -> Defaults:
        if self.model == DEMO:
            return self.way.from_scratch
        return ADAPTED if self.trains_adapters else TUNED

    @property
    def compares(self) -> bool:
        if self.compare is not None:
            return self.compare
        return self.model == self.dataset == DEMO and self._comparable

    @property
    def _comparable(self) -> bool:
        """Whether the program with full logits is written for this loss and model."""
        return is_comparable(self.loss) and self.way.comparable and not self.trains_adapters

    @property
    def _from_adapter(self) -> bool:
        return is_adapter(Path(self.model).expanduser())

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are trained, and not all weights."""
        merged = self.adapters.merge_adapter
        return self.adapters.lora_rank > 0 or (self._from_adapter and not merged)

    @property
    def checkpoints(self) -> Path:
        return self.output.parent / f"{self.output.name}-checkpoints"

    @property
    def logs(self) -> Path:
        """Where a tracker of files, such as TensorBoard, writes."""
        if self.save_steps:
            return self.checkpoints
        return self.output.parent / f"{self.output.name}-logs"


def _not_served(name: str, value: Any) -> ValueError:
    from transformers import TrainingArguments

    if name not in TrainingArguments.__dataclass_fields__:
        return bad_choice("training", name, SERVED)
    expected = "left out, as fusedpo train cannot serve it"
    if name in INSTEAD:
        expected = f"{INSTEAD[name]} in its place, as fusedpo train calls it"
    return bad_value(name, expected, repr(value))
