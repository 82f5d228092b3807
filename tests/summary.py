"""What a run has shown, in a few lines at its end: properties, faults, wrong programs, skips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from promises import FAULTS, PROPERTIES

KINDS = {"holds": PROPERTIES, "fault": FAULTS}


def note(items: list[pytest.Item]) -> None:
    """Leave on every test what it holds, for its report to carry to the process that sums up."""
    for item in items:
        for kind, known in KINDS.items():
            for mark in item.iter_markers(kind):
                if not set(mark.args) <= set(known):
                    raise pytest.UsageError(f"{item.nodeid}: {kind}{mark.args} is not known")
                item.user_properties += [(kind, number) for number in mark.args]
        if item.get_closest_marker("mutant"):
            item.user_properties.append(("mutant", _wrong(item)))


def _wrong(item: pytest.Item) -> str:
    """The name of the wrong program that a case is about."""
    given: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    return str(given.get("name", ""))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that holds a promise may not be left out."""
    report = yield
    held = any(item.get_closest_marker(kind) for kind in KINDS)
    if report.skipped and held and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} holds a promise, and was left out: {reason}"
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tests: dict[str, Counter[Any]] = {kind: Counter() for kind in (*KINDS, "mutant")}
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call":
            for kind, value in report.user_properties:
                if kind in tests:
                    tests[kind][value] += 1
    if not any(tests.values()):
        return
    terminalreporter.section("what was shown")
    for kind, known in KINDS.items():
        word = {"holds": "properties", "fault": "faults"}[kind]
        cases, missing = sum(tests[kind].values()), sorted(set(known) - set(tests[kind]))
        line = f"{len(tests[kind])} of {len(known)} {word} in {cases} cases"
        # of a part of the tests nobody wants to know what is not in it
        few = f"; not in this run: {missing}" if 0 < len(missing) <= 10 else ""
        terminalreporter.line(line + few)
    names = len(tests["mutant"])
    terminalreporter.line(
        f"{names} wrong programs rejected in {sum(tests['mutant'].values())} cases"
    )
    skipped = Counter(
        r.longrepr[2] if isinstance(r.longrepr, tuple) else str(r.longrepr)
        for r in terminalreporter.stats.get("skipped", [])
    )
    terminalreporter.line(f"{sum(skipped.values())} left out, for the reasons above")
