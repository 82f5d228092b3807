"""What becomes of an answer: a file, a plot, a table, and what is said below it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from fusedpo import tables
from fusedpo.benchmarks import measure, plots, sweep
from fusedpo.benchmarks.options import Options, Question, options_of, parser
from fusedpo.benchmarks.peers import OURS
from fusedpo.benchmarks.shapes import Case

NOTHING = "Nothing was measured: this question asks of none of the given --losses or --peers."
OUTDATED = "Measured with other plans than today's, whose memory and time differ."


def main(question: Question, arguments: Sequence[str] | None = None) -> int:
    """``python -m fusedpo.benchmarks.<question>``."""
    given = parser(question.title, f"python -m fusedpo.benchmarks.{question.name}")
    parsed = given.parse_args(arguments)
    try:
        options = options_of(parsed)
    except ValueError as error:
        given.error(str(error))
    answer = question.ask(options)
    report(answer, options)
    return int(bool(answer.get("wrong")))


def report(answer: dict[str, Any], options: Options) -> None:
    """The file, the plot and the table."""
    stream = sys.stderr if options.print_json else sys.stdout
    path = options.output / measure.file_name(answer["machine"])
    measure.save(answer["question"], answer, path)
    kind = kind_of(answer)
    picture = plots.save(answer, options.output / f"{answer['question']}.png", kind.plot)
    print(measure.describe(answer["machine"]), file=stream)
    columns, lines = kind.table(answer)
    tables.show(answer["title"], columns, lines, stream)
    for line in remarks(answer):
        print(line, file=stream)
    if show_targets := getattr(kind, "show_targets", None):
        show_targets(answer, stream)
    print(f"written to {path}" + (f" and {picture}" if picture else ""), file=stream)
    if options.print_json:
        json.dump(answer, sys.stdout)
        print()


def remarks(answer: dict[str, Any]) -> list[str]:
    """What is to be said below the table."""
    said = getattr(kind_of(answer), "remarks", None)
    absent = [f"Not measured: {entry}: {why}." for entry, why in sweep.missing_everywhere(answer)]
    if not answer["rows"]:
        return [NOTHING]
    before = said(answer) if said else []
    if kind_of(answer) is sweep:
        before = [*before, *faster(answer)]
    return [*before, *absent, *([OUTDATED] if outdated(answer) else [])]


def faster(answer: dict[str, Any]) -> list[str]:
    """A line on where another program was faster than fusedpo with all of its budgets, if any."""
    timed = [row for row in answer["rows"] if row["median_seconds"]]
    found = []
    for group, x in dict.fromkeys((row["group"], row["x"]) for row in timed):
        here = [row for row in timed if (row["group"], row["x"]) == (group, x)]
        ours = [row["median_seconds"] for row in here if row["case"]["peer"] == OURS]
        first = min(here, key=lambda row: row["median_seconds"])
        if ours and first["case"]["peer"] != OURS:
            share = 1 - first["median_seconds"] / min(ours)
            found.append(f"{first['entry']} at {group} {x:g} by {share:.1%}")
    return [f"Faster than fusedpo: {'; '.join(found)}."] if found else []


def outdated(answer: dict[str, Any]) -> bool:
    """Whether the planner would no longer foretell what it did when this was measured."""
    return any(
        sweep.predicted(Case.from_json(row["case"])) != row["predicted_bytes"]
        for row in answer["rows"]
        if row.get("predicted_bytes") is not None
    )


def kind_of(answer: dict[str, Any]) -> Any:
    """The module that has the answer's ``table`` and ``plot``, and may have ``remarks`` and
    ``show_targets``."""
    return importlib.import_module(f"fusedpo.benchmarks.{answer.get('kind', 'sweep')}")
