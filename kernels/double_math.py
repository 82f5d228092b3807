"""Device functions in fp64 to the last digits, without any vendor's library."""

from __future__ import annotations

import math

import triton
import triton.language as tl

_HALF_PI = tl.constexpr(math.pi / 2)
_QUARTER_PI = tl.constexpr(math.pi / 4)
# pi / 2 minus its nearest double
_HALF_PI_REST = tl.constexpr(6.123233995736766e-17)


# Triton's language has exp, log and erf in fp64; the next four have no counterpart there that also
# runs in its interpreter


@triton.jit
def log1p(x):
    """log(1 + x), fp64, for x in [-1/2, 1]; the quotient undoes the rounding of 1 + x (Kahan)."""
    one_more = x + 1.0
    rounded = one_more - 1.0
    quotient = x / tl.where(rounded == 0.0, 1.0, rounded)
    return tl.where(rounded == 0.0, x, tl.log(one_more) * quotient)


@triton.jit
def expm1(x):
    """exp(x) - 1, fp64, for x <= 700, likewise."""
    e = tl.exp(x)
    less = e - 1.0
    # exp(x) = 1 leaves x itself, and exp(x) = 0 leaves -1, where the logarithm is infinite
    inner = (less != 0.0) & (less != -1.0)
    quotient = x / tl.log(tl.where(inner, e, 2.0))
    return tl.where(less == 0.0, x, tl.where(inner, less * quotient, less))


@triton.jit
def arctan(x):
    """fp64: three ranges, and in the innermost a rational function (the coefficients of Cephes)."""
    size = tl.abs(x)
    # any borders that keep |u| below 0.66 will do; these are exact in fp32, to which a comparison
    # rounds its constants
    outer = size > 2.4375
    middle = (size > 0.65625) & (size <= 2.4375)
    # arctan u = pi/2 + arctan(-1/u) = pi/4 + arctan((u - 1) / (u + 1))
    above = tl.where(outer, -1.0, tl.where(middle, size - 1.0, size))
    below = tl.where(outer, size, tl.where(middle, size + 1.0, 1.0))
    u = above / below
    w = u * u
    p = w * -8.750608600031904122785e-1 - 1.615753718733365076637e1
    p = p * w - 7.500855792314704667340e1
    p = p * w - 1.228866684490136173410e2
    p = p * w - 6.485021904942025371773e1
    q = w + 2.485846490142306297962e1
    q = q * w + 1.650270098316988542046e2
    q = q * w + 4.328810604912902668951e2
    q = q * w + 4.853903996359136964868e2
    q = q * w + 1.945506571482613964425e2
    inner = u * (w * p / q) + u
    angle = tl.where(outer, inner + _HALF_PI_REST + _HALF_PI, inner)
    angle = tl.where(middle, inner + 0.5 * _HALF_PI_REST + _QUARTER_PI, angle)
    return tl.where(x < 0.0, -angle, angle)


@triton.jit
def tanh(x):
    """fp64, exact to the last digits for small x too."""
    less = expm1(-2.0 * tl.abs(x))
    size = -less / (less + 2.0)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def sigmoid(x):
    """fp64, to full relative precision where it is small."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (e + 1.0)
