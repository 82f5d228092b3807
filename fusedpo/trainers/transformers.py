"""Preference training with ``transformers.Trainer``, without logits.

    trainer = PreferenceTrainer(
        model, TrainingArguments("out", report_to="none"), loss=SimPO(),
        train_dataset=rows, processing_class=tokenizer,
    )
    trainer.train()

Batches are pairs: the chosen rows, then the rejected rows. A model is entered through its wrapper,
so that what the wrapper does before and after a forward (DistributedDataParallel, autocast) is
done, and nothing of the model is changed for longer than one forward.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import bad_type, bad_value
from fusedpo.head import Head
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.objective import LossOutput, preference_loss
from fusedpo.recipes.short_to_long import IGNORED, pad_sequences
from fusedpo.trainers.rows import TokenRow

try:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput
except ImportError as error:
    raise ImportError(
        "fusedpo.trainers.transformers needs transformers: pip install 'fusedpo[demo]'"
    ) from error

# positions that are compared with the model's own logits before the first step
_VERIFIED = 16


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of token ids to one batch of 2 P sequences, chosen first, padded on the right.

    Attributes:
        pad_token_id: fills the rows; masked, so any valid token will do.
        pad_to_multiple_of: round the length up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [2 P, T] int64, and each further input [P] fp32.

        Labels are those of Hugging Face: labels[t] is token t, -100 on prompt and padding.
        """
        responses = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        prompts = [row["prompt_ids"] for row in rows] * 2
        batch = pad_sequences(prompts, responses, self.pad_token_id, self.pad_to_multiple_of)
        for name in rows[0].get("inputs", {}):
            batch[name] = torch.tensor([row["inputs"][name] for row in rows])
        return batch


@dataclass
class _Means:
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
        if not self.pairs:
            return {}
        names = list(self.sums)
        totals = torch.stack(
            [*self.sums.values(), torch.full_like(self.sums[names[0]], self.pairs)]
        )
        *sums, pairs = accelerator.reduce(totals, "sum").tolist()
        self.pairs, self.sums = 0, {}
        return {name: total / pairs for name, total in zip(names, sums, strict=True)}


class FusedTrainer(Trainer):
    """``transformers.Trainer`` on a loss of this library, which subclasses say how to call.

    A batch has input_ids, attention_mask and labels [B, T], as ``pad_sequences`` makes them, and
    what else the loss takes. See ``PreferenceTrainer`` for the arguments.
    """

    # the loss is divided by the examples of the whole step, whatever way they are split
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        loss: Loss,
        ref_model: Any = None,
        memory_budget: int | float | str | None = None,
        **options: Any,
    ) -> None:
        _check(model, loss, ref_model, options)
        args = args or TrainingArguments()
        # rows are not the arguments of model.forward
        args.remove_unused_columns = False
        if loss.needs_reference and ref_model is None and not hasattr(model, "disable_adapter"):
            ref_model = copy.deepcopy(model)
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
        if loss.needs_reference and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise bad_value(
                "loss",
                "one without a reference under FSDP and DeepSpeed",
                repr(loss),
                "train under DistributedDataParallel",
            )
        self.loss = loss
        self.memory_budget = memory_budget
        self.ref_model = None
        if ref_model is not None:
            self.ref_model = ref_model.requires_grad_(False).eval().to(self.args.device)
        self._train_means, self._eval_means = _Means(), _Means()
        self._verified = False

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
        with self._fused_forward(model):
            outputs = model(**inputs, step_counts=num_items_in_batch)
        if model.training:
            metrics = {**outputs["metrics"], **self._further_metrics()}
            self._train_means.add(metrics, self._examples(inputs))
        return (outputs["loss"], outputs["metrics"]) if return_outputs else outputs["loss"]

    @contextlib.contextmanager
    def _fused_forward(self, model: Any) -> Iterator[None]:
        """For the time of one call, let the model return the loss rather than logits."""
        inner = self.accelerator.unwrap_model(model)
        own = vars(inner).get("forward")
        inner.forward = functools.partial(self._forward, inner)
        try:
            yield
        finally:
            if own is None:
                del inner.forward
            else:
                inner.forward = own

    def _forward(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        step_counts: Tensor | None,
        **inputs: Tensor,
    ) -> dict[str, Any]:
        # autocast is part of the forward that this one stands in for
        with self.accelerator.autocast():
            hidden, head = hidden_and_head(model, input_ids, attention_mask)
            self._verify_once(model, hidden, head, input_ids, attention_mask)
            output = self._fused_loss(
                hidden,
                head,
                labels,
                step_counts,
                shift=True,
                memory_budget=self.memory_budget,
                **head.options(),
                **self._reference(model, input_ids, attention_mask),
                **inputs,
            )
        return {"loss": output.loss, "metrics": output.metrics}

    def _reference(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """The reference's hidden states and head, as arguments of the loss."""
        if not self.loss.needs_reference:
            return {}
        adapters = (
            contextlib.nullcontext() if self.ref_model is not None else model.disable_adapter()
        )
        with torch.no_grad(), adapters, evaluating(self.ref_model or model) as reference:
            hidden, head = hidden_and_head(reference, input_ids, attention_mask)
        return {"ref_hidden": hidden, "ref_weight": head.weight, "ref_bias": head.bias}

    def _verify_once(
        self, model: Any, hidden: Tensor, head: Head, input_ids: Tensor, attention_mask: Tensor
    ) -> None:
        """Compare the head with the model's own logits, once: families differ in what they do."""
        if self._verified:
            return
        self._verified = True
        with torch.no_grad(), evaluating(model):
            rows = input_ids[:1, :_VERIFIED], attention_mask[:1, :_VERIFIED]
            hidden, head = hidden_and_head(model, *rows)
            causal = _causal(model)
            logits = (
                type(causal)
                .forward(causal, input_ids=rows[0], attention_mask=rows[1], use_cache=False)
                .logits
            )
            head.verify(hidden[0], logits[0])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the training batches since the last time."""
        if "loss" in logs:
            logs = {**logs, **self._train_means.take(self.accelerator)}
        super().log(logs, start_time)


class PreferenceTrainer(FusedTrainer):
    """``transformers.Trainer`` on a preference loss.

    Args:
        model: a causal language model with a plain linear head.
        args: batch sizes count pairs.
        loss: one of ``fusedpo.losses``; for one of other responses than a chosen and a rejected
            one, ``data_collator`` makes the batches (``ShortToLongCollator``).
        ref_model: the reference of a loss that compares with one. If not given: a frozen copy of
            ``model`` as it is now, or ``model`` without its adapters if it has any.
        memory_budget: what the head may hold at a time, in bytes or as "512MiB".
        options: as of ``transformers.Trainer``. The datasets have rows as ``rows.tokenize`` makes
            them.

    The metrics of the loss (``rewards/chosen``, ``rewards/margins``, ...) are logged beside
    ``loss`` as means over all pairs since the last time, with the prefix ``eval_`` in evaluation.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        loss: Loss,
        ref_model: Any = None,
        memory_budget: int | float | str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(loss, PreferenceLoss):
            raise bad_type("loss", "a preference loss, such as fusedpo.losses.SimPO()", repr(loss))
        if options.get("data_collator") is None:
            pad = padding_token(options.get("processing_class"))
            options["data_collator"] = PreferenceCollator(pad)
        self.roles = len(loss.roles)
        super().__init__(
            model, args, loss=loss, ref_model=ref_model, memory_budget=memory_budget, **options
        )

    def _examples(self, batch: Mapping[str, Tensor]) -> int:
        return int(batch["labels"].shape[0]) // self.roles

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Also count the pairs and the chosen tokens of the step, [2], averaged over the ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        pairs = sum(self._examples(batch) for batch in batches)
        # the first position is predicted by nothing
        tokens = sum(
            int((batch["labels"][: self._examples(batch), 1:] != IGNORED).sum())
            for batch in batches
        )
        counts = torch.tensor([pairs, tokens], dtype=torch.float64, device=device)
        # gradients are averaged over the ranks too
        return batches, self.accelerator.reduce(counts, "mean")

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
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics = self.compute_loss(model, inputs, return_outputs=True)
        self._eval_means.add({"loss": loss, **metrics}, self._examples(inputs))
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As of Trainer, with the loss and its metrics as means over pairs."""
        self._eval_means = _Means()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._eval_means.take(self.accelerator)
        found = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **found})


def _check(model: Any, loss: Loss, ref_model: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(loss, Loss):
        raise bad_type("loss", "a loss, such as fusedpo.losses.SimPO()", repr(loss))
    if ref_model is not None and not loss.needs_reference:
        raise bad_value(
            "ref_model",
            f"None, as {type(loss).__name__} has no reference",
            "a model",
            "leave it out",
        )
    if ref_model is model and ref_model is not None:
        raise bad_value("ref_model", "a model of its own", "the model that is trained")
    for name in ("compute_metrics", "compute_loss_func"):
        if options.get(name) is not None:
            raise bad_value(name, "None, as no logits are made", repr(options[name]))
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise bad_value("model", "a decoder-only language model", type(model).__name__)
    if getattr(config, "output_router_logits", False):
        raise bad_value(
            "model.config.output_router_logits",
            "False, as the experts' balancing loss is not added here",
            "True",
        )


def padding_token(processing_class: Any) -> int:
    if processing_class is None:
        raise bad_value("processing_class", "the tokenizer, or a data_collator", "neither of them")
    for name in ("pad_token_id", "eos_token_id"):
        if (token := getattr(processing_class, name, None)) is not None:
            return int(token)
    return 0


def _causal(model: Any) -> Any:
    """The causal language model below an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_and_head(model: Any, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Head]:
    """Last hidden states [B, T, H] and the head they feed. Looked up anew at every call, as
    adapters and wrappers come and go."""
    causal = _causal(model)
    output = causal.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return output.last_hidden_state, Head.from_model(causal)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """Without dropout."""
    if not model.training:
        yield model
        return
    model.eval()
    try:
        yield model
    finally:
        model.train()
