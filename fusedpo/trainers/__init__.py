"""The losses inside trainers that people already use. Each needs an extra, none is imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedpo.engine.plan import Plan

# programs with trainers of their own, by their packages
_LAZY = {"swift": "ms-swift", "axolotl": "axolotl", "openrlhf": "OpenRLHF", "verl": "verl"}


def patch(
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    *,
    quiet: bool = False,
    gradient_tolerance: float = 0.0,
) -> dict[str, str]:
    """Let the trainers that are built from now on score labels without logits: those of the
    installed TRL, and LLaMA-Factory's if it is imported.

    As ``fusedpo.trainers.trl.patch``, which says more; imports TRL, 0.29 to 1.16. Of another
    program with trainers of its own, if one is imported, it says how they are reached.

    Args:
        memory_budget: what the head may hold at a time, as of ``linear_logprobs``.
        backend: "auto", "torch" or "triton".
        quiet: print nothing. Warnings are given all the same.
        gradient_tolerance: the relative error that a gradient of the head may have, as of
            ``linear_logprobs``.

    Returns:
        By the name of a method ("DPO", "CPO", ...), or of LLaMA-Factory, whose trainer is reached,
        under which condition: "" or "not with use_liger_kernel=True".

    Raises:
        ValueError, TypeError: for an unknown option.
        ImportError: without TRL.
        RuntimeError: for TRL before 0.29, unless LLaMA-Factory is imported, which wants one; and if
            nothing in the installed version is known here.
    """
    from fusedpo.trainers import processes, trl

    factory = "llamafactory" in sys.modules
    try:
        reached = trl.patch(
            memory_budget, backend, quiet=quiet, gradient_tolerance=gradient_tolerance
        )
    except RuntimeError:
        if not factory:
            raise
        reached = {}
    lines = []
    if factory:
        from fusedpo.trainers import llamafactory

        llamafactory.patch(
            memory_budget=memory_budget, backend=backend, gradient_tolerance=gradient_tolerance
        )
        reached["LLaMA-Factory"] = ""
        lines.append("LLaMA-Factory without logits: DPO, SimPO, ORPO, KTO")
    lines += [
        f"{title} is imported, whose trainers are not patched: call fusedpo.lazy_logits() before "
        "their models are made, or start it by `fusedpo run`"
        for package, title in _LAZY.items()
        if package in sys.modules
    ]
    if not quiet and processes.is_first():
        for line in lines:
            print(f"fusedpo: {line}", file=sys.stderr)
    return reached


def unpatch() -> None:
    """Undo ``patch``.

    Trainers that were built meanwhile keep what they have, and what somebody else has replaced
    since stays replaced, with a warning. Without a patch nothing is imported.
    """
    for name in ("trl", "llamafactory"):
        module = sys.modules.get(f"fusedpo.trainers.{name}")
        if module is not None:
            module.unpatch()
