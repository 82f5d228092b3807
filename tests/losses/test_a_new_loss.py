"""A new loss is one file of at most 40 lines and one test file, and has every check by existing."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
import pytest
import test_objective
import torch
from losses import test_shared
from losses.problems import scores_of
from repository import ROOT, added, copy_with
from torch import Tensor

from fusedpo import losses, plan, policy_loss, preference_loss
from fusedpo.losses import (
    WPO,
    Loss,
    MarginLoss,
    PolicyLoss,
    PreferenceLoss,
    ResponseLoss,
    ShortToLong,
    SimPO,
)
from fusedpo.losses.base import GradientStructure, Scores, Tokens

DIFF = ROOT / "tests" / "additions" / "loss.diff"
TOY = added(DIFF)["fusedpo/losses/toy.py"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PreferenceLoss]:
    """The toy, while its file is where losses are found."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
    cls = losses.available()["toy"]
    monkeypatch.setattr(losses, "Toy", cls, raising=False)
    yield cls()
    del sys.modules["fusedpo.losses.toy"], losses.toy


def test_it_is_short() -> None:
    assert len(TOY.splitlines()) <= 40


def test_it_is_two_files_and_nothing_else_by_hand(tmp_path: Path) -> None:
    """In a copy of the tree, what asks something of every loss has all that it asks for."""
    assert set(added(DIFF)) == {"fusedpo/losses/toy.py", "tests/losses/test_toy.py"}
    tree = copy_with(DIFF, tmp_path)

    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(
            [sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("tests/generated.py")  # `make losses`
    asking = "toy or every_loss_is_compared or lists_the_losses or every_loss_has or in_the_tables"
    folder = "tests/losses"
    of_losses = [f"{folder}/test_{name}.py" for name in ("toy", "formulas", "names", "shared")]
    others = [f"tests/test_{name}.py" for name in ("structure", "memory", "tables", "docs")]
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", asking, *of_losses, *others)
    passed = re.search(r"(\d+) passed", told)
    assert passed is not None and int(passed[1]) >= 30


def test_it_is_found(toy: PreferenceLoss) -> None:
    assert losses.get("toy") == toy == losses.get("TOY", beta=2.0)
    assert type(toy).__module__ == "fusedpo.losses.toy"
    with pytest.raises(ValueError, match="beta"):
        losses.get("toy", beta=0.0)
    with pytest.raises(ValueError, match="did you mean 'toy'"):
        losses.get("toyy")


def shared_checks() -> list[str]:
    """The tests that are made for every loss."""
    functions = {n: f for n, f in vars(test_shared).items() if n.startswith("test_")}
    return [n for n, f in functions.items() if "loss" in inspect.signature(f).parameters]


@pytest.mark.parametrize("name", shared_checks())
def test_it_passes_what_every_loss_passes(toy: PreferenceLoss, name: str) -> None:
    check = getattr(test_shared, name)
    if hasattr(check, "hypothesis"):
        check = check.hypothesis.inner_test
    known = {"loss": [toy], "seed": [0, 1, 2], "margin": [-1e4, 1e4]}
    names = list(inspect.signature(check).parameters)
    for i in range(max(len(known[name]) for name in names)):
        check(**{name: known[name][i % len(known[name])] for name in names})


def test_there_are_shared_checks() -> None:
    assert len(shared_checks()) >= 8 and "test_gradient_is_the_formulas" in shared_checks()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("route", ["recompute", "retain", "hybrid", "one_pass"])
def test_it_takes_every_route(
    toy: PreferenceLoss, backend: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, hidden and weight gradient against full logits in float64."""
    there = functools.partial(preference_loss, backend=backend)
    monkeypatch.setattr(test_objective, "preference_loss", there)
    data = test_objective.batch(3, 3)
    chosen = plan(
        int((data["labels"] >= 0).sum()),
        test_objective.VOCAB,
        test_objective.WIDTH,
        scope=toy.gradient_structure.scope,
        groups=3,
        factors=toy.gradient_structure.factors,
        route=route,
        backend=backend,
    )
    test_objective.check(toy, data, memory_budget=engine.with_tile(chosen, 7, 16))


def test_it_can_be_mixed_and_changed(toy: PreferenceLoss) -> None:
    loss = losses.WPO(0.5 * toy + losses.SFT())
    test_objective.check(loss, test_objective.batch(4, 3))
    assert eval(repr(loss), vars(losses)) == loss


@dataclass(frozen=True)
class Bare(PreferenceLoss):
    """A loss of which nothing is written yet."""


@dataclass(frozen=True)
class BareMargin(MarginLoss):
    """Likewise of a margin."""


@dataclass(frozen=True)
class BarePolicy(PolicyLoss):
    """Likewise of tokens."""


@dataclass(frozen=True)
class Averaged(PreferenceLoss):
    """A mean, where the loss of each example is asked for."""

    def per_example(self, *responses: Scores, **inputs: Any) -> Tensor:
        return (responses[1].mean - responses[0].mean).mean()


@dataclass(frozen=True)
class AveragedRejected(ResponseLoss):
    """A mean over the rejected responses alone, so that a sum with the chosen ones has a shape."""

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        return s.mean.mean() if role == "rejected" else -s.mean

    def reward(self, s: Scores) -> Tensor:
        return s.mean


@dataclass(frozen=True)
class ByExample(AveragedRejected):
    """The same where the gradient is known with the example."""

    formula_structure = GradientStructure("pair", 2)


@dataclass(frozen=True)
class AveragedTokens(PolicyLoss):
    """A mean, where the loss of each token is asked for."""

    def per_token(self, t: Tokens) -> Tensor:
        return -(t.ratio * t.advantage).mean()


@dataclass(frozen=True)
class Number(Averaged):
    """No tensor at all."""

    def per_example(self, *responses: Scores, **inputs: Any) -> Tensor:
        return 1.0


@dataclass(frozen=True)
class AveragedReward(SimPO):
    """A mean, where the reward of each response is asked for."""

    def reward(self, s: Scores) -> Tensor:
        return s.mean.mean()


@dataclass(frozen=True)
class AveragedStates(SimPO):
    """A mean, where the states' part of each example is asked for."""

    def of_states(self, *states: Tensor) -> Tensor:
        return (states[0] - states[1]).square().mean()


MEANS = {
    Averaged(): "[2], one number an example, got [] of Averaged.per_example",
    AveragedRejected(): "[2], one number a response, got [] of AveragedRejected.of_response",
    ByExample(): "[2], one number a response, got [] of ByExample.of_response",
    AveragedTokens(): "[12], one number a token, got [] of AveragedTokens.per_token",
    AveragedReward(): "[2], one number a response, got [] of AveragedReward.reward",
    AveragedStates(): "[2], one number an example, got [] of AveragedStates.of_states",
    Number(): "a tensor of Number.per_example, got float",
    # a sum with what has a shape would have one
    SimPO() + Averaged(): "[2], one number an example, got [] of Averaged.per_example",
    SimPO() + AveragedStates(): "[2], one number an example, got [] of AveragedStates.of_states",
    WPO(Averaged()): "[2], one number an example, got [] of Averaged.per_example",
    ShortToLong(Averaged()): "[2], one number an example, got [] of Averaged.per_example",
}


@pytest.mark.parametrize("loss", MEANS, ids=repr)
def test_a_mean_in_the_place_of_its_parts_is_refused(loss: Loss) -> None:
    rows = 6 if isinstance(loss, ShortToLong) else 4
    hidden = torch.randn(rows, 3, 5, requires_grad=True)
    given = hidden, torch.randn(7, 5), torch.ones(rows, 3).long()
    with pytest.raises((ValueError, TypeError)) as error:
        if isinstance(loss, PolicyLoss):
            policy_loss(loss, *given, advantages=torch.ones(rows))
        else:
            preference_loss(loss, *given)
    assert str(error.value).startswith(f"loss: expected {MEANS[loss]}")


S = scores_of([-8.0], [-10.0])


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: Bare().per_example(S, S), "Bare has no formula"),
        (lambda: Bare().of_response("chosen", S), "Bare is no sum over responses"),
        (lambda: Bare().metrics(S, S), "Bare has no reward"),
        (
            lambda: BareMargin().per_example(S, S),
            "BareMargin defines neither tail nor of_margin",
        ),
        (lambda: BarePolicy().per_token(None), "BarePolicy has no formula"),
    ],
)
def test_what_it_lacks_is_named(ask: Callable[[], object], said: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        ask()
    assert str(error.value).partition("; ")[0] == said


def test_it_is_gone_with_its_file() -> None:
    assert "toy" not in losses.available() and not hasattr(losses, "toy")
    assert torch.is_tensor(losses.DPO().per_example(*test_shared.for_loss(losses.DPO(), 0)))
