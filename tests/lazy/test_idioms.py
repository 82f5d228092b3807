"""Public code's programs have the same numbers and gradients on lazy logits, and make none."""

from __future__ import annotations

import functools

import pytest
import torch
from lazy.harness import Outcome, inputs, passes, run
from lazy.idioms import IDIOMS
from torch import Tensor


def error(value: Tensor | None, truth: Tensor | None) -> float:
    """The largest difference, relative to the largest number."""
    assert (value is None) == (truth is None)
    if value is None or truth is None:
        return 0.0
    assert value.shape == truth.shape
    scale = float(truth.double().abs().max()) or 1.0
    return float((value.double() - truth.double()).abs().max()) / scale


def check(lazy: Outcome, plain: Outcome, truth: Outcome, rounding: float) -> None:
    """Lazy numbers are as near to the truth as plain ones, or as their dtype allows."""
    assert [v.dtype for v in lazy.values] == [v.dtype for v in plain.values]
    for mine, theirs, exact in zip(
        [*lazy.values, *lazy.gradients],
        [*plain.values, *plain.gradients],
        [*truth.values, *truth.gradients],
        strict=True,
    ):
        assert error(mine, exact) <= max(1.5 * error(theirs, exact), rounding)


@functools.cache
def plainly(name: str, dtype: torch.dtype, masked: bool = True) -> Outcome:
    return run(IDIOMS[name].program, lazy=False, dtype=dtype, masked=masked)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_in_full_precision(name: str, masked: bool) -> None:
    truth, plain = (plainly(name, dtype, masked) for dtype in (torch.float64, torch.float32))
    lazy = run(IDIOMS[name].program, lazy=True, dtype=torch.float32, masked=masked)
    check(lazy, plain, truth, 2e-6)


@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_in_half_precision(name: str) -> None:
    truth, plain = (plainly(name, dtype) for dtype in (torch.float64, torch.bfloat16))
    lazy = run(IDIOMS[name].program, lazy=True, dtype=torch.bfloat16)
    # each pass rounds its part of a gradient
    check(lazy, plain, truth, (IDIOMS[name].passes or 2) * 2**-8)


@pytest.mark.parametrize("name", [name for name, each in IDIOMS.items() if each.passes])
def test_an_idiom_is_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with passes(monkeypatch) as scored:
        run(IDIOMS[name].program, lazy=True, dtype=torch.float32)
    assert len(scored) == IDIOMS[name].passes


@pytest.mark.parametrize("name", [name for name, each in IDIOMS.items() if each.only_masked])
def test_only_what_the_mask_keeps_is_scored_and_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with passes(monkeypatch) as scored:
        run(IDIOMS[name].program, lazy=True, dtype=torch.float32)
    assert scored and sum(scored) <= int(inputs().mask.sum())
