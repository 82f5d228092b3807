"""The losses of this library in TRL's trainers, by name, on TRL's data formats.

    from fusedpo.trainers.trl import FusedDPOConfig, FusedDPOTrainer

    args = FusedDPOConfig("out", fused_loss="s-sppo", fused_loss_args={"beta": 1e-3})
    FusedDPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer).train()

``FusedDPOConfig`` takes any loss of pairs: rows have prompt, chosen and rejected as ever, and the
loss's further inputs as columns (``win_rate_chosen``, ``similarity``, ...). For ``solopo`` rows
have the long context in ``long_prompt``, and are run in forwards of nearly their own lengths. With
``self_augmented=True`` an average of the model writes the rejected responses, and rows need prompt
and chosen only. ``FusedGRPOConfig`` takes any policy loss (``sspo``, ``gspo``, ...) in the place of
``loss_type``. Without ``fused_loss`` both are TRL's own. With it, they need TRL 1.15, and refuse
the options of TRL's own formulas, which would have no effect; and TRL's own trainers refuse them,
at the first step, as ``loss_type`` then names the trainer that has the loss. So they do with a
``gradient_tolerance``, which they know nothing of; beside ``patch`` it is an option of that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar

import trl.trainer.utils
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig

from fusedpo import losses
from fusedpo.checks import bad_choice, bad_type, bad_value, called
from fusedpo.engine.tolerance import check_tolerance
from fusedpo.losses import PolicyLoss, PreferenceLoss
from fusedpo.recipes.self_augmented import Settings

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
# of any of TRL's formulas
OF_FORMULAS = (
    *dict.fromkeys((*_OF_DPO, *_OF_GRPO)),
    *("desirable_weight", "undesirable_weight", "cpo_alpha", "simpo_gamma", "alpha"),
    *("tpo_alpha", "tpo_l_gamma"),
)


@dataclass
class ByName:
    """What is added to TRL's configurations."""

    _trainer: ClassVar[str]

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
        self.loss_type = self._trls_loss_type  # a configuration may be made of another's values
        super().__post_init__()  # type: ignore[misc]
        if self.gradient_tolerance and self._named()[0] is None:
            # as with a fused_loss: a trainer of TRL's own would train with exact gradients
            self.loss_type = _each(self.loss_type, lambda name: f"{name}{self._with_tolerance}")

    def of_trainer(self) -> Any:
        """A copy as TRL has it, for a trainer of this library, which knows what else there is."""
        copied = copy.copy(self)
        copied.loss_type = self._trls_loss_type
        return copied

    @property
    def _trls_loss_type(self) -> Any:
        return _each(self.loss_type, lambda name: name.removesuffix(self._with_tolerance))

    @property
    def _with_tolerance(self) -> str:
        return f" with gradient_tolerance, of {self._trainer}"

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
        if not isinstance(name, str):
            remedy = "its hyperparameters go into fused_loss_args"
            raise bad_value("fused_loss", "the name of a loss, as text", repr(name), remedy)
        if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
            raise bad_value("fused_loss", "None with TRL before 1.15", name, "update TRL")
        with called("fused_loss", "loss"):
            return losses.get(name, **given)

    def _named(self) -> tuple[str | None, dict[str, Any]]:
        """The name of the loss, and its hyperparameters."""
        return self.fused_loss, dictionary("fused_loss_args", self.fused_loss_args)

    @property
    def _of_fused_loss(self) -> Any:
        """``loss_type`` in the place of TRL's, so that a trainer of TRL's own says that it does not
        know it, and does not train with another loss."""
        return f"{self.fused_loss or 'self_augmented'}, of {self._trainer}"

    def _refuse(self, names: Iterable[str], remedy: str) -> None:
        """Raise if one of these options of TRL's was set, whichever of them this TRL has."""
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            # a configuration may be made of the values of another
            without = default, self._of_fused_loss if f.name == "loss_type" else default
            if f.name in names and (got := getattr(self, f.name)) not in without:
                raise bad_value(f.name, f"{default!r} with this fused_loss", repr(got), remedy)


def _each(names: Any, change: Callable[[str], str]) -> Any:
    """One name of a loss, or each of several, changed."""
    if isinstance(names, list):
        return [_each(name, change) for name in names]
    return change(names) if isinstance(names, str) else names


def dictionary(name: str, given: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise bad_value(name, "valid JSON", f"{given!r}: {error}") from None
    if given is not None and not isinstance(given, dict):
        raise bad_type(name, "a dictionary, or one as JSON", repr(given))
    return given or {}


@dataclass
class FusedDPOConfig(ByName, DPOConfig):
    """TRL's ``DPOConfig``, and the name of a loss of pairs, for TRL 1.15 and later.

    With ``fused_loss``, options of TRL's own formulas (``loss_type``, ``beta``,
    ``label_smoothing``, ...) are refused.

    Attributes:
        fused_loss: see ``fusedpo losses``; takes the place of ``loss_type``.
        fused_loss_args: hyperparameters, as a dictionary or as JSON.
        gradient_tolerance: as of ``patch``, unless the trainer is given another.
        length_groups: whether rows of nearly one length are run together, each group in a forward
            of its own length, with at most 1.1 times the tokens of the rows: the same loss. None:
            for a loss of more than two responses (``solopo``). With ``fused_loss``; not under FSDP
            and DeepSpeed, and not with images or the auxiliary loss of experts.
        self_augmented: whether an average of the model writes the rejected responses; with the
            loss that ``fused_loss`` names, or with DPO, at TRL's ``beta`` if ``fused_loss_args``
            has none.
        self_augmented_args: of ``fusedpo.recipes.self_augmented.Settings``.
    """

    _trainer: ClassVar[str] = "FusedDPOTrainer"

    length_groups: bool | None = field(
        default=None,
        metadata={"help": "Run rows of nearly one length together, with little padding."},
    )
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
            expected, remedy = "None without self_augmented", "set self_augmented=True"
            raise bad_value("self_augmented_args", expected, got, remedy)
        loss = self.the_loss()
        if loss is None:
            if self.length_groups:
                expected, remedy = "None or False without fused_loss", "name a fused_loss"
                raise bad_value("length_groups", expected, "True", remedy)
            return
        if not isinstance(loss, PreferenceLoss):
            raise bad_value("fused_loss", "a loss of pairs", repr(loss), "use FusedGRPOConfig")
        if loss.roles[:2] != ("chosen", "rejected"):
            remedy = "for KTO use TRL's KTOConfig, with FusedKTOTrainer"
            raise bad_value("fused_loss", "a loss of pairs", repr(loss), remedy)
        used = ("beta",) if self._takes_beta() else ()
        self._refuse(set(_OF_DPO).difference(used), "use fused_loss_args")
        if self.self_augmented and loss.inputs:
            expected = "a loss that takes no further columns, which self-augmented pairs lack"
            raise bad_value("fused_loss", expected, repr(loss), "leave self_augmented out")
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
        self.loss_type = self._of_fused_loss

    @property
    def _of_fused_loss(self) -> list[str]:
        return [super()._of_fused_loss]

    def settings_of_pairs(self) -> Settings:
        """``self_augmented_args``, with the defaults of what they leave out."""
        given = dictionary("self_augmented_args", self.self_augmented_args)
        known = [f.name for f in fields(Settings)]
        for name in given:
            if name not in known:
                raise bad_choice("self_augmented_args", name, known)
        return Settings(**given)

    def _named(self) -> tuple[str | None, dict[str, Any]]:
        name, given = super()._named()
        if self.self_augmented and name is None:
            return "dpo", {"beta": self.beta, **given}
        return name, given

    def _takes_beta(self) -> bool:
        """Whether TRL's ``beta`` is that of the loss."""
        given = dictionary("fused_loss_args", self.fused_loss_args)
        return self.self_augmented and self.fused_loss is None and "beta" not in given


@dataclass
class FusedGRPOConfig(ByName, GRPOConfig):
    """TRL's ``GRPOConfig``, and the name of a policy loss, for TRL 1.15 and later.

    TRL's ``beta`` is the weight of the KL term of any loss, and ``use_bias_correction_kl`` says
    which estimator it has, unless ``fused_loss_args`` has a ``kl_estimator``. With ``fused_loss``,
    options of TRL's own formulas (``loss_type``, ``epsilon``, ``delta``, ...) are refused.

    Attributes:
        fused_loss: see ``fusedpo losses``; takes the place of ``loss_type``.
        fused_loss_args: hyperparameters, as a dictionary or as JSON.
        gradient_tolerance: as of ``patch``, unless the trainer is given another.
    """

    _trainer: ClassVar[str] = "FusedGRPOTrainer"

    def __post_init__(self) -> None:
        super().__post_init__()
        loss = self.the_loss()
        if loss is None:
            return
        if not isinstance(loss, PolicyLoss):
            raise bad_value("fused_loss", "a policy loss", repr(loss), "use FusedDPOConfig")
        if loss.kl_weight != self.beta:
            expected = f"{self.beta}, as beta, by which TRL loads a reference"
            raise bad_value("kl_weight", expected, str(loss.kl_weight), "set beta")
        self._refuse(_OF_GRPO, "use fused_loss_args")
        if "kl_estimator" in dictionary("fused_loss_args", self.fused_loss_args):
            self._refuse(("use_bias_correction_kl",), "kl_estimator in fused_loss_args decides")
        whole = loss.formula_structure.scope != "token" and not loss.absorbs_correction
        corrected = self.use_vllm and getattr(self, "vllm_importance_sampling_correction", False)
        mode = getattr(self, "vllm_importance_sampling_mode", "")
        if whole and corrected and str(mode).startswith("token"):
            raise bad_value(
                "vllm_importance_sampling_mode",
                "sequence_truncate or sequence_mask, as the loss has one ratio a response",
                mode,
            )
        self.loss_type = self._of_fused_loss

    def the_loss(self) -> Any:
        loss = super().the_loss()
        if isinstance(loss, PolicyLoss) and self.beta:
            loss = replace(loss, kl_weight=loss.kl_weight or self.beta)
            if "kl_estimator" not in dictionary("fused_loss_args", self.fused_loss_args):
                estimator: Any = "k3_corrected" if self.use_bias_correction_kl else "k3"
                loss = replace(loss, kl_estimator=estimator)
        return loss
