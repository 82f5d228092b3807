"""What runs while torch.compile traces a graph, and is no part of it."""

from __future__ import annotations

import warnings

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def warn_of_exact_gradients() -> None:
    """Warns that a tolerance for gradients changes nothing here."""
    warnings.warn(
        "gradient_tolerance: inside torch.compile gradients are exact, and cost what they do; for "
        "it call the loss outside of the graph, under torch.compiler.disable",
        stacklevel=2,
    )
