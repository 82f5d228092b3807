"""Lazy logits in every model that is made: within a program, and from outside of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_models import IDS, SIZES, llama, near
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from fusedpo import lazy_logits
from fusedpo.cli import main
from fusedpo.lazy import LazyTensor

PROGRAM = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes))
logits = model(torch.zeros(2, 3, dtype=torch.long)).logits
print(type(logits).__name__, logits.recipe.source.options)
"""


def test_models_that_are_made_within_have_lazy_logits(tmp_path: Path) -> None:
    before = llama()
    before.save_pretrained(tmp_path)
    with lazy_logits(unknown="raise"):
        made, loaded = llama(), AutoModelForCausalLM.from_pretrained(tmp_path)
        classifier = LlamaForSequenceClassification(LlamaConfig(**SIZES))
    after = llama()
    assert isinstance(made(IDS).logits, LazyTensor)
    assert isinstance(loaded(IDS).logits, LazyTensor)
    assert near(loaded(IDS).logits.materialize(), before(IDS).logits)
    for model in (before, after, classifier):
        assert type(model(IDS).logits) is Tensor


def test_calling_it_twice_changes_the_options_only() -> None:
    with lazy_logits(memory_budget="1MiB"):
        with lazy_logits(memory_budget="2MiB"):
            logits = llama()(IDS).logits
        assert isinstance(logits, LazyTensor)
        assert logits.recipe.source.options.memory_budget == "2MiB"
        logits = llama()(IDS).logits
        assert isinstance(logits, LazyTensor)
        assert logits.recipe.source.options.memory_budget == "1MiB"


def test_it_is_undone_in_any_order() -> None:
    before = PreTrainedModel.post_init
    one, two = lazy_logits(), lazy_logits()
    one.remove()
    assert isinstance(llama()(IDS).logits, LazyTensor)
    two.remove()
    assert type(llama()(IDS).logits) is Tensor
    PreTrainedModel.post_init = before
    with lazy_logits():
        assert PreTrainedModel.post_init is not before
    assert PreTrainedModel.post_init is before


class Odd(LlamaForCausalLM):
    """A model with more than a layer for a head."""

    def get_output_embeddings(self) -> torch.nn.Module:
        return torch.nn.Sequential(self.lm_head)


def test_a_head_that_cannot_be_lazy_is_named() -> None:
    with lazy_logits(), pytest.warns(UserWarning, match="Odd makes its logits: "):
        model = Odd(LlamaConfig(**SIZES))
    assert type(model(IDS).logits) is Tensor


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def fusedpo_run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return start(sys.executable, "-m", "fusedpo", "run", *words, **environment)


def test_a_program_that_is_run_has_lazy_logits_and_so_has_what_it_starts(tmp_path: Path) -> None:
    # a launcher, in a Python that has a sitecustomize of its own
    (tmp_path / "sitecustomize.py").write_text("print('customized')")
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PROGRAM!r}])"
    outcome = fusedpo_run(
        "--memory-budget=1MiB", "--", sys.executable, "-c", launcher, PYTHONPATH=str(tmp_path)
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "LazyTensor Options(memory_budget='1MiB'" in outcome.stdout
    assert outcome.stdout.count("customized") == 3
    assert outcome.stderr.count("fusedpo run: the logits of LlamaForCausalLM are lazy\n") == 1


def test_a_program_without_models_is_left_alone_and_keeps_its_exit_status() -> None:
    program = "import sys; assert 'torch' not in sys.modules; sys.exit(5)"
    assert fusedpo_run(sys.executable, "-c", program).returncode == 5


def test_what_cannot_be_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (["run"], "program: expected a program and its arguments"),
        (["run", "no-such-program"], "program: expected one on the PATH, got no-such-program"),
        (["run", "--memory-budget=much", sys.executable], "memory_budget"),
        (["run", "--backend=jax", sys.executable], "backend"),
    ):
        assert main(words) == 2
        assert text in capsys.readouterr().err
