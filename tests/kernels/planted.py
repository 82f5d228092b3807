"""Kernels with a known fault each, and some without, for tests/kernels/test_machine_code.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tools.machine_code import Specimen


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * stride + column, e / tl.sum(e, 0), mask=inside)


@triton.jit
def peak_kernel(
    x_ptr, peak_ptr, own_ptr, out_ptr, columns, LATE: tl.constexpr, BLOCK: tl.constexpr
):
    """exp(x - peak) with the largest number that any call has seen. LATE: as it must not be."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    if LATE:
        tl.store(own_ptr + row, tl.load(x_ptr + row * columns))
    else:
        before = tl.load(peak_ptr + row)
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=float("-inf"))
    highest = tl.max(x, 0)
    if LATE:
        before = tl.load(peak_ptr + row)
    peak = tl.maximum(before, highest)
    tl.store(peak_ptr + row, peak)
    tl.store(out_ptr + row * columns + column, tl.exp(x - peak), mask=inside)


@triton.jit
def dot_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    stride,
    size,
    out_stride,
    DOT: tl.constexpr,
    BROADCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.arange(0, BLOCK_N)
    v = tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    c = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, size, BLOCK_K):
        a = tl.load(a_ptr + n[:, None] * stride + start + k[None, :])
        b = tl.load(b_ptr + v[:, None] * stride + start + k[None, :])
        if DOT:
            c = tl.dot(a, tl.trans(b), c, input_precision="ieee")
        if BROADCAST:
            c += tl.sum(a.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :], 2)
    tl.store(c_ptr + n[:, None] * out_stride + v[None, :], c)


@triton.jit
def not_a_kernel(x_ptr):
    tl.store(x_ptr, undefined_name)  # noqa: F821


def specimens(target: str) -> list[Specimen]:
    return [
        _softmax("good"),
        _softmax("scalar loads", divisible=("out_ptr", "stride", "columns")),
        _softmax("scalar stores", divisible=("x_ptr", "stride", "columns")),
        _softmax("scalar loads and stores", divisible=()),
        # 128 numbers a thread (64 where a warp is wider), and 32 (64) registers
        _softmax("spills", num_warps=1, options={"maxnreg": 32, "waves_per_eu": 8}),
        _peak("good", LATE=False),
        # AMD's code is not looked at
        *([] if target.startswith("gfx") else [_peak("read too late", LATE=True)]),
        _dot("good"),
        _dot("broadcast", DOT=False, BROADCAST=True, BLOCK_V=16, BLOCK_K=16),
        _dot("one of two broadcast", BROADCAST=True, BLOCK_V=16, BLOCK_K=16),
        # AMD's matrix units take fp32
        *([] if target.startswith("gfx") else [_dot("fp32", kind="*fp32", BLOCK_K=16)]),
        # wgmma and tcgen05 take 64 rows at least
        *([_dot("thin", BLOCK_N=16)] if target in ("sm_90", "sm_100") else []),
        _dot("too much shared memory", num_stages=12),
        _specimen("not a kernel", "does not compile", not_a_kernel, {"x_ptr": "*fp32"}),
    ]


def _softmax(
    variant: str,
    divisible: tuple[str, ...] = ("x_ptr", "out_ptr", "stride", "columns"),
    num_warps: int = 4,
    **others,
) -> Specimen:
    return _specimen(
        "softmax",
        variant,
        softmax_kernel,
        {"x_ptr": "*fp32", "out_ptr": "*fp32", "stride": "i64", "columns": "i32"},
        constexprs={"BLOCK": 4096},
        divisible=divisible,
        num_warps=num_warps,
        streaming=True,
        wide_stores=True,
        **others,
    )


def _peak(variant: str, LATE: bool) -> Specimen:
    pointers = ("x_ptr", "peak_ptr", "own_ptr", "out_ptr")
    return _specimen(
        "peak",
        variant,
        peak_kernel,
        {**dict.fromkeys(pointers, "*fp32"), "columns": "i32"},
        constexprs={"LATE": LATE, "BLOCK": 4096},
        divisible=(*pointers, "columns"),
        ahead=4096 * 4,
        occupancy=0.5,
    )


def _dot(variant: str, kind: str = "*bf16", num_stages: int = 2, **constexprs) -> Specimen:
    usual = {"DOT": True, "BROADCAST": False, "BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_K": 64}
    return _specimen(
        "dot",
        variant,
        dot_kernel,
        {
            **{"a_ptr": kind, "b_ptr": kind, "c_ptr": "*fp32"},
            **{"stride": "i64", "size": "i32", "out_stride": "i64"},
        },
        constexprs={**usual, **constexprs},
        divisible=("a_ptr", "b_ptr", "c_ptr", "stride", "size", "out_stride"),
        num_stages=num_stages,
        matrix=True,
    )


def _specimen(name, variant, kernel, signature, **others) -> Specimen:
    return Specimen(
        name=name,
        variant=variant,
        kernel=kernel,
        signature=signature,
        element="number",
        bytes=8.0,
        flop=4.0,
        **others,
    )
