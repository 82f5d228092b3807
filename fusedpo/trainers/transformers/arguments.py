"""What a trainer is given, checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainingArguments

from fusedpo.checks import bad_type, bad_value
from fusedpo.data.padding import RowCollator, check_columns
from fusedpo.data.rows import some_rows
from fusedpo.losses import Loss
from fusedpo.trainers.transformers.reference import BASE


def check_given(model: Any, loss: Loss, ref_model: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(loss, Loss):
        raise bad_type("loss", "a loss, such as fusedpo.losses.SimPO()", repr(loss))
    some_rows(options)
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
        got = "the model that is trained"
        remedy = "leave it out, for a frozen copy of the model as it is now"
        raise bad_value("ref_model", "a model of its own", got, remedy)
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if options.get(name) is not None:
            expected, remedy = "None, as no logits are made", "leave it out; the loss has metrics"
            raise bad_value(name, expected, repr(options[name]), remedy)
    if ref_model == BASE:
        if model is not None and not hasattr(model, "disable_adapter"):
            expected = "a model of its own, beside a model without adapters"
            raise bad_value("ref_model", expected, repr(BASE), "load it, or leave it out")
        ref_model = None
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


def check_arguments(args: TrainingArguments, loss: Loss) -> None:
    """Refuse what would change a loss of logits, or which rows a batch is of, and does not here."""
    own = (
        "label_smoothing of the loss" if hasattr(loss, "label_smoothing") else "a loss that has it"
    )
    if args.label_smoothing_factor:
        got = str(args.label_smoothing_factor)
        raise bad_value("label_smoothing_factor", "0, as no logits are made", got, f"take {own}")
    if args.label_names not in (None, ["labels"]):
        got = repr(args.label_names)
        raise bad_value("label_names", "None or ['labels']", got, "leave it out")
    if args.world_size > 1 and not args.average_tokens_across_devices:
        expected = "True, as every pair counts the same on whichever process"
        raise bad_value("average_tokens_across_devices", expected, "False", "leave it out")
    past = getattr(args, "past_index", -1)  # gone from transformers 5.23
    if past >= 0:
        raise bad_value("past_index", "-1, as no states are kept", str(past))
    config: Any = args.accelerator_config
    if config.dispatch_batches:
        expected = "None or False, as batches would be cut between chosen and rejected"
        raise bad_value("accelerator_config.dispatch_batches", expected, "True", "leave it out")
    parallel = getattr(args, "parallelism_config", None)
    if any(getattr(parallel, name, False) for name in ("cp_enabled", "sp_enabled")):
        got = "context or sequence parallelism"
        expected = "whole sequences on every process"
        remedy = "leave it out; in a loop of your own preference_loss takes sequence_group"
        raise bad_value("parallelism_config", expected, got, remedy)
    if args.use_liger_kernel:
        # Liger's layers, but not its heads, of which one replaces the model's forward
        asked = args.liger_kernel_config or {}
        heads = ("fused_linear_cross_entropy", "cross_entropy")
        for name in heads:
            if asked.get(name):
                expected = "False or nothing, as the head is fused here"
                raise bad_value(f"liger_kernel_config[{name!r}]", expected, "True", "leave it out")
        args.liger_kernel_config = {**asked, **dict.fromkeys(heads, False)}


def check_sampling(args: TrainingArguments, rows: Any) -> None:
    """Refuse sampling by lengths that Trainer does not find: it looks for input_ids."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    of_lengths = strategy in ("group_by_length", "batch_rebalance")
    names = getattr(rows, "column_names", None) or ()
    if rows is not None and of_lengths and args.length_column_name not in names:
        column = args.length_column_name
        expected = f"'random', as train_dataset is no datasets.Dataset with the column {column}"
        remedy = f"add the column {column}, of tokens a row, or leave it out"
        raise bad_value("train_sampling_strategy", expected, repr(strategy), remedy)


def check_rows(
    options: Mapping[str, Any], columns: Sequence[str], made_by: str = RowCollator.made_by
) -> None:
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
                    check_columns(each[0], columns, name, made_by)
            elif names:
                check_columns(dict.fromkeys(names), columns, name, made_by)
