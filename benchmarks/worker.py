"""A process for every measurement of memory, without the imports being paid each time.

The server has imported everything and computed nothing; it forks for each request, so that what is
measured is a fresh process. It is started by the first request and ends with the program.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fusedpo.benchmarks import measure
from fusedpo.benchmarks.peers import PEERS, step
from fusedpo.benchmarks.shapes import MIB, Case, make_inputs
from fusedpo.benchmarks.timing import told


def _addmm_flop(out: Any, a: tuple[int, int], b: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _forward_flop(hidden: tuple[int, int], weight: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


def _counter() -> FlopCounterMode:
    """With what it does not know by itself."""
    known: dict[Any, Callable[..., int]] = {torch.ops.aten.addmm_: _addmm_flop}
    # there from its first use on
    with contextlib.suppress(AttributeError):
        name = "_linear_cross_entropy_batch_chunked_no_reduction"
        known[getattr(torch.ops.torch_nn, name)] = _forward_flop
    return FlopCounterMode(display=False, custom_mapping=known)


# beyond the tensors of a step: stacks of threads, code that is loaded late
_MARGIN = 512 * MIB


class OutOfMemory(Exception):
    """It does not fit."""


@dataclass(frozen=True)
class Peak:
    """Bytes beyond the inputs, in a process that has made such a step before.

    Attributes:
        total: most of them at a time.
        gradients: of the inputs, which are part of it.
        loss: what the step computed.
        seconds: that it took, alone and once.
        products: matrix products of positions x vocabulary x hidden, or None where they are made
            by compiled code.
    """

    total: int
    gradients: int
    products: float | None = None
    loss: float = float("nan")
    seconds: float = float("nan")

    @property
    def extra(self) -> int:
        """Beyond the gradients too: what the method costs.

        A peak that comes before the gradients exist is counted as if they already did: the process
        needs their room in any case.
        """
        return max(0, self.total - self.gradients)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Every kind of them becomes OutOfMemory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory("out of memory") from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise OutOfMemory("out of memory") from error
        raise


def _whole_warm_up(case: Case) -> bool:
    """Whether the first step has to be as long as the second one.

    To compile the same, or where a few MiB of work space that a library keeps would show. At the
    smallest budgets a step is slow and takes no such space.
    """
    peer = PEERS[case.peer]
    return peer.compiles or (peer.budgeted and (case.budget or 0) >= MIB)


def peak_of(case: Case) -> Peak:
    """The measurement itself, in a process that has measured nothing before.

    Raises:
        OutOfMemory: if it does not fit.
    """
    peer = PEERS[case.peer]
    with memory_errors():
        # pays what is paid once: thread pools, compilers, work space of libraries
        first = case if _whole_warm_up(case) else case.at(case.shape.shorter())
        with _counter():
            step(first, make_inputs(first))
        inputs = make_inputs(case)
        with _counter() as counter:
            losses: list[torch.Tensor] = []
            begin = time.perf_counter()
            total = measure.peak_bytes(lambda: losses.append(step(case, inputs)), case.device)
            seconds = time.perf_counter() - begin
        products = None if peer.compiles else round(counter.get_total_flops() / case.flop, 2)
    gradients = [x.grad for x in (inputs.hidden, inputs.weight) if x.grad is not None]
    returned = sum(g.numel() * g.element_size() for g in gradients)
    return Peak(total, returned, products, float(losses[0]), seconds)


def fresh_peak(case: Case, threads: int = 2) -> Peak:
    """Peak of a step of the case, in a process of its own on the CPU.

    On a GPU its allocator counts, and this process will do.

    Raises:
        OutOfMemory: if it does not fit.
        RuntimeError: with the reason, if it fails otherwise.
    """
    request = {"case": case.to_json(), "threads": threads}
    if case.on_cpu:
        return Peak(**in_fresh_process(case.measured_by, request))
    torch.cuda.empty_cache()
    try:
        return Peak(**_function(case.measured_by)(request))
    except OutOfMemory:
        raise
    except Exception as error:
        raise RuntimeError(told(error)) from error


def _function(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


_server: subprocess.Popen[str] | None = None


def _end() -> None:
    """The server, and the process that it may be waiting for."""
    global _server
    if _server is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(_server.pid, signal.SIGKILL)
    _server.wait()
    _server = None


atexit.register(_end)


def in_fresh_process(function: str, request: dict[str, Any]) -> dict[str, Any]:
    """What a function answers in a process that has computed nothing yet, on the CPU.

    Args:
        function: ``module:name``, from a request to an answer, both of plain values. A function
            ``preload`` of the module is called once, before any fork; it must not compute.
        request: with ``threads``.

    Raises:
        OutOfMemory: if it raised that, or was killed.
        RuntimeError: with the reason, if it failed otherwise.
    """
    global _server
    if _server is None or _server.poll() is not None:
        found = os.pathsep.join(path for path in sys.path if path)
        settings = {
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": found,
        }
        _server = subprocess.Popen(
            [sys.executable, "-m", "fusedpo.benchmarks.worker"],
            env={**os.environ, **measure.MALLOC_ENV, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    assert _server.stdin is not None and _server.stdout is not None
    try:
        print(json.dumps({"function": function, **request}), file=_server.stdin, flush=True)
        line = _server.stdout.readline()
    except BaseException:
        # an answer that nobody waits for must not be taken for the next one
        _end()
        raise
    if not line:
        raise RuntimeError("the measuring process is gone")
    found_out: dict[str, Any] = json.loads(line)
    if "out_of_memory" in found_out:
        raise OutOfMemory(found_out["out_of_memory"])
    if "failed" in found_out:
        raise RuntimeError(found_out["failed"])
    return found_out


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preloaded = set()
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("function")
        if (module := name.partition(":")[0]) not in preloaded:
            preloaded.add(module)
            importlib.import_module(module).preload()
        child = os.fork()
        if child == 0:
            print(json.dumps(_limited(_function(name), request)), file=answers, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            # killed: on this system that is how memory ends
            word = "out_of_memory" if os.WIFSIGNALED(status) else "failed"
            said = f"ended with status {os.waitstatus_to_exitcode(status)}"
            print(json.dumps({word: said}), file=answers, flush=True)


def _limited(function: Callable[[dict[str, Any]], dict[str, Any]], request: Any) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    if room := measure.available_bytes():
        # a failing allocation, rather than a machine that stands still
        limit = measure.status_bytes("VmSize") + room + _MARGIN
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        return function(request)
    except OutOfMemory as error:
        return {"out_of_memory": str(error)}
    except Exception as error:
        return {"failed": told(error)}


def preload() -> None:
    """What peers import."""
    for peer in PEERS.values():
        peer.missing()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The peak of a case."""
    return asdict(peak_of(Case.from_json(request["case"])))


if __name__ == "__main__":
    # the module that is measured with is imported under its own name
    from fusedpo.benchmarks import worker

    worker._serve()
