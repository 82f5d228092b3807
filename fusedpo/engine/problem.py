"""The problem that the arguments of plan() describe, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, TypedDict, get_args

import torch

from fusedpo.checks import FLOATS, bad_choice, bad_type, bad_value
from fusedpo.devices import Device, as_device
from fusedpo.engine.cost import Backend, Needs, Problem
from fusedpo.engine.ladder import MULTIPROCESSORS
from fusedpo.engine.precision import accumulated_dtype
from fusedpo.engine.structure import GradientStructure, Scope
from fusedpo.engine.tolerance import GUESSED_SHARE, check_tolerance

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The arguments of plan() that describe a call, but for its sizes."""

    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    operand_dtype: torch.dtype | None
    needs: Iterable[Needs]
    scope: Scope | None
    groups: int | Sequence[int]
    factors: int
    entropy: bool
    entropy_value: bool
    softcap: bool
    gathered: bool
    reordered: bool
    device: str | torch.device | Device
    backend: Backend
    shards: int
    gradient_tolerance: float
    kept_share: float


def problem_of(tokens: int, vocab: int, hidden: int, **options: Unpack[Options]) -> Problem:
    """The problem that plan()'s arguments describe, checked."""
    dtype = options["dtype"]
    weight_dtype = options.get("weight_dtype") or dtype
    operand_dtype = options.get("operand_dtype") or dtype
    scope, factors = options.get("scope"), options.get("factors", 1)
    backend, shards = options.get("backend", "torch"), options.get("shards", 1)
    for name, size, least in (
        ("tokens", tokens, 0),
        ("vocab", vocab, 1),
        ("hidden", hidden, 1),
        ("factors", factors, 1),
        ("shards", shards, 1),
    ):
        _whole_number(name, size, least)
    for name, value in (
        ("dtype", dtype),
        ("weight_dtype", weight_dtype),
        ("operand_dtype", operand_dtype),
    ):
        if value not in FLOATS:
            known = ", ".join(str(dtype) for dtype in FLOATS)
            raise bad_type(name, f"one of {known}", str(value))
    needs = _needs(options.get("needs", ("hidden", "weight")))
    if scope is not None and scope not in get_args(Scope):
        raise bad_choice("scope", scope, get_args(Scope))
    if backend not in get_args(Backend):
        raise bad_choice("backend", backend, get_args(Backend))
    groups, borders = _groups(options.get("groups", 1), tokens)
    place = as_device(options.get("device", "cpu"))
    on_cpu = place.type == "cpu"
    acc, entropy = accumulated_dtype(dtype), options.get("entropy", False)
    operand = acc if on_cpu else operand_dtype
    return Problem(
        tokens=tokens,
        vocab=vocab,
        hidden=hidden,
        hidden_size=dtype.itemsize,
        weight_size=weight_dtype.itemsize,
        operand=operand.itemsize,
        acc=acc.itemsize,
        hidden_cast=dtype != operand,
        weight_cast=weight_dtype != operand,
        fp16_products=operand == torch.float16,
        needs=needs,
        structure=None if scope is None else GradientStructure(scope, factors),
        groups=groups,
        borders=borders,
        entropy=entropy and bool(needs),
        of_entropy=entropy,
        entropy_value=options.get("entropy_value", False) or entropy,
        softcap=options.get("softcap", False),
        gathered=options.get("gathered", True),
        reordered=options.get("reordered", False),
        backend=backend,
        on_cpu=on_cpu,
        multiprocessors=place.multiprocessors or MULTIPROCESSORS,
        shards=shards,
        tolerance=check_tolerance(options.get("gradient_tolerance", 0.0), dtype),
        share=_share(options.get("kept_share", GUESSED_SHARE)),
    )


def _share(share: float) -> float:
    if not 0.0 < share <= 1.0:
        raise bad_value("kept_share", "a share of the columns, above 0 and at most 1", f"{share:g}")
    return share


def _needs(needs: object) -> frozenset[Needs]:
    if not isinstance(needs, Iterable):
        raise bad_type("needs", "names of gradients", type(needs).__name__)
    names = [needs] if isinstance(needs, str) else list(needs)
    for name in names:
        if name not in get_args(Needs):
            raise bad_choice("needs", name, get_args(Needs))
    return frozenset(names)  # type: ignore[arg-type]


def _whole_number(argument: str, value: object, least: int, expected: str = "an int") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(argument, expected, type(value).__name__)
    if value < least:
        raise bad_value(argument, f"at least {least}", str(value))


def _groups(groups: object, tokens: int) -> tuple[int, frozenset[int] | None]:
    """How many groups there are, and the rows at which one begins or ends, if they are known."""
    expected = "an int, or the scored tokens of each group as a sequence of ints"
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        _whole_number("groups", groups, 1, expected)
        return groups, None  # type: ignore[return-value]
    for size in groups:
        _whole_number("groups", size, 0, expected)
    if sum(groups) != tokens:
        expected = f"a number, or numbers of tokens that sum to {tokens}"
        raise bad_value("groups", expected, f"numbers that sum to {sum(groups)}")
    return max(1, len(groups)), frozenset(accumulate(groups, initial=0))
