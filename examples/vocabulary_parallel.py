"""A head in slices of the vocabulary, on two processes: ``python examples/vocabulary_parallel.py``.

Each process has the whole body, the same batch and its slice of the head's rows. No process ever
has a log-probability from its slice alone: a few numbers a token are gathered, and the gradient of
the hidden states is summed, inside the loss. On GPUs take "nccl", and start it by torchrun.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fusedpo import preference_loss
from fusedpo.losses import SimPO

VOCAB, HIDDEN, WORLD = 1000, 32, 2


def train(group: dist.ProcessGroup | None, rank: int, world: int, steps: int = 5) -> list[float]:
    """The losses of a few steps, with this process's slice of the head."""
    torch.manual_seed(0)  # the same weights and data on every process
    embedding, body = nn.Embedding(VOCAB, HIDDEN), nn.GRU(HIDDEN, HIDDEN, batch_first=True)
    whole = torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5
    ids = torch.randint(VOCAB, (8, 21))  # four chosen rows, four rejected ones
    weight = nn.Parameter(whole.tensor_split(world)[rank].clone())  # slices may differ in size

    optimizer = torch.optim.AdamW([*embedding.parameters(), *body.parameters(), weight], lr=1e-2)
    losses = []
    for _ in range(steps):
        hidden = body(embedding(ids[:, :-1]))[0]
        # labels are of the whole vocabulary on every process
        loss = preference_loss(SimPO(), hidden, weight, ids[:, 1:], vocab_group=group).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def process(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    losses = train(dist.group.WORLD, rank, WORLD)
    torch.save(losses, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


def main() -> tuple[list[float], list[float]]:
    """Train on two processes and on one, and return the losses of both."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (f"{folder}/store", folder), nprocs=WORLD)
        files = (Path(folder) / f"{rank}.pt" for rank in range(WORLD))
        first, second = (torch.load(file, weights_only=True) for file in files)
    assert first == second  # every process has the same loss, to the last bit
    alone = train(None, 0, 1)
    print("two processes:", *(f"{loss:.6f}" for loss in first))
    print("one process:  ", *(f"{loss:.6f}" for loss in alone))
    return first, alone


if __name__ == "__main__":
    main()
