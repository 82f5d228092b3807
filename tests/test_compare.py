"""The two ways agree, and what is said about their time and memory is measured."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fusedpo.benchmarks.compare as compare_module
from fusedpo.benchmarks.compare import (
    FULL,
    FUSED,
    SCORED_ONLY,
    WAYS,
    Batch,
    Comparison,
    Way,
    compare,
    comparison_table,
    draw_comparison,
    full_logits,
    fused,
    small_budget,
)
from fusedpo.head import Head
from fusedpo.losses import DPO, GRPO, IPO, KTO, SemanticSPPO, SimPO
from fusedpo.sizes import parse_budget

PAIRS, LENGTH, HIDDEN, VOCAB = 3, 9, 8, 50


def batch(loss, reference=False, **head) -> Batch:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    labels[:, :4] = -100
    labels[1, 7:] = -100
    ref = torch.randn(2 * PAIRS, generator=generator) - 20 if reference else None
    return Batch(loss, hidden, Head(weight, **head), labels, ref)


@pytest.mark.parametrize(
    "problem",
    [
        batch(SimPO()),
        batch(SimPO(sft_weight=0.5), softcap=3.0),
        batch(DPO(), reference=True, logit_scale=0.5),
        batch(IPO(), reference=True, bias=torch.linspace(-1, 1, VOCAB)),
    ],
    ids=lambda problem: repr(problem.loss),
)
def test_every_way_gives_the_same_loss(problem):
    expected = full_logits(problem)
    assert fused(problem).item() == pytest.approx(expected.item(), rel=1e-5)
    only = full_logits(problem, scored_only=True)
    assert only.item() == pytest.approx(expected.item(), rel=1e-5)


def test_scored_tokens_are_counted():
    problem = batch(SimPO())
    assert problem.scored == 2 * PAIRS * 5 - 2
    # nothing predicts a first token
    problem.labels[:, 0] = 7
    assert problem.scored == 2 * PAIRS * 5 - 2


def test_gradients_are_apart_by_their_largest_difference():
    """Over the largest entry of the one that is compared."""
    assert (
        compare_module._gap(torch.tensor([1.0, 2.0, -4.0]), torch.tensor([1.0, 2.0, -3.0])) == 0.25
    )


def test_what_is_run_first_is_one_pair(monkeypatch):
    problem = batch(DPO(), reference=True)
    run = []
    monkeypatch.setitem(WAYS, FUSED, lambda batch: run.append(batch) or fused(batch))
    compare_module.peak_of(FUSED, problem)
    small, whole = run
    assert torch.equal(small.labels, problem.labels[[0, PAIRS]])
    assert torch.equal(small.hidden, problem.hidden[[0, PAIRS]])
    assert torch.equal(small.ref_logprobs, problem.ref_logprobs[[0, PAIRS]])
    assert torch.equal(whole.labels, problem.labels)


def test_small_budget_is_the_fraction_or_the_least_that_will_do():
    problem = batch(SimPO())
    large = replace(
        problem,
        hidden=problem.hidden.repeat(32, 8, 1),
        labels=problem.labels.repeat(32, 8),
        head=Head(problem.head.weight.repeat(40, 1)),
    )
    rows, vocab = 32 * 2 * PAIRS * (8 * LENGTH - 1), 40 * VOCAB
    assert small_budget(large) == rows * vocab * 4 // 16
    # too little for any tile
    least = small_budget(problem, fraction=1e-6)
    assert fused(replace(problem, memory_budget=least)).isfinite()
    with pytest.raises(ValueError, match="memory_budget"):
        fused(replace(problem, memory_budget=least // 2))


def test_the_fused_loss_has_the_tolerance_also_in_a_process_of_its_own(tmp_path, monkeypatch):
    problem = replace(batch(SimPO()), gradient_tolerance=2e-3)
    noted = []
    original = compare_module.preference_loss

    def preference_loss(*arguments, **options):
        noted.append(options["gradient_tolerance"])
        return original(*arguments, **options)

    monkeypatch.setattr(compare_module, "preference_loss", preference_loss)
    fused(problem)
    path = tmp_path / "batch.pt"
    torch.save(compare_module._packed(problem), path)
    compare_module.answer({"way": FUSED, "path": str(path)})
    assert len(noted) > 2 and {*noted} == {2e-3}


def test_comparison_measures_what_it_says():
    """Sizes at which the logits stand out of the noise of a process: 48 MiB of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4096, (48, 65), generator=generator)
    labels[:, :33] = -100
    hidden = torch.randn(48, 65, 16, generator=generator)
    problem = Batch(
        SimPO(),
        hidden,
        Head(torch.randn(4096, 16, generator=generator)),
        labels,
        memory_budget="8MiB",
    )
    found = compare(problem, rounds=1)
    assert list(found.ways) == list(WAYS) == [FUSED, FULL, SCORED_ONLY]
    assert (found.pairs, found.positions, found.scored) == (24, 48 * 65, 48 * 32)
    assert found.memory_budget == parse_budget("8MiB")
    assert found.logits_bytes == 48 * 64 * 4096 * 4
    losses = [way.loss for way in found.ways.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for name in (FULL, SCORED_ONLY):
        assert 0 < found.ways[name].hidden_gap < 1e-4
        assert 0 < found.ways[name].weight_gap < 1e-4
    assert all(way.seconds > 0 for way in found.ways.values())
    if found.ways[FUSED].peak_bytes is not None:
        # what the linear algebra library keeps for itself is in it too
        assert found.ways[FUSED].peak_bytes < found.memory_budget + 2**22
        assert found.ways[FULL].peak_bytes > 2 * found.logits_bytes
        assert found.ways[FULL].peak_bytes > 1.5 * found.ways[SCORED_ONLY].peak_bytes
    assert found.to_json()["ways"][FULL]["loss"] == losses[1]


@pytest.mark.parametrize("loss", [GRPO(), KTO(), SemanticSPPO()], ids=repr)
def test_what_is_no_loss_of_pairs_alone_is_not_compared(loss):
    """KTO and SemanticSPPO take further numbers, for which a batch has no place."""
    with pytest.raises(TypeError) as error:
        compare(replace(batch(SimPO()), loss=loss))
    assert str(error.value) == f"loss: expected a loss of pairs, got {loss!r}"


def test_memory_is_not_measured_where_a_process_cannot_see_its_own(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: path != Path("/proc/self/status"))
    monkeypatch.setattr(compare_module, "in_fresh_process", None)
    found = compare(batch(SimPO()), rounds=1)
    assert [way.peak_bytes for way in found.ways.values()] == [None, None, None]
    assert found.ways[FULL].loss == pytest.approx(found.ways[FUSED].loss, rel=1e-5)


COMPARISON = Comparison(
    ways={
        "fused": Way(0.5, 0.0, 0.0, 0.010, 2**20),
        "full logits": Way(0.5000001, 1e-6, 2e-6, 0.025, 30 * 2**20),
        "full logits, scored tokens only": Way(0.5, 3e-7, 1e-7, 0.015, None),
    },
    pairs=4,
    positions=800,
    scored=300,
    vocab=1000,
    hidden=16,
    logits_bytes=3 * 2**20,
    memory_budget=2**20,
    device="cpu",
    threads=2,
)


def test_comparison_table_gives_ratios_to_the_fused_loss():
    shown = io.StringIO()
    Console(file=shown, width=200).print(comparison_table(COMPARISON))
    lines = shown.getvalue().splitlines()
    (full,) = [line for line in lines if "│ full logits  " in line]
    for cell in ("0.5000001", "2.0e-06", "25 ms", "2.50", "30 MiB", "30.0"):
        assert cell in full
    (only,) = [line for line in lines if "scored tokens only" in line]
    assert "not measured" in only


def test_the_drawing_is_a_png_file(tmp_path):
    draw_comparison(tmp_path / "c.png", COMPARISON)
    content = (tmp_path / "c.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
