"""What every trainer of this library adds to ``transformers.Trainer``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from fusedpo.checks import bad_type, bad_value
from fusedpo.engine.plan import Plan
from fusedpo.functional import LossOutput
from fusedpo.head import Head
from fusedpo.losses import Loss
from fusedpo.model_head import (
    Score,
    add_fused_head,
    causal_model,
    check_options,
    evaluating,
    fused_forward,
)
from fusedpo.model_head.forward import AtHead
from fusedpo.trainers.forwards import Batch, moved
from fusedpo.trainers.length_groups import in_length_groups
from fusedpo.trainers.one_run import OneRun, of_options
from fusedpo.trainers.packing import packing_gap
from fusedpo.trainers.transformers.arguments import (
    check_arguments,
    check_given,
    check_model,
    check_sampling,
)
from fusedpo.trainers.transformers.means import Means
from fusedpo.trainers.transformers.reference import (
    BASE,
    Reference,
    check_adapters,
    check_new_adapters,
    frozen_copy,
    is_its_own_reference,
    reference_arguments,
)

# what of a batch is the loss's, beside its own inputs; the rest is the model's
OF_LOSS = ("advantages", "old_logprobs", "importance_weights")


class FusedTrainerMixin(OneRun):
    """What a subclass of ``transformers.Trainer`` needs for a loss of this library.

    Stands before Trainer among the bases. A batch has input_ids, attention_mask and labels [B, T],
    as ``pad_sequences`` makes them, and what else the loss takes. See ``PreferenceTrainer`` for the
    arguments.
    """

    # the loss is divided by the examples of the whole step, whatever way they are split
    loss_is_scaled_for_ga: bool = True
    length_groups: bool = False
    means: ClassVar[type[Means]] = Means
    # of what ``_batch`` makes, neither the loss's nor the model's
    of_metrics: ClassVar[tuple[str, ...]] = ()
    # of fusedpo.functional: it computes the loss
    functional: ClassVar[Callable[..., LossOutput]]

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
        check_given(model, loss, ref_model, options)
        check_arguments(args, loss)
        check_sampling(args, options.get("train_dataset"))
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
        self._eval_means = self.means()
        self._packing: list[tuple[Any, Any]] = []  # models that do not mix packed rows
        self._begin(None)
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

    def _begin(self, checkpoint: str | None) -> None:
        """Forget what an earlier training has left, or an attempt at this one that was given up,
        and take up what this checkpoint has."""
        self._train_means = self.means()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # each attempt at a training, where the batch size is to be found
        self._begin(kwargs.get("resume_from_checkpoint"))
        return super()._inner_training_loop(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> Any:
        """A new model, with a head and a reference of its own; before each training."""
        self._packing = []  # which holds on to the last model
        model = super().call_model_init(trial)
        self._prepare_head(model)
        self._place_reference(model)
        return model

    def _prepare_head(self, model: Any) -> None:
        """Fuse the heads of a model and its reference."""
        check_model("model", model)
        reference = self._own_reference
        if reference == BASE:
            reference = None
        elif self.loss.needs_reference and reference is None and not is_its_own_reference(model):
            reference = frozen_copy(model)
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
                    "train new adapters, whose reference is the model without them, take a loss "
                    "without a reference, or train under DistributedDataParallel",
                )
            check_new_adapters(model)
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

    def _options_of_run(self) -> dict[str, Any]:
        return of_options("loss", self.loss)

    @property
    def _sharded(self) -> bool:
        """Whether weights are whole only within a forward."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _examples(self, batch: Mapping[str, Tensor]) -> int:
        """How many examples a batch has."""
        raise NotImplementedError

    def _batch(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What the model and the loss take, of what the collator made."""
        return inputs

    def _trains(self, model: Any) -> bool:
        """Whether a loss that is computed now is one to train on, and not one to look at."""
        return bool(model.training) and torch.is_grad_enabled()

    def _counts(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """[2], examples and tokens of the step, where Trainer has not counted them before."""
        return None

    def _loss_arguments(self, step_counts: Tensor | None) -> dict[str, Any]:
        """What ``functional`` is told beside the batch, such as what to divide by."""
        raise NotImplementedError

    def _further_metrics(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a batch, beside the metrics of the loss."""
        return {}

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
        inputs = self._batch(model, inputs)
        counts = self._counts(inputs) if num_items_in_batch is None else num_items_in_batch
        of_loss = {*OF_LOSS, *self.loss.inputs}
        rest = {name: value for name, value in inputs.items() if name in of_loss}
        others = {*of_loss, *self.of_metrics}
        batch = Batch.of({name: value for name, value in inputs.items() if name not in others})
        if batch.cu_seqlens is not None:
            self._refuse_mixing(model, batch.inputs, batch.cu_seqlens)
        batch = self._in_groups(batch)
        if batch.cu_seqlens is not None:
            rest["cu_seqlens"] = batch.cu_seqlens
        reference = self._reference(model, batch)
        metrics: dict[str, Tensor] = {}

        def task(hidden: Tensor, head: Head) -> Tensor:
            # with a model split over devices the head may be on another one than the batch
            given = {**rest, "labels": batch.labels, **self._loss_arguments(counts)}
            given |= reference_arguments(reference, head, batch.labels)
            output = self.functional(
                self.loss,
                hidden,
                head.weight,
                memory_budget=self.memory_budget,
                gradient_tolerance=self.gradient_tolerance,
                **head.options(),
                **moved(given, hidden.device),
            )
            metrics.update(output.metrics)
            return output.loss

        loss, aux_loss = batch.at_head(model, task)
        if aux_loss is not None:
            metrics["aux_loss"] = aux_loss.detach()
            loss = loss + self._aux_weight(model, inputs, counts) * aux_loss
        metrics |= moved(self._further_metrics(inputs), loss.device)
        if self._trains(model):
            self._train_means.add(metrics, self._examples(inputs))
        return (loss, metrics) if return_outputs else loss

    def _in_groups(self, batch: Batch) -> Batch:
        """The batch as it is run: in length groups, if they are on."""
        return in_length_groups(batch, self.accelerator) if self.length_groups else batch

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
    def _reference(self, model: Any, batch: Batch) -> Reference:
        """The reference's hidden states and head or, where weights are sharded, its
        log-probabilities; None without one."""
        if not self.loss.needs_reference:
            return None
        unwrapped = self.accelerator.unwrap_model(model)
        if self.ref_model is not None and self._own_reference is None:
            check_adapters(unwrapped, self.ref_model)
        subject = self.ref_model or model
        with_it = contextlib.nullcontext() if self.ref_model else unwrapped.disable_adapter()
        with with_it, evaluating(subject), self.accelerator.autocast():
            if self._sharded:
                return batch.at_head(subject, self._logprobs_of(batch))[0]
            return batch.at_head(subject, lambda *states: states)[0]

    def _logprobs_of(self, batch: Batch) -> AtHead:
        """The task of a batch's log-probabilities, shaped as its labels."""
        score = Score(batch.labels, memory_budget=self.memory_budget)
        return lambda hidden, head: score(hidden, head).logprob

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the training batches since the last time."""
        if "loss" in logs:
            logs = {**logs, **self._train_means.take(self.accelerator)}
        super().log(logs, start_time)


class FusedTrainer(FusedTrainerMixin, Trainer):
    """``transformers.Trainer`` on a loss of this library, which subclasses say how to call."""
