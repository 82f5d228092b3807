"""The losses of this library in TRL's trainers, by name, on TRL's data formats.

    from fusedpo.trainers.trl import FusedDPOConfig, FusedDPOTrainer

    args = FusedDPOConfig("out", fused_loss="s-sppo", fused_loss_args={"beta": 1e-3})
    FusedDPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer).train()

``FusedDPOConfig`` takes any loss of pairs: rows have prompt, chosen and rejected as ever, and the
loss's further inputs as columns (``win_rate_chosen``, ``similarity``, ...). For ``solopo`` rows
have the long context in ``long_prompt``. With ``self_augmented=True`` an average of the model
writes the rejected responses, and rows need prompt and chosen only. ``FusedGRPOConfig`` takes any
policy loss (``sspo``, ``gspo``, ...) in the place of ``loss_type``. Without ``fused_loss`` both are
TRL's own. With it, they need TRL 1.15, and refuse the options of TRL's own formulas, which would
have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedpo import losses
from fusedpo.checks import bad_type, bad_value, vocabulary
from fusedpo.engine.tolerance import check_tolerance
from fusedpo.functional import LossOutput, policy_loss, preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import PolicyLoss, PreferenceLoss
from fusedpo.model_head import aligned_labels, at_head, fused_forward, strip_virtual_tokens
from fusedpo.recipes.self_augmented import Settings
from fusedpo.trainers.forwards import moved
from fusedpo.trainers.transformers import padding_token

try:
    import trl.trainer.utils
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.grpo_config import GRPOConfig
except ImportError as error:
    raise ImportError("fusedpo.trainers.trl needs TRL: pip install 'fusedpo[trl]'") from error

# options of the formulas that fused_loss stands in the place of
_OF_DPO = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "discopop_tau",
    "ld_alpha",
    "use_weighting",
    "f_divergence_type",
    "f_alpha_divergence_coef",
)
_OF_GRPO = (
    *("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level"),
    *("sapo_temperature_neg", "sapo_temperature_pos"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    *("top_entropy_quantile", "off_policy_mask_threshold", "entropy_coef"),
    *("use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
    "entropy_target",
)
# what of a batch is the loss's, not the model's
_NOT_OF_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_LONG, _NUMBER = "long_prompt", "row_number"
# of a batch of responses to images, as TRL passes them on
_OF_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass
class _ByName:
    """What is added to TRL's configurations."""

    fused_loss: str | None = field(
        default=None,
        metadata={
            "help": "Name of a loss of fusedpo (see `fusedpo losses`) in the place of loss_type."
        },
    )
    fused_loss_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Hyperparameters of fused_loss, as a dictionary or as JSON."},
    )
    gradient_tolerance: float = field(
        default=0.0,
        metadata={"help": "Relative error that a gradient of the head may have; 0 is exact."},
    )

    def __post_init__(self) -> None:
        check_tolerance(self.gradient_tolerance)
        super().__post_init__()  # type: ignore[misc]

    def the_loss(self) -> Any:
        """The loss that was named, or None.

        Raises:
            ValueError, TypeError: for an unknown name or wrong hyperparameters, and for any name
                with TRL before 1.15.
        """
        name, given = self._named()
        if name is None:
            if self.fused_loss_args is not None:
                raise bad_value("fused_loss", "the name of a loss", "None, with fused_loss_args")
            return None
        if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
            raise bad_value("fused_loss", "None with TRL before 1.15", name, "update TRL")
        return losses.get(name, **given)

    def _named(self) -> tuple[str | None, dict[str, Any]]:
        """The name of the loss, and its hyperparameters."""
        return self.fused_loss, _dictionary("fused_loss_args", self.fused_loss_args)

    def _refuse(self, names: Iterable[str], remedy: str) -> None:
        """Raise if one of these options of TRL's was set, whichever of them this TRL has."""
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if f.name in names and (got := getattr(self, f.name)) != default:
                raise bad_value(f.name, f"{default!r} with this fused_loss", repr(got), remedy)


def _dictionary(name: str, given: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise bad_value(name, "valid JSON", f"{given!r}: {error}") from None
    if given is not None and not isinstance(given, dict):
        raise bad_type(name, "a dictionary, or one as JSON", repr(given))
    return given or {}


@dataclass
class FusedDPOConfig(_ByName, DPOConfig):
    """TRL's ``DPOConfig``, and the name of a loss of pairs, for TRL 1.15 and later.

    With ``fused_loss``, options of TRL's own formulas (``loss_type``, ``beta``,
    ``label_smoothing``, ...) are refused.

    Attributes:
        fused_loss: see ``fusedpo losses``; takes the place of ``loss_type``.
        fused_loss_args: hyperparameters, as a dictionary or as JSON.
        gradient_tolerance: as of ``patch``, unless the trainer is given another.
        self_augmented: whether an average of the model writes the rejected responses; with the
            loss that ``fused_loss`` names, or with DPO, at TRL's ``beta`` if ``fused_loss_args``
            has none.
        self_augmented_args: of ``fusedpo.recipes.self_augmented.Settings``.
    """

    self_augmented: bool = field(
        default=False,
        metadata={"help": "Let an average of the model write the rejected responses."},
    )
    self_augmented_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Settings of the replay buffer and of what is generated, as JSON."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.self_augmented_args is not None and not self.self_augmented:
            got = repr(self.self_augmented_args)
            raise bad_value("self_augmented_args", "None without self_augmented", got)
        loss = self.the_loss()
        if loss is None:
            return
        if not isinstance(loss, PreferenceLoss):
            raise bad_value("fused_loss", "a loss of pairs", repr(loss), "use FusedGRPOConfig")
        if loss.roles[:2] != ("chosen", "rejected"):
            remedy = "for KTO use TRL's KTOConfig, with FusedKTOTrainer"
            raise bad_value("fused_loss", "a loss of pairs", repr(loss), remedy)
        used = ("beta",) if self._takes_beta() else ()
        self._refuse(set(_OF_DPO).difference(used), "use fused_loss_args")
        if self.self_augmented and loss.inputs:
            raise bad_value("fused_loss", "one without inputs of its own", repr(loss))
        if self.self_augmented:
            settings = self.settings_of_pairs()
            settings.check_loss(loss.needs_reference)
            if settings.ref_mode != "fixed":
                self._refuse(("sync_ref_model",), "leave it out: ref_every renews the reference")
        by_pair = loss.needs_reference and not loss.weights_tokens and len(loss.roles) == 2
        if self.self_augmented or not by_pair:
            self._refuse(("precompute_ref_log_probs",), "leave it out")
        if not loss.needs_reference:
            self._refuse(("sync_ref_model",), "leave it out: the loss has no reference")

    def settings_of_pairs(self) -> Settings:
        """``self_augmented_args``, with the defaults of what they leave out."""
        return Settings(**_dictionary("self_augmented_args", self.self_augmented_args))

    def _named(self) -> tuple[str | None, dict[str, Any]]:
        name, given = super()._named()
        if self.self_augmented and name is None:
            return "dpo", {"beta": self.beta, **given}
        return name, given

    def _takes_beta(self) -> bool:
        """Whether TRL's ``beta`` is that of the loss."""
        given = _dictionary("fused_loss_args", self.fused_loss_args)
        return self.self_augmented and self.fused_loss is None and "beta" not in given


@dataclass
class FusedGRPOConfig(_ByName, GRPOConfig):
    """TRL's ``GRPOConfig``, and the name of a policy loss, for TRL 1.15 and later.

    TRL's ``beta`` is the weight of the KL term of any loss, and ``use_bias_correction_kl`` says
    which estimator it has, unless ``fused_loss_args`` has a ``kl_estimator``. With ``fused_loss``,
    options of TRL's own formulas (``loss_type``, ``epsilon``, ``delta``, ...) are refused.

    Attributes:
        fused_loss: see ``fusedpo losses``; takes the place of ``loss_type``.
        fused_loss_args: hyperparameters, as a dictionary or as JSON.
        gradient_tolerance: as of ``patch``, unless the trainer is given another.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        loss = self.the_loss()
        if loss is None:
            return
        if not isinstance(loss, PolicyLoss):
            raise bad_value("fused_loss", "a policy loss", repr(loss), "use FusedDPOConfig")
        if loss.kl_weight != self.beta:
            raise bad_value("kl_weight", f"beta, {self.beta}", str(loss.kl_weight), "set beta")
        self._refuse(_OF_GRPO, "use fused_loss_args")
        if "kl_estimator" in _dictionary("fused_loss_args", self.fused_loss_args):
            self._refuse(("use_bias_correction_kl",), "kl_estimator in fused_loss_args decides")
        whole = loss.formula_structure.scope != "token" and not loss.absorbs_correction
        corrected = self.use_vllm and getattr(self, "vllm_importance_sampling_correction", False)
        mode = getattr(self, "vllm_importance_sampling_mode", "")
        if whole and corrected and str(mode).startswith("token"):
            raise bad_value(
                "vllm_importance_sampling_mode", "sequence_truncate or sequence_mask", mode
            )

    def the_loss(self) -> Any:
        loss = super().the_loss()
        if isinstance(loss, PolicyLoss) and self.beta:
            loss = replace(loss, kl_weight=loss.kl_weight or self.beta)
            if "kl_estimator" not in _dictionary("fused_loss_args", self.fused_loss_args):
                estimator: Any = "k3_corrected" if self.use_bias_correction_kl else "k3"
                loss = replace(loss, kl_estimator=estimator)
        return loss


class Calls:
    """How often what stands in the place of TRL's was called in this process."""

    count = 0


if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class LossOfPairs(_Base):  # type: ignore[misc]
    """For a subclass of TRL's ``DPOTrainer``: the loss that its configuration names."""

    fused_loss: PreferenceLoss | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        loss = config.the_loss() if isinstance(config, FusedDPOConfig) else None
        if loss is None:
            super().__init__(*args, **kwargs)
            return
        if kwargs.get("compute_metrics", args[7] if len(args) > 7 else None) is not None:
            raise bad_value("compute_metrics", "None with fused_loss, as no logits are made", "one")
        self.fused_loss = loss
        model = kwargs.get("model", args[0] if args else None)
        adapted = kwargs.get("peft_config") is not None or hasattr(model, "get_base_model")
        unneeded = not loss.needs_reference and not adapted
        if unneeded and len(args) < 2 and kwargs.get("ref_model") is None:
            # else TRL would load one
            kwargs["ref_model"] = torch.nn.Identity()
        super().__init__(*args, **kwargs)
        if unneeded:
            self.ref_model = None
        names = (*loss.inputs, *_long_columns(loss))
        self._further_columns = names
        plain: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = _Collator(plain, tuple(loss.inputs), len(loss.roles))
        if self.args.self_augmented:
            _augment(self)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in getattr(self, "_further_columns", ()):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        loss = self.fused_loss
        if loss is None:
            return super()._prepare_dataset(dataset, processing_class, args, name)
        # of a stream that was mapped they are not known
        columns = dataset.column_names or list(next(iter(dataset)))
        if args.self_augmented and "rejected" not in columns and "rejected_ids" not in columns:
            # what stands here is not trained on
            dataset = dataset.map(lambda row: {"rejected": row["chosen"]})
        for column, about in loss.inputs.items():
            if about.default is None and column not in columns:
                expected = f"a column {column!r}: {about.meaning}"
                raise bad_value(f"{name} dataset", expected, str(columns))
        if not _long_columns(loss) or "long_prompt_ids" in columns:
            return super()._prepare_dataset(dataset, processing_class, args, name)
        if _LONG not in columns:
            raise bad_value(f"{name} dataset", f"a column {_LONG!r}", str(columns))
        if not isinstance(dataset, Dataset):
            raise bad_type(f"{name} dataset", "a datasets.Dataset", type(dataset).__name__)
        # TRL drops rows that do not fit, of either kind: what is left of both belongs together
        numbered = dataset.add_column(_NUMBER, list(range(len(dataset))))
        longer = numbered.map(lambda row: {"prompt": row[_LONG]})
        prepared, longer = (
            super(LossOfPairs, self)._prepare_dataset(each, processing_class, args, name)
            for each in (numbered, longer)
        )
        long_ids = dict(zip(longer[_NUMBER], longer["prompt_ids"], strict=True))
        prepared = prepared.filter(lambda row: row[_NUMBER] in long_ids)
        return prepared.map(lambda row: {"long_prompt_ids": long_ids[row[_NUMBER]]})

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        # there are no logits to return
        only = prediction_loss_only or self.fused_loss is not None
        return super().prediction_step(model, inputs, only, ignore_keys)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        loss = self.fused_loss
        if loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        if return_outputs:
            expected = "False with fused_loss, as no logits are made"
            raise bad_value("return_outputs", expected, "True")
        extra = {name: inputs[name] for name in loss.inputs if name in inputs}
        apart = (*_NOT_OF_MODEL, *extra)
        of_model = {name: value for name, value in inputs.items() if name not in apart}
        of_model["use_cache"] = False
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        reference = self._reference_of(model, inputs, of_model, labels)
        if self.aux_loss_enabled:
            of_model["output_router_logits"] = True
        found: list[LossOutput] = []

        def task(hidden: Tensor, head: Head) -> Tensor:
            given = {"labels": aligned_labels(labels), "ref_logprobs": reference, **extra}
            output = preference_loss(
                loss,
                strip_virtual_tokens(hidden, labels),
                head.weight,
                **_options(self),
                **head.options(),
                **moved(given, hidden.device),
            )
            found.append(output)
            return output.loss

        value, aux_loss = at_head(model, task, **of_model)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum()
            self._total_train_tokens += int(tokens) // getattr(self, "_tp_size", 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled and aux_loss is not None:
            value = value + self.router_aux_loss_coef * aux_loss
            found[0].metrics["aux_loss"] = aux_loss.detach()
        _note(self, mode, found[0].metrics)
        return value

    def _reference_of(
        self, model: Any, inputs: dict[str, Any], of_model: dict[str, Any], labels: Tensor
    ) -> Tensor | None:
        """Log-probabilities under the reference, per token or per sequence, or None."""
        loss = self.fused_loss
        if loss is None or not loss.needs_reference:
            return None
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        options = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, options):
            if self.ref_model is None:
                inner = self.accelerator.unwrap_model(self.model)
                with use_adapter(inner, "ref" if "ref" in inner.peft_config else None):
                    found = self.model(**of_model, labels=labels, fused_lm_head=True)
            else:
                found = self.ref_model(**of_model, labels=labels, fused_lm_head=True)
        # nothing is predicted at the last position
        return strip_virtual_tokens(torch.nn.functional.pad(found.log_probs, (0, 1)), labels)


class LossOfGroups(_Base):  # type: ignore[misc]
    """For a subclass of TRL's ``GRPOTrainer``: the policy loss that its configuration names."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        loss = self.args.the_loss() if isinstance(self.args, FusedGRPOConfig) else None
        if loss is None:
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"]
        scored = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        before = inputs["prompt_ids"].shape[1]
        labels = ids.clone()
        labels[:, :before] = IGNORE_INDEX
        labels[:, before:] = labels[:, before:].masked_fill(scored == 0, IGNORE_INDEX)
        of_model = {
            "input_ids": ids,
            "attention_mask": torch.cat([inputs["prompt_mask"], mask], 1),
            "use_cache": False,
        }
        if inputs.get("num_images") is not None:
            raise bad_value("fused_loss", "None with images in the prompts", repr(loss))
        of_model |= {n: inputs[n] for n in _OF_IMAGES if inputs.get(n) is not None}
        if self.aux_loss_enabled:
            of_model["output_router_logits"] = True

        def placed(values: Tensor | None, *, whole: bool = False) -> Tensor | None:
            """[B, T] from values of the completion [B, C]: position t predicts token t + 1.

            whole: or [B] from one number a response, [B] or [B, 1].
            """
            if values is None or (whole and values.dim() == 1):
                return values
            if whole and values.shape[1] == 1:
                return values[:, 0]
            return torch.nn.functional.pad(values, (before - 1, 1))

        share = self.current_gradient_accumulation_steps if mode == "train" else 1
        counts: dict[str, Any] = {}
        if loss.aggregation == "token_mean":
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if mode == "train":
                tokens = tokens * share / self.args.steps_per_generation
            counts["num_tokens"] = tokens
        else:
            counts["num_items"] = ids.shape[0] * share
            if loss.entropy_bonus:
                counts["num_tokens"] = scored.sum().clamp(min=1) * share
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        found: list[LossOutput] = []

        def task(hidden: Tensor, head: Head) -> Tensor:
            given = {
                "labels": aligned_labels(labels),
                "advantages": placed(inputs["advantages"], whole=True),
                "old_logprobs": placed(inputs.get("old_per_token_logps")),
            }
            if loss.kl_weight:
                given["ref_logprobs"] = placed(inputs["ref_per_token_logps"])
            if corrected:
                ratio = inputs["importance_sampling_ratio"]
                given["importance_weights"] = placed(ratio, whole=True)
            output = policy_loss(
                loss,
                strip_virtual_tokens(hidden, labels),
                head.weight,
                log_entropy=True,
                temperature=self.temperature,
                **moved(counts, hidden.device),
                **_options(self),
                **head.options(),
                **moved(given, hidden.device),
            )
            found.append(output)
            return output.loss

        value, aux_loss = at_head(model, task, **of_model)
        if self.aux_loss_enabled and aux_loss is not None:
            value = value + self.router_aux_loss_coef * aux_loss / share
            found[0].metrics["aux_loss"] = aux_loss.detach()
        _note(self, mode, found[0].metrics)
        return value


def _options(trainer: Any) -> dict[str, Any]:
    """What ``patch`` was told, of the head that the trainer's model has."""
    fused = fused_forward(trainer.accelerator.unwrap_model(trainer.model))
    assert fused is not None, "the trainer was built while TRL was patched"
    return fused.options


def _note(trainer: Any, mode: str, metrics: Mapping[str, Tensor]) -> None:
    """Into TRL's record, as means over the ranks, and counted as a call."""
    Calls.count += 1
    names = list(metrics)
    values = torch.stack([metrics[name].float() for name in names])
    means = trainer.accelerator.reduce(values, "mean").tolist()
    for name, mean in zip(names, means, strict=True):
        trainer._metrics[mode][name].append(mean)


def _long_columns(loss: PreferenceLoss) -> tuple[str, ...]:
    return ("long_prompt_ids",) if len(loss.roles) > 2 else ()


@dataclass(frozen=True)
class _Collator:
    """TRL's collator, and after it the loss's further inputs and long rows.

    Attributes:
        collator: makes input_ids, attention_mask and completion_mask [2 P, T].
        inputs: columns of one number a row.
        roles: responses of an example.
    """

    collator: Callable[[Sequence[Any]], dict[str, Any]]
    inputs: tuple[str, ...]
    roles: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        if self.roles > 2:
            longer = [{**row, "prompt_ids": row["long_prompt_ids"]} for row in rows]
            batch = _beside(batch, self.collator(longer), (self.roles - 2) * len(rows))
        for name in self.inputs:
            if name in rows[0]:
                batch[name] = torch.tensor([float(row[name]) for row in rows])
        return batch


def _beside(short: dict[str, Any], longer: dict[str, Any], rows: int) -> dict[str, Any]:
    """The first rows of the longer batch below the short one, padded to one length."""
    found = dict(short)
    width = max(short["input_ids"].shape[1], longer["input_ids"].shape[1])
    for name in ("input_ids", "attention_mask", "completion_mask"):
        parts = short[name], longer[name][:rows]
        # masked, so any token will do
        padded = [torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts]
        found[name] = torch.cat(padded)
    counts = found["completion_mask"].sum(1)
    if not torch.equal(counts[:rows], counts[-rows:]):
        raise bad_value(
            "max_length",
            "room for the whole response after the long prompt",
            "responses that are cut there and not after the short one",
            "raise max_length, or shorten the long prompts",
        )
    return found


def _augment(trainer: Any) -> None:
    """Train on pairs that an average of the model makes of the dataset's responses."""
    from fusedpo.recipes.self_augmented import SelfAugmented
    from fusedpo.trainers.self_augmented import SelfAugmentedCallback, SelfAugmentedDataset

    settings = trainer.args.settings_of_pairs()
    needs_reference = trainer.fused_loss.needs_reference
    settings.check_loss(needs_reference, adapters=trainer.ref_model is None)
    tokenizer = trainer.processing_class
    rows = [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": row["chosen_ids"]}
        for row in trainer.train_dataset
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    source = SelfAugmented(
        model,
        rows,
        settings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_token(tokenizer, vocabulary(model)),
        rank=trainer.accelerator.process_index,
    )
    trainer.train_dataset = SelfAugmentedDataset(source)
    trainer.add_callback(SelfAugmentedCallback(trainer.train_dataset, ref_model=trainer.ref_model))
