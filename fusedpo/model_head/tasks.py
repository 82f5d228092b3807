"""Running something at the head of a model: a task, or a look at what feeds it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.head import Head
from fusedpo.model_head.cap_and_scale import AfterHead
from fusedpo.model_head.carry import _uncast
from fusedpo.model_head.errors import UnsupportedHead
from fusedpo.model_head.forward import AtHead, FusedForward, _refuse_labels, fused_forward
from fusedpo.model_head.modules import causal_model


def at_head(model: Any, task: AtHead, **inputs: Any) -> tuple[Any, Tensor | None]:
    """Run a task at the head of a model that has a fused one, entered through its wrapper.

    Args:
        model: wrapped or not; with a fused head.
        task: what to do with hidden states and head. Returns a tree of tensors.
        inputs: of the model's forward, without labels.

    Returns:
        What the task returned, and the aux_loss of a mixture of experts, or None.

    Raises:
        ValueError: for a model without a fused head, and for labels among the inputs.
        UnsupportedHead: if the head is more than a weight, a bias, a soft cap and a factor, also
            after ``add_fused_head(model, unsupported="fallback")``: a task needs the head itself;
            and if the model's call does not run its forward.
    """
    _refuse_labels(inputs)
    done: list[Any] = []

    def noted(hidden: Tensor, head: Head) -> Any:
        done.append(task(hidden, head))
        return done[-1]

    output = model(**inputs, fused=noted)
    if not done:
        if fused_forward(model) is None:
            remedy = "call add_fused_head(model) first"
            raise bad_value("model", "one with a fused head", type(model).__name__, remedy)
        raise UnsupportedHead(
            "model: expected one whose call runs its forward, got an output of "
            f"{type(model).__name__} without that"
        )
    return _uncast(done[-1], output["result"]), output["aux_loss"]


def hidden_and_head(model: Any, **inputs: Any) -> tuple[Tensor, Head]:
    """The states [B, T, H] that feed a model's head, and the head, verified on these inputs.

    For models whose weights are whole outside of a forward, that is, not under FSDP or ZeRO-3. The
    model needs no fused head, and is left as it was.

    Raises:
        UnsupportedHead: if the head is more than a weight, a bias, a soft cap and a factor.
    """
    fused = _forward_of(causal_model(model))
    found, _ = fused.run(lambda hidden, head: (hidden, head), (), inputs, carry=False)
    return found


def after_head(model: Any, **inputs: Any) -> AfterHead:
    """What a model does with the output of its head, found on these inputs and verified.

    Raises:
        UnsupportedHead: if it is more than a soft cap and a factor.
    """
    _refuse_labels(inputs)
    fused = _forward_of(causal_model(model))
    return fused.after_head((), {**inputs, **fused.settings()})


def _forward_of(causal: Any) -> FusedForward:
    """The model's, which keeps what is found of its head; or else one that is not put into it."""
    return fused_forward(causal) or FusedForward(causal, vars(causal).get("forward"))
