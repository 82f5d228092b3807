"""Responses that the policy samples, with rewards."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fusedpo.checks import bad_type, bad_value, positive
from fusedpo.data.messages import first_line
from fusedpo.losses import Loss, PolicyLoss
from fusedpo.losses.base import hyperparameter
from fusedpo.losses.hyperparameters import at_least
from fusedpo.recipes.groups import token_overlap
from fusedpo.report import Signal
from fusedpo.trainers.methods.base import Defaults, Method

if TYPE_CHECKING:
    from fusedpo.trainers.transformers import FusedTrainerMixin


@dataclass(frozen=True)
class Sampled(Method):
    """Responses that the policy samples, with rewards; of a pair, prompt and chosen are used."""

    losses: ClassVar[tuple[type[Loss], ...]] = (PolicyLoss,)
    unit: ClassVar[str] = "prompts"
    writes: ClassVar[bool] = True
    signals: ClassVar[tuple[Signal, ...]] = (
        Signal("held-out reward", "eval_reward", ".4f", "mean over prompts"),
        Signal("training reward", "reward", ".4f", "mean over responses"),
        Signal("within groups", "reward_std", ".4f", "standard deviation of rewards"),
        Signal("ratio", "ratio/mean", ".4f", "to the policy that sampled", 1.0),
        Signal("KL from it", "kl_old", ".2e", "nats a token"),
    )
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 8, 120, 1.0)

    reward: str = hyperparameter(
        "overlap",
        '"overlap": tokens in common with the chosen response; or module:function, from a row '
        "and token ids to a number",
        lambda name, value: value,
    )
    group_size: int = hyperparameter(8, "responses a prompt", at_least(2))
    max_new_tokens: int = hyperparameter(48, "tokens of a response, at most", at_least(1))
    updates: int = hyperparameter(2, "optimizer steps on one batch of samples", at_least(1))
    temperature: float = hyperparameter(1.0, "what logits are divided by in sampling", positive)

    def check_batch(self, loss: Loss, size: int, accumulation: int) -> None:
        if accumulation != 1:
            expected = "1 for a loss of sampled responses"
            remedy = "set batch_size, which counts their prompts"
            raise bad_value("accumulation", expected, str(accumulation), remedy)

    def is_saved(self, checkpoint: Path, processes: int) -> bool:
        return all(
            (checkpoint / f"samples-{rank}.safetensors").is_file() for rank in range(processes)
        )

    def check(self, loss: Loss) -> None:
        if not isinstance(loss, PolicyLoss):
            raise bad_value("loss", "a policy loss, of sampled responses", repr(loss))
        reward_function(self.reward)

    def trainer(self, model: Any, args: Any, **options: Any) -> FusedTrainerMixin:
        from fusedpo.trainers.groups import GroupTrainer

        return GroupTrainer(
            model,
            args,
            reward=reward_function(self.reward),
            group_size=self.group_size,
            max_new_tokens=self.max_new_tokens,
            updates=self.updates,
            temperature=self.temperature,
            **options,
        )


def reward_function(name: str) -> Any:
    """``overlap``, or the function that ``module:function`` names."""
    if name == "overlap":
        return lambda row, response: token_overlap(response, list(row["chosen_ids"]))
    module, _, function = name.partition(":")
    expected = '"overlap", or module:function that can be imported'
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise bad_value("reward", expected, f"{name!r} ({first_line(error)})") from error
    if not callable(found):
        raise bad_type("reward", expected, f"{name!r}, which is a {type(found).__name__}")
    return found
