"""benchmarks/compact_training.py: trainings differ in what is said, and are judged by that."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fusedpo import smollm2
from fusedpo.benchmarks import compact_training, measure, reports
from fusedpo.benchmarks.compact_training import (
    EXACT,
    PROMPT,
    Pairs,
    Settings,
    Trainer,
    joined,
    moved,
    named,
    rounded,
    trainings,
)
from fusedpo.labels import IGNORE_INDEX

SETTINGS = Settings(steps=3, pairs=2, held_out=3, seeds=2, rate=1e-3)
VOCAB, END = 512, 1


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            eos_token_id=END,
        )
    )


def pairs(count: int = SETTINGS.all_pairs) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randint(2, VOCAB, (2, count, PROMPT + 8), generator=generator).unbind()
    rejected[:, :PROMPT] = chosen[:, :PROMPT]
    rejected[::2, -3] = END
    return Pairs(**joined(chosen, rejected, END))


def trainer(**changes: Any) -> Trainer:
    return Trainer(model(), pairs(), replace(SETTINGS, **changes))


# what is random


def test_random_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    x = torch.tensor([1.0, -1.0, 1.0 + 2**-9, -3.3e-5, 0.0, 7.1e20])
    nearest = rounded(x, None)
    assert nearest.dtype == torch.bfloat16 and torch.equal(nearest, x.bfloat16())
    found = torch.stack([rounded(x, seed) for seed in range(2000)]).double()
    gap = 2.0**-7 * x.double().abs()
    assert ((found - x).abs() <= gap).all()
    # what bf16 has stays; the rest goes either way, without a bias
    for exact in (0, 1, 4):
        assert (found[:, exact] == x[exact]).all()
    for inexact in (2, 3, 5):
        assert len(found[:, inexact].unique()) == 2
    assert ((found.mean(0) - x).abs() <= 0.05 * gap).all()


def test_moved_gradients_are_a_second_rounding_off() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:5] = torch.tensor([0.0, -0.0, 1e-40, 1.0, -1.0])
    off = moved(x, torch.Generator().manual_seed(1))
    assert off.isfinite().all() and (off[:3] == x[:3]).all()
    relative = ((off - x.float()).norm() / x.float().norm()).item()
    assert 0.5 < relative / 1.7e-3 < 2
    assert ((off - x.float()).abs() <= 2.0**-8 * x.float().abs()).all()


# pairs


def test_a_response_is_over_with_its_end() -> None:
    made = pairs(4)
    assert made.ids.shape == made.labels.shape == (4, 2, PROMPT + 8)
    assert (made.labels[:, :, :PROMPT] == IGNORE_INDEX).all()
    assert (made.labels[:, 0, PROMPT:] == made.ids[:, 0, PROMPT:]).all()
    # the end itself counts
    assert made.labels[0, 1, -3] == END and (made.labels[0, 1, -2:] == IGNORE_INDEX).all()
    assert (made.labels[1, 1, PROMPT:] != IGNORE_INDEX).all()
    ids, _, reference = replace(made, reference=torch.arange(8.0).view(4, 2)).rows
    assert torch.equal(ids, torch.cat((made.ids[:, 0], made.ids[:, 1])))
    assert reference.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


# trainings


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    own = trainer(rounding=("start", "gradients"))
    before = {"DPO": own.before("dpo"), "SimPO": own.before("simpo")}
    runs = list(trainings(own, own.settings))
    return compact_training.answer_of(runs, before, own.settings, measure.machine())


def rows_of(answer: dict[str, Any], group: str) -> dict[str, dict[str, Any]]:
    return {row["entry"]: row for row in answer["rows"] if row["group"] == group}


def test_a_training_is_there_of_every_kind(answer: dict[str, Any]) -> None:
    assert json.loads(json.dumps(answer, allow_nan=False))["rows"] == answer["rows"]
    for group in ("DPO", "SimPO"):
        rows = rows_of(answer, group)
        seeds = [f"{kind}, seed {i}" for kind in ("start", "gradients") for i in (1, 2)]
        assert list(rows) == [EXACT, named(2e-3), *seeds]
        curves = [tuple(row["losses"]) for row in rows.values()]
        assert {len(curve) for curve in curves} == {3}
        # those that begin alike have the same first loss, and the others one of their own
        first = {name: row["losses"][0] for name, row in rows.items()}
        alike = [name for name in rows if not name.startswith("start")]
        assert {first[name] for name in alike} == {first[EXACT]}
        if group == "DPO":
            # and each has its own start as its reference
            assert all(x == pytest.approx(math.log(2), rel=1e-5) for x in first.values())
        else:
            assert len(set(first.values())) == 3
        others = [row["losses"] for name, row in rows.items() if name.startswith("gradients")]
        assert all(losses[1:] != rows[EXACT]["losses"][1:] for losses in others)
        held_out = rows[EXACT]["held_out"]
        assert held_out != answer["before"][group] and 0 <= held_out["accuracy"] <= 1


def test_the_words_and_the_picture_are_of_all(answer: dict[str, Any]) -> None:
    columns, lines = compact_training.table(answer)
    assert len(lines) == 14 and {len(line) for line in lines} == {len(columns)}
    assert len(compact_training.remarks(answer)) == 1 + 2 + 8
    figure = compact_training.plot(answer)
    assert [len(axes.lines) for axes in figure.axes] == [6, 6, 6, 6]
    assert reports.kind_of(answer) is compact_training


def test_the_same_training_is_the_same_to_the_bit() -> None:
    own = trainer()
    first = own.run("simpo", EXACT)
    own.run("simpo", "another", start=3)
    assert own.run("simpo", EXACT).losses == first.losses
    assert own.run("simpo", EXACT).held_out == first.held_out


def test_a_tolerance_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    original = compact_training.fusedpo.preference_loss

    def spy(*args: Any, **given: Any) -> Any:
        told.append(given["gradient_tolerance"])
        return original(*args, **given)

    monkeypatch.setattr(compact_training.fusedpo, "preference_loss", spy)
    own = trainer()
    own.run("dpo", "tolerance", 2e-3)
    # and what is held out is scored alike
    assert told == [2e-3] * 3 + [0.0]


@pytest.mark.parametrize("layers", [0, 1, None])
def test_what_is_trained_is_what_is_said(layers: int | None) -> None:
    own = trainer(layers=layers)
    before = {name: p.clone() for name, p in own.model.named_parameters()}
    own.run("simpo", EXACT)
    changed = {name for name, p in own.model.named_parameters() if not torch.equal(p, before[name])}
    layers_changed = {name.split(".")[2] for name in changed if "layers" in name}
    assert layers_changed == {0: set(), 1: {"1"}, None: {"0", "1"}}[layers]
    # tied, it is the embedding; trained alone, it is not
    assert ("model.embed_tokens.weight" in changed) == (layers is None)
    assert ("lm_head.weight" in changed) == (layers is not None)
    assert all(p.dtype == torch.bfloat16 for p in own.model.parameters())
    assert own.model.model.rotary_emb.inv_freq.dtype == torch.float32


# the judgement


def judged(answer: dict[str, Any], group: str, **changes: Any) -> dict[str, bool | None]:
    """With changes of the row within the tolerance."""
    changed = json.loads(json.dumps(answer))
    rows_of(changed, group)[named(2e-3)].update(changes)
    mine = [v for v in compact_training.verdicts(changed) if v.what.startswith(group)]
    return {v.what.partition(": ")[2].partition(",")[0]: v.met for v in mine if "start" in v.what}


def test_a_curve_that_is_off_is_missed(answer: dict[str, Any]) -> None:
    exact = rows_of(answer, "SimPO")[EXACT]
    same = {"losses": exact["losses"], "held_out": exact["held_out"]}
    assert judged(answer, "SimPO", **same) == {"loss curve": True, "held-out accuracy": True}
    off = [x + 1.0 for x in exact["losses"]]
    assert judged(answer, "SimPO", **{**same, "losses": off})["loss curve"] is False
    worse = {**exact["held_out"], "accuracy": exact["held_out"]["accuracy"] - 0.9}
    found = judged(answer, "SimPO", **{**same, "held_out": worse})
    assert found == {"loss curve": True, "held-out accuracy": False}
    changed = json.loads(json.dumps(answer))
    own = rows_of(changed, "SimPO")[named(2e-3)]
    own["losses"] = exact["losses"]
    assert compact_training.inside(changed, "SimPO") == 3
    own["losses"] = off
    assert compact_training.inside(changed, "SimPO") == 0


def test_without_seeds_nothing_is_judged(answer: dict[str, Any]) -> None:
    alone = {**answer, "rows": [r for r in answer["rows"] if "seed" not in r["entry"]]}
    assert {v.met for v in compact_training.verdicts(alone)} == {None}


# the command


def test_the_command_keeps_what_it_has_found(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "load", lambda: (model(), None))
    monkeypatch.setattr(compact_training, "made_pairs", lambda count: pairs(count))
    arguments = ["--steps", "2", "--held-out", "2", "--seeds", "1", "--losses", "simpo"]
    arguments += ["--threads", "1", "--output", str(tmp_path)]
    assert compact_training.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "off the exact curve" in shown and "rounding the start" in shown
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["compact_training"]
    assert [row["entry"] for row in found["rows"]] == [EXACT, named(2e-3), "start, seed 1"]
    assert (tmp_path / "compact_training.png").exists()


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--layers", "-1"], ["--losses", "sft"]])
def test_what_cannot_be_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compact_training.parsed(wrong)
    assert wrong[0] in capsys.readouterr().err
