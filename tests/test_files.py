"""Files are data: never run, whole or as they were before, and named where they are damaged.

What a single kind of file holds is tested where it is written; here is what every kind is to stand.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import tiny
import torch
from repository import ROOT, files
from transformers import TrainingArguments

from fusedpo.benchmarks import measure
from fusedpo.benchmarks import readme as results
from fusedpo.cli import main
from fusedpo.files import read_file, write_file, write_json
from fusedpo.losses import SoftSequence
from fusedpo.model_shapes import read_model
from fusedpo.recipes.self_augmented import (
    PairRow,
    PolicyAverage,
    ReplayBuffer,
    SelfAugmented,
    Settings,
)
from fusedpo.trainers import output
from fusedpo.trainers.checkpoints import to_resume
from fusedpo.trainers.groups import GroupTrainer
from fusedpo.trainers.methods.self_augmented import SelfAugmented as ByItself
from fusedpo.trainers.rows import check_row, load
from fusedpo.trainers.self_augmented import SelfAugmentedDataset

# what no program of this repository does

MODULES = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
BUILT_IN = ("eval", "exec", "compile", "__import__")


def runs_files(source: str) -> list[str]:
    """What in a program may run what is in a file, or what somebody else has put on the Hub."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if str(node.module).partition(".")[0] in MODULES else []
        elif isinstance(node, ast.Call) and not _is_safe(node):
            found.append(ast.unparse(node.func))
    return found


def _is_safe(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    if name in BUILT_IN or given.get("trust_remote_code", False) is not False:
        return False
    if name == "PeftModel.from_pretrained":
        return True  # tensors alone: it has no code of a model, and reads with weights_only
    if name.endswith(".from_pretrained"):
        # transformers asks the user if it is not told
        return "trust_remote_code" in given
    if name == "torch.load":
        return given.get("weights_only") is True
    if name.startswith("yaml."):
        return name == "yaml.safe_load"
    if name == "os.system" or given.get("shell", False) is not False:
        return False
    return given.get("allow_pickle", False) is False


@pytest.mark.holds(46)
def test_no_program_runs_what_a_file_holds() -> None:
    own = [p for p in files() if p.suffix == ".py" and p.parts[0] not in ("tests", "docs")]
    assert len(own) > 50 and {"fusedpo", "benchmarks", "kernels"} <= {p.parts[0] for p in own}
    found = {str(p): runs_files((ROOT / p).read_text(encoding="utf-8")) for p in own}
    assert {path: names for path, names in found.items() if names} == {}


WRONG = {
    "pickle": "import pickle",
    "a part of pickle": "def f():\n    from pickle import loads",
    "joblib": "import numpy, joblib.hashing",
    "torch.load": "torch.load(path)",
    "torch.load of anything": "torch.load(path, weights_only=False)",
    "torch.load as told": "torch.load(path, weights_only=safe)",
    "np.load": "np.load(path, allow_pickle=True)",
    "yaml": "yaml.load(text, Loader)",
    "eval": "x = [eval(text) for text in lines]",
    "exec": "exec(path.read_text(), {})",
    "remote code": "load_dataset(name, trust_remote_code=True)",
    "remote code as told": "load_dataset(name, trust_remote_code=job.trust)",
    "remote code if somebody says yes": "AutoModel.from_pretrained(name)",
    "a shell": "subprocess.run(f'cat {path}', shell=True)",
}


@pytest.mark.mutant
@pytest.mark.holds(46)
@pytest.mark.parametrize("name", WRONG)
def test_a_program_that_does_is_found(name: str) -> None:
    assert len(runs_files(WRONG[name])) == 1


def test_a_program_that_does_not_is_not() -> None:
    assert not runs_files(
        "import json, re\nmodel.eval()\nre.compile('a')\nnp.load(path)\njson.load(file)\n"
        "torch.load(path, weights_only=True)\nAutoModel.from_pretrained(n, trust_remote_code=False)"
    )


# every file that is read


@dataclass
class Kind:
    """A kind of file.

    Attributes:
        name: of the file in its folder.
        write: a good one.
        read: what was read; the damaged file's name is in the error.
        checked: whether a changed byte is noticed; a format of others may have no checksum.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    checked: bool = True


def buffer(pairs: int = 0) -> ReplayBuffer:
    found = ReplayBuffer(4)
    for number in range(pairs):
        ids = torch.arange(number + 1, dtype=torch.int32).numpy()
        found.push(PairRow(prompt_ids=ids, chosen_ids=ids, rejected_ids=ids, inputs={}))
    return found


def read_buffer(folder: Path) -> Any:
    found = buffer(1)
    before = repr(vars(found))
    try:
        found.load(folder)
    except ValueError:
        assert repr(vars(found)) == before, "half of a file was taken"
        raise
    return repr(found.rows), found.counts


def average() -> PolicyAverage:
    torch.manual_seed(0)
    return PolicyAverage(torch.nn.Linear(3, 2))


def read_average(folder: Path) -> Any:
    found = average()
    found.load(folder)
    return found.updates, found.module.weight.tolist()


def pairs() -> SelfAugmentedDataset:
    settings = Settings(segment_length=2, buffer_size=4, temperature=2.0, max_length=48)
    ids = {"eos_token_id": tiny.tokenizer().eos_token_id, "pad_token_id": 0}
    ids["ref_model"] = tiny.model(2)
    return SelfAugmentedDataset(SelfAugmented(tiny.model(), tiny.token_rows(4), settings, **ids))


def save_pairs(folder: Path) -> None:
    found = pairs()
    found.__getitems__([0, 1])
    found.source.after_step(tiny.model(1))
    found.save(folder)


def all_of(data: SelfAugmentedDataset) -> str:
    source = data.source
    state = source.buffer.rows, source.buffer.counts, source._totals, source._rng.bit_generator
    models = (source.average.module, source.ref_model)
    weights = [p.sum().item() for model in models for p in model.parameters()]
    counts = source.average.updates, source.steps
    return repr((*state[:3], state[3].state, weights, *counts, data._again))


def read_pairs(folder: Path) -> Any:
    found = pairs()
    before = all_of(found)
    try:
        found.load(folder)
    except ValueError:
        assert all_of(found) == before, "half of a save was taken"
        raise
    return all_of(found)


def write_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny.text_rows(3))))


def read_rows(folder: Path) -> Any:
    splits = load(str(folder / "rows.jsonl"))
    return [check_row(row, splits.where(i)) for i, row in enumerate(splits.train)]


def read_saved(folder: Path) -> Any:
    return [check_row(row, str(folder)) for row in load(str(folder)).train]


KINDS = {
    "buffer": Kind("buffer.safetensors", buffer(3).save, read_buffer),
    "average": Kind("average.safetensors", lambda folder: average().save(folder), read_average),
    "pairs": Kind("self_augmented-0.safetensors", save_pairs, read_pairs),
    "batches ahead": Kind("ahead-0.safetensors", save_pairs, read_pairs),
    "rows": Kind("rows.jsonl", write_rows, read_rows, checked=False),
    "a saved dataset": Kind(
        "data-00000-of-00001.arrow",
        lambda folder: datasets.Dataset.from_list(tiny.text_rows(3)).save_to_disk(str(folder)),
        read_saved,
        checked=False,
    ),
    "a model's shape": Kind(
        "config.json",
        lambda folder: tiny.model().config.save_pretrained(folder),
        lambda folder: read_model(str(folder)),
        checked=False,
    ),
}


class Runs:
    """Makes a file where a pickle of it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def foreign(path: Path, good: bytes, mark: Path) -> dict[str, bytes]:
    """Other content, by what it is."""
    torch.save(Runs(mark), path)
    zipped = path.read_bytes()
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    of_others = path.read_bytes()
    write_file(path, {"tokens": torch.ones(3)}, {"about": "something else"})
    return {
        "empty": b"",
        "cut off at once": good[:5],
        "cut in the middle": good[: len(good) // 2],
        "cut off at the end": good[:-12],
        "zeros": bytes(len(good)),
        "a pickle": pickle.dumps(Runs(mark)),
        "a pickle of torch": zipped,
        "safetensors of others": of_others,
        "another file of fusedpo": path.read_bytes(),
        "a list": b"[1, 2, 3]",
        "a number": b"7",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + good[8:],
        "a header of 90 MB": struct.pack("<Q", 90_000_000) + good[8:],
        "a tensor of 2^50 bytes": _declared(1 << 50),
        "tensors that overlap": _declared(-4),
    }


def _declared(end: int) -> bytes:
    """Safetensors with one tensor that is to end there."""
    entry = {"dtype": "I64", "shape": [abs(end) // 8], "data_offsets": [0, end]}
    header = json.dumps({"buffer.tokens": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


@pytest.mark.fault(68)
@pytest.mark.holds(46)
@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_damaged_or_foreign_is_named_and_left(name: str, tmp_path: Path) -> None:
    kind, mark = KINDS[name], tmp_path / "mark"
    folder = tmp_path / "files"
    folder.mkdir()
    kind.write(folder)
    path = folder / kind.name
    good, expected = path.read_bytes(), kind.read(folder)
    damaged = foreign(tmp_path / "other", good, mark)
    if kind.checked:
        for place in range(0, len(good), max(1, len(good) // 9)):
            damaged[f"byte {place}"] = good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :]
    for what, content in damaged.items():
        path.write_bytes(content)
        try:
            found = kind.read(folder)
        except (ValueError, TypeError) as error:
            told = str(error)
            assert ": expected " in told and ", got " in told, f"{what}: {told}"
            # a saved dataset is named by its folder
            assert (str(folder) if name == "a saved dataset" else str(path)) in told, what
        else:
            # what was lost or changed means nothing, such as a mark of the end
            assert what.startswith(("byte ", "cut off at the end")) and found == expected, what
        assert path.read_bytes() == content, what
    assert not mark.exists()
    path.write_bytes(good)
    assert kind.read(folder) == expected


LIES = {
    "negative lengths": {"buffer.lengths": torch.tensor([[9, -4, 1]])},
    "lengths beyond the tokens": {"buffer.lengths": torch.tensor([[1, 1, 1 << 40]])},
    "lengths that overflow": {"buffer.lengths": torch.tensor([[1 << 62, 1 << 62, 6 - (1 << 63)]])},
    "lengths of two parts": {"buffer.lengths": torch.tensor([[3, 3]])},
    "lengths of other pairs": {"buffer.lengths": torch.ones(2, 3, dtype=torch.int64)},
    "tokens of floats": {"buffer.tokens": torch.ones(6)},
    "tokens that are a matrix": {"buffer.tokens": torch.ones(6, 1, dtype=torch.int32)},
    "counts of other pairs": {"buffer.counts": torch.zeros(2, dtype=torch.int64)},
    "counts below 0": {"buffer.counts": torch.tensor([-1])},
    "no counts": {"buffer.counts": None},
    "another generator": {"buffer.generator": {"bit_generator": "MT19937"}},
    "a generator of text": {"buffer.generator": "random"},
    "inputs of text": {"buffer.inputs": ["text"]},
    "no inputs": {"buffer.inputs": None},
}


@pytest.mark.fault(68)
@pytest.mark.holds(46)
@pytest.mark.parametrize("name", LIES)
def test_sizes_are_checked_where_the_checksum_is_right(name: str, tmp_path: Path) -> None:
    subject = buffer()
    ids = torch.ones(2, dtype=torch.int32).numpy()
    subject.push(PairRow(prompt_ids=ids, chosen_ids=ids, rejected_ids=ids, inputs={}))
    tensors, about = subject._state()
    write_file(tmp_path / "buffer.safetensors", tensors, about)
    read_buffer(tmp_path)
    for key, value in LIES[name].items():
        part: dict[str, Any] = tensors if key in tensors else about
        del part[key]
        if value is not None:
            part[key] = value
    write_file(tmp_path / "buffer.safetensors", tensors, about)
    with pytest.raises(ValueError, match=r"buffer.safetensors: expected what is saved under this"):
        read_buffer(tmp_path)


@pytest.mark.fault(68)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(tiny.text_rows(3)).save_to_disk(str(saved))
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(tiny.text_rows(3)))
    both.save_to_disk(str(tmp_path / "both"))
    for index, old, new in (
        (saved / "state.json", "data-0", "../saved/data-0"),
        (tmp_path / "both" / "train" / "state.json", "data-0", f"{tmp_path}/both/train/data-0"),
        (tmp_path / "both" / "dataset_dict.json", '"train"', '"../both/train"'),
    ):
        source = tmp_path / index.relative_to(tmp_path).parts[0]
        assert len(load(str(source)).train) == 3
        good = index.read_text()
        assert old in good
        index.write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=rf"{index.name} names '.*', which is elsewhere"):
            load(str(source))
        index.write_text(good)


# a checkpoint, most of which is the trainer's


RUN = (
    "--loss sapo --base simpo --segment-length 2 --batch-size 2 --max-steps 2 --evaluations 1 "
    "--save-steps 1"
)


def words(folder: Path, *more: str) -> list[str]:
    return [
        *("train", "--cpu", "--model", str(folder / "model"), "--output", str(folder / "out")),
        *("--dataset", str(folder / "pairs.jsonl"), *RUN.split(), *more),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.save(folder / "model", initializer_range=0.02)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, tiny.text_rows(8))))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(output, "draw_training", lambda *anything: None)
        assert main(words(folder)) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run's folder."""
    monkeypatch.setattr(output, "draw_training", lambda *anything: None)
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def newest(folder: Path) -> str:
    return Path(to_resume(folder / "out-checkpoints", ByItself(), 1)).name


def cuts(content: bytes) -> Iterator[bytes]:
    # what ends a text may be a line end, which means nothing
    yield from (content[:size] for size in (0, 1, len(content) // 2, len(content) - 3))


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_a_checkpoint_of_which_any_file_is_cut_off_is_passed_over(run: Path) -> None:
    assert newest(run) == "checkpoint-2"
    last = run / "out-checkpoints" / "checkpoint-2"
    paths = [p for p in last.rglob("*") if p.is_file() and p.suffix != ".jinja"]
    assert {p.name for p in paths} >= {
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("trainer_state.json", "self_augmented-0.safetensors", "ahead-0.safetensors"),
    }
    for path in paths:
        good = path.read_bytes()
        for content in cuts(good):
            path.write_bytes(content)
            assert newest(run) == "checkpoint-1", (path.name, len(content), len(good))
        path.write_bytes(good)
        assert newest(run) == "checkpoint-2"


@pytest.mark.fault(68)
def test_a_checkpoint_without_its_parts_or_with_those_of_others_is_passed_over(run: Path) -> None:
    last = run / "out-checkpoints" / "checkpoint-2"
    index = last / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}}))
    assert newest(run) == "checkpoint-2"
    for part in ("model-2.safetensors", "../checkpoint-1/model.safetensors", None):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": part}}))
        assert newest(run) == "checkpoint-1"


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_a_run_goes_on_from_the_whole_one_and_says_where_there_is_none(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run / "out-checkpoints" / "checkpoint-2"
    expected, _ = read_file(last / "self_augmented" / "self_augmented-0.safetensors")
    os.truncate(last / "optimizer.pt", 1000)
    # a person's own, which are none of the run's
    shutil.copytree(last, run / "out-checkpoints" / "checkpoint-best")
    assert main(words(run, "--resume")) == 0
    found, _ = read_file(last / "self_augmented" / "self_augmented-0.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    capsys.readouterr()
    for path in (last / "optimizer.pt", last.parent / "checkpoint-1" / "model.safetensors"):
        os.truncate(path, 1000)
    assert main(words(run, "--resume")) == 2
    told = capsys.readouterr().err
    assert told.startswith("fusedpo train: error: resume: expected a whole checkpoint in ")
    for name in ("checkpoint-2/optimizer.pt", "checkpoint-1/model.safetensors"):
        assert name in told
    assert "or remove the folder and start anew" in told and told.count("\n") == 1


@pytest.mark.holds(46)
def test_a_run_does_not_mix_its_checkpoints_with_those_of_another(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before its own newest, it would have gone on from the other's."""
    assert main(words(run)) == 2
    told = capsys.readouterr().err
    assert "output: expected no checkpoints of an earlier run in " in told
    assert ", got checkpoint-2; go on from it with --resume, remove that folder, or" in told
    # what was killed in its first one has none
    shutil.rmtree(run / "out-checkpoints" / "checkpoint-1")
    (run / "out-checkpoints" / "checkpoint-2" / "self_augmented" / "ahead-0.safetensors").unlink()
    assert main(words(run)) == 0


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_a_pickle_in_a_checkpoint_is_not_run(run: Path, tmp_path: Path) -> None:
    last = run / "out-checkpoints" / "checkpoint-2"
    # two steps more, so that there is something to go on with
    more = words(run, "--resume", "--max-steps", "3")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        good = (last / name).read_bytes()
        torch.save(Runs(tmp_path / "mark"), last / name)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            main(more)
        (last / name).write_bytes(good)
    assert not (tmp_path / "mark").exists()
    # though it is one that would have been
    torch.save(Runs(tmp_path / "mark"), tmp_path / "pickle")
    torch.load(tmp_path / "pickle", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.fault(68)
def test_samples_of_something_else_are_named(tmp_path: Path) -> None:
    def trainer(**more: Any) -> GroupTrainer:
        args = TrainingArguments(
            str(tmp_path),
            **{"max_steps": 1, "save_steps": 1, "use_cpu": True, "report_to": "none", **more},
            **{"per_device_train_batch_size": 2, "disable_tqdm": True},
        )
        return GroupTrainer(
            tiny.model(),
            args,
            loss=SoftSequence(),
            reward=lambda row, response: float(len(response)),
            train_dataset=tiny.token_rows(4),
            processing_class=tiny.tokenizer(),
            **{"group_size": 2, "max_new_tokens": 3, "updates": 2},
        )

    trainer().train()
    folder = tmp_path / "checkpoint-1"
    path = folder / "samples-0.safetensors"
    tensors, about = read_file(path)
    assert about["left"] == 1
    del tensors["rewards"]
    for held, meta in ((tensors, about), ({}, about), (tensors, {}), (tensors, {"left": "two"})):
        write_file(path, held, meta)
        with pytest.raises(ValueError, match=r"samples-0.safetensors: expected what is saved und"):
            trainer(max_steps=2).train(resume_from_checkpoint=str(folder))


# code that comes with a model


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_code_in_a_model_s_folder_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    tiny.save(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config |= {"model_type": "own", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    write_rows(tmp_path)
    # one who is asked says yes
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    rows = str(tmp_path / "rows.jsonl")
    output = str(tmp_path / "out")
    found = ["train", "--cpu", "--model", str(folder), "--dataset", rows, "--output", output]
    assert main(found) == 2
    assert "contains custom code" in capsys.readouterr().err
    assert read_model(str(folder)).vocab == config["vocab_size"]
    assert not mark.exists()


# every file that is written


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """As on a disk where a file cannot grow beyond so many bytes; the writes that fail are real."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, tuple[str, Callable[[Path, int], Any]]] = {
    "safetensors": (
        "a.safetensors",
        lambda path, number: write_file(path, {"a": torch.full((999,), number)}, {}),
    ),
    "results": (
        "a.json",
        lambda path, number: measure.save(str(number), {"rows": ["x" * 999]}, path),
    ),
    "a plot": ("a.png", lambda path, number: measure.write(path, bytes([number]) * 999)),
    "metrics": (
        "metrics.json",
        lambda path, number: write_json(path, {"log": [number] * 999}),
    ),
}


@pytest.mark.fault(68)
@pytest.mark.holds(46)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 700])
def test_a_full_disk_keeps_the_file_before(name: str, size: int, tmp_path: Path) -> None:
    file, write = WRITERS[name]
    path = tmp_path / "folder" / file
    path.parent.mkdir()
    write(path, 1)
    good = path.read_bytes()
    with full_disk(size), pytest.raises((OSError, safetensors.SafetensorError)):
        write(path, 2)
    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [file]
    write(path, 2)
    assert path.read_bytes() != good


@pytest.mark.fault(68)
@pytest.mark.parametrize("content", [b"", b'{"one": {"rows"', b"\xff\xfe", b"[1]", b"7"])
def test_results_are_saved_beside_a_damaged_file_which_is_kept(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    measure.save("two", {"rows": [2]}, path)
    assert json.loads(path.read_text()) == {"two": {"rows": [2]}}
    assert path.with_suffix(".damaged").read_bytes() == content


@pytest.mark.fault(68)
@pytest.mark.parametrize("content", ["", '{"one": {"rows"', "[1]", '{"one": 1}', '{"one": {}}'])
def test_results_to_add_are_named_where_they_are_none(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.json").write_text(content)
    with pytest.raises(SystemExit):
        results.main(["--add", str(tmp_path / "given.json")])
    assert "--add: expected a file that fusedpo bench left, got " in capsys.readouterr().err
