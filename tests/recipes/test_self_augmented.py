"""Self-augmented pairs: the average, the buffer, segments, what a stopped run goes on with."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import safetensors
import safetensors.torch
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedpo import preference_loss
from fusedpo.data.rows import TokenRow
from fusedpo.files import read_file, write_file
from fusedpo.losses import DPO
from fusedpo.recipes.self_augmented import (
    PairRow,
    PolicyAverage,
    ReplayBuffer,
    SelfAugmented,
    Settings,
    choose_segment,
    generate_segments,
    mask_shared_prefix,
    plain_loop,
    splice,
)
from fusedpo.recipes.self_augmented.average import copy_weights
from fusedpo.recipes.self_augmented.buffer import unpack_rows
from fusedpo.trainers.transformers import PreferenceCollator

VOCAB, PAD, EOS = 32, 0, 2
SMALL = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
SHORT = Settings(segment_length=4, buffer_size=16, max_length=24, seed=3)


def policy(seed: int = 0, **config):
    return tiny.model(seed, **{**SMALL, **config})


def rows(count: int = 6, seed: int = 0) -> list[dict[str, list[int]]]:
    chooser = np.random.default_rng(seed)
    return [
        {
            "prompt_ids": [1, *chooser.integers(3, VOCAB, chooser.integers(1, 6)).tolist()],
            "response_ids": [*chooser.integers(3, VOCAB, chooser.integers(6, 14)).tolist(), EOS],
        }
        for _ in range(count)
    ]


def source(model=None, settings: Settings = SHORT, data=None, **options) -> SelfAugmented:
    model = policy() if model is None else model
    data = rows() if data is None else data
    return SelfAugmented(model, data, settings, eos_token_id=EOS, pad_token_id=PAD, **options)


def pair(number: int) -> PairRow:
    """Recognisable, and of a length of its own."""
    ids = np.arange(number % 7 + 1, dtype=np.int32)
    return PairRow(
        prompt_ids=ids + number,
        chosen_ids=ids,
        rejected_ids=np.asarray([number], np.int32),
        inputs={"weight": number / 7} if number % 2 else {},
    )


def plain(found) -> list[dict]:
    """Comparable, and with the types of the arrays."""
    return [
        {
            name: (value.dtype.name, value.tolist()) if isinstance(value, np.ndarray) else value
            for name, value in row.items()
        }
        for row in found
    ]


def nudge(model, seed: int = 9, scale: float = 0.1) -> None:
    """Stands in for an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def test_pairs_are_token_rows():
    assert get_type_hints(PairRow) == get_type_hints(TokenRow)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("segment_length", 0, ValueError),
        ("segment_length", 2.0, TypeError),
        ("ema_decay", 1.0, ValueError),
        ("ema_decay", -0.1, ValueError),
        ("buffer_size", 0, ValueError),
        ("sample_every", True, TypeError),
        ("top_k", -1, ValueError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.5, ValueError),
        ("temperature", 0.0, ValueError),
        ("max_length", 1, ValueError),
        ("seed", -1, ValueError),
        ("ema_every", 0, ValueError),
        ("ref_every", 0, ValueError),
        ("ref_every", 1.5, TypeError),
        ("ref_mode", "average", ValueError),
    ],
)
def test_settings_are_checked(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected"):
        Settings(**{name: value})


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="ref_every: expected 108 with ref_mode='fixed'"):
        Settings(ref_mode="fixed", ref_every=5)
    for name, value in (("ref_every", 5), ("ref_mode", "policy")):
        settings = Settings(segment_length=4, **{name: value})
        with pytest.raises(ValueError, match=f"{name}: expected .* without a reference"):
            plain_loop(policy(), source(settings=settings), None, None, steps=1, batch_size=1)
        with pytest.raises(ValueError, match=f"{name}: expected .* without a reference"):
            settings.check_loss(needs_reference=False)
        settings.check_loss(needs_reference=True)
    with pytest.raises(ValueError, match=r"ref_mode: expected .* without a reference"):
        Settings(ref_mode="fixed").check_loss(needs_reference=False)
    with pytest.raises(ValueError, match="ref_mode: expected 'fixed' for a reference that is the"):
        Settings().check_loss(needs_reference=True, adapters=True)
    Settings(ref_mode="fixed").check_loss(needs_reference=True, adapters=True)
    Settings().check_loss(needs_reference=False, adapters=True)


# the average


def test_average_is_the_recurrence():
    model = policy()
    average = PolicyAverage(model, 0.75)
    expected = weights(model)
    for step in range(4):
        nudge(model, step)
        average.update(model)
        expected = 0.75 * expected + 0.25 * weights(model)
    error = (weights(average.module) - expected).abs().max()
    assert error <= 1e-6 * expected.abs().max()
    assert average.updates == 4


def test_average_of_bf16_is_fp32_and_loses_no_small_update():
    model = policy().to(torch.bfloat16)
    average = PolicyAverage(model, 0.992)
    assert {p.dtype for p in average.module.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    start = weights(model)
    nudge(model, scale=0.02)
    for _ in range(10):
        average.update(model)
    moved, whole = weights(average.module) - start, weights(model) - start
    share = 1 - 0.992**10
    assert (moved - share * whole).abs().max() <= 1e-5 * start.abs().max()
    assert (moved[whole != 0] != 0).all()


def test_average_is_a_model_of_its_own_without_gradients():
    model = policy()
    model(torch.tensor([[1, 3]])).logits.sum().backward()
    before = weights(model)
    average = PolicyAverage(model)
    assert not any(p.requires_grad or p.grad is not None for p in average.module.parameters())
    assert not average.module.training and model.training
    nudge(average.module)
    assert torch.equal(weights(model), before)


def test_buffers_are_copied_and_not_averaged():
    model = torch.nn.BatchNorm1d(3)
    average = PolicyAverage(model, 0.9)
    model.running_mean.fill_(5)
    model.num_batches_tracked.fill_(7)
    average.update(model)
    assert average.module.running_mean.tolist() == [5, 5, 5]
    assert average.module.num_batches_tracked == 7


def test_tied_weights_stay_tied(tmp_path):
    model = policy(tie_word_embeddings=True).to(torch.bfloat16)
    average = PolicyAverage(model)
    nudge(model)
    average.update(model)
    average.save(tmp_path)
    names = safetensors.torch.load_file(tmp_path / "average.safetensors")
    assert "average.model.embed_tokens.weight" in names
    assert "average.lm_head.weight" not in names
    again = PolicyAverage(model)
    again.load(tmp_path)
    for module in (average.module, again.module):
        assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(weights(again.module), weights(average.module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_copied_into_a_reference_of_any_dtype(dtype):
    model, reference = policy(), policy(1).to(dtype)
    average = PolicyAverage(model)
    nudge(model)
    average.update(model)
    copy_weights(average.module, reference)
    for own, other in zip(average.module.parameters(), reference.parameters(), strict=True):
        assert other.dtype == dtype and torch.equal(own.to(dtype), other)


@pytest.mark.holds(46)
def test_average_goes_on_as_saved(tmp_path):
    model = policy()
    average = PolicyAverage(model)
    nudge(model)
    average.update(model)
    average.save(tmp_path)
    again = PolicyAverage(policy(5))
    again.load(tmp_path)
    assert again.updates == 1
    assert torch.equal(weights(again.module), weights(average.module))


@pytest.mark.fault(68)
def test_other_models_are_refused(tmp_path):
    average = PolicyAverage(policy())
    before = weights(average.module)
    larger = policy(hidden_size=32)
    for other in (larger, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"model: expected the .* the average was made of"):
            average.update(other)
        with pytest.raises(ValueError, match=r"model: expected the .* the average was made of"):
            copy_weights(average.module, other)
    PolicyAverage(larger).save(tmp_path)
    with pytest.raises(ValueError, match=r"average.safetensors: expected the average of this mod"):
        average.load(tmp_path)
    assert torch.equal(weights(average.module), before)


# the buffer


@given(capacity=st.integers(1, 8), actions=st.lists(st.integers(0, 4), max_size=30))
def test_buffer_keeps_the_newest_and_counts_what_it_hands_out(capacity, actions):
    """0 is a push, any other number a draw of as many."""
    buffer, pushed, drawn = ReplayBuffer(capacity, 1), [], Counter()
    for action in actions:
        if action == 0:
            buffer.push(pair(len(pushed)))
            pushed.append(len(pushed))
        elif pushed:
            found = buffer.draw(action)
            assert len(found) == action
            drawn.update(int(row["rejected_ids"][0]) for row in found)
    kept = pushed[-capacity:]
    assert plain(buffer.rows) == plain(pair(number) for number in kept)
    assert buffer.counts == tuple(drawn[number] for number in kept)
    assert len(buffer) == len(kept)
    assert buffer.reuse * max(1, len(kept)) == pytest.approx(sum(buffer.counts), rel=1e-12, abs=0)


def test_probability_is_one_over_times_drawn_plus_one():
    """Within one call too: three draws before make it 1/4 against 1."""
    buffer = ReplayBuffer(2, seed=0)
    buffer.push(pair(0))
    buffer.draw(3)
    buffer.push(pair(1))
    count = 20_000
    found = Counter(int(row["rejected_ids"][0]) for row in buffer.draw(count))
    # three standard deviations
    assert abs(found[1] / count - 0.8) < 3 * (0.8 * 0.2 / count) ** 0.5


def test_drawing_is_the_seeds_alone():
    def draws(seed: int) -> list[dict]:
        buffer = ReplayBuffer(50, seed)
        for number in range(50):
            buffer.push(pair(number))
        return plain(buffer.draw(20))

    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert draws(1) == draws(1) != draws(2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_an_empty_buffer_has_nothing_to_draw():
    with pytest.raises(ValueError, match="buffer: expected at least one pair"):
        ReplayBuffer(3).draw(1)


@pytest.mark.holds(46)
@given(size=st.integers(0, 12), draws=st.integers(0, 20))
def test_a_loaded_buffer_draws_the_same(tmp_path_factory, size, draws):
    folder = tmp_path_factory.mktemp("buffer")
    buffer = ReplayBuffer(8, seed=4)
    for number in range(size):
        buffer.push(pair(number))
    if size and draws:
        buffer.draw(draws)
    buffer.save(folder)
    again = ReplayBuffer(8, seed=99)
    again.push(pair(50))
    again.load(folder)
    assert plain(again.rows) == plain(buffer.rows)
    assert again.counts == buffer.counts
    for _ in range(3 if size else 0):
        assert plain(again.draw(5)) == plain(buffer.draw(5))


def test_a_smaller_buffer_takes_the_newest(tmp_path):
    buffer = ReplayBuffer(8)
    for number in range(8):
        buffer.push(pair(number))
    buffer.save(tmp_path)
    smaller = ReplayBuffer(3)
    smaller.load(tmp_path)
    assert plain(smaller.rows) == plain(pair(number) for number in (5, 6, 7))
    smaller.push(pair(8))
    assert len(smaller.rows) == len(smaller.counts) == 3


# segments


@given(
    size=st.integers(1, 400),
    segment=st.integers(1, 300),
    room=st.integers(0, 400),
    seed=st.integers(0, 2**32),
)
def test_segment_is_where_the_authors_have_it(size, segment, room, seed):
    start, length = choose_segment(size, segment, room, np.random.default_rng(seed))
    assert length == min(segment, size)
    spare = size - 3 - length
    assert 0 <= start <= (min(spare, room) if spare > 0 else 0)


@pytest.mark.parametrize(("room", "last"), [(100, 13), (5, 5), (0, 0)])
def test_every_start_is_as_likely(room, last):
    rng, count = np.random.default_rng(0), 14_000
    found = Counter(choose_segment(20, 4, room, rng)[0] for _ in range(count))
    assert sorted(found) == list(range(last + 1))
    share = 1 / (last + 1)
    for start in found:
        assert abs(found[start] / count - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_a_segment_needs_room():
    with pytest.raises(ValueError, match="room: expected an int of at least 0, got -1"):
        choose_segment(5, 2, -1, np.random.default_rng(0))


tokens = st.lists(st.integers(0, 9), max_size=12)


@given(response=tokens, segment=tokens, data=st.data())
def test_splice_replaces_the_segment_and_ends_with_the_end_of_sequence(response, segment, data):
    start = data.draw(st.integers(0, len(response)))
    length = data.draw(st.integers(0, len(response) - start))
    without = response[:start] + segment + response[start + length :]
    assert splice(response, start, length, segment, None) == without
    spliced = splice(response, start, length, segment, 7)
    if 7 not in segment:
        assert spliced == without
    else:
        assert spliced[:start] == response[:start]
        assert spliced[-1] == 7
        assert spliced[start:].count(7) == 1
        assert segment[: len(spliced) - start] == spliced[start:]


def test_splice_by_example():
    response = [10, 11, 12, 13, 14, EOS]
    assert splice(response, 1, 2, [20, 21], EOS) == [10, 20, 21, 13, 14, EOS]
    assert splice(response, 1, 2, [20, EOS, 21], EOS) == [10, 20, EOS]


# generation

PROMPTS = [[1, 5, 6, 7, 8], [1, 9], [1, 4, 4]]
GREEDY = Settings(top_k=1)


def generate(model, prompts=PROMPTS, lengths=(5, 3, 4), settings=GREEDY, eos=None, seed=0):
    return generate_segments(
        model,
        prompts,
        lengths,
        pad_token_id=PAD,
        eos_token_id=eos,
        settings=settings,
        seed=seed,
    )


def greedy(model, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_of_uneven_prompts_generates_what_each_would_alone():
    model = policy()
    assert generate(model) == [
        greedy(model, prompt, length) for prompt, length in zip(PROMPTS, (5, 3, 4), strict=True)
    ]


def test_a_segment_ends_with_its_end_of_sequence():
    model = policy()
    longest = greedy(model, PROMPTS[0], 5)
    eos = longest[2]
    expected = [
        tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in generate(model)
    ]
    assert len(expected[0]) <= 3
    assert generate(model, eos=eos) == expected


def test_sampling_obeys_top_k_and_the_seed():
    model = policy()
    settings = Settings(top_k=2, top_p=1.0, temperature=5.0)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    found = [
        generate(model, PROMPTS[:1] * 8, [1] * 8, settings, seed=seed)[i][0]
        for seed in range(4)
        for i in range(8)
    ]
    assert set(found) == set(logits.topk(2).indices.tolist())
    # what is sure to the rest, or nearly so when it is cold, is all there is
    for settings in (Settings(top_k=0, top_p=1e-3), Settings(top_k=0, top_p=1.0, temperature=1e-4)):
        assert generate(model, settings=settings) == generate(model)
    wide = Settings(top_k=0, top_p=1.0, temperature=1.0)
    assert generate(model, settings=wide, seed=1) == generate(model, settings=wide, seed=1)
    assert generate(model, settings=wide, seed=1) != generate(model, settings=wide, seed=2)


def test_generation_leaves_no_trace():
    model = policy(attention_dropout=0.5)
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.num_beams = 3
    own, text = model.generation_config, model.generation_config.to_json_string()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = generate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own
    assert model.generation_config.to_json_string() == text
    # neither dropout nor its penalty and beams had a part in it
    assert found == [greedy(model.eval(), p, n) for p, n in zip(PROMPTS, (5, 3, 4), strict=True)]


def test_generation_that_fails_leaves_no_trace(monkeypatch):
    model = policy()
    own, before = model.generation_config, torch.get_rng_state()

    def fail(**kwargs):
        torch.rand(3)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model)
    assert model.training and model.generation_config is own
    assert torch.equal(torch.get_rng_state(), before)


class Device:
    """torch.cuda, or the like, for a device with a generator of its own."""

    def __init__(self) -> None:
        self.state, self.entered = "as before", []

    def get_rng_state(self) -> str:
        return self.state

    def set_rng_state(self, state: str) -> None:
        self.state = state

    def manual_seed(self, seed: int) -> None:
        self.state = f"seeded with {seed}"


class OneOfSeveral(Device):
    @contextlib.contextmanager
    def device(self, which: torch.device):
        self.entered.append(which)
        yield


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [Device, OneOfSeveral])
def test_generation_elsewhere_seeds_that_device_and_leaves_no_trace(monkeypatch, kind, fails):
    there, model, seen = kind(), policy().to("meta"), []
    monkeypatch.setattr(torch, "get_device_module", lambda device: there)

    def generated(input_ids, attention_mask):
        assert input_ids.device == attention_mask.device == torch.device("meta")
        seen.append((there.state, torch.rand(3)))
        if fails:
            raise RuntimeError("out of memory")
        return torch.full((len(PROMPTS), input_ids.shape[1] + 5), 7)

    monkeypatch.setattr(model, "generate", generated)
    before = torch.get_rng_state()
    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                generate(model, seed=11)
        else:
            assert generate(model, seed=11) == [[7] * length for length in (5, 3, 4)]
        assert there.state == "as before"
        assert torch.equal(torch.get_rng_state(), before)
    (first, numbers), (second, same) = seen
    assert first == second == "seeded with 11" and torch.equal(numbers, same)
    assert there.entered == [torch.device("meta")] * (2 if kind is OneOfSeveral else 0)


def test_prompts_are_checked():
    with pytest.raises(ValueError, match="prompts: expected at least one token in each"):
        generate(policy(), [[1], []], [1, 1])
    with pytest.raises(ValueError, match="lengths: expected one for each prompt"):
        generate(policy(), [[1]], [1, 1])


# all of it


def test_rejected_is_the_response_but_for_one_segment():
    data = rows(20)
    subject = source(data=data)
    subject.next_batch(20)
    known = {(tuple(row["prompt_ids"]), tuple(row["response_ids"])) for row in data}
    assert len(subject.buffer) > 10
    for row in subject.buffer.rows:
        chosen, rejected = row["chosen_ids"].tolist(), row["rejected_ids"].tolist()
        assert (tuple(row["prompt_ids"].tolist()), tuple(chosen)) in known
        assert chosen != rejected and len(rejected) <= len(chosen)
        start = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        cut_off = len(rejected) < len(chosen) and rejected[-1] == EOS
        assert cut_off or rejected[start + 4 :] == chosen[start + 4 :]


def test_batches_are_the_seeds_and_the_ranks_alone():
    def batches(seed: int = 3, rank: int = 0) -> list[dict]:
        subject = source(settings=Settings(segment_length=4, max_length=24, seed=seed), rank=rank)
        return plain(row for _ in range(3) for row in subject.next_batch(4))

    found = batches()
    torch.manual_seed(77)
    assert batches() == found
    assert batches(seed=4) != found
    assert batches(rank=1) != found


def test_ranks_and_seeds_have_rows_in_an_order_of_their_own():
    def order(seed: int = 3, rank: int = 0) -> list[int]:
        return source(settings=Settings(segment_length=4, seed=seed), rank=rank)._turn(12)

    assert order() == order()
    assert len({tuple(each) for each in (order(), order(rank=1), order(rank=2), order(4))}) == 4


def test_ranks_make_different_pairs_of_the_same_rows():
    def made(rank: int) -> list[dict]:
        subject = source(rank=rank)
        subject.next_batch(4, [0, 1, 2, 3])
        return plain(subject.buffer.rows)

    assert made(0) == made(0) != made(1)


def test_the_average_generates_and_not_the_policy():
    def second(step: bool) -> list[dict]:
        model = policy()
        subject = source(model)
        subject.next_batch(4)
        nudge(model, scale=1.0)
        if step:
            subject.after_step(model)
        return plain(subject.next_batch(4))

    still = source()
    still.next_batch(4)
    assert second(step=False) == plain(still.next_batch(4))
    assert second(step=True) != second(step=False)


def test_every_row_has_its_turn():
    data = rows(6)
    subject = source(settings=Settings(segment_length=4, temperature=5.0, top_k=0), data=data)
    seen = [row for _ in range(6) for row in subject._turn(4)]
    for around in (0, 1, 2, 3):
        assert sorted(seen[6 * around : 6 * around + 6]) == list(range(6))
    assert seen[:6] != seen[6:12]


def test_rows_can_be_named():
    data = rows(6)
    subject = source(data=data)
    subject.next_batch(3, [4])
    assert {tuple(row["prompt_ids"].tolist()) for row in subject.buffer.rows} == {
        tuple(data[4]["prompt_ids"])
    }


@pytest.mark.parametrize("every", [1, 3])
def test_new_pairs_come_as_often_as_told(every):
    subject = source(settings=Settings(segment_length=4, sample_every=every, temperature=5.0))
    made = []
    for _ in range(6):
        subject.next_batch(2)
        made.append(subject._totals["made"])
    assert made == [2 * (i // every + 1) for i in range(6)]


def test_a_response_that_comes_back_unchanged_is_not_kept():
    """The response is what the policy says anyway, so with top_k=1 every segment is the same."""
    model = policy()
    data = [{"prompt_ids": prompt, "response_ids": greedy(model, prompt, 8)} for prompt in PROMPTS]
    subject = SelfAugmented(
        model, data, Settings(segment_length=4, top_k=1), eos_token_id=None, pad_token_id=PAD
    )
    with pytest.raises(ValueError, match="model: expected one whose responses differ"):
        subject.next_batch(3)
    assert len(subject.buffer) == 0
    found = subject.statistics()
    assert found["segment/identical"] == subject._totals["made"] > 0


def test_statistics_are_of_what_was_made():
    data = [{"prompt_ids": [1, 5], "response_ids": [*range(3, 15), EOS]}] * 4
    subject = source(settings=Settings(segment_length=4, temperature=3.0, top_k=0), data=data)
    for _ in range(5):
        subject.next_batch(8)
    found = subject.statistics()
    # the segment starts at 0 to 6 of 13 tokens
    assert 0 < found["segment/start_share"] < 6 / 13
    ended = sum(len(row["rejected_ids"]) < 13 for row in subject.buffer.rows)
    assert ended > 0
    assert found["segment/eos_share"] == ended / 40
    assert found["buffer/size"] == len(subject.buffer) == 40
    assert found["buffer/reuse"] == 1.0
    assert found["segment/identical"] == 0


def test_the_share_before_the_segment_is_of_the_response(monkeypatch):
    """A segment that ends at once leaves what was before it, and its end."""

    def ended(model, prompts, lengths, **options):
        return [[EOS]] * len(prompts)

    monkeypatch.setattr("fusedpo.recipes.self_augmented.source.generate_segments", ended)
    subject = source()
    subject.next_batch(6)
    shares = [(len(x["rejected_ids"]) - 1) / len(x["chosen_ids"]) for x in subject.buffer.rows]
    assert len(shares) == 6 and len(set(shares)) > 2
    assert subject.statistics()["segment/start_share"] == pytest.approx(sum(shares) / 6)


def test_a_response_that_just_fits_is_not_cut():
    subject = source(data=[{"prompt_ids": [1, 5], "response_ids": [*range(3, 24), EOS]}])
    assert subject.truncated == 0


def test_long_responses_lose_their_end_and_long_prompts_are_refused():
    settings = Settings(segment_length=4, max_length=10)
    data = [{"prompt_ids": [1, 5, 6], "response_ids": [*range(3, 20), EOS]}]
    subject = source(settings=settings, data=data)
    assert subject.truncated == 1
    for row in subject.next_batch(4):
        assert row["chosen_ids"].tolist() == list(range(3, 10))
        assert len(row["rejected_ids"]) <= 7
    data[0]["prompt_ids"] = [1] * 10
    with pytest.raises(ValueError, match=r"rows\[0\]: expected a prompt shorter than max_length"):
        source(settings=settings, data=data)


@pytest.mark.parametrize(
    ("row", "got"),
    [
        ({"prompt_ids": [1], "response_ids": []}, "an empty one"),
        ({"prompt_ids": [], "response_ids": [1]}, "an empty one"),
        ({"prompt_ids": [1], "text": "a"}, "prompt_ids, text"),
    ],
)
def test_rows_are_checked(row, got):
    with pytest.raises(ValueError, match=rf"rows\[1\]: expected .*, got {got}$"):
        source(data=[rows(1)[0], row])
    with pytest.raises(ValueError, match="rows: expected at least one"):
        source(data=[])


def test_token_rows_will_do():
    data = tiny.token_rows(3)
    subject = SelfAugmented(tiny.model(), data, eos_token_id=2, pad_token_id=0)
    subject.next_batch(3)
    found = {
        (*row["prompt_ids"].tolist(), None, *row["chosen_ids"].tolist())
        for row in subject.buffer.rows
    }
    assert found
    assert found <= {
        (*row["prompt_ids"].tolist(), None, *row["chosen_ids"].tolist()) for row in data
    }


# the reference


@pytest.mark.parametrize("mode", ["ema", "policy", "fixed"])
def test_the_reference_is_renewed_at_its_steps_and_stays_between(mode):
    """The average at every second step, the reference at every third; by hand."""
    model, reference = policy(), policy(1)
    every = {} if mode == "fixed" else {"ref_every": 3}
    settings = Settings(segment_length=4, ema_decay=0.75, ema_every=2, ref_mode=mode, **every)
    own = weights(reference)
    subject = source(model, settings, ref_model=reference)
    average = weights(model)
    expected = own if mode == "fixed" else average
    assert torch.equal(weights(reference), expected)
    for step in range(1, 8):
        nudge(model, step)
        subject.after_step(model)
        if step % 2 == 0:
            average = 0.75 * average + 0.25 * weights(model)
        if step % 3 == 0 and mode != "fixed":
            expected = {"ema": average, "policy": weights(model)}[mode]
        error = (weights(reference) - expected).abs().max()
        assert error <= (0 if mode == "fixed" else 1e-6 * expected.abs().max()), step
    assert (subject.steps, subject.average.updates) == (7, 3)
    # what is generated with has nothing to do with the reference
    error = (weights(subject.average.module) - average).abs().max()
    assert error <= 1e-6 * average.abs().max()


def test_a_reference_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match=r"model: expected the .* the average was made of"):
        source(policy(), ref_model=policy(hidden_size=32))


def log_ratio_margins(settings: Settings, *parts: int) -> torch.Tensor:
    """DPO's margin at each step of a short run, against the reference that the settings renew; in
    parts of so many steps."""
    model, reference, found = policy(), policy(), []
    collate = PreferenceCollator(PAD)

    def loss_of(batch) -> torch.Tensor:
        inputs = collate(batch)
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ref_hidden = reference.model(**ids).last_hidden_state
        out = preference_loss(
            DPO(beta=0.1),
            model.model(**ids).last_hidden_state,
            model.lm_head.weight,
            inputs["labels"],
            shift=True,
            ref_hidden=ref_hidden,
            ref_weight=reference.lm_head.weight,
        )
        found.append(out.metrics["rewards/margins"])
        return out.loss

    subject, optimizer = source(model, settings), torch.optim.RMSprop(model.parameters(), lr=3e-4)
    for steps in parts:
        plain_loop(
            model, subject, loss_of, optimizer, steps=steps, batch_size=4, ref_model=reference
        )
    return torch.stack(found)


def test_the_margin_leaves_zero_between_two_renewals():
    """With a reference that is a step behind it never would."""
    settings = {"segment_length": 4, "max_length": 24, "sample_every": 8, "temperature": 2.0}
    found = log_ratio_margins(Settings(**settings), 216)
    assert found[20:108].mean() > 0.2 and found[128:].mean() > 0.2
    # the step after it, and not the one before
    assert found[107] > 5 * found[108].abs()
    behind = log_ratio_margins(Settings(**settings, ref_every=1), 60)
    assert behind[20:].mean() < 0.1 * found[20:60].mean()


def test_a_loop_goes_on_where_the_one_before_it_ended():
    settings = Settings(segment_length=4, max_length=24, temperature=2.0, ref_every=5)
    assert torch.equal(log_ratio_margins(settings, 12), log_ratio_margins(settings, 3, 9))


# a stopped run


def steps(model, subject: SelfAugmented, start: int, stop: int) -> list[list[dict]]:
    found = []
    for step in range(start, stop):
        found.append(plain(subject.next_batch(3)))
        nudge(model, step)
        subject.after_step(model)
    return found


@pytest.mark.holds(46)
@pytest.mark.parametrize(
    "config", [{}, {"tie_word_embeddings": True}], ids=["a head of its own", "tied"]
)
def test_a_loaded_run_makes_the_same_batches(tmp_path, config):
    settings = Settings(
        segment_length=4, buffer_size=7, sample_every=2, temperature=2.0, ema_every=2, ref_every=4
    )
    model = policy(**config)
    whole = source(model, settings, ref_model=policy(1, **config).to(torch.bfloat16))
    steps(model, whole, 0, 5)
    whole.save(tmp_path)
    resumed_model = policy(**config)
    resumed_model.load_state_dict(model.state_dict())
    rest = steps(model, whole, 5, 11)
    # stopped twice: what is saved of a resumed run is the whole run's
    for start, stop in ((5, 7), (7, 11)):
        reference = policy(9, **config).to(torch.bfloat16)
        resumed = source(policy(8, **config), settings, ref_model=reference)
        resumed.load(tmp_path)
        assert steps(resumed_model, resumed, start, stop) == rest[start - 5 : stop - 5]
        resumed.save(tmp_path)
    assert resumed.statistics() == whole.statistics()
    assert resumed.steps == whole.steps == 11
    for ours, theirs in (
        (resumed.average.module, whole.average.module),
        (resumed.ref_model, whole.ref_model),
    ):
        assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.holds(46)
@pytest.mark.parametrize("mode", ["ema", "policy", "fixed"])
def test_a_loaded_run_has_the_reference_of_its_save(tmp_path, mode):
    """Bit by bit, between two renewals, in each mode; and then goes on with it."""
    model, reference = policy(), policy(1)
    every = {} if mode == "fixed" else {"ref_every": 3}
    settings = Settings(segment_length=4, ref_mode=mode, **every)
    whole = source(model, settings, ref_model=reference)
    steps(model, whole, 0, 4)
    whole.save(tmp_path)
    saved = weights(reference)
    assert not torch.equal(saved, weights(whole.average.module))
    again, other = policy(), policy(5)
    again.load_state_dict(model.state_dict())
    resumed = source(policy(8), settings, ref_model=other)
    resumed.load(tmp_path)
    assert torch.equal(weights(other), saved)
    for subject, trained in ((whole, model), (resumed, again)):
        steps(trained, subject, 4, 7)
    assert torch.equal(weights(other), weights(reference))
    assert torch.equal(weights(reference), saved) == (mode == "fixed")


@pytest.mark.fault(68)
def test_a_save_without_its_reference_is_refused(tmp_path):
    bare, whole = source(), source(ref_model=policy(1))
    bare.save(tmp_path / "bare")
    whole.save(tmp_path / "whole")
    before = weights(whole.ref_model)
    with pytest.raises(ValueError, match="save of a run with a reference to renew, got one witho"):
        whole.load(tmp_path / "bare")
    with pytest.raises(ValueError, match="save of a run without a reference to renew, got one wi"):
        bare.load(tmp_path / "whole")
    tensors, meta = read_file(tmp_path / "whole" / FILE)
    del meta["steps"]
    write_file(tmp_path / "old" / FILE, tensors, meta)
    with pytest.raises(ValueError, match="with its step and its reference, got one of an earlier"):
        whole.load(tmp_path / "old")
    assert torch.equal(weights(whole.ref_model), before)


@pytest.mark.holds(46)
def test_each_rank_has_a_file_and_the_first_has_the_average(tmp_path):
    model = policy()
    ranks = [source(model, rank=rank) for rank in (0, 1)]
    for subject in ranks:
        subject.next_batch(3)
    nudge(model)
    for subject in ranks:
        subject.after_step(model)
        subject.save(tmp_path)
    names = safetensors.torch.load_file(tmp_path / "self_augmented-1.safetensors")
    assert not any(name.startswith("average.") for name in names)
    for rank, subject in enumerate(ranks):
        again = source(policy(8), rank=rank)
        again.load(tmp_path)
        assert plain(again.next_batch(3)) == plain(subject.next_batch(3))
    with pytest.raises(FileNotFoundError, match="with as many processes as saved it"):
        source(model, rank=2).load(tmp_path)
    ranks[0].after_step(model)
    ranks[0].save(tmp_path)
    with pytest.raises(ValueError, match="expected files of one save, got 1 and 2 updates"):
        source(model, rank=1).load(tmp_path)
    for _ in range(2):
        ranks[1].after_step(model)
    ranks[1].save(tmp_path)
    with pytest.raises(ValueError, match="expected files of one save, got 3 and 2 updates"):
        source(model, rank=1).load(tmp_path)
    # what a model makes anew when it is loaded is not in the file
    (buffer,) = (name for name, _ in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    kept = safetensors.torch.load_file(tmp_path / FILE)
    assert f"average.{buffer}" not in kept and "average.lm_head.weight" in kept


@pytest.mark.fault(68)
def test_other_rows_and_other_models_are_refused(tmp_path):
    source().save(tmp_path)
    with pytest.raises(ValueError, match="expected a run on these 3 rows, got one saved with 6"):
        source(data=rows(3)).load(tmp_path)
    with pytest.raises(ValueError, match="expected the average of this model"):
        source(policy(hidden_size=32)).load(tmp_path)


FILE = "self_augmented-0.safetensors"


@pytest.mark.fault(68)
@pytest.mark.holds(46)
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.99])
def test_a_file_that_is_cut_off_is_told(tmp_path, kept):
    subject = source()
    subject.next_batch(3)
    subject.save(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[: int(kept * len(data))])
    before = plain(subject.buffer.rows), weights(subject.average.module)
    with pytest.raises(ValueError, match=rf"{FILE}: expected a complete file .*; resume from an e"):
        subject.load(tmp_path)
    assert plain(subject.buffer.rows) == before[0]
    assert torch.equal(weights(subject.average.module), before[1])


@pytest.mark.fault(68)
@pytest.mark.holds(46)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_changed_bit_is_told(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("changed")
    buffer = ReplayBuffer(4)
    for number in range(4):
        buffer.push(pair(number))
    buffer.save(folder)
    path = folder / "buffer.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    again = ReplayBuffer(4)
    try:
        again.load(folder)
    except ValueError as error:
        assert str(path) in str(error)
        assert len(again) == 0
    else:
        # spaces that fill the header up mean nothing
        assert plain(again.rows) == plain(buffer.rows)


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_a_tensor_of_another_name_is_told(tmp_path):
    """Names are part of what the checksum is of, with the same bytes in the same order."""
    path = tmp_path / "some.safetensors"
    write_file(path, {"a": torch.ones(2), "c": torch.zeros(2)}, {})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    renamed = {"a": torch.ones(2), "b": torch.zeros(2)}
    safetensors.torch.save_file(renamed, path, metadata=metadata)
    with pytest.raises(ValueError, match="its checksum is another one"):
        read_file(path)


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_a_file_of_another_format_is_told(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr("fusedpo.files._FORMAT", "fusedpo.self_augmented/2")
        source().save(tmp_path)
    with pytest.raises(ValueError, match=r"expected fusedpo.self_augmented/1, got fusedpo.*/2"):
        source().load(tmp_path)


@pytest.mark.fault(68)
@pytest.mark.holds(46)
@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.replace"])
def test_a_save_that_fails_keeps_the_one_before(tmp_path, monkeypatch, where):
    subject = source()
    subject.next_batch(3)
    subject.save(tmp_path)
    good = (tmp_path / FILE).read_bytes()

    def fail(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    subject.next_batch(3)
    with monkeypatch.context() as full:
        full.setattr(where, fail if "save" in where else lambda *a: fail(None, a[0]))
        with pytest.raises(OSError, match="no space left"):
            subject.save(tmp_path)
    assert os.listdir(tmp_path) == [FILE]
    assert (tmp_path / FILE).read_bytes() == good


@pytest.mark.parametrize("lengths", [[2, -1, 1], [3, -1, 0]])
def test_lengths_that_are_none_are_refused(lengths):
    """They add up to the two tokens that there are."""
    tensors = {"a.tokens": torch.zeros(2, dtype=torch.int32), "a.lengths": torch.tensor([lengths])}
    with pytest.raises(ValueError, match="lengths that are none"):
        unpack_rows(tensors, {"a.inputs": [{}]}, "a.")


def test_a_file_is_on_the_disk_before_it_is_the_file(tmp_path, monkeypatch):
    """Else a power cut could leave an empty one in the place of the one before."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (done.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(
        "os.replace", lambda a, b: (done.append((os.stat(a).st_ino, Path(b))), replace(a, b))
    )
    subject = source()
    subject.save(tmp_path)
    number = (tmp_path / FILE).stat().st_ino
    assert done == [number, (number, tmp_path / FILE)]


# the loop


def test_the_plain_loop_trains_against_a_moving_reference():
    model, reference = policy(), policy()
    settings = Settings(segment_length=4, temperature=2.0, max_length=24, ref_every=4)
    subject = source(model, settings)
    collate, seen, trained = PreferenceCollator(PAD), [], []

    def loss_of(batch) -> torch.Tensor:
        seen.append(weights(reference))
        trained.append(weights(model))
        inputs = collate(batch)
        labels = mask_shared_prefix(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ref_hidden = reference.model(**ids).last_hidden_state
        return preference_loss(
            DPO(beta=0.5),
            model.model(**ids).last_hidden_state,
            model.lm_head.weight,
            labels,
            shift=True,
            ref_hidden=ref_hidden,
            ref_weight=reference.lm_head.weight,
        ).loss

    start = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = plain_loop(
        model,
        subject,
        loss_of,
        optimizer,
        steps=12,
        batch_size=4,
        ref_model=reference,
        max_grad_norm=1.0,
    )
    assert len(history) == 12
    # policy and reference are the same at first
    assert history[0]["loss"] == pytest.approx(np.log(2), rel=1e-5, abs=0)
    assert sum(step["loss"] for step in history[6:]) / 6 < np.log(2)
    assert history[-1]["buffer/size"] == len(subject.buffer) > 20
    # of the step after a renewal, and of those until the next
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert torch.equal(seen[0], start)
    assert [i + 1 for i, change in enumerate(changed) if change] == [4, 8]
    assert subject.average.updates == 12
    assert torch.equal(weights(reference), weights(subject.average.module))
    assert not torch.equal(weights(reference), weights(model))
    # the gradient of a step is clipped to 1
    moved = (trained[1] - trained[0]).norm()
    assert moved <= 0.1 * (1 + 1e-4)


def test_the_plain_loop_is_one_written_out():
    """Without a reference and without a limit of the gradient."""
    collate = PreferenceCollator(PAD)

    def start():
        model = policy(3)

        def loss_of(batch) -> torch.Tensor:
            inputs = collate(batch)
            ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            logits = model(**ids).logits[:, :-1].flatten(0, 1)
            labels = inputs["labels"][:, 1:].flatten()
            return 30 * torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)

        return model, source(model), loss_of

    model, subject, loss_of = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = plain_loop(model, subject, loss_of, optimizer, steps=4, batch_size=3)

    truth, by_hand, loss_of = start()
    parameters = list(truth.parameters())
    for found in history:
        loss = loss_of(by_hand.next_batch(3))
        gradients = torch.autograd.grad(loss, parameters)
        assert torch.cat([gradient.flatten() for gradient in gradients]).norm() > 1
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.01 * gradient
        by_hand.after_step(truth)
        expected = {"loss": loss.item(), **by_hand.statistics()}
        assert found == pytest.approx(expected, rel=1e-5, abs=0)
    assert len(history) == by_hand.average.updates == subject.average.updates == 4
    for mine, same in ((model, truth), (subject.average.module, by_hand.average.module)):
        assert (weights(mine) - weights(same)).norm() < 1e-5 * weights(same).norm()


# the shared prefix


def naive_mask(ids, labels, masks) -> list[list[int]]:
    """Row by row, as the docstring says it."""
    out = [list(row) for row in labels]
    for chosen in range(len(ids) // 2):
        pair = (chosen, chosen + len(ids) // 2)
        places = [[t for t, real in enumerate(masks[row]) if real] for row in pair]
        shared = []
        for left, right in zip(*places, strict=False):
            if ids[pair[0]][left] != ids[pair[1]][right]:
                break
            scored = labels[pair[0]][left], labels[pair[1]][right]
            # the first token of a row is predicted by nothing
            if scored[0] == scored[1] != -100 and left != places[0][0]:
                shared.append((left, right))
        for row, column in ((pair[side], side) for side in (0, 1)):
            rest = {t for t in places[column][1:] if labels[row][t] != -100}
            if shared and not rest - {both[column] for both in shared}:
                shared.pop()
                break
        for left, right in shared:
            out[pair[0]][left] = out[pair[1]][right] = -100
    return out


@st.composite
def pair_batches(draw):
    """Of a small vocabulary, so that rows begin alike; padded on either side."""
    left = draw(st.booleans())
    sequences, prompts = [], []
    for _ in range(pairs := draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(1, 3), max_size=3))
        common = draw(st.lists(st.integers(1, 3), max_size=3))
        for _ in range(2):
            tail = draw(st.lists(st.integers(1, 3), max_size=3))
            sequences.append(prompt + common + tail or [1])
            prompts.append(len(prompt))
    order = [*range(0, 2 * pairs, 2), *range(1, 2 * pairs, 2)]
    width = max(map(len, sequences)) + draw(st.integers(0, 2))
    ids, labels, masks = [], [], []
    for row in order:
        sequence, prompt = sequences[row], prompts[row]
        target = [-100] * min(prompt, len(sequence)) + sequence[prompt:]
        holes = draw(st.sets(st.integers(0, len(sequence) - 1), max_size=2))
        target = [-100 if i in holes else token for i, token in enumerate(target)]
        fill = width - len(sequence)
        for out, values, padding in (
            (ids, sequence, 0),
            (labels, target, -100),
            (masks, [1] * len(sequence), 0),
        ):
            out.append([padding] * fill + values if left else values + [padding] * fill)
    return ids, labels, masks


@given(pair_batches())
def test_mask_is_the_one_written_out(batch):
    ids, labels, masks = batch
    found = mask_shared_prefix(*map(torch.tensor, batch))
    assert found.tolist() == naive_mask(ids, labels, masks)
    for before, after, real in zip(labels, found.tolist(), masks, strict=True):
        first = real.index(1)
        scored = [t for t in range(first + 1, len(ids[0])) if before[t] != -100]
        assert not scored or any(after[t] != -100 for t in scored)


def test_mask_by_example():
    ids = torch.tensor([[1, 5, 6, 7, 8], [1, 5, 6, 0, 0], [1, 5, 6, 9, 8], [1, 5, 6, 0, 0]])
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, 0] = -100
    expected = [
        [-100, -100, -100, 7, 8],
        # equal ones keep their last
        [-100, -100, 6, -100, -100],
        [-100, -100, -100, 9, 8],
        [-100, -100, 6, -100, -100],
    ]
    before = labels.clone()
    assert mask_shared_prefix(ids, labels).tolist() == expected
    assert mask_shared_prefix(ids, labels, (ids != 0).long()).tolist() == expected
    assert torch.equal(labels, before)


def test_mask_reaches_the_last_column_of_a_row_padded_left():
    ids = torch.tensor([[0, 1, 5, 6], [1, 5, 6, 7]])
    # the 5 is scored in one alone, and so does not cancel
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, 6, 7]])
    found = mask_shared_prefix(ids, labels, (ids != 0).long())
    assert found.tolist() == [[-100, -100, 5, -100], [-100, -100, -100, 7]]


def test_mask_takes_another_ignore_index():
    ids = torch.tensor([[1, 5, 6], [1, 5, 7]])
    found = mask_shared_prefix(ids, torch.tensor([[-1, 5, 6], [-1, 5, 7]]), ignore_index=-1)
    assert found.tolist() == [[-1, -1, 6], [-1, -1, 7]]


def naive_dpo(model, batch, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO on summed log-probabilities, with a constant for the reference, and its gradient."""
    model.zero_grad()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = labels[:, 1:]
    logp = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (logp * (targets != -100)).sum(1).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected) + 0.2).mean()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
def test_the_mask_changes_neither_dpo_nor_its_gradient(left):
    model = policy().double()
    subject = source(settings=Settings(segment_length=3, temperature=3.0), data=rows(12, 4))
    batch = PreferenceCollator(PAD)(subject.next_batch(12))
    if left:
        for i, real in enumerate(batch["attention_mask"].sum(1).tolist()):
            for value in batch.values():
                value[i] = value[i].roll(-real + value.shape[1])
    labels = mask_shared_prefix(batch["input_ids"], batch["labels"], batch["attention_mask"])
    scored, before = ((t != -100).sum() for t in (labels, batch["labels"]))
    assert scored < 0.9 * before
    loss, gradient = naive_dpo(model, batch, batch["labels"])
    masked, masked_gradient = naive_dpo(model, batch, labels)
    assert abs(masked - loss) <= 1e-12 * abs(loss)
    # the model's norms compute in fp32
    assert (masked_gradient - gradient).abs().max() <= 1e-6 * gradient.abs().max()
    # one scored token less already shows
    last = (labels != -100).long().cumsum(1).argmax(1, keepdim=True)
    _, other = naive_dpo(model, batch, labels.scatter(1, last[:1], -100))
    assert (other - gradient).abs().max() > 1e-3 * gradient.abs().max()


@pytest.mark.parametrize(
    ("ids", "labels", "mask", "message"),
    [
        ((3, 4), (3, 4), None, r"input_ids: expected \[2 P, T\]"),
        ((4,), (4,), None, r"input_ids: expected \[2 P, T\]"),
        ((2, 4), (2, 3), None, "labels: expected the shape of input_ids"),
        ((2, 4), (2, 4), (2, 3), "attention_mask: expected the shape of input_ids"),
    ],
)
def test_mask_checks_shapes(ids, labels, mask, message):
    with pytest.raises(ValueError, match=message):
        mask_shared_prefix(
            torch.ones(ids, dtype=torch.int64),
            torch.ones(labels, dtype=torch.int64),
            None if mask is None else torch.ones(mask),
        )


@pytest.mark.parametrize(
    ("row", "pad", "where"),
    [
        ([1, VOCAB], PAD, r"rows\[1\]"),
        ([-1, 1], PAD, r"rows\[1\]"),
        ([1, 2], VOCAB, "pad_token_id"),
    ],
)
def test_tokens_that_the_model_has_no_row_for_are_refused(row, pad, where):
    given = [*rows(1), {"prompt_ids": row, "response_ids": [3, EOS]}]
    with pytest.raises(ValueError, match=rf"^{where}: expected tokens in \[0, {VOCAB}\), of which"):
        SelfAugmented(policy(), given, SHORT, eos_token_id=EOS, pad_token_id=pad)
