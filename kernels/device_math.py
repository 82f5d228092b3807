"""Device functions that more than one kernel uses. They need no vendor's library, so they run in
Triton's interpreter too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedpo.kernels import interpreter

interpreter.mend()


@triton.jit
def tanh(x):
    """tanh in fp32 to about 1.5 units in the last place; 2.5 where exp and division are a GPU's.

    That much by arithmetic: theirs are off by up to 2 units, and it was not run on one.

    Near 0, where 1 - 2 / (exp(2x) + 1) cancels, x + x^3 P(x^2) with the minimax polynomial of
    Cephes' tanhf.
    """
    square = x * x
    p = -5.70498872745e-3
    p = p * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = x + x * square * p
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def two_to_the(exponent):
    """2^exponent in fp32 for whole numbers from -126 to 127, exactly; smaller ones count as -126.

    From the bits: the hardware's exp2 is an approximation.
    """
    bits = (tl.maximum(exponent, -126.0) + 127.0).to(tl.int32) << 23
    return bits.to(tl.float32, bitcast=True)
