"""What a run shows of itself: a bar on a terminal, and a line for each evaluation."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from fusedpo.report import Signal
from fusedpo.trainers.progress import Progress


def progress(**options: Any) -> tuple[Progress, io.StringIO]:
    said = io.StringIO()
    signals = (Signal("held-out loss", "eval_loss"), Signal("reward", "reward", ".1f"))
    return Progress(Console(file=said, width=100, **options), signals), said


def test_a_line_has_what_was_evaluated_and_the_latest_of_training() -> None:
    shown, said = progress()
    state: Any = SimpleNamespace(max_steps=120, global_step=30)
    with shown:
        shown.on_train_begin(None, state, None)
        for reward in (0.25, 0.5):
            shown.on_log(None, state, None, logs={"loss": 1.0, "reward": reward})
        # what is logged of an evaluation is no training
        shown.on_log(None, state, None, logs={"eval_loss": 9.0, "reward": 9.0})
        shown.on_evaluate(None, state, None, metrics={"eval_loss": 0.75})
    assert said.getvalue() == "step  30/120: held-out loss 0.7500, reward 0.5\n"


def test_a_bar_begins_where_the_run_goes_on() -> None:
    shown, said = progress(force_terminal=True)
    state: Any = SimpleNamespace(max_steps=120, global_step=30)
    with shown:
        shown.on_train_begin(None, state, None)
        (task,) = shown.bar.tasks
        assert (task.completed, task.total) == (30, 120)
        state.global_step = 31
        shown.on_step_end(None, state, None)
        assert task.completed == 31
        shown.on_log(None, state, None, logs={"loss": 1.25})
        assert task.description == "loss 1.2500"
    assert "31/120" in said.getvalue()
