"""The functions of logit_tile as Triton kernels: same names, same arguments, held to them by tests.

Each kernel reads a tile once, in fp32 arithmetic. A row belongs to one program, so nothing is added
atomically and results repeat bit for bit. Offsets are 64 bits wide.

Triton puts no barrier between what a program's warps load from global memory and what they store
there. Each kernel's file says what is read and written again, and why no two threads meet; of
scalars, tools/races.py reads it from the compiled kernels.
"""

from __future__ import annotations

from fusedpo.kernels.finish import finish
from fusedpo.kernels.fold import fold
from fusedpo.kernels.jacobian import jacobian
from fusedpo.kernels.settle import settle

__all__ = ["ABSORBS_FACTORS", "finish", "fold", "jacobian", "settle"]

# A factor a row costs nothing here: the tile is in registers.
ABSORBS_FACTORS = True
