"""What a training run prints and draws: how it went, and the fused loss beside full logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedpo.compare import FUSED, Comparison
from fusedpo.plan import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d1660a", "#8a8a8a"


@dataclass(frozen=True)
class Evaluation:
    """The state of training at one step.

    Attributes:
        step: optimizer steps done.
        train_loss: mean over the steps since the evaluation before; None before the first step.
        loss, margin, accuracy: on held-out pairs; None where the loss has no such metric.
    """

    step: int
    train_loss: float | None
    loss: float | None
    margin: float | None
    accuracy: float | None


@dataclass(frozen=True)
class History:
    """A run's losses and evaluations, in order of steps."""

    train_losses: tuple[tuple[int, float], ...]
    evaluations: tuple[Evaluation, ...]

    @classmethod
    def from_log(cls, log_history: Iterable[Mapping[str, Any]]) -> History:
        """From ``trainer.state.log_history``."""
        losses: dict[int, float] = {}
        held_out: dict[int, Mapping[str, Any]] = {}
        for entry in log_history:
            if "loss" in entry:
                losses[entry["step"]] = entry["loss"]
            if "eval_loss" in entry:
                held_out[entry["step"]] = entry
        evaluations, before = [], 0
        for step, entry in sorted(held_out.items()):
            recent = [loss for at, loss in losses.items() if before < at <= step]
            evaluations.append(
                Evaluation(
                    step,
                    sum(recent) / len(recent) if recent else None,
                    entry.get("eval_loss"),
                    entry.get("eval_rewards/margins"),
                    entry.get("eval_rewards/accuracies"),
                )
            )
            before = step
        return cls(tuple(sorted(losses.items())), tuple(evaluations))


def training_table(history: History) -> Table:
    from rich.table import Table

    table = Table(title="Training", title_justify="left")
    for column in (
        "step",
        "training loss",
        "held-out loss",
        "held-out margin",
        "held-out accuracy",
    ):
        table.add_column(column, justify="right")
    for e in history.evaluations:
        table.add_row(
            str(e.step),
            _number(e.train_loss),
            _number(e.loss),
            _number(e.margin, "+.3f"),
            _number(e.accuracy, ".1%"),
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    from rich.table import Table

    c = comparison
    table = Table(
        title=f"One batch of {c.pairs} pairs: {c.positions} positions, {c.scored} of them scored; "
        f"vocabulary {c.vocab}, hidden size {c.hidden}, {_machine(c)}",
        title_justify="left",
        caption="Forward and backward, the fastest of several rounds. The fused loss was allowed "
        f"{format_bytes(c.memory_budget)}; the logits alone are {format_bytes(c.logits_bytes)}. "
        "Memory is beyond the batch and the gradients, each in a process of its own. Gradients "
        "differ by at most this share of their largest entry.",
        caption_justify="left",
    )
    for column in ("", "loss", "gradients differ", "time", "x fused", "peak memory", "x fused"):
        table.add_column(column, justify="right" if column else "left")
    base = c.ways[FUSED]
    for name, way in c.ways.items():
        gap = max(way.hidden_gap, way.weight_gap)
        table.add_row(
            name,
            f"{way.loss:.7f}",
            "" if name == FUSED else f"{gap:.1e}",
            _milliseconds(way.seconds),
            f"{way.seconds / base.seconds:.2f}",
            "not measured" if way.peak_bytes is None else format_bytes(way.peak_bytes),
            _ratio(way.peak_bytes, base.peak_bytes),
        )
    return table


def _machine(c: Comparison) -> str:
    return f"{c.threads} CPU thread{'s' * (c.threads != 1)}" if c.device == "cpu" else c.device


def _number(value: float | None, style: str = ".4f") -> str:
    return "" if value is None else format(value, style)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:{'.0f' if seconds > 0.1 else '.3g'}} ms"


def _ratio(value: int | None, base: int | None) -> str:
    return f"{value / base:.1f}" if value is not None and base else ""


def draw_training(path: Path, history: History, title: str) -> None:
    """Loss, reward margin and accuracy over the steps, to a PNG."""
    plt = _pyplot()
    figure, (loss, margin, accuracy) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    evaluations = history.evaluations
    _curve(loss, history.train_losses, "training", _GREY, marker="")
    _curve(loss, [(e.step, e.loss) for e in evaluations], "held out", _BLUE)
    loss.set(title="Loss", ylabel="mean over pairs, nats")
    _curve(margin, [(e.step, e.margin) for e in evaluations], "held out", _BLUE)
    margin.set(title="Reward margin", ylabel="chosen - rejected, mean over pairs")
    margin.axhline(0, color=_GREY, linewidth=0.8)
    points = [(e.step, None if e.accuracy is None else 100 * e.accuracy) for e in evaluations]
    _curve(accuracy, points, "held out", _BLUE)
    accuracy.set(title="Accuracy", ylabel="pairs with chosen above rejected, %")
    accuracy.axhline(50, color=_GREY, linewidth=0.8)
    accuracy.annotate("chance", (0, 50), xytext=(2, 3), textcoords="offset points", color=_GREY)
    for axes in (loss, margin, accuracy):
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        # room for the names at the ends of the lines
        axes.margins(x=0.16)
    _save(figure, path)


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


def draw_comparison(path: Path, comparison: Comparison) -> None:
    """Time and peak memory of each way, to a PNG."""
    plt = _pyplot()
    c = comparison
    gap = max(max(way.hidden_gap, way.weight_gap) for way in c.ways.values())
    losses = [way.loss for way in c.ways.values()]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    figure.suptitle(
        f"One batch of {c.pairs} pairs, {c.scored} scored tokens, vocabulary {c.vocab}: "
        f"losses within {max(losses) - min(losses):.0e}, gradients within {gap:.0e} of their "
        f"largest entry"
    )
    _bars(time, {n: 1e3 * w.seconds for n, w in c.ways.items()}, "ms")
    time.set(title=f"Forward and backward, {_machine(c)}", xlabel="milliseconds")
    peaks = {n: w.peak_bytes / 2**20 for n, w in c.ways.items() if w.peak_bytes is not None}
    _bars(memory, peaks, "MiB")
    memory.set(
        title="Peak memory beyond batch and gradients",
        xlabel=f"MiB; the fused loss was allowed {format_bytes(c.memory_budget)}",
    )
    _save(figure, path)


def _bars(axes: Axes, values: Mapping[str, float], unit: str) -> None:
    names = [name.replace(", ", ",\n") for name in values]
    colors = [_ORANGE if name == FUSED else _BLUE for name in values]
    bars = axes.barh(names, list(values.values()), color=colors)
    axes.bar_label(bars, [f"{value:.3g} {unit}" for value in values.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def _pyplot() -> Any:
    import matplotlib

    # no display is needed, and none is opened
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
