"""The kernels of a tile of logits at every size that their functions choose, for the report.

What is counted for a logit are the bytes that have to pass between memory and the chip, and the
floating-point operations, an exponential for one: the floor that bandwidth and speed set.
"""

from __future__ import annotations

from fusedpo.kernels import finish, fold, jacobian, settle, tiles
from tools.machine_code import Specimen

# a common hidden size: Llama 3's
_HIDDEN = 4096

_FOLD_POINTERS = (
    "x_ptr",
    "out_ptr",
    "rest_ptr",
    "bias_ptr",
    "scale_ptr",
    "target_ptr",
    "peak_ptr",
    "shift_ptr",
    "steps_ptr",
    "total_ptr",
    "own_ptr",
    "weighted_ptr",
    "squares_ptr",
    "plain_ptr",
)


def specimens(target: str) -> list[Specimen]:
    """All specimens for a target of targets.TARGETS."""
    return [*_fold(), *_settle(), *_jacobian(), *_finish()]


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _fold() -> list[Specimen]:
    found = []
    for width in (1024, 4096, 16384):
        tile = tiles.whole_row_tile(width)
        for kind, x, out, options in (
            ("statistics", "fp32", None, False),
            ("statistics of bf16 products", "bf16", None, False),
            ("exponentials in bf16", "fp32", "bf16", False),
            ("exponentials in place", "fp32", "fp32", False),
            ("all options", "fp32", "bf16", True),
        ):
            found.append(
                Specimen(
                    name="fold",
                    variant=f"{kind}, {tile.block} columns",
                    kernel=fold.fold_kernel,
                    signature={
                        **dict.fromkeys(_FOLD_POINTERS, "*fp32"),
                        "x_ptr": f"*{x}",
                        "out_ptr": f"*{out or x}",
                        "bias_ptr": "*bf16",
                        "target_ptr": "*i64",
                        "x_stride": "i32",
                        "out_stride": "i32",
                        "rest_stride": "i32",
                        "start": "i32",
                        "width": "i32",
                        "hidden": "i32",
                        "softcap": "fp32",
                        "scale": "fp32",
                        "gain": "fp32",
                    },
                    constexprs={
                        **dict.fromkeys(
                            ("BIAS", "SOFTCAP", "ROW_SCALE", "WEIGHTED", "SQUARES", "PLAIN"),
                            options,
                        ),
                        "OUT": out is not None,
                        "REST": out is not None,
                        "BLOCK": tile.block,
                    },
                    divisible=(
                        *_FOLD_POINTERS,
                        "x_stride",
                        "out_stride",
                        "rest_stride",
                        "width",
                        "hidden",
                    ),
                    num_warps=tile.warps,
                    streaming=True,
                    wide_stores=out is not None,
                    narrow=32,
                    ahead=BYTES[x] * tile.block if not options else 0,
                    # in place and with all options, two programs of the longest rows may not fit
                    occupancy=0.25 if options or out == x else 0.5,
                    same={"out_ptr": "x_ptr"} if out == x else {},
                    element="logit",
                    bytes=BYTES[x] + (BYTES[out] if out else 0),
                    flop=24.0 if options else 4.0,
                )
            )
    return found


def _settle() -> list[Specimen]:
    tile = tiles.row_tile(16384)
    pointers = ("block_ptr", "target_ptr", "own_ptr", "factors_ptr")
    return [
        Specimen(
            name="settle",
            variant=f"{dtype}, {tile.block} columns",
            kernel=settle.settle_kernel,
            signature={
                **dict.fromkeys(pointers, "*fp32"),
                "block_ptr": f"*{dtype}",
                "target_ptr": "*i64",
                **dict.fromkeys(("stride", "rows", "columns", "vocab"), "i32"),
            },
            constexprs={"BLOCK": tile.block},
            divisible=(*pointers, "stride", "columns", "vocab"),
            num_warps=tile.warps,
            streaming=True,
            wide_stores=True,
            element="logit",
            bytes=2.0 * BYTES[dtype],
            flop=1.0,
        )
        for dtype in ("bf16", "fp32")
    ]


def _jacobian() -> list[Specimen]:
    pointers = (
        "x_ptr",
        "out_ptr",
        "bias_ptr",
        "scale_ptr",
        "target_ptr",
        "shift_ptr",
        "own_ptr",
        "factor_ptr",
        "tilt_ptr",
    )
    found = []
    for width in (1024, 4096):
        tile = tiles.jacobian_tile(width)
        for kind, out, factor, options in (
            ("bf16", "bf16", True, False),
            ("in place", "fp32", False, False),
            ("all options", "bf16", True, True),
        ):
            found.append(
                Specimen(
                    name="jacobian",
                    variant=f"{kind}, {width} columns",
                    kernel=jacobian.jacobian_kernel,
                    signature={
                        **dict.fromkeys(pointers, "*fp32"),
                        "out_ptr": f"*{out}",
                        "bias_ptr": "*bf16",
                        "target_ptr": "*i64",
                        **dict.fromkeys(("x_stride", "out_stride", "start", "width"), "i32"),
                        "softcap": "fp32",
                        "scale": "fp32",
                    },
                    constexprs={
                        **dict.fromkeys(("BIAS", "SOFTCAP", "ROW_SCALE", "TILT"), options),
                        "FACTOR": factor,
                        "BLOCK": tile.block,
                    },
                    divisible=(*pointers, "x_stride", "out_stride", "width"),
                    num_warps=tile.warps,
                    streaming=True,
                    wide_stores=True,
                    element="logit",
                    bytes=4.0 + BYTES[out],
                    flop=20.0 if options else 3.0,
                )
            )
    return found


def _finish() -> list[Specimen]:
    pointers = (
        "rest_ptr",
        "rest_factor_ptr",
        "weight_ptr",
        "target_ptr",
        "target_factor_ptr",
        "out_ptr",
        "positions_ptr",
    )
    tile = tiles.jacobian_tile(_HIDDEN)
    return [
        Specimen(
            name="finish",
            variant=f"to {dtype}{', scattered' if gathered else ''}",
            kernel=finish.finish_kernel,
            signature={
                **dict.fromkeys(pointers, "*fp32"),
                "weight_ptr": "*bf16",
                "out_ptr": f"*{dtype}",
                "target_ptr": "*i64",
                "positions_ptr": "*i64",
                **dict.fromkeys(("rest_stride", "weight_stride", "out_stride", "width"), "i32"),
            },
            constexprs={
                "weight_column_stride": 1,
                "GATHERED": gathered,
                "BLOCK": tile.block,
            },
            divisible=(*pointers, "rest_stride", "weight_stride", "out_stride", "width"),
            num_warps=tile.warps,
            streaming=True,
            wide_stores=True,
            element="number of a hidden row",
            bytes=6.0 + BYTES[dtype],
            flop=3.0,
        )
        for dtype, gathered in (("bf16", True), ("fp32", False))
    ]
