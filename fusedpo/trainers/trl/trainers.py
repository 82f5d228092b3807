"""TRL's trainers without logits, for those who would rather not patch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from fusedpo.checks import bad_value, near_names
from fusedpo.data.rows import some_rows
from fusedpo.trainers.one_run import OneRun, as_told, of_options
from fusedpo.trainers.trl.concatenated import concatenated_forward
from fusedpo.trainers.trl.configs import OF_FORMULAS, ByName
from fusedpo.trainers.trl.groups import LossOfGroups
from fusedpo.trainers.trl.pairs import LossOfPairs
from fusedpo.trainers.trl.patching import patched
from fusedpo.trainers.trl.places import of_package, trainer_of
from fusedpo.trainers.trl.replace import Budget, Options
from fusedpo.trainers.trl.tpo import tpo_compute_loss
from fusedpo.trainers.trl.whole_pairs import of_whole_pairs

_PAIRS = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"))


class _Fused(OneRun):
    """A trainer that is built while TRL is patched, and keeps what it got then.

    Attributes:
        columns: that rows need: those of one of these kinds.
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt",),)

    def __init__(
        self,
        *args: Any,
        memory_budget: Budget = None,
        backend: str = "auto",
        gradient_tolerance: float | None = None,
        **kwargs: Any,
    ) -> None:
        given = self._by_name(args, kwargs)
        config = given.get("args")
        if gradient_tolerance is None:
            gradient_tolerance = getattr(config, "gradient_tolerance", 0.0)
        if isinstance(config, ByName):
            own = config.of_trainer()
            args = tuple(own if each is config else each for each in args)
            kwargs = {name: own if each is config else each for name, each in kwargs.items()}
        some_rows(given)
        # rows of another kind may be for a collator of their own
        if given.get("data_collator") is None and given.get("formatting_func") is None:
            _check_columns(given, tuple(self._needed(config)))
        self._fusedpo_options = Options(memory_budget, backend, gradient_tolerance)
        with patched(**vars(self._fusedpo_options)):
            super().__init__(*args, **kwargs)

    @classmethod
    def _by_name(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of TRL's trainer by their names there."""
        own: Any = next((base for base in cls.__mro__ if of_package(base, "trl")), cls)
        try:
            return inspect.signature(own.__init__).bind_partial(None, *args, **kwargs).arguments
        except TypeError:  # TRL says so itself
            return kwargs

    def _needed(self, config: Any) -> Iterable[tuple[str, ...]]:
        return self.columns

    def _options_of_run(self) -> dict[str, Any]:
        loss = self.args.the_loss() if isinstance(self.args, ByName) else None
        if loss is not None:
            return of_options("loss", loss)
        names = [name for name in OF_FORMULAS if hasattr(self.args, name)]
        return {name: as_told(getattr(self.args, name)) for name in names}


def _check_columns(given: Mapping[str, Any], kinds: tuple[tuple[str, ...], ...]) -> None:
    """Refuse a dataset that has the columns of none of these kinds; TRL ends it by a KeyError."""
    for argument in ("train_dataset", "eval_dataset"):
        for columns in _columns_of(given.get(argument)):
            if any(set(kind) <= set(columns) for kind in kinds):
                continue
            # of the kind of which most is there
            there = {kind: len(set(kind) & set(columns)) for kind in kinds}
            nearest = max(there, key=there.__getitem__)
            missing = [name for name in nearest if name not in columns]
            others = [name for name in columns if name not in nearest]
            near = [f"{n}: {hint}" for n in missing if (hint := near_names(n, others))]
            raise bad_value(
                argument,
                f"the columns {' or '.join(', '.join(kind) for kind in kinds)}",
                f"{', '.join(columns) or 'none'} ({', '.join(missing)} missing)",
                " ".join([*near, "rename columns with rename_columns"]),
            )


def _columns_of(dataset: Any) -> Iterator[list[str]]:
    """The columns of each of the datasets that are given, where they are known."""
    for each in dataset.values() if isinstance(dataset, dict) else (dataset,):
        if isinstance(names := getattr(each, "column_names", None), list):
            yield names


class FusedDPOTrainer(_Fused, LossOfPairs, trainer_of("dpo")):  # type: ignore[misc]
    """TRL's ``DPOTrainer`` without logits; takes its arguments, and the options of ``patch``. With
    a ``FusedDPOConfig``, on any loss of pairs of this library."""

    columns = _PAIRS

    def _needed(self, config: Any) -> Iterable[tuple[str, ...]]:
        if getattr(config, "self_augmented", False):  # the model writes what is rejected
            return (kind[:1] for kind in self.columns)
        return self.columns


class FusedKTOTrainer(_Fused, trainer_of("kto")):  # type: ignore[misc]
    """TRL's ``KTOTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    columns = (
        ("prompt", "completion", "label"),
        ("prompt_ids", "completion_ids", "label"),
        *_PAIRS,
    )


class FusedGRPOTrainer(_Fused, LossOfGroups, trainer_of("grpo")):  # type: ignore[misc]
    """TRL's ``GRPOTrainer`` without logits; takes its arguments, and the options of ``patch``. With
    a ``FusedGRPOConfig``, on any policy loss of this library."""


class FusedRLOOTrainer(_Fused, trainer_of("rloo")):  # type: ignore[misc]
    """TRL's ``RLOOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedSFTTrainer(_Fused, trainer_of("sft")):  # type: ignore[misc]
    """TRL's ``SFTTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    columns = (("messages",), ("prompt", "completion"), ("conversations",), ("input_ids",))

    def _needed(self, config: Any) -> Iterable[tuple[str, ...]]:
        if (getattr(config, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
            return ((),)
        return ((getattr(config, "dataset_text_field", "text"),), *self.columns)


class _Concatenating(_Fused):
    """What stays with CPO's and ORPO's trainers when the patch is gone."""

    columns = _PAIRS

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

    columns = _PAIRS

    def _needed(self, config: Any) -> Iterable[tuple[str, ...]]:
        if getattr(config, "tpo_alpha", 1.0) == 0:
            return self.columns
        return (("reference", *_PAIRS[0]), ("reference_ids", *_PAIRS[1]))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        plain = super()._compute_loss.__func__
        method = tpo_compute_loss(plain, self._fusedpo_options)
        return method(self, model, inputs, return_outputs)
