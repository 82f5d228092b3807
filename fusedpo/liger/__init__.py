"""Modules in the shape of Liger-Kernel 0.8.5's chunked losses: only an import changes.

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss      # before
    from fusedpo.liger import LigerFusedLinearDPOLoss                  # after

Constructor keywords with their defaults and order, the order of a call, what is returned and what
it means are Liger's; so are sums where this library has means, and a cross-entropy that ORPO, CPO
and SimPO add unless told not to. Added are loss types of TRL's trainers and, as keywords only, the
last five of the options that all or many classes have:

    ignore_index             label of the positions to leave out
    beta                     strength of the pull towards the reference; without one, scale of
                             log-probabilities; weight of ORPO's odds ratio, of GRPO's divergence
    compute_nll_loss, alpha  whether the chosen responses' cross-entropy is added, and times what
    label_smoothing          probability that a preference is recorded the wrong way round
    use_ref_model            whether there is a reference; without, its log-probabilities are 0
    average_log_prob         means over tokens, not sums, of policy and reference, in any loss
    compiled, chunk_size     no effect: the memory budget says how a batch is cut
    softcap                  bound of the logits, softcap tanh(z / softcap), or None
    logit_scale              factor of the logits, after softcap; both hold for the reference too
    memory_budget            bytes, or a text such as "512MiB", of a call; else by the device
    backend                  "auto", "torch" or "triton"
    gradient_tolerance       relative error a gradient may have, as of linear_logprobs; 0: none

A wrong option raises a TypeError or ValueError that names it when the module is made, a wrong
argument before any work; there ``_input``, ``lin_weight`` and ``target`` may be called hidden,
weight and labels. Calls return the loss (a scalar in fp32; fp64 for fp64 inputs), which alone is
differentiable, and a tuple of what to log; logits there are those of ignored positions, too.

Liger's mistakes are not repeated: a response without a token to score is refused in the preference
losses (there: NaN for averages); KTO's ``kl`` may be one number a response (there only with all in
one chunk); neither "luspo", a response's length times the mean over its tokens, nor importance
weights enter sums over padding; those of tokens are refused where ratios are of whole responses.
"""

from fusedpo.liger.grpo import LigerFusedLinearGRPOLoss
from fusedpo.liger.kto import LigerFusedLinearKTOLoss
from fusedpo.liger.pairs import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
