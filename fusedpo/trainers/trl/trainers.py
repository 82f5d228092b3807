"""TRL's trainers without logits, for those who would rather not patch."""

from __future__ import annotations

from typing import Any

from fusedpo.data.rows import some_rows
from fusedpo.trainers.one_run import OneRun, as_told, of_options
from fusedpo.trainers.trl.concatenated import concatenated_forward
from fusedpo.trainers.trl.configs import OF_FORMULAS, ByName
from fusedpo.trainers.trl.groups import LossOfGroups
from fusedpo.trainers.trl.pairs import LossOfPairs
from fusedpo.trainers.trl.patching import patched
from fusedpo.trainers.trl.places import trainer_of
from fusedpo.trainers.trl.replace import Budget, Options
from fusedpo.trainers.trl.tpo import tpo_compute_loss
from fusedpo.trainers.trl.whole_pairs import of_whole_pairs


class _Fused(OneRun):
    """A trainer that is built while TRL is patched, and keeps what it got then."""

    def __init__(
        self,
        *args: Any,
        memory_budget: Budget = None,
        backend: str = "auto",
        gradient_tolerance: float | None = None,
        **kwargs: Any,
    ) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if gradient_tolerance is None:
            gradient_tolerance = getattr(config, "gradient_tolerance", 0.0)
        some_rows(kwargs)
        self._fusedpo_options = Options(memory_budget, backend, gradient_tolerance)
        with patched(**vars(self._fusedpo_options)):
            super().__init__(*args, **kwargs)

    def _options_of_run(self) -> dict[str, Any]:
        loss = self.args.the_loss() if isinstance(self.args, ByName) else None
        if loss is not None:
            return of_options("loss", loss)
        names = [name for name in OF_FORMULAS if hasattr(self.args, name)]
        return {name: as_told(getattr(self.args, name)) for name in names}


class FusedDPOTrainer(_Fused, LossOfPairs, trainer_of("dpo")):  # type: ignore[misc]
    """TRL's ``DPOTrainer`` without logits; takes its arguments, and the options of ``patch``. With
    a ``FusedDPOConfig``, on any loss of pairs of this library."""


class FusedKTOTrainer(_Fused, trainer_of("kto")):  # type: ignore[misc]
    """TRL's ``KTOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedGRPOTrainer(_Fused, LossOfGroups, trainer_of("grpo")):  # type: ignore[misc]
    """TRL's ``GRPOTrainer`` without logits; takes its arguments, and the options of ``patch``. With
    a ``FusedGRPOConfig``, on any policy loss of this library."""


class FusedRLOOTrainer(_Fused, trainer_of("rloo")):  # type: ignore[misc]
    """TRL's ``RLOOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedSFTTrainer(_Fused, trainer_of("sft")):  # type: ignore[misc]
    """TRL's ``SFTTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class _Concatenating(_Fused):
    """What stays with CPO's and ORPO's trainers when the patch is gone."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        plain = super().concatenated_forward.__func__  # type: ignore[misc]
        return concatenated_forward(plain, self._fusedpo_options)(self, model, batch)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], *rest: Any, **by_name: Any
    ) -> Any:
        plain = super().get_batch_loss_metrics.__func__  # type: ignore[misc]
        return of_whole_pairs(plain)(self, model, batch, *rest, **by_name)


class FusedCPOTrainer(_Concatenating, trainer_of("cpo")):  # type: ignore[misc]
    """TRL's ``CPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedORPOTrainer(_Concatenating, trainer_of("orpo")):  # type: ignore[misc]
    """TRL's ``ORPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedTPOTrainer(_Fused, trainer_of("tpo")):  # type: ignore[misc]
    """TRL's ``TPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        plain = super()._compute_loss.__func__
        method = tpo_compute_loss(plain, self._fusedpo_options)
        return method(self, model, inputs, return_outputs)
