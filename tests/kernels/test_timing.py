"""Rounds, deadlines, and functions that fail, on the CPU."""

from __future__ import annotations

from fusedpo.benchmarks.timing import Clock, Deadline, Measured


def test_every_function_runs_once_a_round_in_changing_order() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = Clock("cpu").interleaved(functions, 4, Deadline(60.0), warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 5 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({r[0] for r in rounds[1:]}) > 1
    assert all(len(m.seconds) == len(m.host) == 4 and m.median > 0 for m in found.values())


def test_one_round_is_measured_when_time_is_up() -> None:
    deadline = Deadline(-1.0)
    assert deadline.over and deadline.left < 0
    found = Clock("cpu").interleaved({"a": lambda: None}, 100, deadline)
    assert len(found["a"].seconds) == 1


def test_a_function_that_fails_says_why_and_stops_no_other() -> None:
    runs = []

    def broken() -> None:
        runs.append(1)
        raise ValueError("no such\ntile")

    found = Clock("cpu").interleaved({"a": broken, "b": lambda: None}, 3, Deadline(60.0))
    assert found["a"].missing == "ValueError: no such" and found["a"].median is None
    assert len(runs) == 1
    assert len(found["b"].seconds) == 3 and found["b"].missing is None


def test_repeated_calls_are_counted() -> None:
    calls: list[int] = []
    Clock("cpu").repeated(calls.append, 3)()
    assert calls == [0, 1, 2]


def test_the_median_and_quartiles() -> None:
    assert Measured([5.0, 1.0, 2.0, 3.0, 100.0]).median == 3.0
    assert Measured([5.0, 1.0, 2.0, 3.0, 100.0]).quartiles == (2.0, 5.0)
    assert Measured([4.0]).quartiles == (4.0, 4.0)
    assert Measured().median is None and Measured().quartiles is None
