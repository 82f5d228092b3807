"""What `make test` leaves out is what the table of tiers.py says, and the table is up to date."""

from __future__ import annotations

import ast
import types
from typing import Any

import pytest
import tiers
from promises import FAULTS, PROPERTIES, marked
from repository import ROOT, files
from tiers import TABLE, Slow


def named(row: Slow) -> list[str]:
    """Tests that a row names."""
    return [*row.first, *row.every, *(name.removesuffix("[triton]") for name in row.none)]


def whole(row: Slow) -> bool:
    return not (row.first or row.every or row.none or row.using)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.file)
def test_a_row_names_what_there_is(row: Slow) -> None:
    tree = ast.parse((ROOT / "tests" / row.file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {*named(row), *row.using} <= functions
    assert row.why and len(set(named(row))) == len(named(row))
    assert all(number > 1 for number in row.every.values())


def test_a_file_has_one_row() -> None:
    names = [row.file for row in TABLE]
    assert names == sorted(set(names))


def test_no_test_is_marked_elsewhere() -> None:
    for path in files():
        if path.parts[0] == "tests" and path.suffix == ".py":
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            found = {
                ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            }
            assert "pytest.mark.slow" not in found, path


def test_every_promise_is_held_without_what_is_slow() -> None:
    """By a part of its tests."""
    rows = {row.file: row for row in TABLE}
    properties, faults = set(), set()
    for test in marked():
        row = rows.get(test.path.relative_to("tests").as_posix())
        if row is None or not (whole(row) or row.using or test.name in row.none):
            properties |= test.properties
            faults |= test.faults
    assert properties == set(PROPERTIES) and faults == set(FAULTS)


def item(name: str, number: int, backend: str = "", *fixtures: str) -> Any:
    made = types.SimpleNamespace(
        location=(f"tests/test_{'all' if name == 'any' else 'some'}.py", 0, name),
        originalname=f"test_{name}",
        callspec=types.SimpleNamespace(params={"backend": backend, "number": number}),
        fixturenames=fixtures,
        marks=[],
    )
    made.add_marker = made.marks.append
    return made


@pytest.mark.parametrize(
    ("name", "backend", "fixtures", "stay"),
    [
        ("other", "", (), [0, 1, 2, 3, 4]),
        ("other", "torch", (), [0, 1, 2, 3, 4]),
        ("other", "triton", (), [0]),
        ("first", "", (), [0]),
        ("third", "torch", (), [0, 3]),
        ("third", "triton", (), [0]),
        ("none", "", (), []),
        ("compiled", "torch", (), [0, 1, 2, 3, 4]),
        ("compiled", "triton", (), []),
        ("other", "", ("tmp_path", "model"), []),
        ("any", "torch", (), []),
    ],
)
def test_which_cases_stay(monkeypatch, name, backend, fixtures, stay) -> None:
    some = Slow(
        "test_some.py",
        "so it is",
        first=("test_first",),
        every={"test_third": 3},
        none=("test_none", "test_compiled[triton]"),
        using=("model",),
    )
    monkeypatch.setattr(tiers, "TABLE", (Slow("test_all.py", "so it is"), some))
    items = [item(name, number, backend, *fixtures) for number in range(5)]
    # the cases of another backend are counted by themselves
    tiers.mark([item(name, 0, "torch" if backend == "triton" else "triton"), *items])
    assert [i for i, each in enumerate(items) if not each.marks] == stay
    assert all(set(each.marks) <= {"slow"} for each in items)
