"""Does a training within a tolerance of gradients go as an exact one does?

    python -m fusedpo.benchmarks.compact_training [--steps 60] [--seeds 5] [--layers N] ...

SmolLM2-135M-Instruct, all of its weights, is tuned by DPO and by SimPO on pairs: the chosen
response is how a stretch of this project's documents and of its licence goes on, the rejected one
what the model writes itself after the same 32 tokens. Weights and gradients are bf16; the
optimizer, AdamW, keeps a copy of the weights in fp32, which begins with the same numbers. Exactly
and within a tolerance it is the same training but for the gradients of the head and of the hidden
states before it.

What rounding alone does to a training is shown by more exact ones, from seeds. Their weights begin
rounded to bf16 at random, up or down, where those of the first two are rounded to nearest; DPO's
reference is where each begins. ``--rounding gradients`` is less: the weights begin alike, and each
number of their gradients is moved at random by at most half of bf16's last place, which is as much
as its rounding has moved it already.

The pairs are made once, in a few minutes, and kept in build/states. ``--layers N`` trains the last
N layers, the last norm and the head alone, which is then no longer the embedding too, and with 0
the head alone: for a short look.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedpo
from fusedpo import smollm2
from fusedpo.benchmarks import measure, plots, reports, section, states
from fusedpo.benchmarks.formulas import TITLES
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.section import Verdict, number
from fusedpo.benchmarks.timing import median
from fusedpo.engine import tolerance
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import DPO, SimPO

TITLE = __doc__.splitlines()[0]
LOSSES = {"dpo": DPO(beta=0.1), "simpo": SimPO(beta=2.0, gamma=0.5)}
PROMPT, RESPONSE = 32, 128
EXACT = "exact"
ROUNDING = ("start", "gradients")
_GENERATED = 46  # prompts at a time
_EVALUATED = 8  # pairs at a time


@dataclass(frozen=True)
class Settings:
    """Of all trainings.

    Attributes:
        pairs: of a step.
        held_out: pairs that are not trained on.
        seeds: trainings of each kind of rounding.
        rounding: what is rounded at random, of `ROUNDING`.
        layers: the last so many are trained; None: everything is.
        rate: AdamW's learning rate.
        within: the tolerance.
    """

    losses: tuple[str, ...] = tuple(LOSSES)
    steps: int = 60
    pairs: int = 2
    held_out: int = 64
    seeds: int = 5
    layers: int | None = None
    rate: float = 2e-5
    within: float = 2e-3
    rounding: tuple[str, ...] = ROUNDING[:1]
    budget: str = "256MiB"

    @property
    def all_pairs(self) -> int:
        return self.steps * self.pairs + self.held_out


# pairs


@dataclass(frozen=True)
class Pairs:
    """Prompts and responses, [P, 2, T]: the chosen one, then the rejected one.

    Attributes:
        labels: -100 on prompts and on what follows the end of a response.
        reference: [P, 2], log-probabilities of responses under the model as it was; None: none yet.
    """

    ids: Tensor
    labels: Tensor
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice) -> Pairs:
        reference = None if self.reference is None else self.reference[chosen]
        return Pairs(self.ids[chosen], self.labels[chosen], reference)

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Chosen rows first: [2P, T], [2P, T], [2P]."""
        reference = self.reference
        ids, labels = (t.transpose(0, 1).flatten(0, 1) for t in (self.ids, self.labels))
        return ids, labels, None if reference is None else reference.T.flatten()


def made_pairs(folder: Path | None = None, count: int = 184) -> Pairs:
    """Pairs of SmolLM2, kept in a file; from even steps through the texts, in random order.

    Raises:
        ImportError, ValueError: as benchmarks/states.py's ``smollm2``.
    """
    texts = states.texts()
    smollm2.need_packages()
    path = (folder or states.FOLDER) / f"pairs-{count}.safetensors"
    about = [*texts, f"{PROMPT} {RESPONSE} {count}"]
    return Pairs(**states.cached(path, about, lambda: _pairs(texts, count)))


def _pairs(texts: Sequence[str], count: int) -> dict[str, Tensor]:
    model, tokenizer = smollm2.load()
    ids = torch.cat([torch.tensor(tokenizer(text).input_ids) for text in texts])
    length = PROMPT + RESPONSE
    if count * length > len(ids):
        raise ValueError(f"pairs: expected at most {len(ids) // length}, got {count}")
    starts = [i * (len(ids) - length) // max(1, count - 1) for i in range(count)]
    random.Random(0).shuffle(starts)
    chosen = torch.stack([ids[start : start + length] for start in starts])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rejected = torch.cat([_written(model, part) for part in torch.split(chosen, _GENERATED)])
    return joined(chosen, rejected, model.generation_config.eos_token_id)


def _written(model: Any, given: Tensor) -> Tensor:
    """Prompts [P, T] with responses that the model samples."""
    prompts = given[:, :PROMPT]
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=RESPONSE,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    # all may have ended before
    return torch.nn.functional.pad(written, (0, given.shape[1] - written.shape[1]))


def joined(chosen: Tensor, rejected: Tensor, end: int) -> dict[str, Tensor]:
    """Ids and labels [P, 2, T] of rows [P, T]; a rejected one is over with its first end."""
    ids = torch.stack((chosen, rejected), 1)
    labels = ids.clone()
    labels[:, :, :PROMPT] = IGNORE_INDEX
    over = (rejected[:, PROMPT:] == end).cumsum(1)
    over = torch.nn.functional.pad(over, (1, 0))[:, :-1] > 0
    labels[:, 1, PROMPT:].masked_fill_(over, IGNORE_INDEX)
    return {"ids": ids, "labels": labels}


# a training


def rounded(values: Tensor, seed: int | None) -> Tensor:
    """fp32 as bf16: to nearest, or at random up or down, so that the mean is the value."""
    if seed is None:
        return values.bfloat16()
    generator = torch.Generator().manual_seed(seed)
    below = torch.randint(2**16, values.shape, dtype=torch.int32, generator=generator)
    bits = (values.view(torch.int32) + below).bitwise_and_(-(2**16))
    return bits.view(torch.float32).bfloat16()


def moved(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 as fp32, each number moved at random by at most half of bf16's last place."""
    places = torch.randint(-(2**15), 2**15, gradient.shape, dtype=torch.int32, generator=generator)
    # 0 has no last place
    places.masked_fill_(gradient.abs() < torch.finfo(torch.bfloat16).tiny, 0)
    return (gradient.float().view(torch.int32) + places).view(torch.float32)


@dataclass
class Run:
    """A training, and what came of it.

    Attributes:
        losses: of each step, before it.
        seconds: of each step.
        kept: the share of columns of each step; 1 where gradients are exact.
    """

    loss: str
    entry: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    breaches: int = 0
    held_out: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains one model again and again from the same start.

    Args:
        model: a causal language model in fp32, whose parameters are the start.
        pairs: those of ``settings.all_pairs``; the last ones are held out.
    """

    def __init__(self, model: Any, pairs: Pairs, settings: Settings) -> None:
        self.model, self.settings = model, settings
        if settings.layers is not None:
            self._train_last(settings.layers)
        self._start = {name: p.detach().clone() for name, p in model.named_parameters()}
        # parameters only: positions are angles that bf16 cannot hold
        for p in model.parameters():
            p.data = p.data.bfloat16()
        self.train, self.held_out = pairs[: -settings.held_out], pairs[-settings.held_out :]
        self._reference_of: int | None = -1

    def _train_last(self, layers: int) -> None:
        model = self.model
        model.requires_grad_(False)
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        trained = [*model.model.layers[-layers:], model.model.norm] if layers else []
        for module in (*trained, head):
            module.requires_grad_(True)

    def _restart(self, loss: str, start: int | None) -> None:
        """start: its seed; None: rounded to nearest."""
        with torch.no_grad():
            for i, (name, p) in enumerate(self.model.named_parameters()):
                p.copy_(rounded(self._start[name], None if start is None else 1000 * start + i))
        if LOSSES[loss].needs_reference and start != self._reference_of:
            self._reference_of = start
            self.train = replace(self.train, reference=self._logprobs(self.train))
            self.held_out = replace(self.held_out, reference=self._logprobs(self.held_out))

    def _states(self, ids: Tensor) -> Tensor:
        return self.model.model(ids, use_cache=False).last_hidden_state

    @property
    def _head(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @torch.no_grad()
    def _logprobs(self, pairs: Pairs) -> Tensor:
        """[P, 2] of responses."""
        found = []
        for start in range(0, len(pairs), _EVALUATED):
            ids, labels, _ = pairs[start : start + _EVALUATED].rows
            own = fusedpo.linear_logprobs(self._states(ids)[:, :-1], self._head, labels[:, 1:])
            found.append(own.sum(1).view(2, -1).T)
        return torch.cat(found)

    def _loss(self, loss: str, pairs: Pairs, within: float) -> fusedpo.LossOutput:
        ids, labels, reference = pairs.rows
        return fusedpo.preference_loss(
            LOSSES[loss],
            self._states(ids),
            self._head,
            labels,
            shift=True,
            ref_logprobs=reference if LOSSES[loss].needs_reference else None,
            memory_budget=self.settings.budget,
            gradient_tolerance=within,
        )

    def run(
        self,
        loss: str,
        entry: str,
        within: float = 0.0,
        start: int | None = None,
        gradients: int | None = None,
    ) -> Run:
        """A training from the start; start, gradients: seeds of what is rounded at random."""
        tolerance.forget()
        self._restart(loss, start)
        generator = None if gradients is None else torch.Generator().manual_seed(gradients)
        found = Run(loss, entry)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        masters = [p.detach().float() for p in weights]
        optimizer = torch.optim.AdamW(
            masters, lr=self.settings.rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        for step in range(self.settings.steps):
            begin = time.perf_counter()
            batch = self.train[step * self.settings.pairs : (step + 1) * self.settings.pairs]
            out = self._loss(loss, batch, within)
            torch.autograd.backward(out.loss)
            for master, p in zip(masters, weights, strict=True):
                assert p.grad is not None
                master.grad = p.grad.float() if generator is None else moved(p.grad, generator)
                p.grad = None
            optimizer.step()
            with torch.no_grad():
                for master, p in zip(masters, weights, strict=True):
                    p.copy_(master)
            found.losses.append(float(out.loss.detach()))
            found.seconds.append(time.perf_counter() - begin)
            self._note(found, within)
        found.held_out = self._held_out(loss)
        return found

    def _note(self, found: Run, within: float) -> None:
        if not within:
            found.kept.append(1.0)
            return
        record = tolerance.record_of(within, "cpu", *self._head.shape)
        found.kept.append(record.kept)
        found.breaches = record.breaches

    @torch.no_grad()
    def _held_out(self, loss: str) -> dict[str, float]:
        """Loss, accuracy and margin of the pairs that are held out, means over the pairs."""
        sums, count = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}, len(self.held_out)
        for start in range(0, count, _EVALUATED):
            part = self.held_out[start : start + _EVALUATED]
            out = self._loss(loss, part, 0.0)
            sums["loss"] += len(part) * float(out.loss)
            sums["accuracy"] += len(part) * float(out.metrics["rewards/accuracies"])
            sums["margin"] += len(part) * float(out.metrics["rewards/margins"])
        return {name: value / count for name, value in sums.items()}

    def before(self, loss: str) -> dict[str, float]:
        """What is held out, before any training."""
        self._restart(loss, None)
        return self._held_out(loss)


def trainings(trainer: Trainer, settings: Settings) -> Iterator[Run]:
    """Exactly, within the tolerance, and from every seed."""
    for loss in settings.losses:
        yield trainer.run(loss, EXACT)
        yield trainer.run(loss, named(settings.within), settings.within)
        for kind in settings.rounding:
            for seed in range(1, settings.seeds + 1):
                yield trainer.run(loss, f"{kind}, seed {seed}", **{kind: seed})


def named(within: float) -> str:
    return f"tolerance {within:g}"


# the answer


def answer_of(
    runs: Sequence[Run],
    before: Mapping[str, Mapping[str, float]],
    settings: Settings,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """before: of each loss, what is held out before any training."""
    return {
        "question": "compact_training",
        "kind": "compact_training",
        "title": TITLE,
        "machine": machine,
        "quick": settings != Settings(),
        "settings": asdict(settings),
        "before": before,
        "rows": [
            {
                "group": TITLES[run.loss],
                "entry": run.entry,
                "losses": [round(x, 6) for x in run.losses],
                "seconds": [round(x, 3) for x in run.seconds],
                "median_seconds": median(run.seconds),
                "kept": sum(run.kept) / len(run.kept),
                "breaches": run.breaches,
                "held_out": {name: float(f"{x:.6g}") for name, x in run.held_out.items()},
                "missing": None,
            }
            for run in runs
        ],
    }


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two curves, the root mean square."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))


def _of(answer: Mapping[str, Any], group: str) -> dict[str, Mapping[str, Any]]:
    return {row["entry"]: row for row in answer["rows"] if row["group"] == group}


def _groups(answer: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in answer["rows"]))


def verdicts(answer: Mapping[str, Any]) -> list[Verdict]:
    """What the tolerance changes, over the most that each kind of rounding changes."""
    return [
        _verdict(answer, group, kind, what)
        for group in _groups(answer)
        for kind in answer["settings"]["rounding"]
        for what in ("loss curve", "held-out accuracy")
    ]


def _verdict(answer: Mapping[str, Any], group: str, kind: str, what: str) -> Verdict:
    rows, settings = _of(answer, group), answer["settings"]
    own = rows.get(named(settings["within"]))
    seeds = [row for name, row in rows.items() if name.startswith(kind)]

    def apart(row: Mapping[str, Any]) -> float:
        """From the exact training."""
        if what == "loss curve":
            return distance(row["losses"], rows[EXACT]["losses"])
        return abs(row["held_out"]["accuracy"] - rows[EXACT]["held_out"]["accuracy"])

    # an accuracy is a count: one pair is no difference
    least = 1e-12 if what == "loss curve" else 1.0 / settings["held_out"]
    ratio = apart(own) / max(least, *map(apart, seeds)) if own is not None and seeds else None
    return Verdict(
        f"{group}: {what}, off the exact one, over that of rounding the {kind}", ratio, 1
    )


def inside(answer: Mapping[str, Any], group: str) -> int | None:
    """In how many steps the loss within the tolerance is between those of all other trainings."""
    rows = _of(answer, group)
    own = rows.pop(named(answer["settings"]["within"]), None)
    if own is None or len(rows) < 2:
        return None
    others = zip(*(row["losses"] for row in rows.values()), strict=True)
    return sum(min(o) <= x <= max(o) for x, o in zip(own["losses"], others, strict=True))


def show_targets(answer: dict[str, Any], stream: Any = None) -> None:
    """Whether a training within the tolerance is within the spread of seeds."""
    section.show_targets(verdicts(answer), "targets", stream)


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words."""
    columns = ["", "training", "first loss", "last ten", "off the exact curve"]
    columns += ["held-out loss", "accuracy", "margin", "columns kept", "breaches"]
    lines = []
    for group in _groups(answer):
        rows, before = _of(answer, group), answer["before"][group]
        held_out = [_fixed(before[name]) for name in ("loss", "accuracy", "margin")]
        lines.append([group, "before", "-", "-", "-", *held_out, "-", "-"])
        for row in rows.values():
            last = row["losses"][-10:]
            off = distance(row["losses"], rows[EXACT]["losses"])
            lines.append(
                [
                    group,
                    row["entry"],
                    _fixed(row["losses"][0]),
                    _fixed(sum(last) / len(last)),
                    "-" if row["entry"] == EXACT else f"{off:.1e}",
                    *(_fixed(row["held_out"][name]) for name in ("loss", "accuracy", "margin")),
                    f"{100 * row['kept']:.1f} %" if row["kept"] < 1 else "-",
                    str(row["breaches"]) if row["kept"] < 1 else "-",
                ]
            )
    return columns, lines


def _fixed(value: float) -> str:
    return f"{value:.4f}"


def remarks(answer: dict[str, Any]) -> list[str]:
    s = answer["settings"]
    trained = (
        "All weights" if s["layers"] is None else f"The last {s['layers']} layers and the head"
    )
    found = [
        f"{trained} trained: {s['steps']} steps of {s['pairs']} pairs, responses of {RESPONSE} "
        f"tokens after {PROMPT}, {s['held_out']} pairs held out; AdamW at {s['rate']:g}; weights "
        "and gradients in bf16, the optimizer's copy in fp32."
    ]
    for group in _groups(answer):
        count = inside(answer, group)
        if count is not None:
            found.append(
                f"{group}: in {count} of {s['steps']} steps the loss within the tolerance is "
                "between the least and the largest of the other trainings."
            )
    return [*found, *(f"{v.what}: {number(v.measured)}." for v in verdicts(answer))]


def plot(answer: dict[str, Any]) -> Any:
    """Curves of the loss, and their differences from the exact one."""
    groups = _groups(answer)
    figure = plots.figure(answer, 1.0 + 5.6 * len(groups), 6.4)
    panels = figure.subplots(2, len(groups), squeeze=False, sharex="col")
    for group, above, below in zip(groups, *panels, strict=True):
        rows = _of(answer, group)
        exact = rows[EXACT]["losses"]
        steps = range(1, len(exact) + 1)
        for name, row in rows.items():
            kind, _, seed = name.partition(", seed ")
            own = not seed and name != EXACT
            label = kind if not seed else f"{kind} rounded at random" if seed == "1" else None
            grey = "0.7" if kind == ROUNDING[0] else "0.45"
            style = {
                "color": grey if seed else plots.OUR_COLOURS[0] if own else "0.1",
                "lw": 1.0 if seed else 1.6,
                "ls": "--" if own else "-",
                "label": label,
                "zorder": 1 if seed else 3,
            }
            above.plot(steps, row["losses"], **style)
            gaps = [a - b for a, b in zip(row["losses"], exact, strict=True)]
            below.plot(steps, gaps, **style)
        above.set(title=group, ylabel="loss of the step")
        below.set(xlabel="step", ylabel="loss minus that of the exact training")
        above.legend(fontsize=7)
        for axes in (above, below):
            axes.grid(True, color="0.9")
    return figure


# the command


def parsed(arguments: Sequence[str] | None) -> tuple[Settings, argparse.Namespace]:
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m fusedpo.benchmarks.compact_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(usual.losses))
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--pairs", type=int, default=usual.pairs, help="of a step")
    parser.add_argument("--held-out", type=int, default=usual.held_out, help="pairs")
    parser.add_argument("--seeds", type=int, default=usual.seeds)
    parser.add_argument("--layers", type=int, help="the last so many alone (default: all weights)")
    parser.add_argument("--rate", type=float, default=usual.rate, help="of learning")
    parser.add_argument(
        "--rounding", nargs="+", choices=ROUNDING, default=list(usual.rounding), help="of seeds"
    )
    parser.add_argument("--tolerance", type=float, default=usual.within)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Options.output, metavar="FOLDER")
    given = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("pairs", 1), ("held_out", 1), ("seeds", 0), ("threads", 1)):
        if getattr(given, name) < least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag}: expected at least {least}, got {getattr(given, name)}")
    if given.layers is not None and given.layers < 0:
        parser.error(f"--layers: expected at least 0, got {given.layers}")
    settings = Settings(
        tuple(given.losses),
        given.steps,
        given.pairs,
        given.held_out,
        given.seeds,
        given.layers,
        given.rate,
        given.tolerance,
        tuple(given.rounding),
    )
    return settings, given


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fusedpo.benchmarks.compact_training``."""
    settings, given = parsed(arguments)
    torch.set_num_threads(given.threads)
    about = measure.machine("cpu", given.threads)
    path = given.output / measure.file_name(about)
    pairs = made_pairs(count=settings.all_pairs)
    runs: list[Run] = []
    with measure.progress(
        TITLE, 1 + len(settings.losses) * (2 + settings.seeds * len(settings.rounding))
    ) as advance:
        advance("what is held out, before")
        trainer = Trainer(smollm2.load()[0], pairs, settings)
        before = {TITLES[loss]: trainer.before(loss) for loss in settings.losses}
        for run in trainings(trainer, settings):
            advance(f"{TITLES[run.loss]}, {run.entry}: {run.losses[-1]:.4f}, {run.held_out}")
            runs.append(run)
            # each takes minutes: what has been found is kept
            answer = answer_of(runs, before, settings, about)
            measure.save("compact_training", answer, path)
    reports.report(answer, Options(output=given.output, threads=given.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
