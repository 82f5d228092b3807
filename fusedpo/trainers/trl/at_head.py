"""Methods of TRL's that would make logits, on statistics of the tokens instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from fusedpo.model_head import (
    FusedForward,
    UnsupportedHead,
    at_head,
    causal_model,
    fused_forward,
    install_forward,
)
from fusedpo.model_head.forward import AtHead
from fusedpo.trainers.trl.replace import Calls, Options

Method = Callable[..., Any]


def without_logits(fused: Method, original: Method) -> Method:
    """A method in the place of TRL's, which takes over for good where a head is not supported."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **by_name: Any) -> Any:
        if not getattr(self, "_fusedpo_unsupported", False):
            try:
                Calls.count += 1
                return fused(self, *args, **by_name)
            except UnsupportedHead as error:
                warnings.warn(f"{error.reason}; its own logits are made instead", stacklevel=2)
                self._fusedpo_unsupported = True
        return original(self, *args, **by_name)

    return method


def at_fused_head(
    model: Any, options: Options, task: AtHead, inputs: dict[str, Any]
) -> tuple[Any, Any]:
    """As ``model_head.at_head``; a model without a fused head gets one."""
    if fused_forward(model) is None:
        install_forward(causal_model(model), FusedForward, **vars(options))
    return at_head(model, task, **inputs)
