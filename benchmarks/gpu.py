"""What does a GPU say? ``python -m fusedpo.benchmarks.gpu``

Everything timed is a ratio to something timed in the same rounds. Sections:

    smoke    whether every route gives what float64 gives; if one does not, nothing else is run
    products the products of a tile over those at full size, by the tile's rows and columns
    bits     whether 2000 folds are what one warp makes of them, and the routes agree in fp32
    kernels  every kernel over its own floor
    folds    the fold in other ways, over a copy
    routes   forward and backward by every route, over the bare products it is made of
    trace    how many kernels a step launches, and for how long the device has none
    tail     from log-probabilities to losses: one launch, and PyTorch with autograd
    shapes   the ratio from few rows to many, and from small vocabularies to large
    memory   bytes beyond the outputs, planned and held; waits of the host for the device

Each has its share of the time. One that runs out says what was left undone; one that fails does not
stop the others, but makes the exit status 1. An interrupt (SIGINT) ends the sections, and what was
measured until then is saved.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusedpo.benchmarks import measure
from fusedpo.benchmarks.section import Section, Setting
from fusedpo.benchmarks.shapes import GPU, Shape
from fusedpo.benchmarks.timing import Clock, Deadline

# seconds of each section; together under seven minutes
SECONDS = {
    "smoke": 25.0,
    "products": 20.0,
    "bits": 15.0,
    "kernels": 45.0,
    "folds": 15.0,
    "routes": 85.0,
    "trace": 15.0,
    "tail": 25.0,
    "shapes": 100.0,
    "memory": 50.0,
}

_DRY = Shape(pairs=2, tokens=4, hidden=32, vocab=300)
_QUICK = Shape(pairs=4, tokens=256, hidden=2048, vocab=32_000)


def setting_of(device: str, *, quick: bool, dry: bool) -> Setting:
    if dry:
        return Setting(
            Clock("cpu"),
            _DRY,
            torch.bfloat16,
            rounds=1,
            calls=1,
            rows=(8,),
            vocabularies=(128,),
            peers=("full_logits",),
            tail=(2, 9),
            dry=True,
        )
    shape = _QUICK if quick else GPU
    return Setting(
        Clock(device),
        shape,
        torch.bfloat16,
        rounds=5 if quick else 15,
        calls=16,
        rows=(256, 2048) if quick else (256, 1024, 4096, 16384, 65536),
        vocabularies=(shape.vocab,) if quick else (32_000, 65_536, shape.vocab, 262_144),
        # the one that compiles its step last
        peers=("full_logits", "trl", "linear_cross_entropy", "liger"),
        tail=(32, 512),
    )


def sections() -> Mapping[str, Callable[..., Section]]:
    # the kernels are defined here, which is when Triton looks whether to interpret them
    from fusedpo.benchmarks import kernels, probes, routes, smoke

    return {
        "smoke": smoke.smoke,
        "products": probes.products,
        "bits": probes.bits,
        "kernels": kernels.kernels,
        "folds": probes.folds,
        "routes": routes.routes,
        "trace": probes.trace,
        "tail": kernels.tail,
        "shapes": routes.shapes,
        "memory": routes.memory,
    }


def machine(device: str) -> dict[str, Any]:
    """benchmarks/measure.py's description, and what else a GPU's numbers depend on."""
    about = measure.machine(device)
    about["commit"] = about["commit"] or "unknown"
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "driver": _nvidia_smi("driver_version"),
            "clocks": _nvidia_smi("clocks.max.sm,clocks.sm,clocks.mem,power.limit"),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": getattr(properties, "L2_cache_size", None),
        }
    return about


def _nvidia_smi(what: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def run(
    names: Sequence[str],
    setting: Setting,
    answer: dict[str, Any],
    seconds: float,
    save: Callable[[], object],
) -> None:
    """Run sections, one after the other, into the answer; print their tables.

    save: called after each, so that what ends the program leaves the others' answers.
    """
    known, whole = sections(), Deadline(seconds)
    for i, name in enumerate(names):
        # what an earlier section did not need goes to those that follow
        later = sum(SECONDS[n] for n in names[i:])
        share = max(1.0, whole.left * SECONDS[name] / later)
        print(f"{name}: at most {share:.0f} s", file=sys.stderr, flush=True)
        begin = time.monotonic()
        try:
            section = known[name](setting, Deadline(share))
            answer[name] = section.to_json()
            section.show(dry=setting.dry)
        except KeyboardInterrupt:
            answer[name] = {"failed": "interrupted: the time of the whole was up"}
        except Exception:
            print(f"{name} FAILED", file=sys.stderr)
            traceback.print_exc()
            answer[name] = {"failed": traceback.format_exc().splitlines()[-1]}
        answer[name]["took_seconds"] = time.monotonic() - begin
        print(f"{name}: took {answer[name]['took_seconds']:.0f} s", file=sys.stderr, flush=True)
        gc.collect()
        if setting.cuda:
            torch.cuda.empty_cache()
        save()
        left = names[i + 1 :]
        stopped = str(answer[name].get("failed", "")).startswith("interrupted")
        if left and (stopped or (name == "smoke" and failures(answer, [name]))):
            print(f"{name} FAILED: not run: {', '.join(left)}", file=sys.stderr)
            answer |= {n: {"failed": f"not run, as {name} failed"} for n in left}
            save()
            return


def failures(answer: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Sections that failed or computed something wrong."""
    return [name for name in names if "failed" in answer[name] or answer[name]["wrong"]]


def summary(answer: Mapping[str, Any], names: Sequence[str], most: int = 47) -> list[str]:
    """At most so many lines: what is wrong first, then a line of numbers a row but the details."""
    lines = []
    for name in names:
        if failed := answer[name].get("failed"):
            lines.append(f"{name}: FAILED: {failed}")
        lines += [f"{name}: WRONG: {what}" for what in answer[name].get("wrong", [])]
        if ran_out := answer[name].get("ran_out"):
            lines.append(f"{name}: no time was left for {', '.join(ran_out)}")
    rows = [(name, row) for name in names for row in answer[name].get("rows", [])]
    right = [row for name, row in rows if name == "smoke"]
    if right:
        worst = max(error for row in right for error in row["errors"].values())
        lines.append(f"smoke: {len(right)} checks, worst error {worst:.2g} of its bound")
    shown = [(name, row) for name, row in rows if name != "smoke" and not row.get("detail")]
    lines += [_line(name, row) for name, row in shown]
    lines = [line[:160] for line in lines]
    if len(lines) > most:
        lines[most - 1 :] = [f"{len(lines) - most + 1} lines more in the answers"]
    return lines


# a row's number as it is called where it is kept, in words and units
_NUMBERS = (
    ("seconds", "us", 1e6),
    ("kernel_seconds", "us", 1e6),
    ("speedup", "x as fast as PyTorch", 1.0),
    ("ratio", "x its products", 1.0),
    ("predicted_ratio", "predicted", 1.0),
    ("share_of_floor", "of its floor", 1.0),
    ("of_product", "of the bare product's speed", 1.0),
    ("bytes_per_second", "GB/s", 1e-9),
    ("flop_per_second", "TFLOP/s", 1e-12),
    ("host_seconds", "us host", 1e6),
    ("held_bytes", "MiB held", 2.0**-20),
    ("planned_bytes", "MiB planned", 2.0**-20),
    ("different", "different", 1.0),
    ("total", "in all", 1.0),
    ("kernels", "kernels", 1.0),
    ("busy_seconds", "us busy", 1e6),
    ("gap_seconds", "us of gaps", 1e6),
    ("largest_gap_seconds", "us the largest", 1e6),
)


def _line(section: str, row: Mapping[str, Any]) -> str:
    keys = ("name", "what", "loss", "tokens", "vocab")
    words = [str(row[key]) for key in keys if row.get(key) is not None]
    numbers = [
        f"{row[key] * factor:.4g} {unit}"
        for key, unit, factor in _NUMBERS
        if isinstance(row.get(key), (int, float))
    ]
    for route, ratio in (row.get("ratios") or {}).items():
        if ratio is not None:
            numbers.append(f"{route} {ratio:.3f} x its products")
    said = [str(row[key]) for key in ("words", "missing") if row.get(key)]
    return f"{section}: {' '.join(words)}: {', '.join(numbers + said) or '-'}"


def missed(answer: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Targets that were measured and missed."""
    return [
        verdict["what"]
        for name in names
        for verdict in answer[name].get("verdicts", [])
        if verdict["met"] is False
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(SECONDS)
    for name in names:
        if name not in SECONDS:
            parser.error(f"--only: expected some of {', '.join(SECONDS)}, got {name!r}")
    if options.dry_run:
        # before a kernel is defined, which is when Triton looks
        os.environ["TRITON_INTERPRET"] = "1"
        options.device = "cpu"
        torch.set_num_threads(1)
        if options.json and measure.RESULTS.resolve() in options.json.resolve().parents:
            parser.error("--json: the numbers of a dry run are none of the results")
    elif torch.device(options.device).type != "cuda" or not torch.cuda.is_available():
        parser.error("the kernels are measured on a GPU, and there is none; see --dry-run")

    setting = setting_of(options.device, quick=options.quick, dry=options.dry_run)
    answer: dict[str, Any] = {
        "machine": machine(setting.device),
        "dry_run": options.dry_run,
        "quick": options.quick,
        "shape": str(setting.shape),
        "dtype": str(setting.dtype).removeprefix("torch."),
    }
    print(measure.describe(answer["machine"]), flush=True)
    path = options.json
    saved = path is not None or not (options.dry_run or options.quick)

    def save() -> Path | None:
        return measure.save("gpu", answer, path) if saved else None

    run(names, setting, answer, options.seconds, save)
    if (written := save()) is not None:
        print(f"written to {written}")
    print("=== summary")
    print("\n".join(summary(answer, names)))
    wrong = failures(answer, names)
    if wrong:
        print(f"FAILED or wrong: {', '.join(wrong)}")
    behind = [] if options.dry_run else missed(answer, names)
    if behind:
        print(f"missed: {'; '.join(behind)}")
    return int(bool(wrong) or (options.check and bool(behind)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedpo.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small shape; nothing is saved")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="all of the code at a tiny shape in Triton's interpreter; no number means anything",
    )
    parser.add_argument("--only", metavar="SECTION,...", help=f"some of {', '.join(SECONDS)}")
    parser.add_argument("--seconds", type=float, default=sum(SECONDS.values()), help="in all")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: the machine's results file"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
