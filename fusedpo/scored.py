"""Finding the scored tokens: everything a call has to read from the device, in one transfer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.distributed import gather, get_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tracing() -> bool:
    """Whether a graph is being traced, so that no number can be read."""
    return torch.compiler.is_compiling()


Fault = tuple[Tensor, Callable[[], ValueError]]
"""A scalar bool on the device, and the error to raise if it is true."""


def count_scored(
    labels: Tensor,
    ignore_index: int,
    faults: Sequence[Fault],
    *,
    borders: Tensor | None = None,
    num_scored: int | Sequence[int] | None = None,
) -> list[int]:
    """How many labels are scored: of all, or of each sequence; and raise what has to be raised.

    Args:
        labels: any shape; those that are not ``ignore_index`` are scored.
        faults: what else is to be looked at, in order.
        borders: [B + 1], starts of the sequences among the flattened labels, and their end.
        num_scored: the answer, if the caller knows it: nothing is read then, and what would be
            raised is asserted on the device. On the CPU it is checked like everything else.
    """
    promised = None
    if num_scored is not None:
        promised = _whole_numbers(num_scored, 1 if borders is None else borders.shape[0] - 1)
    counts = _counted(labels, ignore_index, borders)
    found = torch.stack([fault for fault, _ in faults])
    if promised is not None and labels.is_cuda:
        told = to_device(promised, labels.device)
        torch._assert_async(~found.any() & (counts == told).all(), _WRONG_VALUE)
        return promised
    values = torch.cat((found.long(), counts)).tolist()
    for is_fault, (_, error) in zip(values, faults, strict=False):
        if is_fault:
            raise error()
    read: list[int] = values[len(faults) :]
    if promised is not None:
        _check_promise(promised, read, ignore_index)
    return read


def count_parts(
    labels: Tensor,
    ignore_index: int,
    faults: Sequence[Fault],
    group: ProcessGroup,
    *,
    borders: Tensor,
    num_scored: Sequence[int] | None = None,
) -> tuple[list[list[int]], int]:
    """Of sequences that the ranks of a group share: how many labels of each are scored, by rank;
    and which rank this is.

    What has to be raised on one rank is raised on all. One all-gather, which is read.
    """
    counts = _counted(labels, ignore_index, borders)
    found = torch.stack([fault for fault, _ in faults])
    every = gather(torch.cat((found.long(), counts)), group).tolist()
    own = get_rank(group)
    for is_fault, (_, error) in zip(every[own], faults, strict=False):
        if is_fault:
            raise error()
    wrong = [rank for rank, values in enumerate(every) if any(values[: len(faults)])]
    if wrong:
        raise checks.bad_value(
            "labels, temperature or cu_seqlens",
            "right values on all ranks of sequence_group",
            f"a wrong one on rank {wrong[0]} of it",
            "see that rank's own error",
        )
    read = [values[len(faults) :] for values in every]
    if num_scored is not None:
        _check_promise(_whole_numbers(num_scored, len(read[own])), read[own], ignore_index)
    return read, own


def _counted(labels: Tensor, ignore_index: int, borders: Tensor | None) -> Tensor:
    """[1], how many labels are scored; or of each sequence [B]."""
    running = torch.nn.functional.pad((labels.reshape(-1) != ignore_index).cumsum(0), (1, 0))
    if borders is None:
        return running[-1:]
    at = running[borders.clamp(0, labels.numel())]  # a border beyond is a fault of its own
    return at[1:] - at[:-1]


def _check_promise(promised: list[int], read: list[int], ignore_index: int) -> None:
    if promised != read:
        raise checks.bad_value(
            "num_scored", f"the number of labels that are not {ignore_index}, {read}", str(promised)
        )


_WRONG_VALUE = (
    "labels, temperature, cu_seqlens or num_scored: a wrong value; to learn which, call without"
    " num_scored and outside torch.compile"
)


def assert_on_device(faults: Sequence[Fault]) -> None:
    """Raise where the device comes to it, without waiting for it: for graphs."""
    torch._assert_async(~torch.stack([fault for fault, _ in faults]).any(), _WRONG_VALUE)


def label_fault(labels: Tensor, vocab: int, ignore_index: int) -> Fault:
    return (
        checks.outside_vocabulary(labels, vocab, ignore_index).any(),
        lambda: checks.bad_labels(labels, vocab, ignore_index),
    )


def temperature_faults(
    temperature: float | Tensor, labels: Tensor, ignore_index: int
) -> list[Fault]:
    """Check all but the values of a temperature; what is left to look at is returned."""
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
            "temperature", "a constant", "a tensor that requires grad", "detach it"
        )
    wrong = ~((temperature > 0) & temperature.isfinite()) & (labels != ignore_index)

    def error() -> ValueError:
        first = float(temperature[wrong][0])
        return checks.bad_value("temperature", "finite numbers above 0", f"{first:g}")

    return [(wrong.any(), error)]


def border_fault(borders: Tensor, positions: int, *, empty: bool = False) -> Fault:
    """borders [B + 1] have to rise from 0 to the number of positions; or, empty, not to fall."""
    inner = (borders.diff() < (0 if empty else 1)).any()
    wrong = (borders[0] != 0) | (borders[-1] != positions) | inner

    def error() -> ValueError:
        given = borders.tolist()
        return checks.bad_value(
            "cu_seqlens",
            f"numbers that increase from 0 to {positions}, the number of packed positions",
            str(given) if len(given) <= 17 else f"{given[:16]} ...",
        )

    return wrong, error


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
        given = num_scored if isinstance(num_scored, Iterable) else [num_scored]
        found = [operator.index(n) for n in given]
    except TypeError:
        raise wrong from None
    if len(found) != sequences or min(found, default=0) < 0:
        raise wrong
    return found
