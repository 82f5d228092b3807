"""A few processes that wait for work: one start for all the tests of a module.

A test gives a function of ``work``, by name, or of ``compact_work`` as ``compact.NAME``, and its
arguments; every process runs it and returns what is wrong, in words.
"""

from __future__ import annotations

import socket
import traceback
from typing import Any

import torch.multiprocessing as multiprocessing

# far more than any task takes: what waits longer waits for a collective that does not come
PATIENCE_S = 90


class Processes:
    """``count`` processes that make up a gloo group; a context manager."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pairs = [context.Pipe() for _ in range(count)]
        self.pipes = [mine for mine, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, count, port, its), daemon=True)
            for rank, (_, its) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()

    def run(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """What work.<name> returned on each process.

        Raises:
            AssertionError: if one raised, with its traceback; or did not answer.
        """
        for pipe in self.pipes:
            pipe.send((name, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE_S), f"{name}: no answer from process {rank}"
            answers.append(pipe.recv())
        broken = [error for error, _ in answers if error is not None]
        assert not broken, "\n".join(broken)
        return [found for _, found in answers]

    def faults(self, name: str, *args: Any, **kwargs: Any) -> list[str]:
        """What was found wrong on any process, each fault once."""
        found = self.run(name, *args, **kwargs)
        return list(dict.fromkeys(fault for of_rank in found for fault in of_rank))


def _serve(rank: int, count: int, port: int, pipe: Any) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE_S / 2),
    )
    # after the environment that the parent has set: Triton's interpreter is asked for there
    from distributed import compact_work, work

    while (task := pipe.recv()) is not None:
        name, args, kwargs = task
        try:
            module = compact_work if name.startswith("compact.") else work
            answer = None, getattr(module, name.removeprefix("compact."))(*args, **kwargs)
        except Exception:
            answer = f"process {rank}:\n{traceback.format_exc()}", None
        pipe.send(answer)
    dist.destroy_process_group()
