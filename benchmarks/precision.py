"""How exact is it?

Log-probabilities, gradients and what a trainer reads from them, against float64: the truth is
computed from the same rounded states and head. The loss is DPO with its reference in the same call
(``--losses`` takes others), at its own scale: no loss scaling, in fp16 neither.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpo.benchmarks import measure, plots, reports, sweep
from fusedpo.benchmarks.formulas import FORMULAS, TITLES, WITH_REFERENCE, Tokens
from fusedpo.benchmarks.options import Options, Question
from fusedpo.benchmarks.peers import OURS, PEERS, Logprobs, Unsupported, full_logits
from fusedpo.benchmarks.shapes import MIB, Case, Inputs, Shape, head_of
from fusedpo.benchmarks.timing import told
from fusedpo.labels import IGNORE_INDEX
from fusedpo.sizes import DEFAULT_BUDGET, format_bytes


class Column(NamedTuple):
    """One of the errors: its key, its heading in tables, and above its panel."""

    key: str
    heading: str
    panel: str


COLUMNS = (
    Column("logp_max", "logp, max", "log-probability,\nlargest error"),
    Column("logp_rms", "logp, rms", "log-probability,\nrms error"),
    Column("hidden", "dL/dhidden", "dL/dhidden,\nrelative error"),
    Column("hidden_row", "worst row", "dL/dhidden,\nits worst row"),
    Column("weight", "dL/dweight", "dL/dweight,\nrelative error"),
    Column("flushed", "flushed", "dL/dweight,\nshare flushed to 0"),
    Column("ratio", "log ratio", "on-policy log ratio,\nlargest (exactly 0)"),
    Column("step_0", "loss at step 0", "DPO at step 0,\n|loss - log 2|"),
)
DTYPES = ("bfloat16", "float16", "float32")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
TIE = 1.05
FLOOR = "the exact gradient, rounded"
"""What would be left if the exact gradient were stored in the dtype; no program, and not ranked."""

# smaller rows are those of tokens that the model is sure of: 1 - p is lost in fp32 already
_SMALL_ROW = 1e-3
_CHANCE = 1e-6  # of so many sums a few are exactly 0 without any underflow
_LOGITS_SD = 2.5
_SURE = 0.25
_EXTRA_PADDING = 16
_TRUTH_ELEMENTS = 2**24  # of logits at a time
_PIECE = 256  # rows of the head
_LOG_2 = float(torch.tensor(2.0).log())  # as a loss in fp32 can hold it


def entries(options: Options) -> list[sweep.Entry]:
    """Every program, and what takes a budget with a small one too: sums in parts are rounded more.

    The quick version has fusedpo alone with two budgets.
    """
    small = 8 * MIB * (1 if options.on_cpu else 16)
    found = [
        sweep.Entry(name, budget=DEFAULT_BUDGET if peer.budgeted else None)
        for name, peer in PEERS.items()
    ]
    found += [
        sweep.Entry(name, f"{peer.label}, {format_bytes(small)}", small)
        for name, peer in PEERS.items()
        if peer.budgeted and (name == OURS or not options.quick)
    ]
    if not options.quick:
        own = "linear_cross_entropy"
        found.append(sweep.Entry(own, f"{PEERS[own].label}, its own choice"))
    # ours last, where the eye finds it
    return sorted((e for e in found if e.peer in options.peers), key=lambda e: e.peer == OURS)


def realistic_inputs(case: Case, seed: int = 0) -> Inputs:
    """Logits as a trained model has them, rounded to the case's dtype.

    Of every four tokens three are guesses, their logit from 8 below the largest other one to 2
    above it, and one is sure, by 5 to 24. The reference has the same head and states a little off.
    """
    shape = case.shape
    generator = torch.Generator().manual_seed(seed)  # the same numbers on every device
    size = (2 * shape.pairs, shape.tokens)
    hidden = torch.randn(*size, shape.hidden, generator=generator) * _LOGITS_SD
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator) * shape.hidden**-0.5
    labels = torch.randint(shape.vocab, size, generator=generator)
    guess = torch.rand(size, generator=generator) * 10 - 8
    sure = torch.rand(size, generator=generator) * 19 + 5
    gap = torch.where(torch.rand(size, generator=generator) < _SURE, sure, guess)
    # of shape.vocab normal numbers about the largest
    largest = _LOGITS_SD * math.sqrt(2 * math.log(shape.vocab))
    target = weight[labels]
    missing = largest + gap - (hidden * target).sum(-1)
    hidden += (missing / target.square().sum(-1)).unsqueeze(-1) * target
    ref_hidden = hidden + 0.1 * torch.randn(*size, shape.hidden, generator=generator)
    advantages = torch.randn(size[0], generator=generator)

    def rounded(x: Tensor) -> Tensor:
        return x.to(case.device, case.torch_dtype)

    head = rounded(weight)
    labels = labels.to(case.device)
    found = Inputs(rounded(hidden), head, labels, rounded(ref_hidden), head)
    if case.loss == "sspo":
        old = full_logprobs(found.hidden, head, labels).float()
        old += 0.1 * torch.randn(size, generator=generator).to(case.device)
        found = found._replace(advantages=advantages.to(case.device), old_logprobs=old)
    return found


def _chunks(weight: Tensor, hidden: Tensor, *numbers: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time, of hidden [..., H] and of numbers [...]."""
    step = max(1, _TRUTH_ELEMENTS // len(weight))
    rows = (torch.split(t, step) for t in (hidden.flatten(0, -2), *(x.flatten() for x in numbers)))
    yield from zip(*rows, strict=True)


def _by_definition(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    return F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def exact_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Of hidden [..., H], weight and bias in float64, by the definition, for the gradients with
    respect to the log-probabilities [...]."""
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    head = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    parts, found = [], {}
    for h, y, g in _chunks(weight, hidden.detach(), labels, upstream):
        part = h.double().requires_grad_()
        logprobs = _by_definition(part, head["weight"], y, head.get("bias"))
        torch.autograd.backward(logprobs, g.double())
        assert part.grad is not None
        parts.append(part.grad)
    for name, leaf in head.items():
        assert leaf.grad is not None
        found[name] = leaf.grad
    return {"hidden": torch.cat(parts).view(hidden.shape), **found}


@torch.no_grad()
def full_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """In float64 by the definition, a few rows at a time."""
    head = weight.double()
    parts = [_by_definition(h.double(), head, y) for h, y in _chunks(head, hidden, labels)]
    return torch.cat(parts).view_as(labels)


class Truth(NamedTuple):
    logprobs: Tensor  # [B, T]
    hidden: Tensor  # dL/dhidden
    weight: Tensor  # dL/dweight


def truth_of(case: Case, inputs: Inputs) -> Truth:
    """Everything in float64, from the values that the programs are given too."""
    labels = inputs.labels
    logprobs = full_logprobs(inputs.hidden, inputs.weight, labels)
    ref = None
    if inputs.ref_hidden is not None and inputs.ref_weight is not None:
        ref = full_logprobs(inputs.ref_hidden, inputs.ref_weight, labels).sum(-1)
    leaf = logprobs.clone().requires_grad_()
    loss = FORMULAS[case.loss](Tokens(leaf, torch.ones_like(labels).bool(), ref, inputs))
    (upstreams,) = torch.autograd.grad(loss, leaf)
    return Truth(logprobs, **exact_gradients(inputs.hidden, inputs.weight, labels, upstreams))


Values = dict[str, float | None]


def gradient_errors(hidden: Tensor | None, weight: Tensor | None, truth: Truth) -> Values:
    """Of two gradients; one that is missing is 0."""
    exact = truth.hidden.flatten(0, 1)
    flat = torch.zeros_like(exact) if hidden is None else hidden.flatten(0, 1)
    sizes, wrong = exact.norm(dim=-1), (flat.double() - exact).norm(dim=-1)
    large = sizes >= _SMALL_ROW * sizes.max()
    size, off, flushed = torch.zeros(3, dtype=torch.float64, device=flat.device)
    # in pieces that a cache holds
    for start in range(0, len(truth.weight), _PIECE):
        b = truth.weight[start : start + _PIECE]
        a = torch.zeros_like(b) if weight is None else weight[start : start + _PIECE].double()
        size += b.square().sum()
        off += (a - b).square().sum()
        flushed += ((a == 0) & (b != 0)).sum()
    share = float(flushed / truth.weight.numel())
    return {
        "hidden": float(wrong.norm() / sizes.norm()),
        "hidden_row": float((wrong / sizes)[large].max()),
        "weight": float((off / size).sqrt()),
        # nothing can be said of a gradient that is not finite
        "flushed": (share if share > _CHANCE else 0.0) + 0 * float(off),
    }


@functools.cache
def _compiled_logprobs() -> Logprobs:
    return torch.compile(full_logits, dynamic=False)


def scorer(name: str) -> Logprobs | None:
    """The peer's log-probabilities, computed in the way that its loss computes them."""
    return _compiled_logprobs() if name == "compiled" else PEERS[name].logprobs


def logprob_errors(score: Logprobs, case: Case, inputs: Inputs, truth: Truth) -> Values:
    """Errors per token, and the log ratios of a policy that has not changed.

    A trainer scores responses first without gradients, in other batches than those it trains on:
    here one at a time, and padded further.
    """
    own = inputs.for_case(case)
    found = score(case, own.hidden, own.weight, own.labels).detach().double()
    error = found - truth.logprobs
    hidden = F.pad(inputs.hidden.detach(), (0, 0, 0, _EXTRA_PADDING), value=1.0)
    labels = F.pad(inputs.labels, (0, _EXTRA_PADDING), value=IGNORE_INDEX)
    weight = inputs.weight.detach()
    with torch.no_grad():
        alone = zip(torch.split(hidden, 1), torch.split(labels, 1), strict=True)
        old = torch.cat([score(case, h, weight, y) for h, y in alone])
    ratios = found - old[:, : found.shape[1]].double()
    return {
        "logp_max": float(error.abs().max()),
        "logp_rms": float(error.square().mean().sqrt()),
        "ratio": float(ratios.abs().max()),
    }


def step_0_error(case: Case, inputs: Inputs) -> float:
    """Of DPO where the reference is the policy."""
    case = replace(case, loss="dpo", reference="same call")
    same = inputs._replace(ref_hidden=inputs.hidden.detach(), ref_weight=inputs.weight.detach())
    loss = PEERS[case.peer](case, same.for_case(case)).detach()
    return abs(float(loss) - _LOG_2)


def errors(case: Case, inputs: Inputs, truth: Truth) -> tuple[Values, list[str]]:
    """What a peer gets wrong, and why something could not be measured."""
    peer = PEERS[case.peer]
    values: Values = {column.key: None for column in COLUMNS}
    notes = []

    def attempt(function: Callable[[], Values]) -> None:
        try:
            values.update(function())
        except Unsupported as error:
            notes.append(str(error))
        except Exception as error:  # another library's failure is a line of the table
            notes.append(told(error))

    def gradients() -> Values:
        own = inputs.for_case(case)
        torch.autograd.backward(peer(case, own))
        return gradient_errors(own.hidden.grad, own.weight.grad, truth)

    if (missing := peer.missing()) is not None:
        return values, [missing]
    attempt(gradients)
    score = scorer(case.peer)
    if score is not None:
        attempt(lambda: logprob_errors(score, case, inputs, truth))
    attempt(lambda: {"step_0": step_0_error(case, inputs)})
    for column in COLUMNS:
        value = values[column.key]
        if value is not None and not math.isfinite(value):
            values[column.key] = None
            notes.append(f"{column.heading} is not finite")
    return values, list(dict.fromkeys(notes))


def shapes(options: Options) -> list[Shape]:
    if options.shapes:
        return list(options.shapes)
    if options.on_cpu:
        return [head_of("pythia-70m", 256 if options.quick else 1024, pairs=8)]
    return [head_of("llama-3.1-8b", 1024 if options.quick else 4096, pairs=8)]


class Precision(Question):
    """The question, of every loss, shape and dtype."""

    def measured(self, options: Options) -> dict[str, Any]:
        here = entries(options)
        losses = options.losses or ("dpo",)
        dtypes = [options.dtype] if options.dtype else DTYPES
        points = list(itertools.product(losses, shapes(options), dtypes))
        rows: list[dict[str, Any]] = []
        steps = len(points) * (1 + len(here))
        with measure.progress(self.title, steps) as advance:
            for loss, shape, name in points:
                group = SHORT[name]
                group += f", {TITLES[loss]}" if len(losses) > 1 else ""
                group += f", N {shape.positions}" if len(shapes(options)) > 1 else ""
                reference = "same call" if loss in WITH_REFERENCE else "none"
                case = options.case(shape, loss=loss, reference=reference)
                advance(f"{group}: float64")
                rows += _group(group, replace(case, dtype=name), here, advance)
        named = ", ".join(TITLES[loss] for loss in losses)
        title = f"{self.title} {named} against float64"
        return {"title": title, "losses": list(losses), "rows": rows}


def _group(
    group: str, case: Case, here: Sequence[sweep.Entry], advance: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The rows of a dtype: what its rounding alone costs, then every program."""
    inputs = realistic_inputs(case)
    if case.reference == "none":
        inputs = inputs._replace(ref_hidden=None, ref_weight=None)
    truth = truth_of(case, inputs)
    stored = (truth.hidden.to(case.torch_dtype), truth.weight.to(case.torch_dtype))
    floor: Values = {column.key: None for column in COLUMNS}
    yield _row(group, FLOOR, None, {**floor, **gradient_errors(*stored, truth)}, [])
    del stored
    for entry in here:
        advance(f"{group}: {entry.name}")
        assert entry.budget != "least", "these entries have numbers"
        own = replace(case, peer=entry.peer, budget=entry.budget)
        yield _row(group, entry.name, own, *errors(own, inputs, truth))
        gc.collect()


def _row(
    group: str, name: str, case: Case | None, values: Values, notes: list[str]
) -> dict[str, Any]:
    measured = any(value is not None for value in values.values())
    return {
        "group": group,
        "entry": name,
        "version": None if case is None else PEERS[case.peer].version,
        "case": None if case is None else case.to_json(),
        "values": {key: None if v is None else float(f"{v:.4g}") for key, v in values.items()},
        "notes": notes if measured else [],
        "missing": None if measured else "; ".join(notes),
    }


QUESTION = Precision("precision", __doc__.splitlines()[0], kind="precision")


def _groups(answer: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in answer["rows"]:
        found.setdefault(row["group"], []).append(row)
    return found


def _ours(row: dict[str, Any]) -> bool:
    return row["case"] is not None and row["case"]["peer"] == OURS


def ranking(answer: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each group and column: the programs' order, the best value, whether fusedpo is first.

    Within 5 % of the best is first too; nothing is within 5 % of 0 but 0. fusedpo with its default
    budget is held against the other programs, not against itself with another budget.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group, rows in _groups(answer).items():
        found[group] = {}
        variants = [row["entry"] for row in rows if _ours(row)]
        ours: Values = next((r["values"] for r in rows if r["entry"] == PEERS[OURS].label), {})
        for column in COLUMNS:
            numbers = sorted(
                (
                    (row["values"][column.key], row["entry"])
                    for row in rows
                    if row["case"] is not None and row["values"][column.key] is not None
                ),
                # of equals ours is named first
                key=lambda pair: (pair[0], not pair[1].startswith(OURS)),
            )
            if numbers:
                best = numbers[0][0]
                own, others = ours.get(column.key), [v for v, n in numbers if n not in variants]
                found[group][column.key] = {
                    "order": [name for _, name in numbers],
                    "first": [name for value, name in numbers if value <= TIE * best],
                    "fusedpo": own is not None and own <= TIE * min(others, default=own),
                }
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words; a star marks the best of a column, and what is within 5 %."""
    ranks = ranking(answer)
    columns = ["", "program", *(column.heading for column in COLUMNS), ""]
    lines = []
    for row in answer["rows"]:
        if row["missing"] is not None:
            continue
        cells = []
        for column in COLUMNS:
            rank = ranks[row["group"]].get(column.key)
            star = "*" if rank and row["case"] and row["entry"] in rank["first"] else ""
            cells.append(_number(row["values"][column.key]) + star)
        lines.append([row["group"], row["entry"], *cells, "; ".join(row["notes"])])
    return columns, lines


def remarks(answer: dict[str, Any]) -> list[str]:
    """The columns in which fusedpo is not first, and why."""
    found = []
    for group, columns in ranking(answer).items():
        behind = [c.heading for c in COLUMNS if c.key in columns and not columns[c.key]["fusedpo"]]
        if not behind:
            found.append(f"{group}: fusedpo is first in every column, or within 5 % of the first.")
        elif "fp32" in group or "float32" in group:
            found.append(
                f"{group}: fusedpo is not first in {', '.join(behind)}. What is left there is the "
                "rounding of the fp32 product of hidden states and head, which is as large with "
                "everything behind it in float64; programs that call the product in other blocks "
                "get other sums, and who is ahead changes with the numbers."
            )
        else:
            found.append(f"{group}: fusedpo is not first in {', '.join(behind)}.")
    return found


def plot(answer: dict[str, Any]) -> Any:
    """A dot for each program and column, further to the left is better."""
    groups = {
        group: [row for row in rows if row["missing"] is None]
        for group, rows in _groups(answer).items()
    }
    heights = [len(rows) + 1 for rows in groups.values()]
    size = 3.0 + 1.85 * len(COLUMNS), 1.4 + 0.25 * sum(heights)
    figure = plots.figure(answer, *size, below=0.025)
    panels = figure.subplots(
        len(groups), len(COLUMNS), squeeze=False, sharey="row", height_ratios=heights
    )
    for (group, rows), line in zip(groups.items(), panels, strict=True):
        for column, axes in zip(COLUMNS, line, strict=True):
            _panel(axes, column, rows)
            if group == next(iter(groups)):
                axes.set_title(column.panel, fontsize=8)
        line[0].set_ylabel(group, fontsize=11, fontweight="bold")
        line[0].set_ylim(len(rows) - 0.4, -0.6)
        line[0].set_yticks(range(len(rows)), [row["entry"] for row in rows], fontsize=8)
        for row, text in zip(rows, line[0].get_yticklabels(), strict=True):
            text.set_color(_colour(row))
    return figure


def _colour(row: dict[str, Any]) -> str:
    ours, others = plots.OUR_COLOURS[0], plots.COLOURS[2]
    return plots.COLOURS[0] if row["case"] is None else ours if _ours(row) else others


def _panel(axes: Any, column: Column, rows: Sequence[dict[str, Any]]) -> None:
    values = [row["values"][column.key] for row in rows]
    # linear below the least, so that a 0 has a place
    axes.set_xscale("symlog", linthresh=min((value for value in values if value), default=1.0))
    axes.margins(x=0.5)
    axes.set_xticks([], [])  # each dot has its number beside it
    axes.minorticks_off()
    axes.tick_params(left=False)
    for y, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is not None:
            style = {"color": _colour(row)}
            axes.plot(value, y, marker="|" if row["case"] is None else "o", **style)
            place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(_number(value), (value, y), fontsize=6.5, **place, **style)


if __name__ == "__main__":
    sys.exit(reports.main(QUESTION))
