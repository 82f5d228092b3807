"""The error that says why a model's head cannot be fused."""

from __future__ import annotations

from fusedpo.checks import bad_value


class UnsupportedHead(ValueError):
    """A model whose logits are more than a weight, a bias, a soft cap and a scale of its states."""


def unsupported(expected: str, got: str, remedy: str = "") -> UnsupportedHead:
    """The error for a model, in the form of ``fusedpo.checks``."""
    return UnsupportedHead(str(bad_value("model", expected, got, remedy)))
