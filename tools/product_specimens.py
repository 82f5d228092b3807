"""The fused product, its merging kernel and the tail at every tile that is chosen, for the report.

What is counted for a logit are the bytes that have to pass between memory and the chip, and the
floating-point operations, an exponential for one: the floor that bandwidth and speed set.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from fusedpo.kernels import product_fold, product_merge, product_tile, tail, tail_terms
from tools.machine_code import Specimen

# a common head: Llama 3's
_VOCAB, _HIDDEN = 128256, 4096


def specimens(target: str) -> list[Specimen]:
    """All specimens for a target of targets.TARGETS."""
    return [*_product_fold(target), *_merge(), *_tail()]


def _product_fold(target: str) -> list[Specimen]:
    flags = ("BIAS", "SOFTCAP", "ROW_SCALE", "POSITIONS", "WEIGHTED", "SQUARES", "PLAIN")
    strides = ("bias_stride", "scale_stride", "target_stride", "positions_stride")
    found = []
    for dtype, rows in product((torch.bfloat16, torch.float32), (16, 64, 8192)):
        tile = product_tile.default_tile(target, rows, _VOCAB, _HIDDEN, dtype)
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
                    bytes=dtype.itemsize * _HIDDEN / min(rows, tile.BLOCK_N * tile.group),
                    flop=2.0 * _HIDDEN,
                )
            )
    return found


def _merge() -> list[Specimen]:
    arguments = product_merge.merge_kernel.arg_names
    return [
        Specimen(
            name="merge",
            variant="all statistics",
            kernel=product_merge.merge_kernel,
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
    for gate in tail_terms.GATES[1:]:
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
                    "LINK": c.get("link", "neg_log_sigmoid"),
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
