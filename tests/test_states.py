"""benchmarks/states.py: states are what their docstrings say, the same each time, and made once."""

from __future__ import annotations

import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fusedpo.benchmarks import states
from fusedpo.benchmarks.states import ADVERSARIAL, GEMMA, States

# a smaller one of each, where size does not matter
SMALL = {
    **ADVERSARIAL,
    "untrained": lambda: states.untrained(vocab=512, size=32, rows=64),
    "toy": lambda: States("toy", **states._toy(0, vocab=512, size=16, steps=2)),
}


def logprobs(given: States) -> torch.Tensor:
    """[N, V] in float64."""
    logits = given.hidden.double() @ given.weight.double().T
    return (logits if given.bias is None else logits + given.bias).log_softmax(-1)


def target_logprobs(given: States) -> torch.Tensor:
    own = [logp.gather(1, given.labels[block, None]) for block, logp in given.logprobs()]
    return torch.cat(own)[:, 0]


@pytest.mark.parametrize("name", SMALL)
def test_states_are_of_one_shape_and_the_same_each_time(name: str) -> None:
    first, second = SMALL[name](), SMALL[name]()
    (rows, size), vocab = first.hidden.shape, first.vocab
    assert first.name == name and first.weight.shape == (vocab, size)
    assert first.hidden.dtype == first.weight.dtype == torch.float32
    assert first.hidden.isfinite().all() and first.weight.isfinite().all()
    assert first.labels.shape == (rows,) and first.labels.dtype == torch.int64
    assert first.labels.min() >= 0 and first.labels.max() < vocab
    assert first.bias is None or first.bias.shape == (vocab,)
    assert first.upstream is None or first.upstream.shape == (rows,)
    # a target that cannot be would make the loss infinite
    assert target_logprobs(first).isfinite().all()
    for field in fields(States)[1:]:
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert (one is None and other is None) or torch.equal(one, other), field.name


def test_another_seed_gives_other_states() -> None:
    for make in (lambda seed: states.untrained(64, 8, 16, seed), states.certain):
        assert not torch.equal(make(0).hidden, make(1).hidden)
    one, other = (states._toy(seed, vocab=64, size=8, steps=1) for seed in (0, 1))
    assert not torch.equal(one["hidden"], other["hidden"])


def test_the_first_rows_are_those_of_every_tensor() -> None:
    given = states.unequal_rows()
    part = given.first(100)
    assert torch.equal(part.hidden, given.hidden[:100]) and part.weight is given.weight
    assert torch.equal(part.labels, given.labels[:100])
    assert torch.equal(part.upstream, given.upstream[:100])


# what they are like


@pytest.mark.parametrize("rows", [64, 150, 512])
@pytest.mark.parametrize("name", ["unequal rows", "without columns"])
def test_kept_columns_are_those_above_the_threshold_and_targets(name: str, rows: int) -> None:
    given, eps = ADVERSARIAL[name](), [2.0**-4, 2.0**-10, 1.5]
    p, expected = logprobs(given).exp(), []
    for start in range(0, 512 // rows * rows, rows):
        slab = slice(start, start + rows)
        target = torch.zeros(given.vocab, dtype=torch.bool)
        target[given.labels[slab]] = True
        expected.append([((p[slab] >= e).any(0) | target).double().mean() for e in eps])
    found = torch.tensor(states.kept_shares(given, rows, eps), dtype=torch.float64)
    # a column may be at the threshold to the last bit
    torch.testing.assert_close(found, torch.tensor(expected).mean(0), rtol=1e-2, atol=0)
    assert len(found.unique()) == 3, "thresholds that are not apart show nothing"


def test_entropies_are_those_of_the_rows() -> None:
    given = states.without_columns()
    logp = logprobs(given)
    expected = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)
    torch.testing.assert_close(states.entropies(given).double(), expected, rtol=1e-4, atol=0)


def test_of_an_untrained_model_everything_is_kept() -> None:
    given = states.untrained().first(256)
    assert given.weight.shape == (49_152, 576)
    assert min(states.kept_shares(given, 256, [2.0**-14, 2.0**-16])) > 0.99


def test_the_toy_is_peaked_as_a_trained_model_is(tmp_path: Path) -> None:
    toy = states.toy(tmp_path)
    assert toy.hidden.shape == (2048, 128) and toy.vocab == 8192
    low, middle, high = torch.quantile(states.entropies(toy), torch.tensor([0.1, 0.5, 0.9]))
    assert low < 2 and 2.5 < middle < 4.5 and 5.5 < high < 7.5
    # it has learned: log(V) is 9.0
    assert 3 < -target_logprobs(toy).mean() < 4.5
    shares = states.kept_shares(toy, 256, [2.0**-8, 2.0**-12, 2.0**-16])
    assert 0.03 < shares[0] < 0.1 and 0.2 < shares[1] < 0.45 and 0.5 < shares[2] < 0.85


def test_a_real_model_is_as_certain_as_it_is(smollm2_states: States) -> None:
    given = smollm2_states
    assert given.hidden.shape == (2048, 576) and given.weight.shape == (49_152, 576)
    low, middle, high = torch.quantile(states.entropies(given), torch.tensor([0.1, 0.5, 0.9]))
    assert low < 1 and 2 < middle < 3.5 and 4.5 < high < 6
    # labels are the tokens that came next, and not those before or after
    own = target_logprobs(given)
    shifted = States("", given.hidden, given.weight, given.labels.roll(1))
    assert own.mean() > -4 > -8 > target_logprobs(shifted).mean()
    shares = states.kept_shares(given, 256)
    assert 0.1 < shares[0] < 0.2 < shares[1] < 0.4 < shares[2] < 0.6


def test_a_larger_vocabulary_is_as_empty_as_that_of_gemma(smollm2_states: States) -> None:
    given = states.sharpened(smollm2_states)
    assert given.weight.shape == (262_144, 576) and given.labels is smollm2_states.labels
    for rows in states.SLABS:
        eps = [eps for slab, eps in GEMMA if slab == rows]
        found = states.kept_shares(given, rows, eps)
        expected = [GEMMA[rows, e] for e in eps]
        assert all(0.8 < a / b < 1.25 for a, b in zip(found, expected, strict=True)), found


def test_one_token_is_certain_and_every_other_row_wants_another() -> None:
    logp = target_logprobs(states.certain())
    assert (logp[::2] == 0).all() and (logp[1::2] < -20).all()
    assert states.entropies(states.certain()).max() < 1e-20


def test_the_mass_that_is_spread_has_no_common_direction() -> None:
    p = logprobs(states.spread()).exp()
    assert p.max() < 2.0**-14
    together = p.sum(0) / p.sum()
    residual = p - p.sum(1, keepdim=True) * together
    assert residual.norm() > 0.65 * p.norm()


def test_every_column_is_a_target_of_each_slab() -> None:
    for labels in states.targets_everywhere().labels.split(256):
        assert torch.equal(labels.sort().values, torch.arange(256))


def test_columns_that_cannot_be_have_no_probability() -> None:
    p = logprobs(states.without_columns()).exp()
    assert ((p == 0).all(0) == (torch.arange(3072) % 3 != 1)).all()
    assert (target_logprobs(states.one_column_left()) == 0).all()


def test_few_rows_have_a_million_times_the_gradient_and_no_peak() -> None:
    given = states.unequal_rows()
    size = given.upstream.abs()
    assert size.max() / size.min() == pytest.approx(1e6, rel=1e-5)
    heavy = size > 1
    assert heavy.sum() == 8
    entropy = states.entropies(given)
    assert entropy[heavy].min() > entropy[~heavy].max()


# they are made once


def test_what_several_ask_for_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        time.sleep(0.2)
        return {"x": torch.arange(3.0)}

    path, found = tmp_path / "folder" / "x.safetensors", []

    def ask() -> None:
        found.append(states.cached(path, ["text"], make)["x"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [x.tolist() for x in found] == [[0.0, 1.0, 2.0]] * 4


def test_it_is_made_again_of_other_texts_and_after_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def asked(text: str, value: float) -> float:
        return states.cached(path, [text], lambda: {"x": torch.tensor(value)})["x"].item()

    def interrupted() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        states.cached(path, ["a"], interrupted)
    assert [asked("a", 1.0), asked("a", 2.0), asked("b", 3.0), asked("b", 4.0)] == [1, 1, 3, 3]


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"repository: expected a checkout.*without README\.md"):
        states.smollm2(tmp_path, tmp_path)


# the command


def test_the_command_prints_what_states_are_like(capsys: pytest.CaptureFixture[str]) -> None:
    assert states.main(["spread", "one column left"]) == 0
    printed = capsys.readouterr().out
    assert "65,536" in printed and "10.40" in printed and "100.0%" in printed
    assert "one column left" in printed and "Gemma" not in printed


def test_the_command_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        states.main(["smolm2"])
    assert "NAME: expected any of smollm2, toy" in capsys.readouterr().err
