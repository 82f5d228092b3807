"""A question, and how it is asked: the options of every benchmark, and their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fusedpo.benchmarks import measure
from fusedpo.benchmarks.formulas import FORMULAS
from fusedpo.benchmarks.peers import BASELINE, PEERS
from fusedpo.benchmarks.shapes import Case, Shape
from fusedpo.checks import bad_value


@dataclass(frozen=True)
class Options:
    """How a question is asked.

    Attributes:
        device: where.
        quick: the small version.
        output: folder of results and plots.
        shapes: in place of the question's own; None: those.
        losses, peers: names, of those that the question has.
        dtype: None: fp32 on the CPU, bf16 elsewhere.
        threads: of the CPU.
        seconds: for timing at each point; a round is measured in any case.
        print_json: the answer on stdout, tables on stderr.
    """

    device: str = "cpu"
    quick: bool = False
    output: Path = Path("build/bench")
    shapes: tuple[Shape, ...] | None = None
    losses: Sequence[str] | None = None
    peers: tuple[str, ...] = tuple(PEERS)
    dtype: str | None = None
    threads: int = 2
    seconds: float | None = None
    print_json: bool = False

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def dtype_name(self) -> str:
        return self.dtype or ("float32" if self.on_cpu else "bfloat16")

    @property
    def seconds_a_point(self) -> float:
        return self.seconds or (15.0 if self.quick else 60.0)

    def of(self, losses: Sequence[str]) -> list[str]:
        """The losses of a question that were asked for."""
        return [name for name in losses if self.losses is None or name in self.losses]

    def case(self, shape: Shape, **values: Any) -> Case:
        return Case(BASELINE, shape, self.dtype_name, self.device, **values)


@dataclass(frozen=True)
class Question:
    """What is asked, and the one form of an answer.

    Attributes:
        name: of its answer in the results, and of its plot.
        title: the question.
        kind: the module that has the answer's table and plot.
    """

    name: str
    title: str
    kind: str = field(default="sweep", kw_only=True)

    def ask(self, options: Options) -> dict[str, Any]:
        """Measure everything, and return what is to be saved."""
        # first, as the machine's load is to be that of others
        return {**self.about(options), **self.measured(options)}

    def about(self, options: Options) -> dict[str, Any]:
        """Of the question and of the machine, what is said before anything is measured."""
        return {
            "question": self.name,
            "kind": self.kind,
            "title": self.title,
            "machine": measure.machine(options.device, options.threads),
            "quick": options.quick,
        }

    def measured(self, options: Options) -> dict[str, Any]:
        """``rows``, and what else there is to say, in place of the above where it has its name."""
        raise NotImplementedError


def parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(found)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every question is asked with."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="N,H,V|N,MODEL",
        help="scored tokens, hidden size and vocabulary, or a model's head by its name, in place "
        "of the question's own shapes; N counts both responses of two pairs",
    )
    parser.add_argument(
        "--losses",
        nargs="+",
        metavar="LOSS",
        choices=list(FORMULAS),
        help=f"some of {', '.join(FORMULAS)} (default: those of the question)",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        choices=list(PEERS),
        help=f"some of {', '.join(PEERS)} (default: all that are installed)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of hidden states and weights (default: float32 on the CPU, bfloat16 elsewhere)",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (default: 2)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="for timing at each point (default: by the question, and fewer with --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points")
    parser.add_argument(
        "--output",
        type=Path,
        default=Options.output,
        metavar="FOLDER",
        help="results and plots (default: build/bench)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        dest="print_json",
        help="the answer on stdout as JSON, tables on stderr",
    )


def options_of(given: argparse.Namespace) -> Options:
    """Checked, before anything is measured."""
    try:
        device = torch.device(given.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise bad_value("--device", "cpu or cuda", repr(given.device))
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise bad_value("--device", "one that is there", f"{device}; there are {there}")
    if given.threads < 1:
        raise bad_value("--threads", "at least 1", str(given.threads))
    if given.seconds is not None and not given.seconds > 0:
        raise bad_value("--seconds", "a positive number", str(given.seconds))
    parent = next(
        path for path in (given.output, *given.output.absolute().parents) if path.exists()
    )
    if not parent.is_dir():
        raise bad_value("--output", "a folder", f"{given.output}, and {parent} is a file")
    values = {each.name: getattr(given, each.name) for each in fields(Options)}
    values["shapes"] = given.shapes and tuple(map(Shape.parse, given.shapes))
    # ratios are to the baseline
    values["peers"] = tuple(dict.fromkeys((BASELINE, *(given.peers or PEERS))))
    options = Options(**values)
    torch.set_num_threads(given.threads)
    return options
