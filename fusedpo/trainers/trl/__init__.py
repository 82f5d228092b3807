"""TRL's trainers, without logits: one line in a script.

    from fusedpo.trainers.trl import patch

    patch()  # before the trainer is built

or, without touching TRL, ``FusedDPOTrainer`` in the place of ``DPOTrainer``, and likewise for
``FusedCPOTrainer``, ``FusedKTOTrainer``, ``FusedORPOTrainer``, ``FusedGRPOTrainer``,
``FusedRLOOTrainer``, ``FusedSFTTrainer`` and ``FusedTPOTrainer``.

The formulas, metrics and everything else stay TRL's. What is replaced is where log-probabilities
come from, in the version of TRL that is installed:

- 1.15 and later: ``add_fused_lm_head``, which gives DPO, KTO, GRPO, RLOO and SFT their statistics
  of the tokens;
- CPO (with SimPO and AlphaPO), ORPO: ``concatenated_forward``, and TPO's ``_compute_loss``, which
  would make logits;
- 0.29 to 1.14: DPO, KTO, GRPO, RLOO and SFT make logits, which are lazy (``fusedpo.lazy_logits``).

A model whose head is not a weight, a bias, a soft cap and a scale makes its own logits, with one
warning; so does a trainer whose own code keeps the model's forward from running.

Other versions of TRL are refused (earlier ones) or warned of (later ones), and so are trainers that
somebody else has put in the place of TRL's. A trainer whose first step calls nothing of what was
replaced says so, once.
"""

from __future__ import annotations

import os

# TRL says on import that its experimental trainers may go; who patches them has heard
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

try:
    import datasets as _datasets  # noqa: F401
    import trl as _trl  # noqa: F401
except ImportError as error:
    raise ImportError("fusedpo.trainers.trl needs TRL: pip install 'fusedpo[trl]'") from error

from fusedpo.trainers.trl.configs import FusedDPOConfig, FusedGRPOConfig
from fusedpo.trainers.trl.patching import patch, patched, unpatch
from fusedpo.trainers.trl.trainers import (
    FusedCPOTrainer,
    FusedDPOTrainer,
    FusedGRPOTrainer,
    FusedKTOTrainer,
    FusedORPOTrainer,
    FusedRLOOTrainer,
    FusedSFTTrainer,
    FusedTPOTrainer,
)

__all__ = [
    "FusedCPOTrainer",
    "FusedDPOConfig",
    "FusedDPOTrainer",
    "FusedGRPOConfig",
    "FusedGRPOTrainer",
    "FusedKTOTrainer",
    "FusedORPOTrainer",
    "FusedRLOOTrainer",
    "FusedSFTTrainer",
    "FusedTPOTrainer",
    "patch",
    "patched",
    "unpatch",
]
