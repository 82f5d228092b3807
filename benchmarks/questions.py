"""All of the questions by name: sweeps, which stand here, and those with a module of their own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusedpo.benchmarks import options as asking
from fusedpo.benchmarks import routes
from fusedpo.benchmarks.formulas import TITLES, WITH_REFERENCE
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.reports import report
from fusedpo.benchmarks.shapes import MIB, Shape, head_of
from fusedpo.benchmarks.sweep import Entry, Point, Question, others, own
from fusedpo.machine import ROOT

# the most asked first
NAMES = (
    "length",
    "budget",
    "precision",
    "training",
    "references",
    "scored",
    "vocabulary",
    "batch",
    "kernels",
    "routes",
    "tiles",
    "compact",
    "compact_errors",
)
LONG = ("compact_training",)
"""Asked by their own commands alone: an hour, or more."""
ALL = (*NAMES, *LONG)
QUICK = ("length", "budget", "precision")
"""Those of the short version."""

LOSSES = ("sft", "dpo", "simpo", "orpo", "kto", "sspo")
BUDGETS = (1, 2, 4, 8, 16, 64, 256, 1024)
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
VOCABULARIES = (32_000, 65_536, 128_256, 151_936, 262_144)
PAIRS = (1, 2, 4, 8, 16)
REFERENCES: dict[str, dict[str, Any]] = {
    "DPO, reference in the same call": {"reference": "same call"},
    "DPO, reference precomputed": {"reference": "precomputed"},
    "frozen head, reference in the same call": {"reference": "same call", "frozen": True},
    "frozen head, reference precomputed": {"reference": "precomputed", "frozen": True},
}


def usual(options: Options, positions: int, on_gpu: int, pairs: int = 2) -> Shape:
    """Tokens before a small head on the CPU, and before a large one on a GPU."""
    if options.on_cpu:
        return head_of("pythia-70m", positions, pairs)
    return head_of("llama-3.1-8b", on_gpu, pairs)


def of_loss(options: Options, loss: str, shape: Shape) -> Point:
    """At a shape's tokens; what needs a reference has it scored in the same call."""
    reference = "same call" if loss in WITH_REFERENCE else "none"
    case = options.case(shape, loss=loss, reference=reference)
    return Point(TITLES[loss], shape.positions, case)


def by_length(options: Options) -> list[Point]:
    """One pair, all tokens scored."""
    if options.on_cpu:
        lengths = (1024, 4096) if options.quick else (512, 1024, 2048, 4096, 16384, 65536, 131072)
    else:
        lengths = (2048, 16384) if options.quick else tuple(2**i for i in range(9, 18))
    shapes = options.shapes or [usual(options, length, length, 1) for length in lengths]
    losses = ("dpo", "simpo") if options.quick and options.losses is None else LOSSES
    return [of_loss(options, loss, shape) for loss in options.of(losses) for shape in shapes]


def by_budget(options: Options) -> list[Point]:
    """One shape: what differs are the programs' budgets."""
    shapes = options.shapes or [usual(options, 512 if options.quick else 1024, 8192)]
    losses = options.of(("simpo",) if options.quick else ("simpo", "dpo"))
    return [of_loss(options, loss, shape) for loss in losses for shape in shapes]


def budgets(options: Options) -> list[Entry]:
    """The others, and fusedpo from the smallest budget that is accepted upwards."""
    scale = MIB if options.on_cpu else 16 * MIB
    return [
        *others(options),
        Entry("linear_cross_entropy", "torch linear_cross_entropy, its own choice"),
        Entry("fusedpo", "fusedpo, smallest", "least"),
        *own([size * scale for size in (BUDGETS[1::2] if options.quick else BUDGETS)]),
    ]


def by_reference(options: Options) -> list[Point]:
    """With a head that trains and with a frozen one, as under LoRA."""
    names = list(REFERENCES)[1:3] if options.quick else list(REFERENCES)
    return [
        Point(name, shape.positions, options.case(shape, loss=loss, **REFERENCES[name]))
        for loss in options.of(("dpo",))
        for shape in options.shapes or [usual(options, 1024, 8192)]
        for name in names
    ]


def by_share(options: Options) -> list[Point]:
    """Positions stay; the share of them that is scored does not."""
    return [
        Point(TITLES[loss], 100 * share, options.case(shape, loss=loss, masked=1 - share))
        for loss in options.of(("simpo",))
        for shape in options.shapes or [usual(options, 1024, 8192)]
        for share in (SHARES[::2] if options.quick else SHARES)
    ]


def by_vocabulary(options: Options) -> list[Point]:
    """Heads from 32k to 262k entries, one hidden size."""
    shape = Shape(2, 128, 256, 0) if options.on_cpu else Shape(4, 1024, 4096, 0)
    vocabularies = VOCABULARIES[::2] if options.quick else VOCABULARIES
    shapes = options.shapes or [replace(shape, vocab=vocab) for vocab in vocabularies]
    return [
        Point(TITLES[loss], shape.vocab, options.case(shape, loss=loss))
        for loss in options.of(("simpo",))
        for shape in shapes
    ]


def by_pairs(options: Options) -> list[Point]:
    """Responses of one length."""
    return [
        Point(TITLES[loss], pairs, options.case(replace(shape, pairs=pairs), loss=loss))
        for loss in options.of(("simpo",))
        for shape in options.shapes or [usual(options, 256, 2048, 1)]
        for pairs in (PAIRS[::2] if options.quick else PAIRS)
    ]


KNOWN: dict[str, asking.Question] = {
    each.name: each
    for each in (
        Question(
            "length",
            "How do time and memory grow with the length of the responses?",
            "scored tokens of a pair",
            by_length,
        ),
        Question(
            "budget",
            "What does a smaller memory budget cost in time?",
            "scored tokens",
            by_budget,
            budgets,
            across=True,
        ),
        Question(
            "references",
            "What do a frozen head and a reference cost?",
            "scored tokens",
            by_reference,
        ),
        Question(
            "scored",
            "What do tokens cost that are not scored, such as a long prompt before a short answer?",
            "share of scored positions",
            by_share,
            unit=" %",
        ),
        Question(
            "vocabulary",
            "How do time and memory grow with the vocabulary?",
            "vocabulary",
            by_vocabulary,
        ),
        Question(
            "batch",
            "How do time and memory grow with the number of pairs in a batch?",
            "pairs in a batch",
            by_pairs,
        ),
        routes.OF_TILES,
    )
}
"""Those without a module of their own."""


def question(name: str) -> asking.Question:
    if name not in KNOWN:
        return importlib.import_module(f"fusedpo.benchmarks.{name}").QUESTION
    return KNOWN[name]


def ask(names: Sequence[str], options: Options, *, verified: bool = True) -> int:
    """Answer after answer, each saved as soon as it is there; 1 if what is measured is wrong."""
    if verified and not verify(options):
        return 1
    wrong = False
    for name in names:
        answer = question(name).ask(options)
        report(answer, options)
        wrong |= bool(answer.get("wrong"))
    return int(wrong)


TESTS = (
    "tests/test_benchmarks.py::test_every_peer_computes_the_same",
    "tests/test_benchmarks.py::test_a_wrong_peer_is_found_out",
)
GPU_TESTS = (
    "tests/gpu/test_parity.py::test_tiles_as_the_planner_chooses_them",
    "tests/gpu/test_parity.py::test_losses_equal_those_from_full_logits",
)


def verify(options: Options) -> bool:
    """Whether every program has the same loss and gradients, by the repository's tests of that.

    From an installed package they are not run, nor without pytest: this says so, and returns True.
    """
    stream = sys.stderr if options.print_json else sys.stdout
    tests, here = [*TESTS], {"OMP_NUM_THREADS": "1"}
    if not options.on_cpu:
        tests += GPU_TESTS
        here["FUSEDPO_TEST_DEVICE"] = options.device
    lacking = None if (ROOT / "tests").is_dir() else "the tests are in the repository alone"
    if lacking is None and importlib.util.find_spec("pytest") is None:
        lacking = "pytest is not installed"
    if lacking:
        print(f"not verified: {lacking}", file=stream)
        return True
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *tests],
        cwd=ROOT,
        env={**os.environ, **here},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        print(f"verified: {last}", file=stream)
        return True
    print(done.stdout[-4000:], file=sys.stderr)
    print("nothing is measured: a program computes something else, see above", file=sys.stderr)
    return False
