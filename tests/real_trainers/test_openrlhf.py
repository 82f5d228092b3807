"""OpenRLHF as it is: its DPO trainer, and its actor under its policy loss.

DeepSpeed's engine, through which it takes its steps, is left out: one process and one optimizer do
here what its strategy does.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from openrlhf.models import Actor, PolicyLoss
from openrlhf.models.utils import masked_mean
from openrlhf.trainer.dpo_trainer import DPOTrainer
from real_trainers import harness
from torch.utils.data import DataLoader
from trainers import trl_runs

STEPS, PAIRS, LENGTH, PROMPT = 3, 4, 18, 5


class Strategy:
    """What the trainer asks of its strategy, on one process."""

    ring_attn_group = None
    accumulated_gradient = 1

    def __init__(self, args: Any) -> None:
        self.args = args
        self.steps: list[dict[str, torch.Tensor]] = []

    def is_rank_0(self) -> bool:
        return True

    def backward(self, loss: torch.Tensor, model: Any, optimizer: Any) -> None:
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any) -> None:
        self.steps.append(harness.gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def get_grad_norm(self, model: Any) -> float:
        return float(sum(g.square().sum() for g in self.steps[-1].values()) ** 0.5)

    def all_reduce(self, logs: dict[str, float]) -> dict[str, float]:
        return logs


class Writer:
    """Keeps what goes to TensorBoard."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.logs.append({name.removeprefix("train/").replace("eval/eval_", "eval_"): value})

    def close(self) -> None:
        """There is nothing to write."""


def batches(count: int, seed: int) -> Any:
    """Batches as the collator of its reward dataset makes them, some of them padded."""
    torch.manual_seed(seed)
    made = []
    for _ in range(count):
        batch: list[Any] = []
        for _ in range(2):
            mask = torch.ones(PAIRS, 1, LENGTH, dtype=torch.long)
            mask[0, :, -4:] = 0
            batch += [torch.randint(3, harness.VOCAB, mask.shape), mask]
        made.append((*batch, [PROMPT] * PAIRS))
    return DataLoader(made, batch_size=None)


def settings(**model: Any) -> Any:
    groups = {
        "model": {
            "label_smoothing": 0.0,
            "ipo_enable": False,
            "aux_loss_coef": 0.0,
            "nll_loss_coef": 0.0,
            **model,
        },
        "ds": {"packing_samples": False},
        "logger": {"tensorboard_dir": None, "logging_steps": 1},
        "eval": {"steps": STEPS},
        "ckpt": {"save_steps": -1},
        "train": {"batch_size": PAIRS},
    }
    made = {name: types.SimpleNamespace(**group) for name, group in groups.items()}
    made["logger"].wandb = types.SimpleNamespace(key=None)
    return types.SimpleNamespace(**made)


def actor(seed: int = 0, **given: Any) -> Any:
    """Its actor, which it loads in half precision only."""
    made = Actor(trl_runs.saved("llama", seed), attn_implementation="eager", **given)
    return made.float()


def train_dpo(model_settings: dict[str, Any], prepare: harness.Prepare) -> harness.Run:
    args, tall, writer = settings(**model_settings), harness.Tall(), Writer()
    strategy = Strategy(args)
    with harness.watched(tall) as said:
        policy, reference = actor(), actor(1)
        for each in (policy, reference):
            prepare(each.model)
        # IPO's gradients are hundreds of times as large: with such steps rounding would grow
        rate = 2e-5 if args.model.ipo_enable else 0.02
        optimizer = torch.optim.SGD(policy.parameters(), rate)
        trainer = DPOTrainer(
            policy,
            reference,
            strategy,
            types.SimpleNamespace(pad_token_id=0),
            optimizer,
            batches(STEPS, 0),
            batches(2, 1),
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            beta=0.1,
            max_epochs=1,
        )
        trainer._tensorboard = writer
        trainer.fit(args)
    return harness.Run(writer.logs, strategy.steps, tall.rows, said)


@pytest.mark.parametrize(
    "case, given",
    [
        ("dpo", {}),
        ("cdpo + nll", {"label_smoothing": 0.1, "nll_loss_coef": 0.2}),
        ("ipo", {"ipo_enable": True}),
    ],
)
def test_dpo(case, given):
    harness.compare(f"OpenRLHF {case}", given, runner=train_dpo)


def train_actor(given: dict[str, Any], prepare: harness.Prepare) -> harness.Run:
    """Three steps as its actor's trainer takes them, with entropy and temperature."""
    tall = harness.Tall()
    run = harness.Run([])
    with harness.watched(tall) as said:
        policy = actor(**given)
        prepare(policy.model)
        policy.train()
        loss_function = PolicyLoss()
        optimizer = torch.optim.SGD(policy.parameters(), 0.02)
        torch.manual_seed(0)
        ids = torch.randint(3, harness.VOCAB, (8, LENGTH))
        attended = torch.ones_like(ids)
        attended[0, -4:] = 0
        action_mask = attended[:, PROMPT:].bool()
        advantages = torch.randn(action_mask.shape)
        with torch.no_grad():
            old = policy(ids, action_mask, attended)
        for _ in range(STEPS):
            logps, output = policy(
                ids, action_mask, attended, return_output=True, return_entropy=True
            )
            loss, clipped, kl, *_ = loss_function(logps, old, advantages, action_mask)
            entropy = masked_mean(output.entropy[:, -action_mask.shape[1] :], action_mask)
            loss = loss - 0.01 * entropy
            loss.backward()
            run.gradients.append(harness.gradients(policy))
            optimizer.step()
            optimizer.zero_grad()
            numbers = {"loss": loss, "clip_ratio": clipped, "kl": kl, "entropy": entropy}
            run.logs.append({name: value.item() for name, value in numbers.items()})
    run.rows, run.said = tall.rows, said
    return run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_actor(temperature):
    case = f"OpenRLHF actor, temperature {temperature}"
    harness.compare(case, {"temperature": temperature}, runner=train_actor)
