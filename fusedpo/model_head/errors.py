"""The error that says why a model's head cannot be fused."""

from __future__ import annotations

from fusedpo.checks import bad_value

_REMEDY = "a loss can be given its hidden states and head directly, or its full logits be made"


class UnsupportedHead(ValueError):
    """A model whose logits are more than a weight, a bias, a soft cap and a scale of its states.

    Attributes:
        reason: the message without what to do about it.
    """

    reason: str


def unsupported(expected: str, got: str, remedy: str = "") -> UnsupportedHead:
    """The error for a model, in the form of ``fusedpo.checks``."""
    error = UnsupportedHead(str(bad_value("model", expected, got, remedy or _REMEDY)))
    error.reason = str(bad_value("model", expected, got, remedy))
    return error
