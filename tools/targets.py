"""Chips that kernels are compiled for, and how many blocks of a kernel one of their parts holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

_KIB = 1024


@dataclass(frozen=True)
class Target:
    """A chip to compile for, and what one of its multiprocessors (compute units) holds.

    NVIDIA: the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming
    Guide, and for how registers are handed out the CUDA occupancy calculator. AMD: the CDNA 3
    instruction set guide, and the AMDGPU chapter of LLVM's user guide.

    Attributes:
        name: as in a compiler's option, "sm_90".
        gpu: as Triton names it.
        matrix: the instructions of its matrix units.
        registers: 32-bit registers for each lane of all its warps: 64 Ki / 32 lanes, or 4 SIMD
            units of 512.
        register_step: a warp gets a multiple of so many.
        warps, blocks: resident at a time.
        shared: bytes of shared memory.
        block_shared: how much of it one block can have.
        reserved_shared: how much of it each block takes in addition.
        tensor_memory: columns of it; 0 if the chip has none.
    """

    name: str
    gpu: GPUTarget
    matrix: re.Pattern[str]
    registers: int
    register_step: int
    warps: int
    blocks: int
    shared: int
    block_shared: int
    reserved_shared: int
    tensor_memory: int

    @property
    def nvidia(self) -> bool:
        return self.gpu.backend == "cuda"


def _nvidia(capability: int, matrix: str, shared: int, tensor_memory: int = 0) -> Target:
    return Target(
        name=f"sm_{capability}",
        gpu=GPUTarget("cuda", capability, 32),
        matrix=re.compile(matrix),
        registers=64 * _KIB // 32,
        register_step=8,
        warps=64,
        blocks=32,
        shared=shared * _KIB,
        block_shared=(shared - 1) * _KIB,
        reserved_shared=_KIB,
        tensor_memory=tensor_memory,
    )


TARGETS = (
    _nvidia(80, "[HID]MMA", shared=164),
    _nvidia(90, "[HIQ]GMMA", shared=228),
    _nvidia(100, "UTC[A-Z]*MMA", shared=228, tensor_memory=512),
    Target(
        name="gfx942",
        gpu=GPUTarget("hip", "gfx942", 64),
        matrix=re.compile("v_s?mfmac?_"),
        registers=4 * 512,
        register_step=8,
        warps=4 * 8,
        blocks=16,
        shared=64 * _KIB,
        block_shared=64 * _KIB,
        reserved_shared=0,
        tensor_memory=0,
    ),
)


def target_named(name: str) -> Target:
    for target in TARGETS:
        if target.name == name:
            return target
    raise ValueError(f"unknown target {name!r}: one of {', '.join(t.name for t in TARGETS)}")


def occupancy(target: Target, registers: int, shared: int, tensor_memory: int, warps: int) -> float:
    """Warps of as many blocks as fit at a time, over the most a multiprocessor takes."""
    if shared > target.block_shared or tensor_memory > target.tensor_memory:
        return 0.0
    # the registers of a multiprocessor stand in 4 equal parts, and a warp lives in one of them
    step = target.register_step
    of_a_warp = max(1, -(-registers // step)) * step
    by_registers = 4 * min(target.registers // 4 // of_a_warp, target.warps // 4)
    blocks = min(target.blocks, by_registers // warps)
    taken = shared + target.reserved_shared
    if taken:
        blocks = min(blocks, target.shared // taken)
    if tensor_memory:
        blocks = min(blocks, target.tensor_memory // tensor_memory)
    return blocks * warps / target.warps
