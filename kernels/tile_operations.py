"""The types of what is done to a tile of logits, and the two modules that do it."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from fusedpo.kernels.logit_map import LogitMap
from fusedpo.kernels.row_stats import RowStats


class TileOperations(Protocol):
    """A module with these functions: logit_tile, which defines them, or logit_tile_triton."""

    @property
    def ABSORBS_FACTORS(self) -> bool:
        """Whether a factor of ``jacobian`` costs less than scaling the hidden rows instead."""

    def fold(
        self,
        x: Tensor,
        head: LogitMap,
        target: Tensor,
        start: int,
        stats: RowStats,
        *,
        out: Tensor | None = None,
        gain: float = 1.0,
        rest: Tensor | None = None,
    ) -> None:
        """Fold a tile of products into ``stats``, in place."""

    def settle(
        self,
        block: Tensor,
        target: Tensor,
        own: Tensor,
        factors: Tensor,
        columns: int,
    ) -> None:
        """Bring rows of J, which are relative to earlier shifts, to the last one, in place."""

    def jacobian(
        self,
        x: Tensor,
        head: LogitMap,
        target: Tensor,
        start: int,
        shift: Tensor,
        own: Tensor,
        *,
        factor: Tensor | None = None,
        tilt: Tensor | None = None,
        out: Tensor,
    ) -> None:
        """Turn a tile of products into a tile of J."""

    def finish(
        self,
        rest: Tensor,
        rest_factor: Tensor,
        weight: Tensor,
        target: Tensor,
        target_factor: Tensor,
        out: Tensor,
        positions: Tensor | None,
        *,
        block: int,
    ) -> None:
        """Write dlogp/dhidden of rows whose products are complete."""


def tile_operations(backend: Literal["torch", "triton"]) -> TileOperations:
    """The operations of a backend; Triton, which not every platform has, is imported on demand."""
    if backend == "torch":
        from fusedpo.kernels import logit_tile

        return logit_tile
    from fusedpo.kernels import logit_tile_triton

    return logit_tile_triton
