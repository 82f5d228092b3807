"""Every kernel at every tile that its functions choose, for the report on machine code.

What is counted for a logit are the bytes that have to pass between memory and the chip, and the
floating-point operations, an exponential for one: the floor that bandwidth and speed set.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from fusedpo.kernels import logit_tile_triton, product_fold, tail, tiles
from fusedpo.kernels.machine_code import Specimen

# a common head: Llama 3's
_VOCAB, _HIDDEN = 128256, 4096

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
    """All specimens for a target of machine_code.TARGETS."""
    return [
        *_fold(),
        *_settle(),
        *_jacobian(),
        *_finish(),
        *_product_fold(target),
        *_merge(),
        *_tail(),
    ]


def _bytes_of(dtype: str) -> int:
    return {"fp32": 4, "bf16": 2, "fp16": 2}[dtype]


def _fold() -> list[Specimen]:
    found = []
    widths = (1024, 4096, 16384)
    for width, whole in (*product(widths, [True]), (widths[-1] + 1, False)):
        tile = tiles.row_tile(width)
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
                    variant=f"{kind}, {tile.block} columns{'' if whole else ' at a time'}",
                    kernel=logit_tile_triton.fold_kernel,
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
                        "WHOLE": whole,
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
                    ahead=_bytes_of(x) * tile.block if whole and not options else 0,
                    # in place and with all options, two programs of the longest rows may not fit
                    occupancy=0.25 if options or out == x else 0.5,
                    same={"out_ptr": "x_ptr"} if out == x else {},
                    element="logit",
                    bytes=_bytes_of(x) + (_bytes_of(out) if out else 0),
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
            kernel=logit_tile_triton.settle_kernel,
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
            bytes=2.0 * _bytes_of(dtype),
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
                    kernel=logit_tile_triton.jacobian_kernel,
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
                    bytes=4.0 + _bytes_of(out),
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
            kernel=logit_tile_triton.finish_kernel,
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
            bytes=6.0 + _bytes_of(dtype),
            flop=3.0,
        )
        for dtype, gathered in (("bf16", True), ("fp32", False))
    ]


def _product_fold(target: str) -> list[Specimen]:
    flags = ("BIAS", "SOFTCAP", "ROW_SCALE", "POSITIONS", "WEIGHTED", "SQUARES", "PLAIN")
    strides = ("bias_stride", "scale_stride", "target_stride", "positions_stride")
    found = []
    for dtype, rows in product((torch.bfloat16, torch.float32), (16, 64, 8192)):
        tile = product_fold.default_tile(target, rows, _VOCAB, _HIDDEN, dtype)
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        for options in (False, True):
            operands = {"hidden": f"*{name}", "weight": f"*{name}"}
            if tile.tma:
                # gathered rows are no rectangle of memory
                k, n, v = tile.BLOCK_K, tile.BLOCK_N, tile.BLOCK_V
                operands["weight"] = f"tensordesc<{name}[{v}, {k}]>"
                if not options:
                    operands["hidden"] = f"tensordesc<{name}[{n}, {k}]>"
            pointers = [a for a, kind in operands.items() if kind.startswith("*")]
            others = ("bias_ptr", "scale_ptr", "target_ptr", "positions_ptr", "part_ptr")
            # what a matrix unit multiplies at a time; fewer rows wait for memory anyway
            fewest = {"sm_90": 64, "sm_100": 64}.get(target, 16)
            found.append(
                Specimen(
                    name="product_fold",
                    variant=f"{name}, {rows} rows{', all options' if options else ''}",
                    kernel=product_fold.product_fold_kernel,
                    signature={
                        **dict.fromkeys(product_fold.product_fold_kernel.arg_names, "i32"),
                        **operands,
                        "bias_ptr": f"*{name}",
                        "scale_ptr": "*fp32",
                        "target_ptr": "*i64",
                        "positions_ptr": "*i64",
                        "part_ptr": "*fp32",
                        "softcap": "fp32",
                        "scale": "fp32",
                    },
                    constexprs={
                        **dict.fromkeys(flags, options),
                        **dict.fromkeys(strides, 1),
                        "WHOLE_K": True,
                        "WIDEN": False,
                        "TMA_HIDDEN": operands["hidden"].startswith("tensordesc"),
                        "TMA_WEIGHT": tile.tma,
                        "BLOCK_N": tile.BLOCK_N,
                        "BLOCK_V": tile.BLOCK_V,
                        "BLOCK_K": tile.BLOCK_K,
                    },
                    divisible=(
                        *pointers,
                        *others,
                        "hidden_stride",
                        "weight_stride",
                        "size",
                        "vocab",
                    ),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    matrix=dtype == torch.bfloat16 and fewest <= tile.BLOCK_N,
                    element="logit",
                    # the weight once a group of row blocks; hidden stays in the cache
                    bytes=_bytes_of(name) * _HIDDEN / min(rows, tile.BLOCK_N * tile.group),
                    flop=2.0 * _HIDDEN,
                )
            )
    return found


def _merge() -> list[Specimen]:
    arguments = product_fold.merge_kernel.arg_names
    return [
        Specimen(
            name="merge",
            variant="all statistics",
            kernel=product_fold.merge_kernel,
            signature={
                **dict.fromkeys(arguments, "i32"),
                "part_ptr": "*fp32",
                "target_ptr": "*i64",
                "out_ptr": "*fp32",
            },
            constexprs={
                "target_stride": 1,
                **dict.fromkeys(("WEIGHTED", "SQUARES", "PLAIN"), True),
                "BLOCK": 128,
            },
            divisible=("part_ptr", "target_ptr", "out_ptr"),
            element="row and split",
            bytes=24.0,
            flop=20.0,
        )
    ]


def _tail() -> list[Specimen]:
    compositions: dict[str, dict[str, Any]] = {
        "sums, log-sigmoid of a pair": {"reference": "*fp64"},
        "means, hinge of a pair": {"aggregate": "mean", "link": "hinge"},
        "means, squares of a pair": {"aggregate": "mean", "link": "squared", "reference": "*fp64"},
    }
    for gate in tail.GATES[1:]:
        compositions[f"{gate}, means, exp, linear"] = {
            "gate": gate,
            "aggregate": "mean",
            "sequence_map": "exp",
            "combine": "single",
            "link": "linear",
            "baseline": "*fp32",
            "tau": "*fp64",
            "weight": "*fp64",
        }
    optional = ("baseline", "reference", "tau", "weight")
    found = []
    for variant, c in compositions.items():
        given = [name for name in optional if name in c]
        found.append(
            Specimen(
                name="tail",
                variant=variant,
                kernel=tail.tail_kernel,
                signature={
                    "logprob": "*fp32",
                    "starts": "*i64",
                    "lengths": "*i64",
                    **{name: c[name] for name in given},
                    "loss": "*fp64",
                    "score": "*fp64",
                    "gradient": "*fp32",
                    "scale": "fp64",
                    "shift": "fp64",
                    "smoothing": "fp64",
                },
                constexprs={
                    **{name: None for name in optional if name not in c},
                    "GATE": c.get("gate", "identity"),
                    "AGGREGATE": c.get("aggregate", "sum"),
                    "MAP": c.get("sequence_map", "identity"),
                    "COMBINE": c.get("combine", "pair"),
                    "LINK": c.get("link", "log_sigmoid"),
                    "BLOCK": tail.BLOCK,
                },
                divisible=("logprob", "starts", "lengths", *given, "loss", "score", "gradient"),
                num_warps=tail.WARPS,
                element="token",
                bytes=12.0 if "baseline" not in c else 20.0,
                flop=2.0 if "gate" not in c else 60.0,
            )
        )
    return found
