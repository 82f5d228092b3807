"""A run that goes on from a checkpoint is the run that wrote it: what a checkpoint says of its run.

Beside the weights, ``fusedpo_run.json`` has what a run depends on and no checkpoint restores: the
loss and its options, the rows, and weights that are not trained. Another one would be trained on
without a word. What may be changed on purpose is not in it: steps, learning rates, batch sizes,
precision, budgets, logging.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.files import understood, write_json

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:  # a mixin is a base of none but Trainers
    _Base = object

NAME = "fusedpo_run.json"

# of rows, and of a weight's numbers: evenly spread over all of them
_ROWS, _NUMBERS = 2_000, 64


def of_options(name: str, value: Any) -> dict[str, Any]:
    """The name of a dataclass, such as a loss, and its options by their names."""
    found = {name: type(value).__name__}
    for field in fields(value) if is_dataclass(value) else ():
        option = getattr(value, field.name)
        if is_dataclass(option):
            # as the loss within a loss
            within = of_options(field.name, option)
            found |= {n if n == field.name else f"{field.name}.{n}": o for n, o in within.items()}
        else:
            found[field.name] = as_told(option)
    return found


def as_told(option: Any) -> Any:
    """An option as JSON has it, to be compared with what was read again."""
    return option if isinstance(option, (str, int, float, type(None))) else repr(option)


def of_rows(rows: Any) -> str:
    """How many rows there are, and a checksum of their texts, ids and whole numbers.

    Not of fractions, whose last digits may be another machine's; and not of rows that are made as
    they are asked for.
    """
    if not hasattr(rows, "__len__"):
        return "a stream"
    told = f"{len(rows)} rows"
    # of datasets, as they are kept: no image is decoded, and no transform is applied
    of_table = hasattr(rows, "with_format")
    if of_table:
        rows = rows.with_format("arrow")
    elif not isinstance(rows, Sequence):
        return told
    value = 0
    for i in range(0, len(rows), max(1, len(rows) // _ROWS)):
        for part in _parts(rows[i].to_pylist() if of_table else [rows[i]]):
            value = zlib.crc32(part, value)
    return f"{told} of checksum {value:08x}"


def _parts(value: Any) -> Iterator[bytes]:
    """What tells a value from others."""
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield str(name).encode()
            yield from _parts(value[name])
    elif isinstance(value, str):
        yield value.encode(errors="surrogatepass")
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, np.ndarray):
        yield from _parts(value.tolist())
    elif isinstance(value, Sequence):
        yield f"[{len(value)}]".encode()
        if set(map(type, value)) == {int}:
            yield repr([*value]).encode()
        else:
            for each in value:
                yield from _parts(each)
    elif isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer()):
        yield b"%d" % value


def of_model(model: Any, reference: Any, *, sharded: bool) -> str:
    """A model's class and size, and a checksum of the weights that are not trained: its own, and
    its reference's. Those that are trained are in the checkpoint."""
    kind = type(model).__name__
    if sharded:
        return kind
    value = 0
    for subject in (model, reference):
        for name, weight in () if subject is None else subject.named_parameters():
            value = zlib.crc32(f"{name}{list(weight.shape)}".encode(), value)
            if (subject is model and weight.requires_grad) or not _is_whole(weight):
                continue
            flat = weight.detach().reshape(-1)
            spread = flat[:: max(1, flat.numel() // _NUMBERS)].double().cpu()
            value = zlib.crc32(spread.numpy().tobytes(), value)
    size = sum(weight.numel() for weight in model.parameters())
    return f"{kind} of {size} parameters, checksum {value:08x}"


def of_files(folder: Path) -> str:
    """A checksum of the weights in a model's or an adapter's folder."""
    value = 0
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        size = path.stat().st_size
        with path.open("rb") as file:
            for i in range(_NUMBERS):
                file.seek(i * size // _NUMBERS)
                value = zlib.crc32(file.read(_NUMBERS), value)
        value = zlib.crc32(b"%d" % size, value)
    return f"weights of checksum {value:08x}"


def _is_whole(weight: Tensor) -> bool:
    """Whether its numbers are all on this process."""
    return not weight.is_meta and not hasattr(weight, "full_tensor")


def check(checkpoint: Path, part: str, own: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run.

    Args:
        checkpoint: its folder; one that does not say what run it is of, as before version 0.2.0 or
            of another program, is taken as it is.
        part: of the record.
        own: of the run that is to go on, by the names of options. Of two texts the first one is
            compared, and the second says where it is from.

    Raises:
        ValueError: naming the option, its value there and here.
    """
    path = checkpoint / NAME
    if not path.is_file():
        return
    with understood(path):
        of_run = dict(json.loads(path.read_text(encoding="utf-8")).get(part, {}))
    for name, value in own.items():
        # another version of the library may have other options
        if name in of_run and _compared(of_run[name]) != _compared(value):
            raise bad_value(
                name,
                f"{_shown(of_run[name])}, as in the run that wrote {checkpoint}",
                _shown(value),
                f"go on with the same, or start anew in another folder; what is meant to go on "
                f"all the same is changed in {path}",
            )


def _compared(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{value[0]} ({value[1]})"
    return value if isinstance(value, str) else repr(value)


class OneRun(_Base):
    """What a subclass of ``transformers.Trainer`` needs to go on with its own runs only."""

    # what checkpoints are to say beside what the trainer knows
    job_of_run: Mapping[str, Any] = MappingProxyType({})
    _model_of_run: str | None = None

    def _options_of_run(self) -> dict[str, Any]:
        """The loss and its options."""
        raise NotImplementedError

    def _of_run(self) -> dict[str, Any]:
        if self._model_of_run is None:  # once: a reference may be renewed later
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            reference = getattr(self, "ref_model", None)
            self._model_of_run = of_model(self.model, reference, sharded=sharded)
        rows = of_rows(self.train_dataset)
        return {**self._options_of_run(), "model": self._model_of_run, "train_dataset": rows}

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As of Trainer; a checkpoint of another loss, other rows or another model is refused."""
        from accelerate.utils import broadcast_object_list
        from transformers.trainer_utils import get_last_checkpoint

        found = resume_from_checkpoint
        if found is True:
            folder: Any = self.args.output_dir
            # of no folder Trainer says so itself
            there = Path(folder).is_dir()
            found = get_last_checkpoint(folder) if there else None  # type: ignore[no-untyped-call]
        self._own_run = self._of_run()
        wrong: list[str | None] = [None]
        if found and self.args.process_index == 0:
            try:
                check(Path(found), "trainer", self._own_run)
            except ValueError as error:
                wrong = [str(error)]
        if found and self.args.world_size > 1:
            broadcast_object_list(wrong)
        if wrong[0] is not None:
            raise ValueError(wrong[0])
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Also what run it is of; the trainer's state is written last."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            write_json(folder / NAME, {"trainer": self._own_run, "job": dict(self.job_of_run)})
        super()._save_checkpoint(model, trial)
