"""The comparison is fair: every program computes the same loss, and the ruler is straight."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, memory, speed
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
