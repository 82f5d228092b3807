"""A program's own function of logits, run on lazy ones within the call of the model's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo.head import Head
from fusedpo.lazy.install import lazy_output
from fusedpo.lazy.source import Options
from fusedpo.lazy.tensor import LazyTensor
from fusedpo.model_head import at_head


def with_lazy_logits(
    model: Any,
    function: Callable[[Tensor], Any],
    *,
    memory_budget: int | float | str | None = None,
    backend: str = "auto",
    unknown: str = "warn",
    gradient_tolerance: float = 0.0,
    **inputs: Any,
) -> Any:
    """The result of a function of a model's logits, which are lazy and never made.

    The function runs within the head's own call, so that a weight is whole there that its wrapper
    frees again (FSDP with the head in a unit of its own, ZeRO-3), and its result's gradient passes
    through the head's hooks.

    Args:
        model: wrapped or not, with a fused head (see ``add_fused_head``).
        function: takes the logits [B, T, V] and returns a tree of tensors.
        memory_budget, backend, unknown, gradient_tolerance: as of ``lazy_logits``.
        inputs: of the model's forward, without labels.

    Raises:
        ValueError: as ``at_head`` does.
    """
    options = Options(memory_budget, backend, unknown, gradient_tolerance)

    def task(hidden: Tensor, head: Head) -> Any:
        result = function(lazy_output(hidden, head, options))
        return pytree.tree_map_only(LazyTensor, LazyTensor.materialize, result)

    return at_head(model, task, **inputs)[0]
