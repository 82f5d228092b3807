"""What `make test` leaves to `make test-slow`, and why: the one place where a test is marked slow.

Of every area a part stays in `make test`: of most tests below their first case, of every test on
both backends its first case in Triton's interpreter. What is not named here is not slow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pytest


@dataclass(frozen=True)
class Slow:
    """Tests of a file below tests/.

    Attributes:
        first: of these the first case stays in `make test`.
        every: of these every so many-th case does, beginning with the first.
        none: of these no case does; ``test[triton]``, none in the interpreter.
        using: no test does that uses one of these fixtures, which take long to make.

    With none of the four, no test of the file does.
    """

    file: str
    why: str
    first: tuple[str, ...] = ()
    every: Mapping[str, int] = field(default_factory=dict)
    none: tuple[str, ...] = ()
    using: tuple[str, ...] = ()


TABLE = (
    Slow(
        "compact/test_audit.py",
        "states of a language model",
        none=("test_it_is_near_the_error_of_a_real_model",),
    ),
    Slow(
        "compact/test_bytes.py",
        "measures the memory of every need and dtype",
        every={"test_it_holds_what_the_plan_says": 5},
    ),
    Slow(
        "compact/test_options.py",
        "every loss, and kernels in the interpreter",
        every={"test_kernels": 5, "test_half_precision_operands_as_on_a_gpu": 2},
    ),
    Slow(
        "compact/test_promise.py",
        "states of trained models, and all tolerances of all states",
        every={"test_it_holds_on_states_by_which_approximations_go_wrong": 3},
        none=(
            "test_it_holds_on_a_real_model",
            "test_it_holds_on_texts_of_all_kinds",
            "test_it_holds_on_a_trained_toy",
        ),
    ),
    Slow(
        "distributed/test_compact.py",
        "every head over slices of every kind",
        every={"test_slices_of_a_vocabulary": 4},
        first=("test_a_breach_is_corrected_on_both",),
    ),
    Slow(
        "distributed/test_sequences.py",
        "every loss on two processes, padded and packed",
        first=("test_losses",),
        none=("test_both_groups_of_two",),
    ),
    Slow(
        "distributed/test_vocabulary.py",
        "every loss and ten cases at once on two processes",
        first=("test_generated_cases", "test_kernels", "test_losses"),
    ),
    Slow("kernels/test_launches.py", "compiles whatever the engine launches, for two targets"),
    Slow(
        "kernels/test_machine_code.py",
        "compiles every kernel for a target",
        none=("test_kernels_keep_their_promises",),
        using=("planted",),
    ),
    Slow(
        "kernels/test_tune.py",
        "measures tiles by running them",
        none=("test_the_command_prints_a_table_and_marks_the_choice",),
    ),
    Slow("lazy/test_chains.py", "a thousand chains of operations", none=("test_many_chains",)),
    Slow(
        "lazy/test_everywhere.py",
        "starts programs that start others",
        none=(
            "test_a_program_that_is_run_has_lazy_logits_and_so_has_what_it_starts",
            "test_a_program_without_models_is_left_alone_and_keeps_its_exit_status",
        ),
    ),
    Slow("lazy/test_wrappers.py", "gradients on two processes, by DDP and FSDP"),
    Slow(
        "losses/test_a_new_loss.py",
        "runs the tests of a copy of the repository",
        none=("test_it_is_two_files_and_nothing_else_by_hand",),
    ),
    Slow(
        "mutants/test_run.py",
        "waits for a planted fault that does not end",
        none=("test_what_is_noticed_and_what_is_not",),
    ),
    Slow(
        "test_bench_command.py",
        "asks a whole question, by the command",
        none=(
            "test_a_question_is_answered_as_json",
            "test_an_interrupt_leaves_no_half_written_file",
        ),
    ),
    Slow(
        "test_benchmarks.py",
        "runs benchmarks/gpu.sh, or a benchmark in processes of its own",
        first=("test_every_peer_computes_the_same",),
        none=(
            "test_what_runs_out_of_time_is_interrupted_and_says_what_it_knows",
            "test_out_of_memory_is_told_apart",
            "test_an_interrupted_measurement_is_not_taken_for_the_next",
        ),
        using=("dry_run",),
    ),
    Slow(
        "test_cli.py",
        "trains the model of `make demo`, or starts the command and interrupts it",
        none=(
            "test_an_interruption_leaves_nothing_half_done",
            "test_the_demonstration_trains_saves_and_compares",
            "test_reference_memory_budget_and_comparison",
            "test_under_fsdp_the_model_is_saved_whole_and_nothing_is_compared",
        ),
    ),
    Slow(
        "test_compact_benchmark.py",
        "measures in processes of its own",
        none=("test_every_way_has_its_numbers",),
    ),
    Slow(
        "test_compare.py",
        "trains by two programs in processes of their own",
        none=("test_comparison_measures_what_it_says",),
    ),
    Slow(
        "test_convergence.py",
        "trains a small model to its end, three times",
        none=("test_a_loss_in_bf16_stays_within_what_rounding_does",),
    ),
    Slow("test_docs.py", "trains on two processes", none=("test_distributed",)),
    Slow(
        "test_doctor.py",
        "starts the command",
        none=("test_the_command_as_it_is_installed_here",),
    ),
    Slow(
        "test_footprint.py",
        "measures the memory of a whole training step",
        first=("test_fusedpo_holds_what_is_predicted",),
        none=("test_peers_hold_what_is_predicted_and_no_buffer_can_be_left_out",),
    ),
    Slow("test_kill_and_resume.py", "kills trainings and goes on with them"),
    Slow(
        "test_launch.py", "trains on two processes, by torchrun and accelerate", using=("folder",)
    ),
    Slow(
        "test_liger_shaped.py",
        "five hundred combinations of options",
        every={"test_grpo": 5},
    ),
    Slow(
        "test_logprobs.py",
        "generated cases by every route, differences by every entry, thousands of tiny tiles",
        every={
            "test_equals_the_naive_program_by_every_route": 7,
            "test_entropy_has_its_gradient": 7,
            "test_gradcheck": 3,
        },
        none=(
            "test_the_tile_does_not_change_the_answer",
            "test_the_error_does_not_grow_with_the_number_of_tiles[triton]",
            "test_half_precision_operands_of_a_device_that_accumulates_in_fp32",
        ),
    ),
    Slow(
        "test_memory.py",
        "measures the memory of every loss, and of every route at several budgets",
        first=(
            "test_a_loss_holds_what_the_plan_says",
            "test_every_loss_takes_three_products_if_its_gradient_is_known_early",
            "test_holds_what_the_plan_says",
        ),
    ),
    Slow(
        "test_objective.py",
        "every loss by every route",
        every={
            "test_equals_the_naive_program": 7,
            "test_a_long_response_gives_the_same_gradient_on_every_route": 5,
        },
        none=("test_equals_the_naive_program_as_planned[triton]",),
    ),
    Slow(
        "test_operators.py",
        "traces a training step by torch.compile for every loss and layout",
        first=("test_a_training_step_is_one_graph", "test_a_policy_step_is_one_graph"),
    ),
    Slow(
        "test_packaging.py",
        "builds, installs and imports in environments made for it",
        none=("test_checkout_without_links_is_importable", "test_it_works_without"),
        using=("editable", "imports", "installed", "pypi_kernels", "wheel"),
    ),
    Slow(
        "test_policy.py",
        "every loss by every route, thousands of tiny tiles",
        every={"test_equals_the_naive_program": 5, "test_equals_the_naive_program_as_planned": 5},
        none=("test_the_ratio_to_the_same_policy_is_one[triton]",),
    ),
    Slow(
        "test_precision_benchmark.py",
        "measures every program in every dtype",
        none=(
            "test_a_worse_program_ranks_behind",
            "test_the_command_writes_the_answer",
            "test_the_plot_names_every_program",
            "test_what_depends_on_the_batch_is_noise_on_policy",
            "test_what_fails_says_why_and_ranks_nowhere",
        ),
        using=("usual",),
    ),
    Slow(
        "test_properties.py",
        "every loss, watching each operation for tensors as large as the logits",
        every={"test_no_loss_makes_logits": 5},
    ),
    Slow(
        "test_scores.py",
        "a reference of thousands of tokens, in the interpreter too",
        none=("test_a_long_reference_that_equals_its_policy_leaves_nothing",),
    ),
    Slow("test_site.py", "builds the docs site", using=("site",)),
    Slow(
        "test_smollm2.py", "loads it", none=("test_it_is_saved_as_any_model_is_and_known_to_plan",)
    ),
    Slow(
        "test_states.py",
        "samples from a language model, trains a small one, and has a head of 262,144 columns",
        none=(
            "test_a_real_model_is_as_certain_as_it_is",
            "test_a_larger_vocabulary_is_as_empty_as_that_of_gemma",
            "test_the_toy_is_peaked_as_a_trained_model_is",
        ),
    ),
    Slow(
        "test_training_benchmark.py",
        "whole training steps of every program",
        first=("test_programs_are_what_they_are_called",),
        none=("test_from_end_to_end",),
    ),
    Slow(
        "trainers/test_earlier_checkpoints.py",
        "trains and goes on",
        first=("test_a_checkpoint_of_0_1_0_is_gone_on_from",),
    ),
    Slow(
        "trainers/test_groups.py",
        "several trainings with samples of their own",
        none=(
            "test_a_resumed_run_samples_when_it_would_have",
            "test_a_model_is_not_trained_on_the_samples_of_the_one_before",
        ),
    ),
    Slow(
        "trainers/test_methods.py",
        "several trainings each",
        first=("test_every_method_trains_and_logs_its_signals",),
        none=(
            "test_the_reference_of_self_augmented_is_renewed_as_told",
            "test_self_augmented_with_dpo_leaves_out_the_shared_prefix",
            "test_resuming_self_augmented_goes_on",
        ),
    ),
    Slow(
        "trainers/test_self_augmented.py",
        "trains, stops and goes on",
        first=("test_a_resumed_run_is_the_one_that_never_stopped",),
        none=(
            "test_batches_ahead_come_again_and_then_new_ones",
            "test_a_run_resumed_twice_is_the_one_that_never_stopped",
            "test_training_twice_starts_with_nothing_ahead",
        ),
    ),
    Slow("trainers/test_sharded.py", "gradients on two processes, by DDP and FSDP"),
    Slow(
        "trainers/test_transformers.py",
        "several trainings each, on two processes or compiled",
        first=(
            "test_accumulation_equals_one_batch",
            "test_the_reference_of_adapters_is_a_copy_of_them",
        ),
        none=(
            "test_two_processes_equal_one",
            "test_models_of_earlier_trainings_are_not_held_on_to",
            "test_a_compiled_model_is_trained_alike",
            "test_models_are_made_anew_with_a_head_and_a_reference",
        ),
    ),
    Slow(
        "trainers/test_trl.py",
        "trains each model twice, by TRL as it is and patched",
        first=(
            "test_autocast",
            "test_own_copy_as_reference",
            "test_logits_are_what_would_be_seen",
            "test_a_weaker_gradient_is_noticed",
            "test_unknown_head_makes_its_own_logits",
            "test_dora_on_the_head",
            "test_classes",
            "test_saved_models_are_those_of_trl",
            "test_resume",
        ),
        every={
            "test_every_loss": 8,
            "test_every_family": 9,
            "test_every_mode": 7,
            "test_adapters": 7,
        },
        none=(
            "test_adapted_head",
            "test_compute_metrics_still_gets_logits",
            "test_fp32_head_of_a_bf16_model",
            "test_prompt_tuning",
            "test_trained_tokens",
        ),
    ),
    Slow(
        "trainers/test_trl_losses.py",
        "trains by TRL and by the loss of that name here",
        first=(
            "test_pairs_equal_trl_where_it_has_the_loss",
            "test_groups_equal_trl_where_it_has_the_loss",
            "test_other_losses_are_those_of_the_batch",
            "test_what_comes_with_samples_counts_as_in_trl",
        ),
        none=(
            "test_the_reference_of_an_adapted_policy_is_its_base_model",
            "test_groups_of_an_adapted_policy_equal_trl",
            "test_groups_are_evaluated_as_by_trl",
            "test_the_reference_of_adapters_trained_before_is_a_copy_of_them",
            "test_means_of_tokens_are_those_of_the_step",
            "test_experts_are_trained_as_by_trl",
            "test_without_a_name_the_trainer_is_trls",
            "test_responses_that_are_cut_after_the_long_prompt_only_are_refused",
            "test_the_auxiliary_loss_of_experts_is_added_to_that_of_pairs",
            "test_images_in_prompts_are_refused",
        ),
    ),
    Slow(
        "trainers/test_trl_missing.py",
        "trains on two processes",
        none=("test_two_processes_gather_as_many_numbers",),
    ),
    Slow(
        "trainers/test_trl_reach.py",
        "trains by each of TRL's trainers",
        first=("test_a_trainer_that_is_reached_says_nothing",),
        none=(
            "test_a_trainer_with_its_own_way_says_so_before_and_after_its_first_step",
            "test_a_loss_by_name_is_reached_too",
            "test_where_the_models_forward_never_runs_trls_own_is_taken",
        ),
    ),
)


def mark(items: Iterable[pytest.Item]) -> None:
    """Mark what is slow."""
    rows = {row.file: row for row in TABLE}
    seen: Counter[tuple[str, str, bool]] = Counter()
    for item in items:
        file, name = item.location[0].removeprefix("tests/"), getattr(item, "originalname", "")
        given = item.callspec.params if hasattr(item, "callspec") else {}
        interpreted = given.get("backend") == "triton"
        number = seen[file, name, interpreted]
        seen[file, name, interpreted] += 1
        fixtures = getattr(item, "fixturenames", ())
        if (interpreted and number) or _slow(rows.get(file), name, fixtures, interpreted, number):
            item.add_marker("slow")


def _slow(
    row: Slow | None, name: str, fixtures: Iterable[str], interpreted: bool, number: int
) -> bool:
    """Whether a row of the table says so of a case; number: among those of its test and backend."""
    if row is None:
        return False
    if not (row.first or row.every or row.none or row.using):
        return True
    none = name in row.none or (interpreted and f"{name}[triton]" in row.none)
    later = (number and name in row.first) or number % row.every.get(name, 1)
    return none or bool(later) or not set(row.using).isdisjoint(fixtures)
