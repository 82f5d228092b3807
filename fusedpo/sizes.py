"""Numbers of bytes and of products: from a user's text or number, and to a text for people."""

from __future__ import annotations

import re
from numbers import Real

from fusedpo.checks import bad_type, bad_value

# of a CPU, and of a device whose memory is not known
DEFAULT_BUDGET = 256 * 2**20
# of a GPU: a share of its memory, up to what more of would rarely buy time
_SHARE_OF_A_GPU, _MOST_ON_A_GPU = 3, 4 * 2**30

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def default_budget(device: str, memory: int | None) -> int:
    """Bytes that a call may hold if it is not told: 256 MiB on a CPU, or where the memory of a
    device is not known; else 3 % of that, 4 GiB at most.

    Args:
        device: its type, as ``"cpu"`` or ``"cuda"``.
        memory: bytes of all of its memory, or None.
    """
    if device == "cpu" or memory is None:
        return DEFAULT_BUDGET
    return min(_MOST_ON_A_GPU, memory * _SHARE_OF_A_GPU // 100)


def parse_budget(
    budget: int | float | str | None,
    argument: str = "memory_budget",
    *,
    default: int = DEFAULT_BUDGET,
) -> int:
    """Bytes from a number, a text such as ``"512MiB"`` or ``"1.5 GB"``, or None: the default.

    Units are B, KB to TB (powers of 1000) and KiB to TiB (of 1024), in any case.

    Args:
        argument: the name by which an error calls it.

    Raises:
        TypeError, ValueError: unless it is a positive, finite number of bytes.
    """
    if budget is None:
        return default
    remedy = 'give bytes as a number, or a text such as "512MiB" or "2GB"'
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        if match is None or match[2].upper() not in _UNITS:
            raise bad_value(
                argument, "a number of bytes or a text with a unit", repr(budget), remedy
            )
        size = float(match[1]) * _UNITS[match[2].upper()]
    elif isinstance(budget, Real) and not isinstance(budget, bool):
        # not through a float, which would round a large int
        size = budget if isinstance(budget, int) else float(budget)
    else:
        # plan() itself takes no Plan
        expected = "a number or a text" if argument == "budget" else "a number, a text or a Plan"
        raise bad_type(argument, expected, type(budget).__name__, remedy)
    if not 1 <= size < float("inf"):
        raise bad_value(argument, "a positive, finite number of bytes", repr(budget), remedy)
    return int(size)


def format_bytes(size: int) -> str:
    """``"1.5 MiB"`` and the like, with four digits at most."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} GiB"


def format_products(count: float) -> str:
    """``"1 product"``, ``"3 products"``, ``"3.547 products"``: with four digits at most."""
    return f"{count:.4g} product{'s' * (count != 1)}"
