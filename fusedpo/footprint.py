"""What a training step holds, in bytes: fusedpo's routes, and what then fits.

Pure arithmetic on shapes, which ``fusedpo plan`` prints. What a head holds is counted at the worst
moment, beyond its inputs and outputs (the gradients of hidden states and head), and held to the
tensors alive on the CPU by tests/test_footprint.py. What the rest of a model holds is an estimate.

Letters: H hidden size, V vocabulary, N scored tokens, P positions (prompts too), b bytes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from fusedpo.checks import bad_choice, bad_value
from fusedpo.devices import Device
from fusedpo.engine.cost import Backend
from fusedpo.engine.plan import Plan, RouteName
from fusedpo.engine.planner import plan
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.model_shapes import ModelShape
from fusedpo.objective.groups import plan_options

Optimizer = Literal["adamw", "adamw-8bit", "sgd", "none"]

# states in bytes a parameter: torch.optim's two moments have the weights' dtype, of b bytes; those
# of 8 bits have an fp32 scale for each block of 256; SGD is without momentum
_STATES: dict[str, Callable[[int], float]] = {
    "adamw": lambda b: 2 * b,
    "adamw-8bit": lambda b: 2 * (1 + 4 / 256),
    "sgd": lambda b: 0,
    "none": lambda b: 0,
}


@dataclass(frozen=True)
class Workload:
    """One loss call, forward and backward.

    Attributes:
        shape, loss: the model, and one of ``fusedpo.losses``.
        tokens: scored tokens of one response.
        pairs: of two responses each, or as many as an example of the loss has, if these are more.
        context: tokens of the prompt before each response, which are not scored.
        dtype: of hidden states and weights; frozen: these take no gradient.
        device, backend, budget, gradient_tolerance: as in ``plan``.
    """

    shape: ModelShape
    loss: Loss
    tokens: int
    pairs: int
    context: int = 0
    dtype: torch.dtype = torch.bfloat16
    device: str | Device = "cuda"
    backend: Backend = "triton"
    frozen: bool = False
    budget: int = 2**28
    gradient_tolerance: float = 0.0

    @property
    def responses(self) -> int:
        roles = len(self.loss.roles) if isinstance(self.loss, PreferenceLoss) else 1
        return self.pairs * max(2, roles)

    @property
    def scored(self) -> int:
        return self.responses * self.tokens

    @property
    def positions(self) -> int:
        return self.responses * (self.tokens + self.context)

    @property
    def size(self) -> int:
        """Bytes of a number of the weights."""
        return self.dtype.itemsize

    def plan(self, *, budget: int | None = None, route: RouteName | None = None) -> Plan:
        """The plan that ``preference_loss`` or ``policy_loss`` makes of this; raises as plan()."""
        wanted = plan_options(self.loss, self.responses, [self.tokens] * self.responses)
        return plan(
            self.scored,
            self.shape.vocab,
            self.shape.hidden,
            dtype=self.dtype,
            budget=self.budget if budget is None else budget,
            needs=("hidden",) if self.frozen else ("hidden", "weight"),
            scope=wanted["scope"],
            groups=wanted["groups"],
            factors=wanted.get("factors", 1),
            entropy="entropy" in wanted["differentiable"],
            entropy_value="entropy" in wanted["stats"],
            softcap=self.shape.softcap is not None,
            gathered=self.context > 0,
            reordered=wanted.get("reordered", False),
            device=self.device,
            backend=self.backend,
            gradient_tolerance=self.gradient_tolerance,
            route=route,
        )

    def outputs(self) -> dict[str, int]:
        """Bytes of what every program returns: the gradients of hidden states and head."""
        head = 0 if self.frozen else self.shape.head_parameters * self.size
        rows = self.positions * self.shape.hidden * self.size
        return {"gradient of the hidden states": rows, "gradient of the head": head}


@dataclass(frozen=True)
class RouteCost:
    """A route's plan; ``needed``: bytes of the least budget for it, None if the given one does."""

    plan: Plan
    needed: int | None


def routes(work: Workload) -> dict[RouteName, RouteCost]:
    """Every route that can serve the call, the cheapest first."""
    # the others cannot serve these needs, whatever they may hold
    serving = (route for route in get_args(RouteName) if _plans(work, route, 2**60))
    needed = {route: _least_budget(work, route) for route in serving}
    found = {name: RouteCost(work.plan(budget=b, route=name), b) for name, b in needed.items()}
    return dict(sorted(found.items(), key=lambda item: (item[1].plan.products, item[1].plan.bytes)))


def _plans(work: Workload, route: RouteName | None, budget: int) -> bool:
    try:
        work.plan(budget=budget, route=route)
    except ValueError:
        return False
    return True


def _least_budget(work: Workload, route: RouteName) -> int | None:
    if _plans(work, route, work.budget):
        return None
    return 1 + _last(lambda budget: not _plans(work, route, budget), work.budget)


def _last(holds: Callable[[int], bool], start: int) -> int:
    """The last number for which something holds that holds from start up to it, and not beyond."""
    low, step = start, 1
    while holds(low + step):
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# what a program holds beyond the outputs at the worst moment, by buffer; None if it cannot be run
Method = Callable[[Workload], "dict[str, int] | None"]


def within_budget(work: Workload) -> dict[str, int] | None:
    """fusedpo: all of its budget, whatever the route holds of it; None if no route fits in it."""
    return {"budget": work.budget} if _plans(work, None, work.budget) else None


def training(
    work: Workload,
    head: Mapping[str, int],
    *,
    optimizer: Optimizer = "adamw",
    checkpointing: bool = True,
) -> dict[str, int]:
    """What a training step holds on one device, line by line, in bytes: an estimate.

    It adds up the head's and a layer's, which are not held at the same time; a framework's own
    memory and fragmentation are not in it. ``frozen`` is read as adapters on frozen weights (LoRA):
    they count nothing, and the reference is the model without them.

    Args:
        head: what the loss holds beyond its outputs, by one of METHODS.
        optimizer: its states are in the weights' dtype, or of 8 bits; sgd has no momentum.
        checkpointing: the layers' inputs are kept, and each layer is computed anew.

    Raises:
        ValueError: if the shape has no body, or for an unknown optimizer.
    """
    if optimizer not in _STATES:
        raise bad_choice("--optimizer", optimizer, _STATES)
    shape, body, b = work.shape, work.shape.body, work.size
    if body is None:
        raise bad_value(
            "--fit",
            "a dense model whose layers are known",
            "a head alone, or a configuration without layers or with experts",
            "give a --model whose configuration has its layers",
        )
    trained = 0 if work.frozen else shape.parameters
    # of one layer and position: residuals, projections and the feed-forward part's products, and
    # the norms' in fp32; attention that stores no scores (SDPA, FlashAttention)
    numbers = 5 * shape.hidden + (3 * body.heads + 4 * body.kv_heads) * body.head_dim
    kept = b * (numbers + (4 if body.gated else 2) * body.intermediate) + 16 * shape.hidden
    working = b * (3 if body.gated else 2) * body.intermediate  # gradients
    layers, per_position = "activations of the layers", kept
    if checkpointing:
        layers, per_position = "checkpoints of the layers", shape.hidden * b
        working += kept
    reference, outputs = work.loss.needs_reference and not work.frozen, work.outputs()
    return {
        "weights": shape.parameters * b,
        "gradients but the head's": max(0, trained - shape.head_parameters) * b,
        "gradient of the head": outputs["gradient of the head"],
        f"optimizer states ({optimizer})": int(trained * _STATES[optimizer](b)),
        "reference model": shape.parameters * b if reference else 0,
        layers: body.layers * work.positions * per_position,
        "working set of one layer": work.positions * working,
        "hidden states and their gradient": 2 * outputs["gradient of the hidden states"],
        "head and loss": sum(head.values()),
    }


def longest(work: Workload, memory: int, held: Method, **how: Any) -> int | None:
    """The most tokens of one response with which a training step fits; None if not even one.

    work: but for its tokens; memory: bytes of the device; held: one of METHODS, which counts more
    for more tokens; how: as in ``training``.
    """

    def fits(tokens: int) -> bool:
        at = replace(work, tokens=tokens)
        head = held(at)
        return head is not None and sum(training(at, head, **how).values()) <= memory

    return _last(fits, 1) if fits(1) else None
