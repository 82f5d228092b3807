"""Gradients by kept columns, of slices of a vocabulary and of cut sequences, on two processes."""

from __future__ import annotations

import pytest
from distributed.processes import Processes

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.mark.parametrize("sizes", [(500, 400), (899, 1), (1, 899)], ids=str)
@pytest.mark.parametrize(
    "name", ["plain", "bias", "softcap", "frozen", "frozen states", "ignored", "half"]
)
def test_slices_of_a_vocabulary(two: Processes, name: str, sizes: tuple[int, int]) -> None:
    assert not two.faults("compact.by_columns", name, sizes)


@pytest.mark.parametrize("name", ["plain", "bias", "frozen", "frozen states", "half"])
def test_a_breach_is_corrected_on_both(two: Processes, name: str) -> None:
    assert not two.faults("compact.by_columns", name, (500, 400), wrong_record=True)


def test_both_take_the_same_route(two: Processes) -> None:
    assert not two.faults("compact.routes_agree")


def test_both_take_the_same_route_whatever_one_did_alone(two: Processes) -> None:
    assert not two.faults("compact.calls_of_one_rank_alone")


def test_parts_of_sequences(two: Processes) -> None:
    assert not two.faults("compact.parts_of_sequences")
