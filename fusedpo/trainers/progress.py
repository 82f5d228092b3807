"""Progress of a ``transformers.Trainer`` on a rich console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:+.3f}"),
    "rewards/accuracies": ("accuracy", "{:.1%}"),
}


class Progress(TrainerCallback):
    """A bar where there is a terminal, and a line for each evaluation everywhere.

    A context manager: the bar is gone when it is left, also by an error.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
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
            self.bar.update(self.task, description=_line(logs, ""))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        self.console.print(
            f"{done}, held out: {_line(kwargs['metrics'], 'eval_')}", highlight=False
        )

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def _line(metrics: dict[str, Any], prefix: str) -> str:
    return ", ".join(
        f"{label} {style.format(metrics[prefix + name])}"
        for name, (label, style) in _SHOWN.items()
        if prefix + name in metrics
    )
