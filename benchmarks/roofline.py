"""What a GPU's bandwidth and speed allow: floors of the kernels, and a model of each route's time.

    python -m fusedpo.benchmarks.roofline [--write]

Arithmetic only: bytes and floating-point operations are counted from the shapes and from the plan,
and divided by what an H200 was measured to move and multiply. Nothing here was measured on this
library; `fusedpo bench routes` does that, and prints its ratios beside these. ``--write`` renews
benchmarks/ROOFLINE.md.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fusedpo.devices import Device
from fusedpo.engine.by_columns import widest
from fusedpo.engine.cost import Needs
from fusedpo.engine.ladder import product_tile
from fusedpo.engine.plan import Plan, RouteName
from fusedpo.engine.planner import plan

PAGE = Path(__file__).with_name("ROOFLINE.md")

# an H200: bytes a second of a copy, and bf16 operations a second of a large cuBLAS product
BANDWIDTH = 4.3e12
SPEED = 790e12
MULTIPROCESSORS = 132
GPU = Device("cuda", 141 * 10**9, MULTIPROCESSORS)

# the model: operations a second while every multiprocessor multiplies (a large product, whose waves
# all write their results, then comes to the speed above), the part of a wave's results whose
# writing nothing hides, and seconds to fill and drain a launch, and of a small kernel
FULL_SPEED = 825e12
UNHIDDEN = 0.5
LAUNCH, SMALL = 3e-6, 2e-6
# a product of fewer tiles than multiprocessors is split along its depth, in parts not below this
LEAST_DEPTH = 512
# what is assumed of the bandwidth that kernels reach
FOLD, JACOBIAN, COPY = 0.80, 0.87, 0.90
# the host: seconds of a product, a Triton kernel and a small operation; small ones a call; the rest
HOST_PRODUCT, HOST_KERNEL, HOST_SMALL = 10e-6, 25e-6, 4.5e-6
SMALL_OPERATIONS, HOST_REST = 110, 0.4e-3

TOKENS, HIDDEN, VOCAB = 8192, 4096, 128_256
HALF, SINGLE = 2, 4

# what the project asks of each route, as a ratio to its bare products: what the model says
TARGETS: dict[RouteName, float] = {
    "forward": 1.23,
    "frozen": 1.19,
    "retain": 1.15,
    "hybrid": 1.19,
    "one_pass": 1.15,
    "recompute": 1.20,
    "compact": 1.80,
}
BUDGETS: dict[RouteName, str] = {
    "forward": "256MiB",
    "frozen": "256MiB",
    "recompute": "256MiB",
    "hybrid": "1GiB",
    "retain": "4GiB",
    "one_pass": "8GiB",
    "compact": "4GiB",
}
NEEDS: dict[RouteName, tuple[Needs, ...]] = {"forward": (), "frozen": ("hidden",)}


def needs_of(route: RouteName | None) -> tuple[Needs, ...]:
    return ("hidden", "weight") if route is None else NEEDS.get(route, ("hidden", "weight"))


# of the columns, those that compact keeps for each gradient, and rows that it does exactly
KEPT, SAMPLED = 0.08, 16
# small kernels that choose them, for all slabs at once, and those of a slab
CHOOSING, LISTING = 80, 8

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


def plan_for(route: RouteName | None) -> Plan:
    """The plan of a route in its budget; None: of a call that is given neither."""
    return plan(
        TOKENS,
        VOCAB,
        HIDDEN,
        dtype=torch.bfloat16,
        budget=None if route is None else BUDGETS[route],
        needs=needs_of(route),
        scope=None if route is None else "pair",
        groups=8,
        gathered=False,
        device=GPU,
        backend="triton",
        route=route,
        gradient_tolerance=2e-3 if route == "compact" else 0.0,
        kept_share=KEPT,
    )


def sizes(whole: int, step: int) -> list[int]:
    """Sizes of the parts that are cut off a whole, with the last."""
    return [min(step, whole - begin) for begin in range(0, whole, step)]


def product_seconds(
    rows: int, cols: int, depth: int, *, result: int = SINGLE, add: bool = False
) -> float:
    """Of a product [rows, depth] [depth, cols]: whole waves of the tiles that it is cut into.

    Args:
        result: bytes of a number of the result.
        add: whether it is added to what is there, which is read first.
    """
    high, wide = product_tile(HALF)
    programs = min(
        math.ceil(rows / a) * math.ceil(cols / b) for a, b in ((high, wide), (wide, high))
    )
    numbers = MULTIPROCESSORS * high * wide  # of a wave
    parts = min(max(1, MULTIPROCESSORS // programs), max(1, depth // LEAST_DEPTH))
    multiplied = 2 * numbers * math.ceil(depth / parts) / FULL_SPEED
    written = UNHIDDEN * numbers * result * (1 + add) / BANDWIDTH
    waves = math.ceil(programs * parts / MULTIPROCESSORS)
    read = (rows + cols) * depth * HALF / BANDWIDTH
    added = 2 * parts * rows * cols * SINGLE / BANDWIDTH if parts > 1 else 0.0
    return max(waves * (multiplied + written), read) + added + LAUNCH


@dataclass
class Step:
    """The modelled time of a step, forward and backward.

    Attributes:
        bare: seconds of the products at full size, in the model too.
        products: seconds of those that are made.
        kernels: what for -> seconds of everything else on the device.
        launched, multiplied: kernels and products that are launched.
    """

    bare: float = 0.0
    products: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)
    launched: int = 0
    multiplied: int = 0

    def multiply(self, *shape: int, add: bool = False) -> None:
        self.products += product_seconds(*shape, add=add)
        self.multiplied += 1

    def move(self, what: str, size: float, share: float = COPY, launches: int = 1) -> None:
        """size: bytes; share: of the bandwidth."""
        seconds = size / (share * BANDWIDTH) + launches * SMALL
        self.kernels[what] = self.kernels.get(what, 0.0) + seconds
        self.launched += launches

    @property
    def device(self) -> float:
        return self.products + sum(self.kernels.values())

    @property
    def host(self) -> float:
        small = SMALL_OPERATIONS * HOST_SMALL + HOST_REST
        return self.multiplied * HOST_PRODUCT + self.launched * HOST_KERNEL + small

    @property
    def seconds(self) -> float:
        """The host runs ahead of the device unless it is slower."""
        return max(self.device, self.host)

    @property
    def ratio(self) -> float:
        return self.seconds / self.bare


def predicted(chosen: Plan, kept: float = KEPT) -> Step:
    """The modelled step of a plan of this shape.

    Args:
        kept: of the columns, those that compact keeps.
    """
    step = Step(bare=_bare(chosen))
    step.kernels["small kernels"] = SMALL_OPERATIONS * SMALL
    rows = {"retain": TOKENS, "one_pass": TOKENS, "hybrid": chosen.retained}
    retained = rows.get(chosen.route, 0)
    _forward(step, chosen, retained)
    if chosen.route == "compact":
        _by_columns(step, chosen, kept)
        return step
    if "hidden" in chosen.needs:
        if chosen.route != "retain":
            step.move("finish", (TOKENS - retained) * HIDDEN * (SINGLE + HALF + SINGLE))
        step.move("scaling the hidden gradient", TOKENS * HIDDEN * (SINGLE + HALF))
    if "weight" in chosen.needs:
        _head(step, chosen, retained)
    return step


def most_kept() -> float:
    """The share of the columns with which compact takes as long as the exact route does."""
    chosen, exact = plan_for("compact"), predicted(plan_for(None)).seconds
    least, most = 0.0, 1.0
    for _ in range(20):
        middle = (least + most) / 2
        pays = predicted(chosen, middle).seconds < exact
        least, most = (middle, most) if pays else (least, middle)
    return least


def _bare(chosen: Plan) -> float:
    """Of the products that a plan makes, at full size and with results in half precision."""
    logits = product_seconds(TOKENS, VOCAB, HIDDEN, result=HALF)
    gradients = {
        "hidden": product_seconds(TOKENS, HIDDEN, VOCAB, result=HALF),
        "weight": product_seconds(VOCAB, HIDDEN, TOKENS, result=HALF),
    }
    wanted = [gradients[name] for name in gradients if name in chosen.needs]
    return sum(wanted) + (chosen.products - len(wanted)) * logits


def _forward(step: Step, chosen: Plan, retained: int) -> None:
    """Statistics and, if it is wanted, the hidden gradient. retained: rows of which J is stored."""
    cols = sizes(VOCAB, chosen.cols)
    blocks = [(n, True) for n in sizes(retained, chosen.rows)]
    blocks += [(n, False) for n in sizes(TOKENS - retained, chosen.rows)]
    stored = HALF if chosen.needs else 0
    for n, retained in blocks:
        for i, v in enumerate(cols):
            step.multiply(n, v, HIDDEN)
            step.move("fold", n * v * (SINGLE + stored), FOLD)
            if chosen.route == "compact":
                step.move("column sums and main directions", 2 * n * v * HALF, launches=2)
            elif "hidden" in chosen.needs:
                # the running sum starts from zeros
                step.multiply(n, HIDDEN, v, add=i > 0 or not retained)
        if retained:
            step.move("settle", MOVED * n * VOCAB * 2 * HALF)


def _by_columns(step: Step, chosen: Plan, kept: float) -> None:
    """Both gradients by kept columns, a slab of rows at a time."""
    columns = math.ceil(kept * VOCAB)
    head = VOCAB * HIDDEN
    step.move("the weight's main directions", head * HALF)
    step.move("zeros in the head's gradient", head * SINGLE)
    slabs = sizes(TOKENS, chosen.slab)
    # each reads and writes a number of each column and slab
    step.move("choice of columns", 2 * CHOOSING * len(slabs) * VOCAB * SINGLE, launches=CHOOSING)
    for n in slabs:
        step.move("small kernels of slabs", n * HIDDEN * HALF, launches=LISTING)
        for v in sizes(columns, chosen.back_cols):
            step.move("gathering the weight", v * HIDDEN * 2 * HALF)
            step.multiply(n, v, HIDDEN)
            step.move("jacobian", n * v * (SINGLE + HALF), JACOBIAN)
            step.multiply(n, HIDDEN, v, add=True)
            step.multiply(v, HIDDEN, n)
            step.move("adding to the head's gradient", v * HIDDEN * 3 * SINGLE)
    for v in sizes(VOCAB, widest(VOCAB, chosen.slab, chosen.back_cols, narrow=False)):
        step.multiply(SAMPLED, v, HIDDEN)
        step.multiply(SAMPLED + len(slabs), HIDDEN, v, add=True)
    step.move("what is left out of the head's gradient", head * 2 * SINGLE)
    step.move("the size of the head's gradient", head * SINGLE)
    step.move("rounding the head's gradient", head * (SINGLE + HALF))
    # zeros, directions, main directions, factors and size
    states = TOKENS * HIDDEN
    step.move("what is left out of the hidden gradient", states * 9 * SINGLE, launches=13)
    step.move("rounding the hidden gradient", states * (SINGLE + HALF))


def _head(step: Step, chosen: Plan, retained: int) -> None:
    """The head's gradient, a slice of the vocabulary at a time."""
    slabs = chosen.route == "one_pass"
    height = chosen.slab if slabs else chosen.back_rows
    blocks = [*sizes(retained, height), *sizes(TOKENS - retained, height)]
    for v in sizes(VOCAB, chosen.cols if slabs else chosen.back_cols):
        done = 0
        for n in blocks:
            if done >= retained:
                step.multiply(n, v, HIDDEN)
                step.move("jacobian", n * v * (SINGLE + HALF), JACOBIAN)
            step.multiply(v, HIDDEN, n, add=done > 0)
            done += n
        step.move("rounding the head's gradient", v * HIDDEN * (SINGLE + HALF))
    if retained:  # anew for each slice, unless all rows are one block
        times = 1 if slabs or height >= TOKENS else len(sizes(VOCAB, chosen.back_cols))
        step.move("weighted rows", times * retained * HIDDEN * 2 * HALF, launches=times)


def _about_routes() -> str:
    return f"""
A model, not a measurement. A product is cut into tiles of 128 x 256, of which each of
{MULTIPROCESSORS} multiprocessors makes one at a time, so that its last wave costs as much as a full
one, and the last tile of a vocabulary often more than its columns; of fewer tiles, each is split
along its depth, in parts of at least {LEAST_DEPTH}, as cuBLAS may do. While all multiply they do
{FULL_SPEED / 1e12:g} TFLOP/s; half of the writing of a wave's results is hidden, which are fp32,
and read too where they are added to. A launch takes {LAUNCH * 1e6:g} µs to fill and drain, a small
kernel {SMALL * 1e6:g} µs. Of the bandwidth the fold reaches {FOLD:.0%}, jacobian {JACOBIAN:.0%},
copies {COPY:.0%}. The host takes {HOST_PRODUCT * 1e6:g} µs a product, {HOST_KERNEL * 1e6:g} µs a
kernel and {(SMALL_OPERATIONS * HOST_SMALL + HOST_REST) * 1e3:.1f} ms for the rest of a step, ahead
of the device. The bare products are those at full size in the same model, with results in half
precision. For compact {KEPT:.0%} of the columns are assumed to be kept; with {most_kept():.0%} it
takes as long as the exact route. A target is what the model says, rounded up.
"""


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
        *textwrap.wrap(_about_routes(), 100),
        "",
        "| route | products | bare | its products | its kernels | host | step | ratio | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    details = []
    for route in (*TARGETS, None):
        chosen = plan_for(route)
        step = predicted(chosen)
        name = route or f"not told, {chosen.route}"
        beyond = sum(step.kernels.values())
        lines.append(
            f"| {name} | {chosen.products:.4g} | {step.bare * 1e3:.1f} ms "
            f"| {step.products * 1e3:.1f} ms | {beyond * 1e3:.2f} ms | {step.host * 1e3:.1f} ms "
            f"| {step.seconds * 1e3:.1f} ms | {step.ratio:.2f} "
            f"| {TARGETS[chosen.route]:.2f} |"
        )
        parts = ", ".join(f"{what} {each * 1e3:.2f} ms" for what, each in step.kernels.items())
        details.append(f"- **{name}** (`{chosen}`): {parts}.")
    return "\n".join([*lines, "", *details, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew benchmarks/ROOFLINE.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    print(page())


if __name__ == "__main__":
    main()
