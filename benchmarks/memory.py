"""Is the memory budget kept, and is it predicted? ``python -m benchmarks.memory --check``

Every number is the peak of a fresh process beyond its inputs and the gradients it returns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.peers import PEERS, step
from benchmarks.shapes import GPU, MEMORY, MIB, TINY, Case, Shape, make_inputs

BUDGETS = (64 * MIB, 256 * MIB)


@dataclass(frozen=True)
class Peak:
    """Bytes beyond the inputs."""

    total: int
    gradients: int

    @property
    def extra(self) -> int:
        """Beyond the gradients too: what the method costs.

        A peak that comes before the gradients exist is counted as if they already did: the process
        needs their room in any case.
        """
        return max(0, self.total - self.gradients)


def fresh_peak(case: Case, threads: int = 2) -> Peak:
    """Peak of one forward and backward of the case, in a process of its own."""
    request = json.dumps({"case": case.to_json(), "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--worker", request],
        cwd=measure.ROOT,
        env={**os.environ, **measure.MALLOC_ENV},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"{case.peer}: the measuring process failed ({done.returncode}): {reason}"
        )
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def worker(case: Case, threads: int) -> Peak:
    """The measurement itself; the calling process must have measured nothing before."""
    torch.set_num_threads(threads)
    _warm_up(case)
    inputs = make_inputs(case)
    total = measure.peak_bytes(lambda: step(case, inputs), case.device)
    gradients = [x.grad for x in (inputs.hidden, inputs.weight) if x.grad is not None]
    return Peak(total, sum(g.numel() * g.element_size() for g in gradients))


def _warm_up(case: Case) -> None:
    """Pay what is paid once a process: imports, thread pools, the libraries' own work space."""
    tiny = replace(case.at(TINY), budget=None)
    step(tiny, make_inputs(tiny))
    a = torch.ones(256, 256, dtype=case.torch_dtype, device=case.device)
    for x, y in itertools.product((a, a.t()), repeat=2):
        x @ y


@dataclass(frozen=True)
class Row:
    """Bytes of one budget: given, predicted, measured."""

    case: Case
    route: str
    predicted: int
    measured: int

    @property
    def allowed(self) -> int:
        assert self.case.budget is not None, "a row is about a budget"
        return int(1.1 * self.case.budget) + 24 * MIB

    @property
    def kept(self) -> bool:
        return self.measured <= self.allowed

    @property
    def foretold(self) -> bool:
        return abs(self.measured - self.predicted) <= max(0.1 * self.predicted, 8 * MIB)

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case.to_json(),
            "route": self.route,
            "predicted_bytes": self.predicted,
            "measured_bytes": self.measured,
            "allowed_bytes": self.allowed,
            "kept": self.kept,
            "foretold": self.foretold,
        }


def predict(case: Case) -> tuple[str, int]:
    """Route and bytes that fusedpo's planner announces for the case."""
    import fusedpo

    plan = fusedpo.plan(
        case.scored,
        case.shape.vocab,
        case.shape.hidden,
        dtype=case.torch_dtype,
        budget=case.budget,
        needs=("hidden",) if case.frozen else ("hidden", "weight"),
        scope="pair",
        groups=case.shape.pairs,
        gathered=case.masked_tokens > 0,
        device=case.device,
    )
    return plan.route, plan.bytes


def measure_budgets(template: Case, budgets: Sequence[int], threads: int) -> list[Row]:
    rows = []
    for frozen, budget in itertools.product((False, True), budgets):
        case = replace(template, frozen=frozen, budget=budget)
        rows.append(Row(case, *predict(case), fresh_peak(case, threads).extra))
    return rows


def _table(rows: Sequence[Row]) -> list[list[str]]:
    def mib(size: int) -> str:
        return f"{size / MIB:.1f}"

    return [
        [
            f"{mib(row.case.budget or 0)} MiB",
            "frozen" if row.case.frozen else "trainable",
            row.route,
            mib(row.predicted),
            mib(row.measured),
            mib(row.allowed),
            "yes" if row.kept else "NO",
            "yes" if row.foretold else "NO",
        ]
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument("--shape", type=Shape.parse, metavar="N,H,V")
    parser.add_argument("--budgets", type=int, nargs="+", metavar="MIB", help="default: 64 256")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="default: the machine's results file"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is broken")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        request = json.loads(options.worker)
        peak = worker(Case.from_json(request["case"]), request["threads"])
        print(json.dumps({"total": peak.total, "gradients": peak.gradients}))
        return 0
    missing = PEERS["fusedpo"].missing()
    if missing:
        parser.error(missing)

    on_cpu = torch.device(options.device).type == "cpu"
    template = Case(
        "fusedpo",
        options.shape or (MEMORY if on_cpu else GPU),
        options.dtype or ("float32" if on_cpu else "bfloat16"),
        options.device,
    )
    budgets = [b * MIB for b in options.budgets] if options.budgets else BUDGETS
    about = measure.machine(options.device, options.threads)
    rows = measure_budgets(template, budgets, options.threads)
    print(measure.describe(about))
    measure.show(
        f"MiB beyond inputs and gradients, SimPO, {template.shape}, {template.dtype}",
        ("budget", "head", "route", "predicted", "measured", "allowed", "kept", "foretold"),
        _table(rows),
    )
    answer = {"machine": about, "rows": [row.to_json() for row in rows]}
    print(f"written to {measure.save('memory', answer, options.json)}")
    return int(options.check and not all(row.kept and row.foretold for row in rows))


if __name__ == "__main__":
    sys.exit(main())
