"""The error of a model whose head cannot be fused."""

from __future__ import annotations


class UnsupportedHead(ValueError):
    """A model whose logits are not those of a weight, a bias, a soft cap and a factor."""
