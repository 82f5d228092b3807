"""Preference training with ``transformers.Trainer``, without logits.

    trainer = PreferenceTrainer(
        model, TrainingArguments("out", report_to="none"), loss=SimPO(),
        train_dataset=rows, processing_class=tokenizer,
    )
    trainer.train()

Batches are pairs: the chosen rows, then the rejected rows. A model is entered through its wrapper,
so that what the wrapper does before and after a forward (DistributedDataParallel, FSDP, autocast)
is done; see ``add_fused_head``. A trainer of one's own gets the same by a mixin:

    class MyTrainer(PreferenceTrainerMixin, Trainer): ...
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fusedpo.checks import bad_type, bad_value, known_tokens, vocabulary
from fusedpo.data.rows import TokenRow
from fusedpo.engine.plan import Plan
from fusedpo.functional import LossOutput, linear_logprobs, preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.model_head import (
    Score,
    add_fused_head,
    aligned_labels,
    at_head,
    causal_model,
    check_options,
    evaluating,
    fused_forward,
    hidden_and_head,
    remove_fused_head,
    strip_virtual_tokens,
)
from fusedpo.recipes.short_to_long import ShortToLongCollator, pad_sequences
from fusedpo.trainers.packing import packing_gap

try:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput
except ImportError as error:
    raise ImportError(
        "fusedpo.trainers.transformers needs transformers: pip install 'fusedpo[demo]'"
    ) from error

__all__ = [
    "FusedTrainer",
    "FusedTrainerMixin",
    "PreferenceCollator",
    "PreferenceTrainer",
    "PreferenceTrainerMixin",
    "add_fused_head",
    "hidden_and_head",
    "padding_token",
    "remove_fused_head",
]

if TYPE_CHECKING:
    _Base = Trainer
else:  # mixins are bases of none but Trainers
    _Base = object

# what of a batch is the loss's, beside its own inputs; the rest is the model's
_OF_LOSS = ("labels", "cu_seqlens", "advantages", "old_logprobs", "importance_weights")


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of token ids to one batch of 2 P sequences, chosen first.

    Attributes:
        pad_token_id: fills the rows; masked, so any valid token will do.
        pad_to_multiple_of: round the length up to a multiple of this; packed, that of all rows.
        packed: one row after the other without padding, told apart by their positions, for models
            whose attention does so (in transformers FlashAttention, and SDPA since 4.53). The
            trainer looks at the first batch whether the model does, and refuses one that does not.
        vocab_size: rows of the model's embedding, which no token may be beyond; not looked at if
            None.

    Raises:
        TypeError, ValueError: for a pad_to_multiple_of that is no whole number, or negative.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    packed: bool = False
    vocab_size: int | None = None

    columns: ClassVar[tuple[str, ...]] = ("prompt_ids", "chosen_ids", "rejected_ids")

    def __post_init__(self) -> None:
        multiple = self.pad_to_multiple_of
        if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int)):
            raise bad_type("pad_to_multiple_of", "a whole number or None", repr(multiple))
        if multiple is not None and multiple < 0:
            raise bad_value("pad_to_multiple_of", "a number not below 0, or None", str(multiple))

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Labels are those of Hugging Face: labels[t] is token t, -100 on prompt and padding.

        Returns:
            input_ids, attention_mask and labels [2 P, T] int64; if packed, input_ids, position_ids
            and labels [1, N] and cu_seqlens [2 P + 1]. Each further input [P] fp32.

        Raises:
            ValueError: for a row without token ids, or with one beyond ``vocab_size``, or such
                padding.
        """
        self.check(rows)
        responses = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        batch = self.joined([row["prompt_ids"] for row in rows] * 2, responses)
        for name in rows[0].get("inputs", {}):
            batch[name] = torch.tensor([row["inputs"][name] for row in rows])
        return batch

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse rows without token ids, and tokens that the model has no row for."""
        known_tokens("pad_token_id", [self.pad_token_id], self.vocab_size)
        for number, row in enumerate(rows, start=1):
            where = f"row {number} of the batch"
            _check_columns(row, self.columns, where)
            if self.vocab_size is not None:
                tokens = [int(token) for name in self.columns for token in row[name]]
                known_tokens(where, tokens, self.vocab_size)

    def joined(self, prompts: Sequence[Any], responses: Sequence[Any]) -> dict[str, Tensor]:
        """Prompts, each followed by its response, padded or packed."""
        join = _pack if self.packed else pad_sequences
        return join(prompts, responses, self.pad_token_id, self.pad_to_multiple_of)


def _pack(
    prompts: Sequence[Any], responses: Sequence[Any], pad_token_id: int, multiple: int | None
) -> dict[str, Tensor]:
    pairs = list(zip(prompts, responses, strict=True))
    lengths = torch.tensor([len(p) + len(r) for p, r in pairs])
    ids = [torch.as_tensor(part) for pair in pairs for part in pair]
    labels = [
        part
        for prompt, response in pairs
        for part in (torch.full((len(prompt),), IGNORE_INDEX), torch.as_tensor(response))
    ]
    positions = [torch.arange(int(n)) for n in lengths]
    if multiple and (more := -int(lengths.sum()) % multiple):
        ids.append(torch.full((more,), pad_token_id))
        labels.append(torch.full((more,), IGNORE_INDEX))
        # from 0 again, as the last row may be as long as the model's positions reach
        positions.append(torch.arange(more))
        lengths[-1] += more
    return {
        "input_ids": torch.cat(ids).long()[None],
        "position_ids": torch.cat(positions)[None],
        "labels": torch.cat(labels).long()[None],
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    }


@dataclass
class Means:
    """Means over pairs of the metrics of several batches, kept on the device until asked for."""

    pairs: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor], pairs: int) -> None:
        self.pairs += pairs
        for name, value in metrics.items():
            weighted = value.double() * pairs
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all ranks; empties this."""
        # a process may have had repeated rows alone, and has its part in the sum all the same
        if not self.sums:
            return {}
        names = list(self.sums)
        totals = torch.stack(
            [*self.sums.values(), torch.full_like(self.sums[names[0]], self.pairs)]
        )
        *sums, pairs = accelerator.reduce(totals, "sum").tolist()
        self.pairs, self.sums = 0, {}
        return {name: total / pairs for name, total in zip(names, sums, strict=True)}


_Reference = Tensor | tuple[Tensor, Head] | None


def _reference_arguments(reference: _Reference, head: Head, labels: Tensor) -> dict[str, Any]:
    """The reference as arguments of a loss that is computed at this head."""
    if reference is None:
        return {}
    if isinstance(reference, Tensor):
        return {"ref_logprobs": reference}
    hidden, own = reference
    if (own.softcap, own.logit_scale) != (head.softcap, head.logit_scale):
        with torch.no_grad():
            aligned = labels.to(hidden.device)
            found = linear_logprobs(hidden, own.weight, aligned, **own.options())
        return {"ref_logprobs": found}
    # scored tile for tile as the policy is: equal models have a ratio of exactly 1
    return {"ref_hidden": hidden, "ref_weight": own.weight, "ref_bias": own.bias}


def moved(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same, with its tensors on the device."""
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}


class FusedTrainerMixin(_Base):
    """What a subclass of ``transformers.Trainer`` needs for a loss of this library.

    Stands before Trainer among the bases. A batch has input_ids, attention_mask and labels [B, T],
    as ``pad_sequences`` makes them, and what else the loss takes. See ``PreferenceTrainer`` for the
    arguments.
    """

    # the loss is divided by the examples of the whole step, whatever way they are split
    loss_is_scaled_for_ga: bool = True
    means: ClassVar[type[Means]] = Means

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        loss: Loss,
        ref_model: Any = None,
        memory_budget: int | float | str | None = None,
        gradient_tolerance: float | None = None,
        **options: Any,
    ) -> None:
        args = args or TrainingArguments()
        check_options(memory_budget, "auto", gradient_tolerance or 0.0)
        _check(model, loss, ref_model, options)
        _check_arguments(args, loss)
        _check_sampling(args, options.get("train_dataset"))
        # rows are not the arguments of model.forward
        args.remove_unused_columns = False
        datasets = (options.get("train_dataset"), options.get("eval_dataset"))
        if any(isinstance(each, IterableDataset) for each in datasets):
            # else one process makes batches for all, and cuts them between chosen and rejected
            config: Any = args.accelerator_config
            config.dispatch_batches = False
        self.loss = loss
        given = {"memory_budget": memory_budget, "gradient_tolerance": gradient_tolerance}
        self._head_options = {name: value for name, value in given.items() if value is not None}
        self.memory_budget: int | float | str | Plan | None = memory_budget
        self.gradient_tolerance = gradient_tolerance or 0.0
        self.ref_model: Any = None
        self._own_reference = ref_model
        self._forget()
        if model is not None:
            self._prepare_head(model)
        super().__init__(model=model, args=args, **options)
        # before transformers 5.19 this says that the loss is scaled, not loss_is_scaled_for_ga
        self.model_accepts_loss_kwargs = True
        if self.args.n_gpu > 1:
            raise bad_value(
                "devices",
                "one device a process, as DataParallel would split the pairs",
                f"{self.args.n_gpu} devices",
                "start with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES",
            )
        if model is not None:
            self._place_reference(model)

    def _forget(self) -> None:
        """What was kept of a model, before there is another one."""
        self._train_means, self._eval_means = self.means(), self.means()
        self._packing: list[tuple[Any, Any]] = []  # models that do not mix packed rows

    def call_model_init(self, trial: Any = None) -> Any:
        """A new model, with a head and a reference of its own; before each training."""
        self._forget()
        model = super().call_model_init(trial)
        self._packing = []  # which holds on to the last model
        self._prepare_head(model)
        self._place_reference(model)
        return model

    def _prepare_head(self, model: Any) -> None:
        """Fuse the heads of a model and its reference."""
        check_model("model", model)
        reference = self._own_reference
        if self.loss.needs_reference and reference is None:
            reference = _frozen_copy(model)
        for each in (model, reference):
            fused = None if each is None else fused_forward(each)
            if each is not None and (self._head_options or fused is None):
                names = ("memory_budget", "gradient_tolerance") if fused is not None else ()
                earlier = {name: getattr(fused, name) for name in names}
                add_fused_head(each, **{**earlier, **self._head_options})
        fused = fused_forward(model)
        assert fused is not None, "it has just got one"
        self.memory_budget = fused.memory_budget
        self.gradient_tolerance = fused.gradient_tolerance
        self.ref_model = reference

    def _place_reference(self, model: Any) -> None:
        """Freeze the reference, where the model is; or do without one of its own."""
        if self.ref_model is None:
            return
        if self._sharded:
            if self._own_reference is not None or not hasattr(model, "disable_adapter"):
                raise bad_value(
                    "ref_model",
                    "none under FSDP and DeepSpeed, where it would be whole on every device",
                    type(self.ref_model).__name__,
                    "train new adapters, whose reference is the model without them, or a loss "
                    "without a reference, or under DistributedDataParallel",
                )
            _check_new_adapters(model)
            self.ref_model = None
            return
        self.ref_model.requires_grad_(False).eval()
        placed = ("hf_device_map", "quantization_method")
        if all(getattr(self.ref_model, name, None) is None for name in placed):
            self.ref_model.to(self.args.device)
        if self.args.use_liger_kernel:
            # Trainer gives them to the policy alone, when it trains
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            for each in (model, self.ref_model):
                layers: Any = self.args.liger_kernel_config
                _apply_liger_kernel_to_instance(model=causal_model(each), **layers)

    @property
    def _sharded(self) -> bool:
        """Whether weights are whole only within a forward."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _examples(self, batch: Mapping[str, Tensor]) -> int:
        """How many examples a batch has."""
        raise NotImplementedError

    def _further_metrics(self) -> dict[str, Tensor]:
        """What is logged of a training batch beside the metrics of the loss."""
        return {}

    def _fused_loss(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        step_counts: Tensor | None,
        **arguments: Any,
    ) -> LossOutput:
        """The loss of a batch; arguments are the reference, head options, and the batch's rest."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch.

        Args:
            model: the model, wrapped or not.
            inputs: what the collator made.
            return_outputs: also return the metrics.
            num_items_in_batch: [2], examples and tokens to divide by; those of this batch if not
                given.
        """
        if isinstance(num_items_in_batch, int):
            raise bad_type(
                "num_items_in_batch", "[2], pairs and chosen tokens of the step, or None", "an int"
            )
        of_loss = {*_OF_LOSS, *self.loss.inputs}
        rest = {name: value for name, value in inputs.items() if name in of_loss}
        of_model = {name: value for name, value in inputs.items() if name not in of_loss}
        if (borders := rest.get("cu_seqlens")) is not None:
            self._refuse_mixing(model, of_model, borders)
        labels = aligned_labels(rest.pop("labels"), borders)
        reference = self._reference(model, of_model, labels)
        metrics: dict[str, Tensor] = {}

        def task(hidden: Tensor, head: Head) -> Tensor:
            # with a model split over devices the head may be on another one than the batch
            given = {**rest, "labels": labels, "step_counts": num_items_in_batch}
            given |= _reference_arguments(reference, head, labels)
            if "cu_seqlens" not in rest:
                hidden = strip_virtual_tokens(hidden, labels)
            output = self._fused_loss(
                hidden,
                head,
                memory_budget=self.memory_budget,
                gradient_tolerance=self.gradient_tolerance,
                **head.options(),
                **moved(given, hidden.device),
            )
            metrics.update(output.metrics)
            return output.loss

        loss, aux_loss = at_head(model, task, **of_model)
        if aux_loss is not None:
            metrics["aux_loss"] = aux_loss.detach()
            loss = loss + self._aux_weight(model, inputs, num_items_in_batch) * aux_loss
        if model.training:
            of_batch = {**metrics, **self._further_metrics()}
            self._train_means.add(of_batch, self._examples(inputs))
        return (loss, metrics) if return_outputs else loss

    def _refuse_mixing(
        self, model: Any, of_model: Mapping[str, Tensor], cu_seqlens: Tensor
    ) -> None:
        """Compare once, for each model and attention, packed rows with a row alone.

        Every process has its part in it, and all stop if one finds them mixed.

        Raises:
            ValueError: if a model mixes them.
        """
        for subject in (model, self.ref_model):
            if subject is None:
                continue
            causal = causal_model(subject)
            state = (causal, getattr(causal.config, "_attn_implementation", None))
            if any(state[0] is seen and state[1] == how for seen, how in self._packing):
                continue
            with self.accelerator.autocast():  # of a model that is not wrapped
                gaps, bounds = packing_gap(subject, of_model, cu_seqlens)
            worst = self.accelerator.gather(gaps[None]).amax(0)
            for gap, bound, where in zip(worst, bounds, ("alone", "behind another"), strict=True):
                if not gap <= bound:
                    raise bad_value(
                        "data_collator",
                        f"one that pads, as {type(causal).__name__} mixes packed rows: the states "
                        f"of a row differ from those it has {where} by {100 * float(gap):.2g} %",
                        "packed rows",
                        "leave out packed=True, or load the model with another attn_implementation",
                    )
            self._packing.append(state)

    def _aux_weight(
        self, model: Any, batch: Mapping[str, Tensor], step_counts: Tensor | None
    ) -> float | Tensor:
        """Of the load-balancing loss of experts: the configuration's, times the batch's share of
        the step."""
        config = causal_model(model).config.get_text_config()
        weight = float(getattr(config, "router_aux_loss_coef", 0.0))
        return weight if step_counts is None else weight * self._examples(batch) / step_counts[0]

    @torch.no_grad()
    def _reference(self, model: Any, of_model: Mapping[str, Tensor], labels: Tensor) -> _Reference:
        """The reference's hidden states and head or, where weights are sharded, its
        log-probabilities; None without one."""
        if not self.loss.needs_reference:
            return None
        unwrapped = self.accelerator.unwrap_model(model)
        if self.ref_model is not None and self._own_reference is None:
            _check_adapters(unwrapped, self.ref_model)
        subject = self.ref_model or model
        with_it = contextlib.nullcontext() if self.ref_model else unwrapped.disable_adapter()
        with with_it, evaluating(subject), self.accelerator.autocast():
            if self._sharded:
                score = Score(labels, memory_budget=self.memory_budget)
                return at_head(subject, score, **of_model)[0].logprob
            # entered from outside, where virtual tokens are put in front
            (hidden, head), _ = at_head(subject, lambda *states: states, **of_model)
        return strip_virtual_tokens(hidden, labels), head

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the training batches since the last time."""
        if "loss" in logs:
            logs = {**logs, **self._train_means.take(self.accelerator)}
        super().log(logs, start_time)


class FusedTrainer(FusedTrainerMixin, Trainer):
    """``transformers.Trainer`` on a loss of this library, which subclasses say how to call."""


class PreferenceTrainerMixin(FusedTrainerMixin):
    """What a subclass of ``transformers.Trainer`` needs for a preference loss; stands before it
    among the bases.

    Args:
        model: a causal language model; its head is fused, see ``add_fused_head``. None with
            ``model_init``, whose models are prepared likewise, each with its own reference.
        args: batch sizes count pairs.
        loss: one of ``fusedpo.losses``; for one of other responses than a chosen and a rejected
            one, ``data_collator`` makes the batches (``ShortToLongCollator``).
        ref_model: the reference of a loss that compares with one. If not given: a frozen copy of
            ``model`` as it is now. With adapters it is a copy of them, and of what else is trained,
            over the same frozen weights; under FSDP and DeepSpeed it is ``model`` without them,
            which new adapters are equal to, and others are refused.
        memory_budget: what the head may hold at a time, in bytes or as "512MiB".
        gradient_tolerance: the relative error that a gradient of the head may have, as of
            ``linear_logprobs``; if not given that of the model's head, which is 0 unless
            ``add_fused_head`` was told another.
        options: ``gradient_tolerance``, and as of ``transformers.Trainer``. The datasets have rows
            as ``rows.tokenize`` makes them. Arguments of Trainer and TrainingArguments that change
            a loss of logits are refused.

    The metrics of the loss (``rewards/chosen``, ``rewards/margins``, ...) are logged beside
    ``loss`` as means over all pairs since the last time, with the prefix ``eval_`` in evaluation.
    A mixture of experts whose ``output_router_logits`` is set adds its load-balancing loss.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        loss: Loss,
        ref_model: Any = None,
        memory_budget: int | float | str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(loss, PreferenceLoss):
            raise bad_type("loss", "a preference loss, such as fusedpo.losses.SimPO()", repr(loss))
        vocab = vocabulary(model)
        if options.get("data_collator") is None:
            pad = padding_token(options.get("processing_class"), vocab)
            options["data_collator"] = PreferenceCollator(pad)
        collator = options["data_collator"]
        checks_tokens = isinstance(collator, (PreferenceCollator, ShortToLongCollator))
        if checks_tokens and collator.vocab_size is None:
            options["data_collator"] = replace(collator, vocab_size=vocab)
        if isinstance(options["data_collator"], PreferenceCollator):
            check_rows(options, options["data_collator"].columns)
        self.roles = len(loss.roles)
        super().__init__(
            model, args, loss=loss, ref_model=ref_model, memory_budget=memory_budget, **options
        )

    def _examples(self, batch: Mapping[str, Tensor]) -> int:
        borders = batch.get("cu_seqlens")
        count = batch["labels"].shape[0] if borders is None else borders.shape[0] - 1
        return int(count) // self.roles

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Also count the pairs and the chosen tokens of the step, [2], averaged over the ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        pairs = sum(self._examples(batch) for batch in batches)
        tokens = sum(self._chosen_tokens(batch) for batch in batches)
        counts = torch.tensor([pairs, tokens], dtype=torch.float64, device=device)
        # gradients are averaged over the ranks too
        return batches, self.accelerator.reduce(counts, "mean")

    def _chosen_tokens(self, batch: Mapping[str, Tensor]) -> int:
        borders, examples = batch.get("cu_seqlens"), self._examples(batch)
        labels = aligned_labels(batch["labels"], borders)
        chosen = labels[:examples] if borders is None else labels[0, : int(borders[examples])]
        return int((chosen != IGNORE_INDEX).sum())

    def _fused_loss(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        step_counts: Tensor | None,
        **arguments: Any,
    ) -> LossOutput:
        pairs, tokens = (None, None) if step_counts is None else step_counts.unbind()
        return preference_loss(
            self.loss,
            hidden,
            head.weight,
            labels,
            num_items=pairs,
            num_tokens=tokens if self.loss.nll_weight else None,
            **arguments,
        )

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        count, kept = self._examples(inputs), self._not_repeated(self._examples(inputs))
        if 0 < kept < count and "cu_seqlens" not in inputs:
            inputs = self._first(inputs, kept, count)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics = self.compute_loss(model, inputs, return_outputs=True)
        self._eval_means.add({"loss": loss, **metrics}, kept)
        return loss.detach(), None, None

    def _not_repeated(self, count: int) -> int:
        """How many examples of a batch are not there to give every process as many.

        In the last round accelerate fills the batches with rows of the first ones.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0 or not self.accelerator.even_batches:
            return count
        size = self.args.eval_batch_size
        if self.accelerator.split_batches:
            size //= self.args.world_size
        before = self.args.process_index * size
        return min(max(state.remainder - before, 0), count)

    def _first(self, inputs: Mapping[str, Tensor], kept: int, count: int) -> dict[str, Tensor]:
        """The first examples of a batch, which is of one role's rows after the other's."""
        return {
            name: value.view(-1, count, *value.shape[1:])[:, :kept].flatten(0, 1)
            for name, value in inputs.items()
        }

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As of Trainer, with the loss and its metrics as means over pairs."""
        self._eval_means = self.means()
        halves = (
            (self.args.fp16_full_eval, torch.float16),
            (self.args.bf16_full_eval, torch.bfloat16),
        )
        for asked, dtype in halves:
            # the policy is cast likewise, and stays so
            if asked and not self.is_in_train and self.ref_model is not None:
                self.ref_model.to(dtype)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._eval_means.take(self.accelerator)
        found = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **found})


class PreferenceTrainer(PreferenceTrainerMixin, Trainer):
    __doc__ = PreferenceTrainerMixin.__doc__


def _check(model: Any, loss: Loss, ref_model: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(loss, Loss):
        raise bad_type("loss", "a loss, such as fusedpo.losses.SimPO()", repr(loss))
    if (model is None) == (options.get("model_init") is None):
        got = "both" if model is not None else "neither"
        raise bad_value("model", "a model, or None and model_init", got)
    if ref_model is not None and not loss.needs_reference:
        raise bad_value(
            "ref_model",
            f"None, as {type(loss).__name__} has no reference",
            "a model",
            "leave it out",
        )
    if ref_model is model and ref_model is not None:
        raise bad_value("ref_model", "a model of its own", "the model that is trained")
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if options.get(name) is not None:
            raise bad_value(name, "None, as no logits are made", repr(options[name]))
    for name, each in (("model", model), ("ref_model", ref_model)):
        if each is not None:
            check_model(name, each)


def check_model(argument: str, model: Any) -> None:
    """Refuse what is no causal language model."""
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or config is None:
        got = repr(model) if isinstance(model, str) else type(model).__name__
        remedy = "load it with transformers.AutoModelForCausalLM.from_pretrained"
        raise bad_type(argument, "a causal language model of transformers", got, remedy)
    if getattr(config, "is_encoder_decoder", False):
        raise bad_value(argument, "a decoder-only language model", type(model).__name__)


def _check_arguments(args: TrainingArguments, loss: Loss) -> None:
    """Refuse what would change a loss of logits, or which rows a batch is of, and does not here."""
    own = (
        "label_smoothing of the loss" if hasattr(loss, "label_smoothing") else "a loss that has it"
    )
    if args.label_smoothing_factor:
        got = str(args.label_smoothing_factor)
        raise bad_value("label_smoothing_factor", "0, as no logits are made", got, f"take {own}")
    if args.label_names not in (None, ["labels"]):
        raise bad_value("label_names", "None or ['labels']", repr(args.label_names))
    if args.world_size > 1 and not args.average_tokens_across_devices:
        expected = "True, as every pair counts the same on whichever process"
        raise bad_value("average_tokens_across_devices", expected, "False")
    past = getattr(args, "past_index", -1)  # gone from transformers 5.23
    if past >= 0:
        raise bad_value("past_index", "-1, as no states are kept", str(past))
    config: Any = args.accelerator_config
    if config.dispatch_batches:
        expected = "None or False, as batches would be cut between chosen and rejected"
        raise bad_value("accelerator_config.dispatch_batches", expected, "True")
    parallel = getattr(args, "parallelism_config", None)
    if any(getattr(parallel, name, False) for name in ("cp_enabled", "sp_enabled")):
        got = "context or sequence parallelism"
        expected = "whole sequences on every process"
        raise bad_value("parallelism_config", expected, got, "see sequence_group for a loop of own")
    if args.use_liger_kernel:
        # Liger's layers, but not its heads, of which one replaces the model's forward
        asked = args.liger_kernel_config or {}
        heads = ("fused_linear_cross_entropy", "cross_entropy")
        for name in heads:
            if asked.get(name):
                expected = "not True, as the head is fused here"
                raise bad_value(f"liger_kernel_config[{name!r}]", expected, "True")
        args.liger_kernel_config = {**asked, **dict.fromkeys(heads, False)}


def _check_sampling(args: TrainingArguments, rows: Any) -> None:
    """Refuse sampling by lengths that Trainer does not find: it looks for input_ids."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    of_lengths = strategy in ("group_by_length", "batch_rebalance")
    names = getattr(rows, "column_names", None) or ()
    if rows is not None and of_lengths and args.length_column_name not in names:
        expected = f"a datasets.Dataset with the column {args.length_column_name} beside it"
        raise bad_value("train_sampling_strategy", expected, repr(strategy))


def check_rows(options: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Refuse datasets that lack one of these columns, as those of text do."""
    for name in ("train_dataset", "eval_dataset"):
        of_name = options.get(name)
        each: Any
        for each in of_name.values() if isinstance(of_name, dict) else (of_name,):
            names = getattr(each, "column_names", None)
            # one of torch, which may make its rows as it is asked, is left to the collator
            if hasattr(each, "__len__") and (names or isinstance(each, Sequence)):
                # columns of a table may be made into others on the way
                if len(each):
                    _check_columns(each[0], columns, name)
            elif names:
                _check_columns(dict.fromkeys(names), columns, name)


def _check_columns(row: Any, columns: Sequence[str], where: str) -> None:
    if not isinstance(row, Mapping) or any(name not in row for name in columns):
        got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        remedy = "make rows of text into such with fusedpo.trainers.rows.tokenize"
        raise bad_value(where, f"rows with {', '.join(columns)}", got, remedy)


def _frozen_copy(model: Any) -> Any:
    """A copy of the model as it is now; if it has adapters, with the same frozen weights."""
    shared = {}
    if hasattr(model, "disable_adapter"):
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


def _check_adapters(model: Any, reference: Any) -> None:
    """Refuse adapters that are merged into the weights which a copy of them shares."""
    own, copied = (
        [part.merged_adapters for part in each.modules() if hasattr(part, "merged_adapters")]
        for each in (model, reference)
    )
    if len(own) < len(copied) or any(own) or any(copied):
        raise bad_value(
            "model",
            "adapters beside the frozen weights, which the reference has in common with it",
            "merged ones" if any(own) or any(copied) else "a model without them",
            "call model.unmerge_adapter(), or give a ref_model with weights of its own",
        )


def _check_new_adapters(model: Any) -> None:
    """Refuse adapters that the model without them may differ from."""
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        # of an adapter's low-rank product one factor is 0 at first: of embeddings the other one
        starts_at_0 = any(part in name for part in ("lora_B", "lora_embedding_A"))
        copied = _original(name, weights)
        if not weight.requires_grad or weight.is_meta or (not starts_at_0 and "lora_" in name):
            continue
        equal = copied is not None and torch.equal(_own_part(weight), _own_part(copied))
        if not (equal or (starts_at_0 and not _own_part(weight).any())):
            raise bad_value(
                "model",
                "new LoRA adapters under FSDP and DeepSpeed, where the reference is the model "
                "without them",
                f"{name}, which may have learned something",
                "merge the adapters into the model and train new ones, or train under "
                "DistributedDataParallel",
            )


def _own_part(weight: Tensor) -> Tensor:
    """What of a weight is on this process: under ZeRO-3 the weight itself is empty."""
    part: Tensor = getattr(weight, "ds_tensor", weight)
    return part


def _original(name: str, weights: Mapping[str, Tensor]) -> Tensor | None:
    """What a module that is trained whole beside adapters was copied from."""
    before, whole, after = name.partition(".modules_to_save.")
    return weights.get(f"{before}.original_module.{after.partition('.')[2]}") if whole else None


def padding_token(processing_class: Any, vocab_size: int | None = None) -> int:
    """The id that pads: the tokenizer's, or that of its end of sequence, or 0; it is masked.

    One that the model has no row for is passed over.

    Raises:
        ValueError: without a tokenizer.
    """
    if processing_class is None:
        raise bad_value("processing_class", "the tokenizer, or a data_collator", "neither of them")
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(processing_class, name, None)
        if token is not None and (vocab_size is None or token < vocab_size):
            return int(token)
    return 0
