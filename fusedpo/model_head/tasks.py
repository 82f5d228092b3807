"""Running a task at the head of a model, and reading what feeds it and what follows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.head import Head
from fusedpo.model_head.cap_and_scale import AfterHead
from fusedpo.model_head.carry import restore_precision
from fusedpo.model_head.errors import unsupported
from fusedpo.model_head.forward import AtHead, FusedForward, fused_forward, refuse_labels
from fusedpo.model_head.modules import causal_model


def at_head(model: Any, task: AtHead, **inputs: Any) -> tuple[Any, Tensor | None]:
    """Run a task at the head of a model that has a fused one, entered through its wrapper.

    Args:
        model: wrapped or not; with a fused head.
        task: a function of the hidden states [B, T, H] and the ``Head``; returns a tree of tensors.
        inputs: of the model's forward, without labels.

    Returns:
        The task's result, and the aux_loss of a mixture of experts, or None.

    Raises:
        ValueError: for a model without a fused head, and for labels among the inputs.
        UnsupportedHead: if the head is more than a weight, a bias, a soft cap and a scale, also
            after ``add_fused_head(model, unsupported="fallback")``: a task needs the head itself;
            and if the model's call does not run its forward.
    """
    refuse_labels(inputs)
    results: list[Any] = []

    def record(hidden: Tensor, head: Head) -> Any:
        results.append(task(hidden, head))
        return results[-1]

    output = model(**inputs, fused=record)
    if not results:
        if fused_forward(model) is None:
            remedy = "call add_fused_head(model) first"
            raise bad_value("model", "one with a fused head", type(model).__name__, remedy)
        raise unsupported(
            "one whose call runs its forward",
            f"an output of {type(model).__name__} without that",
        )
    return restore_precision(results[-1], output["result"]), output["aux_loss"]


def hidden_and_head(model: Any, **inputs: Any) -> tuple[Tensor, Head]:
    """The states [B, T, H] that feed a model's head, and the head, verified on these inputs.

    For models whose weights are whole outside of a forward, that is, not under FSDP or ZeRO-3. The
    model needs no fused head, and is left as it was.

    Raises:
        ValueError: for labels among the inputs.
        UnsupportedHead: if the head is more than a weight, a bias, a soft cap and a scale.
    """
    forward = _forward_of(causal_model(model))
    states_and_head, _ = forward.run(lambda hidden, head: (hidden, head), (), inputs, carry=False)
    return states_and_head


def after_head(model: Any, **inputs: Any) -> AfterHead:
    """The function of its head's output that a model's logits are, found and verified on inputs.

    Raises:
        ValueError: for labels among the inputs.
        UnsupportedHead: if it is more than a soft cap and a scale.
    """
    refuse_labels(inputs)
    forward = _forward_of(causal_model(model))
    return forward.after_head((), {**inputs, **forward.settings()})


def _forward_of(causal: Any) -> FusedForward:
    """The model's fused forward, which remembers what was found; or one that is not installed."""
    return fused_forward(causal) or FusedForward(causal, vars(causal).get("forward"))
