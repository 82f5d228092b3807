"""Two checkouts of this library side by side: time and memory of the same steps, in one run.

    python benchmarks/trees.py OLD NEW [--rounds N]

OLD and NEW are the roots of two checkouts. Each has a process of its own, and the steps of the two
take turns, so that a slow minute of the machine is as slow for both. Ratios are NEW over OLD:
medians of the rounds' ratios for time, and of peak bytes beyond the inputs, which are measured
once. Shapes: those of the questions ``length`` and ``budget`` on a CPU, small enough for minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

# loss, sequences, tokens of each, vocabulary, hidden size, dtype, budget
CASES = [
    *(("dpo", 2, tokens, 50_304, 512, "float32", "256MiB") for tokens in (256, 1024, 4096)),
    *(("simpo", 2, 1024, 50_304, 512, "float32", budget) for budget in ("16MiB", "64MiB", "1GiB")),
    ("simpo", 2, 1024, 50_304, 512, "bfloat16", "256MiB"),
    ("orpo", 8, 128, 32_000, 256, "float32", "64MiB"),
    ("grpo", 8, 128, 32_000, 256, "float32", "64MiB"),
]

WORKER = """
import json, sys, time
import torch
import fusedpo
from fusedpo.benchmarks.measure import peak_bytes

torch.set_num_threads(2)
for line in sys.stdin:
    question, (name, rows, tokens, vocab, width, dtype, budget) = json.loads(line)
    dtype = getattr(torch, dtype)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, tokens, width, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows, tokens), generator=g)
    loss = fusedpo.losses.get(name)
    given = {"memory_budget": budget}
    if loss.needs_reference:
        given["ref_logprobs"] = torch.full((rows, tokens), -10.0)
    function = fusedpo.preference_loss
    if isinstance(loss, fusedpo.losses.PolicyLoss):
        function = fusedpo.policy_loss
        given["advantages"] = torch.linspace(-1, 1, rows)

    def step():
        hidden.grad = weight.grad = None
        function(loss, hidden, weight, labels, **given).loss.backward()

    if question == "time":
        step()
        start = time.perf_counter()
        step()
        answer = time.perf_counter() - start
    else:
        answer = peak_bytes(step)
    print(json.dumps(answer), flush=True)
"""


class Tree:
    """A process that runs the library of one checkout."""

    def __init__(self, root: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(root).resolve())}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment,
            cwd=root,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, question: str, case: tuple[object, ...]) -> float:
        """Seconds of a step, or its peak bytes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([question, case]), file=self.process.stdin, flush=True)
        return float(json.loads(self.process.stdout.readline()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=5, help="of time (default: 5)")
    options = parser.parse_args()
    trees = [Tree(options.old), Tree(options.new)]
    print(f"{'case':<64}{'time':>8}{'memory':>8}")
    for case in CASES:
        ratios = []
        for i in range(options.rounds):
            order = trees if i % 2 else trees[::-1]
            seconds = {tree: tree.ask("time", case) for tree in order}
            ratios.append(seconds[trees[1]] / seconds[trees[0]])
        before, after = (Tree(root).ask("memory", case) for root in (options.old, options.new))
        name = " ".join(map(str, case))
        print(
            f"{name:<64}{statistics.median(ratios):>8.3f}{after / max(1, before):>8.3f}", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
