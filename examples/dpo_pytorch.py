"""DPO in a plain PyTorch loop: ``python examples/dpo_pytorch.py``.

A tiny Llama learns to repeat its prompt: the chosen response does, the rejected one says something
else. Policy and reference are scored in one call, at their heads, within 16 MiB.
"""

import copy
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusedpo import Reference, hidden_and_head, preference_loss
from fusedpo.losses import DPO

WORDS, LENGTH, PAIRS = range(10, 60), 4, 288


def collate(pairs: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [2P, T]: all chosen rows, then all rejected ones; prompts unscored."""
    rows = [pair[0] + pair[side] for side in (1, 2) for pair in pairs]
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, :LENGTH] = -100
    return ids, labels


def main(steps: int = 40) -> tuple[float, float]:
    """Train, and return the held-out accuracy before and after."""
    torch.manual_seed(0)
    chooser = random.Random(0)
    pairs = []
    for _ in range(PAIRS):
        words = chooser.sample(WORDS, 2 * LENGTH)
        pairs.append([words[:LENGTH], words[:LENGTH], words[LENGTH:]])  # prompt, chosen, rejected
    train, held_out = pairs[:-32], pairs[-32:]

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    reference = copy.deepcopy(policy).requires_grad_(False)

    def loss_of(batch: list[list[list[int]]]):
        ids, labels = collate(batch)
        with torch.no_grad():
            states, its_head = hidden_and_head(reference, input_ids=ids)
        hidden, head = hidden_and_head(policy, input_ids=ids)
        # shift: labels are Hugging Face's, labels[t] is the token at t and not the one after it
        return preference_loss(
            DPO(beta=0.5),
            hidden,
            head,
            labels,
            shift=True,
            reference=Reference(hidden=states, head=its_head),
            memory_budget="16MiB",
        )

    with torch.no_grad():
        before = loss_of(held_out)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(steps):
        out = loss_of(chooser.sample(train, 16))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            margin = out.metrics["rewards/margins"]
            print(f"step {step:3}  loss {out.loss:.4f}  margin {margin:.3f}")
    with torch.no_grad():
        after = loss_of(held_out)
    accuracies = [float(o.metrics["rewards/accuracies"]) for o in (before, after)]
    print("held-out accuracy before and after:", *(f"{a:.2f}" for a in accuracies))
    return accuracies[0], accuracies[1]


if __name__ == "__main__":
    main()
