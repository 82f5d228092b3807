"""benchmarks/training.py: programs are what they are called, and what differs is marked."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("trl")

from fusedpo.benchmarks import plots, reports, sweep, training
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.shapes import MIB, Shape
from fusedpo.benchmarks.training import PROGRAMS, QUESTION, Case, Trained, longest
from fusedpo.benchmarks.worker import OutOfMemory, Peak

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = Case("full_logits", Shape(pairs=2, tokens=6, hidden=64, vocab=320), loss="dpo", prompt=4)
ON_TWO_LENGTHS = (Shape(2, 8, 64, 320), Shape(2, 16, 64, 320))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_from_end_to_end(tmp_path, capsys):
    arguments = ["--quick", "--json", "--seconds", "0.01", "--threads", "1"]
    shapes = ["--shapes", "32,64,320", "64,64,320", "--peers", "fusedpo"]
    assert reports.main(QUESTION, [*arguments, *shapes, "--output", str(tmp_path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["question"], answer["kind"], answer["memory"]) == ("training", "training", 2**30)
    rows = answer["rows"]
    assert [(r["x"], r["case"]["peer"]) for r in rows] == [
        (x, peer) for x in (8, 16) for peer in ("full_logits", "fusedpo")
    ]
    assert not any(r["missing"] for r in rows)
    for r in rows:
        assert len(r["seconds"]) == training.TIMED_STEPS and min(r["seconds"]) > 0
        assert r["tokens_per_second"] == pytest.approx(4 * (32 + r["x"]) / r["median_seconds"])
        # gradients and Adam's two averages at least
        assert r["extra_bytes"] > 3 * 4 * (2 * 320 * 64 + 14 * 64**2)
        assert abs(r["loss"] - 0.6931) > 1e-3, "the reference is another model"
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["training"] == answer
    assert plots.read_fingerprint(tmp_path / "training.png") == plots.fingerprint(answer)


@pytest.mark.parametrize("loss, peer", [(loss, p) for loss in PROGRAMS for p in PROGRAMS[loss]])
def test_programs_are_what_they_are_called(loss, peer, tmp_path):
    """They see the rows that were asked for, and logits of all positions or of none."""
    if reason := training.missing():
        pytest.skip(reason)
    case = replace(TINY, peer=peer, loss=loss)
    with training._quiet():
        trainer = training.build(case, 1, str(tmp_path), lambda: None)
        batch = next(iter(trainer.get_train_dataloader()))
        expected = training.build(replace(case, peer="full_logits"), 1, str(tmp_path), int)
        made: list[int] = []
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                model.lm_head.register_forward_hook(
                    lambda head, given, found: made.append(found.numel() // found.shape[-1])
                )
        trainer.train()
        expected.train()
    scored = 2 * case.shape.pairs * case.shape.tokens
    if loss == "dpo":
        assert batch["input_ids"].numel() == batch["attention_mask"].sum() == case.tokens
        assert batch["completion_mask"].sum() == scored
    else:
        labels = [batch[f"{side}_labels"] for side in ("chosen", "rejected")]
        assert sum(x.numel() for x in labels) == case.tokens
        assert sum((x != -100).sum() for x in labels) == scored
    full = peer == "full_logits"
    # fusedpo looks once, on a few rows, at what the model does after its head
    assert made.count(case.tokens) == (full * (2 if loss == "dpo" else 1)), made
    got, want = (t.state.log_history[0]["loss"] for t in (trainer, expected))
    assert got == pytest.approx(want, abs=case.loss_tolerance)


def asked(monkeypatch, peaks: dict[str, Any], losses: dict[str, float] | None = None):
    """An answer from made-up measurements: MiB by program, or what it raises."""

    def fresh_peak(case: Case, threads: int) -> Peak:
        found = peaks.get(case.peer, 10)
        if isinstance(found, Exception):
            raise found
        return Peak(found * MIB * case.shape.tokens, 0, loss=(losses or {}).get(case.peer, 0.5))

    def train(case: Case, steps: int) -> tuple[Trained, None]:
        return Trained((losses or {}).get(case.peer, 0.5), (0.1, 0.3)), None

    monkeypatch.setattr(sweep, "fresh_peak", fresh_peak)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "missing", lambda: None)
    return QUESTION.ask(Options(quick=True, shapes=ON_TWO_LENGTHS))


def test_another_loss_is_marked(monkeypatch, tmp_path):
    answer = asked(monkeypatch, {}, {"fusedpo": 0.5 + 9e-5, "trl": 0.5 + 1.1e-4})
    by_peer = {r["case"]["peer"]: r for r in answer["rows"]}
    wrong = by_peer.pop("trl")
    assert wrong["missing"] == "another loss: 0.500110, TRL, full logits: 0.500000"
    assert not wrong["seconds"] and wrong["extra_bytes"] is None and wrong["median_seconds"] is None
    assert all(r["missing"] is None and r["median_seconds"] == 0.2 for r in by_peer.values())
    assert wrong["entry"] not in {fit["entry"] for fit in answer["longest"]}
    columns, lines = training.table(answer)
    assert {len(line) for line in lines} == {len(columns)}
    assert "another loss" in next(line for line in lines if line[2] == wrong["entry"])[-1]
    assert plots.save(answer, tmp_path / "plot.png", training.plot).exists()


def test_a_loss_that_is_no_number_is_marked(monkeypatch):
    answer = asked(monkeypatch, {}, {"fusedpo": float("nan")})
    assert [r["case"]["peer"] for r in answer["rows"] if r["missing"]] == ["fusedpo"] * 2


def test_what_does_not_fit_or_fails_is_marked(monkeypatch):
    peaks = {"full_logits": OutOfMemory("x"), "trl": RuntimeError("ValueError: no")}
    answer = asked(monkeypatch, peaks)
    reasons = [r["missing"] for r in answer["rows"][:3]]
    assert reasons == ["out of memory", "ValueError: no", None]
    assert [fit["entry"] for fit in answer["longest"]] == ["fusedpo"]
    # 10 MiB a token
    assert {(fit["tokens"], fit["how"]) for fit in answer["longest"]} == {(64, "at least")}
    training.table(answer)
    training.plot(answer)


def test_without_trl(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    answer = QUESTION.ask(Options(quick=True, shapes=ON_TWO_LENGTHS))
    assert all(r["missing"].startswith("not installed") for r in answer["rows"])
    reports.report(answer, Options(output=tmp_path))
    assert "not installed" in capsys.readouterr().out.replace("\n", " ")


LINE = [(100, 20.0), (200, 30.0), (400, 50.0)]


@pytest.mark.parametrize(
    "peaks, memory, tokens, how",
    [
        (LINE, 25.0, 150, "interpolated"),
        (LINE, 30.0, 200, "interpolated"),
        (LINE, 30.06, 200, "interpolated"),
        (LINE, 40.0, 300, "interpolated"),
        (LINE, 70.0, 600, "extrapolated"),
        (LINE[::-1], 15.0, 50, "extrapolated"),
        (LINE, 5.0, 0, "extrapolated"),
        (LINE, 1000.0, 1600, "at least"),
        # between its nearest two, not on the line through all
        ([(100, 10.0), (200, 20.0), (300, 60.0)], 15.0, 150, "interpolated"),
        ([(100, 10.0), (200, 20.0), (300, 60.0)], 40.0, 250, "interpolated"),
        ([(100, 10.0), (200, 10.0)], 20.0, 800, "at least"),
    ],
)
def test_longest(peaks, memory, tokens, how):
    assert longest(peaks, memory) == (tokens, how)


def test_longest_of_too_little():
    assert longest(LINE[:1], 25.0) is None
    assert longest([(100, 10.0), (200, 10.0)], 5.0) is None
