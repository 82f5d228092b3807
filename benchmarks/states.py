"""Hidden states and heads that gradients of few columns are measured and tested on.

    python -m fusedpo.benchmarks.states [NAME ...] [--folder FOLDER]

prints of each, or of all, its vocabulary, the entropy of its rows, and how much of the vocabulary
is kept by thresholds eps: column j of a slab of G rows is kept if a row of the slab has
p_ij >= eps, or if it is a target of one. Real states need the packages of ``make``'s environment,
see `smollm2`.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpo import smollm2 as smollm2_model
from fusedpo import tables
from fusedpo.machine import ROOT

FOLDER = Path("build/states")
ROWS = 2048
EPS = (2.0**-12, 2.0**-14, 2.0**-16)
SLABS = (256, 1024)

# kept columns of Gemma-3-270m (4-bit weights, V 262,144) on this project's documents, by rows of a
# slab and eps: what `sharpened` is fitted to
GEMMA = {(256, 2.0**-14): 0.033, (256, 2.0**-16): 0.066, (1024, 2.0**-16): 0.151}

PROMPTS = (
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "What were the causes of the French Revolution?",
    "Give me a recipe for tomato soup, step by step.",
    "How do I learn to play the guitar?",
)


@dataclass(frozen=True)
class States:
    """What a head is given: N rows of hidden states, and the token that each is to predict.

    Tensors are shared between states and with the file that they are from: nobody writes to them.

    Attributes:
        hidden: [N, H] fp32, inputs of the head.
        weight: [V, H] fp32.
        labels: [N] int64, targets; none is ignored.
        bias: [V] fp32, with -inf where a column can not be drawn; None: there is none.
        upstream: [N] fp32, gradients of a loss by the log-probabilities; None: any will do.
    """

    name: str
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    upstream: Tensor | None = None

    @property
    def vocab(self) -> int:
        return len(self.weight)

    def first(self, rows: int) -> States:
        """The same, of the first rows only."""
        upstream = None if self.upstream is None else self.upstream[:rows]
        return replace(
            self, hidden=self.hidden[:rows], labels=self.labels[:rows], upstream=upstream
        )

    def logprobs(self, rows: int = 128) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows, and log-probabilities [rows, V] of their whole vocabulary."""
        for start in range(0, len(self.hidden), rows):
            block = slice(start, min(start + rows, len(self.hidden)))
            yield block, F.linear(self.hidden[block], self.weight, self.bias).log_softmax(-1)


# what states are like


def entropies(states: States) -> Tensor:
    """[N] fp32, in nats."""
    return torch.cat([torch.special.entr(logp.exp()).sum(-1) for _, logp in states.logprobs()])


def kept_shares(states: States, rows: int, eps: Sequence[float] = EPS) -> list[float]:
    """Share of the vocabulary that each threshold keeps in a slab of so many rows, on average.

    Rows that do not fill a slab are left out, unless they are all there are.
    """
    rows = min(rows, len(states.hidden))
    states = states.first(len(states.hidden) // rows * rows)
    shares = []
    for start in range(0, len(states.hidden), rows):
        slab = slice(start, start + rows)
        part = replace(states, hidden=states.hidden[slab], labels=states.labels[slab])
        largest = torch.stack([logp.amax(0) for _, logp in part.logprobs()]).amax(0).exp()
        largest[part.labels] = torch.inf
        shares.append([(largest >= least).float().mean().item() for least in eps])
    return torch.tensor(shares).mean(0).tolist()


# real states


def smollm2(folder: Path = FOLDER, repository: Path = ROOT, rows: int = ROWS) -> States:
    """SmolLM2-135M-Instruct's states before its head: [2048, 576], V 49,152.

    342 rows of this project's documents, as many of its licence, and of answers that the model
    writes; then further ones of each. The weights are 4-bit ones, widened to fp32.

    Args:
        folder: holds ``smollm2.safetensors``, 118 MB, which is made in about a minute if it is not
            there, or if the texts or this module are no longer those that it was made from.
            Several processes may ask at once: one makes it.
        repository: a checkout, whose texts are read.
        rows: more of them are from more places of the texts, in a file of their own.

    Raises:
        ImportError: a package is missing; says which, and how it is installed.
        ValueError: the repository has no texts, as an installed package has not.
    """
    documents, licence = texts(repository)
    smollm2_model.need_packages()
    path = folder / ("smollm2.safetensors" if rows == ROWS else f"smollm2-{rows}.safetensors")
    made = cached(path, [documents, licence], lambda: _smollm2(documents, licence, rows))
    return States("smollm2", **made)


def texts(repository: Path = ROOT) -> tuple[str, str]:
    """A checkout's documents, and its licence.

    Raises:
        ValueError: it has none.
    """
    paths = [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]
    try:
        documents = "\n".join(path.read_text(encoding="utf-8") for path in paths)
        licence = (repository / "LICENSE").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(
            f"repository: expected a checkout of fusedpo, got {repository}, without "
            f"{Path(error.filename).name}; pass the folder of a clone"
        ) from None
    return documents, licence


def _smollm2(documents: str, licence: str, rows: int, length: int = 342) -> dict[str, Tensor]:
    model, tokenizer = smollm2_model.load()
    count = math.ceil(rows / length / 3)  # of each kind

    def states(ids: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Rows from a position on, and the tokens that came next."""
        return model.model(ids[None]).last_hidden_state[0, start:-1], ids[start + 1 :]

    def stretches(text: str) -> list[tuple[Tensor, Tensor]]:
        ids = torch.tensor(tokenizer(text).input_ids)
        starts = [i * len(ids) // count for i in range(count)]
        return [states(ids[start : start + length + 1]) for start in starts]

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rounds = math.ceil(count / 2)
        answers = [
            states(*answer)
            for _ in range(rounds)
            for answer in answers_to(PROMPTS, model, tokenizer, new=180)
        ]
        hidden, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
        chat = list(zip(torch.split(hidden, length), torch.split(labels, length), strict=True))
        kinds = (stretches(documents), stretches(licence), chat)
    taken = [part for sequence in zip(*kinds, strict=False) for part in sequence]
    hidden, labels = (torch.cat(parts)[:rows].clone() for parts in zip(*taken, strict=True))
    assert len(hidden) == rows, f"{len(hidden)} rows: answers of the model were too short"
    weight = model.get_output_embeddings().weight.detach().clone()
    return {"hidden": hidden, "weight": weight, "labels": labels}


def answers_to(
    prompts: Sequence[str], model: Any, tokenizer: Any, new: int
) -> Iterator[tuple[Tensor, int]]:
    """Prompt and sampled answer [T], and the last position of the prompt."""
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    sampled = model.generate(
        **asked, max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    width = asked.input_ids.shape[1]
    for ids, there in zip(sampled, asked.attention_mask, strict=True):
        ends = (ids[width:] == tokenizer.eos_token_id).nonzero()
        end = width + int(ends[0]) + 1 if len(ends) else len(ids)
        yield ids[width - int(there.sum()) : end], int(there.sum()) - 1


def cached(
    path: Path, texts: Sequence[str], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors of a file; made where it is not of these texts and of this module as it is."""
    from filelock import FileLock
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(Path(smollm2_model.__file__).read_bytes())
    for text in texts:
        digest.update(text.encode())
    origin = {"origin": digest.hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            with safe_open(path, "pt") as file:
                if file.metadata() == origin:
                    return load_file(path)
        part = path.with_suffix(".part")
        save_file(make(), part, origin)
        os.replace(part, path)
    return load_file(path)


def sharpened(real: States, vocab: int = 262_144, seed: int = 0) -> States:
    """SmolLM2's states before a head of 262,144 columns, as peaked as Gemma-3-270m's.

    Its columns are multiplied by 1.5, which makes the model more certain, as larger ones are. Each
    column that is added is, as the words of other languages are, one that the model nearly never
    expects here: a column of SmolLM2's, by its place in the vocabulary, which both have sorted by
    frequency; moved at random by a logit's standard deviation of 1, so that no two rows agree on
    all of them; and lowered by 4.3 in every row, along the direction whose product with each state
    is nearest to 1. The three numbers are fitted to `GEMMA`, which the command prints beside it.

    Args:
        real: of `smollm2`, all rows: the direction is fitted to them.
    """
    sharpness, spread, lower = 1.5, 1.0, 4.3
    generator = torch.Generator().manual_seed(seed)
    size = real.hidden.shape[1]
    own, extra = real.vocab, vocab - real.vocab
    ones = real.hidden.new_ones(len(real.hidden), 1)
    downward = torch.linalg.lstsq(real.hidden, ones).solution[:, 0]
    weight = torch.empty(vocab, size)
    torch.mul(real.weight, sharpness, out=weight[:own])
    weight[own:].normal_(generator=generator).mul_(spread / real.hidden.norm(dim=1).mean())
    weight[own:] += weight[torch.arange(extra) * own // extra]
    weight[own:] -= lower * downward
    return replace(real, name="sharpened", weight=weight)


# made states


def untrained(vocab: int = 49_152, size: int = 576, rows: int = ROWS, seed: int = 0) -> States:
    """Random weights, with logits of unit size: no column is small in all rows."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(vocab, size, generator=generator).mul_(size**-0.5)
    labels = torch.randint(vocab, (rows,), generator=generator)
    return States("untrained", hidden, weight, labels)


def toy(folder: Path = FOLDER, seed: int = 0) -> States:
    """States of a small trained model, [2048, 128], V 8,192, of `toy_text` that it has not seen.

    It is made in some twenty seconds, and kept in ``folder`` as `smollm2` is.
    """
    return States("toy", **cached(folder / f"toy-{seed}.safetensors", [], lambda: _toy(seed)))


def toy_text(vocab: int, tokens: int, generator: torch.Generator) -> Tensor:
    """[256, tokens] int64: Zipf's frequencies, and words that follow each other, some surely.

    A token has eight successors, each half as frequent as the one before, and one of them comes
    next with a probability of the token's own, uniform in [0, 1]; otherwise any token comes, by
    its frequency, 1 / (rank + 2.7). Grammar depends on the generator's first draws only.
    """
    frequency = 1 / (torch.arange(vocab) + 2.7)
    successors = torch.multinomial(frequency, 8 * vocab, True, generator=generator)
    sure = 1 - torch.rand(vocab, generator=generator) ** 3
    text = torch.empty(256, tokens, dtype=torch.int64)
    text[:, 0] = torch.multinomial(frequency, 256, True, generator=generator)
    halves = 0.5 ** torch.arange(8.0)
    for t in range(1, tokens):
        last = text[:, t - 1]
        chosen = torch.multinomial(halves, 256, True, generator=generator)
        follows = torch.rand(256, generator=generator) < sure[last]
        other = torch.multinomial(frequency, 256, True, generator=generator)
        text[:, t] = torch.where(follows, successors.view(vocab, 8)[last, chosen], other)
    return text


def _toy(seed: int, vocab: int = 8192, size: int = 128, steps: int = 300) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # three columns of 256 a step; the last ten are for the states
    text = toy_text(vocab, 3 * steps + 11, generator)
    shapes = {"last": (vocab, size), "before": (vocab, size), "always": (size,)}
    shapes |= {"up": (size, 2 * size), "down": (2 * size, size), "weight": (vocab, size)}
    model = {
        name: torch.randn(shape, generator=generator).mul_(0.1).requires_grad_()
        for name, shape in shapes.items()
    }

    def states(context: Tensor) -> Tensor:
        """[256 * T, size] of text [256, 2 + T - 1]: of two tokens each."""
        x = model["last"][context[:, 1:]] + model["before"][context[:, :-1]] + model["always"]
        x = x + F.gelu(x @ model["up"]) @ model["down"]
        return F.rms_norm(x, (size,)).flatten(0, 1)

    optimizer = torch.optim.Adam(model.values(), betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        window = text[:, 3 * step : 3 * step + 4]
        logits = F.linear(states(window[:, :-1]), model["weight"])
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits, window[:, 2:].flatten()))
        optimizer.step()
    held_out = text[:, -10:]
    with torch.no_grad():
        hidden = states(held_out[:, :-1])
    return {
        "hidden": hidden,
        "weight": model["weight"].detach(),
        "labels": held_out[:, 2:].flatten().clone(),
    }


# states by which an approximation goes wrong


def certain(seed: int = 0) -> States:
    """Each row is certain of one token, to the last bit; in every other row it is a wrong one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2048, 64, generator=generator)
    expected = torch.randint(2048, (512,), generator=generator)
    labels = expected.clone()
    labels[1::2] = (expected[1::2] + 1) % 2048
    return States("certain", 4 * weight[expected], weight, labels)


def spread(vocab: int = 65_536, seed: int = 0) -> States:
    """All mass in columns that a threshold of 2^-14 drops, and no direction common to the rows.

    Row i expects any of the columns whose entry i mod 64 is 10, each with p = 2 / V: half of the
    vocabulary, drawn anew for each of the 64.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = 10.0 * torch.randint(2, (vocab, 64), generator=generator)
    labels = torch.randint(vocab, (256,), generator=generator)
    return States("spread", torch.eye(64).repeat(4, 1), weight, labels)


def targets_everywhere(seed: int = 0) -> States:
    """Of every 256 rows in a row each of the 256 columns is a target of one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.randperm(256, generator=generator) for _ in range(4)])
    return replace(_random(1024, 256, generator, 4.0), name="targets everywhere", labels=labels)


def without_columns(seed: int = 0) -> States:
    """A bias of -inf in two of three columns, none of them a target."""
    generator = torch.Generator().manual_seed(seed)
    states = _random(512, 3072, generator, 4.0)
    bias = torch.randn(3072, generator=generator)
    bias[torch.arange(3072) % 3 != 1] = -torch.inf
    labels = states.labels // 3 * 3 + 1
    return replace(states, name="without columns", labels=labels, bias=bias)


def one_column_left(seed: int = 0) -> States:
    """A bias of -inf in all columns but one, the target: every gradient is zero."""
    states = _random(256, 512, torch.Generator().manual_seed(seed), 4.0)
    bias = torch.full((512,), -torch.inf)
    bias[7] = 0.0
    labels = torch.full_like(states.labels, 7)
    return replace(states, name="one column left", labels=labels, bias=bias)


def unequal_rows(seed: int = 0) -> States:
    """Upstream gradients of 1e3 in every 64th row, which is flat, and of 1e-3 in the others.

    What is kept for the sake of most rows is not what these few need.
    """
    generator = torch.Generator().manual_seed(seed)
    states = _random(512, 16_384, generator, 6.0)
    heavy = torch.arange(512) % 64 == 17
    hidden = torch.where(heavy[:, None], 0.1 * states.hidden, states.hidden)
    upstream = torch.where(heavy, 1e3, 1e-3) * torch.randn(512, generator=generator).sign()
    return replace(states, name="unequal rows", hidden=hidden, upstream=upstream)


def small(rows: int, vocab: int, seed: int = 0) -> States:
    """So few rows, or so small a vocabulary, that little is left to leave out."""
    states = _random(rows, vocab, torch.Generator().manual_seed(seed), 4.0)
    return replace(states, name=f"{rows} x {vocab}")


def drawn(seed: int) -> States:
    """A problem drawn at random to be hard to estimate: rows from flat to certain, with directions
    in common, and a few of them, flatter than the others, with up to 1e6 times the gradient."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        place = float(torch.rand((), generator=generator))
        return math.exp(math.log(low) + place * math.log(high / low))

    rows, vocab = round(between(65, 400)), round(between(64, 8192))
    states = _random(rows, vocab, generator, between(0.3, 12.0))
    shared = torch.randn(64, generator=generator) * between(0.1, 3.0)
    sizes = torch.randn(rows, 1, generator=generator).mul_(between(0.01, 1.0)).exp_()
    few = torch.rand(rows, generator=generator) < between(0.003, 0.5)
    sizes = torch.where(few[:, None], between(0.03, 1.0) * sizes, sizes)
    upstream = torch.randn(rows, generator=generator) * torch.where(few, between(1.0, 1e6), 1.0)
    return replace(
        states,
        name=f"drawn {seed}",
        hidden=sizes * (states.hidden + shared),
        upstream=upstream,
    )


def _random(rows: int, vocab: int, generator: torch.Generator, scale: float) -> States:
    """Logits of that standard deviation, from 64 hidden entries."""
    hidden = torch.randn(rows, 64, generator=generator)
    weight = torch.randn(vocab, 64, generator=generator).mul_(scale / 8)
    return States("random", hidden, weight, torch.randint(vocab, (rows,), generator=generator))


ADVERSARIAL: Mapping[str, Callable[[], States]] = {
    "certain": certain,
    "spread": spread,
    "targets everywhere": targets_everywhere,
    "without columns": without_columns,
    "one column left": one_column_left,
    "unequal rows": unequal_rows,
    "1 x 4096": partial(small, 1, 4096),
    "300 x 1": partial(small, 300, 1),
    "300 x 2": partial(small, 300, 2),
}


# by name

NAMES = ("smollm2", "toy", "untrained", "sharpened", *ADVERSARIAL)


def made(name: str, folder: Path | None = None, rows: int = ROWS) -> States:
    """The states of a name in `NAMES`.

    Args:
        rows: at least so many of SmolLM2's; others have the rows that they have.
    """
    folder = folder or FOLDER
    makers: Mapping[str, Callable[[], States]] = {
        "smollm2": lambda: smollm2(folder, rows=ROWS * max(1, math.ceil(rows / ROWS))),
        "toy": lambda: toy(folder),
        "untrained": untrained,
        "sharpened": lambda: sharpened(smollm2(folder)),
        **ADVERSARIAL,
    }
    return makers[name]()


# the command


def described(states: States) -> list[str]:
    """A line of the table: rows, sizes, quantiles of the entropy, kept shares."""
    sizes = (*states.hidden.shape, states.vocab)
    quantiles = torch.quantile(entropies(states), torch.tensor([0.1, 0.5, 0.9])).tolist()
    shares = [share for rows in SLABS for share in kept_shares(states, rows)]
    return [
        states.name,
        *(f"{size:,}" for size in sizes),
        *(f"{nats:.2f}" for nats in quantiles),
        *(f"{share:.1%}" for share in shares),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedpo.benchmarks.states", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"NAME: expected any of {', '.join(NAMES)}, got {', '.join(unknown)}")
    lines = []
    for name in options.names or NAMES:
        lines.append(described(made(name, options.folder)))
        if name == "sharpened":
            model = [GEMMA.get((rows, eps)) for rows in SLABS for eps in EPS]
            shares = ["-" if share is None else f"{share:.1%}" for share in model]
            lines.append(["Gemma-3-270m", "-", "640", "262,144", "-", "-", "-", *shares])
    kept = [f"2^{int(math.log2(eps))}, {rows}" for rows in SLABS for eps in EPS]
    columns = ["states", "N", "H", "V", "10 %", "50 %", "90 %", *kept]
    tables.show(
        "Quantiles of the entropy in nats, and columns kept by eps and rows of a slab",
        columns,
        lines,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
