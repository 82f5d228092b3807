"""Progress of a ``transformers.Trainer`` on a rich console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

from fusedpo.report import PAIR_SIGNALS, Signal

if TYPE_CHECKING:
    from rich.console import Console


def shown(signals: Sequence[Signal], values: Mapping[str, float]) -> str:
    """The signals that have values, in one line."""
    parts = (f"{s.title} {values[s.key]:{s.style}}" for s in signals if s.key in values)
    return ", ".join(parts)


class Progress(TrainerCallback):
    """A bar where there is a terminal, and a line for each evaluation everywhere.

    A context manager: the bar is gone when it is left, also by an error.

    Args:
        console: where to.
        signals: what is shown.
    """

    def __init__(self, console: Console, signals: Sequence[Signal] = PAIR_SIGNALS) -> None:
        self.console = console
        self.signals = signals
        self.latest: dict[str, Any] = {}
        self.bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.latest = logs
            self.bar.update(self.task, description=f"loss {logs['loss']:.4f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        values = {**self.latest, **kwargs["metrics"]}
        self.console.print(f"{done}: {shown(self.signals, values)}", highlight=False)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
