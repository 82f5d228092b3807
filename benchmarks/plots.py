"""Plots of answers: every line is named where it ends, and a point without a number says why."""

from __future__ import annotations

import hashlib
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedpo.benchmarks import measure
from fusedpo.benchmarks.shapes import MIB

OURS = "fusedpo"
# apart in hue and in lightness, so that they can be told without colour too
COLOURS = ("#7f7f7f", "#bcbd22", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf")
OUR_COLOURS = ("#d62728", "#ff7f0e")


End = tuple[tuple[float, float], str, str]
"""Where a line ends, its name and its colour."""


def fingerprint(answer: dict[str, Any]) -> str:
    """Of everything that a plot shows; it is written into the file, for a test to compare."""
    return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()


def save(answer: dict[str, Any], path: Path, plot: Callable[[dict[str, Any]], Any]) -> Path | None:
    """The plot of an answer; None where matplotlib is not installed, or no number is there.

    plot: makes the figure.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    figure = plot(answer)
    if figure is None:
        return None
    # a character of this size is about 0.045 inches wide
    about = textwrap.fill(measure.describe(answer["machine"]), int(figure.get_figwidth() / 0.045))
    figure.text(0.01, 0.005, about, fontsize=6, color="0.4")
    data = io.BytesIO()
    figure.savefig(
        data, format="png", dpi=110, metadata={"Software": None, "fusedpo": fingerprint(answer)}
    )
    return measure.write(path, data.getvalue())


def figure(answer: dict[str, Any], width: float, height: float, below: float = 0.03) -> Any:
    """An empty figure of a question, in inches; a share of its height is left for the machine."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height))
    made.set_layout_engine("constrained", rect=(0, below, 1, 1 - below))
    made.suptitle(answer["title"])
    return made


def sweep(answer: dict[str, Any]) -> Any:
    """Of a question of benchmarks/sweep.py."""
    return _across(answer) if answer["across"] else along(answer, _TIME_AND_MEMORY)


def read_fingerprint(path: Path) -> str | None:
    """What ``save`` wrote into the file."""
    data = path.read_bytes()
    at = data.find(b"tEXtfusedpo\x00")
    return data[at + 12 : at + 76].decode() if at >= 0 else None


def colours_of(entries: Sequence[str]) -> dict[str, str]:
    ours = [e for e in entries if e.startswith(OURS)]
    others = [e for e in entries if not e.startswith(OURS)]
    found = {e: COLOURS[i % len(COLOURS)] for i, e in enumerate(others)}
    return found | {e: OUR_COLOURS[i % 2] for i, e in enumerate(ours)}


def _unique(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


_TIME_AND_MEMORY = (
    ("median_seconds", 1.0, "seconds, forward + backward"),
    ("extra_bytes", MIB, "MiB beyond inputs and gradients"),
)


def along(answer: dict[str, Any], wanted: Sequence[tuple[str, float, str]]) -> Any:
    """Numbers over x, a column for each group; None if there are none.

    wanted: of each line of panels, the key in the rows, its unit, and what it is.
    """
    rows = answer["rows"]
    if not any(r.get(key) for r in rows for key, _, _ in wanted):
        return None
    groups = _unique([r["group"] for r in rows])
    made = figure(answer, 1.2 + 4.6 * len(groups), 7.2)
    panels = made.subplots(len(wanted), len(groups), squeeze=False, sharex="col")
    for (key, unit, label), line in zip(wanted, panels, strict=True):
        for group, axes in zip(groups, line, strict=True):
            ends = _lines(axes, rows, group, key, unit)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            xs = _unique([r["x"] for r in rows if r["group"] == group])
            axes.set_xticks(xs, [f"{x:g}{answer['unit']}" for x in xs], minor=False)
            axes.grid(True, which="major", color="0.9")
            axes.set_ylabel(label if group == groups[0] else "")
            if key == wanted[0][0]:
                axes.set_title(group)
            if key == wanted[-1][0]:
                axes.set_xlabel(answer["axis"])
            name_ends(axes, ends)
    return made


def _lines(
    axes: Any, rows: Sequence[dict[str, Any]], group: str, key: str, unit: float
) -> list[End]:
    """A line for each program, and a cross where it ran out of memory; their ends."""
    entries = _unique([r["entry"] for r in rows])
    colours, ends = colours_of(entries), []
    for entry in entries:
        own = [r for r in rows if (r["group"], r["entry"]) == (group, entry)]
        points = [(r["x"], r[key] / unit) for r in own if r[key]]
        if not points:
            continue
        (x, y), style = points[-1], {"color": colours[entry]}
        width = 2.4 if entry.startswith(OURS) else 1.4
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=width, **style)
        ends.append(((x, y), entry, colours[entry]))
        for r in own:
            if r["missing"] == "out of memory" and r["x"] > x:
                axes.plot(r["x"], y, marker="x", ms=8, **style)
                place = {"va": "bottom", "ha": "center"}
                axes.annotate("out of memory", (r["x"], y), fontsize=6, **place, **style)
    return ends


def name_ends(axes: Any, ends: Sequence[End]) -> None:
    """Names to the right of the panel, pushed apart where points lie at one height."""
    if not ends:
        return
    axes.figure.draw_without_rendering()
    height = axes.bbox.height
    placed = sorted(ends, key=lambda end: end[0][1])
    wanted = [
        axes.transAxes.inverted().transform(axes.transData.transform(xy))[1] for xy, _, _ in placed
    ]
    step = 11 / height * axes.figure.dpi / 72
    found: list[float] = []
    for y in wanted:
        found.append(max(y, found[-1] + step) if found else y)
    # what was pushed out at the top comes back down
    over = max(0.0, found[-1] - 1.0)
    for i in reversed(range(len(found))):
        limit = found[i + 1] - step if i + 1 < len(found) else 1.0
        found[i] = min(found[i], limit) if over else found[i]
    for ((x, y), name, colour), at in zip(placed, found, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.03, at),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=colour,
            fontweight="bold" if name.startswith(OURS) else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5},
            annotation_clip=False,
        )


def _across(answer: dict[str, Any]) -> Any:
    """Time over memory: what is further down and to the left is better."""
    rows = [r for r in answer["rows"] if r["median_seconds"] and r["extra_bytes"] is not None]
    if not rows:
        return None
    panels = _unique([(r["group"], r["x"]) for r in rows])
    others = [e for e in _unique([r["entry"] for r in rows]) if not e.startswith(OURS)]
    colours = colours_of(others)
    made = figure(answer, 1.2 + 6.2 * len(panels), 5.0, below=0.04)
    for panel, axes in zip(panels, made.subplots(1, len(panels), squeeze=False)[0], strict=True):
        here = [r for r in rows if (r["group"], r["x"]) == panel]
        ours = [r for r in here if r["entry"].startswith(OURS)]
        style = {"color": OUR_COLOURS[0]}
        for at, names in _together(ours):
            axes.plot(*at, marker="o", **style)
            where = {"xytext": (-3, -4), "textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate(names, at, fontsize=7, **where, **style)
        ends = []
        for r in here:
            if r["entry"] in others:
                axes.plot(*_place(r), marker="s", color=colours[r["entry"]])
                ends.append((_place(r), r["entry"], colours[r["entry"]]))
        if ours:
            fastest = min(map(_place, ours), key=lambda at: at[1])
            ends.append((fastest, "fusedpo, by budget", OUR_COLOURS[0]))
        axes.set(
            xscale="log",
            yscale="log",
            title=f"{panel[0]}, {answer['axis']}: {panel[1]:g}",
            xlabel="MiB beyond inputs and gradients",
            ylabel="seconds, forward + backward",
        )
        axes.margins(0.15)
        axes.grid(True, which="major", color="0.9")
        name_ends(axes, ends)
    return made


def _place(row: dict[str, Any]) -> tuple[float, float]:
    # less than the ruler can tell apart is drawn where it ends
    return max(row["extra_bytes"] / MIB, 0.1), row["median_seconds"]


def _together(rows: Sequence[dict[str, Any]]) -> list[tuple[tuple[float, float], str]]:
    """Places with the names of all that are there, as far as an eye can tell."""
    found: list[tuple[tuple[float, float], str]] = []
    for row in sorted(rows, key=_place):
        (x, y), name = _place(row), row["entry"].removeprefix("fusedpo, ")
        if found:
            (x0, y0), names = found[-1]
            if x < 1.1 * x0 and 0.8 < y / y0 < 1.25:
                found[-1] = (x0, y0), f"{names}, {name}"
                continue
        found.append(((x, y), name))
    return found
