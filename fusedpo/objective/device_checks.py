"""What a call checks and counts on the device: everything is read in one transfer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.distributed import gather, get_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DeferredCheck(NamedTuple):
    """A check of values on the device, to be read together with others.

    Attributes:
        wrong: a scalar bool on the device.
        error: makes the error to raise if it is true.
    """

    wrong: Tensor
    error: Callable[[], ValueError]


def count_scored(
    labels: Tensor,
    ignore_index: int,
    deferred: Sequence[DeferredCheck],
    *,
    borders: Tensor | None = None,
    num_scored: int | Sequence[int] | None = None,
) -> list[int]:
    """The number of scored labels: of all, or of each sequence. Raises the first failed check.

    Args:
        labels: any shape; those that are not ``ignore_index`` are scored.
        deferred: further checks, in order.
        borders: [B + 1], starts of the sequences among the flattened labels, and their end.
        num_scored: the answer, if the caller knows it: nothing is read then, and the checks are
            asserted on the device. On the CPU it is checked like everything else.
    """
    promised = None
    if num_scored is not None:
        promised = _whole_numbers(num_scored, 1 if borders is None else borders.shape[0] - 1)
    counts = _counted(labels, ignore_index, borders)
    failed = torch.stack([check.wrong for check in deferred])
    if promised is not None and labels.is_cuda:
        expected = to_device(promised, labels.device)
        torch._assert_async(~failed.any() & (counts == expected).all(), _WRONG_VALUE)
        return promised
    values = torch.cat((failed.long(), counts)).tolist()
    _raise_first(values, deferred)
    read: list[int] = values[len(deferred) :]
    if promised is not None:
        _check_promise(promised, read, ignore_index)
    return read


def count_parts(
    labels: Tensor,
    ignore_index: int,
    deferred: Sequence[DeferredCheck],
    group: ProcessGroup,
    *,
    borders: Tensor,
    num_scored: Sequence[int] | None = None,
) -> tuple[list[list[int]], int]:
    """The number of scored labels of each sequence, by rank of a group that shares the sequences;
    and this rank.

    A check that fails on one rank raises on all. One all-gather, which is read.
    """
    counts = _counted(labels, ignore_index, borders)
    failed = torch.stack([check.wrong for check in deferred])
    every = gather(torch.cat((failed.long(), counts)), group).tolist()
    this = get_rank(group)
    _raise_first(every[this], deferred)
    wrong = [rank for rank, values in enumerate(every) if any(values[: len(deferred)])]
    if wrong:
        raise checks.bad_value(
            "labels, temperature or cu_seqlens",
            "right values on all ranks of sequence_group",
            f"a wrong one on rank {wrong[0]} of it",
            "see that rank's own error",
        )
    read = [values[len(deferred) :] for values in every]
    if num_scored is not None:
        _check_promise(_whole_numbers(num_scored, len(read[this])), read[this], ignore_index)
    return read, this


def _raise_first(values: list[int], deferred: Sequence[DeferredCheck]) -> None:
    """Raise the error of the first check whose value, as read, is not 0."""
    for value, check in zip(values, deferred, strict=False):
        if value:
            raise check.error()


def _counted(labels: Tensor, ignore_index: int, borders: Tensor | None) -> Tensor:
    """[1], the number of scored labels; or of each sequence [B]."""
    running = torch.nn.functional.pad((labels.reshape(-1) != ignore_index).cumsum(0), (1, 0))
    if borders is None:
        return running[-1:]
    at = running[borders.clamp(0, labels.numel())]  # a check of its own finds a border beyond
    return at[1:] - at[:-1]


def _check_promise(promised: list[int], read: list[int], ignore_index: int) -> None:
    if promised != read:
        raise checks.bad_value(
            "num_scored",
            f"the number of labels that are not {ignore_index}, {read}",
            str(promised),
            "count them in labels (after the shift, with shift=True), or leave num_scored out",
        )


_WRONG_VALUE = (
    "labels, temperature, cu_seqlens or num_scored: a wrong value; to learn which, call without"
    " num_scored and outside torch.compile"
)


def assert_on_device(deferred: Sequence[DeferredCheck]) -> None:
    """Assert the checks on the device without waiting for it: for graphs."""
    torch._assert_async(~torch.stack([check.wrong for check in deferred]).any(), _WRONG_VALUE)


def label_check(labels: Tensor, vocab: int, ignore_index: int) -> DeferredCheck:
    """The check that every label is ignored or in the vocabulary."""
    return DeferredCheck(
        checks.outside_vocabulary(labels, vocab, ignore_index).any(),
        lambda: checks.bad_labels(labels, vocab, ignore_index),
    )


def temperature_checks(
    temperature: float | Tensor, labels: Tensor, ignore_index: int
) -> list[DeferredCheck]:
    """The checks of a tensor's values; all else about a temperature is checked here."""
    if not isinstance(temperature, Tensor):
        checks.positive("temperature", temperature)
        return []
    checks.floating("temperature", temperature)
    checks.shaped(
        "temperature", temperature, labels.shape, "a number or a tensor shaped like labels"
    )
    checks.same_device(labels=labels, temperature=temperature)
    if temperature.requires_grad:
        raise checks.bad_value(
            "temperature",
            "a constant",
            "a tensor that requires grad",
            "detach it; no gradient of it is formed",
        )
    wrong = ~((temperature > 0) & temperature.isfinite()) & (labels != ignore_index)

    def error() -> ValueError:
        first = float(temperature[wrong][0])
        return checks.bad_value("temperature", "finite numbers above 0", f"{first:g}")

    return [DeferredCheck(wrong.any(), error)]


def border_check(borders: Tensor, positions: int, *, empty: bool = False) -> DeferredCheck:
    """The check that borders [B + 1] rise from 0 to the number of positions; or, with ``empty``,
    that they do not fall."""
    inner = (borders.diff() < (0 if empty else 1)).any()
    wrong = (borders[0] != 0) | (borders[-1] != positions) | inner

    def error() -> ValueError:
        numbers = borders.tolist()
        return checks.bad_value(
            "cu_seqlens",
            f"numbers that increase from 0 to {positions}, the number of packed positions",
            str(numbers) if len(numbers) <= 17 else f"{numbers[:16]} ...",
        )

    return DeferredCheck(wrong, error)


def to_device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """A copy that does not wait for the device."""
    if not isinstance(values, Tensor):
        # not on the default device, which may be any
        values = torch.tensor(values, dtype=torch.int64, device="cpu")
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _whole_numbers(num_scored: int | Sequence[int], sequences: int) -> list[int]:
    expected = "a whole number" if sequences == 1 else f"{sequences} whole numbers"
    wrong = checks.bad_value(
        "num_scored", f"{expected}, the scored labels of each sequence", str(num_scored)
    )
    if isinstance(num_scored, (Tensor, str, bool)):
        raise wrong
    try:
        values = num_scored if isinstance(num_scored, Iterable) else [num_scored]
        numbers = [operator.index(n) for n in values]
    except TypeError:
        raise wrong from None
    if len(numbers) != sequences or min(numbers, default=0) < 0:
        raise wrong
    return numbers
