"""The table of planted faults is about the files as they are, and its runner tells what lives."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import run
from mutants.faults import FAULTS, Fault
from repository import ROOT

_TEXTS = {path: (ROOT / path).read_text(encoding="utf-8") for path in {f.file for f in FAULTS}}


def test_every_fault_has_its_place() -> None:
    assert len(FAULTS) >= 150
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        text = _TEXTS[fault.file]
        assert text.count(fault.old) == 1, fault.name
        assert fault.new != fault.old and fault.breaks, fault.name
        assert not (fault.equivalent and fault.unseen), fault.name
        if fault.file.endswith(".py"):
            compile(text.replace(fault.old, fault.new), fault.file, "exec")
        names = [word for word in run.words(fault.tests) if word.startswith("tests/")]
        assert names and all((ROOT / name).exists() for name in names), fault.tests


def planted(new: str, tests: str = "test_thing.py", **why: str) -> Fault:
    return Fault("thing.py", "a + b", new, "the sum", tests, **why)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> run.Runner:
    """Of a repository of one module and its tests."""
    monkeypatch.setattr(run, "ROOT", tmp_path / "own")
    monkeypatch.setattr(run, "files", lambda: [*map(Path, texts)])
    texts = {
        "thing.py": "def add(a, b):\n    return a + b\n",
        "tests/test_thing.py": "import thing\n\ndef test_two():\n    assert thing.add(2, 2) == 4\n",
        "tests/test_wrong.py": "def test_wrong():\n    assert False\n",
    }
    for name, text in texts.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    run._processes.set_forkserver_preload([])
    return run.Runner(tmp_path / "copies", workers=1)


def test_what_is_noticed_and_what_is_not(runner: run.Runner, monkeypatch) -> None:
    monkeypatch.setattr(run, "PATIENCE", 3.0)
    faults = [
        planted("a - b"),
        # of the same size, and right for the tests' numbers
        planted("a * b"),
        planted("add(a, b)[0]"),
        planted("[() for _ in iter(int, 1)]"),
        planted("a - b", "test_wrong.py"),
    ]
    found: dict[str, run.Result] = {}
    runner.every(faults, lambda result: found.update({result.name + result.test: result}))
    outcomes = [(result.outcome, result.test) for result in found.values()]
    assert outcomes == [
        ("killed", "tests/test_thing.py::test_two"),
        ("alive", ""),
        ("killed", "tests/test_thing.py::test_two"),
        ("time", ""),
        ("broken", "tests/test_wrong.py::test_wrong"),
    ]
    text = (run.ROOT.parent / "copies" / "0" / "thing.py").read_text()
    assert text == (run.ROOT / "thing.py").read_text(), "what was planted is gone"


def test_a_place_that_is_not_there_is_told(runner: run.Runner) -> None:
    fault = Fault("thing.py", "a / b", "a", "the sum", "test_thing.py")
    with pytest.raises(ValueError, match="expected one place, got 0"):
        runner.every([fault], lambda result: None)


@pytest.mark.parametrize(
    ("fault", "outcome", "well", "line"),
    [
        (planted("a - b"), "killed", True, None),
        (planted("a - b"), "alive", False, "not noticed: thing.py: a + b -> a - b: the sum [no"),
        (planted("a - b"), "broken", False, "not run: thing.py: a + b -> a - b"),
        (planted("b + a", equivalent="it commutes"), "alive", True, "changes nothing: thing.py"),
        (planted("b + a", equivalent="it commutes"), "killed", False, "noticed, though said to"),
        (planted("a - b", unseen="needs a GPU"), "alive", True, "the sum [needs a GPU]"),
    ],
)
def test_the_verdict(fault: Fault, outcome: str, well: bool, line: str | None) -> None:
    others = [planted(f"{i}") for i in range(30)]
    results = {each.name: run.Result(each.name, "killed", 1.0) for each in others}
    results[fault.name] = run.Result(fault.name, outcome, 1.0, "test_two")
    lines, found = run.verdict([fault, *others], results)
    assert found is well
    assert len(lines) == 1 + (line is not None) and (line is None or line in lines[0])


def test_too_many_that_live_are_told_whatever_the_reasons() -> None:
    faults = [planted(f"{i}", unseen="needs a GPU" if i < 2 else "") for i in range(20)]
    results = {
        fault.name: run.Result(fault.name, "alive" if fault.unseen else "killed", 1.0)
        for fault in faults
    }
    lines, well = run.verdict(faults, results)
    assert not well and lines[-1].startswith("18 of 20 faults noticed")
