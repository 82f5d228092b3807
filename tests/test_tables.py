"""Tables on a terminal and in a file, and the table of all losses."""

from __future__ import annotations

import io
import sys

import pytest

from fusedpo import catalogue, losses, tables

ROWS = [("a", "-1.5", "-"), ("bcd", "10", "2 x")]


def shown(columns: tuple[str, ...], **options) -> list[str]:
    said = io.StringIO()
    tables.show("title", columns, ROWS, said, **options)
    return [line.rstrip() for line in said.getvalue().splitlines()]


def test_numbers_stand_to_the_right_and_words_to_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert shown(("name", "number", "size")) == [
        "title",
        "name  number  size",
        "a       -1.5     -",
        "bcd       10   2 x",
    ]
    # no line of names that are none
    assert shown(("", "", "")) == ["title", "a    -1.5    -", "bcd    10  2 x"]


def test_a_file_is_wide_enough_for_its_numbers() -> None:
    """80 columns would cut them."""
    wide = tuple(f"{'column' * 5}{i}" for i in range(3))
    lines = shown(wide)
    assert all(name in lines[2] for name in wide), lines
    assert any("-1.5" in line for line in lines) and any("10" in line for line in lines)


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (["1", "-2.5", "", "-"], True),
        (["1 MiB", "3 x"], True),
        (["1", "a"], False),
        (["-a"], False),
    ],
)
def test_a_column_of_numbers_is_one_of_nothing_else(cells: list[str], right: bool) -> None:
    assert tables.are_numbers(cells) is right


def test_every_other_name_of_a_loss_is_listed() -> None:
    told = " ".join(catalogue.table())
    for name in losses.aliases():
        assert f"`{name}`" in told
    assert "`sigmoid`, `sigmoidnorm`, `spin` (DPO)" in told


def test_a_loss_says_what_it_needs_and_costs() -> None:
    assert catalogue.needs(losses.DPO()) == "reference"
    assert catalogue.needs(losses.SPPO()) == "reference, (win_rate_chosen), (win_rate_rejected)"
    assert catalogue.needs(losses.KTO()) == "reference, desirable, kl"
    assert catalogue.needs(losses.ShortToLong(both=True)) == "long_chosen rows, long_rejected rows"
    assert (catalogue.needs(losses.GRPO()), catalogue.needs(losses.SimPO())) == ("advantages", "-")
    assert catalogue.products(losses.SimPO()) == "3"
    assert catalogue.products(losses.AOT()) == "3 to 4"
    names = [row[0] for row in catalogue.rows()]
    # what every policy loss has is not repeated
    assert "`SoftAdaptive(tau_pos, tau_neg)`" in names
