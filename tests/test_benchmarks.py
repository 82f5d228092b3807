"""The comparison is fair: every program computes the same loss, and the ruler is straight."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from fusedpo import tables
from fusedpo.benchmarks import (
    kernel_calls,
    kernels,
    measure,
    questions,
    reports,
    roofline,
    routes,
    sweep,
    timing,
    worker,
)
from fusedpo.benchmarks.formulas import FORMULAS, WITH_REFERENCE
from fusedpo.benchmarks.options import Options, options_of, parser
from fusedpo.benchmarks.peers import PEERS, Unsupported, by_formula, full_logits, step, why_not
from fusedpo.benchmarks.section import Setting, Verdict
from fusedpo.benchmarks.shapes import MIB, TINY, Case, Inputs, Shape, head_of, make_inputs
from fusedpo.benchmarks.timing import Clock, Deadline, median

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def oracle(case: Case) -> dict[str, Tensor | None]:
    """Loss and gradients in float64, by the definition."""
    exact = Inputs(
        *(x.double() if x is not None and x.is_floating_point() else x for x in make_inputs(case))
    ).for_case(case)
    loss = by_formula(full_logits, case, exact)
    loss.backward()
    return {"loss": loss.detach(), "hidden": exact.hidden.grad, "weight": exact.weight.grad}


def result(case: Case) -> dict[str, Tensor | None]:
    inputs = make_inputs(case)
    loss = step(case, inputs)
    return {"loss": loss, "hidden": inputs.hidden.grad, "weight": inputs.weight.grad}


def agree(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> bool:
    """Each within TOLERANCE of its own size, and gradients present exactly where they are due."""
    for name, exact in want.items():
        value = got[name]
        if exact is None or value is None:
            if exact is not value:
                return False
        # said so that NaN does not pass
        elif not (value.double() - exact).norm() <= TOLERANCE * exact.norm():
            return False
    return True


REFERENCED = [
    (loss, reference)
    for loss in FORMULAS
    for reference in (("same call", "precomputed") if loss in WITH_REFERENCE else ("none",))
]


@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["all scored", "masked"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(("loss", "reference"), REFERENCED)
@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_computes_the_same(
    peer: str, loss: str, reference: str, frozen: bool, masked: float
) -> None:
    if missing := PEERS[peer].missing():
        pytest.skip(missing)
    case = Case(peer, TINY, frozen=frozen, masked=masked, loss=loss, reference=reference)
    want = oracle(case)
    assert (want["weight"] is None) == frozen
    try:
        # what a compiler makes of it takes seconds a case, and has a test of its own
        with torch.compiler.set_stance("force_eager"):
            got = result(case)
    except Unsupported as error:
        assert peer not in ("full_logits", "compiled", "fusedpo")
        assert why_not(case) == str(error)
        pytest.skip(str(error))
    assert agree(got, want)


@pytest.mark.compiled
def test_what_is_compiled_computes_the_same() -> None:
    case = Case("compiled", TINY, masked=0.4, loss="dpo", reference="same call")
    if reason := why_not(case):
        pytest.skip(reason)
    assert agree(result(case), oracle(case))


@pytest.mark.parametrize("budget", [64 * 1024, 16 * MIB])
@pytest.mark.parametrize("peer", [name for name, peer in PEERS.items() if peer.budgeted])
def test_a_budget_changes_nothing_of_what_is_computed(peer: str, budget: int) -> None:
    if missing := PEERS[peer].missing():
        pytest.skip(missing)
    case = Case(peer, Shape(2, 40, 16, 3000), budget=budget)
    assert agree(result(case), oracle(case))


def test_a_wrong_peer_is_found_out() -> None:
    case = Case("full_logits", TINY)
    want = oracle(case)
    assert agree(want, want)
    assert not agree({**want, "loss": want["loss"] * 1.001}, want)
    assert not agree({**want, "loss": want["loss"] * math.nan}, want)
    for name in ("hidden", "weight"):
        missing_chunk = want[name].clone()
        missing_chunk[:1] = 0
        for wrong in (None, torch.zeros_like(want[name]), 0.9 * want[name], missing_chunk):
            assert not agree({**want, name: wrong}, want)


def test_the_losses_differ() -> None:
    """Or a peer that computes another one would pass for this one."""
    found = [
        oracle(Case("full_logits", TINY, masked=0.4, loss=loss, reference=reference))
        for loss, reference in REFERENCED
    ]
    for a, b in itertools.combinations(found, 2):
        assert not agree(a, b)


def test_masked_positions_are_the_start_of_every_sequence() -> None:
    case = Case("full_logits", TINY, masked=0.4)
    labels = make_inputs(case).labels
    assert (labels[:, :2] == -100).all()
    assert (labels[:, 2:] >= 0).all()


def test_inputs_have_the_reference_that_the_case_has() -> None:
    for reference, expected in (
        ("none", (False, False)),
        ("same call", (True, False)),
        ("precomputed", (False, True)),
    ):
        inputs = make_inputs(Case("full_logits", TINY, reference=reference, frozen=True))
        assert (inputs.ref_hidden is not None, inputs.ref_logprobs is not None) == expected
        assert inputs.hidden.requires_grad and not inputs.weight.requires_grad


def test_a_case_goes_through_json() -> None:
    case = Case("trl", TINY, masked=0.5, budget=7, loss="dpo", reference="same call")
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


# the ruler


HOLD_AND_FREE = """
import sys
from pathlib import Path
import torch
from fusedpo.benchmarks import measure

def refuse(self, text):
    raise PermissionError(self)

def function():
    a = torch.ones(40 * 2**20, dtype=torch.uint8)
    del a
    torch.ones(64 * 2**20, dtype=torch.uint8)

if sys.argv[1] == "not resettable":
    Path.write_text = refuse
torch.ones(128 * 2**20, dtype=torch.uint8)  # an earlier, higher mark must not hide the next one
print(measure.peak_bytes(function))
"""


@on_linux
@pytest.mark.parametrize("mark", ["resettable", "not resettable"])
def test_peak_sees_what_was_held_and_freed(mark: str) -> None:
    """In a process of its own: what else a process of many tests holds and frees is seen, too."""
    done = subprocess.run(
        [sys.executable, "-c", HOLD_AND_FREE, mark],
        env={**os.environ, **measure.MALLOC_ENV},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == pytest.approx(64 * MIB, abs=4 * MIB)


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Garbage is collected before anything is timed; what all the imports left takes long."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    if worker._server is not None:
        worker._server.kill()
        worker._server.wait()


@on_linux
@pytest.mark.parametrize("frozen", [False, True])
def test_a_fresh_process_measures_the_logits(frozen: bool) -> None:
    shape = Shape(pairs=1, tokens=256, hidden=16, vocab=32_768)
    case = Case("full_logits", shape, frozen=frozen)
    peak = worker.fresh_peak(case, threads=1)
    inputs = make_inputs(case)
    assert peak.gradients == inputs.hidden.nbytes + (0 if frozen else inputs.weight.nbytes)
    # log-probabilities, their gradient and that of the logits live at a time
    assert peak.total == pytest.approx(3 * 4 * shape.positions * shape.vocab, abs=16 * MIB)
    assert peak.products == (2.0 if frozen else 3.0)


@on_linux
def test_a_failing_worker_says_why_and_the_next_one_measures() -> None:
    with pytest.raises(RuntimeError, match="no_such_peer"):
        worker.fresh_peak(Case("no_such_peer", TINY))
    assert worker.fresh_peak(Case("full_logits", TINY)).total >= 0


@on_linux
@pytest.mark.parametrize("what", ["tokens", "vocab"])
def test_out_of_memory_is_told_apart(what: str) -> None:
    """Of the inputs, and of the logits."""
    absurd = {"tokens": {"tokens": 2**34}, "vocab": {"tokens": 2**20, "vocab": 2**22}}[what]
    case = Case("full_logits", replace(TINY, **{"hidden": 1, **absurd}))
    with pytest.raises(worker.OutOfMemory, match="out of memory"):
        worker.fresh_peak(case, threads=1)
    assert worker.fresh_peak(Case("full_logits", TINY)).total >= 0


@on_linux
def test_a_killed_measurement_is_out_of_memory() -> None:
    """As the system ends a process when there is no more."""
    worker.fresh_peak(Case("full_logits", TINY))
    server = worker._server
    long = Case("full_logits", Shape(2, 512, 512, 30_000))

    def kill(*_: object) -> None:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, 0.3, 0.1)
    try:
        with pytest.raises(worker.OutOfMemory):
            worker.fresh_peak(long, threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert worker.fresh_peak(Case("full_logits", TINY)).total >= 0


@on_linux
def test_an_interrupted_measurement_is_not_taken_for_the_next() -> None:
    worker.fresh_peak(Case("full_logits", TINY))
    long = Case("full_logits", Shape(2, 512, 512, 30_000))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.fresh_peak(long, threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert worker.fresh_peak(Case("full_logits", TINY)).gradients < MIB


def test_a_peer_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("liger", TINY)
    absent = replace(PEERS["liger"], needs="no_such_package.loss")
    monkeypatch.setitem(PEERS, "liger", absent)
    assert "no_such_package" in why_not(case)

    def broken(case: Case, inputs: Inputs) -> Tensor:
        raise ValueError("not on this device\nand more")

    monkeypatch.setitem(PEERS, "liger", replace(PEERS["full_logits"], loss=broken))
    assert why_not(case) == "ValueError: not on this device"


@pytest.mark.holds(46)
def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "answer.json"
    assert measure.write(path, "before").read_text() == "before"
    assert path.stat().st_mode & 0o777 == 0o644

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", interrupted)
        measure.write(path, "after")
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]
    measure.write(path, b"after")
    assert path.read_bytes() == b"after"


def test_answers_are_saved_beside_others(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    measure.save("one", {"rows": [1]}, path)
    measure.save("two", {"rows": [2]}, path)
    measure.save("one", {"rows": [3]}, path)
    assert json.loads(path.read_text()) == {"one": {"rows": [3]}, "two": {"rows": [2]}}


def test_tables_are_shown_with_and_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("title", ("program", "ms"), [["full logits", "12"], ["fusedpo", "-"]])
    tables.show(*arguments)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    tables.show(*arguments)
    shown = capsys.readouterr().out
    for word in ("title", "program", "ms", "full logits", "12", "fusedpo"):
        assert shown.count(word) == 2
    tables.show(*arguments, stream=sys.stderr)
    assert capsys.readouterr().out == ""


# a question, from its options to its files


def points(options: Options) -> list[sweep.Point]:
    return [
        sweep.Point("SimPO", shape.positions, options.case(shape))
        for shape in (Shape(2, 8, 16, 300), Shape(2, 16, 16, 300))
    ]


ENTRIES = (
    sweep.Entry("full_logits"),
    sweep.Entry("fusedpo", budget=MIB),
    sweep.Entry("fusedpo", "fusedpo, smallest", "least"),
)
QUESTION = sweep.Question(
    "tiny", "Is anything measured?", "scored tokens", points, lambda options: ENTRIES
)
ARGUMENTS = ["--threads", "1", "--seconds", "0.05"]


@on_linux
def test_a_question_is_asked_and_its_answer_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ARGUMENTS, "--output", str(tmp_path / "new")]
    assert reports.main(QUESTION, arguments) == 0
    shown = capsys.readouterr()
    (path,) = (tmp_path / "new").glob("*.json")
    assert {p.name for p in path.parent.iterdir()} == {path.name, "tiny.png"}
    answer = json.loads(path.read_text())["tiny"]
    assert {"cpu", "threads", "versions", "commit", "dirty"} <= answer["machine"].keys()
    rows = answer["rows"]
    assert [(row["x"], row["entry"]) for row in rows] == [
        (x, entry.name) for x in (32, 64) for entry in ENTRIES
    ]
    for row in rows:
        assert row["missing"] is None and row["extra_bytes"] >= 0 and row["predicted_bytes"] > 0
        assert len(row["seconds"]) <= 15
        assert row["median_seconds"] == pytest.approx(median(row["seconds"]), abs=1e-6)
    assert [row["products"] for row in rows[:3]] == [3.0, 3.0, 4.0]
    least = sweep.workload(Case.from_json(rows[2]["case"])).plan()
    assert least.bytes <= least.budget < MIB
    for word in ("Is anything measured?", "scored tokens", "full logits", "smallest", "written to"):
        assert word in shown.out
    assert (path.parent / "tiny.png").read_bytes()[:4] == b"\x89PNG"


@on_linux
def test_json_has_stdout_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--json", "--output", str(tmp_path), "--peers", "full_logits"]
    assert reports.main(QUESTION, arguments) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert {row["entry"] for row in answer["rows"]} == {"full logits"}
    assert "Is anything measured?" in shown.err


def answer_of(**reasons: str | None) -> dict:
    """An answer with a point, where the baseline takes two seconds and the others three."""
    rows = []
    for peer, missing in {"full_logits": None, **reasons}.items():
        row = sweep.Row("SimPO", 32, PEERS[peer].label, Case(peer, TINY), missing=missing)
        if missing is None:
            row.seconds = (2.0,) if peer == "full_logits" else (3.0, 3.0)
            row.extra, row.products = 3 * MIB, 3.0
        rows.append(row.to_json())
    return {"axis": "tokens", "unit": " t", "rows": rows}


def test_a_table_has_times_ratios_bytes_and_reasons() -> None:
    columns, lines = sweep.table(answer_of(fusedpo=None))
    shown = [dict(zip(columns[1:-1], line[1:-1], strict=True)) for line in lines]
    assert shown[0] == {
        "tokens": "32 t",
        "program": "full logits",
        "ms": "2000",
        "x full logits": "1.00",
        "extra MiB": "3.0",
        "products": "3.0",
    }
    assert shown[1]["x full logits"] == "1.50" and shown[1]["ms"] == "3000"
    assert all(len(line) == len(columns) for line in lines)


def test_what_was_faster_is_said() -> None:
    """By fusedpo's time, that of its fastest budget; and nothing where it is first."""
    answer = answer_of(fusedpo=None)
    assert reports.faster(answer) == ["Faster than fusedpo: full logits at SimPO 32 by 33.3%."]
    answer["rows"].append({**answer["rows"][1], "median_seconds": 1.5})
    assert reports.faster(answer) == []
    assert reports.faster(answer_of()) == []


@pytest.fixture
def measured_at_once(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Memory costs no process here; what is put in for a peer is raised in place of its number."""
    raised: dict[str, Exception] = {}

    def fresh_peak(case: Case, threads: int) -> worker.Peak:
        if case.peer in raised:
            raise raised[case.peer]
        return worker.Peak(MIB, 0, 3.0, loss=1.0)

    monkeypatch.setattr(sweep, "fresh_peak", fresh_peak)
    return raised


def test_what_fails_is_a_row_with_its_reason(
    measured_at_once: dict[str, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(case: Case, inputs: Inputs) -> Tensor:
        if case.shape != TINY:
            raise RuntimeError("too long\nfor this")
        return full_logits(case, inputs.hidden, inputs.weight, inputs.labels).sum()

    monkeypatch.setitem(PEERS, "trl", replace(PEERS["full_logits"], label="late", loss=late))
    broken = replace(PEERS["full_logits"], label="absent", needs="no_such_package.loss")
    monkeypatch.setitem(PEERS, "liger_scaled", broken)
    monkeypatch.setitem(PEERS, "liger", replace(PEERS["full_logits"], label="large"))
    measured_at_once["liger"] = worker.OutOfMemory("out of memory")
    monkeypatch.setitem(PEERS, "compiled", replace(PEERS["full_logits"], label="gone"))
    measured_at_once["compiled"] = RuntimeError("compiled: the measuring process is gone")
    names = ("full_logits", "trl", "liger_scaled", "liger", "compiled", "fusedpo")
    question = replace(QUESTION, entries=lambda options: [sweep.Entry(name) for name in names])
    answer = question.ask(Options(threads=1, seconds=0.02))
    rows = {row["entry"]: row for row in answer["rows"] if row["x"] == 32}
    assert [row["x"] for row in answer["rows"]] == [32] * 6 + [64] * 6
    for name in ("full logits", "fusedpo"):
        assert rows[name]["missing"] is None and rows[name]["median_seconds"] > 0
    assert rows["late"]["missing"] == "RuntimeError: too long"
    assert "no_such_package" in rows["absent"]["missing"]
    assert rows["large"]["missing"] == "out of memory"
    assert "is gone" in rows["gone"]["missing"]
    for name in ("late", "absent", "large", "gone"):
        assert rows[name]["median_seconds"] is None
    # in words and in a plot too, with or without a number
    columns, lines = sweep.table(answer)
    assert all(len(line) == len(columns) for line in lines)


def test_what_computes_another_loss_has_no_numbers(
    measured_at_once: dict[str, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"full_logits": 1.0, "fusedpo": 1.0 + 1e-5, "trl": 1.01, "compiled": math.nan}
    for name in ("trl", "compiled"):
        same = replace(PEERS["full_logits"], label=name)
        monkeypatch.setitem(PEERS, name, same)
    monkeypatch.setattr(
        sweep, "fresh_peak", lambda case, threads: worker.Peak(MIB, 0, 3.0, losses[case.peer])
    )
    question = replace(QUESTION, entries=lambda options: [sweep.Entry(name) for name in losses])
    answer = question.ask(Options(threads=1, seconds=0.02))
    for row in answer["rows"]:
        if row["case"]["peer"] in ("full_logits", "fusedpo"):
            assert row["missing"] is None and row["median_seconds"] > 0
        else:
            assert "another loss" in row["missing"]
            assert row["median_seconds"] is None and row["extra_bytes"] is None


def test_what_fails_after_the_first_round_stops_nothing(
    measured_at_once: dict[str, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def at_last(case: Case, inputs: Inputs) -> Tensor:
        if case.shape != TINY and next(calls) == 1:
            raise RuntimeError("no more memory")
        return by_formula(full_logits, case, inputs)

    monkeypatch.setitem(PEERS, "trl", replace(PEERS["full_logits"], label="late", loss=at_last))
    # a slow spell of the machine must not take it out of the rounds
    monkeypatch.setattr(sweep, "_HOPELESS", float("inf"))
    entries = [sweep.Entry("full_logits"), sweep.Entry("trl")]
    question = replace(QUESTION, entries=lambda options: entries)
    answer = question.ask(Options(threads=1, seconds=1.0))
    assert [row["entry"] for row in answer["rows"]] == ["full logits", "late"] * 2
    assert "no more memory" in answer["rows"][1]["missing"]
    assert answer["rows"][0]["median_seconds"] > 0


def test_without_the_baseline_there_are_no_ratios(
    measured_at_once: dict[str, Exception], tmp_path: Path
) -> None:
    measured_at_once["full_logits"] = worker.OutOfMemory("out of memory")
    options = Options(threads=1, seconds=0.02, output=tmp_path)
    answer = QUESTION.ask(options)
    assert {sweep.ratio(row, answer["rows"]) for row in answer["rows"]} == {None}
    reports.report(answer, options)
    assert (tmp_path / "tiny.png").exists()


def test_what_takes_too_long_is_timed_once(
    measured_at_once: dict[str, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([1.0, 0.001] * 1000)
    monkeypatch.setattr(Clock, "once", lambda clock, function: next(taken))
    rows = [sweep.Row("g", 1, PEERS[p].label, Case(p, TINY)) for p in ("full_logits", "fusedpo")]
    QUESTION.time(rows, Options(seconds=1.5), lambda what: None)
    assert rows[0].seconds == (1.0,)
    assert len(rows[1].seconds) > 1


def test_what_was_far_behind_is_not_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "once", lambda clock, function: 0.25)
    alone = {"full_logits": 30.0, "trl": 30.0, "liger": 1.5, "fusedpo": 1.0}
    rows = [sweep.Row("g", 1, p, Case(p, TINY), alone=s) for p, s in alone.items()]
    QUESTION.time(rows, Options(seconds=0.01), lambda what: None)
    # the baseline is timed in any case, and short steps too
    assert [set(row.seconds) for row in rows] == [{0.25}, {30.0}, {0.25}, {0.25}]
    assert len(rows[1].seconds) == 1


@pytest.mark.holds(46)
@pytest.mark.parametrize("when", ["memory", "time"])
def test_an_interrupt_leaves_the_files_as_they_were(
    when: str,
    measured_at_once: dict[str, Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [*ARGUMENTS, "--output", str(tmp_path)]
    assert reports.main(QUESTION, arguments) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if when == "memory":
        measured_at_once["fusedpo"] = KeyboardInterrupt()
    else:
        calls = itertools.count()

        def interrupted(*arguments: object) -> float:
            if next(calls) == 4:
                raise KeyboardInterrupt
            return 0.01

        monkeypatch.setattr(Clock, "once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reports.main(QUESTION, arguments)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_answer_is_saved_before_it_is_shown(
    measured_at_once: dict[str, Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reports.main(QUESTION, [*ARGUMENTS, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["tiny"]["rows"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


def test_shapes_are_read_from_text() -> None:
    assert Shape.parse("1024,512,50257") == Shape(2, 256, 512, 50_257)
    assert Shape.parse("1024,pythia-70m") == head_of("pythia-70m", 1024)
    for text, words in {
        "1023,512,50257": "multiple of 4",
        "0,512,50257": "multiple of 4",
        "x,512,50257": "multiple of 4",
        "-4,512,50257": "multiple of 4",
        "1024,512": "expected N,H,V or N,MODEL",
        "1024": "expected N,H,V or N,MODEL",
        "1024,512,x": "expected N,H,V or N,MODEL",
        "1024,0,300": "expected N,H,V or N,MODEL",
        "1024,512,0": "expected N,H,V or N,MODEL",
        "1024,no-such-model": "models: .*pythia-70m",
        "": "expected N,H,V or N,MODEL",
    }.items():
        with pytest.raises(ValueError, match=words):
            Shape.parse(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "nowhere"], "--device: expected cpu or cuda, got 'nowhere'"),
        (["--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--seconds", "0"], "--seconds: expected a positive number, got 0"),
        (["--seconds", "nan"], "--seconds: expected a positive number, got nan"),
        (["--shapes", "3,4"], "--shapes: expected N,H,V or N,MODEL, got '3,4'"),
        (["--output", __file__], "--output: expected a folder"),
        (["--output", f"{__file__}/below"], "--output: expected a folder"),
    ],
)
def test_options_are_checked_before_anything_is_measured(arguments: list[str], words: str) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=words):
        options_of(parser(None).parse_args(arguments))
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="--device: expected one that is there, got cuda"):
        options_of(parser(None).parse_args(["--device", "cuda:1"]))


def test_the_baseline_is_among_the_peers_in_any_case() -> None:
    given = parser(None).parse_args(["--peers", "fusedpo", "--threads", "1"])
    assert options_of(given).peers == ("full_logits", "fusedpo")


# the kernels one by one


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_COPY_BYTES", MIB)
    monkeypatch.setattr(kernel_calls, "ROTATED_BYTES", MIB)


def test_kernels_have_floors_on_the_cpu_too(
    small_buffers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ARGUMENTS, "--quick", "--json", "--output", str(tmp_path)]
    assert reports.main(kernels.QUESTION, [*arguments, "--shapes", "32,16,300", "64,16,300"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["kind"] == answer["question"] == "kernels"
    assert not answer["wrong"] and not answer["ran_out"]
    rows = {row["name"]: row for row in answer["rows"] if row["shape"] == str(Shape(2, 8, 16, 300))}
    assert len(rows) * 2 == len(answer["rows"])
    expected = {"fold, statistics only", "fold, exponentials", "settle, all moved", "jacobian"}
    expected |= {"finish", "row gather", "row scatter"}
    products = ("hidden W^T", "J W", "J^T hidden")
    assert expected | {"copy", *products} | {f"{p}, a tile" for p in products} <= rows.keys()
    bandwidth = rows["copy"]["bytes_per_second"]
    for name in expected:
        assert rows[name]["floor_seconds"] == pytest.approx(rows[name]["bytes"] / bandwidth)
    for name in products:
        tile = rows[f"{name}, a tile"]
        by_flop = tile["flop"] / rows[name]["flop_per_second"]
        assert tile["floor_seconds"] == pytest.approx(max(by_flop, tile["bytes"] / bandwidth))
        assert tile["share_of_floor"] == pytest.approx(tile["floor_seconds"] / tile["seconds"])
    for found in (answer, {**answer, "rows": list(rows.values())}):
        columns, lines = kernels.table(found)
        assert len(lines) == len(found["rows"])
        assert all(len(line) == len(columns) for line in lines)
    said = reports.remarks({**answer, "wrong": ["finish: NaN"], "ran_out": ["fold"]})
    assert said == ["WRONG: finish: NaN.", "No time or memory was left for fold."]
    bars = [bar for axes in kernels.plot(answer).axes for bar in axes.patches]
    assert len(bars) == sum(row.get("share_of_floor") is not None for row in answer["rows"])
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"


def test_kernels_on_the_cpu_are_those_of_its_own_backend(
    small_buffers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedpo.kernels import logit_tile

    called = []
    for name in ("fold", "settle", "jacobian", "finish"):
        real = getattr(logit_tile, name)

        def counted(*args: object, name: str = name, real=real, **options: object) -> None:
            called.append(name)
            real(*args, **options)

        monkeypatch.setattr(logit_tile, name, counted)
    shape = Shape(2, 8, 16, 300)
    kernels.QUESTION.ask(Options(quick=True, threads=1, seconds=30.0, shapes=(shape,)))
    assert set(called) == {"fold", "settle", "jacobian", "finish"}


def test_options_of_the_kernels_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        reports.main(kernels.QUESTION, ["--threads", "0"])
    assert stopped.value.code == 2
    assert "--threads: expected at least 1" in capsys.readouterr().err


# the evidence for a machine with a GPU, tried without one

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or not sys.platform.startswith("linux"),
    reason="the dry run is for machines with Triton and without a GPU",
)


def run_script(
    out: Path,
    python: str,
    *arguments: str,
    script: Path = ROOT / "benchmarks" / "gpu.sh",
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(
        [str(script), *arguments],
        env={**environment, "OUT": str(out), "PYTHON": python},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``benchmarks/gpu.sh --dry-run`` leaves its results in."""
    results = {path: path.read_bytes() for path in measure.RESULTS.rglob("*.*") if path.is_file()}
    out = tmp_path_factory.mktemp("gpu")
    done = run_script(out, sys.executable, "--dry-run")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (out / "stdout").write_text(done.stdout, encoding="utf-8")
    assert sorted(path.name for path in out.glob("*.tgz")) == ["first.tgz", "second.tgz"]
    for call in ("first", "second"):
        with tarfile.open(out / f"{call}.tgz") as archive:
            archive.extractall(out, filter="data")
    assert results == {
        path: path.read_bytes() for path in measure.RESULTS.rglob("*.*") if path.is_file()
    }
    return out


in_one_process = pytest.mark.xdist_group("dry run of gpu.sh")


@without_gpu
@in_one_process
def test_the_dry_run_names_every_part(dry_run: Path) -> None:
    tables = (dry_run / "stdout").read_text(encoding="utf-8").split("=== the ")
    for table, parts in zip(
        tables[1:], (["check", "bench", "tune"], ["tests", "kernels", "more"]), strict=True
    ):
        lines = table.split("\n=== ")[0].splitlines()[1:]
        assert [line.split(": passed")[0] for line in lines] == parts
    for name in ("check", "tests"):
        log = (dry_run / f"{name}.log").read_text(encoding="utf-8")
        assert " passed" in log and (dry_run / f"{name}.xml").exists()
    answers: dict[str, Any] = {}
    for path in (*dry_run.glob("bench/*.json"), *dry_run.glob("more/*.json")):
        answers |= json.loads(path.read_text(encoding="utf-8"))
    assert answers.keys() == {"kernels", "routes", "tiles"}
    for answer in answers.values():
        assert answer["rows"] and not answer["wrong"]


@without_gpu
@in_one_process
def test_the_dry_run_tries_tiles_of_every_kernel(dry_run: Path) -> None:
    answer = json.loads((dry_run / "tune.json").read_text(encoding="utf-8"))
    assert answer["dry_run"] is True
    by_kernel: dict[str, list[dict]] = {}
    for row in answer["rows"]:
        by_kernel.setdefault(row["kernel"], []).append(row)
    assert len(by_kernel) == 6
    for rows in by_kernel.values():
        assert [row["ratio_to_current"] for row in rows if row["current"]] == [1.0]
        assert all(row["median_seconds"] > 0 for row in rows)


def shell_python(path: Path, case: str) -> str:
    """A Python that does what the case of a shell says, or else names its arguments."""
    path.write_text(f'#!/bin/sh\ncase "$*" in {case} esac\necho "ran $*"\n')
    path.chmod(0o755)
    return str(path)


def member(archive: Path, name: str) -> str:
    with tarfile.open(archive) as opened:
        file = opened.extractfile(f"./{name}")
        assert file is not None
        return file.read().decode()


def test_a_part_that_fails_is_named_and_stops_nothing(tmp_path: Path) -> None:
    case = "*tests/gpu) echo 'FAILED tests/gpu/test_a.py::b - c'; exit 3 ;;"
    done = run_script(tmp_path, shell_python(tmp_path / "python", case), "--dry-run")
    assert done.returncode == 1
    last = done.stdout.split("=== the second call")[1].splitlines()[1:]
    assert last[0] == "FAILED tests/gpu/test_a.py::b - c"
    assert last[1].startswith("tests: FAILED with status 3")
    assert all(": passed in " in line for line in last[2:]) and len(last) == 4
    assert "ran -m fusedpo bench kernels" in member(tmp_path / "first.tgz", "bench.log")
    assert "ran -m fusedpo bench routes" in member(tmp_path / "second.tgz", "more.log")


def test_fewer_examples_where_each_is_compiled(tmp_path: Path) -> None:
    case = '*tests/gpu*|*kernels/test*) echo "examples: $FUSEDPO_TEST_EXAMPLES" ;;'
    done = run_script(tmp_path, shell_python(tmp_path / "python", case), "--dry-run", "second")
    assert done.stdout.count("examples: 8\n") == 2
    # read by tests/conftest.py
    expected = int(os.environ.get("FUSEDPO_TEST_EXAMPLES", "30"))
    assert hypothesis.settings.default.max_examples == expected


@pytest.mark.parametrize("only", [[], ["--only", "bench,tests"]])
def test_a_wrong_route_ends_both_calls(only: list[str], tmp_path: Path) -> None:
    case = "*planner_chooses*) exit 1 ;;"
    done = run_script(tmp_path, shell_python(tmp_path / "python", case), "--dry-run", *only)
    assert done.returncode == 1 and "a route is wrong: nothing else was run" in done.stdout
    assert "=== bench" not in done.stdout and "=== tests" not in done.stdout
    assert not (tmp_path / "second.tgz").exists()


def test_only_some_parts_and_one_call(tmp_path: Path) -> None:
    python = shell_python(tmp_path / "python", "")
    done = run_script(tmp_path, python, "--dry-run", "--only", "tune,more", "second")
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("=== more")]
    assert done.stdout.count(": passed in ") == 1 and not (tmp_path / "first.tgz").exists()
    for wrong in (["--unknown"], ["--only", "budgets"], ["--only"], ["third"]):
        assert run_script(tmp_path, python, *wrong).returncode == 2


def test_what_runs_out_of_time_is_interrupted_and_says_what_it_knows(tmp_path: Path) -> None:
    script = tmp_path / "gpu.sh"
    text = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
    text = text.replace('cd "$(dirname "$0")/.."', f'cd "{ROOT}"')
    script.write_text(text.replace("bench more 90", "bench more 4"))
    script.chmod(0o755)
    case = "*tiles*) trap 'echo FAILED a::b; exit 2' INT; sleep 60 & wait ;;"
    done = run_script(
        tmp_path,
        shell_python(tmp_path / "python", case),
        "--dry-run",
        *("--only", "more", "second"),
        script=script,
    )
    assert done.returncode == 1
    assert "FAILED a::b\nmore: RAN OUT OF TIME" in done.stdout


def test_each_call_has_a_limit_below_five_minutes() -> None:
    """Each part has one, and none may begin or go on beyond that of its call."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
    limits = [int(n) for n in re.findall(r"limit=\$\(\(SECONDS \+ (\d+) \* slack\)\)", text)]
    assert limits == [230, 300]
    parts = re.findall(r"^    (?:part|tests|bench) \w+ (\d+) ", text, re.MULTILINE)
    assert len(parts) == 6
    assert sum(map(int, parts[:3])) <= 230 and sum(map(int, parts[3:])) <= 300


class PretendedEvent:
    """An event of torch.cuda whose device takes two milliseconds for anything."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, other: PretendedEvent) -> float:
        return 2.0


class PretendedGraph:
    replayed = 0

    def replay(self) -> None:
        PretendedGraph.replayed += 1


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A setting on the CPU that takes itself for a GPU, to run what is done on one alone."""

    class Current:
        def wait_stream(self, other: object) -> None:
            pass

    fakes = {
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Event": PretendedEvent,
        "Stream": type("Stream", (contextlib.nullcontext, Current), {}),
        "current_stream": Current,
        "CUDAGraph": PretendedGraph,
        "stream": lambda s: s,
        "graph": lambda g: contextlib.nullcontext(),
        "device": lambda d: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "_CUSHION_SIDE", 8)
    monkeypatch.setattr(kernels, "_COPY_BYTES", 4096)
    monkeypatch.setattr(kernel_calls, "ROTATED_BYTES", 40_000)
    setting = Setting(Clock("cpu"), Case("full_logits", Shape(2, 4, 32, 300), "bfloat16"), 2, 3)
    setting.clock.cuda = True
    return setting


@without_gpu
def test_what_is_done_on_a_gpu_alone_runs(pretended: Setting) -> None:
    section = routes.routes(pretended, Deadline(60.0))
    assert not section.wrong and not section.ran_out
    found = {row["name"]: row for row in section.rows}
    # two milliseconds for anything: a route takes one over the number of its products
    for route, products in (("forward", 1), ("frozen", 2), ("retain", 3), ("recompute", 4)):
        row = found[f"{route}, triton"]
        assert row["seconds"] == 2e-3 and row["ratio"] == pytest.approx(1 / products)
        assert max(row["differences"].values()) < 0.05
    assert [verdict.at_most for verdict in section.verdicts] == list(roofline.TARGETS.values())
    assert all(verdict.met for verdict in section.verdicts)
    section = kernels.kernels(pretended, Deadline(60.0))
    assert not section.wrong and not section.ran_out and PretendedGraph.replayed > 0
    found = {row["name"]: row for row in section.rows}
    assert {"product_fold", "tail, SimPO"} <= found.keys()
    fold = found["fold, exponentials"]
    assert fold["seconds"] == pytest.approx(2e-3 / 3)
    assert fold["share_of_floor"] == pytest.approx(fold["floor_seconds"] / fold["seconds"])


def test_no_time_is_said_and_not_an_error() -> None:
    setting = Setting(Clock("cpu"), Case("full_logits", TINY), 2, 3)
    section = routes.tiles(setting, Deadline(-9.0))
    assert len(section.ran_out) == len(routes.TILES) and not section.wrong


def test_routes_and_tiles_are_answered_on_the_cpu_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--threads", "1", "--quick", "--shapes", "32,16,300", "--output", str(tmp_path)]
    for question in (routes.QUESTION, routes.OF_TILES):
        assert reports.main(question, arguments) == 0
    (path,) = tmp_path.glob("*.json")
    answers = json.loads(path.read_text())
    rows = {row["name"]: row for row in answers["routes"]["rows"]}
    products = [rows[name]["seconds"] for name in ("hidden W^T", "J W", "J^T hidden")]
    for route, counts in (("recompute", (2, 1, 1)), ("retain", (1, 1, 1)), ("frozen", (1, 1, 0))):
        row = rows[f"{route}, torch"]
        assert row["product_seconds"] == pytest.approx(
            sum(n * s for n, s in zip(counts, products, strict=True))
        )
        assert row["ratio"] == pytest.approx(row["seconds"] / row["product_seconds"])
    names = {row["name"] for row in answers["tiles"]["rows"]}
    assert {f"recompute, torch, {rows} x {cols}" for rows, cols in routes.TILES} <= names
    assert "recompute, torch, 128 x 1024" in capsys.readouterr().out


def test_a_route_that_fails_or_is_wrong_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = routes.Way.loss

    def planted(way: routes.Way, case: Case, chosen: Any, inputs: Inputs) -> Tensor:
        if way.route == "retain":
            raise RuntimeError("an illegal address")
        found = loss(way, case, chosen, inputs)
        if way.route == "recompute":
            inputs.hidden.grad *= 0.9
        return found

    monkeypatch.setattr(routes.Way, "loss", planted)
    monkeypatch.setattr(questions, "verify", lambda options: True)
    arguments = ["--threads", "1", "--quick", "--shapes", "32,16,300", "--output", str(tmp_path)]
    options = options_of(parser(None).parse_args(arguments))
    assert questions.ask(["routes"], options) == 1
    shown = capsys.readouterr().out
    assert "retain, torch: RuntimeError: an illegal address" in shown
    assert "recompute, torch: its hidden differs from that of full logits by 1.0e-01" in shown


def test_a_route_that_computes_something_else_is_found_out() -> None:
    good = {"loss": 1e-3, "hidden": 5e-3, "weight": 5e-3}
    assert not routes.faults("x", good)
    # no gradient, nine tenths of it, a lost tile out of sixteen, and none that is a number
    for gap in (1.0, 0.1, (1 / 16) ** 0.5, float("nan")):
        for name in good:
            assert len(routes.faults("x", {**good, name: gap})) == 1
    exact = {"hidden": torch.randn(20_000, 3), "weight": torch.randn(5, 3)}
    way, got = routes.Way("recompute", "torch"), {"hidden": 0.9 * exact["hidden"], "weight": None}
    gaps = routes.differences(way, (1.0, got), (1.0, exact))
    assert gaps["hidden"] == pytest.approx(0.1, rel=1e-3) and gaps["weight"] == float("inf")


def test_targets_are_met_or_missed() -> None:
    assert Verdict("x", 1.1, at_most=1.1).met and not Verdict("x", 1.11, at_most=1.1).met
    assert Verdict("x", 8.0, at_least=8.0).met and not Verdict("x", 7.9, at_least=8.0).met
    assert not Verdict("x", float("nan"), at_most=1.0).met
    assert Verdict("x", None, at_most=1.0).met is None
    words = [Verdict("x", v, at_most=1.0).word for v in (None, 1.0, 2.0)]
    assert words == ["not measured", "met", "MISSED"]
    verdict = Verdict("x", 2.0, at_most=1.0)
    assert Verdict.of(json.loads(json.dumps(verdict.to_json()))) == verdict
