"""Installing a fused forward in a model, and removing it."""

from __future__ import annotations

from typing import Any, Literal

from fusedpo.checks import bad_choice, bad_value
from fusedpo.engine.backend import check_name
from fusedpo.engine.plan import Plan
from fusedpo.engine.tolerance import check_tolerance
from fusedpo.model_head.forward import FusedForward, forward_function, fused_forward
from fusedpo.model_head.modules import causal_model
from fusedpo.sizes import parse_budget


def add_fused_head(
    model: Any,
    *,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    unsupported: Literal["raise", "fallback"] = "raise",
    gradient_tolerance: float = 0.0,
) -> None:
    """Let ``model(..., labels=labels, fused=True)`` return statistics of the labels, not logits.

    Called that way, the forward takes its usual arguments, wrapped or not, and besides:

        labels: [B, T], integers, unshifted as in Hugging Face, -100 where nothing is scored. Of an
            encoder-decoder they are aligned with the decoder's positions, as in Hugging Face, and
            make the decoder's input if the call has none.
        shift_labels: [B, T] instead, aligned with the hidden states already.
        stats: names of the statistics, of fusedpo.engine.stats.STATS; default ("logprob",).
        differentiable: which of log-probability and entropy pass a gradient on; default both.
        temperature: divides the logits; default 1.

    and returns a ``TokenStats`` of tensors [B, T - 1] ([B, T] with shift_labels, and of an
    encoder-decoder), with the ``aux_loss`` of a mixture of experts whose router's logits are asked
    for. ``fused`` may also be a function of the hidden states [B, T, H] and the ``Head``, which is
    run in place of the head; the forward then returns {"result": its result, "aux_loss": a scalar
    or None}.

    Without ``fused`` the model is as it was: ``generate``, saving, loading, copying and pickling
    are unchanged, and the state dict has no new keys. Calling this twice changes the options only.

    Args:
        model: a causal language model or an encoder-decoder of transformers, or one wrapped by
            PEFT, DDP or the like.
        memory_budget, backend, gradient_tolerance: as of ``linear_token_stats``. With a
            differentiable entropy among the statistics, gradients are exact.
        unsupported: if the head turns out not to be a weight, a bias, a soft cap and a scale:
            "raise" an ``UnsupportedHead`` at the first call, or "fallback": make the model's own
            logits, with one warning.

    Raises:
        ValueError, TypeError: if the model has no output embedding, or for an unknown option.
    """
    check_options(memory_budget, backend, gradient_tolerance)
    if unsupported not in ("raise", "fallback"):
        raise bad_choice("unsupported", unsupported, ("raise", "fallback"))
    causal = causal_model(model)
    if not callable(getattr(causal, "get_output_embeddings", None)) or (
        unsupported == "raise" and causal.get_output_embeddings() is None
    ):
        raise bad_value(
            "model",
            "a causal language model with an output embedding",
            type(model).__name__,
            "load it by AutoModelForCausalLM, which has the head",
        )
    install_forward(causal, FusedForward, memory_budget, backend, unsupported, gradient_tolerance)


def check_options(
    memory_budget: int | float | str | Plan | None,
    backend: str,
    gradient_tolerance: float = 0.0,
) -> None:
    """Refuse options before the first call; whether the backend can run is known only there.

    Raises:
        ValueError, TypeError: for an unknown one.
    """
    if not isinstance(memory_budget, Plan):
        parse_budget(memory_budget)
    check_name(backend)
    check_tolerance(gradient_tolerance)


def install_forward(causal: Any, kind: type[FusedForward], *options: Any, **named: Any) -> None:
    """Install a fused forward in a model, or exchange the one it has.

    Args:
        causal: the causal language model itself (see ``causal_model``).
        kind: ``FusedForward`` or a subclass.
        options, named: of its constructor, after the model and the original forward.
    """
    earlier, current = fused_forward(causal), vars(causal).get("forward")
    if earlier is None:
        causal.forward = kind(causal, current, *options, **named)
    elif forward_function(current) is earlier:
        causal.forward = kind(causal, earlier.original, *options, **named)
    else:  # a wrapper of the forward holds on to it: it becomes the other
        earlier.__class__ = kind
        kind.__init__(earlier, causal, earlier.original, *options, **named)


def remove_fused_head(model: Any) -> None:
    """Undo ``add_fused_head``. Does nothing to a model that has no fused head.

    Args:
        model: wrapped or not.

    Raises:
        ValueError: if the forward was wrapped since (by ``Accelerator.prepare``, say).
    """
    causal = causal_model(model)
    forward = fused_forward(causal)
    if forward is None:
        return
    if forward_function(vars(causal).get("forward")) is not forward:
        raise bad_value(
            "model",
            "a forward that was not wrapped since add_fused_head",
            "one wrapped by accelerate",
            "first call accelerator.unwrap_model(model, keep_fp32_wrapper=False)",
        )
    if forward.original is None:
        del causal.forward
    else:
        causal.forward = forward.original
