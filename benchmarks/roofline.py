"""What a GPU's bandwidth and speed allow: floors of the kernels, and predictions for the routes.

    python -m fusedpo.benchmarks.roofline [--write]

Arithmetic only: bytes and floating-point operations are counted from the shapes and from the plan,
and divided by what an H200 was measured to move and multiply. Nothing here was measured on this
library; benchmarks/gpu.py does that, and prints its ratios beside these. ``--write`` renews
benchmarks/ROOFLINE.md.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedpo.engine.plan import Plan
from fusedpo.engine.planner import plan

PAGE = Path(__file__).with_name("ROOFLINE.md")

# an H200: bytes a second of a copy, and bf16 operations a second of a large cuBLAS product
BANDWIDTH = 4.3e12
SPEED = 790e12

TOKENS, HIDDEN, VOCAB = 8192, 4096, 128_256
HALF, SINGLE = 2, 4

# what the project asks of each route, as a ratio to its bare products
TARGETS = {"forward": 1.10, "frozen": 1.12, "retain": 1.12, "one_pass": 1.20, "recompute": 1.12}
BUDGETS = {
    "forward": "256MiB",
    "frozen": "256MiB",
    "recompute": "256MiB",
    "retain": "4GiB",
    "one_pass": "8GiB",
}
NEEDS = {"forward": (), "frozen": ("hidden",)}

# of the exponentials that were stored, those whose row's shift has risen since: half of the tiles
# come before a rise if its place is any
MOVED = 0.5


@dataclass(frozen=True)
class Kernel:
    """Traffic and work of a kernel for the whole problem."""

    name: str
    element: str
    elements: float
    bytes: float  # per element
    flop: float  # per element

    @property
    def seconds(self) -> float:
        return max(self.elements * self.bytes / BANDWIDTH, self.elements * self.flop / SPEED)


def kernels() -> list[Kernel]:
    logits, states = TOKENS * VOCAB, TOKENS * HIDDEN
    return [
        Kernel("fold, statistics only", "logit", logits, SINGLE, 4),
        Kernel("fold, with exponentials", "logit", logits, SINGLE + HALF, 4),
        Kernel("settle, where a shift has risen", "logit", logits * MOVED, 2 * HALF, 1),
        Kernel("jacobian", "logit", logits, SINGLE + HALF, 3),
        Kernel("finish", "number of a hidden row", states, SINGLE + HALF + SINGLE, 3),
        Kernel("product and fold", "logit", logits, HIDDEN * HALF / 2048, 2 * HIDDEN),
        Kernel("tail, 64 sequences of 512", "token", 64 * 512, 12, 60),
    ]


def plan_for(route: str) -> Plan:
    return plan(
        TOKENS,
        VOCAB,
        HIDDEN,
        dtype=torch.bfloat16,
        budget=BUDGETS[route],
        needs=NEEDS.get(route, ("hidden", "weight")),
        scope="pair",
        groups=8,
        gathered=False,
        device="cuda",
        backend="triton",
        route=route,  # type: ignore[arg-type]
    )


def traffic(chosen: Plan) -> dict[str, float]:
    """Bytes that a route moves beyond what its bare products do, by what for."""
    route = chosen.route
    logits, states, head = TOKENS * VOCAB, TOKENS * HIDDEN, VOCAB * HIDDEN
    tiles = math.ceil(VOCAB / chosen.cols)
    found: dict[str, float] = {"fold": logits * (SINGLE if route == "forward" else SINGLE + HALF)}
    if route == "forward":
        return found
    # products of a row block with slices of the head, added up in memory
    found["sums of row products"] = states * SINGLE * (2 * tiles - 1)
    if route in ("frozen", "recompute"):
        found["finish"] = states * (SINGLE + HALF + SINGLE)
    if route in ("retain", "one_pass"):
        found["settle"] = MOVED * logits * 2 * HALF
    found["scaling the hidden gradient"] = states * (SINGLE + HALF)
    if route == "frozen":
        return found
    if route == "recompute":
        found["jacobian"] = logits * (SINGLE + HALF)
    else:
        found["weighted rows"] = states * 2 * HALF
    if route == "one_pass":
        slabs = math.ceil(TOKENS / chosen.slab)
        found["sums of the head's gradient"] = head * SINGLE * 2 * slabs
    else:
        blocks = math.ceil(TOKENS / chosen.back_rows)
        found["sums of the head's gradient"] = head * SINGLE * (2 * blocks - 1)
    found["rounding the head's gradient"] = head * (SINGLE + HALF)
    return found


def predicted(chosen: Plan) -> tuple[float, float]:
    """(seconds of the bare products, seconds of the traffic)."""
    products = chosen.products * 2 * TOKENS * VOCAB * HIDDEN / SPEED
    return products, sum(traffic(chosen).values()) / BANDWIDTH


def page() -> str:
    lines = [
        "# Roofline",
        "",
        "Written by `python -m fusedpo.benchmarks.roofline --write`. Arithmetic, not measurement:",
        "bytes and operations counted from the shapes, over what an H200 was measured to move",
        f"({BANDWIDTH / 1e12:g} TB/s) and to multiply in bf16 ({SPEED / 1e12:g} TFLOP/s). Shapes:",
        f"{TOKENS} tokens, hidden size {HIDDEN}, vocabulary {VOCAB},",
        "bf16 inputs, fp32 logits.",
        "",
        "## Kernels",
        "",
        "| kernel | element | bytes | flop | elements | floor |",
        "|---|---|---|---|---|---|",
    ]
    for k in kernels():
        time = f"{k.seconds * 1e3:.2f} ms" if k.seconds > 1e-5 else f"{k.seconds * 1e6:.2f} µs"
        lines.append(
            f"| {k.name} | {k.element} | {k.bytes:g} | {k.flop:g} | {k.elements:.3g} | {time} |"
        )
    lines += [
        "",
        "The tail waits for latency and launches, not for bytes.",
        "",
        "## Routes",
        "",
        "What a route moves beyond its products is added in full, as if nothing overlapped. The",
        "products are taken at the speed of a large one. A tile's products are slower: their last",
        "wave of programs is not full, and their results are fp32. So the ratios are lower bounds,",
        "reached where every kernel reaches the bandwidth and no product is slowed; how much",
        "slower they are, section products of benchmarks/gpu.py measures.",
        "",
        "| route | products | at that speed | beyond them | least ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    details = []
    for route, target in TARGETS.items():
        chosen = plan_for(route)
        products, rest = predicted(chosen)
        lines.append(
            f"| {route} | {chosen.products} | {products * 1e3:.1f} ms | {rest * 1e3:.2f} ms "
            f"| {1 + rest / products:.2f} | {target:.2f} |"
        )
        parts = ", ".join(
            f"{name} {size / BANDWIDTH * 1e3:.2f} ms" for name, size in traffic(chosen).items()
        )
        details.append(f"- **{route}** (`{chosen}`): {parts}.")
    return "\n".join([*lines, "", *details, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew benchmarks/ROOFLINE.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    print(page())


if __name__ == "__main__":
    main()
