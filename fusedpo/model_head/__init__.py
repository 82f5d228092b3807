"""A causal language model's own forward, without its logits.

    add_fused_head(model)
    stats = model(input_ids, attention_mask=mask, labels=labels, fused=True)
    loss = -stats.logprob.sum()

The model's forward is run as it is, wrappers and hooks included, up to its head. Where the head
would make logits [B, T, V] of hidden states [B, T, H], it is called all the same, but runs a task
on its input: scores of labels, or a whole loss. So a family's code before the head (norms, scales,
images, experts) needs no knowledge here, and a head whose weight is gathered for its own forward
only (FSDP, ZeRO) is gathered.

A family's code *after* the head is identified by an experiment at the first call: the model's
forward is run once more, without gradients, with probes in place of the head's output, and its
logits have to be a soft cap and a scale of them (``experiment.py``). The result is kept for the
state that head, model and configuration were in (``state.py``), and checked in every later call on
a few probes (``carry.py``). Where only numbers or hooks differ, the last result is tried first.

Threads may run one model at a time each its own way: a head's forward is overridden in one thread,
and is the original in all others (``override.py``).

For users
    ``add_fused_head``, ``remove_fused_head``, ``at_head``, ``hidden_and_head``, ``UnsupportedHead``

For integrations of trainers, as stable as those
    models: ``causal_model``, ``evaluating``, ``no_side_effects``
    forwards: ``FusedForward``, ``install_forward``, ``fused_forward``, ``check_options``
    tasks at the head: ``AtHead``, ``Score``, ``mean_logits``
    labels: ``aligned_labels``, ``strip_virtual_tokens``
    what follows the head: ``AfterHead``, ``after_head``
"""

from fusedpo.labels import aligned_labels
from fusedpo.model_head.cap_and_scale import AfterHead
from fusedpo.model_head.contexts import evaluating, no_side_effects
from fusedpo.model_head.errors import UnsupportedHead
from fusedpo.model_head.forward import AtHead, FusedForward, fused_forward
from fusedpo.model_head.install import (
    add_fused_head,
    check_options,
    install_forward,
    remove_fused_head,
)
from fusedpo.model_head.modules import causal_model
from fusedpo.model_head.score import Score, mean_logits, strip_virtual_tokens
from fusedpo.model_head.tasks import after_head, at_head, hidden_and_head

__all__ = [
    "AfterHead",
    "AtHead",
    "FusedForward",
    "Score",
    "UnsupportedHead",
    "add_fused_head",
    "after_head",
    "aligned_labels",
    "at_head",
    "causal_model",
    "check_options",
    "evaluating",
    "fused_forward",
    "hidden_and_head",
    "install_forward",
    "mean_logits",
    "no_side_effects",
    "remove_fused_head",
    "strip_virtual_tokens",
]
