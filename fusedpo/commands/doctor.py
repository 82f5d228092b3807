"""``fusedpo doctor``: what is installed, what will be used and why, and does it compute the right
thing.

The engine is tried in this process on small problems; whether packages can be imported is tried in
another one meanwhile, which takes long and may crash.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

import fusedpo
from fusedpo import (
    Plan,
    doctor,
    linear_logprobs,
    losses,
    plan,
    policy_loss,
    preference_loss,
    tables,
)
from fusedpo.engine.backend import resolve
from fusedpo.engine.matmul_settings import full_precision
from fusedpo.labels import IGNORE_INDEX
from fusedpo.sizes import format_bytes

SUMMARY = "say what is installed, what will be used, and whether it computes the right thing"
EXAMPLES = """\
examples:
  this machine, on its GPU if it has one, in less than ten seconds:
    fusedpo doctor

  another device:
    fusedpo doctor --device cpu
    fusedpo doctor --device cuda:1

  for a program, or to report a problem; the exit code is 1 if something that is needed fails:
    fusedpo doctor --json > doctor.json
"""

_SECONDS = 5.5  # for checks and imports; with what torch's own import takes, ten for all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(given: argparse.Namespace) -> int:
    """Print the report; 1 if something that is needed fails.

    Raises:
        ValueError: for a device that there is not.
    """
    report = examine(doctor.device_named(given.device))
    if given.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _print(report)
    return 0 if report["ok"] else 1


def examine(device: torch.device) -> dict[str, Any]:
    """Everything, as JSON has it."""
    end = time.monotonic() + _SECONDS
    imports = _Imports()
    try:
        taken = choices(device)
        tried = checks(device)
        imported = imports.tried(end - time.monotonic())
    finally:
        imports.process.kill()
        imports.process.wait()
    facts = doctor.gather(device, {name: said for name, said in imported.items() if said})
    found = doctor.findings(facts)
    skipped = [check.what for check in tried if check.ok is None]
    if skipped:
        says = f"the checks took too long, and some were left out ({'; '.join(skipped)}): run again"
        found.append(doctor.Finding("warning", says, "fusedpo doctor"))
    for choice in taken:
        if choice.backend == "none":
            says = f'backend="auto" fails for {choice.dtype} on {device}: {choice.why}'
            found.insert(0, doctor.Finding("error", says, "fusedpo/backend.py"))
    failed = sum(check.ok is False for check in tried)
    errors = sum(one.severity == "error" for one in found)
    warnings = sum(one.severity == "warning" for one in found)
    return {
        "fusedpo": fusedpo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [
            {
                "name": package.name,
                "version": facts.versions[package.name],
                "supported": doctor.supported(package.name, facts.least),
                "use": package.use,
                "imports": imported[package.name] is None if package.name in imported else None,
            }
            for package in doctor.PACKAGES
        ],
        "device": {"device": str(device), "torch_build": doctor.build(), **doctor.about(device)},
        "gpus": [
            doctor.about(torch.device("cuda", i)) | {"device": f"cuda:{i}"}
            for i in range(facts.gpus)
        ],
        "backends": [choice._asdict() for choice in taken],
        "rule": RULE,
        "checks": [_finite(check)._asdict() for check in tried],
        "findings": [one._asdict() for one in found],
        "ok": not failed and not errors,
        "verdict": _verdict(len(tried) - len(skipped), failed, errors, warnings, device),
    }


def _finite(check: Check) -> Check:
    """JSON has no NaN."""
    known = check.error is not None and math.isfinite(check.error)
    return check if known else check._replace(error=None)


def _verdict(tried: int, failed: int, errors: int, warnings: int, device: torch.device) -> str:
    def some(count: int, what: str) -> str:
        return f"{count} {what}{'s' * (count != 1)}"

    if failed or errors:
        parts = [some(failed, "failed check")] if failed else []
        parts += [some(errors, "error")] if errors else []
        return f"Do not train on {device} yet: {' and '.join(parts)}."
    passed = f"{some(tried, 'check')} passed on {device}"
    return f"{passed}, with {some(warnings, 'warning')}." if warnings else f"All is well: {passed}."


# printing


class _Section(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def _sections(report: dict[str, Any]) -> Iterator[_Section]:
    rows: list[tuple[str, ...]] = [("python", report["python"], "", "")]
    for one in report["packages"]:
        version = one["version"] or "not installed"
        rows.append((one["name"], version, one["supported"], one["use"]))
    title = f"fusedpo {report['fusedpo']} on {report['platform']}"
    yield _Section(title, ("package", "version", "supported", "for"), rows)

    device = report["device"]
    rows = [(device["device"], _about(device), f"torch built for {device['torch_build']}")]
    rows += [(gpu["device"], _about(gpu), "") for gpu in report["gpus"]]
    yield _Section("Devices; the first one is looked at", ("device", "", ""), rows)

    chosen: dict[tuple[str, str], list[str]] = {}
    for one in report["backends"]:
        chosen.setdefault((one["backend"], one["why"]), []).append(one["dtype"])
    rows = [(backend, ", ".join(names), why) for (backend, why), names in chosen.items()]
    yield _Section('What backend="auto" takes', ("backend", "for", "why"), rows)

    words = {True: "ok", False: "FAILED", None: "not tried"}
    rows = []
    for one in report["checks"]:
        numbers = ("" if one[key] is None else f"{one[key]:.1e}" for key in ("error", "allowed"))
        rows.append((one["what"], one["quantity"], *numbers, words[one["ok"]]))
    header = ("what", "its worst number", "error", "allowed", "")
    yield _Section(f"Checks, {report['rule']}", header, rows)

    rows = [(one["severity"], one["says"]) for one in report["findings"]]
    if rows:
        yield _Section("Findings", ("", ""), rows)


def _about(device: dict[str, Any]) -> str:
    parts = [device["name"]]
    if device.get("capability"):
        parts.append(f"compute capability {'.'.join(map(str, device['capability']))}")
    if device.get("memory"):
        parts.append(format_bytes(device["memory"]))
    if device.get("threads"):
        parts.append(f"{device['threads']} threads")
    return ", ".join(parts)


def _print(report: dict[str, Any]) -> None:
    for section in _sections(report):
        tables.show(*section, styles=_STYLES)
        print()
    print(report["verdict"])


_STYLES = {"ok": "green", "FAILED": "bold red", "error": "bold red", "warning": "yellow"}


# which backend


class Choice(NamedTuple):
    dtype: str
    backend: str
    why: str


def choices(device: torch.device) -> list[Choice]:
    """What ``backend="auto"`` takes on this device, and why."""
    made = ((d, torch.zeros(1, 1, dtype=d, device=device)) for d in dtypes(device))
    return [Choice(str(dtype)[6:], *_choice(hidden)) for dtype, hidden in made]


def _choice(hidden: Tensor) -> tuple[str, str]:
    try:
        resolve("triton", hidden)
        backend = resolve("auto", hidden)
        if backend == "triton":
            return backend, "the kernels can run here"
    except ValueError as error:
        match = re.search(r'expected (.+) for "triton", got (.+);', str(error))
        return "torch", f"kernels need {match[1]}: got {match[2]}" if match else str(error)
    except Exception as error:  # a Triton that cannot be imported
        return "none", f"{type(error).__name__}: {error}"
    return backend, "the kernels would run in Triton's interpreter, which is for tests"


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Those that the device multiplies in."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        try:
            one = torch.ones(2, 2, dtype=dtype, device=device)
            found.append((one @ one).dtype)
        except (RuntimeError, TypeError):
            continue
    return found


# whether packages can be imported

_IMPORTS = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
        error = None
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    print("\\n\\x1e", json.dumps([name, error]), flush=True)  # packages may print too
"""


class _Imports:
    """Whether the installed packages can be imported, tried in a process of its own."""

    def __init__(self) -> None:
        installed = doctor.versions()
        self.modules = {p.module: p.name for p in doctor.PACKAGES if installed[p.name]}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IMPORTS, json.dumps(sys.path), *self.modules],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"},
        )

    def tried(self, seconds: float) -> dict[str, str | None]:
        """Package -> its error, or None if it has none. What took too long is left out."""
        late = False
        try:
            output, _ = self.process.communicate(timeout=max(seconds, 0.01))
        except subprocess.TimeoutExpired:
            late = True
            self.process.kill()
            output, _ = self.process.communicate()
        text = output.decode("utf-8", "replace")
        found = {}
        for line in re.findall(r"^\x1e (\[.*)$", text, re.MULTILINE):
            module, error = json.loads(line)
            found[self.modules[module]] = error and " ".join(error.split())[:300]
        missing = [name for name in self.modules.values() if name not in found]
        if missing and not late:
            found[missing[0]] = f"it ended the process with code {self.process.returncode}"
        return found


# does it compute the right thing

RULE = (
    "against full logits in float64: log-probabilities within 2e-6 (float64: 1e-12) of the largest "
    "logit, at least 10; losses 10 x that; gradients within 1.25 x the error of full logits in the "
    "same dtype or, relative to their norm, 1e-12, 5e-6 and, in half precision, two roundings"
)
_SHAPE, _VOCAB, _HIDDEN = (4, 12), 1031, 32
_TIGHT = 96 * 1024  # bytes; less than half of the logits in float32


class Check(NamedTuple):
    """ok is None for what was not tried; error and allowed are those of the worst quantity."""

    what: str
    ok: bool | None
    error: float | None = None
    allowed: float | None = None
    quantity: str = ""


class Problem:
    """Four sequences at a small head, prompts ignored; the same numbers in every dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        g = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device
        self.hidden = torch.randn(*_SHAPE, _HIDDEN, generator=g).to(device, dtype)
        self.weight = (0.3 * torch.randn(_VOCAB, _HIDDEN, generator=g)).to(device, dtype)
        labels = torch.randint(_VOCAB, _SHAPE, generator=g)
        for row, prompt in enumerate((2, 5, 0, 3)):
            labels[row, :prompt] = IGNORE_INDEX
        self.labels = labels.to(device)
        upstream, noise = torch.randn(2, *_SHAPE, generator=g)
        self.upstream = upstream.to(device)
        self.advantages = torch.tensor([1.0, 0.5, 2.0, 0.25], device=device)
        # of another model
        near = self.full(torch.float64, "cpu", torch.sum)[0] + 0.1 * noise
        self.other = near.masked_fill(labels < 0, 0.0).to(device, torch.float32)

    def full(
        self, dtype: torch.dtype, at: str, formula: Callable[[Tensor], Tensor], cap: float = 0.0
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], float]:
        """The naive program: log-probabilities, loss, gradients and the largest logit."""
        h, w = (t.detach().to(at, dtype).requires_grad_() for t in (self.hidden, self.weight))
        z = linear(h, w).to(torch.promote_types(dtype, torch.float32))
        z = cap * torch.tanh(z / cap) if cap else z
        labels = self.labels.to(at)
        picked = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        logprob = picked.masked_fill(labels < 0, 0.0)
        loss = formula(logprob)
        gradients = torch.autograd.grad(loss, (h, w))
        return logprob.detach(), loss.detach(), gradients, float(z.detach().abs().max())

    def formula(self, name: str, logprob: Tensor) -> Tensor:
        """The loss of this name, from log-probabilities [4, T], written anew."""
        upstream, other, a = (t.to(logprob) for t in (self.upstream, self.other, self.advantages))
        scored = self.labels.to(logprob.device) >= 0
        if name == "DPO":
            reward = 0.1 * (logprob - other).sum(1)
            return -logsigmoid(reward[:2] - reward[2:]).mean()
        if name == "SimPO":
            reward = 2.0 * logprob.sum(1) / scored.sum(1)
            return -logsigmoid(reward[:2] - reward[2:] - 0.5).mean()
        if name == "GRPO":
            ratio = (logprob - other).exp()
            least = torch.minimum(ratio * a[:, None], ratio.clamp(0.8, 1.2) * a[:, None])
            return -((least * scored).sum(1) / scored.sum(1)).mean()
        return (logprob * upstream).sum()

    def fused(
        self, name: str, h: Tensor, w: Tensor, cap: float, budget: int | Plan | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and loss, from this library."""
        given: dict[str, Any] = {"softcap": cap or None, "memory_budget": budget}
        if name == "DPO":
            given["ref_logprobs"] = self.other
            out = preference_loss(losses.DPO(beta=0.1), h, w, self.labels, **given)
        elif name == "SimPO":
            out = preference_loss(losses.SimPO(beta=2.0, gamma=0.5), h, w, self.labels, **given)
        elif name == "GRPO":
            given |= {"advantages": self.advantages, "old_logprobs": self.other}
            loss = losses.GRPO(epsilon_low=0.2, epsilon_high=0.2)
            out = policy_loss(loss, h, w, self.labels, **given)
        else:
            logprob = linear_logprobs(h, w, self.labels, **given)
            return logprob.detach(), self.formula(name, logprob)
        return out.logprobs, out.loss

    def solve(
        self, name: str = "", *, cap: float = 0.0, tight: bool = False, frozen: bool = False
    ) -> Check:
        """One call, judged by RULE."""
        h, w = self.hidden.detach().requires_grad_(), self.weight.detach()
        wanted = [h] if frozen else [h, w.requires_grad_()]
        budget: int | Plan | None = _TIGHT if tight else None
        what = f"{name}{', small budget' * tight}"
        if not name:
            needs = ("hidden",) if frozen else ("hidden", "weight")
            count, on = int((self.labels >= 0).sum()), self.device
            options: dict[str, Any] = {"softcap": bool(cap), "gathered": True, "device": on}
            options |= {"dtype": self.dtype, "needs": needs, "backend": resolve("auto", h)}
            budget = plan(count, _VOCAB, _HIDDEN, budget=_TIGHT if tight else None, **options)
            what = f"{budget.route}{', softcap' * bool(cap)}"
        logprob, loss = self.fused(name, h, w, cap, budget)
        gradients = torch.autograd.grad(loss, wanted)

        formula = functools.partial(self.formula, name)
        exact, exact_loss, exact_gradients, largest = self.full(torch.float64, "cpu", formula, cap)
        with full_precision():
            naive_gradients = self.full(self.dtype, str(self.device), formula, cap)[2]
        per_logit, floor = (2e-6, max(5e-6, 2 * torch.finfo(self.dtype).eps))
        if self.dtype == torch.float64:
            per_logit, floor = 1e-12, 1e-12
        bound = per_logit * max(10.0, largest)
        seen = [("log-probabilities", float((logprob.double().cpu() - exact).abs().max()), bound)]
        gap = abs(float(loss.detach()) - float(exact_loss)) / max(1.0, abs(float(exact_loss)))
        seen.append(("loss", gap, 10 * bound))
        for i, gradient in enumerate(gradients):
            allowed = max(floor, 1.25 * _relative(naive_gradients[i], exact_gradients[i]))
            error = _relative(gradient, exact_gradients[i])
            seen.append((f"gradient of {('hidden', 'weight')[i]}", error, allowed))
        # NaN is the worst of all
        worst = max(seen, key=lambda one: one[1] / one[2] if one[1] == one[1] else math.inf)
        return Check(what, worst[1] <= worst[2], worst[1], worst[2], worst[0])

    def first_step(self) -> Check:
        """A policy that is its own reference: a loss of log 2, margins of 0."""
        h = self.hidden.detach()
        out = preference_loss(losses.DPO(), h, self.weight, self.labels, ref_hidden=h)
        error = abs(float(out.loss) - math.log(2)) + abs(float(out.metrics["rewards/margins"]))
        what = "DPO of equal models is log 2"
        return Check(what, error <= 6e-8, error, 6e-8, "loss and margin")


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double().cpu() - exact).norm() / exact.norm())


def checks(device: torch.device, seconds: float = 5.0) -> list[Check]:
    """Small problems on the device, as ``backend="auto"`` solves them; none is begun late."""
    end, threads = time.monotonic() + seconds, torch.get_num_threads()
    torch.set_num_threads(1)  # more are slower at this size
    try:
        found = [one for dtype in dtypes(device) for one in _checks(dtype, device, end)]
        return found or [Check(f"a product of two matrices on {device}", False)]
    finally:
        torch.set_num_threads(threads)


def _checks(dtype: torch.dtype, device: torch.device, end: float) -> Iterator[Check]:
    def problem() -> Problem:
        return Problem(dtype, device)

    tries: list[Callable[[], Check]] = [
        lambda: problem().solve(),
        lambda: problem().solve(cap=3.0, tight=True),
        lambda: problem().solve(cap=3.0, tight=True, frozen=True),
        lambda: problem().solve("DPO"),
        lambda: problem().solve("SimPO", tight=True),
        lambda: problem().solve("GRPO"),
        lambda: problem().first_step(),
    ]
    for one in tries:
        if time.monotonic() > end:
            yield Check(f"{str(dtype)[6:]}: not everything, for want of time", None)
            return
        try:
            found = one()
        except Exception as error:  # whatever it is, it is what is to be found out
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            found = Check(said[:300], False)
        yield found._replace(what=f"{str(dtype)[6:]}, {found.what}")
