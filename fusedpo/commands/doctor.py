"""``fusedpo doctor``: are losses and gradients right here? (``fusedpo env`` says what is here.)"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from fusedpo import FusedLoss, linear_logprobs, losses, machine, tables
from fusedpo.benchmarks.formulas import FORMULAS, WITH_REFERENCE, Tokens
from fusedpo.benchmarks.shapes import Case, Inputs, Shape, make_inputs
from fusedpo.engine.matmul_settings import full_precision
from fusedpo.labels import IGNORE_INDEX

SUMMARY = "check that losses and gradients are right on this machine"
EXAMPLES = """\
examples:
  fusedpo doctor                         this machine, on its GPU if it has one
  fusedpo doctor --device cuda:1         another device
  fusedpo doctor --json > doctor.json    for a program; the exit code is 1 if a check fails
"""

_SHAPE = Shape(pairs=2, tokens=12, hidden=32, vocab=1031)


class Call(NamedTuple):
    """A loss to check; whole: this library's own, or a plain formula of log-probabilities."""

    what: str
    loss: str
    options: Mapping[str, Any]
    whole: bool = True
    frozen: bool = False


_SMALL = {"memory_budget": 96 * 1024}  # less than half of the logits in float32
_CAPPED = {"softcap": 1.0, **_SMALL}
CALLS = (
    Call("log-probabilities", "sspo", {}, whole=False),
    Call("soft cap, small budget", "sspo", _CAPPED, whole=False),
    Call("soft cap, frozen head", "sspo", _CAPPED, whole=False, frozen=True),
    Call("DPO", "dpo", {}),
    Call("SimPO, small budget", "simpo", _SMALL),
    Call("soft sequence policy", "sspo", {}),
)


class Check(NamedTuple):
    """The outcome of a call: its worst quantity, and the error of that over what is allowed."""

    what: str
    ok: bool
    quantity: str
    error: float | None  # None: no number came


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(given: argparse.Namespace) -> int:
    """Print the checks; 1 if one fails.

    Raises:
        ValueError: for a device that torch cannot use here.
    """
    device = machine.device_named(given.device)
    found = [check for dtype in dtypes(device) for check in checks(dtype, device)]
    failed = sum(not check.ok for check in found)
    hints = list(advice(machine.host()))
    if given.json:
        said = {"device": str(device), "checks": [check._asdict() for check in found]}
        print(json.dumps({**said, "advice": hints, "ok": not failed}, indent=2, allow_nan=False))
        return min(failed, 1)
    rows = []
    for what, ok, quantity, error in found:
        number = "" if error is None else f"{error:.2g}"
        rows.append((what, quantity, number, "ok" if ok else "FAILED"))
    header = ("checked against float64", "worst quantity", "error / allowed", "")
    tables.show(f"Checks on {device}", header, rows, styles={"ok": "green", "FAILED": "bold red"})
    print("", *(f"Advice: {hint}." for hint in hints), sep="\n")
    wrong = f"{failed} of {len(found)} checks failed on {device}: do not train there."
    print(wrong if failed else f"All {len(found)} checks passed on {device}.")
    return min(failed, 1)


def advice(host: Mapping[str, Any]) -> Iterator[str]:
    """What slows a call down, or keeps it from a GPU, that no error or warning tells."""
    environment, threads, cores = host["environment"], host["threads"], host["cores"]
    if host["nvidia_driver"] and not torch.cuda.is_available():
        yield (
            f"torch, built for {host['torch_build']}, sees no GPU beside an NVIDIA driver: install "
            "one for CUDA, or look at CUDA_VISIBLE_DEVICES and the driver's version (nvidia-smi)"
        )
    if environment.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1 runs Triton's kernels in Python, slowly, for tests: unset it"
    processes = int(environment.get("LOCAL_WORLD_SIZE", 1))
    if threads * processes > cores:
        yield (
            f"threads slow each other down, as {processes} x {threads} share {cores} core(s): set "
            f"OMP_NUM_THREADS={max(1, cores // processes)}"
        )
    if 1 < threads < 5 and environment.get("OMP_WAIT_POLICY", "").lower() != "passive":
        yield "threads spin while they wait, on few cores: set OMP_WAIT_POLICY=passive"


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Those that the device multiplies in; float32 in any case, whose failure is then told."""
    found = [torch.float32]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with contextlib.suppress(RuntimeError, TypeError):
            one = torch.ones(2, 2, dtype=dtype, device=device)
            found.append((one @ one).dtype)
    return found


def checks(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    """Small problems on the device, as ``backend="auto"`` solves them."""
    for call in CALLS:
        what = f"{str(dtype)[6:]}, {call.what}"
        try:
            errors = errors_of(call, dtype, device)
        except Exception as raised:  # whatever it is, it is what is to be found out
            said = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
            yield Check(what, False, said[:300], None)
        else:
            # NaN is the worst of all, and JSON has neither it nor infinity
            worst, error = max(errors.items(), key=lambda one: (math.isnan(one[1]), one[1]))
            yield Check(what, error <= 1, worst, error if math.isfinite(error) else None)


def errors_of(call: Call, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """By quantity the error of a call, over what is allowed.

    That is 2e-5 of a log-probability (1e-11 in float64), and ten times that of the loss; of a
    gradient a quarter more than full logits in the same dtype are off, or two roundings.
    """
    inputs = inputs_of(call, dtype, device, dtype)
    logprobs, loss, *gradients = results(call, inputs, by_engine=True)
    with full_precision():
        _, _, *rounded = results(call, inputs)
    inputs = inputs_of(call, dtype, "cpu", torch.float64)
    exact_logprobs, exact_loss, *exact = results(call, inputs)
    bound, floor = 2e-5, max(5e-6, 2 * torch.finfo(dtype).eps)
    if dtype == torch.float64:
        bound, floor = 1e-11, 1e-12
    errors = {
        "log-probabilities": float((logprobs - exact_logprobs).abs().max()) / bound,
        "loss": float((loss - exact_loss).abs()) / (10 * bound),
    }
    for i, truth in enumerate(exact):
        allowed = max(floor * float(truth.norm()), 1.25 * float((rounded[i] - truth).norm()))
        name = f"gradient of {('hidden', 'weight')[i]}"
        errors[name] = float((gradients[i] - truth).norm()) / allowed
    return errors


def results(call: Call, inputs: Inputs, by_engine: bool = False) -> list[Tensor]:
    """Log-probabilities, loss and gradients, in float64 on the CPU."""
    if by_engine and call.whole:
        names = ("advantages", "old_logprobs") if call.loss == "sspo" else ("ref_logprobs",)
        more = {name: getattr(inputs, name) for name in names}
        out = FusedLoss(losses.get(call.loss), **call.options)(*inputs[:3], **more)
        logprobs, loss = out.logprobs, out.loss
    else:
        function = linear_logprobs if by_engine else full_logits
        logprobs = function(*inputs[:3], **call.options)
        scored = inputs.labels != IGNORE_INDEX
        loss = FORMULAS[call.loss](Tokens(logprobs, scored, inputs.ref_logprobs, inputs))
    gradients = torch.autograd.grad(loss, [t for t in inputs[:2] if t.requires_grad])
    return [t.detach().double().cpu() for t in (logprobs, loss, *gradients)]


def full_logits(h: Tensor, w: Tensor, labels: Tensor, softcap: float = 0.0, **_: Any) -> Tensor:
    """Log-probabilities by the naive program."""
    z = linear(h, w).to(torch.promote_types(h.dtype, torch.float32))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logprobs = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logprobs.masked_fill(labels < 0, 0.0)


def inputs_of(call: Call, drawn: torch.dtype, device: Any, dtype: torch.dtype) -> Inputs:
    """Two pairs, whose prompts are ignored and not all of one length, drawn in a dtype and cast."""
    options: dict[str, Any] = {"dtype": str(drawn)[6:], "loss": call.loss, "frozen": call.frozen}
    options["reference"] = "precomputed" if call.loss in WITH_REFERENCE else "none"
    leaves = make_inputs(Case("fusedpo", _SHAPE, masked=0.25, **options))
    leaves.labels[1, :5] = IGNORE_INDEX
    found: Inputs = tree_map_only(Tensor, lambda t: t.detach().to(device), leaves)
    hidden = found.hidden.to(dtype).requires_grad_()
    weight = found.weight.to(dtype).requires_grad_(not call.frozen)
    return found._replace(hidden=hidden, weight=weight)
