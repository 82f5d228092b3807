"""benchmarks/compact.py and compact_errors.py: what they say of a tolerance of gradients is so."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import relative

import fusedpo
from fusedpo.benchmarks import compact, compact_errors, plots, precision, reports, states, sweep
from fusedpo.benchmarks.compact import BARE, EXACT, FULL, KEPT, PLACES, REAL, ROUNDED, WIDE, Way
from fusedpo.benchmarks.compact_errors import Call, Records, truth_of, upstream_of
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.peers import PEERS, step
from fusedpo.benchmarks.shapes import MIB, Case, Shape, make_inputs
from fusedpo.engine import tolerance
from fusedpo.engine.tolerance import record_of

CERTAIN = Case(
    "fusedpo", Shape(2, 128, 64, 2048), states="certain", tolerance=2e-3, budget=16 * MIB
)


# inputs


def test_inputs_are_the_first_rows_of_the_states() -> None:
    inputs, given = make_inputs(CERTAIN), states.certain()
    assert torch.equal(inputs.hidden.flatten(0, 1), given.hidden)
    assert torch.equal(inputs.labels.flatten(), given.labels)
    fewer = make_inputs(CERTAIN.at(replace(CERTAIN.shape, tokens=3)))
    assert torch.equal(fewer.hidden.flatten(0, 1), given.hidden[:12])
    assert torch.equal(fewer.weight, given.weight) and fewer.weight.requires_grad
    half = make_inputs(replace(CERTAIN, dtype="bfloat16"))
    assert torch.equal(half.weight, given.weight.bfloat16())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("certain", Shape(2, 129, 64, 2048)),
        ("certain", Shape(2, 8, 32, 2048)),
        ("without columns", Shape(2, 8, 64, 3072)),
    ],
    ids=["too many rows", "another size", "a bias"],
)
def test_what_states_are_not_is_refused(name: str, shape: Shape) -> None:
    with pytest.raises(ValueError, match=f"states {name}: expected a shape within"):
        make_inputs(replace(CERTAIN, states=name, shape=shape))


def test_a_cases_tolerance_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    original = fusedpo.preference_loss

    def spy(*args: Any, gradient_tolerance: float, **given: Any) -> Any:
        told.append(gradient_tolerance)
        return original(*args, gradient_tolerance=gradient_tolerance, **given)

    monkeypatch.setattr(fusedpo, "preference_loss", spy)
    for case in (CERTAIN, replace(CERTAIN, tolerance=0.0)):
        step(case, make_inputs(case))
    assert told == [2e-3, 0.0]
    assert sweep.workload(CERTAIN).gradient_tolerance == 2e-3


# errors


def test_errors_are_those_that_were_made() -> None:
    exact = {"hidden": torch.randn(200, 8), "weight": torch.randn(9, 8)}
    assert compact_errors.errors(exact, exact) == {"hidden": 0, "weight": 0, "rows": 0}
    found = compact_errors.errors({n: 0.9 * t for n, t in exact.items()}, exact)
    # rows that are smaller than most are held to the size of most
    for value in found.values():
        assert value == pytest.approx(0.1, rel=1e-5)
    lost = {**exact, "hidden": exact["hidden"].clone()}
    lost["hidden"][:10] = 0.0
    found = compact_errors.errors(lost, exact)
    assert found["rows"] > 0.9 and found["weight"] == 0
    assert found["hidden"] == pytest.approx(relative(lost["hidden"], exact["hidden"]), rel=1e-6)


@pytest.mark.parametrize("name", ["without columns", "unequal rows"])
def test_the_truth_is_the_definitions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = states.ADVERSARIAL[name]().first(100)
    upstream = upstream_of(given)
    leaves = {n: getattr(given, n) for n in ("hidden", "weight", "bias")}
    leaves = {n: t.double().requires_grad_() for n, t in leaves.items() if t is not None}
    logits = leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", 0.0)
    own = logits.log_softmax(-1)[torch.arange(100), given.labels]
    (own * upstream).sum().backward()
    # several blocks of rows
    monkeypatch.setattr(precision, "_TRUTH_ELEMENTS", 30 * given.vocab)
    found = truth_of(given, upstream)
    assert found.keys() == leaves.keys()
    for n, leaf in leaves.items():
        assert relative(found[n], leaf.grad) < 1e-12


def test_programs_in_turn_know_nothing_of_each_others_calls() -> None:
    tolerance.forget()
    one, other = Records(), Records()
    with one.own():
        record_of(2e-3, "cpu", 5, 7).share = 0.5
    assert one.of(2e-3, 5, 7).share == 0.5
    assert other.of(2e-3, 5, 7).share == tolerance.GUESSED_SHARE
    assert not tolerance._records


def small_errors(**changes: Any) -> dict[str, Any]:
    given = {"states": ("certain", "unequal rows"), "tolerances": (2e-2, 2e-3), "studied": ()}
    given["drawn"] = 0
    question = replace(compact_errors.QUESTION, **{**given, **changes})
    return question.ask(Options(threads=1))


@pytest.fixture(scope="module")
def errors_found() -> dict[str, Any]:
    return small_errors()


def test_errors_of_states_are_within_their_tolerance(errors_found: dict[str, Any]) -> None:
    answer = errors_found
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    of = {(row["entry"], row["tolerance"]): row for row in answer["rows"]}
    assert set(of) == {(n, t) for n in ("certain", "unequal rows") for t in (0.0, 2e-2, 2e-3)}
    loose, tight = of["unequal rows", 2e-2], of["unequal rows", 2e-3]
    # they are used, and what is estimated is what they are
    assert 2e-3 < loose["errors"]["hidden"] < 2e-2 and loose["kept"] < tight["kept"]
    assert loose["estimates"]["hidden"] == pytest.approx(loose["errors"]["hidden"], rel=0.3)
    columns, lines = compact_errors.table(answer)
    assert len(lines) == 6 and {len(line) for line in lines} == {len(columns)}
    assert compact_errors.remarks(answer)[0].startswith("Every gradient is within")
    assert compact_errors.plot(answer) is not None


@pytest.mark.parametrize("name", ["hidden", "weight", "rows"])
def test_an_error_beyond_is_said(errors_found: dict[str, Any], name: str) -> None:
    answer = json.loads(json.dumps(errors_found))
    answer["rows"][-1]["errors"][name] = 0.1
    (said,) = compact_errors.beyond(answer)
    assert "unequal rows, 0.002" in said and compact_errors.remarks(answer)[0].startswith("Not")


def test_slabs_and_directions_are_of_one_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_errors, "SLABS", (32, 128))
    monkeypatch.setattr(compact_errors, "DIRECTIONS", (0, 16, 64))
    answer = small_errors(states=("unequal rows",), studied=("unequal rows",), tolerances=())
    narrow, wide, alike, given, *others, own, alone = answer["rows"][1:]
    assert alike["kept"] < given["kept"]
    assert (narrow["slab"], wide["slab"]) == (32, 128) and narrow["kept"] < wide["kept"]
    assert compact_errors.growth(answer, "unequal rows") > 0
    # the same columns are kept: what is left out is less with more directions, and nothing with all
    assert len({row["kept"] for row in others}) == 1
    off = [row["errors"]["hidden"] for row in others]
    assert off[0] > off[1] > 100 * off[2]
    assert any("16 take" in line for line in compact_errors.remarks(answer))
    # with nothing in the place of what is left out, there is far more of it
    assert own["kept"] == alone["kept"] == others[0]["kept"]
    assert alone["errors"]["weight"] > 1.5 * own["errors"]["weight"]
    assert any("columns alone are off by" in line for line in compact_errors.remarks(answer))


def test_random_problems_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_errors, "DRAWN_TOLERANCES", (1e-2, 1e-3))
    answer = small_errors(states=(), drawn=4)
    loose, tight = answer["rows"]
    assert loose["calls"] == tight["calls"] == 8 and loose["missed"] == tight["missed"] == 0
    assert 0.01 < loose["worst"] < 1
    assert compact_errors.table(answer)[1] == []
    said = compact_errors.remarks(answer)
    assert sum("8 gradients of random problems" in line for line in said) == 2
    # an estimate that says nothing is found out
    monkeypatch.setattr(tolerance.Record, "note", lambda *args: True)
    monkeypatch.setattr(tolerance.Record, "allowed", lambda *args: 1e6)
    loose, tight = small_errors(states=(), drawn=4)["rows"]
    assert loose["missed"] and loose["worst"] > 1


def test_a_first_call_aims_by_guesses_and_the_last_by_what_was_seen() -> None:
    given = states.unequal_rows()
    call = Call(given, upstream_of(given), 1e-2)
    guessed = call.record.coherence.copy()
    call.settled(2)
    assert call.record.coherence != guessed


# time and memory


@pytest.fixture
def on_two_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    tolerance.forget()
    arguments = ["--only", "times", "--quick", "--seconds", "0.01", "--threads", "1", "--json"]
    peers = ["--peers", "full_logits", "fusedpo", "--shapes", "64,16,300"]
    assert compact.main([*arguments, *peers, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "larger error" in shown.err
    answer = json.loads(shown.out)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["compact"] == answer
    assert plots.read_fingerprint(tmp_path / "compact.png") == plots.fingerprint(answer)
    return answer


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_every_way_has_its_numbers(on_two_peers: dict[str, Any]) -> None:
    rows = {row["entry"]: row for row in on_two_peers["rows"]}
    programs = [row for name, row in rows.items() if name not in (BARE, ROUNDED)]
    assert len(rows) == 14 and len(programs) == 12
    for row in programs:
        assert row["missing"] is None and len(row["seconds"]) >= 2
        assert row["extra_bytes"] >= 0 and row["products"] >= 2
        assert ("weight" in row["errors"]) != row["case"]["frozen"]
        half = row["case"]["dtype"] == "bfloat16"
        assert (1e-3 if half else 0) < row["errors"]["hidden"] < (1e-2 if half else 1e-5)
    for row in rows.values():
        # of random weights every column is kept: the planner leaves the route
        assert bool(row["noted"]) == (row["case"]["tolerance"] > 0)
        assert not row["noted"] or row["planned"]["route"] != "compact"
        trained = row["case"]["tolerance"] and not row["case"]["frozen"]
        assert row["same_logprobs"] is (True if trained else None)
    assert rows[BARE]["median_seconds"] > 0 and rows[ROUNDED]["errors"]["weight"] > 1e-3
    assert not tolerance._records, "its calls are nobody else's"
    columns, lines = compact.table(on_two_peers)
    assert len(lines) == 14 and {len(line) for line in lines} == {len(columns)}


def test_other_bits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    place = replace(PLACES[0], states=None, shape=Shape(2, 8, 16, 300), ways=(EXACT[1], KEPT))
    original = fusedpo.preference_loss

    def off(*args: Any, gradient_tolerance: float, **given: Any) -> Any:
        out = original(*args, gradient_tolerance=gradient_tolerance, **given)
        nudged = out.logprobs.nextafter(torch.zeros(())) if gradient_tolerance else out.logprobs
        return replace(out, logprobs=nudged)

    for spoil, same in ((False, True), (True, False)):
        with monkeypatch.context() as changed:
            if spoil:
                changed.setattr(fusedpo, "preference_loss", off)
            rows = compact._rows(place, Options())
            compact._measure(rows, lambda what: None)
        assert [row.missing for row in rows] == [None, None]
        assert [row.same for row in rows] == [None, same]


def test_without_states_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str, rows: int = 0) -> Any:
        raise ImportError("SmolLM2's states need gguf")

    monkeypatch.setattr(states, "made", missing)
    options = Options(threads=1, peers=("full_logits", "fusedpo"), output=tmp_path)
    answer = compact.QUESTION.ask(options)
    assert all("need gguf" in row["missing"] for row in answer["rows"])
    assert {target["met"] for target in answer["targets"]} == {None}
    assert compact.plot(answer) is None
    # in words too
    assert len(reports.remarks(answer)) == len({row["entry"] for row in answer["rows"]})


def test_places_are_written_one_by_one_and_asked_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def at(self: Any, place: Any, rows: list[Any], *rest: Any) -> None:
        for row in rows:
            row.missing = f"in run {run}"

    def written() -> dict[str, set[str]]:
        (path,) = tmp_path.iterdir()
        rows = json.loads(path.read_text())["compact"]["rows"]
        return {
            place: {r["missing"] for r in rows if r["group"] == place}
            for place in dict.fromkeys(row["group"] for row in rows)
        }

    monkeypatch.setattr(compact.Compact, "_at", at)
    options, run = Options(threads=1, output=tmp_path), 1
    compact.QUESTION.ask(options)
    titles = ["SmolLM2", "V 262,144", "random weights", "toy"]
    assert written() == {title: {"in run 1"} for title in titles}
    run = 2
    answer = replace(compact.QUESTION, places=("V 262,144",)).ask(options)
    assert written()["V 262,144"] == {"in run 2"} and written()["toy"] == {"in run 1"}
    assert list(written()) == titles
    assert {row["group"] for row in answer["rows"]} == set(written())


# the targets


def answer_of(*changes: tuple[Way, dict[str, Any]]) -> dict[str, Any]:
    """Of both sizes of SmolLM2's states and of the large vocabulary, with all targets met."""
    changed = dict(changes)
    rows = []
    for place in PLACES[:3]:
        for way in place.ways:
            kept = bool(way.tolerance)
            row = {
                "group": place.title,
                "x": place.shape.positions,
                "entry": way.label,
                "case": place.case(way).to_json(),
                "median_seconds": 0.35 if kept and way.frozen else 0.4 if kept else 1.0,
                "extra_bytes": 10 * MIB if kept else 20 * MIB,
                "errors": {"hidden": 1e-3, "weight": 1e-3} if kept else {},
                "same_logprobs": True if kept else None,
                "noted": {},
                "missing": None,
            }
            if way == EXACT[1]:
                row["median_seconds"] = 0.8
            if way == compact.YARDSTICKS[0]:
                row["errors"] = {"hidden": 5e-3, "weight": 5e-3}
            rows.append({**row, **changed.get(way, {})})
    return {"rows": rows}


def missed(answer: dict[str, Any]) -> list[str]:
    return [verdict.what for verdict in compact.verdicts(answer) if verdict.met is False]


def test_targets_are_met_or_missed() -> None:
    assert missed(answer_of()) == []
    met = [v for v in compact.verdicts(answer_of()) if v.met]
    assert len(met) == len(compact.verdicts(answer_of())) > 20
    for change, words in {
        (KEPT, ("median_seconds", 0.65)): ["x, 256 MiB", "best exact", f"{WIDE}, N 1024: x"],
        (KEPT, ("extra_bytes", 21 * MIB)): ["memory over"],
        (KEPT, ("same_logprobs", False)): ["exact bits"],
        (KEPT, ("errors", (("hidden", 3e-3), ("weight", 1e-3)))): ["error of dhidden"],
        (EXACT[1], ("median_seconds", 0.9)): ["x, exact, 256 MiB"],
        (EXACT[0], ("median_seconds", 1.2)): ["x, exact, 16 MiB"],
        (Way("liger"), ("median_seconds", 0.3)): ["fastest other program"],
        (Way(BARE), ("median_seconds", 0.3)): [f"over {BARE}"],
    }.items():
        way, (key, value) = change
        value = dict(value) if key == "errors" else value
        found = missed(answer_of((way, {key: value})))
        for word in words:
            assert any(word in what for what in found), (change, found)


def test_what_is_missing_meets_nothing() -> None:
    answer = answer_of((KEPT, {"missing": "out of memory"}))
    about = [v for v in compact.verdicts(answer) if v.what == f"{REAL}, N 1024: x, 256 MiB"]
    assert [v.met for v in about] == [None]


def test_the_picture_has_every_program_of_its_panels() -> None:
    answer = answer_of()
    for row in answer["rows"]:
        row["errors"] = row["errors"] or {"hidden": 1e-6, "weight": 2e-6}
    answer["title"] = compact.TITLE
    figure = compact.plot(answer)
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == [
        f"{REAL}, N 1024",
        f"{REAL}, N 4096",
        f"{WIDE}, N 1024",
    ]
    texts = {text.get_text().partition(" (")[0] for text in panels[0].texts}
    labels = {way.label for way in compact.ALL if not way.frozen and way.peer in PEERS}
    assert labels | {BARE, "rounding to bf16"} <= texts
    assert {FULL.label, KEPT.label} <= labels
