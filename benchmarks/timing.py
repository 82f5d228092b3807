"""The clock: interleaved rounds, and work that is queued before it is timed.

In training the host is ahead of the GPU, which finds the next kernel waiting. So before anything is
timed the device is given something else to do, and events mark when it begins and when it is done.
What the host takes to queue it is kept beside that: if it is the longer, launches are what limits.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")
Step = Callable[[], object]

# side of the product that keeps the device busy, and how many of them; some ten milliseconds
_CUSHION_SIDE = 8192
_CUSHION_PRODUCTS = 8


class Deadline:
    """A moment to be done by; without seconds, none."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    @property
    def over(self) -> bool:
        return self.left <= 0


def median(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


@dataclass
class Measured:
    """Seconds of every round, on the device and on the host that queued it.

    missing: why there is no number, or None.
    """

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    missing: str | None = None

    @property
    def median(self) -> float | None:
        return median(self.seconds)

    @property
    def host_median(self) -> float | None:
        return median(self.host)

    @property
    def quartiles(self) -> tuple[float, float] | None:
        if not self.seconds:
            return None
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def of_one(self, calls: int) -> Measured:
        """Of each of so many calls that were timed together."""
        return Measured(
            [seconds / calls for seconds in self.seconds],
            [seconds / calls for seconds in self.host],
            self.missing,
        )


def told(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def rotated(names: Sequence[T], round_: int) -> list[T]:
    """Another one first in each round, and every other round backwards.

    A slow spell of the machine falls on all of them, and none always follows the same one.
    """
    start = round_ % max(1, len(names))
    order = [*names[start:], *names[:start]]
    return order[::-1] if round_ % 2 else order


def in_rounds(names: Sequence[T], most: int, seconds: float) -> Iterator[T]:
    """Every name once a round, up to so many rounds; none that would end after the seconds."""
    begin = time.monotonic()
    for round_ in range(most):
        yield from rotated(names, round_)
        # another round takes as long as those so far did on average
        if (time.monotonic() - begin) * (round_ + 2) / (round_ + 1) > seconds:
            return


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected before, and not meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Clock:
    """Times functions on one device: with events on a GPU, with the host's clock elsewhere."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._operands: tuple[torch.Tensor, torch.Tensor] | None = None

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def cushion(self) -> None:
        """Work for the device, for the host to get ahead; products, so that its clocks stay up."""
        if self._operands is None:
            size = (_CUSHION_SIDE, _CUSHION_SIDE)
            square = torch.randn(size, dtype=torch.bfloat16, device=self.device)
            self._operands = square, torch.empty_like(square)
        square, out = self._operands
        for _ in range(_CUSHION_PRODUCTS):
            torch.mm(square, square, out=out)

    def once(self, function: Step) -> float:
        """Seconds of one call."""
        with _no_collection():
            return self._timed(function)[0]

    def interleaved(
        self,
        functions: Mapping[str, Step],
        rounds: int,
        deadline: Deadline | None = None,
        warmup: int = 2,
    ) -> dict[str, Measured]:
        """Every function once a round, until there are enough rounds or the time is up.

        One round is measured in any case. A function that raises is measured no further, and says
        why.
        """
        found = {name: Measured() for name in functions}
        for round_ in range(-warmup, rounds):
            if round_ > 0 and deadline is not None and deadline.over:
                break
            with _no_collection():
                for name in rotated(list(functions), round_):
                    self._add(found[name], functions[name], keep=round_ >= 0)
        return found

    def _add(self, found: Measured, function: Step, *, keep: bool) -> None:
        if found.missing:
            return
        try:
            seconds, host = self._timed(function)
        except Exception as error:  # a line of the table, not the end of it
            found.missing = told(error)
            if self.cuda:
                torch.cuda.empty_cache()
            return
        if keep:
            found.seconds.append(seconds)
            found.host.append(host)

    def _timed(self, function: Step) -> tuple[float, float]:
        """Seconds on the device and on the host."""
        if not self.cuda:
            begin = time.perf_counter()
            function()
            taken = time.perf_counter() - begin
            return taken, taken
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.synchronize()
        self.cushion()
        start.record()
        begin = time.perf_counter()
        function()
        host = time.perf_counter() - begin
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3, host

    def repeated(self, function: Callable[[int], object], times: int) -> Step:
        """``times`` calls, function(0), function(1), ..., as one.

        On a GPU they are captured in a graph, so that kernels of a few microseconds are not timed
        by what their launches take.
        """
        if not self.cuda:

            def calls() -> None:
                for i in range(times):
                    function(i)

            return calls
        with torch.cuda.device(self.device):
            # compiles, and allocates what libraries keep, outside the graph
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for i in range(min(times, 2)):
                    function(i)
            torch.cuda.current_stream().wait_stream(stream)
            self.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(times):
                    function(i)
        return graph.replay
