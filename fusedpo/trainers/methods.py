"""How each method gets its batches from rows, and what a run of it is watched by.

A method is chosen by the loss: pairs as they are in the dataset, pairs with semantic similarities,
pairs that the model makes of its own text, a short and a long context, or sampled responses.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fusedpo import losses
from fusedpo.checks import bad_value, in_range, positive, vocabulary
from fusedpo.losses import Loss, MarginLoss, PolicyLoss, PreferenceLoss, SemanticSPPO, ShortToLong
from fusedpo.losses.base import Input, check_hyperparameters, flag, hyperparameter, one_of
from fusedpo.recipes import self_augmented as recipe
from fusedpo.recipes import stdlib_pairs
from fusedpo.recipes.groups import token_overlap
from fusedpo.report import PAIR_SIGNALS, Signal
from fusedpo.trainers.layouts import CONTEXTS, PAIRS
from fusedpo.trainers.rows import Splits, Tokenized, check_row, tokenize

if TYPE_CHECKING:
    from fusedpo.trainers.transformers import FusedTrainerMixin

Passages = tuple[list[stdlib_pairs.Passage], list[stdlib_pairs.Passage]]


@dataclass(frozen=True)
class Defaults:
    """What depends on whether a model is tuned further or starts from random weights."""

    learning_rate: float
    batch_size: int
    max_steps: int | None
    epochs: float


TUNED = Defaults(learning_rate=1e-6, batch_size=8, max_steps=None, epochs=1.0)

# the demonstration's text: pieces of about 40 tokens, so that a CPU sees many of them
_PROMPT_CHARS = _RESPONSE_CHARS = 150
_DEMO_HELD_OUT = 512
# rows with two contexts, which take longer to make, to train on and held out
_DEMO_CONTEXTS = (3000, 256)
# responses of which segments are written anew at a time
_GENERATED = 64


def whole(least: int) -> Any:
    """The check of a whole number."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise bad_value(name, f"a whole number of at least {least}", repr(value))
        return value

    return check


@dataclass(frozen=True)
class Pairs:
    """Pairs as they are in the dataset."""

    kind: ClassVar[str] = PAIRS  # of rows, see layouts
    unit: ClassVar[str] = "pairs"  # of a batch
    responses: ClassVar[tuple[str, ...]] = ("chosen_ids", "rejected_ids")  # of a row in token ids
    signals: ClassVar[tuple[Signal, ...]] = PAIR_SIGNALS
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 32, 280, 1.0)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def check(self, loss: Loss) -> None:
        """Whether the loss can be trained this way."""
        if not isinstance(loss, PreferenceLoss) or loss.roles != ("chosen", "rejected"):
            remedy = "train it with fusedpo.preference_loss in a loop of your own"
            raise bad_value("loss", "a loss of chosen and rejected responses", repr(loss), remedy)

    def check_batch(self, loss: Loss, size: int) -> None:
        """Whether a batch of so many rows can be trained on."""

    def numbers(self, loss: Loss) -> Mapping[str, Input]:
        """What the loss takes from further columns of the rows, by their names."""
        return loss.inputs

    def demo(self, passages: Passages, seed: int) -> Splits:
        """Rows that need nothing but this machine."""
        train, held_out = (
            stdlib_pairs.make_pairs(
                part, prompt_chars=_PROMPT_CHARS, response_chars=_RESPONSE_CHARS, seed=seed
            )
            for part in passages
        )
        return Splits(train, held_out[:_DEMO_HELD_OUT], "the standard library", "pair")

    def checked(self, rows: Sequence[Mapping[str, Any]], splits: Splits, loss: Loss) -> list[Any]:
        """The rows, each checked, with the numbers that the loss takes."""
        names = [
            name
            for name, about in self.numbers(loss).items()
            if about.default is None or any(row.get(name) is not None for row in rows)
        ]
        return [check_row(row, splits.where(i), names) for i, row in enumerate(rows)]

    def tokenized(
        self, rows: Sequence[Any], tokenizer: Any, max_length: int, vocab_size: int | None = None
    ) -> Tokenized:
        """The rows in token ids, of which the model has rows."""
        return tokenize(rows, tokenizer, max_length, vocab_size)

    def is_saved(self, checkpoint: Path, processes: int) -> bool:
        """Whether every process has written to a checkpoint what the method goes on from."""
        return True

    def trainer(
        self, model: Any, args: Any, loss: Loss, train: Any, held_out: Any, **options: Any
    ) -> FusedTrainerMixin:
        """A trainer on these rows."""
        from fusedpo.trainers.transformers import PreferenceTrainer

        return PreferenceTrainer(
            model, args, loss=loss, train_dataset=train, eval_dataset=held_out, **options
        )


@dataclass(frozen=True)
class Semantic(Pairs):
    """Pairs with the similarity of their responses: from a column, or from an encoder."""

    signals: ClassVar[tuple[Signal, ...]] = (
        *PAIR_SIGNALS,
        Signal("similarity", "similarity", ".3f", "mean over training pairs"),
        Signal("win rate aimed at", "targets/chosen", ".3f", "chosen, softened", 0.5),
        Signal("repulsion", "eval_loss/states", "+.3f", "of the last hidden states"),
    )
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 32, 120, 1.0)

    encoder: str = hyperparameter(
        "lexical",
        "where similarities come from if the rows have none: a folder or name of a sentence "
        'encoder, or "lexical", common pieces of words',
        lambda name, value: value,
    )

    def checked(self, rows: Sequence[Mapping[str, Any]], splits: Splits, loss: Loss) -> list[Any]:
        from fusedpo.recipes import semantic

        if all(row.get(semantic.SIMILARITY) is None for row in rows):
            encode = (
                semantic.lexical_encoder()
                if self.encoder == "lexical"
                else semantic.sentence_encoder(self.encoder)
            )
            rows = semantic.add_columns(list(rows), encode=encode)
        return super().checked(rows, splits, loss)


@dataclass(frozen=True)
class SelfAugmented(Pairs):
    """Pairs that an average of the policy makes, by writing a segment of each response anew.

    Each of several processes writes pairs of its own rows into a buffer of its own, with an average
    that is the same on all of them. Held-out pairs are made likewise, by the policy as it is at the
    start: every process makes all of them, the same ones.
    """

    signals: ClassVar[tuple[Signal, ...]] = (
        *PAIR_SIGNALS,
        Signal("buffer size", "buffer/size", ".0f", "pairs"),
        Signal("buffer reuse", "buffer/reuse", ".2f", "times a pair was drawn"),
        Signal("segments with an end", "segment/eos_share", ".1%", "share"),
    )
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 16, 100, 1.0)

    segment_length: int = hyperparameter(256, "tokens written anew a response, at most", whole(1))
    ema_decay: float = hyperparameter(
        0.5, "of the average", lambda name, value: in_range(name, value, 0.0, 1.0)
    )
    buffer_size: int = hyperparameter(2000, "pairs kept", whole(1))
    sample_every: int = hyperparameter(1, "batches drawn for each batch written", whole(1))
    ema_every: int = hyperparameter(
        1, "steps between updates of the average (2 in the paper)", whole(1)
    )
    ref_every: int = hyperparameter(
        108,
        "steps between renewals of the reference, an epoch or so",
        whole(1),
        only={"ref_mode": ("ema", "policy")},
    )
    ref_mode: Literal["ema", "policy", "fixed"] = hyperparameter(
        "ema",
        "what the reference becomes: the average, or the policy; or it stays",
        one_of("ema", "policy", "fixed"),
    )
    skip_shared_prefix: bool = hyperparameter(
        True, "leave out the tokens that both responses begin with, where they cancel", flag
    )

    def check(self, loss: Loss) -> None:
        super().check(loss)
        self.settings().check_loss(loss.needs_reference)

    def settings(self, **others: Any) -> recipe.Settings:
        """Of the recipe: those that are told here, and others."""
        names = {f.name for f in fields(recipe.Settings)}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        return recipe.Settings(**own, **others)

    def is_saved(self, checkpoint: Path, processes: int) -> bool:
        folder = checkpoint / "self_augmented"
        return all(
            (folder / f"{name}-{rank}.safetensors").is_file()
            for rank in range(processes)
            for name in ("self_augmented", "ahead")
        )

    def trainer(
        self, model: Any, args: Any, loss: Loss, train: Any, held_out: Any, **options: Any
    ) -> FusedTrainerMixin:
        from fusedpo.trainers.self_augmented import (
            MaskSharedPrefix,
            SelfAugmentedCallback,
            SelfAugmentedDataset,
        )
        from fusedpo.trainers.transformers import (
            PreferenceCollator,
            PreferenceTrainer,
            padding_token,
        )

        tokenizer = options["processing_class"]
        lengths = (len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in [*train, *held_out])
        settings = self.settings(max_length=max(lengths), seed=args.seed)
        pad = padding_token(tokenizer, vocabulary(model))
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
        source = recipe.SelfAugmented(model, train, settings, rank=args.process_index, **ids)
        # each row once, however often training makes new pairs and however many it keeps
        once = replace(
            settings, seed=args.seed + 1, sample_every=1, buffer_size=max(1, len(held_out))
        )
        by_itself = recipe.SelfAugmented(model, held_out, once, **ids)
        for start in range(0, len(held_out), _GENERATED):
            by_itself.next_batch(min(_GENERATED, len(held_out) - start))
        dataset = SelfAugmentedDataset(source)
        collator: Any = PreferenceCollator(pad)
        # of sums, what both responses begin with cancels in the margin
        by_sums = isinstance(loss, MarginLoss) and loss.gradient_structure.unit == "margin"
        if self.skip_shared_prefix and by_sums:
            collator = MaskSharedPrefix(collator)
        trainer = PreferenceTrainer(
            model,
            args,
            loss=loss,
            train_dataset=dataset,
            eval_dataset=list(by_itself.buffer.rows),
            data_collator=collator,
            **options,
        )
        settings.check_loss(loss.needs_reference, adapters=trainer.ref_model is None)
        trainer.add_callback(SelfAugmentedCallback(dataset, ref_model=trainer.ref_model))
        return trainer


@dataclass(frozen=True)
class TwoContexts(Pairs):
    """Rows with a short and a long context: context, long_context, instruction and the pair."""

    kind: ClassVar[str] = CONTEXTS
    signals: ClassVar[tuple[Signal, ...]] = (
        *PAIR_SIGNALS,
        Signal(
            "gap of rewards", "eval_rewards/short_to_long_gap", ".3f", "|short - long| of chosen"
        ),
        Signal("reward on the long", "eval_rewards/long_chosen", ".3f", "chosen"),
    )
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 12, 100, 1.0)

    def check(self, loss: Loss) -> None:
        assert isinstance(loss, ShortToLong), "the loss decides the method"

    def demo(self, passages: Passages, seed: int) -> Splits:
        from fusedpo.recipes.short_to_long import needle_rows

        train, held_out = (
            needle_rows(
                part,
                # characters a token, about: what is tokenized is not known yet
                count=lambda text: -(-len(text) // 4),
                ratio=0.4,
                max_length=280,
                rows=rows,
                opening_chars=40,
                response_chars=100,
                passage_chars=200,
                rejected_from="elsewhere",
                request="Continue: ",
                seed=seed,
            )
            for part, rows in zip(passages, _DEMO_CONTEXTS, strict=True)
        )
        return Splits(train, held_out, "the standard library", "row")

    def checked(self, rows: Sequence[Mapping[str, Any]], splits: Splits, loss: Loss) -> list[Any]:
        return list(rows)

    def tokenized(
        self, rows: Sequence[Any], tokenizer: Any, max_length: int, vocab_size: int | None = None
    ) -> Tokenized:
        from fusedpo.recipes.short_to_long import tokenize_rows

        done = tokenize_rows(rows, tokenizer, max_length, vocab_size=vocab_size)
        return Tokenized(done.rows, done.dropped)

    def trainer(
        self, model: Any, args: Any, loss: Loss, train: Any, held_out: Any, **options: Any
    ) -> FusedTrainerMixin:
        from fusedpo.recipes.short_to_long import ShortToLongCollator
        from fusedpo.trainers.transformers import padding_token

        assert isinstance(loss, ShortToLong), "the loss decides the method"
        pad = padding_token(options["processing_class"], vocabulary(model))
        options["data_collator"] = ShortToLongCollator(pad, both=loss.both)
        return super().trainer(model, args, loss, train, held_out, **options)


@dataclass(frozen=True)
class Sampled(Pairs):
    """Responses that the policy samples, with rewards; of a pair, prompt and chosen are used."""

    unit: ClassVar[str] = "prompts"
    signals: ClassVar[tuple[Signal, ...]] = (
        Signal("held-out reward", "eval_reward", ".4f", "mean over prompts"),
        Signal("training reward", "reward", ".4f", "mean over responses"),
        Signal("within groups", "reward_std", ".4f", "standard deviation of rewards"),
        Signal("ratio", "ratio/mean", ".4f", "to the policy that sampled", 1.0),
        Signal("KL from it", "kl_old", ".2e", "nats a token"),
    )
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 8, 120, 1.0)

    reward: str = hyperparameter(
        "overlap",
        '"overlap": tokens in common with the chosen response; or module:function, from a row '
        "and token ids to a number",
        lambda name, value: value,
    )
    group_size: int = hyperparameter(8, "responses a prompt", whole(2))
    max_new_tokens: int = hyperparameter(48, "of a response", whole(1))
    updates: int = hyperparameter(2, "optimizer steps on one batch of samples", whole(1))
    temperature: float = hyperparameter(1.0, "of sampling", positive)

    def is_saved(self, checkpoint: Path, processes: int) -> bool:
        return all(
            (checkpoint / f"samples-{rank}.safetensors").is_file() for rank in range(processes)
        )

    def check(self, loss: Loss) -> None:
        assert isinstance(loss, PolicyLoss), "the loss decides the method"

    def trainer(
        self, model: Any, args: Any, loss: Loss, train: Any, held_out: Any, **options: Any
    ) -> FusedTrainerMixin:
        from fusedpo.trainers.groups import GroupTrainer

        return GroupTrainer(
            model,
            args,
            loss=loss,
            reward=reward_function(self.reward),
            group_size=self.group_size,
            max_new_tokens=self.max_new_tokens,
            updates=self.updates,
            temperature=self.temperature,
            train_dataset=train,
            eval_dataset=held_out,
            **options,
        )


def reward_function(name: str) -> Any:
    """``overlap``, or the function that ``module:function`` names."""
    if name == "overlap":
        return lambda row, response: token_overlap(response, list(row["chosen_ids"]))
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        expected = '"overlap", or module:function that can be imported'
        raise bad_value("reward", expected, repr(name)) from error


def method_of(loss: type[Loss]) -> type[Pairs]:
    """The method that serves a loss; ``SelfAugmented`` is chosen by name."""
    if issubclass(loss, PolicyLoss):
        return Sampled
    if issubclass(loss, losses.KTO):
        from fusedpo.trainers.kto import Responses

        return Responses
    if issubclass(loss, ShortToLong):
        return TwoContexts
    return Semantic if issubclass(loss, SemanticSPPO) else Pairs
