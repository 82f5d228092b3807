"""Public signatures change by additions only: keyword-only parameters with a default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from signatures import Parameters, signatures

RECORD: dict[str, Parameters] = json.loads(
    Path(__file__).with_name("signatures.json").read_text(encoding="utf-8")
)
TODAY = signatures()


def difference(record: Parameters, today: Parameters) -> str | None:
    """The first parameter that breaks a call which the record allows."""
    names = {name for name, _, _ in record}
    for name, kind, default in today:
        if name not in names and (kind != "KEYWORD_ONLY" or not default):
            return f"{name}: new, and not keyword-only with a default"
    # the order of those that are passed by name only is of no matter
    kept = [parameter for parameter in today if parameter[0] in names]
    record, kept = (
        [p for p in each if p[1] != "KEYWORD_ONLY"]
        + sorted(p for p in each if p[1] == "KEYWORD_ONLY")
        for each in (record, kept)
    )
    for before, now in zip(record, [*kept, *[None] * len(record)], strict=False):
        if before != now:
            return f"{before} has become {now}"
    return None


@pytest.mark.parametrize("name", RECORD)
def test_a_public_signature_changes_by_additions_only(name: str) -> None:
    assert name in TODAY, "gone"
    assert difference(RECORD[name], TODAY[name]) is None


OPTION = ["b", "KEYWORD_ONLY", "1"]
BEFORE = [["a", "POSITIONAL_OR_KEYWORD", ""], OPTION]


@pytest.mark.parametrize(
    "today",
    [
        [OPTION],
        BEFORE[:1],
        [BEFORE[0], ["b", "KEYWORD_ONLY", "2"]],
        [BEFORE[0], ["b", "KEYWORD_ONLY", ""]],
        [BEFORE[0], ["b", "POSITIONAL_OR_KEYWORD", "1"]],
        [["c", "POSITIONAL_OR_KEYWORD", ""], *BEFORE],
        [*BEFORE, ["c", "KEYWORD_ONLY", ""]],
        [["x", "POSITIONAL_OR_KEYWORD", ""], OPTION],
    ],
    ids=str,
)
def test_a_change_is_found(today: Parameters) -> None:
    assert difference(BEFORE, today)


def test_the_order_of_keywords_is_of_no_matter() -> None:
    other = ["c", "KEYWORD_ONLY", "2"]
    assert difference([*BEFORE, other], [BEFORE[0], other, OPTION]) is None


def test_an_addition_is_none() -> None:
    assert difference(BEFORE, [*BEFORE, ["c", "KEYWORD_ONLY", "None"]]) is None
