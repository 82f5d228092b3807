"""The README's numbers and the tables and plots of docs/benchmarks.md, from the files in results/.

    python -m fusedpo.benchmarks.readme [--write] [--add FILE ...]

Without ``--write`` it says whether they are what the files give, and exits with 1 if not. ``--add``
takes the answers of a run, as ``fusedpo bench`` leaves them, into the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedpo import tables
from fusedpo.benchmarks import measure, plots, questions, reports, sweep
from fusedpo.benchmarks.peers import BASELINE, OURS
from fusedpo.benchmarks.shapes import MIB
from fusedpo.machine import ROOT

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- made by `python -m fusedpo.benchmarks.readme --write`; a test holds it -->"
END = "<!-- end of the results -->"


def answers() -> dict[str, dict[str, Any]]:
    """Name of a machine -> its answers by question, of every file in results/."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(measure.RESULTS.glob("*.json"))
    }


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; without columns that nothing stands in."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    numbers = [tables.are_numbers(row[i] for row in rows) for i in range(len(columns))]
    return [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('--:' if n else '---' for n in numbers)}|",
        *(f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in rows),
    ]


def _about(answer: dict[str, Any]) -> str:
    return f"{measure.describe(answer['machine'])}{'; quick' if answer['quick'] else ''}"


def headline_machine() -> str:
    """The first machine that was asked both questions, and had the plans of today."""
    return next(
        machine
        for machine, of in answers().items()
        if {"length", "precision"} <= of.keys() and not reports.outdated(of["length"])
    )


def headline() -> list[str]:
    """Three numbers and a picture."""
    found, machine = answers(), headline_machine()
    length, precision = (found[machine][name] for name in ("length", "precision"))
    group, longest = length["rows"][0]["group"], max(row["x"] for row in length["rows"])
    here = [row for row in length["rows"] if (row["group"], row["x"]) == (group, longest)]
    shown = [row for row in here if row["case"]["peer"] in (BASELINE, OURS)]
    errors = {
        peer: max(
            row["values"]["logp_max"]
            for row in precision["rows"]
            if row["group"] == "bf16" and row["case"] and row["case"]["peer"] == peer
        )
        for peer in (BASELINE, OURS)
    }
    rows = [
        [
            "memory beyond inputs and gradients",
            *(f"{r['extra_bytes'] / MIB:.0f} MiB" for r in shown),
        ],
        ["time, forward and backward", *(f"{r['median_seconds']:.1f} s" for r in shown)],
        [
            "error of a log-probability in bf16, at most",
            *(f"{errors[r['case']['peer']]:.1e}" for r in shown),
        ],
    ]
    shape, dtype = shown[0]["case"]["shape"], shown[0]["case"]["dtype"]
    picture = _picture(machine, "length").relative_to(README.parent).as_posix()
    return [
        *markdown([f"{group}, a pair of {longest} tokens", *(r["entry"] for r in shown)], rows),
        "",
        f"<sub>Vocabulary {shape['vocab']}, hidden size {shape['hidden']}, {dtype}. "
        f"{_about(length)}</sub>",
        "",
        f"![{length['title']}]({picture})",
    ]


def _shape(answer: dict[str, Any]) -> list[str]:
    """A sentence on the sizes that a sweep has at every point."""
    cases = [row["case"] for row in answer["rows"] if "case" in row]
    if reports.kind_of(answer) is not sweep or not cases:
        return []
    sizes = {"hidden": "hidden size", "vocab": "vocabulary"}
    fixed = [
        f"{word} {cases[0]['shape'][key]}"
        for key, word in sizes.items()
        if len({c["shape"][key] for c in cases}) == 1
    ]
    fixed += [cases[0]["dtype"]] if len({c["dtype"] for c in cases}) == 1 else []
    return ["", f"Forward and backward, {', '.join(fixed)}."]


def page() -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        BEGIN,
        "",
        "Every number here is of a file in `benchmarks/results/`. `fusedpo bench` asks the same",
        "questions on your machine; times are medians of interleaved rounds in one run, memory is",
        "the peak of a fresh process beyond the inputs and the gradients it returns.",
    ]
    for machine, of in answers().items():
        for name in questions.ALL:
            if name not in of:
                continue
            answer = of[name]
            own = reports.kind_of(answer)
            picture = f"../{_picture(machine, name).relative_to(ROOT).as_posix()}"
            lines += ["", f"## {answer['title']}", "", f"{_about(answer)}", *_shape(answer), ""]
            lines += [f"![{answer['title']}]({picture})", "", *markdown(*own.table(answer))]
            lines += [part for line in reports.remarks(answer) for part in ("", line)]
    return "\n".join([*lines, "", END, ""])


def _picture(machine: str, question: str) -> Path:
    return measure.RESULTS / machine / f"{question}.png"


def readme() -> str:
    """README.md with its numbers renewed."""
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + "\n" + "\n".join(headline()) + "\n" + text[end:]


def stale() -> list[str]:
    """What is not as the files give it."""
    found = []
    if readme() != README.read_text(encoding="utf-8"):
        found.append("README.md")
    if not PAGE.exists() or page() != PAGE.read_text(encoding="utf-8"):
        found.append("docs/benchmarks.md")
    for picture, answer in _pictures():
        if not picture.exists() or plots.read_fingerprint(picture) != plots.fingerprint(answer):
            found.append(picture.relative_to(ROOT).as_posix())
    return found


def _pictures() -> list[tuple[Path, dict[str, Any]]]:
    return [
        (_picture(machine, name), answer)
        for machine, of in answers().items()
        for name, answer in of.items()
        if name in questions.ALL
    ]


def write() -> None:
    for picture, answer in _pictures():
        plots.save(answer, picture, reports.kind_of(answer).plot)
    measure.write(README, readme())
    measure.write(PAGE, page())


def add(path: Path) -> None:
    """A run's answers into the results of its machine."""
    for name, answer in json.loads(path.read_text(encoding="utf-8")).items():
        measure.save(name, answer)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedpo.benchmarks.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="renew them")
    parser.add_argument(
        "--add", type=Path, nargs="+", default=[], metavar="FILE", help="a run's answers, first"
    )
    given = parser.parse_args(arguments)
    for path in given.add:
        try:
            add(path)
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            parser.error(f"--add: expected a file that fusedpo bench left, got {path} ({error!r})")
    if given.write:
        write()
    behind = stale()
    for name in behind:
        print(f"not as in benchmarks/results: {name}")
    return int(bool(behind))


if __name__ == "__main__":
    sys.exit(main())
