"""What does a whole training step gain?

Steps of TRL's trainers as they are, data loading, metrics and optimizer included: DPO with a
reference model, and SimPO by CPOTrainer. The model is a Llama with random weights and gradient
checkpointing, which is TRL's default. What differs is how log-probabilities come about:

    TRL, full logits     as up to TRL 1.13: the model's own forward. CPOTrainer still is so.
    TRL's fused head     TRL as it is since 1.15
    fusedpo              FusedDPOTrainer, FusedCPOTrainer

Tokens count prompts too. Memory is what a fresh process comes to hold beyond the trainer that it
has built: gradients and the optimizer's state, which all have alike, activations, and the head. At
the first step all have to log the same loss.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fusedpo.benchmarks import measure, plots, reports, section, sweep, toys
from fusedpo.benchmarks.formulas import TITLES
from fusedpo.benchmarks.measure import Advance
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.peers import BASELINE, OURS, PEERS
from fusedpo.benchmarks.section import number, quotient
from fusedpo.benchmarks.shapes import MIB, Shape
from fusedpo.benchmarks.shapes import Case as Common
from fusedpo.benchmarks.timing import in_rounds, told
from fusedpo.benchmarks.worker import Peak, memory_errors
from fusedpo.labels import IGNORE_INDEX
from fusedpo.sizes import format_bytes, parse_budget

PROGRAMS = {
    "dpo": {
        "full_logits": "TRL, full logits",
        "trl": "TRL's fused head",
        "fusedpo": "fusedpo",
    },
    # CPOTrainer has no fused head
    "simpo": {"full_logits": "TRL, full logits", "fusedpo": "fusedpo"},
}
"""Of each loss, by the names that benchmarks/peers.py has for them."""

CPU_MEMORY, GPU_MEMORY = "1GiB", "40GiB"
TIMED_STEPS = 2  # of a training; the step before them warms up
ROUNDS, QUICK_ROUNDS = 5, 2
MEASURED_STEPS = 2  # from the second on, the optimizer has a state
FARTHEST = 4  # times the longest measured length; a line from two points tells nothing beyond


@dataclass(frozen=True)
class Case(Common):
    """A program's training.

    Attributes:
        shape: ``pairs`` a step, and ``tokens`` of a response, the last of which ends it.
        prompt: tokens before both responses.
    """

    measured_by = "fusedpo.benchmarks.training:answer"

    prompt: int = 0
    layers: int = 1

    @property
    def tokens(self) -> int:
        """Of a step, prompts counted as often as they are read by the model."""
        return 2 * self.shape.pairs * (self.prompt + self.shape.tokens)

    @property
    def loss_tolerance(self) -> float:
        """Of the loss: 1e-4, and where that is more, what float32 makes of four sums of so many
        log-probabilities, times DPO's beta. In half precision programs round logits or do not."""
        if self.dtype != "float32":
            return 0.05
        total = self.shape.tokens * math.log(self.shape.vocab)
        return max(1e-4, 4 * 0.1 * total * torch.finfo(torch.float32).eps / 2)


@dataclass
class Row(sweep.Row):
    """A program at a length."""

    case: Case

    def to_json(self) -> dict[str, Any]:
        peer = "trl" if self.case.peer == BASELINE else self.case.peer
        speed = self.case.tokens / self.median if self.median else None
        own = {"version": PEERS[peer].version, "tokens": self.case.tokens}
        return {**super().to_json(), **own, "tokens_per_second": speed}


# a training


def missing() -> str | None:
    """Why trainings cannot run here, or None if they can."""
    try:
        import datasets  # noqa: F401
        import trl.trainer.dpo_trainer as module

        import fusedpo.trainers.trl  # noqa: F401
    except ImportError as error:
        return f"not installed (pip install 'fusedpo[trl]'): {str(error).splitlines()[0]}"
    if not hasattr(module, "add_fused_lm_head"):
        return f"needs TRL 1.15 or later, got {version('trl')}"
    return None


def build(case: Case, steps: int, folder: str, step_done: Callable[[], None]) -> Any:
    """A trainer of the case; ``step_done`` is called after every step of the optimizer."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step_done()

    trainer_class, config_class, own = _method(case)
    args = config_class(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=case.shape.pairs,
        max_length=case.prompt + case.shape.tokens,
        gradient_checkpointing=True,
        bf16=case.dtype == "bfloat16",
        fp16=False,
        use_cpu=case.on_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own,
    )
    # DataParallel, which TRL refuses, is what a Trainer takes where it sees several
    if args.n_gpu > 1:
        args._n_gpu = 1
    # of another seed: with the policy's own copy, the first loss is log 2 whoever computes it
    names = ("model", "ref_model") if case.loss == "dpo" else ("model",)
    known = min(toys.WORDS, case.shape.vocab - 3)
    rows = toys.rows(case.shape.pairs * steps, case.prompt, case.shape.tokens - 1, known)
    with _full_logits() if case.peer == BASELINE else contextlib.nullcontext():
        trainer = trainer_class(
            **{name: _model(case, seed) for seed, name in enumerate(names)},
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=toys.tokenizer(),
            callbacks=[Clock()],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _method(case: Case) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer, its configuration, and options."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from fusedpo.trainers.trl import FusedCPOTrainer, FusedDPOTrainer

    if case.loss == "simpo":
        own = {
            "loss_type": "simpo",
            "cpo_alpha": 0.0,
            "beta": 2.0,
            "simpo_gamma": 0.5,
            "remove_unused_columns": False,  # as it wants it
        }
        return FusedCPOTrainer if case.peer == OURS else CPOTrainer, CPOConfig, own
    # the baseline's is built within _full_logits
    return FusedDPOTrainer if case.peer == OURS else DPOTrainer, DPOConfig, {}


def _model(case: Case, seed: int) -> Any:
    sizes, longest = (case.shape.vocab, case.shape.hidden), case.prompt + case.shape.tokens
    model = toys.llama(*sizes, case.layers, seed, longest=longest, device=case.device)
    return model.to(case.torch_dtype)


def _full_logits() -> Any:
    """DPOTrainers that are built meanwhile have full logits; CPOTrainers do in any case.

    Since 1.15 no option of TRL does that: what gives a model its fused head has to be replaced.
    """
    return mock.patch("trl.trainer.dpo_trainer.add_fused_lm_head", _add_full_logits)


def _add_full_logits(model: Any, outputs: Sequence[str] = ("log_probs",)) -> None:
    """In the place of ``add_fused_lm_head``: what DPOTrainer did itself up to TRL 1.13, on the
    logits of all positions, with the same functions of TRL's."""
    from trl.trainer.utils import FusedCausalLMOutput, entropy_from_logits, selective_log_softmax

    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        assert labels is not None, "trainers give it"
        logits, labels = original(*args, **kwargs).logits[..., :-1, :], labels[..., 1:]
        mask = labels != IGNORE_INDEX
        found = {"log_probs": selective_log_softmax(logits, labels.clamp(min=0)) * mask}
        seen = logits.detach()
        if "entropy" in outputs:
            found["entropy"] = entropy_from_logits(seen)
        if "mean_logits" in outputs:
            found["mean_logits"] = seen.mean(-1)
        if "is_top1" in outputs:
            found["is_top1"] = seen.argmax(-1) == labels
        return FusedCausalLMOutput(label_mask=mask, **found)

    model.forward = types.MethodType(forward, model)


@dataclass(frozen=True)
class Trained:
    """The loss that was logged at the first step, and seconds of the steps after it."""

    loss: float
    seconds: tuple[float, ...]


def train(
    case: Case, steps: int, around: Callable[[Callable[[], object]], Any] | None = None
) -> tuple[Trained, Any]:
    """Build a trainer and train.

    Args:
        around: calls the training, which it is given; what it returns is returned too.
    """
    _free(case)  # of what failed before
    stamps: list[float] = []

    def step_done() -> None:
        if not case.on_cpu:
            torch.cuda.synchronize(case.device)
        stamps.append(time.perf_counter())

    with _quiet(), tempfile.TemporaryDirectory(prefix="training-") as folder:
        trainer = build(case, steps, folder, step_done)
        torch.manual_seed(2)
        found = around(trainer.train) if around else trainer.train()
        loss = float(trainer.state.log_history[0]["loss"])
        del trainer
    _free(case)
    return Trained(loss, tuple(b - a for a, b in pairwise(stamps))), found


def _free(case: Case) -> None:
    gc.collect()
    if not case.on_cpu:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what TRL, transformers and datasets say meanwhile."""
    import datasets
    from transformers.utils import logging

    verbosity, hidden = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()


# memory, in a process of its own


def peak_of(case: Case) -> Peak:
    """Bytes beyond the built trainer, and the first loss; in a process that has trained nothing.

    Raises:
        OutOfMemory: if it does not fit.
    """
    tiny = Shape(pairs=case.shape.pairs, tokens=4, hidden=64, vocab=300)
    with memory_errors():
        # pays what is paid once: thread pools, compilers, code that is loaded late
        train(replace(case, shape=tiny, prompt=4, layers=1), 1)
        trained, peak = train(
            case, MEASURED_STEPS, lambda function: measure.peak_bytes(function, case.device)
        )
    return Peak(peak, 0, loss=trained.loss)


def preload() -> None:
    """What a training imports."""
    if missing() is None:
        _method(Case(OURS, Shape(1, 4, 64, 300), loss="dpo"))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The peak of a case."""
    return asdict(peak_of(Case.from_json(request["case"])))


# the longest response


def longest(peaks: Sequence[tuple[float, float]], memory: float) -> tuple[int, str] | None:
    """The longest response whose training stays within a memory, and how that is known.

    From lengths and their peaks in bytes, by the line through the two nearest lengths:
    "interpolated" between them, "extrapolated" beyond them, or "at least" where it is farther than
    ``FARTHEST``; None where they do not tell.
    """
    peaks = sorted(peaks)
    if len(peaks) < 2:
        return None
    # the first pair whose longer length is too much, or else the last
    at = next((i for i, (_, peak) in enumerate(peaks[1:-1]) if peak > memory), len(peaks) - 2)
    (x0, y0), (x1, y1) = peaks[at], peaks[at + 1]
    if y1 <= y0 and memory < y1:
        return None
    # a peak that does not grow says no more than that
    x = x0 + (memory - y0) * (x1 - x0) / (y1 - y0) if y1 > y0 else math.inf
    limit = FARTHEST * peaks[-1][0]
    if x > limit:
        return math.floor(limit), "at least"
    return max(0, math.floor(x)), "interpolated" if x0 <= x <= x1 else "extrapolated"


# the question


def cases(options: Options) -> list[Case]:
    """Of the baseline, by loss and length."""
    # the second loss is another trainer, and as long again
    losses = ("dpo",) if options.quick and options.losses is None else tuple(PROGRAMS)
    prompt, layers = (32, 2) if options.on_cpu else (256, 16)
    if options.shapes:
        shapes = list(options.shapes)
    elif options.on_cpu:
        lengths = (32, 128) if options.quick else (64, 256, 1024)
        shapes = [Shape(2, length, 256, 50_304) for length in lengths]
    else:  # about the size of Llama-3.2-1B
        lengths = (1024, 4096) if options.quick else (1024, 4096, 16384)
        shapes = [Shape(2, length, 2048, 128_256) for length in lengths]
    at = options.dtype_name, options.device
    return [
        Case(BASELINE, shape, *at, loss=loss, prompt=prompt, layers=layers)
        for loss in options.of(losses)
        for shape in shapes
    ]


@dataclass(frozen=True)
class Question(sweep.Question):
    """A sweep whose steps are those of trainings."""

    def measured(self, options: Options) -> dict[str, Any]:
        if torch.device(options.device).index:
            raise ValueError(
                f"--device: expected cuda, as trainers take the first GPU, got {options.device}; "
                "set CUDA_VISIBLE_DEVICES"
            )
        memory = parse_budget(CPU_MEMORY if options.on_cpu else GPU_MEMORY)
        found = super().measured(options)
        return {**found, "memory": memory, "longest": _all_longest(found["rows"], memory)}

    def rows(self, options: Options) -> list[list[sweep.Row]]:
        reason = missing()
        return [
            [
                Row(
                    TITLES[case.loss],
                    case.shape.tokens,
                    label,
                    replace(case, peer=peer),
                    missing=reason,
                )
                for peer, label in PROGRAMS[case.loss].items()
                if peer in options.peers
            ]
            for case in cases(options)
        ]

    def time(self, rows: Sequence[sweep.Row], options: Options, advance: Advance) -> None:
        """Trainings of a few steps in turn, as long as the point may take; each is built anew."""
        for row in rows:
            advance(f"{row.group} {row.x:g}: time of {row.entry}")
        most = QUICK_ROUNDS if options.quick else ROUNDS
        for i in in_rounds(range(len(rows)), most, options.seconds_a_point):
            row = rows[i]
            if row.missing:
                continue
            assert isinstance(row, Row)
            try:
                trained, _ = train(row.case, 1 + TIMED_STEPS)
            except (torch.OutOfMemoryError, MemoryError):
                row.drop("out of memory")
            except Exception as error:  # a failing program is a line of the table, not its end
                row.drop(told(error))
            else:
                row.seconds, row.loss = (*row.seconds, *trained.seconds), trained.loss
        sweep.compare(rows)


def _all_longest(rows: Sequence[dict[str, Any]], memory: int) -> list[dict[str, Any]]:
    peaks: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in rows:
        if r["extra_bytes"]:
            peaks.setdefault((r["group"], r["entry"]), []).append((r["x"], r["extra_bytes"]))
    fits = {key: longest(known, memory) for key, known in peaks.items()}
    return [
        {"group": group, "entry": entry, "tokens": fit[0], "how": fit[1]}
        for (group, entry), fit in fits.items()
        if fit is not None
    ]


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words. The longest response stands at a program's longest length."""
    rows, memory = answer["rows"], format_bytes(answer["memory"])
    last = {(r["group"], r["entry"]): r["x"] for r in rows if r["extra_bytes"] is not None}
    fits = {(f["group"], f["entry"]): f for f in answer["longest"]}

    def fit(row: Mapping[str, Any]) -> str:
        key = (row["group"], row["entry"])
        found = fits.get(key) if last.get(key) == row["x"] else None
        return "" if found is None else f"{found['tokens']} {found['how']}, two lengths"

    return section.table(
        rows,
        ("", "group"),
        (answer["axis"], lambda row: f"{row['x']:g}"),
        ("program", "entry"),
        ("ms a step", ("median_seconds", 1e3, 0)),
        ("tokens/s", ("tokens_per_second", 1.0, 0)),
        ("x full logits", lambda row: number(quotient(1.0, sweep.ratio(row, rows)))),
        ("MiB beyond the trainer", ("extra_bytes", 1 / MIB, 1)),
        (f"longest response in {memory}", fit),
        ("", "missing"),
    )


def plot(answer: dict[str, Any]) -> Any:
    """Tokens a second and memory against the length of a response, as a matplotlib Figure."""
    wanted = (
        ("tokens_per_second", 1.0, "tokens a second, whole steps"),
        ("extra_bytes", MIB, "MiB beyond the built trainer"),
    )
    return plots.along(answer, wanted)


QUESTION = Question(
    "training",
    (__doc__ or "").splitlines()[0],
    "tokens of a response",
    points=lambda options: [],
    kind="training",
)

if __name__ == "__main__":
    sys.exit(reports.main(QUESTION))
