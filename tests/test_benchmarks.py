"""The comparison is fair: every program computes the same loss, and the ruler is straight."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu, measure, memory, speed
from benchmarks.peers import PEERS, full_logits, step
from benchmarks.shapes import MIB, TINY, Case, Inputs, Shape, make_inputs

TOLERANCE = 1e-5


def oracle(case: Case) -> dict[str, Tensor | None]:
    """Loss and gradients in float64, by the definition."""
    inputs = make_inputs(case)
    exact = Inputs(inputs.hidden.double(), inputs.weight.double(), inputs.labels).for_case(case)
    loss = full_logits(exact)
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
        elif (value.double() - exact).norm() > TOLERANCE * exact.norm():
            return False
    return True


@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["all scored", "masked"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_computes_the_same(peer: str, frozen: bool, masked: float) -> None:
    missing = PEERS[peer].missing()
    if missing:
        pytest.skip(missing)
    case = Case(peer, TINY, frozen=frozen, masked=masked)
    want = oracle(case)
    assert (want["weight"] is None) == frozen
    assert agree(result(case), want)


def test_a_wrong_peer_is_found_out() -> None:
    case = Case("full_logits", TINY)
    want = oracle(case)
    assert agree(want, want)
    assert not agree({**want, "loss": want["loss"] * 1.001}, want)
    for name in ("hidden", "weight"):
        missing_chunk = want[name].clone()
        missing_chunk[:1] = 0
        for wrong in (None, torch.zeros_like(want[name]), 0.9 * want[name], missing_chunk):
            assert not agree({**want, name: wrong}, want)


def test_masked_positions_are_the_start_of_every_sequence() -> None:
    case = Case("full_logits", TINY, masked=0.4)
    labels = make_inputs(case).labels
    assert (labels[:, :2] == -100).all()
    assert (labels[:, 2:] >= 0).all()
    assert case.scored == (labels != -100).sum()


def test_interleaving_runs_everything_once_a_round_in_changing_order() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = measure.interleaved(functions, repeats=4, warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(rounds) == 5
    assert len({r[0] for r in rounds[1:]}) > 1
    assert all(len(t.seconds) == 4 for t in timings.values())


def test_timing_takes_the_median() -> None:
    timing = measure.Timing((5.0, 1.0, 2.0, 3.0, 100.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 5.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("resettable", [True, False])
def test_peak_sees_what_was_held_and_freed(
    resettable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resettable:

        def refuse(self: Path, text: str) -> int:
            raise PermissionError(self)

        monkeypatch.setattr(Path, "write_text", refuse)
    torch.ones(128 * MIB, dtype=torch.uint8)  # an earlier, higher mark must not hide the next one

    def function() -> None:
        a = torch.ones(40 * MIB, dtype=torch.uint8)
        del a
        torch.ones(64 * MIB, dtype=torch.uint8)

    assert measure.peak_bytes(function) == pytest.approx(64 * MIB, abs=4 * MIB)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_fresh_process_measures_the_logits() -> None:
    case = Case("full_logits", Shape(pairs=1, tokens=256, hidden=16, vocab=32_768))
    peak = memory.fresh_peak(case)
    inputs = make_inputs(case)
    assert peak.gradients == inputs.hidden.nbytes + inputs.weight.nbytes
    # log-probabilities, their gradient and that of the logits live at a time
    assert peak.total == pytest.approx(3 * case.logits_bytes, abs=16 * MIB)


def test_a_failing_worker_says_why() -> None:
    with pytest.raises(RuntimeError, match="no_such_peer"):
        memory.fresh_peak(Case("no_such_peer", TINY))


def test_a_peer_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("liger", TINY)
    absent = replace(PEERS["liger"], needs="no_such_package.loss")
    monkeypatch.setitem(PEERS, "liger", absent)
    assert "no_such_package" in speed.why_not(case)

    def broken(inputs: Inputs, memory_budget: int | None = None) -> Tensor:
        raise ValueError("not on this device")

    monkeypatch.setitem(PEERS, "liger", replace(PEERS["full_logits"], loss=broken))
    assert "not on this device" in speed.why_not(case)


def test_speed_reports_every_scenario_and_saves_beside_other_answers(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    measure.save("memory", {"machine": {}, "rows": []}, path)
    arguments = ["--quick", "--shape", "40,16,300", "--repeats", "1", "--peers", "full_logits"]
    threads = torch.get_num_threads()
    assert speed.main([*arguments, "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    answers = json.loads(path.read_text())
    assert answers["memory"]["rows"] == []
    rows = answers["speed"]["rows"]
    assert [row["scenario"] for row in rows] == list(speed.SCENARIOS)
    assert all(row["median_seconds"] > 0 and row["ratio_to_full_logits"] == 1 for row in rows)
    assert {"cpu", "threads", "versions", "commit", "dirty"} <= answers["speed"]["machine"].keys()


def test_bounds_are_checked() -> None:
    rows = [
        speed.Row("trainable", Case("full_logits", TINY), measure.Timing((1.0,))),
        speed.Row("trainable", Case("fusedpo", TINY), measure.Timing((1.1,))),
        speed.Row("half masked", Case("fusedpo", TINY), measure.Timing((0.5,))),
    ]
    held = {verdict["what"]: verdict["held"] for verdict in speed.check(rows)}
    assert held["fusedpo trainable / full logits trainable"] is False
    assert held["fusedpo half masked / fusedpo trainable"] is True
    assert held["fusedpo trainable / Liger-Kernel trainable"] is None


def test_budget_verdicts() -> None:
    case = Case("fusedpo", TINY, budget=64 * MIB)
    assert memory.Row(case, "frozen", 60 * MIB, 67 * MIB).foretold
    assert not memory.Row(case, "frozen", 60 * MIB, 69 * MIB).foretold
    assert memory.Row(case, "frozen", 60 * MIB, 94 * MIB).kept
    assert not memory.Row(case, "frozen", 60 * MIB, 95 * MIB).kept


def test_shapes_are_read_from_text() -> None:
    assert Shape.parse("1024,512,50257") == Shape(2, 256, 512, 50_257)
    with pytest.raises(ValueError, match="multiple of 4"):
        Shape.parse("1023,512,50257")


# the evidence for a machine with a GPU, tried without one

ROOT = Path(__file__).resolve().parent.parent
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or not sys.platform.startswith("linux"),
    reason="the dry run is for machines with Triton and without a GPU",
)


def run_script(out: Path, python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**environment, "OUT": str(out), "PYTHON": python},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``benchmarks/gpu.sh --dry-run`` leaves its results in."""
    results = {path: path.read_bytes() for path in measure.RESULTS.iterdir()}
    out = tmp_path_factory.mktemp("gpu")
    done = run_script(out, sys.executable, "--dry-run")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (out / "stdout").write_text(done.stdout, encoding="utf-8")
    assert results == {path: path.read_bytes() for path in measure.RESULTS.iterdir()}
    return out


in_one_process = pytest.mark.xdist_group("dry run of gpu.sh")


@pytest.mark.slow
@without_gpu
@in_one_process
def test_the_dry_run_names_every_part(dry_run: Path) -> None:
    last = (dry_run / "stdout").read_text(encoding="utf-8").splitlines()[-5:]
    parts = ["tests", "kernels", "bench", "tune", "memory"]
    assert [line.split(": passed")[0] for line in last] == parts
    log = (dry_run / "tests.log").read_text(encoding="utf-8")
    assert " passed" in log and "is about CUDA devices alone" in log


@pytest.mark.slow
@without_gpu
@in_one_process
def test_the_dry_run_goes_through_every_section(dry_run: Path) -> None:
    answers = json.loads((dry_run / "gpu.json").read_text(encoding="utf-8"))
    answer = answers["gpu"]
    assert answer["dry_run"] is True
    assert {"commit", "versions", "date", "python"} <= answer["machine"].keys()
    for name in gpu.SECONDS:
        assert answer[name]["rows"] and not answer[name]["wrong"], name
        assert not answer[name]["ran_out"], name
    routes = {row["name"]: row for row in answer["routes"]["rows"]}
    for route in ("forward", "frozen", "retain", "one_pass", "recompute"):
        for backend in ("triton", "torch"):
            row = routes[f"{route}, {backend}"]
            assert row["ratio"] == pytest.approx(row["seconds"] / row["product_seconds"])
            assert max(row["differences"].values()) < 0.05
    products = [routes[name]["seconds"] for name in ("hidden W^T", "J W", "J^T hidden")]
    for route, counts in (("recompute", (2, 1, 1)), ("retain", (1, 1, 1)), ("frozen", (1, 1, 0))):
        expected = sum(n * s for n, s in zip(counts, products, strict=True))
        assert routes[f"{route}, triton"]["product_seconds"] == pytest.approx(expected)
    assert [v["at_most"] for v in answer["routes"]["verdicts"]] == [1.10, 1.12, 1.12, 1.20, 1.12]
    assert {row["loss"] for row in answer["tail"]["rows"]} == {"DPO", "SimPO", "soft gate"}
    assert answers["memory"]["rows"]


@pytest.mark.slow
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


def test_a_part_that_fails_is_named_and_stops_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *tests/gpu*) exit 3 ;; esac\necho "ran $*"\n')
    python.chmod(0o755)
    done = run_script(tmp_path / "out", str(python), "--dry-run")
    assert done.returncode == 1
    last = done.stdout.splitlines()[-5:]
    assert last[0].startswith("tests: FAILED with status 3")
    assert all(": passed in " in line for line in last[1:])
    assert "ran -m benchmarks.gpu" in (tmp_path / "out" / "bench.log").read_text()


def test_the_whole_takes_less_than_ten_minutes() -> None:
    """Each part has a limit, and none may begin or go on beyond the limit of all."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
    limits = [line for line in text.splitlines() if line.startswith("limit=")]
    assert int(limits[0].split("=")[1].split()[0]) <= 580
    assert "--seconds 290" in text and sum(gpu.SECONDS.values()) < 7 * 60
    assert run_script(ROOT, "python", "--unknown").returncode == 2


def test_a_dry_run_is_none_of_the_results() -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--dry-run", "--json", str(measure.RESULTS / "machine.json")])
    assert stopped.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--device", "cpu"], ["--only", "tail,nothing"]):
        with pytest.raises(SystemExit) as stopped:
            gpu.main(arguments)
        assert stopped.value.code == 2
    assert "'nothing'" in capsys.readouterr().err


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
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A setting on the CPU that takes itself for a GPU, to run what is done on one alone."""
    from benchmarks import kernels
    from fusedpo.kernels import timing

    setting = gpu.setting_of("cpu", quick=False, dry=True)
    setting.clock.cuda = True
    setting = replace(setting, calls=3, rounds=2)
    allocated = iter(range(10**6))
    fakes = {
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Event": PretendedEvent,
        "Stream": lambda: contextlib.nullcontext(),
        "CUDAGraph": PretendedGraph,
        "stream": lambda s: s,
        "graph": lambda g: contextlib.nullcontext(),
        "device": lambda d: contextlib.nullcontext(),
        "memory_allocated": lambda device: next(allocated),
        "max_memory_allocated": lambda device: next(allocated),
        "reset_peak_memory_stats": lambda device: None,
        "set_sync_debug_mode": lambda mode: warnings.warn(
            f"called a synchronizing operation? {mode}", stacklevel=1
        ),
    }

    class Current:
        def wait_stream(self, other: object) -> None:
            pass

    fakes["Stream"] = type("Stream", (contextlib.nullcontext, Current), {})
    fakes["current_stream"] = Current
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "_CUSHION_SIDE", 8)
    monkeypatch.setattr(kernels, "_COPY_BYTES", 4096)
    monkeypatch.setattr(kernels, "_ROTATED_BYTES", 40_000)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="called a synchronizing")
        yield setting


@without_gpu
def test_what_is_done_on_a_gpu_alone_runs(pretended, capsys: pytest.CaptureFixture[str]) -> None:
    answer: dict = {}
    saved = []
    gpu.run(list(gpu.SECONDS), pretended, answer, 60.0, lambda: saved.append(len(answer)))
    assert saved == [1, 2, 3, 4, 5]
    assert gpu.failures(answer, list(gpu.SECONDS)) == [], capsys.readouterr()
    routes = {row["name"]: row for row in answer["routes"]["rows"]}
    # two milliseconds for anything: a route takes one over the number of its products
    for route, products in (("forward", 1), ("frozen", 2), ("retain", 3), ("recompute", 4)):
        row = routes[f"{route}, triton"]
        assert row["seconds"] == 2e-3 and row["ratio"] == pytest.approx(1 / products)
    assert PretendedGraph.replayed > 0
    fold = next(r for r in answer["kernels"]["rows"] if r["name"] == "fold, exponentials")
    assert fold["seconds"] == pytest.approx(2e-3 / 3)
    assert fold["share_of_floor"] == pytest.approx(fold["floor_seconds"] / fold["seconds"])
    for row in answer["memory"]["rows"]:
        assert row["kept"] is True
        # the mode is set, which this one warns of, and set back
        assert len(row["waits"]) == 2, row
    assert all(v["met"] in (True, False) for v in answer["memory"]["verdicts"])
    assert gpu.missed(answer, ["memory"]) and not gpu.missed(answer, ["routes"])


@without_gpu
def test_no_time_is_said_and_not_an_error() -> None:
    answer: dict = {}
    gpu.run(["shapes", "memory"], gpu.setting_of("cpu", quick=False, dry=True), answer, -9.0, list)
    assert gpu.failures(answer, ["shapes", "memory"]) == []
    assert answer["shapes"]["took_seconds"] < 30


@without_gpu
def test_a_section_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: object, deadline: object) -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(gpu, "sections", lambda: {"routes": broken, "tail": broken})
    answer: dict = {}
    setting = gpu.setting_of("cpu", quick=False, dry=True)
    gpu.run(["routes", "tail"], setting, answer, 60.0, list)
    assert gpu.failures(answer, ["routes", "tail"]) == ["routes", "tail"]
    assert answer["tail"]["failed"] == "RuntimeError: an illegal address"


def test_a_route_that_computes_something_else_is_found_out() -> None:
    from benchmarks import routes

    good = {"loss": 1e-3, "hidden": 5e-3, "weight": 5e-3}
    assert not routes.faults("x", good)
    # no gradient, nine tenths of it, a lost tile out of sixteen, and none that is a number
    for gap in (1.0, 0.1, (1 / 16) ** 0.5, float("nan")):
        for name in good:
            assert len(routes.faults("x", {**good, name: gap})) == 1
    truth = torch.randn(20_000, 3)
    assert routes._relative(truth * 0.9, truth) == pytest.approx(0.1, rel=1e-3)
    assert routes._relative(None, truth) == float("inf")


def test_targets_are_met_or_missed() -> None:
    from benchmarks.section import Verdict

    assert Verdict("x", 1.1, at_most=1.1).met and not Verdict("x", 1.11, at_most=1.1).met
    assert Verdict("x", 8.0, at_least=8.0).met and not Verdict("x", 7.9, at_least=8.0).met
    assert not Verdict("x", float("nan"), at_most=1.0).met
    assert Verdict("x", None, at_most=1.0).met is None
    words = [Verdict("x", v, at_most=1.0).word(dry=d) for v in (None, 2.0) for d in (False, True)]
    assert words == ["not measured", "not measured", "MISSED", "dry run"]
