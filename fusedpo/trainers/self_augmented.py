"""Self-Augmented Preference Optimization inside ``transformers.Trainer`` and what is built on it.

    source = SelfAugmented(
        model, rows, eos_token_id=2, pad_token_id=0, rank=args.process_index
    )
    dataset = SelfAugmentedDataset(source)
    trainer = PreferenceTrainer(
        model, args, loss=DPO(), train_dataset=dataset, processing_class=tokenizer
    )
    trainer.add_callback(SelfAugmentedCallback(dataset, ref_model=trainer.ref_model))
    trainer.train()

TRL tokenizes its dataset when a trainer is made, and wants one of ``datasets``; it gets one that
stands in, and the true one afterwards:

    trainer = DPOTrainer(model, ref_model, args, train_dataset=Dataset.from_list(STAND_IN), ...)
    trainer.train_dataset = dataset
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from fusedpo.checks import bad_value
from fusedpo.files import read_file, understood, write_file
from fusedpo.recipes.self_augmented import PairRow, SelfAugmented, mask_shared_prefix
from fusedpo.recipes.self_augmented.buffer import pack_rows, unpack_rows

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "fusedpo.trainers.self_augmented needs transformers: pip install 'fusedpo[demo]'"
    ) from error

# is not trained on
STAND_IN = [{"prompt": "a", "chosen": " b", "rejected": " c"}]


class SelfAugmentedDataset(Dataset[dict[str, Any]]):
    """As many rows as the source has; which pairs they are is decided when they are asked for.

    A data loader asks for a batch at a time: the batch's rows are what new pairs are made of, and
    as many pairs come back from the buffer. Rows hold lists of ints, which every collator takes.

    Batches that were asked for and not yet trained on, such as the one that a loader fetches
    ahead, are saved with the rest, so that a resumed run trains on them.

    Args:
        source: of the model that is trained.
    """

    def __init__(self, source: SelfAugmented) -> None:
        self.source = source
        self._ahead: deque[tuple[list[int], list[PairRow]]] = deque()
        self._again: deque[tuple[list[int], list[PairRow]]] = deque()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A batch; what a data loader calls."""
        if get_worker_info() is not None:
            raise bad_value(
                "dataloader_num_workers",
                "0, as pairs are made by the model that is trained, in its own process",
                "a worker process",
            )
        asked = [int(index) for index in indices]
        if self._again and self._again[0][0] == asked:
            _, pairs = self._again.popleft()
        else:
            # other batches than those that were saved: a run with another batch size
            self._again.clear()
            pairs = self.source.next_batch(len(asked), asked)
        self._ahead.append((asked, pairs))
        return [_plain(pair) for pair in pairs]

    def trained(self) -> None:
        """The oldest batch that was asked for has been trained on."""
        if self._ahead:
            self._ahead.popleft()

    def restart(self) -> None:
        """Nothing that was asked for will be trained on."""
        self._ahead.clear()
        self._again.clear()

    def save(self, folder: Path | str) -> None:
        """Write the source's file, and ``ahead-RANK.safetensors``."""
        self.source.save(folder)
        kept = [*self._ahead, *self._again]
        tensors, meta = pack_rows([pair for _, pairs in kept for pair in pairs], "ahead.")
        meta |= {"asked": [asked for asked, _ in kept], "batches": self.source.batches}
        write_file(self._file(folder), tensors, meta)

    def load(self, folder: Path | str) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: as ``SelfAugmented.load``.
        """
        path = self._file(folder)
        tensors, meta = read_file(path)
        with understood(path):
            batches, lists = meta["batches"], [[int(i) for i in asked] for asked in meta["asked"]]
            rows = unpack_rows(tensors, meta, "ahead.")
            if len(rows) != sum(map(len, lists)):
                raise ValueError("other pairs than those that were asked for")
        of_source, restore = self.source._saved(folder)
        if batches != of_source:
            got = f"one after {batches} batches beside one after {of_source}"
            raise bad_value(str(path), "files of one save", got, "take another checkpoint")
        restore()
        self.restart()
        pairs = iter(rows)
        self._again.extend((asked, [next(pairs) for _ in asked]) for asked in lists)

    def _file(self, folder: Path | str) -> Path:
        return Path(folder, f"ahead-{self.source.rank}.safetensors")


def _plain(pair: PairRow) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt_ids": pair["prompt_ids"].tolist(),
        "chosen_ids": pair["chosen_ids"].tolist(),
        "rejected_ids": pair["rejected_ids"].tolist(),
    }
    return {**row, "inputs": pair["inputs"]} if pair["inputs"] else row


@dataclass(frozen=True)
class MaskSharedPrefix:
    """A collator whose labels leave out what chosen and rejected begin with.

    For losses and models that ``fusedpo.recipes.self_augmented.mask_shared_prefix`` names.

    Attributes:
        collator: makes input_ids, attention_mask and labels [2 P, T], chosen rows first.
    """

    collator: Callable[[Sequence[Any]], dict[str, Tensor]]

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        batch = self.collator(rows)
        labels = mask_shared_prefix(batch["input_ids"], batch["labels"], batch["attention_mask"])
        return {**batch, "labels": labels}


class SelfAugmentedCallback(TrainerCallback):
    """Keeps a ``SelfAugmentedDataset`` in step with a Trainer.

    Tells the source of every optimizer step but those that a gradient scaler skips: there it
    updates the average and renews the reference as its settings say; saves into every checkpoint
    folder what a resumed run needs, the reference with it; finds it there again; and adds
    ``source.statistics()`` to what is logged.
    The statistics reach the log history, and callbacks that were added after this one.

    On several processes the source of each has its ``rank``: every process makes and keeps pairs of
    the rows that its own batches have, and its part of a checkpoint beside those of the others. The
    average and the reference are the same everywhere, as parameters are; rank 0 alone saves them.
    What is logged is the mean over processes, and for counts of segments the sum. Weights have to
    be whole.

    Args:
        dataset: what the trainer trains on.
        ref_model: the reference, to be renewed as the source's settings say: when training
            starts, and at steps that are multiples of ``ref_every``. Not given, it stays.
        resume_from: the checkpoint folder that training resumes from, where it is neither in
            ``args.output_dir`` nor named by ``args.resume_from_checkpoint``.

    Raises:
        ValueError: for a source with settings of a reference, if none is given.
    """

    folder = "self_augmented"

    def __init__(
        self,
        dataset: SelfAugmentedDataset,
        *,
        ref_model: Any = None,
        resume_from: Path | str | None = None,
    ) -> None:
        dataset.source.settings.check_model(ref_model)
        self.dataset = dataset
        self.ref_model = ref_model
        self.resume_from = resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        source = self.dataset.source
        if source.rank != args.process_index:
            raise bad_value(
                "rank",
                f"SelfAugmented(..., rank={args.process_index}) on this process",
                str(source.rank),
                "give args.process_index",
            )
        # a trainer moves its model when it is made
        source.average.to(next(kwargs["model"].parameters()).device)
        self.dataset.restart()
        if state.global_step:
            source.ref_model = self.ref_model
            self.dataset.load(self._checkpoint(args, state) / self.folder)
        else:
            source.begin(kwargs["model"], self.ref_model)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.trained()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.trained()
        # a gradient scaler has left the weights as they were
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.dataset.source.after_step(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.save(Path(args.output_dir, _name(state)) / self.folder)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        found = _over_processes(self.dataset.source.statistics(), args)
        logs.update(found)
        # a copy of the logs is there already
        state.log_history[-1].update(found)

    def _checkpoint(self, args: Any, state: Any) -> Path:
        named = args.resume_from_checkpoint
        if self.resume_from is not None:
            return Path(self.resume_from)
        found = [Path(args.output_dir, _name(state))]
        # an argument may be left over from an earlier start, of another step
        if isinstance(named, str) and Path(named).name == _name(state):
            found.insert(0, Path(named))
        for folder in found:
            if (folder / self.folder).is_dir():
                return folder
        raise FileNotFoundError(
            f"{self.folder}: expected this folder in the checkpoint of step {state.global_step}, "
            f"got none in {', '.join(map(str, found))}; give SelfAugmentedCallback(resume_from=...)"
        )


def _over_processes(statistics: dict[str, float], args: Any) -> dict[str, float]:
    """Means, and the sum of what is counted."""
    if args.world_size == 1:
        return statistics
    totals = torch.tensor([*statistics.values()], dtype=torch.float32, device=args.device)
    torch.distributed.all_reduce(totals)
    return {
        name: total if name == "segment/identical" else total / args.world_size
        for name, total in zip(statistics, totals.tolist(), strict=True)
    }


def _name(state: Any) -> str:
    return f"checkpoint-{state.global_step}"
