"""Whole steps of every route against the bare products that it cannot do without.

A step is forward and backward of SimPO. The bare products are those of cuBLAS at exactly these
shapes, in the operands' dtype, timed in the same rounds: hidden W^T, J W and J^T hidden. A route's
ratio is its step over the products that it makes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fusedpo
from fusedpo.benchmarks import roofline
from fusedpo.benchmarks.peers import PEERS, step, why_not
from fusedpo.benchmarks.section import Section, Setting, Verdict, number, quotient
from fusedpo.benchmarks.shapes import MIB, Case, Inputs, Shape, make_inputs
from fusedpo.benchmarks.timing import Deadline, Measured
from fusedpo.engine.cost import Backend
from fusedpo.engine.plan import Plan, RouteName

# more than either backend's rounding in half precision makes of a gradient, and less than a lost
# tile does
GRADIENT_DIFFERENCE = 0.05
LOSS_DIFFERENCE = 0.01

Step = Callable[[], object]


@dataclass(frozen=True)
class Way:
    """A route on a backend."""

    route: RouteName
    backend: Backend
    fused: bool | None = None
    budget: str | None = None  # None: the route's, in benchmarks/roofline.py

    def __str__(self) -> str:
        parts = (self.route, "fused" if self.fused else self.backend, self.budget)
        return ", ".join(part for part in parts if part)

    @property
    def trains_head(self) -> bool:
        return "weight" in self.needs

    @property
    def tolerance(self) -> float:
        """Of the gradients: that of rounding to bf16, where there can be one."""
        return 2e-3 if self.route == "compact" else 0.0

    @property
    def needs(self) -> tuple[Any, ...]:
        return roofline.NEEDS.get(self.route, ("hidden", "weight"))

    def plan(self, setting: Setting, shape: Shape) -> Plan:
        return fusedpo.plan(
            shape.positions,
            shape.vocab,
            shape.hidden,
            dtype=setting.dtype,
            needs=self.needs,
            scope="pair",
            groups=shape.pairs,
            # one_pass takes a pair's rows side by side
            gathered=self.route == "one_pass" and shape.pairs > 1,
            device=setting.device,
            backend=self.backend,
            route=self.route,
            fused=self.fused,
            gradient_tolerance=self.tolerance,
            budget=self.budget or roofline.BUDGETS[self.route],
        )

    def forward(
        self, chosen: Plan, shape: Shape, inputs: Inputs, *, counted: bool = True
    ) -> fusedpo.LossOutput:
        """counted: the number of scored tokens is handed over, so that nothing waits for it."""
        with torch.set_grad_enabled(self.route != "forward"):
            return fusedpo.preference_loss(
                fusedpo.losses.SimPO(beta=2.0, gamma=0.5),
                inputs.hidden,
                inputs.weight if self.trains_head else inputs.weight.detach(),
                inputs.labels,
                memory_budget=chosen,
                backend=self.backend,
                gradient_tolerance=self.tolerance,
                num_scored=[shape.tokens] * (2 * shape.pairs) if counted else None,
            )

    def step(self, setting: Setting, shape: Shape, inputs: Inputs, *, counted: bool = True) -> Step:
        """A whole step, which leaves no gradient behind."""
        chosen = self.plan(setting, shape)

        def run() -> None:
            out = self.forward(chosen, shape, inputs, counted=counted)
            if self.route != "forward":
                out.loss.backward()
            clear(inputs)

        return run


KERNEL_WAYS = tuple(Way(route, "triton") for route in roofline.TARGETS)
OTHER_WAYS = (
    Way("forward", "triton", fused=True),
    *(Way(route, "torch") for route in roofline.TARGETS),
)


def case_of(setting: Setting, shape: Shape, peer: str = "full_logits") -> Case:
    dtype = str(setting.dtype).removeprefix("torch.")
    case = Case(peer, shape, dtype, setting.device)
    return replace(case, budget=case.logits_bytes // 10)


def clear(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None


def flop(shape: Shape) -> float:
    """Of one product."""
    return 2.0 * shape.positions * shape.vocab * shape.hidden


def bare_products(inputs: Inputs) -> dict[str, Step]:
    """The three products, on the exponentials that a Jacobian is made of."""
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    logits = hidden @ weight.T
    jacobian = torch.softmax(logits, 1)
    states, head = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "hidden W^T": lambda: torch.mm(hidden, weight.T, out=logits),
        "J W": lambda: torch.mm(jacobian, weight, out=states),
        "J^T hidden": lambda: torch.mm(jacobian.T, hidden, out=head),
    }


def bare_seconds(chosen: Plan, times: dict[str, Measured]) -> float | None:
    """Of the products that a plan makes; None if one of them was not timed."""
    gradients = [("hidden", "J W"), ("weight", "J^T hidden")]
    made = {product: 1.0 for need, product in gradients if need in chosen.needs}
    made["hidden W^T"] = chosen.products - len(made)
    found = [(count, times[name].median) for name, count in made.items()]
    known = [count * seconds for count, seconds in found if seconds is not None]
    return sum(known) if len(known) == len(found) else None


def predicted_ratio(name: str, chosen: Plan, setting: Setting) -> float | None:
    """That of benchmarks/ROOFLINE.md, if that is about this way and shape."""
    if name not in map(str, KERNEL_WAYS):
        return None
    about = (roofline.TOKENS, roofline.VOCAB, roofline.HIDDEN, torch.bfloat16)
    if setting.dry or (chosen.tokens, chosen.vocab, chosen.hidden, chosen.dtype) != about:
        return None
    return roofline.predicted(chosen).ratio


@dataclass(frozen=True)
class Reference:
    """What full logits give: the loss, and both gradients."""

    loss: float
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, setting: Setting, inputs: Inputs) -> Reference:
        loss = step(case_of(setting, setting.shape), inputs)
        gradients = {"hidden": inputs.hidden.grad, "weight": inputs.weight.grad}
        clear(inputs)
        return cls(float(loss), {name: g for name, g in gradients.items() if g is not None})

    def differences(self, way: Way, chosen: Plan, shape: Shape, inputs: Inputs) -> dict[str, float]:
        """Relative difference of the loss, and of each gradient that the way delivers."""
        out = way.forward(chosen, shape, inputs)
        found = {"loss": abs(float(out.loss.detach()) / self.loss - 1)}
        if way.route != "forward":
            out.loss.backward()
            got = {"hidden": inputs.hidden.grad, "weight": inputs.weight.grad}
            for name in way.needs:
                found[name] = _relative(got[name], self.gradients[name])
        clear(inputs)
        return found


def _relative(got: Tensor | None, expected: Tensor) -> float:
    if got is None:
        return float("inf")
    # a block of rows at a time: a head in fp32 takes gigabytes
    gap = size = 0.0
    for mine, truth in zip(got.split(8192), expected.split(8192), strict=True):
        exact = truth.to(torch.promote_types(truth.dtype, torch.float32))
        gap += float((mine.to(exact.dtype) - exact).square().sum(dtype=torch.float64))
        size += float(exact.square().sum(dtype=torch.float64))
    return (gap / size) ** 0.5 if size else float("inf")


def routes(setting: Setting, deadline: Deadline) -> Section:
    """Every route and backend, other programs, and the bare products, in the same rounds."""
    shape = setting.shape
    section = Section(
        f"forward and backward of SimPO, {shape}, {str(setting.dtype)[6:]}",
        (
            "what",
            "ms",
            "quartiles",
            "host ms",
            "its products ms",
            "ratio",
            "predicted",
            "difference",
        ),
    )
    inputs = make_inputs(case_of(setting, shape))
    reference = Reference.of(setting, inputs)
    functions: dict[str, Step] = dict(bare_products(inputs))
    plans: dict[str, Plan] = {}
    differences: dict[str, dict[str, float]] = {}
    for way in (*KERNEL_WAYS, *OTHER_WAYS):
        if deadline.over:
            section.ran_out.append(str(way))
            continue
        try:
            plans[str(way)] = chosen = way.plan(setting, shape)
            differences[str(way)] = reference.differences(way, chosen, shape, inputs)
        except Exception as error:
            section.wrong.append(f"{way}: {type(error).__name__}: {error}")
            clear(inputs)
            continue
        section.wrong += faults(str(way), differences[str(way)])
        functions[str(way)] = way.step(setting, shape, inputs)
    del reference
    missing = {}
    for peer in setting.peers:
        case = case_of(setting, shape, peer)
        if deadline.over:
            section.ran_out.append(PEERS[peer].label)
        elif reason := why_not(case):
            missing[PEERS[peer].label] = reason
        else:
            functions[PEERS[peer].label] = _peer_step(case, inputs)
    times = setting.clock.interleaved(functions, setting.rounds, deadline)

    for name, taken in times.items():
        if taken.missing and name in plans:
            section.wrong.append(f"{name}: {taken.missing}")
        _report(section, setting, name, taken, times, plans.get(name), differences.get(name, {}))
    for name, reason in missing.items():
        section.add({"name": name, "missing": reason}, name, *"-" * 6, reason)
    for way in KERNEL_WAYS:
        ratio = next((row["ratio"] for row in section.rows if row["name"] == str(way)), None)
        at_most = roofline.TARGETS[way.route]
        section.verdicts.append(Verdict(f"{way} / its products", ratio, at_most=at_most))
    return section


def _peer_step(case: Case, inputs: Inputs) -> Step:
    def run() -> None:
        step(case, inputs)
        clear(inputs)

    return run


def faults(name: str, differences: dict[str, float]) -> list[str]:
    """Where a way is not what full logits are, in words."""
    return [
        f"{name}: its {what} differs from that of full logits by {gap:.1e}"
        for what, gap in differences.items()
        if not gap <= (LOSS_DIFFERENCE if what == "loss" else GRADIENT_DIFFERENCE)
    ]


def _report(
    section: Section,
    setting: Setting,
    name: str,
    taken: Measured,
    times: dict[str, Measured],
    chosen: Plan | None,
    differences: dict[str, float],
) -> None:
    products = None if chosen is None else bare_seconds(chosen, times)
    ratio = quotient(taken.median, products)
    predicted = None if chosen is None else predicted_ratio(name, chosen, setting)
    speed_ = quotient(flop(setting.shape), taken.median) if name in _BARE else None
    low, high = taken.quartiles or (None, None)
    worst = max(differences.values(), default=None)
    note = "" if worst is None else f"{worst:.0e}"
    if speed_ is not None:
        note = f"{number(speed_, 1e-12, 0)} TFLOP/s"
    section.add(
        {
            "name": name,
            "seconds": taken.median,
            "all_seconds": taken.seconds,
            "host_seconds": taken.host_median,
            "product_seconds": products,
            "ratio": ratio,
            "predicted_ratio": predicted,
            "flop_per_second": speed_,
            "differences": differences,
            "plan": None if chosen is None else str(chosen),
            "missing": taken.missing,
            # PyTorch's definitions of the kernels
            "detail": name.endswith(", torch"),
        },
        name,
        number(taken.median, 1e3),
        f"{number(low, 1e3)}-{number(high, 1e3)}",
        number(taken.host_median, 1e3),
        number(products, 1e3),
        number(ratio, 1, 3),
        number(predicted, 1, 3),
        taken.missing or note,
    )


_BARE = ("hidden W^T", "J W", "J^T hidden")


def shapes_of(setting: Setting) -> list[Shape]:
    """Rows at the setting's vocabulary, then vocabularies at its rows."""
    base = setting.shape
    pairs = base.pairs
    by_rows = [replace(base, tokens=max(1, n // (2 * pairs))) for n in setting.rows]
    return list(dict.fromkeys([*by_rows, *(replace(base, vocab=v) for v in setting.vocabularies)]))


def shapes(setting: Setting, deadline: Deadline) -> Section:
    """The ratio from few rows to many, and from small vocabularies to large: is there a cliff?"""
    section = Section(
        f"ratio to the products by shape, H {setting.shape.hidden}, {str(setting.dtype)[6:]}",
        (
            "N",
            "V",
            "N V >= 2^31",
            "products ms",
            "forward",
            "recompute",
            "retain",
            "recompute ms",
            "host ms",
            "",
        ),
    )
    found = shapes_of(setting)
    for i, shape in enumerate(found):
        if deadline.over:
            section.ran_out.append(str(shape))
            continue
        share = Deadline(deadline.left / (len(found) - i))
        _one_shape(section, setting, shape, share)
        if setting.cuda:
            torch.cuda.empty_cache()
    return section


def _one_shape(section: Section, setting: Setting, shape: Shape, deadline: Deadline) -> None:
    large = shape.positions * shape.vocab >= 2**31
    cells = [f"{shape.positions}", f"{shape.vocab}", "yes" if large else ""]
    ways = [Way("forward", "triton"), Way("recompute", "triton")]
    # the one that has a whole J in memory, whose entries are numbered beyond 31 bits
    ways += [Way("retain", "triton", budget="64GiB")] * (large or setting.dry)
    row: dict[str, Any] = {"tokens": shape.positions, "vocab": shape.vocab, "large": large}
    try:
        inputs = make_inputs(case_of(setting, shape))
        plans = {way.route: way.plan(setting, shape) for way in ways}
        functions = {way.route: way.step(setting, shape, inputs) for way in ways}
        bare = bare_products(inputs)
        # large ones take long, and vary little
        rounds = max(3, min(setting.rounds, setting.rounds * 8192 // shape.positions))
        times = setting.clock.interleaved({**bare, **functions}, rounds, deadline)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        # this GPU is too small: marked, and nothing is wrong
        if not isinstance(error, torch.OutOfMemoryError):
            section.wrong.append(f"{shape}: {reason}")
        section.add({**row, "missing": reason}, *cells, *"-" * 6, reason)
        return
    ratios = {
        route: quotient(times[route].median, bare_seconds(chosen, times))
        for route, chosen in plans.items()
    }
    reasons = [f"{name}: {t.missing}" for name, t in times.items() if t.missing]
    section.wrong += [f"{shape}, {r}" for r in reasons if "OutOfMemoryError" not in r]
    products = [times[name].median for name in _BARE]
    section.add(
        {
            **row,
            "product_seconds": dict(zip(_BARE, products, strict=True)),
            "seconds": {route: times[route].median for route in plans},
            "host_seconds": {route: times[route].host_median for route in plans},
            "ratios": ratios,
            "plans": {route: str(chosen) for route, chosen in plans.items()},
            "missing": "; ".join(reasons) or None,
        },
        *cells,
        " + ".join(number(seconds, 1e3) for seconds in products),
        *(number(ratios.get(route), 1, 3) for route in ("forward", "recompute", "retain")),
        number(times["recompute"].median, 1e3),
        number(times["recompute"].host_median, 1e3),
        "; ".join(reasons),
    )


MEMORY_WAYS = (
    *KERNEL_WAYS,
    Way("recompute", "triton", budget="64MiB"),
    Way("forward", "triton", fused=True),
    Way("recompute", "torch"),
)


def memory(setting: Setting, deadline: Deadline) -> Section:
    """What each route holds beyond its outputs, and how often the host waits for the device."""
    shape = setting.shape
    section = Section(
        f"memory beyond the outputs and waits for the device, {shape}, {str(setting.dtype)[6:]}",
        ("what", "MiB", "planned", "budget", "kept", "waits", "with counts handed over"),
    )
    inputs = make_inputs(case_of(setting, shape))
    for way in MEMORY_WAYS:
        if deadline.over:
            section.ran_out.append(str(way))
            continue
        try:
            chosen = way.plan(setting, shape)
        except ValueError as error:
            # a budget that is too small for it at this shape
            section.add({"name": str(way), "missing": str(error)}, str(way), *"-" * 6)
            continue
        try:
            way.step(setting, shape, inputs)()  # compiles, and allocates what libraries keep
            held = held_bytes(way, chosen, setting, shape, inputs)
            waits = {
                counted: synchronisations(
                    way.step(setting, shape, inputs, counted=counted), setting
                )
                for counted in (False, True)
            }
        except Exception as error:
            section.wrong.append(f"{way}: {type(error).__name__}: {error}")
            clear(inputs)
            continue
        kept = None if held is None else held <= chosen.budget
        section.add(
            {
                "name": str(way),
                "held_bytes": held,
                "planned_bytes": chosen.bytes,
                "budget_bytes": chosen.budget,
                "kept": kept,
                "waits": waits[False],
                "waits_with_counts": waits[True],
                "plan": str(chosen),
            },
            str(way),
            number(held, 1 / MIB, 1),
            number(chosen.bytes, 1 / MIB, 1),
            number(chosen.budget, 1 / MIB, 1),
            {None: "-", True: "yes", False: "NO"}[kept],
            _count(waits[False]),
            _count(waits[True]),
        )
        over = None if held is None else held / chosen.budget
        section.verdicts.append(Verdict(f"{way}: bytes held / budget", over, at_most=1.0))
        given = waits[True]
        section.verdicts.append(
            Verdict(
                f"{way}: waits with counts handed over",
                None if given is None else float(len(given)),
                at_most=0.0,
            )
        )
    return section


def _count(waits: Sequence[str] | None) -> str:
    return "-" if waits is None else str(len(waits))


def held_bytes(
    way: Way, chosen: Plan, setting: Setting, shape: Shape, inputs: Inputs
) -> int | None:
    """Most bytes that were held at a time beyond inputs and outputs; None where nothing counts."""
    before = _start_of_peak(setting)
    out = way.forward(chosen, shape, inputs)
    forward = _peak(setting) - before
    # of full precision, or for want of room, the hidden gradient waits where it will be returned
    waits_in_output = way.route in ("frozen", "recompute", "hybrid", "one_pass") and (
        setting.dtype.itemsize >= 4 or not chosen.wide
    )
    if waits_in_output:
        forward -= inputs.hidden.nbytes
    backward = 0
    if way.route != "forward":
        _start_of_peak(setting)
        out.loss.backward()
        gradients = [t.grad for t in (inputs.hidden, inputs.weight) if t.grad is not None]
        backward = _peak(setting) - before - sum(g.nbytes for g in gradients)
    clear(inputs)
    return max(forward, backward) if setting.cuda else None


def _start_of_peak(setting: Setting) -> int:
    if not setting.cuda:
        return 0
    setting.clock.synchronize()
    torch.cuda.reset_peak_memory_stats(setting.device)
    return torch.cuda.memory_allocated(setting.device)


def _peak(setting: Setting) -> int:
    if not setting.cuda:
        return 0
    setting.clock.synchronize()
    return torch.cuda.max_memory_allocated(setting.device)


def synchronisations(run: Step, setting: Setting) -> list[str] | None:
    """Every time the host waited for the device, in words; None where it never does.

    PyTorch notices its own waits; what a library does by itself goes unseen.
    """
    if not setting.cuda:
        run()
        return None
    setting.clock.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [str(warning.message).splitlines()[0] for warning in caught]
    return [text for text in said if "called a synchronizing" in text]
