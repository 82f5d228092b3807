"""Finding the scored tokens: everything a call has to read from the device, in one transfer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fusedpo import checks


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
    running = torch.nn.functional.pad((labels.reshape(-1) != ignore_index).cumsum(0), (1, 0))
    if borders is None:
        counts = running[-1:]
    else:
        at = running[borders.clamp(0, labels.numel())]  # a border beyond is a fault of its own
        counts = at[1:] - at[:-1]
    found = torch.stack([fault for fault, _ in faults])
    if promised is not None and labels.is_cuda:
        told = to_device(torch.tensor(promised), labels.device)
        torch._assert_async(~found.any() & (counts == told).all(), _WRONG_VALUE)
        return promised
    values = torch.cat((found.long(), counts)).tolist()
    for is_fault, (_, error) in zip(values, faults, strict=False):
        if is_fault:
            raise error()
    read: list[int] = values[len(faults) :]
    if promised is not None and promised != read:
        raise checks.bad_value(
            "num_scored", f"the number of labels that are not {ignore_index}, {read}", str(promised)
        )
    return read


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


def border_fault(borders: Tensor, positions: int) -> Fault:
    """borders [B + 1] have to rise from 0 to the number of positions."""
    inner = (borders.diff() <= 0).any()
    wrong = (borders[0] != 0) | (borders[-1] != positions) | inner

    def error() -> ValueError:
        given = borders.tolist()
        return checks.bad_value(
            "cu_seqlens",
            f"numbers that increase from 0 to {positions}, the number of packed positions",
            str(given) if len(given) <= 17 else f"{given[:16]} ...",
        )

    return wrong, error


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for the device."""
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
