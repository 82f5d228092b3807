"""Self-augmented pairs inside trainers: in step, logged, saved, and resumed as if never stopped."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from transformers import TrainingArguments

from fusedpo.files import read_file, write_file
from fusedpo.losses import DPO, SimPO
from fusedpo.recipes.self_augmented import (
    SelfAugmented,
    Settings,
    mask_shared_prefix,
)
from fusedpo.trainers import self_augmented as module
from fusedpo.trainers.self_augmented import (
    STAND_IN,
    MaskSharedPrefix,
    SelfAugmentedCallback,
    SelfAugmentedDataset,
)
from fusedpo.trainers.transformers import PreferenceCollator, PreferenceTrainer

ROWS = tiny.token_rows(7)
SETTINGS = Settings(segment_length=2, buffer_size=9, temperature=2.0, max_length=48, seed=5)
OPTIONS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "dataloader_pin_memory": False,
}


def dataset(model: Any, settings: Settings = SETTINGS) -> SelfAugmentedDataset:
    tokenizer = tiny.tokenizer()
    return SelfAugmentedDataset(
        SelfAugmented(
            model,
            ROWS,
            settings,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Recorded(PreferenceTrainer):
    """Keeps what it trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[list[list[int]]] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.batches.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def trainer(
    folder: Path,
    loss: Any = None,
    follow: bool = True,
    callback: Any = None,
    settings: Settings = SETTINGS,
    **options: Any,
) -> Recorded:
    model = tiny.model()
    data = dataset(model, settings)
    found = Recorded(
        model,
        TrainingArguments(str(folder), **{**OPTIONS, "max_steps": 6, **options}),
        loss=loss or DPO(beta=0.5),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
    )
    reference = found.ref_model if follow else None
    found.add_callback(SelfAugmentedCallback(data, ref_model=reference, **(callback or {})))
    return found


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# the dataset


def test_a_loader_gets_a_batch_from_the_buffer():
    data = dataset(tiny.model())
    assert len(data) == len(ROWS)
    loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=list)
    sizes = [len(batch) for batch in loader]
    assert sizes == [3, 3, 1]
    assert data.source.batches == 3
    # new pairs are made of the rows that were asked for: each once
    assert data.source._totals["made"] == len(ROWS)
    row = data[4]
    assert {name: type(value) for name, value in row.items()} == dict.fromkeys(
        ("prompt_ids", "chosen_ids", "rejected_ids"), list
    )


def test_pairs_that_wait_are_of_their_own_batch_alone():
    """A run that asks for other rows than those that were saved makes new pairs, from then on."""
    data = dataset(tiny.model())
    data._again.extend(([i], [data.source.next_batch(1, [i])[0]]) for i in (3, 4))
    made = data.source._totals["made"]
    assert len(data.__getitems__([5])) == 1
    assert data.source._totals["made"] == made + 1 and not data._again
    assert [asked for asked, _ in data._ahead] == [[5]]
    data.__getitems__([4])
    assert data.source._totals["made"] == made + 2


def test_the_batch_that_was_trained_on_is_the_one_asked_for_first():
    data = dataset(tiny.model())
    for i in (1, 2, 3):
        data.__getitems__([i])
    data.trained()
    assert [asked for asked, _ in data._ahead] == [[2], [3]]


def test_loading_leaves_nothing_of_before(tmp_path):
    data = dataset(tiny.model())
    for i in (1, 2):
        data.__getitems__([i])
    data.save(tmp_path)
    data.__getitems__([3])
    data.load(tmp_path)
    data.load(tmp_path)
    assert [asked for asked, _ in data._again] == [[1], [2]] and not data._ahead


def test_an_argument_of_an_earlier_start_is_passed_over(tmp_path):
    """What is gone on from is the step that the trainer says it is at."""
    for name in ("here/checkpoint-4", "there/checkpoint-4", "there/checkpoint-2"):
        (tmp_path / name / "self_augmented").mkdir(parents=True)
    callback = SelfAugmentedCallback(dataset(tiny.model()))
    state = types.SimpleNamespace(global_step=4)
    for name, expected in (
        ("there/checkpoint-2", "here/checkpoint-4"),
        ("there/checkpoint-4", "there/checkpoint-4"),
    ):
        args = types.SimpleNamespace(
            output_dir=str(tmp_path / "here"), resume_from_checkpoint=str(tmp_path / name)
        )
        assert callback._checkpoint(args, state) == tmp_path / expected


def test_what_is_logged_is_a_mean_over_processes_and_a_count_their_sum(monkeypatch):
    def of_two_alike(totals: torch.Tensor) -> None:
        totals *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", of_two_alike)
    alone, both = (types.SimpleNamespace(world_size=n, device="cpu") for n in (1, 2))
    given = {"buffer/size": 8.0, "segment/eos_share": 0.25, "segment/identical": 3.0}
    assert module._over_processes(given, alone) == given
    assert module._over_processes(given, both) == {**given, "segment/identical": 6.0}


def test_workers_are_refused():
    loader = torch.utils.data.DataLoader(
        dataset(tiny.model()), batch_size=2, num_workers=1, collate_fn=list
    )
    with pytest.raises(ValueError, match="dataloader_num_workers: expected 0"):
        next(iter(loader))


@pytest.mark.holds(46)
def test_batches_ahead_come_again_and_then_new_ones(tmp_path):
    data = dataset(tiny.model())
    asked = [[0, 1], [2, 3], [4, 5], [6]]
    for indices in asked[:3]:
        data.__getitems__(indices)
    data.trained()
    data.save(tmp_path)
    again = dataset(tiny.model(1))
    again.load(tmp_path)
    ahead = [pairs for _, pairs in data._ahead]
    for indices, pairs in zip(asked[1:3], ahead, strict=True):
        rows = again.__getitems__(indices)
        assert [row["rejected_ids"] for row in rows] == [p["rejected_ids"].tolist() for p in pairs]
    assert again.source.batches == 3
    assert again.__getitems__(asked[3]) == data.__getitems__(asked[3])


@pytest.mark.holds(46)
def test_batches_that_wait_twice_keep_their_order(tmp_path):
    """Saved by a run that was resumed, with some of an earlier save still to be asked for."""
    data = dataset(tiny.model())
    asked = [[0, 1], [2, 3], [4, 5]]
    for indices in asked:
        data.__getitems__(indices)
    pairs = [pairs for _, pairs in data._ahead]
    data.save(tmp_path / "first")
    resumed = dataset(tiny.model(1))
    resumed.load(tmp_path / "first")
    resumed.__getitems__(asked[0])
    resumed.save(tmp_path / "second")
    again = dataset(tiny.model(2))
    again.load(tmp_path / "second")
    for indices, expected in zip(asked, pairs, strict=True):
        rows = again.__getitems__(indices)
        assert [r["rejected_ids"] for r in rows] == [p["rejected_ids"].tolist() for p in expected]
    assert again.source.batches == 3


@pytest.mark.holds(46)
def test_a_run_resumed_twice_is_the_one_that_never_stopped(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    options["settings"] = replace(SETTINGS, ref_every=2)
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    for stop in (2, 3):
        shutil.copytree(
            tmp_path / ("whole" if stop == 2 else "first") / f"checkpoint-{stop}",
            tmp_path / ("first" if stop == 2 else "second") / f"checkpoint-{stop}",
        )
        resumed = trainer(tmp_path / ("first" if stop == 2 else "second"), **options)
        resumed.train(resume_from_checkpoint=True)
    assert resumed.batches == whole.batches[3:]
    for ours, theirs in ((resumed.model, whole.model), (resumed.ref_model, whole.ref_model)):
        assert torch.equal(weights(ours), weights(theirs))


def test_batches_ahead_are_of_the_rows_that_were_asked_for(tmp_path):
    """A run that goes on with another batch size makes its own."""
    data = dataset(tiny.model())
    data.__getitems__([0, 1])
    data.save(tmp_path)
    data.restart()
    data.load(tmp_path)
    assert len(data.__getitems__([0, 1, 2])) == 3
    assert data.source.batches == 2
    data.__getitems__([0, 1])
    assert data.source.batches == 3


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_files_of_two_saves_are_refused(tmp_path):
    data = dataset(tiny.model())
    data.save(tmp_path)
    data.__getitems__([0, 1])
    data.source.save(tmp_path)
    with pytest.raises(ValueError, match=r"expected files of one save, got one after 0 .* 1; take"):
        data.load(tmp_path)
    data.save(tmp_path)
    dataset(tiny.model()).source.save(tmp_path)
    with pytest.raises(ValueError, match=r"expected files of one save, got one after 1 .* 0; take"):
        data.load(tmp_path)


def test_pairs_that_are_not_those_asked_for_are_refused(tmp_path):
    data = dataset(tiny.model())
    data.__getitems__([0, 1])
    data.save(tmp_path)
    path = tmp_path / "ahead-0.safetensors"
    tensors, meta = read_file(path)
    write_file(path, tensors, {**meta, "asked": [[0, 1, 2]]})
    before = [pairs for _, pairs in data._ahead]
    with pytest.raises(ValueError) as error:
        data.load(tmp_path)
    assert str(error.value) == (
        f"{path}: expected what is saved under this name, got other pairs than those that were "
        "asked for; give the folder as it was saved"
    )
    assert [pairs for _, pairs in data._ahead] == before


def test_a_step_that_nothing_was_asked_for_takes_nothing():
    """As after a restart; what is asked for next is not affected."""
    data, other = dataset(tiny.model()), dataset(tiny.model())
    data.trained()
    assert data.__getitems__([0, 1]) == other.__getitems__([0, 1])
    assert len(data._ahead) == 1
    data.trained()
    data.trained()
    assert len(data._ahead) == 0
    assert data.__getitems__([2]) == other.__getitems__([2])


def test_transformers_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("without_transformers", module.__file__)
    with pytest.raises(ImportError) as error:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(error.value) == (
        "fusedpo.trainers.self_augmented needs transformers: pip install 'fusedpo[demo]'"
    )


# the collator


def test_collator_masks_the_shared_prefix():
    rows = [
        {"prompt_ids": [1, 5], "chosen_ids": [6, 7, 8], "rejected_ids": [6, 9]},
        {"prompt_ids": [1], "chosen_ids": [5, 6], "rejected_ids": [5, 7]},
    ]
    plain = PreferenceCollator(0)
    batch, masked = plain(rows), MaskSharedPrefix(plain)(rows)
    expected = mask_shared_prefix(batch["input_ids"], batch["labels"], batch["attention_mask"])
    assert torch.equal(masked["labels"], expected)
    scored = [(t["labels"] != -100).sum(1).tolist() for t in (batch, masked)]
    assert scored == [[3, 2, 2, 2], [2, 1, 1, 1]]
    assert torch.equal(masked["input_ids"], batch["input_ids"])


# training


@pytest.mark.parametrize("accumulate", [1, 3])
def test_average_follows_once_an_optimizer_step_and_the_reference_at_its_own(tmp_path, accumulate):
    settings = replace(SETTINGS, ref_every=3)
    subject = trainer(
        tmp_path, settings=settings, gradient_accumulation_steps=accumulate, max_steps=4
    )
    seen, behind = [weights(subject.model)], [weights(subject.ref_model)]
    record = SelfAugmentedCallback.on_step_end

    class After(SelfAugmentedCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            record(self, args, state, control, **kwargs)
            seen.append(weights(kwargs["model"]))
            behind.append(weights(self.ref_model))

    subject.pop_callback(SelfAugmentedCallback)
    data = subject.train_dataset
    subject.add_callback(After(data, ref_model=subject.ref_model))
    subject.train()
    expected = [seen[0]]
    for later in seen[1:]:
        expected.append(0.5 * expected[-1] + 0.5 * later)
    average = weights(data.source.average.module)
    assert data.source.average.updates == data.source.steps == 4
    assert (average - expected[4]).abs().max() <= 1e-6 * average.abs().max()
    assert torch.equal(behind[0], seen[0])
    assert torch.equal(behind[1], behind[0]) and torch.equal(behind[2], behind[0])
    assert (behind[3] - expected[3]).abs().max() <= 1e-6 * average.abs().max()
    assert torch.equal(behind[4], behind[3]) and not torch.equal(behind[4], average)


def test_a_step_that_a_gradient_scaler_skips_is_none_of_the_average(tmp_path, monkeypatch):
    steps = []
    step = AcceleratedOptimizer.step

    def overflowing(self: Any, closure: Any = None) -> None:
        steps.append(None)
        self._is_overflow = len(steps) in (1, 3)
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", overflowing)
    subject = trainer(tmp_path, settings=replace(SETTINGS, ref_every=2), max_steps=5)
    start, source = weights(subject.model), subject.train_dataset.source
    subject.train()
    assert len(steps) == subject.state.global_step == 5
    assert source.steps == source.average.updates == 3
    # all that was asked for was trained on, but for what is fetched ahead
    assert len(subject.train_dataset._ahead) <= 1
    assert not torch.equal(weights(subject.ref_model), start)


@pytest.mark.parametrize("mode", ["ema", "policy", "fixed"])
def test_a_reference_of_its_own_becomes_the_policy_when_training_starts(tmp_path, mode):
    """But for one that is to stay as it was given."""
    subject = trainer(tmp_path, settings=replace(SETTINGS, ref_mode=mode), max_steps=1)
    with torch.no_grad():
        subject.ref_model.lm_head.weight += 1
    own, start = weights(subject.ref_model), weights(subject.model)
    subject.train()
    assert torch.equal(weights(subject.ref_model), own if mode == "fixed" else start)


def test_settings_of_a_reference_that_there_is_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ref_every: expected 108 without a reference"):
        trainer(tmp_path, settings=replace(SETTINGS, ref_every=2), follow=False)


@pytest.mark.parametrize(("process", "rank"), [(0, 1), (1, 0)])
def test_a_source_of_another_process_is_refused(tmp_path, process, rank):
    subject = trainer(tmp_path)
    subject.train_dataset.source.rank = rank
    args = types.SimpleNamespace(process_index=process)
    (callback,) = (
        each
        for each in subject.callback_handler.callbacks
        if isinstance(each, SelfAugmentedCallback)
    )
    with pytest.raises(ValueError) as error:
        callback.on_train_begin(args, subject.state, subject.control, model=subject.model)
    assert str(error.value) == (
        f"rank: expected SelfAugmented(..., rank={process}) on this process, got {rank}; "
        "give args.process_index"
    )


def test_the_reference_stays_unless_asked(tmp_path):
    subject = trainer(tmp_path, follow=False, max_steps=2)
    before = weights(subject.ref_model)
    subject.train()
    assert torch.equal(weights(subject.ref_model), before)


def test_policy_learns_and_statistics_are_logged(tmp_path):
    subject = trainer(tmp_path, loss=SimPO(), follow=False, max_steps=30)
    subject.train()
    logs = [entry for entry in subject.state.log_history if "loss" in entry]
    assert len(logs) == 30
    first, last = (sum(e["loss"] for e in part) for part in (logs[:5], logs[-5:]))
    assert last < first
    assert logs[0]["buffer/size"] == 2.0 + 2.0  # one batch is fetched ahead
    assert logs[-1]["buffer/size"] == SETTINGS.buffer_size
    for name in ("buffer/reuse", "segment/eos_share", "segment/start_share", "segment/identical"):
        assert all(name in entry for entry in logs)


def test_statistics_are_logged_with_training_alone(tmp_path):
    subject = trainer(tmp_path, loss=SimPO(), follow=False, max_steps=2)
    subject.train()
    subject.evaluate(ROWS)
    *logged, of_evaluation = (set(entry) for entry in subject.state.log_history)
    assert "eval_loss" in of_evaluation and "buffer/size" not in of_evaluation
    assert sum("buffer/size" in names for names in logged) == 2


@pytest.mark.holds(46)
@pytest.mark.parametrize(
    ("accumulate", "stop"),
    [(1, 2), (1, 4), (1, 5), (2, 1), (2, 2), (2, 3)],
)
def test_a_resumed_run_is_the_one_that_never_stopped(tmp_path, accumulate, stop):
    """Stopped within an epoch of four batches, at its end, and in the next one."""
    options = {
        "settings": replace(SETTINGS, ref_every=3),
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "steps",
        "save_steps": stop,
    }
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert len(whole.batches) > len(resumed.batches) > 0
    assert resumed.batches == whole.batches[-len(resumed.batches) :]
    for ours, theirs in (
        (resumed.model, whole.model),
        (resumed.ref_model, whole.ref_model),
        (
            resumed.train_dataset.source.average.module,
            whole.train_dataset.source.average.module,
        ),
    ):
        assert torch.equal(weights(ours), weights(theirs))
    assert resumed.train_dataset.source.statistics() == whole.train_dataset.source.statistics()


def saved(folder: Path, **options: Any) -> Path:
    trainer(folder, max_steps=2, save_strategy="steps", save_steps=2, **options).train()
    return folder / "checkpoint-2"


@pytest.mark.fault(68)
def test_a_checkpoint_that_was_moved_is_named(tmp_path):
    moved = shutil.move(saved(tmp_path / "first"), tmp_path / "best")
    options = {"max_steps": 3}
    with pytest.raises(
        FileNotFoundError, match=r"give SelfAugmentedCallback\(resume_from=\.\.\.\)"
    ):
        trainer(tmp_path / "second", **options).train(resume_from_checkpoint=str(moved))
    named = trainer(tmp_path / "second", callback={"resume_from": moved}, **options)
    named.train(resume_from_checkpoint=str(moved))
    assert named.train_dataset.source.average.updates == 3


def test_a_checkpoint_elsewhere_is_found_by_the_arguments(tmp_path):
    first = saved(tmp_path / "first")
    subject = trainer(tmp_path / "second", max_steps=3, resume_from_checkpoint=str(first))
    subject.train(resume_from_checkpoint=str(first))
    assert subject.train_dataset.source.average.updates == 3


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_a_damaged_file_stops_a_resumed_run(tmp_path):
    first = saved(tmp_path)
    path = first / "self_augmented" / "self_augmented-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"self_augmented-0.safetensors: expected a complete file"):
        trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=str(first))


def test_training_twice_starts_with_nothing_ahead(tmp_path):
    subject = trainer(tmp_path, max_steps=2)
    for _ in range(2):
        subject.train()
        assert len(subject.train_dataset._ahead) == 1
        # the reference is renewed at steps of the trainer's, which begin anew
        assert subject.train_dataset.source.steps == 2


def test_trl_trains_on_it(tmp_path):
    trl = pytest.importorskip("trl")
    model, reference = tiny.model(), tiny.model()
    data = dataset(model, replace(SETTINGS, ref_every=2))
    subject = trl.DPOTrainer(
        model,
        reference,
        trl.DPOConfig(str(tmp_path), **{**OPTIONS, "max_steps": 3, "beta": 0.5, "bf16": False}),
        train_dataset=Dataset.from_list(STAND_IN),
        processing_class=tiny.tokenizer(),
    )
    assert data.source.batches == 0
    subject.train_dataset = data
    subject.add_callback(SelfAugmentedCallback(data, ref_model=reference))
    subject.train()
    assert data.source.average.updates == 3
    assert data.source.batches == 4
    # of the second step, and the average has moved on
    assert not torch.equal(weights(reference), weights(tiny.model()))
    assert not torch.equal(weights(reference), weights(data.source.average.module))
    assert "buffer/reuse" in subject.state.log_history[0]
