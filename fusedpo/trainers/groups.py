"""Group policy optimization with ``transformers.Trainer``: sample, reward, and train on it.

    trainer = GroupTrainer(
        model, TrainingArguments("out", report_to="none"), loss=SoftSequence(),
        reward=my_reward, train_dataset=rows, processing_class=tokenizer,
    )
    trainer.train()

What ``fusedpo train --loss grpo`` runs on. TRL's GRPOTrainer has vLLM, tools and much more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from transformers import TrainingArguments

from fusedpo.checks import bad_type, bad_value, count
from fusedpo.data.rows import vocabulary
from fusedpo.data.sampling import Sampling, generate_segments
from fusedpo.files import read_file, understood, write_file
from fusedpo.functional import LossOutput, policy_loss
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import Loss, PolicyLoss
from fusedpo.model_head import Score, aligned_labels, at_head, evaluating
from fusedpo.recipes.groups import sampled_batch
from fusedpo.trainers.transformers import FusedTrainer, padding_token
from fusedpo.trainers.transformers.arguments import check_rows

Reward = Callable[[Mapping[str, Any], Sequence[int]], float]
"""From a row of the dataset and the token ids of a response to a number, larger for better."""

# what _sample() makes
_SAMPLED = {"input_ids", "attention_mask", "labels", "advantages", "rewards", "old_logprobs"}


class GroupTrainer(FusedTrainer):
    """``transformers.Trainer`` on a policy loss, with responses sampled as it goes.

    Args:
        model: a causal language model with a plain linear head.
        args: batch sizes count prompts; there is no accumulation.
        loss: a policy loss of ``fusedpo.losses``.
        reward: see ``Reward``. Rows have ``prompt_ids`` and whatever the reward looks at.
        group_size: responses a prompt.
        max_new_tokens: of a response.
        updates: optimizer steps on one batch of samples. From the second on the policy is no
            longer the one that sampled, which is what ratios and their gates are for.
        temperature: of sampling, and of the log-probabilities that are trained on.
        eval_prompts: how many held-out prompts evaluation samples for.
        ref_model, memory_budget, options: as in PreferenceTrainer, ``gradient_tolerance`` too.

    Each of several processes samples for its own prompts, and differently; metrics and rewards are
    means over all of them, and evaluation shares the held-out prompts out. Weights have to be
    whole, so that every process can sample by itself: not under FSDP and DeepSpeed. Samples that
    further updates are to use are part of a checkpoint.

    Logged beside ``loss`` and the metrics of the loss: ``reward`` and ``reward_std`` (within
    groups), ``completions/mean_length``. Evaluation logs ``eval_reward`` and
    ``eval_completions/mean_length`` alone, without a loss.
    """

    of_metrics: ClassVar[tuple[str, ...]] = ("rewards",)
    functional: ClassVar[Callable[..., LossOutput]] = staticmethod(policy_loss)

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        loss: Loss,
        reward: Reward,
        group_size: int = 8,
        max_new_tokens: int = 128,
        updates: int = 2,
        temperature: float = 1.0,
        eval_prompts: int = 64,
        **options: Any,
    ) -> None:
        if not isinstance(loss, PolicyLoss):
            raise bad_type("loss", "a policy loss, such as fusedpo.losses.GRPO()", repr(loss))
        for name, value, least in (
            ("group_size", group_size, 2),
            ("max_new_tokens", max_new_tokens, 1),
            ("updates", updates, 1),
            ("eval_prompts", eval_prompts, 1),
        ):
            count(name, value, least)
        args = args or TrainingArguments()
        if args.gradient_accumulation_steps != 1:
            raise bad_value(
                "gradient_accumulation_steps",
                "1, as responses are sampled for one batch at a time",
                str(args.gradient_accumulation_steps),
                "raise per_device_train_batch_size, which counts prompts",
            )
        tokenizer = options.get("processing_class")
        if tokenizer is None:
            raise bad_value("processing_class", "the tokenizer", "none")
        self.pad_token_id = padding_token(tokenizer, vocabulary(model))
        self.eos_token_id = getattr(tokenizer, "eos_token_id", None)
        check_rows(options, ("prompt_ids",))
        if options.get("data_collator") is not None:
            got = repr(options["data_collator"])
            raise bad_value("data_collator", "None, as batches are sampled", got, "leave it out")
        options["data_collator"] = _as_they_are
        super().__init__(model, args, loss=loss, **options)
        if self._sharded:
            raise bad_value(
                "args",
                "whole weights, for every process to sample by itself",
                "FSDP or DeepSpeed",
                "use DistributedDataParallel",
            )
        self.reward = reward
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.updates, self.eval_prompts = updates, eval_prompts
        self.temperature = temperature
        # of all tokens, so that log-probabilities are those of the sampling policy
        self.settings = Sampling(temperature=temperature)

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        self._sampled: dict[str, Tensor] = {}
        self._left = 0
        path = None if checkpoint is None else self._samples(Path(checkpoint))
        # without it, as from another trainer, the first step samples
        if path is not None and path.is_file():
            tensors, meta = read_file(path)
            with understood(path):
                left = int(meta["left"])
                if left and set(tensors) != _SAMPLED:
                    raise ValueError(f"other tensors: {', '.join(sorted(tensors)) or 'none'}")
            self._left = left
            self._sampled = {name: t.to(self.args.device) for name, t in tensors.items()}

    def _examples(self, batch: Mapping[str, Tensor]) -> int:
        return int(batch["labels"].shape[0])

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches; how many tokens there will be is not known before they are sampled."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, None

    def _batch(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Responses to the prompts: sampled now or, to train on, a few steps ago."""
        if not self._trains(model):
            return self._sample(model, inputs["rows"])
        if self._left == 0:
            self._sampled = self._sample(model, inputs["rows"])
            self._left = self.updates
        self._left -= 1
        return self._sampled

    def _counts(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Responses and their tokens, [2], averaged over the processes as gradients are."""
        if self.args.world_size == 1:
            return None
        tokens = (aligned_labels(batch["labels"]) != IGNORE_INDEX).sum()
        own = torch.stack([torch.full_like(tokens, self._examples(batch)), tokens])
        counts: Tensor = self.accelerator.reduce(own.double(), "mean")
        return counts

    def _further_metrics(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rewards = batch["rewards"].view(-1, self.group_size)
        lengths = (batch["labels"] != IGNORE_INDEX).sum(1)
        return {
            "reward": rewards.mean(),
            "reward_std": rewards.std(1).mean(),
            "completions/mean_length": lengths.double().mean(),
        }

    def _loss_arguments(self, step_counts: Tensor | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"temperature": self.temperature}
        if step_counts is not None:
            assert isinstance(self.loss, PolicyLoss), "checked when this was made"
            of_tokens = self.loss.aggregation == "token_mean"
            responses, tokens = step_counts.unbind()
            if not of_tokens:
                arguments["num_items"] = responses
            if of_tokens or self.loss.entropy_bonus:
                arguments["num_tokens"] = tokens
        return arguments

    def _sample(self, model: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Groups of responses with their advantages and log-probabilities, on the device."""
        inner = self.accelerator.unwrap_model(model)
        prompts = [row["prompt_ids"] for row in rows for _ in range(self.group_size)]
        responses = self._generate(inner, prompts, self.state.global_step)
        rewards = [
            float(self.reward(rows[i // self.group_size], response))
            for i, response in enumerate(responses)
        ]
        batch = sampled_batch(prompts, responses, rewards, self.group_size, self.pad_token_id)
        batch = {name: value.to(self.args.device) for name, value in batch.items()}
        batch["old_logprobs"] = self._logprobs(inner, batch)
        return batch

    def _generate(self, model: Any, prompts: Sequence[Any], seed: int) -> list[list[int]]:
        return generate_segments(
            model,
            prompts,
            [self.max_new_tokens] * len(prompts),
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
            settings=self.settings,
            seed=self.args.seed + 1_000_003 * (seed + 1) + self.args.process_index,
        )

    @torch.no_grad()
    def _logprobs(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, T] of the policy as it is now, aligned with hidden."""
        score = Score(
            aligned_labels(batch["labels"]),
            temperature=self.temperature,
            memory_budget=self.memory_budget,
        )
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        # under the autocast that accelerate wraps forward in
        with evaluating(model):
            found, _ = at_head(model, score, **inputs)
        return found.logprob

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The mean reward of a response to each of some held-out prompts; sampling repeats."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, dict):
            each = (
                self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, part in rows.items()
            )
            return {name: value for metrics in each for name, value in metrics.items()}
        if isinstance(rows, str):
            several: Any = self.eval_dataset
            rows = several[rows]
        if not hasattr(rows, "__len__"):
            raise bad_type("eval_dataset", "rows whose number is known", type(rows).__name__)
        rows = [rows[i] for i in range(min(self.eval_prompts, len(rows)))]
        if not rows:
            raise bad_value("eval_dataset", "at least one row", "none")
        inner = self.accelerator.unwrap_model(self.model)
        own = rows[self.args.process_index :: self.args.world_size]
        # there may be fewer prompts than processes
        responses = self._generate(inner, [row["prompt_ids"] for row in own], -1) if own else []
        rewards = [float(self.reward(row, r)) for row, r in zip(own, responses, strict=True)]
        sums = [sum(rewards), float(sum(map(len, responses)))]
        if self.args.world_size > 1:
            both = torch.tensor(sums, dtype=torch.float64, device=self.args.device)
            sums = self.accelerator.reduce(both, "sum").tolist()
        found = {
            f"{metric_key_prefix}_reward": sums[0] / len(rows),
            f"{metric_key_prefix}_completions/mean_length": sums[1] / len(rows),
        }
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: prompts have no labels that a prediction could be held against."""
        raise NotImplementedError(
            "predict: expected rows with labels, got a trainer that samples responses to prompts; "
            "call evaluate(rows) for their rewards, or the model's generate() for the responses"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Also what of the samples is left to train on; the trainer's state is written last."""
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        kept = self._sampled if self._left else {}
        write_file(self._samples(folder), kept, {"left": self._left})
        super()._save_checkpoint(model, trial)

    def _samples(self, folder: Path) -> Path:
        return folder / f"samples-{self.args.process_index}.safetensors"


def _as_they_are(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"rows": list(rows)}
