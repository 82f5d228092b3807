"""``fusedpo plan``: what a loss would hold, by which route, and what would fit; nothing is run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch

from fusedpo import footprint, losses, tables
from fusedpo.benchmarks import peer_memory
from fusedpo.checks import bad_value, called
from fusedpo.devices import Device, as_device
from fusedpo.engine.cost import Backend
from fusedpo.engine.tolerance import GUESSED_SHARE, check_tolerance
from fusedpo.footprint import Workload
from fusedpo.model_shapes import HEADS, ModelShape, read_model
from fusedpo.sizes import format_bytes, format_products, parse_budget

SUMMARY = "say what a loss would hold, by which route, and what would fit a device"
DESCRIPTION = (
    "Bytes of a loss and its gradients, here and elsewhere, and what fits. Nothing is run."
)
EXAMPLES = """\
examples:
  four pairs of 32k tokens a response, with 1 GiB for the head:
    fusedpo plan --model llama-3.1-8b --tokens 32768 --pairs 4 --budget 1GiB

  the longest response that trains on one GPU of 80 GB, the whole model and with LoRA:
    fusedpo plan --model qwen2.5-7b --pairs 1 --fit 80GB --device cuda --optimizer adamw-8bit
    fusedpo plan --model qwen2.5-7b --pairs 1 --fit 80GB --device cuda --frozen --loss dpo

  your own model, or only the shape of its head, on the CPU in float32:
    fusedpo plan --model ./my-model --tokens 2048 --context 6144
    fusedpo plan --hidden 512 --vocab 50257 --tokens 256 --device cpu --dtype float32

  with what a call takes on another GPU if it is given no budget:
    fusedpo plan --model llama-3.1-8b --tokens 8192 --device-memory 80GB

  with gradients of the head that may be off by what rounding to bfloat16 costs:
    fusedpo plan --model gemma-2-2b --tokens 8192 --gradient-tolerance 2e-3

  numbers for a script, all in bytes:
    fusedpo plan --model gemma-2-2b --tokens 8192 --loss orpo --json
"""

# what no run comes near: beyond, bytes are no longer numbers that a plan can be made of, and a list
# of the pairs takes seconds
_RANGES = {
    "tokens": (1, 10**9),
    "pairs": (1, 10**4),
    "context": (0, 10**9),
    "hidden": (1, 10**9),
    "vocab": (1, 10**9),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def number(group: Any, option: str, default: int | None, help: str) -> None:
        said = "" if default is None else f" (default: {default})"
        group.add_argument(option, type=int, default=default, metavar="INT", help=help + said)

    def choice(group: Any, option: str, known: Sequence[str], default: str, help: str) -> None:
        said = f"{help} (default: {default})"
        group.add_argument(option, choices=known, default=default, help=said)

    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model",
        metavar="NAME|FOLDER|FILE",
        help="a folder with config.json, a config.json, a Hub name, or one of " + ", ".join(HEADS),
    )
    number(model, "--hidden", None, "hidden size; with --vocab in the place of --model")
    number(model, "--vocab", None, "vocabulary; with --hidden in the place of --model")
    model.add_argument(
        "--frozen", action="store_true", help="the weights take no gradient, as below LoRA"
    )
    batch = parser.add_argument_group("the loss and its batch")
    batch.add_argument(
        "--loss",
        default="simpo",
        metavar="NAME",
        help="one that fusedpo losses lists (default: simpo)",
    )
    number(batch, "--tokens", 4096, "scored tokens of one response")
    number(batch, "--pairs", 1, "pairs of two responses in a call")
    number(batch, "--context", 0, "tokens of the prompt before each response, not scored")
    machine = parser.add_argument_group("memory and precision")
    machine.add_argument(
        "--budget",
        metavar="SIZE",
        help="memory that the head may take, as 1GiB (default: 3 %% of the GPU's memory, 4GiB "
        "at most; 256MiB on the CPU, or where that is not known)",
    )
    machine.add_argument(
        "--gradient-tolerance",
        type=float,
        default=0.0,
        metavar="FLOAT",
        help="relative error that a gradient of the head may have, as 2e-3 (default: 0, exact)",
    )
    dtypes = ("bfloat16", "float16", "float32", "float64")
    choice(machine, "--dtype", dtypes, "bfloat16", "of hidden states and weights")
    machine.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what to plan for (default: cuda if there is a GPU here, or with --device-memory; "
        "else cpu)",
    )
    machine.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="memory of the GPU, as 80GB (default: that of the one here)",
    )
    machine.add_argument(
        "--backend",
        choices=get_args(Backend),
        help="what computes (default: triton on a GPU that it can run on, else torch)",
    )
    fit = parser.add_argument_group("what fits")
    fit.add_argument(
        "--fit",
        metavar="SIZE",
        help="memory of a device, as 80GB: find the longest response that trains in it; with "
        "--model, a dense one whose layers are known (no mixture of experts)",
    )
    choice(fit, "--optimizer", get_args(footprint.Optimizer), "adamw", "whose states --fit counts")
    fit.add_argument("--no-checkpointing", action="store_true", help="--fit keeps all activations")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")


def run(given: argparse.Namespace) -> int:
    """Print the plan; the exit code.

    Raises:
        ValueError: for a wrong argument, before anything is printed; and, after the tables, for a
            budget that is too small for any route.
    """
    work = _workload(given)
    found = _found(work)
    if given.fit is not None:
        how = {"optimizer": given.optimizer, "checkpointing": not given.no_checkpointing}
        found["fit"] = _fit(work, parse_budget(given.fit, "--fit"), how)
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        _print(given, work, found)
    if found["chosen"] is None:
        least = found["least_budget"]
        raise bad_value(
            "--budget",
            f"at least {format_bytes(least)} ({least} bytes) for {work.scored} scored tokens",
            format_bytes(work.budget),
            "raise it, or score fewer tokens in a call",
        )
    return 0


def _workload(given: argparse.Namespace) -> Workload:
    """The arguments, checked."""
    for option, (least, most) in _RANGES.items():
        value = getattr(given, option)
        if value is not None and value < least:
            raise bad_value(f"--{option}", f"a whole number of at least {least}", str(value))
        if value is not None and value > most:
            raise bad_value(f"--{option}", f"a whole number of at most {most}", str(value))
    with called("--loss", "loss"):
        loss, device = losses.get(given.loss), _device(given)
    by_torch = device.type == "cpu" or given.dtype == "float64"
    backend: Backend = given.backend or ("torch" if by_torch else "triton")
    if backend == "triton" and by_torch:
        expected = "torch on the CPU and for float64"
        raise bad_value("--backend", expected, backend, "leave it out, or add --device cuda")
    head = (given.hidden, given.vocab)
    known = [value is not None for value in (given.model, *head)]
    if known not in ([True, False, False], [False, True, True]):
        said = [o for o, k in zip(("--model", "--hidden", "--vocab"), known, strict=True) if k]
        got = " and ".join(said) or "none of them"
        remedy = "fusedpo plan --model llama-3.1-8b --tokens 4096, for one"
        raise bad_value("--model", "either --model, or --hidden and --vocab", got, remedy)
    return Workload(
        ModelShape(*head) if given.model is None else read_model(given.model),
        loss,
        **{name: getattr(given, name) for name in ("tokens", "pairs", "context")},
        device=device,
        dtype=getattr(torch, given.dtype),
        backend=backend,
        frozen=given.frozen,
        budget=parse_budget(given.budget, "--budget", default=device.budget),
        gradient_tolerance=_tolerance(given),
    )


def _tolerance(given: argparse.Namespace) -> float:
    with called("--gradient-tolerance", "gradient_tolerance"):
        return check_tolerance(given.gradient_tolerance, getattr(torch, given.dtype))


def _device(given: argparse.Namespace) -> Device:
    told = given.device_memory is not None
    here = "cuda" if told or torch.cuda.is_available() else "cpu"
    device = as_device(given.device or here)
    if not told:
        return device
    if device.type == "cpu":
        raise bad_value("--device-memory", "a GPU", "cpu", "add --device cuda")
    return replace(device, memory=parse_budget(given.device_memory, "--device-memory"))


def _found(work: Workload) -> dict[str, Any]:
    """Everything that is printed, plain: numbers are bytes unless their name says otherwise."""
    costs = footprint.routes(work)
    fitting = any(cost.needed is None for cost in costs.values())
    return {
        "device": as_device(work.device).type,
        **{"hidden": work.shape.hidden, "vocab": work.shape.vocab, "responses": work.responses},
        **{"scored_tokens": work.scored, "positions": work.positions, "budget": work.budget},
        "chosen": work.plan().route if fitting else None,
        "least_budget": None if fitting else min(cost.needed or 0 for cost in costs.values()),
        "routes": {
            route: {
                "products": cost.plan.products,
                "bytes": cost.plan.bytes,
                "fits": cost.needed is None,
                "needed_budget": cost.needed or work.budget,
                "tile": [cost.plan.rows, cost.plan.cols],
                "buffers": cost.plan.buffers,
            }
            for route, cost in costs.items()
        },
        "outputs": work.outputs(),
        "peers": {name: method(work) for name, method in peer_memory.PEERS.items()},
    }


def _fit(work: Workload, memory: int, how: dict[str, Any]) -> dict[str, Any]:
    """The longest responses, and what a step holds with fusedpo's, or with one token if none."""
    methods = peer_memory.METHODS.items()
    found = {name: footprint.longest(work, memory, held, **how) for name, held in methods}
    fits, all_of_it = found.pop("fusedpo"), {"budget": work.budget}
    breakdown = footprint.training(replace(work, tokens=fits or 1), all_of_it, **how)
    return {"memory": memory, "fits": fits, "peers": found, "breakdown": breakdown}


def _print(given: argparse.Namespace, work: Workload, found: dict[str, Any]) -> None:
    device = as_device(work.device)
    print(
        f"{given.loss} on {given.model or 'a head'} (V {work.shape.vocab}, H {work.shape.hidden}): "
        f"{work.scored} scored tokens, {work.responses} responses of {work.tokens} after "
        f"{work.context} of prompt; {given.dtype}, {device.type}, {work.backend}"
        + ", frozen"
        * work.frozen
    )
    print(_planned_for(given, device))
    costs, chosen = found["routes"], found["chosen"]
    routes = []
    for route, cost in costs.items():
        fits = "yes" if cost["fits"] else f"with {format_bytes(cost['needed_budget'])}"
        name = f"{route} (chosen)" if route == chosen else route
        tile = " x ".join(map(str, cost["tile"]))
        routes.append((name, f"{cost['products']:.4g}", format_bytes(cost["bytes"]), tile, fits))
    columns = ("route", "products", "beyond the outputs", "tile", "fits the budget")
    tables.show(f"routes of fusedpo, with a budget of {format_bytes(work.budget)}", columns, routes)
    print(_why(costs, chosen))
    if "compact" in costs:
        print(
            f"compact's products are for {GUESSED_SHARE:.0%} of the columns, a first guess; later "
            "calls go by what the last one kept."
        )
    _sizes("the outputs of any program", found["outputs"])
    held = {name: buffers and sum(buffers.values()) for name, buffers in found["peers"].items()}
    sizes = {"fusedpo": None if chosen is None else costs[chosen]["bytes"], **held}
    programs = [(name, "cannot" if n is None else format_bytes(n)) for name, n in sizes.items()]
    title = "the same in other programs, by formula; Liger's takes no softcap"
    tables.show(title, ("program", "beyond the outputs"), programs)
    if "fit" in found:
        _print_fit(work, found["fit"])


def _planned_for(given: argparse.Namespace, device: Device) -> str:
    if device.type == "cpu":
        why = "" if given.device else ", as there is no GPU here (--device cuda plans for one)"
        text = f"the CPU{why}"
    elif device.memory is None:
        text = "a GPU of a memory that is not known (--device-memory tells it)"
    else:
        text = f"a GPU of {format_bytes(device.memory)}"
    own = "" if given.budget else f", with its default budget of {format_bytes(device.budget)}"
    return f"Planned for {text}{own}."


def _why(costs: dict[str, Any], chosen: str | None) -> str:
    if chosen is None:
        least, name = min((cost["needed_budget"], name) for name, cost in costs.items())
        return f"No route fits the budget; {name} would with {format_bytes(least)}."
    products = costs[chosen]["products"]
    text = f"{chosen} is the cheapest that fits, {format_products(products)}"
    for route, cost in costs.items():  # the cheapest first
        if cost["products"] < products:
            needed = format_bytes(cost["needed_budget"])
            return f"{text}; {route} takes {cost['products']:.4g} with {needed}."
    return f"{text}."


def _print_fit(work: Workload, fit: dict[str, Any]) -> None:
    memory, fits = format_bytes(fit["memory"]), fit["fits"]
    found = {"fusedpo": fits, **fit["peers"]}.items()
    rows = [(name, "none" if n is None else f"{n} tokens") for name, n in found]
    title = f"the longest response with which a step of {work.responses} fits {memory}, estimated"
    tables.show(title, ("program", "response"), rows)
    _sizes(f"what fusedpo's step holds with responses of {fits or 1}", fit["breakdown"])
    if fits is None:
        print(f"Nothing fits: one token takes more than {memory}, or --budget is too small for it.")


def _sizes(title: str, sizes: Mapping[str, int]) -> None:
    rows = [(name, format_bytes(size)) for name, size in sizes.items()]
    tables.show(title, ("what", "size"), [*rows, ("in all", format_bytes(sum(sizes.values())))])
