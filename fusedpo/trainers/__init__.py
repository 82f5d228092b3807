"""The losses inside trainers that people already use. Each needs an extra, none is imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedpo.engine.plan import Plan


def patch(
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    *,
    quiet: bool = False,
) -> dict[str, str]:
    """Let the trainers of the installed TRL that are built from now on score labels without logits.

    As ``fusedpo.trainers.trl.patch``, which says more; imports TRL, 0.29 to 1.16.

    Args:
        memory_budget: what the head may hold at a time, in bytes or as "512MiB"; None: 256MiB.
        backend: "auto", "torch" or "triton".
        quiet: print nothing. Warnings are given all the same.

    Returns:
        By the name of a method ("DPO", "CPO", ...) whose trainer is reached, under which condition:
        "" or "only with use_liger_kernel=True".

    Raises:
        ValueError, TypeError: for an unknown option.
        ImportError: without TRL.
        RuntimeError: for TRL before 0.29, and if nothing in the installed version is known here.
    """
    from fusedpo.trainers import trl

    return trl.patch(memory_budget, backend, quiet=quiet)


def unpatch() -> None:
    """Undo ``patch``.

    Trainers that were built meanwhile keep what they have, and what somebody else has replaced
    since stays replaced, with a warning. Without a patch nothing is imported.
    """
    trl = sys.modules.get("fusedpo.trainers.trl")
    if trl is not None:
        trl.unpatch()
