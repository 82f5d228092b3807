"""Whole steps of every route against the bare products that it cannot do without.

A step is forward and backward of SimPO. The bare products are those of cuBLAS at exactly these
shapes, in the operands' dtype, timed in the same rounds: hidden W^T, J W and J^T hidden. A route's
ratio is its step over the products that it makes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fusedpo
from fusedpo.benchmarks import roofline
from fusedpo.benchmarks.peers import PEERS, step, why_not
from fusedpo.benchmarks.section import Cell, Section, Setting, Verdict, number, quotient
from fusedpo.benchmarks.shapes import MIB, Case, Inputs, Shape, make_inputs
from fusedpo.benchmarks.timing import Deadline, Measured, Step, told
from fusedpo.engine.cost import Backend, Needs
from fusedpo.engine.plan import Plan, RouteName

# more than either backend's rounding in half precision makes of a gradient, and less than a lost
# tile does
GRADIENT_DIFFERENCE = 0.05
LOSS_DIFFERENCE = 0.01


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
    def needs(self) -> tuple[Needs, ...]:
        return roofline.needs_of(self.route)

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
                torch.autograd.backward(out.loss)
            clear(inputs)

        return run


KERNEL_WAYS = tuple(Way(route, "triton") for route in roofline.TARGETS)
OTHER_WAYS = (
    Way("forward", "triton", fused=True),
    *(Way(route, "torch") for route in roofline.TARGETS),
)


def case_of(setting: Setting, shape: Shape, peer: str = "full_logits") -> Case:
    case = Case(peer, shape, setting.dtype_name, setting.device)
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


def bare_seconds(chosen: Plan, times: Mapping[str, Measured]) -> float | None:
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
            torch.autograd.backward(out.loss)
            got = {"hidden": inputs.hidden.grad, "weight": inputs.weight.grad}
            for name in way.needs:
                found[name] = relative(got[name], self.gradients[name])
        clear(inputs)
        return found


def relative(got: Tensor | None, expected: Tensor | None) -> float:
    if got is None or expected is None:
        return float("inf")
    # a block of rows at a time: a head in fp32 takes gigabytes
    gap = size = 0.0
    for mine, truth in zip(torch.split(got, 8192), torch.split(expected, 8192), strict=True):
        exact = truth.to(torch.promote_types(truth.dtype, torch.float32))
        gap += float((mine.to(exact.dtype) - exact).square().sum(dtype=torch.float64))
        size += float(exact.square().sum(dtype=torch.float64))
    return (gap / size) ** 0.5 if size else float("inf")


def routes(setting: Setting, deadline: Deadline) -> Section:
    """Every route and backend, other programs, and the bare products, in the same rounds."""
    shape = setting.shape
    section = Section(
        f"forward and backward of SimPO, {shape}, {setting.dtype_name}",
        {
            "what": "name",
            "ms": ("seconds", 1e3, 2),
            "quartiles": lambda row: "-".join(number(s, 1e3) for s in row["quartiles"]) or "-",
            "host ms": ("host_seconds", 1e3, 2),
            "its products ms": ("product_seconds", 1e3, 2),
            "ratio": ("ratio", 1, 3),
            "predicted": ("predicted_ratio", 1, 3),
            "difference": _note,
        },
    )
    inputs = make_inputs(case_of(setting, shape))
    reference = Reference.of(setting, inputs)
    functions: dict[str, Step] = dict(bare_products(inputs))
    plans: dict[str, Plan] = {}
    differences: dict[str, dict[str, float]] = {}
    for way in section.in_time((*KERNEL_WAYS, *OTHER_WAYS), deadline):
        name = str(way)
        with section.attempt(name):
            plans[name] = chosen = way.plan(setting, shape)
            differences[name] = reference.differences(way, chosen, shape, inputs)
            section.wrong += faults(name, differences[name])
            functions[name] = way.step(setting, shape, inputs)
        clear(inputs)
    del reference
    for peer in setting.peers:
        label, case = PEERS[peer].label, case_of(setting, shape, peer)
        if deadline.over:
            section.ran_out.append(label)
        elif reason := why_not(case):
            section.add(name=label, missing=reason, quartiles=())
        else:
            functions[label] = _peer_step(case, inputs)
    times = setting.clock.interleaved(functions, setting.rounds, deadline)

    for name, taken in times.items():
        if taken.missing and name in plans:
            section.wrong.append(f"{name}: {taken.missing}")
        known = plans.get(name), differences.get(name, {})
        section.rows.append(_row(setting, name, times, *known))
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


def _row(
    setting: Setting,
    name: str,
    times: Mapping[str, Measured],
    chosen: Plan | None,
    differences: dict[str, float],
) -> dict[str, Any]:
    taken = times[name]
    products = None if chosen is None else bare_seconds(chosen, times)
    return {
        "name": name,
        "seconds": taken.median,
        "quartiles": taken.quartiles or (),
        "all_seconds": taken.seconds,
        "host_seconds": taken.host_median,
        "product_seconds": products,
        "ratio": quotient(taken.median, products),
        "predicted_ratio": None if chosen is None else predicted_ratio(name, chosen, setting),
        "flop_per_second": quotient(flop(setting.shape), taken.median) if name in _BARE else None,
        "differences": differences,
        "plan": None if chosen is None else str(chosen),
        "missing": taken.missing,
        # PyTorch's definitions of the kernels
        "detail": name.endswith(", torch"),
    }


def _note(row: Mapping[str, Any]) -> str:
    if row["missing"]:
        return str(row["missing"])
    if row["flop_per_second"] is not None:
        return f"{number(row['flop_per_second'], 1e-12, 0)} TFLOP/s"
    return f"{max(row['differences'].values()):.0e}" if row["differences"] else ""


_BARE = ("hidden W^T", "J W", "J^T hidden")


def shapes_of(setting: Setting) -> list[Shape]:
    """Rows at the setting's vocabulary, then vocabularies at its rows."""
    base = setting.shape
    pairs = base.pairs
    by_rows = [replace(base, tokens=max(1, n // (2 * pairs))) for n in setting.rows]
    return list(dict.fromkeys([*by_rows, *(replace(base, vocab=v) for v in setting.vocabularies)]))


def shapes(setting: Setting, deadline: Deadline) -> Section:
    """The ratio from few rows to many, and from small vocabularies to large: is there a cliff?"""

    def of(key: str, name: str, factor: float = 1.0, digits: int = 3) -> Cell:
        return lambda row: number(row.get(key, {}).get(name), factor, digits)

    routes = ("forward", "recompute", "retain")
    section = Section(
        f"ratio to the products by shape, H {setting.shape.hidden}, {setting.dtype_name}",
        {
            "N": "tokens",
            "V": "vocab",
            "N V >= 2^31": lambda row: "yes" * row["large"],
            "products ms": lambda row: " + ".join(
                number(seconds, 1e3) for seconds in row.get("product_seconds", {}).values()
            ),
            **{route: of("ratios", route) for route in routes},
            "recompute ms": of("seconds", "recompute", 1e3, 2),
            "host ms": of("host_seconds", "recompute", 1e3, 2),
            "": "missing",
        },
    )
    found = shapes_of(setting)
    for i, shape in enumerate(section.in_time(found, deadline)):
        share = Deadline(deadline.left / (len(found) - i))
        large = shape.positions * shape.vocab >= 2**31
        row: dict[str, Any] = {"tokens": shape.positions, "vocab": shape.vocab, "large": large}
        try:
            row |= _one_shape(section, setting, shape, share)
        except Exception as error:
            row |= {"missing": told(error)}
            # this GPU is too small: marked, and nothing is wrong
            if not isinstance(error, torch.OutOfMemoryError):
                section.wrong.append(f"{shape}: {told(error)}")
        section.rows.append(row)
        if setting.cuda:
            torch.cuda.empty_cache()
    return section


def _one_shape(
    section: Section, setting: Setting, shape: Shape, deadline: Deadline
) -> dict[str, Any]:
    large = shape.positions * shape.vocab >= 2**31
    ways = [Way("forward", "triton"), Way("recompute", "triton")]
    # the one that has a whole J in memory, whose entries are numbered beyond 31 bits
    ways += [Way("retain", "triton", budget="64GiB")] * (large or setting.dry)
    inputs = make_inputs(case_of(setting, shape))
    plans: dict[str, Plan] = {way.route: way.plan(setting, shape) for way in ways}
    functions: dict[str, Step] = {way.route: way.step(setting, shape, inputs) for way in ways}
    # large ones take long, and vary little
    rounds = max(3, min(setting.rounds, setting.rounds * 8192 // shape.positions))
    times = setting.clock.interleaved({**bare_products(inputs), **functions}, rounds, deadline)
    reasons = [f"{name}: {t.missing}" for name, t in times.items() if t.missing]
    section.wrong += [f"{shape}, {r}" for r in reasons if "OutOfMemoryError" not in r]
    return {
        "product_seconds": {name: times[name].median for name in _BARE},
        "seconds": {route: times[route].median for route in plans},
        "host_seconds": {route: times[route].host_median for route in plans},
        "ratios": {
            route: quotient(times[route].median, bare_seconds(chosen, times))
            for route, chosen in plans.items()
        },
        "plans": {route: str(chosen) for route, chosen in plans.items()},
        "missing": "; ".join(reasons) or None,
    }


MEMORY_WAYS = (
    *KERNEL_WAYS,
    Way("recompute", "triton", budget="64MiB"),
    Way("forward", "triton", fused=True),
    Way("recompute", "torch"),
)


def memory(setting: Setting, deadline: Deadline) -> Section:
    """What each route holds beyond its outputs, and how often the host waits for the device."""
    shape = setting.shape

    def count(key: str) -> Cell:
        return lambda row: "-" if row.get(key) is None else str(len(row[key]))

    section = Section(
        f"memory beyond the outputs and waits for the device, {shape}, {setting.dtype_name}",
        {
            "what": "name",
            "MiB": ("held_bytes", 1 / MIB, 1),
            "planned": ("planned_bytes", 1 / MIB, 1),
            "budget": ("budget_bytes", 1 / MIB, 1),
            "kept": lambda row: {None: "-", True: "yes", False: "NO"}[row.get("kept")],
            "waits": count("waits"),
            "with counts handed over": count("waits_with_counts"),
        },
    )
    inputs = make_inputs(case_of(setting, shape))
    for way in section.in_time(MEMORY_WAYS, deadline):
        try:
            chosen = way.plan(setting, shape)
        except ValueError as error:
            # a budget that is too small for it at this shape
            section.add(name=str(way), missing=str(error))
            continue
        with section.attempt(way):
            _hold(section, way, chosen, setting, inputs)
        clear(inputs)
    return section


def _hold(section: Section, way: Way, chosen: Plan, setting: Setting, inputs: Inputs) -> None:
    shape = setting.shape
    way.step(setting, shape, inputs)()  # compiles, and allocates what libraries keep
    held = held_bytes(way, chosen, setting, shape, inputs)
    waits, given = (
        synchronisations(way.step(setting, shape, inputs, counted=counted), setting)
        for counted in (False, True)
    )
    section.add(
        name=str(way),
        held_bytes=held,
        planned_bytes=chosen.bytes,
        budget_bytes=chosen.budget,
        kept=None if held is None else held <= chosen.budget,
        waits=waits,
        waits_with_counts=given,
        plan=str(chosen),
    )
    over, handed = f"{way}: bytes held / budget", f"{way}: waits with counts handed over"
    section.verdicts += [
        Verdict(over, None if held is None else held / chosen.budget, at_most=1.0),
        Verdict(handed, None if given is None else float(len(given)), at_most=0.0),
    ]


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
        torch.autograd.backward(out.loss)
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
