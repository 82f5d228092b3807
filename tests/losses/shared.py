"""Properties that every pair loss has by existing. A loss's own test file adds its formula."""

from __future__ import annotations

import torch

from fusedpo.losses import Loss, PairLoss, available
from fusedpo.scores import Scores


def pair_losses() -> list[Loss]:
    """Every pair loss of the library, with its defaults."""
    return [cls() for cls in available().values() if issubclass(cls, PairLoss)]


def scores(
    seed: int, pairs: int = 5, *, reference: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Scores, Scores]:
    """Ragged random scores of some pairs: (chosen, rejected)."""
    g = torch.Generator().manual_seed(seed)

    def side() -> Scores:
        length = torch.randint(1, 40, (pairs,), generator=g).to(dtype)
        logp = -torch.rand(pairs, generator=g, dtype=dtype) * 3 * length
        ref = logp + torch.randn(pairs, generator=g, dtype=dtype)
        return Scores(logp, length, ref if reference else None)

    return side(), side()


def for_loss(loss: Loss, seed: int, **options) -> tuple[Scores, Scores]:
    return scores(seed, reference=loss.needs_reference, **options)
