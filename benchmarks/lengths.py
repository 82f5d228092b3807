"""What do rows of unequal lengths cost: SoLoPO's short and long contexts, padded and in groups?

One training step of a Llama with random weights (loss and gradients, without an optimizer), each
way in a process of its own: tokens that the model is run on, seconds, and the most memory held
beyond what was there before. Beside it the same loss on pairs of the long context alone.

    python -m fusedpo.benchmarks.lengths --short 1100 --long 7500
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

import torch

from fusedpo import tables
from fusedpo.benchmarks.measure import describe, machine, peak_bytes
from fusedpo.benchmarks.shapes import MIB
from fusedpo.benchmarks.timing import Clock
from fusedpo.benchmarks.worker import in_fresh_process

WAYS = {
    "SoLoPO, one padded batch": ("short to long", False),
    "SoLoPO, in length groups": ("short to long", True),
    "SimPO on the long context": ("long pairs", False),
}


SIZES = {"pairs": 1, "short": 1100, "long": 7500, "response": 200}
SIZES |= {"hidden": 256, "layers": 2, "vocab": 8192}


def rows(options: argparse.Namespace, *, pairs: bool) -> list[dict[str, list[int]]]:
    """Rows in token ids, whose lengths differ by a tenth."""
    chooser = random.Random(0)

    def some(count: int) -> list[int]:
        around = round(count * chooser.uniform(0.95, 1.05))
        return [chooser.randrange(options.vocab) for _ in range(around)]

    made = []
    for _ in range(options.pairs):
        row = {"prompt_ids": some(options.short), "long_prompt_ids": some(options.long)}
        row |= {name: some(options.response) for name in ("chosen_ids", "rejected_ids")}
        if pairs:
            row["prompt_ids"] = row.pop("long_prompt_ids")
        made.append(row)
    return made


def preload() -> None:
    """What a step imports."""
    import fusedpo.trainers.transformers  # noqa: F401


def answer(request: dict[str, Any]) -> dict[str, float]:
    """Tokens of the rows and of the forwards, seconds and bytes of a step."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from fusedpo.losses import ShortToLong, SimPO
    from fusedpo.recipes.short_to_long import ShortToLongCollator
    from fusedpo.trainers.transformers import PreferenceCollator, PreferenceTrainer

    options = argparse.Namespace(**request)
    kind, grouped = WAYS[options.way]
    pairs = kind == "long pairs"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=2 * (options.long + options.response),
    )
    trainer = PreferenceTrainer(
        LlamaForCausalLM(config),
        TrainingArguments(options.folder, report_to="none", use_cpu=True, disable_tqdm=True),
        loss=SimPO() if pairs else ShortToLong(SimPO()),
        length_groups=grouped,
        data_collator=PreferenceCollator(0) if pairs else ShortToLongCollator(0),
    )
    batch: dict[str, Any] = trainer.data_collator(rows(options, pairs=pairs))
    tokens: list[int] = []
    model: Any = trainer.model
    model.train().get_input_embeddings().register_forward_hook(
        lambda module, args, output: tokens.append(args[0].numel())
    )

    def step() -> None:
        tokens.clear()
        model.zero_grad()
        trainer.compute_loss(model, dict(batch)).backward()

    little = argparse.Namespace(**vars(options) | {"short": 16, "long": 32, "response": 8})
    warm = trainer.data_collator(rows(little, pairs=pairs))
    trainer.compute_loss(model, warm).backward()
    peak = peak_bytes(step)
    seconds = Clock("cpu").once(step)
    real = int(batch["attention_mask"].sum())
    return {"real": real, "run": sum(tokens), "seconds": seconds, "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default="build/lengths")
    options = parser.parse_args()
    lines = []
    for way in WAYS:
        request = {**vars(options), "way": way, "threads": torch.get_num_threads()}
        found = in_fresh_process("fusedpo.benchmarks.lengths:answer", request)
        ratio, peak = found["run"] / found["real"], found["peak"] / MIB
        numbers = (f"{ratio:.2f}", f"{found['seconds']:.1f}", f"{peak:.0f}")
        lines.append([way, str(found["real"]), str(found["run"]), *numbers])
    columns = ("way", "tokens of the rows", "tokens run", "ratio", "s a step", "peak, MiB")
    tables.show(describe(machine()), columns, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
