"""A script of several processes, as torchrun would start it; see test_docs.py."""

from __future__ import annotations

import os
import socket
import warnings

import torch


def worker(rank: int, world: int, port: int, script: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    exec(compile(script, "script.py", "exec", dont_inherit=True), {"__name__": "__main__"})


def start(script: str, world: int) -> None:
    """Run it, and raise what one of its processes raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(world, port, script), nprocs=world)
