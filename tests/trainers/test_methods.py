"""Every method from the command line: trained to the end, on its own signals."""

from __future__ import annotations

import copy
import json
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import tiny
from transformers import TrainingArguments

from fusedpo import losses
from fusedpo.cli import main
from fusedpo.data.reading import Splits
from fusedpo.data.rows import COLUMNS
from fusedpo.recipes.self_augmented import SelfAugmented, Settings
from fusedpo.recipes.stdlib_pairs import hold_out, read_passages
from fusedpo.trainers.methods import base, method_of, self_augmented, two_contexts
from fusedpo.trainers.methods.pairs import Pairs
from fusedpo.trainers.methods.responses import Responses
from fusedpo.trainers.methods.sampled import Sampled, reward_function
from fusedpo.trainers.methods.self_augmented import SelfAugmented as ByItself
from fusedpo.trainers.methods.semantic import Semantic
from fusedpo.trainers.methods.two_contexts import TwoContexts
from fusedpo.trainers.self_augmented import MaskSharedPrefix, SelfAugmentedCallback


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, pairs, single responses, and rows with two contexts."""
    path = tmp_path_factory.mktemp("methods")
    tiny.save(path / "model", initializer_range=0.02)
    rows = tiny.text_rows(48)
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    two = [
        {
            "context": row["prompt"],
            "long_context": "moon star sun " + row["prompt"],
            "instruction": " cat",
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in rows
    ]
    (path / "contexts.jsonl").write_text("\n".join(map(json.dumps, two)))
    (path / "responses.jsonl").write_text("\n".join(map(json.dumps, tiny.response_rows(48))))
    return path


def train(folder: Path, output: Path, *more: str, data: str = "pairs.jsonl") -> dict:
    words = ["train", "--cpu", "--model", str(folder / "model"), "--output", str(output)]
    words += ["--dataset", str(folder / data), "--max-steps", "4", "--batch-size", "4"]
    assert main([*words, "--evaluations", "2", "--learning-rate", "5e-3", *more]) == 0
    assert (output / "training.png").stat().st_size > 10_000
    return json.loads((output / "metrics.json").read_text())


SIGNALS = {
    "simpo": (Pairs, ()),
    "s-sppo": (Semantic, ()),
    "sapo": (ByItself, ("--segment-length", "2")),
    "solopo": (TwoContexts, ("--alpha", "2", "--beta", "1.5")),
    "kto": (Responses, ("--undesirable-weight", "1.3")),
    "sspo": (Sampled, ("--max-new-tokens", "6", "--group-size", "2", "--gate", "tanh_log")),
    "grpo": (Sampled, ("--max-new-tokens", "6", "--kl-weight", "0.1")),
}


@pytest.mark.parametrize("loss", SIGNALS)
def test_every_method_trains_and_logs_its_signals(
    loss: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    method, options = SIGNALS[loss]
    data = {"solopo": "contexts.jsonl", "kto": "responses.jsonl"}.get(loss, "pairs.jsonl")
    metrics = train(folder, tmp_path / "out", "--loss", loss, *options, data=data)
    logged = set().union(*metrics["log"])
    for signal in method.signals:
        assert signal.key in logged, signal
    told = capsys.readouterr().out
    assert method.signals[0].title in told
    unit = {"sspo": "prompts", "grpo": "prompts", "kto": "responses"}.get(loss, "pairs")
    assert f"4 steps of 4 {unit} on" in told
    assert metrics["log"][-1]["step"] == 4 or metrics["log"][-2]["step"] == 4
    if loss == "solopo":
        assert metrics["loss"].startswith("ShortToLong(base=SimPO(beta=1.5")


def test_self_augmented_with_dpo_leaves_out_the_shared_prefix(folder: Path, tmp_path: Path) -> None:
    """The same held-out numbers with the prefix and without: it cancels."""
    words = ("--loss", "sapo", "--base", "dpo", "--beta", "0.3", "--segment-length", "2")
    found = []
    for more in ((), ("--no-skip-shared-prefix",)):
        metrics = train(folder, tmp_path / f"out{len(found)}", *words, *more)
        assert metrics["loss"].startswith("DPO(beta=0.3")
        found.append([e["eval_rewards/margins"] for e in metrics["log"] if "eval_loss" in e])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-7)


def test_the_reference_of_self_augmented_is_renewed_as_told(folder: Path, tmp_path: Path) -> None:
    """Held-out margins against a reference of the step are those of no training."""
    words = ("--loss", "sapo", "--base", "dpo", "--segment-length", "2", "--evaluations", "4")
    found = {}
    for more in ("--ref-every=1 --ema-decay=0", "--ref-every=1 --ref-mode=policy", "--ema-every=2"):
        metrics = train(folder, tmp_path / "out", *words, *more.split())
        log = [e["eval_rewards/margins"] for e in metrics["log"] if "eval_loss" in e]
        found[more] = [abs(margin) for margin in log]
    *renewed, kept = found.values()
    assert all(max(margins) < 1e-6 for margins in renewed)
    assert kept[0] == 0 and kept[-1] > 1e-4
    given = {"ema_every": 2, "ref_every": 7, "ref_mode": "policy"}
    settings = ByItself(**given, ema_decay=0.25).settings(seed=3)
    assert settings == Settings(**given, ema_decay=0.25, seed=3)


def test_similarities_of_a_column_are_taken_as_they_are(folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "similarity": 0.25} for row in tiny.text_rows(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = train(folder, tmp_path / "out", "--loss", "s-sppo", data=str(tmp_path / "rows.jsonl"))
    seen = [entry["similarity"] for entry in metrics["log"] if "similarity" in entry]
    assert seen and set(seen) == {0.25}


def test_resuming_self_augmented_goes_on(folder: Path, tmp_path: Path) -> None:
    words = ("--loss", "sapo", "--save-steps", "2", "--segment-length", "2")
    whole = train(folder, tmp_path / "a", *words)
    train(folder, tmp_path / "b", *words)
    # as if it had been stopped after the first half
    (tmp_path / "b-checkpoints" / "checkpoint-4").rename(tmp_path / "gone")
    again = train(folder, tmp_path / "b", *words, "--resume")
    before, after = (
        [entry["eval_loss"] for entry in m["log"] if "eval_loss" in entry][-1]
        for m in (whole, again)
    )
    assert before == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "kto"), "pairs.jsonl: expected single responses, each with a label, got TRL"),
        (("--loss", "sspo", "--reward", "nowhere:f"), 'reward: expected "overlap"'),
        (("--loss", "simpo", "--base", "dpo"), "base: expected no such option with --loss simpo"),
        (("--loss", "sapo", "--base", "kto"), "base: expected one of 'dpo', 'simpo', 'orpo'"),
        (
            ("--loss", "sspo", "--group-size", "1"),
            "group_size: expected an int of at least 2",
        ),
        (("--loss", "sapo", "--ref-every", "5"), "ref_every: expected 108 without a reference"),
        (
            ("--loss", "sapo", "--base", "dpo", "--ref-mode", "fixed", "--ref-every", "5"),
            "ref_every: expected 108 with ref_mode='fixed', where it has no effect",
        ),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["train", "--cpu", "--model", str(folder / "model"), "--output", str(tmp_path / "o")]
    assert main([*given, "--dataset", str(folder / "pairs.jsonl"), *words]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told


# what a method hands on


def arguments(folder: Path, **options) -> TrainingArguments:
    given = {"use_cpu": True, "report_to": "none", "max_steps": 1, "seed": 5, **options}
    return TrainingArguments(str(folder), **given)


def test_a_model_that_writes_gets_all_settings(tmp_path: Path, monkeypatch) -> None:
    """Held-out pairs are of every held-out row, and of another seed."""
    made: list[SelfAugmented] = []

    class Noted(SelfAugmented):
        def __init__(self, *positional, **options) -> None:
            super().__init__(*positional, **options)
            made.append(self)

    monkeypatch.setattr("fusedpo.recipes.self_augmented.SelfAugmented", Noted)
    monkeypatch.setattr(self_augmented, "_GENERATED", 4)
    rows = tiny.token_rows(12)
    method = ByItself(segment_length=2, ema_decay=0.25, buffer_size=5, sample_every=3)
    model = tiny.model(initializer_range=0.02)
    for loss, masked in ((losses.DPO(), True), (losses.IPO(average=True), False)):
        made.clear()
        trainer = method.trainer(
            model,
            arguments(tmp_path),
            loss=loss,
            train_dataset=rows[:6],
            eval_dataset=rows[6:],
            processing_class=tiny.tokenizer(),
        )
        assert isinstance(trainer.data_collator, MaskSharedPrefix) is masked
        source, held_out = made
        assert trainer.train_dataset.source is source
        settings = source.settings
        asked = (settings.segment_length, settings.ema_decay, settings.buffer_size)
        assert (*asked, settings.sample_every, settings.seed) == (2, 0.25, 5, 3, 5)
        assert held_out.settings.seed != settings.seed
        assert source.truncated == held_out.truncated == 0
        assert held_out.statistics()["segment/identical"] == 0, "which would be left out"
        prompts = [
            sorted(bytes(row["prompt_ids"]) for row in each)
            for each in (trainer.eval_dataset, rows[6:])
        ]
        assert prompts[0] == prompts[1]
        callbacks = trainer.callback_handler.callbacks
        (own,) = (each for each in callbacks if isinstance(each, SelfAugmentedCallback))
        assert own.ref_model is trainer.ref_model is not None


def test_a_sampling_method_gets_all_settings(tmp_path: Path, monkeypatch) -> None:
    noted: dict = {}
    monkeypatch.setattr("fusedpo.trainers.groups.GroupTrainer", lambda *a, **k: noted.update(k))
    settings = {"group_size": 3, "max_new_tokens": 5, "updates": 4, "temperature": 0.5}
    options = {"memory_budget": "1MiB", "gradient_tolerance": 2e-3}
    data = {"train_dataset": [1], "eval_dataset": [2]}
    Sampled(**settings).trainer(None, None, loss=losses.GRPO(), **data, **options)
    assert {name: noted[name] for name in settings} == settings
    assert (noted["train_dataset"], noted["eval_dataset"]) == ([1], [2])
    assert {name: noted[name] for name in options} == options
    row = {"prompt_ids": [5, 6], "chosen_ids": [1, 2]}
    assert noted["reward"](row, [2, 1]) == 1.0 and noted["reward"](row, [5, 6]) == 0.0


def test_rows_of_two_contexts_are_collated_as_the_loss_has_them(tmp_path: Path) -> None:
    ids = [3, 4]
    rows = [dict.fromkeys(("prompt_ids", "long_prompt_ids", "chosen_ids", "rejected_ids"), ids)] * 2
    for both, roles in ((False, 3), (True, 4)):
        loss = losses.ShortToLong(both=both)
        trainer = TwoContexts().trainer(
            tiny.model(),
            arguments(tmp_path),
            loss=loss,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tiny.tokenizer(),
        )
        batch = trainer.data_collator(rows)
        assert batch["labels"].shape[0] == 2 * roles and trainer._examples(batch) == 2


def test_numbers_that_a_loss_may_take_come_from_the_rows() -> None:
    rows = [{**row, "win_rate_chosen": 0.75} for row in tiny.text_rows(2)]
    splits = Splits(rows, None, "here")
    assert [row.inputs for row in Pairs().checked(rows, splits, losses.SPPO())] == [
        {"win_rate_chosen": 0.75}
    ] * 2
    # 0 is a similarity too, which need not be found
    rows = [{**row, "similarity": 0.0} for row in rows]
    found = Semantic(encoder="/nowhere").checked(rows, splits, losses.SemanticSPPO())
    assert [row.inputs["similarity"] for row in found] == [0.0, 0.0]


def test_an_encoder_that_cannot_be_had_is_told_by_its_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = tiny.text_rows(2)
    given = rows, Splits(rows, None, "here"), losses.SemanticSPPO()
    with pytest.raises(ValueError, match=r"^encoder: expected a folder or a name on the Hub, got"):
        Semantic(encoder="/nowhere").checked(*given)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    told = (
        r"^encoder: expected .*, got 'owner/model', which needs sentence-transformers: pip install"
    )
    with pytest.raises(ImportError, match=told):
        Semantic(encoder="owner/model").checked(*given)


def test_a_checkpoint_is_saved_when_every_process_has_written(tmp_path: Path) -> None:
    for method, folder, names in (
        (ByItself(), tmp_path / "self_augmented", ("self_augmented", "ahead")),
        (Sampled(), tmp_path, ("samples",)),
    ):
        paths = [folder / f"{name}-{rank}.safetensors" for name in names for rank in (0, 1)]
        folder.mkdir(exist_ok=True)
        for path in paths:
            path.touch()
        assert method.is_saved(tmp_path, 2) and not method.is_saved(tmp_path, 3)
        for path in paths:
            path.unlink()
            assert not method.is_saved(tmp_path, 2), path
            path.touch()


# demonstrations


@pytest.fixture(scope="module")
def passages() -> base.Passages:
    """Of a part of the standard library: to train on, and of modules held out."""
    return hold_out(read_passages(Path(sysconfig.get_path("stdlib"), "email")), 0.3, seed=0)


def test_pairs_of_the_demonstration_differ_in_what_their_prompts_ask_for(
    passages: base.Passages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_DEMO_HELD_OUT", 20)
    splits = Pairs().demo(passages, seed=0)
    assert len(splits.train) > 100 and len(splits.held_out) == 20
    assert splits.where(3) == "the standard library pair 4"
    for rows, part in zip((splits.train, splits.held_out), passages, strict=True):
        texts = [passage.text for passage in part]
        for row in rows:
            assert any(row["prompt"] + row["chosen"] in text for text in texts)
            assert not any(row["prompt"] + row["rejected"] in text for text in texts)
            # about 150 characters, and on to the end of a word
            assert min(map(len, row.values())) >= 150
    # each response is chosen once and rejected once
    chosen, rejected = (Counter(row[name] for row in splits.train) for name in COLUMNS[1:])
    assert chosen == rejected
    assert not {row["chosen"] for row in splits.held_out} & set(chosen)
    again, other = (Pairs().demo(passages, seed).train for seed in (0, 1))
    assert again == splits.train != other


def test_contexts_of_the_demonstration_hide_what_is_asked_for(
    passages: base.Passages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_contexts, "_DEMO_CONTEXTS", (30, 10))
    method = TwoContexts()
    splits = method.demo(passages, seed=0)
    assert (len(splits.train), len(splits.held_out)) == (30, 10)
    assert splits.where(3) == "the standard library row 4"
    for rows, part in zip((splits.train, splits.held_out), passages, strict=True):
        texts = [passage.text for passage in part]
        for row in rows:
            opening = row["instruction"].removeprefix("Continue: ")
            needle = opening + row["chosen"]
            assert row["instruction"] != opening
            assert any(needle in text for text in texts)
            assert needle in row["context"] and needle in row["long_context"]
            # the long context is more text around the same passage, up to a length
            assert row["context"] in row["long_context"]
            assert 1.5 * len(row["context"]) < len(row["long_context"]) <= 4 * 280
            # the rejected response is another passage's, which neither context has
            assert any(row["rejected"] in text for text in texts)
            assert row["rejected"] not in row["long_context"]
    assert method.demo(passages, seed=0) == splits
    assert method.demo(passages, seed=1).train != splits.train
    done = method.tokenized(splits.train, tiny.tokenizer(), 10_000)
    assert len(done.rows) == 30 and not done.dropped


def test_a_column_that_some_rows_have_is_missed_in_the_others() -> None:
    """Not left out for all, because the first row lacks it."""
    for method, loss, column in (
        (Pairs(), losses.SPPO(), "win_rate_rejected"),
        (Semantic(), losses.SemanticSPPO(), "similarity"),
    ):
        rows = [*tiny.text_rows(2), {**tiny.text_rows(1)[0], column: 0.5}]
        with pytest.raises(ValueError, match=f"row 1: expected the column {column}, which this"):
            method.checked(rows, Splits(rows, None, "pairs"), loss)


def test_every_loss_has_a_method() -> None:
    found = {name: method_of(cls) for name, cls in losses.available().items()}
    assert found["dpo"] is Pairs and found["shorttolong"] is TwoContexts
    assert found["softsequence"] is Sampled


def test_a_reward_may_be_anybodys_function() -> None:
    assert reward_function("math:hypot")(3, 4) == 5.0
    row = {"chosen_ids": [1, 2]}
    assert reward_function("overlap")(row, [2, 1]) == 1.0


def test_the_losses_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert main(["losses"]) == 0
    told = capsys.readouterr().out
    for cls in losses.available().values():
        assert f"`{cls.__name__}(" in told


@pytest.mark.parametrize("method", [ByItself(segment_length=2), TwoContexts()])
def test_padding_that_the_model_has_no_row_for_is_passed_over(tmp_path, method):
    """A tokenizer may have been given one that the model was not."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    rows = [{**row, "long_prompt_ids": row["prompt_ids"]} for row in tiny.token_rows(4)]
    loss = losses.DPO() if isinstance(method, ByItself) else losses.ShortToLong(losses.SimPO())
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    model = tiny.model()
    options = {"train_dataset": rows, "eval_dataset": rows[:2], "processing_class": tokenizer}
    made = method.trainer(model, args, loss=loss, **options)
    collator = getattr(made.data_collator, "collator", made.data_collator)
    assert collator.pad_token_id == tokenizer.eos_token_id < model.config.vocab_size
    assert made.train().training_loss > 0
