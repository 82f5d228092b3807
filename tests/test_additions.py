"""What an addition takes, shown by small diffs on a copy of the tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT, added, copy_with

ROUTE = """
import torch
from fusedpo import linear_logprobs, plan

torch.manual_seed(0)
hidden = torch.randn(30, 8, requires_grad=True)
weight = torch.randn(50, 8, requires_grad=True)
labels = torch.randint(50, (30,))
found = {}
for route in ("recompute", "late"):
    chosen = plan(30, 50, 8, gathered=False, budget=8_000, route=route)
    assert chosen.route == route and chosen.rows < 30
    logprob = linear_logprobs(hidden, weight, labels, memory_budget=chosen)
    found[route] = [logprob, *torch.autograd.grad(logprob.square().sum(), (hidden, weight))]
for one, other in zip(*found.values()):
    torch.testing.assert_close(one, other)
assert plan(30, 50, 8, gathered=False, route="late").products == 4
"""

STATISTIC = """
import torch
from fusedpo import linear_token_stats

torch.manual_seed(0)
hidden, weight, labels = torch.randn(6, 8), torch.randn(50, 8), torch.randint(50, (6,))
labels[2] = -100
logits = hidden @ weight.T
own = logits.gather(1, labels.clamp(min=0)[:, None])
others = logits.scatter(1, labels.clamp(min=0)[:, None], -torch.inf).amax(1)
expected = torch.where(labels < 0, 0, own[:, 0] - others)
for grad in (False, True):
    weight.requires_grad_(grad)
    stats = linear_token_stats(hidden, weight, labels, stats=("margin", "logprob"))
    torch.testing.assert_close(stats.margin, expected)
    assert not stats.margin.requires_grad and stats.logprob.requires_grad == grad
"""

METHOD = """
import json, math
from pathlib import Path
import tiny
from fusedpo.losses import DPO
from fusedpo.trainers.endings import Endings
from fusedpo.trainers.config import TrainJob
from fusedpo.trainers.run import run

folder = Path("trained")
tiny.save(folder / "model")
rows = tiny.text_rows(16)
for row in rows:
    row.update(chosen=" cat" + row["chosen"], rejected=" cat" + row["rejected"])
(folder / "pairs.jsonl").write_text("\\n".join(map(json.dumps, rows)))
# far enough that a margin is more than rounding
options = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "evaluations": 1, "cpu": True}
found = []
for method in (None, Endings()):
    names = [str(folder / name) for name in ("model", "pairs.jsonl")]
    job = TrainJob(*names, folder / str(method), DPO(), method=method, **options)
    found.append(next(e for e in run(job)["log"][::-1] if "eval_loss" in e))
whole, ends = found
assert whole["eval_loss"] < math.log(2)
# what both responses begin with cancels in the margin, and is left out of either sum
assert math.isclose(whole["eval_rewards/margins"], ends["eval_rewards/margins"], rel_tol=1e-3)
left = [ends[f"eval_logps/{k}"] - whole[f"eval_logps/{k}"] for k in ("chosen", "rejected")]
assert min(left) > 1 and math.isclose(*left, rel_tol=1e-4)
"""


@pytest.mark.parametrize(
    ("name", "most", "program"),
    [("route", 3, ROUTE), ("statistic", 4, STATISTIC), ("method", 1, METHOD)],
    ids=["route", "statistic", "method"],
)
def test_an_addition_is_a_few_files(name: str, most: int, program: str, tmp_path: Path) -> None:
    diff = ROOT / "tests" / "additions" / f"{name}.diff"
    assert len(added(diff)) <= most
    tree = copy_with(diff, tmp_path)
    path = os.pathsep.join(map(str, (tree, tree / "tests")))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
