"""The tables and plots of the README and of docs/benchmarks.md, from the files in results/.

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
from fusedpo.benchmarks import measure, plots, questions, sweep
from fusedpo.benchmarks.shapes import MIB

README = measure.ROOT / "README.md"
PAGE = measure.ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- made by `python -m fusedpo.benchmarks.readme --write`; a test holds it -->"
END = "<!-- end of the results -->"
HEADLINE = ("length", "precision", "training")


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


def compact(answer: dict[str, Any]) -> list[str]:
    """A program a line, a point a column: time over that of full logits, and MiB."""
    rows = answer["rows"]
    points = list(dict.fromkeys((r["group"], r["x"]) for r in rows))
    absent = dict(sweep.missing_everywhere(answer))
    lines = []
    for entry in dict.fromkeys(r["entry"] for r in rows if r["entry"] not in absent):
        cells = [f"**{entry}**" if entry.startswith("fusedpo") else entry]
        for point in points:
            own = [r for r in rows if (r["group"], r["x"], r["entry"]) == (*point, entry)]
            cells.append(_cell(own[0], rows) if own else "-")
        lines.append(cells)
    titles = [f"{group}, {x:g}{answer['unit']}" for group, x in points]
    return markdown(["", *titles], lines)


def _cell(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    if row["extra_bytes"] is None:
        return row["missing"] or "-"
    relative, size = sweep.ratio(row, rows), f"{row['extra_bytes'] / MIB:.1f} MiB"
    return size if relative is None else f"{relative:.2f} x, {size}"


def _about(answer: dict[str, Any]) -> str:
    return f"{measure.describe(answer['machine'])}{'; quick' if answer['quick'] else ''}"


def headline() -> list[str]:
    """What the README shows, of the first machine that has it."""
    lines: list[str] = []
    found = answers()
    for name in HEADLINE:
        machine = next((m for m, of in found.items() if name in of), None)
        if machine is None:
            continue
        answer = found[machine][name]
        own = sweep.kind_of(answer)
        title = f"**{answer['title']}** {_words(name, answer)}"
        table = compact(answer) if name == "length" else markdown(*own.table(_brief(answer)))
        lines += [title, "", *table, ""]
        lines += [part for line in sweep.remarks(answer) for part in (line, "")]
        lines += [f"<sub>{_about(answer)}</sub>", ""]
        if name == "length" and "budget" in found[machine]:
            picture = _picture(machine, "budget").relative_to(README.parent).as_posix()
            lines += [f"![{found[machine]['budget']['title']}]({picture})", ""]
    return lines


def _brief(answer: dict[str, Any]) -> dict[str, Any]:
    """Of its first group alone, as bf16 of the precisions."""
    first = answer["rows"][0]["group"]
    return {**answer, "rows": [row for row in answer["rows"] if row["group"] == first]}


def _words(name: str, answer: dict[str, Any]) -> str:
    if name != "length":
        return ""
    shape = answer["rows"][0]["case"]["shape"]
    dtype = answer["rows"][0]["case"]["dtype"]
    return (
        f"Forward and backward at {answer['axis']}, hidden size {shape['hidden']}, vocabulary "
        f"{shape['vocab']}, {dtype}: time over that of full logits in the same run, and memory "
        "beyond inputs and gradients."
    )


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
        for name in (*questions.NAMES, *questions.LONG, "gpu"):
            if name not in of or "title" not in of[name]:
                continue
            answer = of[name]
            own = sweep.kind_of(answer)
            picture = f"../{_picture(machine, name).relative_to(measure.ROOT).as_posix()}"
            lines += ["", f"## {answer['title']}", "", f"{_about(answer)}", ""]
            lines += [f"![{answer['title']}]({picture})", "", *markdown(*own.table(answer))]
            lines += [part for line in sweep.remarks(answer) for part in ("", line)]
    return "\n".join([*lines, "", END, ""])


def _picture(machine: str, question: str) -> Path:
    return measure.RESULTS / machine / f"{question}.png"


def readme() -> str:
    """README.md with its results renewed."""
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + "\n" + "\n".join(headline()).rstrip() + "\n" + text[end:]


def stale() -> list[str]:
    """What is not as the files give it."""
    found = []
    if readme() != README.read_text(encoding="utf-8"):
        found.append("README.md")
    if not PAGE.exists() or page() != PAGE.read_text(encoding="utf-8"):
        found.append("docs/benchmarks.md")
    for picture, answer in _pictures():
        if not picture.exists() or plots.read_fingerprint(picture) != plots.fingerprint(answer):
            found.append(picture.relative_to(measure.ROOT).as_posix())
    return found


def _pictures() -> list[tuple[Path, dict[str, Any]]]:
    return [
        (_picture(machine, name), answer)
        for machine, of in answers().items()
        for name, answer in of.items()
        if name in (*questions.NAMES, *questions.LONG)
    ]


def write() -> None:
    for picture, answer in _pictures():
        plots.save(answer, picture, sweep.kind_of(answer).plot)
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
