"""How fast is it, against what, and for how much memory? ``python -m benchmarks.speed``

Forward and backward of one SimPO loss. All programs run in turn in one process, on the same inputs;
their memory is then measured in a process each. fusedpo is given one tenth of the logits.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.memory import fresh_peak
from benchmarks.peers import PEERS, step
from benchmarks.shapes import GPU, MIB, QUICK, SPEED, TINY, Case, Inputs, Shape, make_inputs

BASELINE = "full_logits"
SCENARIOS: dict[str, dict[str, Any]] = {
    "trainable": {},
    "frozen": {"frozen": True},
    "half masked": {"masked": 0.5},
}


@dataclass(frozen=True)
class Bound:
    """``fusedpo`` in one scenario takes at most so many times as long as a peer in another."""

    scenario: str
    against: str
    against_scenario: str
    at_most: float

    def __str__(self) -> str:
        return f"fusedpo {self.scenario} / {PEERS[self.against].label} {self.against_scenario}"


BOUNDS = (
    Bound("trainable", "full_logits", "trainable", 1.0),
    Bound("trainable", "liger", "trainable", 1.0),
    Bound("trainable", "trl", "trainable", 0.4),
    Bound("frozen", "full_logits", "frozen", 0.75),
    Bound("half masked", "fusedpo", "trainable", 0.6),
)


@dataclass
class Row:
    """One program in one scenario; ``missing`` says why there is no number."""

    scenario: str
    case: Case
    timing: measure.Timing | None = None
    ratio: float | None = None
    extra: int | None = None
    missing: str | None = None

    def to_json(self) -> dict[str, Any]:
        peer = PEERS[self.case.peer]
        timed = {
            "median_seconds": self.timing.median,
            "quartiles_seconds": self.timing.quartiles,
            "seconds": self.timing.seconds,
        }
        return {
            "scenario": self.scenario,
            "peer": self.case.peer,
            "version": peer.version,
            "case": self.case.to_json(),
            **(timed if self.timing else {}),
            "ratio_to_full_logits": self.ratio,
            "extra_bytes": self.extra,
            "missing": self.missing,
        }


def make_rows(template: Case, peers: Sequence[str]) -> list[Row]:
    """Every peer in every scenario, each tried once at a tiny size to learn why it cannot run."""
    rows = []
    for scenario, values in SCENARIOS.items():
        for peer in peers:
            case = replace(template, peer=peer, **values)
            rows.append(Row(scenario, case, missing=why_not(case)))
    return rows


def why_not(case: Case) -> str | None:
    missing = PEERS[case.peer].missing()
    if missing:
        return missing
    tiny = replace(case.at(TINY), budget=None)
    try:
        step(tiny, make_inputs(tiny))
    except (
        Exception
    ) as error:  # another library's failure is a line of the table, not the end of it
        return f"{PEERS[case.peer].label}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def time_rows(rows: Sequence[Row], repeats: int, device: str) -> None:
    """Fill in times and their ratios to full logits in the same scenario."""
    runnable = {f"{row.scenario}/{row.case.peer}": row for row in rows if not row.missing}
    shared = make_inputs(rows[0].case)
    steps = {name: _stepper(row.case, shared) for name, row in runnable.items()}
    for name, timing in measure.interleaved(steps, repeats, device=device).items():
        runnable[name].timing = timing
    for row in runnable.values():
        baseline = find(rows, row.scenario, BASELINE)
        row.ratio = quotient(row, baseline)


def _stepper(case: Case, shared: Inputs) -> Callable[[], object]:
    inputs = shared.for_case(case)

    def run() -> None:
        step(case, inputs)
        # freed in the timed part by every program alike, so that none leaves memory for the next
        inputs.hidden.grad = inputs.weight.grad = None

    return run


def find(rows: Sequence[Row], scenario: str, peer: str) -> Row | None:
    return next((r for r in rows if (r.scenario, r.case.peer) == (scenario, peer)), None)


def quotient(ours: Row | None, theirs: Row | None) -> float | None:
    if ours is None or theirs is None or ours.timing is None or theirs.timing is None:
        return None
    return ours.timing.median / theirs.timing.median


def check(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every bound with its measured value; without its peer it is neither held nor broken."""
    verdicts = []
    for bound in BOUNDS:
        value = quotient(
            find(rows, bound.scenario, "fusedpo"),
            find(rows, bound.against_scenario, bound.against),
        )
        verdicts.append(
            {
                "what": str(bound),
                "measured": value,
                "at_most": bound.at_most,
                "held": None if value is None else value <= bound.at_most,
            }
        )
    return verdicts


def _table(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        peer = PEERS[row.case.peer]
        name = f"{peer.label} {peer.version or ''}".strip()
        if row.timing is None:
            lines.append([row.scenario, name, "-", "-", "-", row.missing or "-"])
            continue
        low, high = row.timing.quartiles
        lines.append(
            [
                row.scenario,
                name,
                f"{1e3 * row.timing.median:.1f}",
                f"{1e3 * low:.1f}-{1e3 * high:.1f}",
                "-" if row.ratio is None else f"{row.ratio:.2f}",
                row.missing or ("-" if row.extra is None else f"{row.extra / MIB:.0f}"),
            ]
        )
    return lines


def _verdict_table(verdicts: Sequence[dict[str, Any]]) -> list[list[str]]:
    words = {None: "not measured", True: "yes", False: "NO"}
    return [
        [
            verdict["what"],
            "-" if verdict["measured"] is None else f"{verdict['measured']:.2f}",
            f"{verdict['at_most']:.2f}",
            words[verdict["held"]],
        ]
        for verdict in verdicts
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument("--shape", type=Shape.parse, metavar="N,H,V")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--repeats", type=int, help="default: 9, with --quick 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="a small shape, no memory, nothing saved"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="default: the machine's results file"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is broken")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    on_cpu = torch.device(options.device).type == "cpu"
    shape = options.shape or (QUICK if options.quick else SPEED if on_cpu else GPU)
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    template = Case(BASELINE, shape, dtype, options.device)
    template = replace(template, budget=template.logits_bytes // 10)
    repeats = options.repeats or (3 if options.quick else 9)

    about = measure.machine(options.device)
    rows = make_rows(template, options.peers)
    time_rows(rows, repeats, options.device)
    gc.collect()
    if not options.quick:
        measure_memory(rows, options.threads)
    verdicts = check(rows)

    print(measure.describe(about))
    measure.show(
        f"SimPO forward + backward, {shape}, {dtype}, fusedpo's budget "
        f"{template.logits_bytes / 10 / MIB:.1f} MiB, medians of {repeats} interleaved rounds",
        ("scenario", "program", "ms", "quartiles", "x full logits", "MiB beyond gradients"),
        _table(rows),
    )
    measure.show("bounds", ("ratio", "measured", "at most", "held"), _verdict_table(verdicts))
    if options.json or not options.quick:
        answer = {"machine": about, "rows": [r.to_json() for r in rows], "bounds": verdicts}
        print(f"written to {measure.save('speed', answer, options.json)}")
    return int(options.check and any(verdict["held"] is False for verdict in verdicts))


def measure_memory(rows: Sequence[Row], threads: int) -> None:
    for row in rows:
        if row.missing:
            continue
        try:
            row.extra = fresh_peak(row.case, threads).extra
        except RuntimeError as error:
            row.missing = str(error)


if __name__ == "__main__":
    sys.exit(main())
