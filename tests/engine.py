"""Running the engine on a Case by a forced route and tile, and generating cases."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from oracles import Case, Result
from torch import Tensor

import fusedpo.engine.problem
import fusedpo.engine.score
from fusedpo import linear_token_stats, plan
from fusedpo.devices import Device
from fusedpo.engine.backend import _LEAST_TRITON, _triton_version
from fusedpo.engine.batch import Batch
from fusedpo.engine.plan import Plan
from fusedpo.engine.routes import compact
from fusedpo.engine.rows import Rows
from fusedpo.engine.score import plan_for, score
from fusedpo.engine.stats import TokenStats
from fusedpo.head import Head

ROUTES = ("forward", "frozen", "retain", "hybrid", "recompute", "one_pass")
# whether there is a Triton that can run the kernels, if only in its interpreter
KERNELS = (_triton_version() or (0, 0)) >= _LEAST_TRITON

# what plan_of and run use, unless told; the fixture of this name in conftest.py sets it
BACKEND = "torch"

# on vocabularies as small as a test's it would never pay: compact/test_options.py asks when it does
BESIDE = compact._beside
compact._beside = lambda p, slabs: 0.0

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class KnownGradient:
    """Groups of rows with a gradient known but for one factor a group, as a loss would have."""

    def __init__(self, gradient: Tensor, starts: Sequence[int]) -> None:
        self.g, self.starts, self.runs = gradient, starts, starts

    def units(self, start: int, stop: int, stats: dict[str, Tensor]) -> Tensor:
        assert stats["logprob"].shape == (stop - start,)
        factors = torch.ones_like(self.g)
        for i, (a, b) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            factors[a:b] = (-1) ** i * (i + 2.0)
        return (self.g / factors)[start:stop]

    def gradient(self, first: int, last: int, stats: dict[str, Tensor]) -> Tensor:
        assert stats["logprob"].shape == (self.starts[last] - self.starts[first],)
        return self.g[self.starts[first] : self.starts[last]]


def plan_of(
    case: Case,
    route: str,
    rows: int | None = None,
    cols: int | None = None,
    backend: str | None = None,
    *,
    budget: str = "8GiB",
    device: str | torch.device = "cpu",
    entropy_value: bool = False,
) -> Plan:
    """A plan for the case, with its tile forced to rows x cols if they are given."""
    chosen = plan(
        int(case.scored.sum()),
        *case.weight.shape,
        dtype=case.dtype,
        needs=() if route == "forward" else tuple(case.leaves()),
        scope="pair",
        groups=3,
        entropy=case.upstream_entropy is not None,
        entropy_value=entropy_value,
        softcap=case.softcap is not None,
        budget=budget,
        backend=backend or BACKEND,
        device=device,
        route=route,
    )
    rows, cols = rows or chosen.rows, cols or chosen.cols
    return with_tile(chosen, rows, cols)


def routes_for(case: Case) -> list[str]:
    if case.needs == ("hidden",):
        return ["forward", "frozen"]
    routes = ["forward", "retain", "hybrid", "recompute"]
    return [*routes, "one_pass"] if "weight" in case.needs else routes


def with_tile(chosen: Plan, rows: int, cols: int) -> Plan:
    """The plan with another tile, and a backward that is cut otherwise than the forward."""
    back = {"back_rows": 2 * rows, "back_cols": -(-cols // 2), "slab": 2 * rows}
    if chosen.route == "hybrid":  # of about a third of the rows
        back["retained"] = min(chosen.tokens, rows * max(1, chosen.tokens // (3 * rows)))
        made_anew = (chosen.retained - back["retained"]) / max(1, chosen.tokens)
        chosen = dataclasses.replace(chosen, products=chosen.products + made_anew)
    return dataclasses.replace(chosen, rows=rows, cols=cols, **back)


def scored(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    memory_budget: Plan | int | str | None = None,
    *,
    groups: KnownGradient | None = None,
    backend: str | None = None,
    **options: Any,
) -> TokenStats:
    """The engine's statistics [N] of checked rows, planned as a loss with these groups would be."""
    of_loss: dict[str, Any] = {}
    if groups is not None:
        of_loss = {"scope": "pair", "groups": [b - a for a, b in itertools.pairwise(groups.starts)]}
    backend = backend or BACKEND
    stats = options.get("stats", ("logprob",))
    batch = Batch(hidden, head, rows, options.pop("temperature", 1.0), backend)
    planned = plan_for(batch, memory_budget, stats=stats, **of_loss)
    return score(batch, planned, groups=groups, **options)[0]


def as_on_a_gpu(m: Any) -> None:
    """Products take half-precision operands, and plans count with them, as nowhere on a CPU."""
    m.setattr(fusedpo.engine.batch, "operand_dtype", lambda dtype, device: dtype)
    m.setattr(fusedpo.engine.problem, "as_device", lambda device: Device("cuda"))


def replace_everywhere(m: Any, original: Any, other: Any) -> None:
    """Another object in the place of one, in every module of the package that has it."""
    modules = [
        module for name, module in sys.modules.copy().items() if name.split(".")[0] == "fusedpo"
    ]
    places = [
        (each, name) for each in modules for name, value in vars(each).items() if value is original
    ]
    assert places, f"nothing has {original}"
    for module, name in places:
        m.setattr(module, name, other)


def run(
    case: Case,
    memory_budget: Plan | int | str | None = None,
    *,
    starts: Sequence[int] | None = None,
    backwards: int = 1,
    backend: str | None = None,
) -> Result:
    """A case through the public function or, for one_pass, which needs a loss, through score()."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.leaves().items()}
    hidden = leaves.get("hidden", case.hidden)
    weight = leaves.get("weight", case.weight)
    options = {**case.options, "bias": leaves.get("bias", case.bias)}
    entropy = None
    route = memory_budget.route if isinstance(memory_budget, Plan) else None
    with torch.set_grad_enabled(route != "forward"):
        if route == "one_pass":
            rows = Rows.of(case.labels, case.ignore_index)
            g = rows.gather(case.upstream).to(torch.promote_types(case.dtype, torch.float32))
            starts = starts or [0, rows.count]
            head = Head(weight, options["bias"], case.softcap, case.logit_scale)
            stats = scored(
                hidden,
                head,
                rows,
                memory_budget,
                groups=KnownGradient(g, starts),
                backend=backend,
                temperature=case.temperature,
            )
            logprob = rows.scatter(stats.logprob)
        else:
            stats = linear_token_stats(
                hidden,
                weight,
                case.labels,
                stats=("logprob",) if case.upstream_entropy is None else ("logprob", "entropy"),
                memory_budget=memory_budget,
                backend=backend or BACKEND,
                **options,
            )
            logprob, entropy = stats.logprob, stats.entropy
    result = Result(logprob.detach(), None if entropy is None else entropy.detach())
    if route == "forward":
        return result
    total = (logprob * case.upstream).sum()
    if entropy is not None:
        total = total + (entropy * case.upstream_entropy).sum()
    for last in [False] * (backwards - 1) + [True]:
        found = torch.autograd.grad(total, list(leaves.values()), retain_graph=not last)
        result.gradients = dict(zip(leaves, found, strict=True))
    return result


def generate(seed: int, *, dtype: torch.dtype | None = None) -> Case:
    """A case from a seed: shape, head, layout, mask, scale of the upstream gradient."""
    draw = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    dtype = dtype or draw.choice(DTYPES)
    if BACKEND == "triton" and dtype == torch.float64:
        dtype = torch.float32  # the kernels take no float64
    positions = draw.choice([1, 2, 15, 17, 33, 64, 100])
    width = draw.choice([1, 8, 31, 64, 65])
    vocab = draw.choice([1, 2, 3, 127, 128, 129, 300, 517])
    kind = draw.choice(["plain", "hot", "shifted", "cap", "tight cap", "cold", "bias", "scaled"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hidden = normal(positions, width) * (3.0 if kind == "hot" else 1.0)
    weight = normal(vocab, width) / width**0.5
    labels = torch.randint(vocab, (positions,), generator=g)
    masked = torch.rand(positions, generator=g) < draw.choice([0.0, 0.0, 0.5, 0.9])
    # the last token is kept, or a lost last chunk would go unseen
    masked[-1] = False
    labels[masked] = -100
    scale = draw.choice([1.0, 0.1 / positions])
    case = Case(
        name=f"seed {seed}, {kind}, {str(dtype)[6:]}, {positions} x {vocab} x {width}",
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        labels=labels.int() if draw.random() < 0.2 else labels,
        upstream=(normal(positions) * scale).float(),
    )
    if kind in ("bias", "shifted"):
        case.bias = (normal(vocab) + (200.0 if kind == "shifted" else 0.0)).to(dtype)
        case.needs = ("hidden", "weight", "bias")
    if kind in ("cap", "tight cap"):
        case.softcap = 30.0 if kind == "cap" else 1.0
    if kind == "cold":
        case.temperature = (torch.rand(positions, generator=g) + 0.3).float()
    if kind == "scaled":
        case.logit_scale, case.temperature = 0.25, 0.7
    layout = draw.choice(["plain", "plain", "sliced", "transposed", "batched"])
    if layout == "sliced":
        wide = torch.empty(positions + 1, width + 3, dtype=dtype)
        wide[:-1, 2:-1] = case.hidden
        case.hidden = wide[:-1, 2:-1]
    elif layout == "transposed":
        case.weight = case.weight.T.contiguous().T
    elif layout == "batched" and positions % 2 == 0:
        wide = torch.empty(2, positions // 2 + 1, width, dtype=dtype)
        wide[:, :-1] = case.hidden.view(2, -1, width)
        case.hidden = wide[:, :-1]
        case.labels, case.upstream = case.labels.view(2, -1), case.upstream.view(2, -1)
        if isinstance(case.temperature, Tensor):
            case.temperature = case.temperature.view(2, -1)
    case.needs = draw.choice([case.needs, case.needs, ("hidden",), case.needs[1:]])
    return case


def modes() -> tuple[object, ...]:
    """What a call may change for a while, and has to leave as it was."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.random.get_rng_state().sum().item(),
    )
