"""Statistics of labels at the head, and of labels where logits were made after all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo.engine.plan import Plan
from fusedpo.engine.stats import STATS, TokenStats
from fusedpo.functional import linear_token_stats
from fusedpo.head import Head

IGNORED = -100


def aligned_labels(labels: Tensor) -> Tensor:
    """[B, T] with labels[t] what the states at t predict, from labels as Hugging Face gives them;
    nothing is predicted at the last position."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def of_tokens(values: Tensor, labels: Tensor) -> Tensor:
    """[B, T, ...] like labels, from what may have the virtual tokens of prompt tuning in front."""
    return values[:, -labels.shape[1] :]


def on_stats(stats: TokenStats, function: Callable[[Tensor], Tensor]) -> TokenStats:
    """The statistics with a function applied to each that there is."""
    return pytree.tree_map(lambda v: None if v is None else function(v), stats)


@dataclass(frozen=True)
class Score:
    """At the head: statistics of labels [B, T] that are aligned with the hidden states."""

    labels: Tensor
    stats: tuple[str, ...] = ("logprob",)
    temperature: float | Tensor = 1.0
    memory_budget: int | float | str | Plan | None = None
    backend: str = "auto"

    def __call__(self, hidden: Tensor, head: Head) -> TokenStats:
        return linear_token_stats(
            hidden,
            head.weight,
            self.labels.to(hidden.device),
            stats=self.stats,
            temperature=self.temperature,
            memory_budget=self.memory_budget,
            backend=self.backend,
            **head.options(),
        )

    def by_logits(self, logits: Tensor) -> TokenStats:
        """The same from logits [B, T, V]."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        temperature = self.temperature
        z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
        logp = z.log_softmax(-1)
        labels = self.labels.to(z.device)
        scored = labels != IGNORED
        target = labels.clamp(min=0)[..., None]
        own = logp.gather(-1, target)[..., 0]
        makers: dict[str, Callable[[], Tensor]] = {
            "logprob": lambda: own,
            # 0 log 0 = 0, also of tokens that are ruled out
            "entropy": lambda: -(logp.exp() * logp.clamp(min=-1e4)).sum(-1),
            "logsumexp": lambda: z.detach().logsumexp(-1),
            "mean_logit": lambda: z.detach().mean(-1),
            "log_sum_sq_probs": lambda: (2 * logp.detach()).logsumexp(-1),
            "top1": lambda: z.gather(-1, target)[..., 0] >= z.amax(-1),
        }
        values = {name: makers[name]().masked_fill(~scored, 0) for name in self.stats}
        return TokenStats(**{name: values.get(name) for name in STATS})
