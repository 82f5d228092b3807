"""Every promise has tests, and docs/testing.md says which."""

from __future__ import annotations

import os
import subprocess
import sys

import promises
import pytest
from promises import ALSO, FAULTS, PROMISES, PROPERTIES
from repository import ROOT


def test_the_docs_have_the_table_of_promises() -> None:
    assert promises.page() == promises.PAGE.read_text(encoding="utf-8"), (
        "run python tests/promises.py"
    )


def test_every_property_and_every_fault_has_a_test() -> None:
    tests = promises.marked()
    held = {number for test in tests for number in test.properties}
    rows = {number for test in tests for number in test.faults}
    assert held == set(PROPERTIES) and rows == set(FAULTS)


def test_every_property_and_every_fault_belongs_to_a_promise() -> None:
    assert {n for promise in PROMISES for n in promise.properties} == set(PROPERTIES)
    # dtypes that work or are refused, which belongs to the first promise as it is
    apart = {15, 17}
    assert {n for promise in PROMISES for n in promise.faults} == set(FAULTS) - apart
    assert len(PROMISES) + len(ALSO) >= 20
    assert all((ROOT / path).is_file() for _, path in ALSO)


def test_a_marker_is_found_wherever_it_stands(tmp_path, monkeypatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        "import pytest\n"
        "pytestmark = [pytest.mark.slow, pytest.mark.holds(7)]\n"
        "@pytest.mark.parametrize('x', [1])\n"
        "@pytest.mark.fault(3, 4)\n"
        "def test_a(x): ...\n"
        "def test_b(): ...\n"
        "def helper(): ...\n"
    )
    monkeypatch.setattr(promises, "ROOT", tmp_path)
    monkeypatch.setattr(promises, "files", lambda: [promises.Path("tests/test_one.py")])
    found = {test.name: (test.properties, test.faults) for test in promises.marked()}
    assert found == {
        "test_a": (frozenset({7}), frozenset({3, 4})),
        "test_b": (frozenset({7}), frozenset()),
    }


@pytest.mark.parametrize("kind", ["holds", "fault"])
def test_a_marked_test_may_not_be_skipped(kind, pytester_run) -> None:
    """And a number that there is not is an error."""
    done = pytester_run(f"@pytest.mark.{kind}(1)\ndef test_a(): pytest.skip('no time')\n")
    assert "holds a promise, and was left out: " in done and "1 failed" in done
    done = pytester_run(f"@pytest.mark.{kind}(999)\ndef test_a(): pass\n")
    assert f"{kind}(999,) is not known" in done


def test_a_run_says_what_was_shown(pytester_run) -> None:
    done = pytester_run(
        "@pytest.mark.holds(1, 2)\n@pytest.mark.parametrize('x', [1, 2])\ndef test_a(x): pass\n"
        "@pytest.mark.mutant\n@pytest.mark.parametrize('name', ['zero'])\ndef test_b(name): pass\n"
        "@pytest.mark.fault(5)\ndef test_c(): assert False\n"
        "def test_d(): pytest.skip('no time')\n"
    )
    assert f"2 of {len(PROPERTIES)} properties in 4 cases" in done and "not in this run" not in done
    assert f"0 of {len(FAULTS)} faults in 0 cases" in done
    assert "1 wrong programs rejected in 1 cases" in done
    assert "1 left out, for the reasons above" in done


@pytest.fixture
def pytester_run(tmp_path):
    """The output of a run of this text, beside summary.py."""
    (tmp_path / "conftest.py").write_text(
        "from summary import note, pytest_runtest_makereport, pytest_terminal_summary\n"
        "def pytest_collection_modifyitems(items): note(items)\n"
    )

    def run(text: str) -> str:
        (tmp_path / "test_it.py").write_text("import pytest\n" + text)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
        paths = os.pathsep.join([str(ROOT / "tests"), *sys.path])
        done = subprocess.run(
            [*command, "-c", os.devnull, "--rootdir", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout + done.stderr

    return run
