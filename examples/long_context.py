"""A pair of long responses within a small budget: ``python examples/long_context.py``.

Two responses of 4,096 tokens over a vocabulary of 32,000: full logits would be 1 GiB in fp32, and
as much again for each of log-softmax and gradient. The loss gets 16 MiB. The planner says before,
without any tensor, what it will do with them, and what a larger budget would buy.
"""

import torch
from torch import nn

import fusedpo
from fusedpo.losses import SimPO
from fusedpo.sizes import format_bytes

VOCAB, HIDDEN = 32_000, 64


class Body(nn.Module):
    """An embedding and a recurrent layer, in the place of a transformer: any module will do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layer = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(ids))[0]


def main(tokens: int = 4096, budget: str = "16MiB") -> tuple[float, float]:
    """Take a step, and return the loss before and after it."""
    torch.manual_seed(0)
    loss = SimPO(beta=2.0, gamma=0.5)
    structure = loss.gradient_structure
    problem = {
        "tokens": 2 * tokens,
        "vocab": VOCAB,
        "hidden": HIDDEN,
        "scope": structure.scope,
        "factors": structure.factors,
        "groups": 1,
    }
    print("full logits:", format_bytes(2 * tokens * VOCAB * 4))
    for allowed in (budget, "1GiB"):
        plan = fusedpo.plan(**problem, budget=allowed)
        print(f"{allowed}: {plan.route}, {plan.products} products, {format_bytes(plan.bytes)}")

    body, head = Body(), nn.Linear(HIDDEN, VOCAB, bias=False)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.5)
    ids = torch.randint(VOCAB, (2, tokens + 1))  # the chosen row, then the rejected one
    labels = ids[:, 1:].clone()  # aligned: labels[t] is what the state at t predicts
    labels[:, :100] = -100  # the prompt

    values = []
    for _ in range(2):
        out = fusedpo.preference_loss(
            loss, body(ids[:, :-1]), head.weight, labels, memory_budget=budget
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(out.loss.item())
    print("loss before and after a step:", *(f"{v:.4f}" for v in values))
    return values[0], values[1]


if __name__ == "__main__":
    main()
