"""A loss of your own: ``python examples/new_loss.py``.

A loss is a frozen dataclass with a formula on what it sees of each response. It never sees logits
and needs no kernel: budgets, references, packing and trainers come with its base class. This one is
R-DPO (Park et al., arXiv 2403.19159): DPO with a penalty on the longer response.

    L = -log sigmoid(beta (a(y_w) - a(y_l)) - alpha (|y_w| - |y_l|))
    a(y) = log pi(y | x) - log pi_ref(y | x)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fusedpo import linear_logprobs, preference_loss
from fusedpo.checks import in_range
from fusedpo.losses.base import (
    PreferenceLoss,
    RatioLoss,
    Scores,
    hyperparameter,
    inverse_temperature,
)


@dataclass(frozen=True)
class RDPO(RatioLoss, PreferenceLoss):
    """Length-regularised DPO. RatioLoss brings the reference and the reward beta a(y)."""

    beta: float = inverse_temperature(0.1)
    alpha: float = hyperparameter(
        0.02, "penalty a token", lambda name, value: in_range(name, value, 0.0, 1.0)
    )

    def per_example(self, chosen: Scores, rejected: Scores, **inputs: Any) -> Tensor:
        margin = self.reward(chosen) - self.reward(rejected)
        return -logsigmoid(margin - self.alpha * (chosen.length - rejected.length))


def naive(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    """The same by full logits, to compare with."""
    logp = (hidden @ weight.T).log_softmax(-1)
    logp = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    ratio = (logp - reference).masked_fill(labels == -100, 0).sum(1)
    (chosen, rejected), (longer, shorter) = ratio.chunk(2), (labels != -100).sum(1).chunk(2)
    margin = 0.1 * (chosen - rejected) - 0.02 * (longer - shorter)
    return -logsigmoid(margin).mean()


def main() -> float:
    """Hold loss and gradients to full logits, and return the loss."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (4, 9))  # two chosen rows, two rejected ones
    labels[2:, 5:] = -100
    reference = linear_logprobs(hidden.roll(1, 0), weight, labels).detach()

    out = preference_loss(RDPO(), hidden, weight, labels, ref_logprobs=reference)
    truth = naive(hidden, weight, labels, reference)
    torch.testing.assert_close(out.loss, truth, check_dtype=False)
    gradients = (torch.autograd.grad(loss, [hidden, weight]) for loss in (out.loss, truth))
    torch.testing.assert_close(*gradients)
    print(f"loss {out.loss:.6f}, as by full logits; reward {out.metrics['rewards/chosen']:.3f}")
    return out.loss.item()


if __name__ == "__main__":
    main()
