"""Somebody else's trainer, run twice: as it is, and with lazy logits.

``compare`` builds the trainer anew for each of the two, from the same seed, and lets it train and
evaluate. What both have to agree on is all that is logged and every gradient; and what the second
never does is to hold a tensor of many rows of the vocabulary.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainers import trl_runs

import fusedpo
from fusedpo.lazy import LazyTensor, operations

VOCAB, BUDGET, TALLEST = trl_runs.VOCAB, "64KiB", 64
METRICS, GRADIENTS = 2e-4, 1e-5
rows_of_table: list[str] = []


class Prepare:
    """What is done to the models of a run: nothing."""

    def __call__(self, model: Any) -> Any:
        """To one that the test has made."""
        return model

    def everywhere(self) -> contextlib.AbstractContextManager[Any]:
        """To those that a program makes by itself."""
        return contextlib.nullcontext()


class Lazily(Prepare):
    """Lazy logits, as a user asks for them.

    Args:
        unknown: as of ``lazy_logits``.
    """

    def __init__(self, unknown: str = "raise") -> None:
        self.options: dict[str, Any] = {"memory_budget": BUDGET, "unknown": unknown}

    def __call__(self, model: Any) -> Any:
        fusedpo.lazy_logits(model, **self.options)
        return model

    def everywhere(self) -> contextlib.AbstractContextManager[Any]:
        return fusedpo.lazy_logits(**self.options)


class Tall(TorchDispatchMode):
    """Notes the largest float tensor there is, as a number of rows of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            # a lazy tensor has the size of logits and no memory; nor has one on the meta device
            if not isinstance(t, Tensor) or isinstance(t, LazyTensor) or t.is_meta:
                continue
            if t.is_floating_point():
                numbers = t.untyped_storage().nbytes() // t.element_size()
                self.rows = max(self.rows, numbers // VOCAB)
        return result


@dataclass
class Run:
    """What came of one training.

    Attributes:
        logs: as the trainer logged them.
        gradients: of each step, by parameter.
        rows: of the vocabulary, in the largest float tensor.
        said: what lazy logits warned of.
    """

    logs: list[dict[str, Any]]
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    rows: int = 0
    said: list[str] = field(default_factory=list)


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of a model's parameters, by name."""
    return {
        name: p.grad.detach().double().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


class Recorder(transformers.TrainerCallback):
    """Keeps the gradients of every step of a transformers trainer, and what it logs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.logs: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.steps.append(gradients(model))

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        self.logs.append(dict(logs))


def train(make: Callable[[Prepare], Any], prepare: Prepare) -> Run:
    """Build a transformers trainer, train and evaluate.

    Args:
        make: builds it; calls its argument with every model, as soon as there is one.
        prepare: that argument.
    """
    tall, recorder = Tall(), Recorder()
    with watched(tall) as said:
        torch.manual_seed(0)
        trainer = make(prepare)
        if getattr(trainer, "ref_model", None) is not None:  # also one of the trainer's own making
            prepare(trainer.ref_model)
        trainer.add_callback(recorder)
        torch.manual_seed(1)
        trainer.train()
        if trainer.eval_dataset is not None:
            trainer.evaluate()
    return Run(recorder.logs, recorder.steps, tall.rows, said)


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Every transformers trainer that a program makes has the recorder too."""
    original = transformers.Trainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(recorder)

    transformers.Trainer.__init__ = init
    try:
        yield
    finally:
        transformers.Trainer.__init__ = original


@contextlib.contextmanager
def watched(tall: Tall) -> Iterator[list[str]]:
    """The largest tensor is noted, nothing is printed; gives what lazy logits say."""
    said: list[str] = []
    with (
        warnings.catch_warnings(record=True) as caught,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        tall,
    ):
        warnings.simplefilter("always")
        yield said
    said += [text for w in caught if (text := str(w.message)).startswith("lazy logits")]


def compare(
    case: str,
    make: Callable[[Prepare], Any],
    *,
    runner: Any = train,
    untouched: bool = False,
    needs: str = "",
) -> None:
    """Run a trainer plainly and lazily, and check that nothing differs but memory.

    Args:
        case: the row of the table.
        make: builds the trainer, as of ``runner``.
        runner: gives a ``Run``.
        untouched: whether this trainer asks for no logits, so that not even memory differs.
        needs: an operation of the trainer that needs the logits, which is what is said first.
    """
    plain = runner(make, Prepare())
    operations._reported.clear()  # places are told of once a process
    lazy = runner(make, Lazily("warn" if needs else "raise"))
    check(case, plain, lazy, untouched, needs)


def check(case: str, plain: Run, lazy: Run, untouched: bool = False, needs: str = "") -> None:
    """Compare two runs, and add a row to the table."""
    gaps = metric_differences(plain.logs, lazy.logs)
    of_gradients = gradient_difference(plain.gradients, lazy.gradients)
    losses = {name: gap for name, gap in gaps.items() if name in ("loss", "eval_loss")}
    assert losses, f"no loss was logged, only {sorted(gaps)}"
    others = {name: gap for name, gap in gaps.items() if name not in losses}
    worst = max(others, key=others.__getitem__, default="")
    rows_of_table.append(
        f"| {case} | {max(losses.values()):.0e} | {others.get(worst, 0):.0e} {worst} "
        f"| {of_gradients:.0e} | {plain.rows} -> {lazy.rows} |"
    )
    print("\n" + rows_of_table[-1])
    if needs:
        assert lazy.said and f": {needs} needs the real logits" in lazy.said[0], lazy.said
    else:
        assert not lazy.said, lazy.said
    bad = {name: gap for name, gap in gaps.items() if not gap <= METRICS}
    assert not bad, f"these differ by more than {METRICS}: {bad}"
    assert of_gradients <= GRADIENTS, f"gradients differ by {of_gradients}"
    if untouched:
        assert not max(gaps.values()) and not of_gradients and plain.rows == lazy.rows
        return
    if needs:
        return
    assert plain.rows > TALLEST, f"the plain run's tensors have {plain.rows} rows: too few to tell"
    assert lazy.rows <= TALLEST, f"a float tensor of {lazy.rows} rows of the vocabulary"


def metric_differences(
    plain: list[dict[str, Any]], lazy: list[dict[str, Any]], floor: float = 0.05
) -> dict[str, float]:
    """By metric, the worst difference of any step, as of trl_runs; ms-swift also logs its speed."""
    runs = [
        trl_runs.Run([{name: log[name] for name in log if "speed" not in name} for log in logs])
        for logs in (plain, lazy)
    ]
    return trl_runs.differences(*runs, floor)


def gradient_difference(plain: list[dict[str, Tensor]], lazy: list[dict[str, Tensor]]) -> float:
    """The worst relative difference of a parameter's gradient in any step; where that gradient is
    next to nothing beside the others it is rounding."""
    assert plain and len(plain) == len(lazy), "no gradients, or of other steps"
    assert any(g.any() for step in plain for g in step.values()), "nothing was learned"
    worst = 0.0
    for a, b in zip(plain, lazy, strict=True):
        assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
        norms = {name: float(g.norm()) for name, g in a.items()}
        largest = max(norms.values()) or 1.0
        for name, g in a.items():
            gap = float((b[name] - g).norm()) / max(norms[name], 1e-2 * largest)
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


_SCRATCH = tempfile.TemporaryDirectory(prefix="real-")


def tokenizer() -> Any:
    """The tiny one, without the types of tokens that some models take."""
    made = tiny.tokenizer()
    made.model_input_names = ["input_ids", "attention_mask"]
    return made


def options(**given: Any) -> dict[str, Any]:
    """Arguments of a transformers trainer for three small steps on a CPU."""
    return {
        "output_dir": _SCRATCH.name,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **given,
    }
