"""The processes of one launch, and what they agree on beside the training itself.

accelerate starts their group and passes objects between them. A process that ends closes its
connections, which ends the wait of the others with an error.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from fusedpo.checks import bad_value

T = TypeVar("T")

# as from a job scheduler, and from a terminal that is closed, where there is such a thing
TERMINATING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)

# that of torchrun and accelerate first, then those of MPI's launchers
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# one process may read, tokenize or compare for as long as it takes; one that is gone is noticed
_PATIENCE = datetime.timedelta(days=1)


class ToldByFirst(ValueError):
    """An error that ends the run on every process and is the first one's to tell the user."""


def count() -> int:
    """How many processes the launcher has started."""
    return _first_set(_WORLD, 1)


def is_first() -> bool:
    """Whether this process is the one that prints, draws and saves."""
    return _first_set(_RANK, 0) == 0


def _first_set(names: Sequence[str], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), otherwise)


def asked(name: str) -> bool:
    """Whether this variable of accelerate's is on."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def check_launcher() -> None:
    """Refuse ways to launch that train nothing here."""
    alone = not any(os.environ.get(name) for name in _RANK)
    if alone and asked("ACCELERATE_USE_CPU") and os.environ.get("MASTER_ADDR"):
        raise bad_value(
            "accelerate launch",
            "a launcher of several processes",
            "one process, as --cpu starts whatever --num_processes says",
            "start torchrun --nproc_per_node N -m fusedpo train --cpu ..., or accelerate launch "
            "--multi_gpu --num_processes N -m fusedpo train --cpu ...",
        )
    if asked("ACCELERATE_USE_DEEPSPEED"):
        raise bad_value(
            "accelerate launch",
            "DistributedDataParallel or FSDP",
            "DeepSpeed",
            "leave --use_deepspeed out, or use PreferenceTrainer in a script of your own",
        )


def connect(cpu: bool) -> None:
    """Start the group of several processes, if it is not there yet: on the CPU, if asked for."""
    if count() == 1:
        return
    from accelerate import PartialState

    try:
        check_launcher()
    except ValueError as error:
        raise error if is_first() else ToldByFirst(str(error)) from None
    state = PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=_PATIENCE)
    if state.num_processes != count():
        expected = "torchrun or accelerate launch, where processes train on accelerators"
        got = f"another one, of {count()} processes"
        raise bad_value("launcher", expected, got, "start with one of these, or train with --cpu")


def disconnect() -> None:
    """End the group, so that another run of this process may start one."""
    if torch.distributed.is_initialized():
        from accelerate.state import AcceleratorState

        # a DistributedDataParallel that outlives its group ends it while it holds Python's lock,
        # which a thread of gloo that is waited for may need
        gc.collect()
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def gather(value: T, cpu: bool = False) -> list[T]:
    """The values of all processes, which all call this."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    connect(cpu)
    values: list[T] = gather_object([value])
    return values


@contextlib.contextmanager
def together(cpu: bool = False) -> Iterator[None]:
    """What fails on one process fails on all of them, so that none waits for another.

    The first process raises its own error, or else that of another one. What is raised on the
    others says the same, and the first alone is to tell; a bug is raised where it is too.
    """
    if count() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = None if own is None else (is_for_the_user(own), str(own) or type(own).__name__)
    try:
        failures = {i: each for i, each in enumerate(gather(told, cpu)) if each is not None}
    except RuntimeError:
        # a process is gone, which is the lesser news
        if own is not None:
            raise own from None
        raise
    if not failures:
        return
    if own is not None and (is_first() or not is_for_the_user(own)):
        raise _agreed(own)
    rank, (for_the_user, message) = next(iter(failures.items()))
    if not for_the_user:
        raise RuntimeError(f"process {rank} failed: {message}") from own
    if not is_first():
        raise _agreed(ToldByFirst(message)) from own
    raise _agreed(ValueError(f"process {rank}: {message}"))


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes, on all of them."""
    made: list[Any] = [None]
    with together():
        made = [make() if is_first() else None]
    if count() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(made)
    value: T = made[0]
    return value


def _agreed(error: Exception) -> Exception:
    """An error that every process knows of: some raise, and the others end with them."""
    error.__dict__["agreed"] = True
    return error


def leave(error: Exception) -> None:
    """Wait for the others where all end with an error, so that each has its own exit code.

    A launcher terminates the rest as soon as one process fails.
    """
    if count() == 1 or not getattr(error, "agreed", False):
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(RuntimeError):
        gather(None)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Without signals: a launcher sends one when another process fails, whatever is under way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, *TERMINATING)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def is_for_the_user(error: Exception) -> bool:
    """Whether this package raised it on purpose; anything else is a bug and keeps its traceback."""
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("fusedpo")
