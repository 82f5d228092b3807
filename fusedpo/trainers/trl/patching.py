"""``patch``, ``unpatch`` and ``patched``: TRL's trainers without logits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import trl

from fusedpo.model_head import check_options
from fusedpo.trainers import processes
from fusedpo.trainers.trl.concatenated import replace_concatenated
from fusedpo.trainers.trl.fused_lm_head import replace_fused_lm_heads
from fusedpo.trainers.trl.lazy_models import replace_by_lazy_logits
from fusedpo.trainers.trl.places import check_version
from fusedpo.trainers.trl.reach import in_words, tell_of_others, watch
from fusedpo.trainers.trl.replace import Budget, Options, replace, replaced, undo
from fusedpo.trainers.trl.tpo import replace_tpo

_SEAMS = (
    replace_fused_lm_heads,
    replace_by_lazy_logits,
    replace_concatenated,
    replace_tpo,
)


def patch(
    memory_budget: Budget = None,
    backend: str = "auto",
    *,
    quiet: bool = False,
    gradient_tolerance: float = 0.0,
) -> dict[str, str]:
    """Let the trainers of the installed TRL that are built from now on score labels without logits.

    Prints one line that says what was replaced. Called again, only the options change. What
    somebody else has replaced stays as it is, with a warning, and so does a trainer of another
    program that has its own way to the loss. A trainer whose first step calls nothing of what was
    replaced here warns, once, on the main process.

    Args:
        memory_budget: what the head may hold at a time, as of ``linear_logprobs``.
        backend: "auto", "torch" or "triton".
        quiet: print nothing. Warnings are given all the same.
        gradient_tolerance: the relative error that a gradient of the head may have, as of
            ``linear_logprobs``. Where the loss has an entropy in it, gradients are exact.

    Returns:
        By the name of a method ("DPO", "CPO", ...) whose trainer is reached, under which condition:
        "" or "not with use_liger_kernel=True".

    Raises:
        ValueError, TypeError: for an unknown option.
        RuntimeError: for TRL before 0.29, and if nothing in the installed version is known here.
    """
    check_options(memory_budget, backend, gradient_tolerance)
    check_version()
    unpatch()
    options = Options(memory_budget, backend, gradient_tolerance)
    reached: dict[str, str] = {}
    for seam in _SEAMS:
        reached.update(seam(options))
    if not reached:
        raise RuntimeError(
            f"trl: expected a version from 0.29 to 1.16, got {trl.__version__}, in which nothing "
            "stands where it is replaced; install one of these, or update fusedpo"
        )
    for method, condition in reached.items():
        watch(method.lower(), condition)
    tell_of_others(reached)
    if not quiet and processes.is_first():
        print(f"fusedpo: TRL {trl.__version__} {in_words(reached)}", file=sys.stderr)
    return reached


def unpatch() -> None:
    """Undo ``patch``.

    Trainers that were built meanwhile keep what they have, and what somebody else has replaced
    since stays replaced, with a warning.
    """
    undo()


@contextlib.contextmanager
def patched(
    memory_budget: Budget = None,
    backend: str = "auto",
    *,
    quiet: bool = True,
    gradient_tolerance: float = 0.0,
) -> Iterator[None]:
    """``patch`` for a while. What was patched before is so again afterwards."""
    before = [r for r in replaced if r.stands()]
    try:
        patch(memory_budget, backend, quiet=quiet, gradient_tolerance=gradient_tolerance)
        yield
    finally:
        unpatch()
        for r in before:
            replace(r.owner, r.name, r.value)
