"""Tasks at the head: statistics of labels, and mean logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo.engine.plan import Plan
from fusedpo.engine.precision import accumulated_dtype
from fusedpo.engine.stats import DIFFERENTIABLE, STATS, TokenStats
from fusedpo.functional import linear_token_stats
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX


@dataclass(frozen=True)
class Score:
    """A task for ``at_head``: token statistics of labels. Returns a ``TokenStats`` of [B, T].

    Attributes:
        labels: [B, T], integers aligned with the hidden states (see ``aligned_labels``); -100 where
            nothing is scored.
        stats: names of ``fusedpo.engine.stats.STATS``.
        temperature: divides the logits; above 0, a number or [B, T].
        memory_budget: as of ``linear_token_stats``, and so are the next.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        differentiable: which of log-probability and entropy pass a gradient on.
        gradient_tolerance: the relative error that a gradient may have.
    """

    labels: Tensor
    stats: tuple[str, ...] = ("logprob",)
    temperature: float | Tensor = 1.0
    memory_budget: int | float | str | Plan | None = None
    backend: str = "auto"
    differentiable: tuple[str, ...] = field(default=DIFFERENTIABLE, kw_only=True)
    gradient_tolerance: float = field(default=0.0, kw_only=True)

    def __call__(self, hidden: Tensor, head: Head) -> TokenStats:
        return linear_token_stats(
            hidden,
            head.weight,
            self.labels.to(hidden.device),
            stats=self.stats,
            differentiable=self.differentiable,
            temperature=self.temperature,
            memory_budget=self.memory_budget,
            backend=self.backend,
            gradient_tolerance=self.gradient_tolerance,
            **head.options(),
        )

    def from_logits(self, logits: Tensor) -> TokenStats:
        """The same statistics, from logits [B, T, V] of any floating-point dtype."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        temperature = self.temperature
        z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
        logp = z.log_softmax(-1)
        labels = self.labels.to(z.device)
        scored = labels != IGNORE_INDEX
        target = labels.clamp(min=0)[..., None]
        formulas: dict[str, Callable[[], Tensor]] = {
            "logprob": lambda: logp.gather(-1, target)[..., 0],
            # 0 log 0 = 0, also of tokens that are ruled out
            "entropy": lambda: -(logp.exp() * logp.clamp(min=-1e4)).sum(-1),
            "logsumexp": lambda: z.detach().logsumexp(-1),
            "mean_logit": lambda: z.detach().mean(-1),
            "log_sum_sq_probs": lambda: (2 * logp.detach()).logsumexp(-1),
            "top1": lambda: z.gather(-1, target)[..., 0] >= z.amax(-1),
        }
        values = {name: formulas[name]().masked_fill(~scored, 0) for name in self.stats}
        for name in {*values}.difference(self.differentiable):
            values[name] = values[name].detach()
        return TokenStats(**{name: values.get(name) for name in STATS})


@torch.no_grad()
def mean_logits(
    hidden: Tensor,
    head: Head,
    *,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
) -> Tensor:
    """The mean over the vocabulary of the logits at every position, without gradients.

    Without a soft cap it is linear, one product with the mean row of the weight; with one it costs
    what the log-probabilities of all positions do.

    Args:
        hidden: [..., H].
        head: weight [V, H], bias [V] or None, soft cap and scale.
        memory_budget, backend: as of ``linear_token_stats``; without a soft cap not used.

    Returns:
        [...], fp32, or fp64 for double states.
    """
    if head.softcap is None:
        return uncapped_mean_logits(hidden, head)
    labels = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
    score = Score(labels, ("mean_logit",), memory_budget=memory_budget, backend=backend)
    mean_logit = score(hidden, head).mean_logit
    assert mean_logit is not None, "it was asked for"
    return mean_logit


def uncapped_mean_logits(hidden: Tensor, head: Head) -> Tensor:
    """As ``mean_logits``, of a head without a soft cap, and with gradients."""
    full = accumulated_dtype(hidden.dtype)
    mean = hidden.to(full) @ head.weight.mean(0, dtype=full)
    if head.bias is not None:
        mean = mean + head.bias.mean(dtype=full)
    return mean * head.logit_scale


def strip_virtual_tokens(values: Tensor, labels: Tensor) -> Tensor:
    """The last T positions [B, T, ...] of values, for labels [B, T]: prompt tuning puts virtual
    tokens in front of a batch."""
    return values[:, -labels.shape[1] :]


def map_stats(stats: TokenStats, function: Callable[[Tensor], Tensor]) -> TokenStats:
    """The statistics with a function applied to each that is not None."""
    return pytree.tree_map(lambda v: None if v is None else function(v), stats)
