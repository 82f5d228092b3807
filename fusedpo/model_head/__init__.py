"""A causal language model's own forward, without its logits.

    add_fused_head(model)
    stats = model(input_ids, attention_mask=mask, labels=labels, fused=True)
    loss = -stats.logprob.sum()

The model's forward is run as it is, wrappers and hooks included, up to its head. Where the head
would make logits [B, T, V] of hidden states [B, T, H], it is called all the same, but does what the
caller wants done with its input: score labels, or a whole loss. So whatever a family does before
its head (norms, scales, images, experts) needs no knowledge here, and a head whose weight is
gathered for its own forward only (FSDP, ZeRO) is gathered.

What a family does *after* its head is found by experiment at the first call: the model's forward is
run once more, without gradients, with made-up logits in place of the head's, and has to be a soft
cap and a factor of them; see ``_after_head``. That is kept for the state that head, model and
configuration were in (``_Scorer.state``), and held in every later call to what becomes of a few
made-up logits. Where only numbers or hooks are others, what was known last is tried first.

Threads may run one model at a time each its own way: what stands in for a head does so in the
thread that put it there, and for all others the head does what it does.
"""

from fusedpo.model_head.cap_and_scale import AfterHead
from fusedpo.model_head.errors import UnsupportedHead
from fusedpo.model_head.experiment import evaluating, unnoticed
from fusedpo.model_head.forward import AtHead, FusedForward, fused_forward
from fusedpo.model_head.install import add_fused_head, check_options, install, remove_fused_head
from fusedpo.model_head.modules import causal_model
from fusedpo.model_head.score import IGNORED, Score, aligned_labels, of_tokens, on_stats
from fusedpo.model_head.tasks import after_head, at_head, hidden_and_head

__all__ = [
    "IGNORED",
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
    "install",
    "of_tokens",
    "on_stats",
    "remove_fused_head",
    "unnoticed",
]
