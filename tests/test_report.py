"""What is printed and drawn is what was logged and measured."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fusedpo.report import (
    Evaluation,
    History,
    Signal,
    draw_training,
    training_table,
)

LOG = [
    {"step": 0, "eval_loss": 0.97, "eval_rewards/margins": 0.0, "eval_rewards/accuracies": 0.5},
    {"step": 1, "loss": 0.9, "grad_norm": 1.0},
    {"step": 2, "loss": 0.7},
    {"step": 2, "eval_loss": 0.8, "eval_rewards/margins": 0.4, "eval_rewards/accuracies": 0.75},
    {"step": 3, "loss": 0.6},
    {"step": 3, "eval_loss": 0.7},
    {"step": 3, "train_runtime": 1.0, "train_loss": 0.73},
]
HISTORY = History.from_log(LOG)


def text(renderable) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def held_out(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name.startswith("eval_")}


def test_history_joins_evaluations_with_the_losses_before_them():
    assert HISTORY.train_losses == ((1, 0.9), (2, 0.7), (3, 0.6))
    assert HISTORY.evaluations == (
        Evaluation(0, held_out(LOG[0])),
        Evaluation(2, pytest.approx({"loss": 0.8, "grad_norm": 1.0, **held_out(LOG[3])})),
        Evaluation(3, pytest.approx({"loss": 0.6, "eval_loss": 0.7})),
    )


def test_a_log_of_a_resumed_run_is_put_in_order():
    """Epochs are no number to be averaged."""
    log = [
        {"step": 4, "loss": 0.5, "epoch": 2.0},
        {"step": 4, "eval_loss": 0.6, "epoch": 2.0},
        {"step": 2, "loss": 0.9, "epoch": 1.0},
        {"step": 2, "eval_loss": 0.8},
    ]
    found = History.from_log(log)
    assert found.train_losses == ((2, 0.9), (4, 0.5))
    assert found.evaluations == (
        Evaluation(2, {"loss": 0.9, "eval_loss": 0.8}),
        Evaluation(4, {"loss": 0.5, "eval_loss": 0.6}),
    )


def test_training_table_has_a_row_for_each_evaluation():
    shown = text(training_table(HISTORY))
    cells = [line.replace("│", " ").split() for line in shown.splitlines() if "│" in line]
    assert cells == [
        ["0", "0.9700", "+0.000", "50.0%"],
        ["2", "0.8000", "0.8000", "+0.400", "75.0%"],
        ["3", "0.6000", "0.7000"],
    ]


def test_a_method_is_watched_by_its_own_signals(tmp_path):
    log = [
        {"step": 0, "eval_reward": 0.1},
        {"step": 2, "loss": 0.5, "ratio/mean": 1.5},
        {"step": 2, "eval_reward": 0.25},
    ]
    signals = (Signal("reward", "eval_reward", ".2f"), Signal("ratio", "ratio/mean", ".1f"))
    history = History.from_log(log)
    lines = text(training_table(history, signals)).splitlines()
    cells = [line.replace("│", " ").split() for line in lines if "│" in line]
    assert cells == [["0", "0.10"], ["2", "0.5000", "0.25", "1.5"]]
    draw_training(tmp_path / "a.png", history, "title", signals)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_drawings_are_png_files(tmp_path):
    draw_training(tmp_path / "a.png", HISTORY, "title")
    draw_training(tmp_path / "b.png", History((), ()), "nothing yet")
    for path in sorted(Path(tmp_path).iterdir()):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
