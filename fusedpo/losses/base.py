"""All that the file of a loss is written with.

    PreferenceLoss, MarginLoss, ResponseLoss, RatioLoss, PolicyLoss, ClippedLoss   base classes
    hyperparameter, label_smoothing, inverse_temperature                           its fields
    flag, one_of, optional                                                         their checks
    Scores, Tokens, Input                                                          what it sees
    GradientStructure                                            when its gradient is known
    Tail, neg_log_sigmoid, exponential, clip_log, GATES, pick                      parts of formulas

Checks of numbers are in ``fusedpo.checks``: ``number``, ``positive``, ``non_negative``,
``in_range``.
"""

from __future__ import annotations

from fusedpo.engine.structure import GradientStructure
from fusedpo.losses.gates import GATES, MAP_LIMIT, clip_log, exponential
from fusedpo.losses.hyperparameters import (
    Check,
    check_hyperparameters,
    flag,
    hyperparameter,
    inverse_temperature,
    label_smoothing,
    one_of,
    optional,
)
from fusedpo.losses.links import Tail, neg_log_sigmoid
from fusedpo.losses.loss import Input, Loss, pick
from fusedpo.losses.policy import Aggregation, ClippedLoss, PolicyLoss, advantage_sign
from fusedpo.losses.preference import MarginLoss, PreferenceLoss, RatioLoss, ResponseLoss
from fusedpo.losses.scores import RATIO_LIMIT, Scores, Tokens

__all__ = [
    "GATES",
    "MAP_LIMIT",
    "RATIO_LIMIT",
    "Aggregation",
    "Check",
    "ClippedLoss",
    "GradientStructure",
    "Input",
    "Loss",
    "MarginLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "RatioLoss",
    "ResponseLoss",
    "Scores",
    "Tail",
    "Tokens",
    "advantage_sign",
    "check_hyperparameters",
    "clip_log",
    "exponential",
    "flag",
    "hyperparameter",
    "inverse_temperature",
    "label_smoothing",
    "neg_log_sigmoid",
    "one_of",
    "optional",
    "pick",
]
