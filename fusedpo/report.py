"""What a training run prints and draws: how it went."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

_BLUE, _GREY = "#1f5fa8", "#8a8a8a"


@dataclass(frozen=True)
class Signal:
    """A number that a training run is watched by.

    Attributes:
        title: of its column and its panel.
        key: as the trainer logs it; ``eval_...`` on held-out data.
        style: format of the number.
        unit: what the panel's axis says.
        neutral: where a line is drawn: what chance would give.
    """

    title: str
    key: str
    style: str = ".4f"
    unit: str = ""
    neutral: float | None = None


LOSS = Signal("held-out loss", "eval_loss", unit="mean over examples")
MARGIN = Signal(
    "held-out margin",
    "eval_rewards/margins",
    "+.3f",
    "reward of chosen - rejected",
    0.0,
)
ACCURACY = Signal(
    "held-out accuracy",
    "eval_rewards/accuracies",
    ".1%",
    "share with chosen above rejected",
    0.5,
)
PAIR_SIGNALS = (LOSS, MARGIN, ACCURACY)


@dataclass(frozen=True)
class Evaluation:
    """The state of training at one step.

    Attributes:
        step: optimizer steps done.
        values: what was logged then; of training, the means since the evaluation before.
    """

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class History:
    """A run's losses and evaluations, in order of steps."""

    train_losses: tuple[tuple[int, float], ...]
    evaluations: tuple[Evaluation, ...]

    @classmethod
    def from_log(cls, log_history: Iterable[Mapping[str, Any]]) -> History:
        """From ``trainer.state.log_history``."""
        training: dict[int, Mapping[str, Any]] = {}
        held_out: dict[int, dict[str, Any]] = {}
        for entry in log_history:
            if "loss" in entry:
                training[entry["step"]] = entry
            found = {key: value for key, value in entry.items() if key.startswith("eval_")}
            if found:
                held_out.setdefault(entry["step"], {}).update(found)
        evaluations, before = [], -1
        for step, values in sorted(held_out.items()):
            recent = [entry for at, entry in training.items() if before < at <= step]
            evaluations.append(Evaluation(step, {**_means(recent), **values}))
            before = step
        losses = [(step, entry["loss"]) for step, entry in sorted(training.items())]
        return cls(tuple(losses), tuple(evaluations))

    def curve(self, signal: Signal) -> list[tuple[int, float | None]]:
        """(step, value) at every evaluation."""
        return [(e.step, e.values.get(signal.key)) for e in self.evaluations]


def _means(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = {
        name
        for entry in entries
        for name, value in entry.items()
        if isinstance(value, (int, float)) and name not in ("step", "epoch")
    }
    found = {}
    for name in names:
        values = [entry[name] for entry in entries if name in entry]
        found[name] = sum(values) / len(values)
    return found


def training_table(history: History, signals: Sequence[Signal] = PAIR_SIGNALS) -> Table:
    from rich.table import Table

    table = Table(title="Training", title_justify="left")
    columns = (Signal("training loss", "loss"), *signals)
    for title in ("step", *(signal.title for signal in columns)):
        table.add_column(title, justify="right")
    for e in history.evaluations:
        numbers = (_number(e.values.get(signal.key), signal.style) for signal in columns)
        table.add_row(str(e.step), *numbers)
    return table


def _number(value: float | None, style: str = ".4f") -> str:
    return "" if value is None else format(value, style)


def draw_training(
    path: Path, history: History, title: str, signals: Sequence[Signal] = PAIR_SIGNALS
) -> None:
    """The loss and the signals over the steps, a panel each, to a PNG."""
    from matplotlib.figure import Figure

    others = [signal for signal in signals if signal is not LOSS]
    columns = min(3, 1 + len(others))
    rows = -(-(1 + len(others)) // columns)
    # not pyplot's: no display is needed, and none is opened
    figure = Figure(figsize=(13, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    # a loss within another one takes more than a line
    figure.suptitle(textwrap.fill(title, 110))
    loss, *panels = grid.flat
    _curve(loss, history.train_losses, "training", _GREY, marker="")
    _curve(loss, history.curve(LOSS), "held out", _BLUE)
    loss.set(title="Loss", ylabel="mean over examples")
    for axes, signal in zip(panels, others, strict=False):
        name = "held out" if signal.key.startswith("eval_") else "training"
        _curve(axes, history.curve(signal), name, _BLUE if name == "held out" else _GREY)
        axes.set(title=signal.title, ylabel=signal.unit)
        if signal.neutral is not None:
            axes.axhline(signal.neutral, color=_GREY, linewidth=0.8)
    for axes in grid.flat:
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        # room for the names at the ends of the lines
        axes.margins(x=0.16)
    for axes in panels[len(others) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)


def _curve(
    axes: Axes,
    points: Sequence[tuple[int, float | None]],
    name: str,
    color: str,
    marker: str = "o",
) -> None:
    known = [(x, y) for x, y in points if y is not None]
    if not known:
        return
    xs, ys = zip(*known, strict=True)
    axes.plot(xs, ys, color=color, marker=marker, markersize=4, linewidth=1.5 if marker else 0.8)
    axes.annotate(
        f" {name}",
        (xs[-1], ys[-1]),
        color=color,
        va="center",
        xytext=(3, 0),
        textcoords="offset points",
    )
