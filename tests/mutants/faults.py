"""The faults that run.py plants: mistakes of one line that a careful person makes.

Each names the tests that are to notice it, few enough to take seconds. They are of everything
outside of the engine and its kernels, whose faults tests/test_mutants.py plants; a few of the
engine's that cannot be planted there are at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """file: of the repository; old: text that it has once; new: in its place; breaks: what then is
    wrong; tests: see run.words; equivalent: why it changes nothing; unseen: why no test sees it."""

    file: str
    old: str
    new: str
    breaks: str
    tests: str
    equivalent: str = ""
    unseen: str = ""

    @property
    def name(self) -> str:
        shown = [" ".join(text.split()) or "nothing" for text in (self.old, self.new)]
        return f"{self.file}: {shown[0]} -> {shown[1]}"


def _in(file: str, tests: str, *faults: tuple[str, ...] | dict[str, str]) -> Iterator[Fault]:
    """Faults of one file: (old, new, breaks) or (old, new, breaks, other tests), or by name."""
    for each in faults:
        given = each if isinstance(each, dict) else dict(zip(_NAMES, each, strict=False))
        yield Fault(**{"file": file, "tests": tests, **given})


_NAMES = ("old", "new", "breaks", "tests")

_TRAINERS = (
    *_in(
        "fusedpo/trainers/groups.py",
        "trainers/test_groups.py",
        (" + self.args.process_index,", ",", "processes sample alike"),
        ("1_000_003 * (seed + 1)", "1_000_003", "the same samples at every step"),
        ("rewards.std(1).mean()", "rewards.std()", "deviation over all groups"),
        (
            'aligned_labels(batch["labels"]),\n            temperature=self.temperature,',
            'aligned_labels(batch["labels"]),\n            temperature=1.0,',
            "old log-probabilities at another temperature",
        ),
        ("sums[1] / len(rows)", "sums[1] / len(own)", "mean length over own prompts"),
        ("self._left = self.updates", "self._left = self.updates - 1", "one update too few"),
        (
            "        if not self._trains(model):\n",
            "        if False:\n",
            "evaluation takes samples that are to be trained on",
        ),
        (
            "        self._left = 0\n        path = None",
            '        self._left = getattr(self, "_left", 0)\n        path = None',
            "a training begins with the samples of another",
        ),
        (
            "    @torch.no_grad()\n    def _logprobs",
            "    def _logprobs",
            "every sample keeps a graph",
        ),
        ("rows[i // self.group_size]", "rows[i % len(rows)]", "rewards of another row"),
        ("with evaluating(model):", "with torch.no_grad():", "old log-probabilities with dropout"),
        ('{"left": self._left}', '{"left": self.updates}', "updates begin anew when resumed"),
        (
            "Sampling(temperature=temperature)",
            "Sampling()",
            "sampled at another temperature than it is trained at",
        ),
        (
            "Sampling(temperature=temperature)",
            "Sampling(temperature=temperature, top_k=2)",
            "the sampling policy is another one",
        ),
        ("for row in own], -1)", "for row in own], self.state.global_step)", "other samples later"),
        ("range(min(self.eval_prompts, len(rows)))", "range(len(rows))", "eval_prompts ignored"),
        ("sums = [sum(rewards), float", "sums = [sum(rewards) / len(rows), float", "reward / n^2"),
        ("self.args.seed + 1_000_003", "1_000_003", "another seed, the same samples"),
        (
            'self.eos_token_id = getattr(tokenizer, "eos_token_id", None)',
            "self.eos_token_id = None",
            "no response ends by itself",
        ),
        (
            "            memory_budget=self.memory_budget,\n",
            "",
            "old log-probabilities beyond the budget",
        ),
        (
            "self._sampled if self._left else {}",
            "self._sampled",
            "samples that are used up are saved",
        ),
        (
            'f"samples-{self.args.process_index}.safetensors"',
            '"samples-0.safetensors"',
            "processes overwrite each other's samples",
        ),
        (
            "self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)",
            "pass",
            "callbacks do not hear of evaluation",
        ),
        ("        self.log(found)\n", "", "evaluation is not logged"),
        (
            "loss=loss, **options)",
            'loss=loss, **{**options, "ref_model": None})',
            "another reference than was given",
        ),
        (
            "[self.max_new_tokens] * len(prompts)",
            "[self.max_new_tokens - 1] * len(prompts)",
            "responses a token shorter",
        ),
        (
            "rewards, self.group_size, self.pad_token_id",
            "rewards, len(prompts), self.pad_token_id",
            "advantages over all groups",
        ),
        ("of_tokens or self.loss.entropy_bonus", "of_tokens", "the entropy over own tokens"),
        ("sums[0] / len(rows)", "sums[0] / len(own)", "mean reward over own prompts"),
        (
            "own = rows[self.args.process_index :: self.args.world_size]",
            "own = rows[self.args.process_index :]",
            "processes evaluate the same prompts",
            "trainers/test_groups.py",
        ),
    ),
    *_in(
        "fusedpo/data/reading.py",
        "trainers/test_rows.py",
        ("{self.unit} {index + 1}", "{self.unit} {index}", "rows counted from 0"),
        ("in data and len(data[s])", "in data", "an empty split is held out"),
        ("enumerate(file, start=1)", "enumerate(file)", "lines counted from 0"),
        ('"test", "validation"', '"validation", "test"', "another split is held out"),
    ),
    *_in(
        "fusedpo/data/tokenizing.py",
        "trainers/test_rows.py",
        (
            "shared_length(prompt, chosen[: shared_length(chosen, rejected)])",
            "shared_length(chosen, rejected)",
            "responses without what they share",
        ),
        ("+ longest > max_length", "+ longest >= max_length", "a row that fits is called long"),
        ("max(1, max_length - longest)", "max_length - longest", "a prompt of no or all tokens"),
        ("longest = max(len(", "longest = min(len(", "the longer response is cut"),
        ("least = 1 if prompt else 2", "least = 1", "a response without a token to score"),
        ("np.asarray(chosen[:room]", "np.asarray(chosen[-room:]", "loses the start"),
        ("x if x[-1:] == [eos] else [*x, eos]", "[*x, eos]", "two ends of sequence"),
        ("add_special_tokens=plain", "add_special_tokens=True", "chats begin twice"),
        ("prompt[0] == bos and size > 1", "prompt[0] == bos", "a prompt that is not cut"),
        (
            "    if chunk:\n        yield chunk",
            "    if len(chunk) == size:\n        yield chunk",
            "the last rows are lost",
        ),
    ),
    *_in(
        "fusedpo/data/messages.py",
        "trainers/test_rows.py recipes/test_semantic.py",
        (
            "if chosen[:size] == prompt and rejected[:size] == prompt:",
            "if True:",
            "messages are skipped that are no prompt",
        ),
        (
            "shared_length(chosen[:-1], rejected[:-1])",
            "shared_length(chosen, rejected)",
            "equal responses are all prompt",
        ),
    ),
    *_in(
        "fusedpo/data/chat.py",
        "trainers/test_rows.py",
        (
            "text(prompt, True)",
            "text(prompt, False)",
            "no start of an answer in the prompt",
        ),
    ),
    *_in(
        "fusedpo/trainers/layouts.py",
        "trainers/test_layouts.py -k 'not trained and not command'",
        (r"(?:\A\s*|\n\n)(Human", r"(?:\A\s*|\n+)(Human", "a line of a turn begins another"),
        ("== [*_SPEAKERS]", "", "any text is one of turns"),
        ('f"{where}, system"), *turns]', 'f"{where}, system")]', "turns lost"),
        ("messages[-1:]", "messages[1:]", "the prompt in the response"),
        ("{**further, **self.read(row, where)}", "self.read(row, where)", "no further columns"),
        ("calls if isinstance(calls, list) and calls else [calls]", "[calls]", "one call only"),
        ('"\\n".join(filter(None, texts))', '"\\n".join(texts)', "an empty input is a line"),
        ('for text in row["output"])', 'for text in row["output"][::-1])', "rejected is chosen"),
        (
            'prompt") is not None or _is_list(row["chosen"], row["rejected"])',
            'prompt") is not None',
            "messages without a prompt are unknown",
        ),
    ),
    *_in(
        "fusedpo/trainers/layout_choice.py",
        "trainers/test_layouts.py -k 'not trained and not command'",
        ("if len(fitting) == 1:", "if fitting:", "the first of two layouts is taken"),
        ("if layout.kind == kind]\n    if len", "]\n    if len", "rows of another kind are taken"),
        ("{*columns, *taken.values()}", "{*taken.values()}", "a column left out is read"),
        ("{first[each] + 1}", "{first[each]}", "rows counted from 0"),
        ("if value is not None:", "if True:", "a null tells what a column holds"),
    ),
    *_in(
        "fusedpo/trainers/transformers/reference.py",
        "trainers/test_transformers.py -k 'not two_processes and not accumulation and not resuming and not saved'",
        (
            "if (own.softcap, own.logit_scale) != (head.softcap, head.logit_scale):",
            "if own.softcap != head.softcap:",
            "a reference with another scale is scored with the policy's",
        ),
    ),
    *_in(
        "fusedpo/trainers/transformers/means.py",
        "trainers/test_transformers.py -k 'not two_processes and not accumulation and not resuming and not saved'",
        ("value.double() * pairs", "value.double()", "means over batches, not pairs"),
        {
            "old": 'accelerator.reduce(totals, "sum")',
            "new": 'accelerator.reduce(totals, "mean")',
            "breaks": "means over processes",
            "equivalent": "sums and counts are both divided by the processes",
        },
        (
            "self.pairs, self.sums = 0, {}",
            "self.sums = {}",
            "pairs counted since the start",
            "trainers/test_transformers.py -k 'since_the_last or next_rows or no_part'",
        ),
    ),
    *_in(
        "fusedpo/trainers/transformers/mixin.py",
        "trainers/test_transformers.py -k 'not two_processes and not accumulation and not resuming and not saved'",
        ("reference = frozen_copy(model)", "reference = model", "the reference is trained too"),
        ("with with_it, evaluating(subject), self", "with with_it, self", "reference with dropout"),
        (
            "weight * self._examples(batch) / step_counts[0]",
            "weight / step_counts[0]",
            "experts' loss",
        ),
        (
            "        if self._trains(model):\n            self._train_means",
            "        if True:\n            self._train_means",
            "evaluation in the training's means",
        ),
        (
            "return bool(model.training) and torch.is_grad_enabled()",
            "return bool(model.training)",
            "a loss without gradients in the training's means",
        ),
        (
            '        self._begin(kwargs.get("resume_from_checkpoint"))\n',
            "",
            "a training begins with another's means",
        ),
        (
            "    @torch.no_grad()\n    def _reference",
            "    def _reference",
            "the reference makes a graph",
        ),
        ("config.dispatch_batches = False", "config.dispatch_batches = True", "batches are cut"),
    ),
    *_in(
        "fusedpo/trainers/transformers/pairs.py",
        "trainers/test_transformers.py -k 'repeated or first_examples'",
        (
            "if asked and not self.is_in_train and self.ref_model",
            "if asked and self.ref_model",
            "evaluation rounds the reference of a training",
            "trainers/test_transformers.py -k in_its_precision",
        ),
        (
            "with torch.no_grad(), self.compute_loss_context_manager()",
            "with self.compute_loss_context_manager()",
            "evaluation makes a graph",
            "trainers/test_transformers.py -k makes_a_graph",
        ),
        (
            "before = self.args.process_index * size",
            "before = 0",
            "repeated rows are counted",
        ),
        (
            "[:, :kept].flatten(0, 1)",
            "[:, -kept:].flatten(0, 1)",
            "repeated rows in the place of others",
        ),
        (
            "self._eval_means = self.means()\n        halves",
            "halves",
            "evaluations are added up",
            "trainers/test_transformers.py -k 'since_the_last or next_rows or no_part'",
        ),
        (
            'self._eval_means.add({"loss": loss, **metrics}, kept)',
            'self._eval_means.add({"loss": loss, **metrics}, count)',
            "repeated rows counted",
        ),
    ),
    *_in(
        "fusedpo/trainers/adapters.py",
        "trainers/test_adapters.py",
        ("is_trainable=True", "is_trainable=False", "an adapter of a folder stays as it is"),
        (
            "merged(model).requires_grad_(True)",
            "merged(model)",
            "weights that an adapter was merged into stay frozen",
        ),
        (
            "2 * settings.lora_rank if alpha is None",
            "settings.lora_rank if alpha is None",
            "adapters count half as much as is said",
        ),
        ("lora_dropout=settings.lora_dropout,", "", "--lora-dropout is ignored"),
        (
            ' and not (folder / "config.json").is_file()',
            "",
            "whole weights beside an adapter's file are left alone",
        ),
        (
            "self.lora_rank or (from_folder and not self.merge_adapter)",
            "self.lora_rank",
            "an adapter over quantised weights cannot be trained further",
        ),
        (
            '            "bnb_4bit_compute_dtype": dtype,\n',
            "",
            "products of weights of 4 bits are in float32",
        ),
        ("merge_and_unload(safe_merge=True)", "unload()", "adapters are dropped, not merged"),
    ),
    *_in(
        "fusedpo/trainers/length_groups.py",
        "trainers/test_length_groups.py -k 'not evaluation'",
        ("order=places.argsort()", "order=places", "states in the order of the groups"),
        ("picked[:, 0] |= ~picked.any(1)", "picked[:, 0] |= False", "a row without labels is lost"),
        ("count = int(counts.max())", "count = len(groups)", "processes run unlike forwards"),
        ("PADDED * (tokens + lengths[row])", "2 * (tokens + lengths[row])", "too much padding"),
    ),
    *_in(
        "fusedpo/trainers/responses.py",
        "trainers/test_responses.py -k 'not raises and not apo_zero and not resuming'",
        ("return responses[-1:] + responses[:-1]", "return responses", "z0 of matched rows"),
        (
            "return responses[-1:] + responses[:-1]",
            "return responses[1:] + responses[:1]",
            "the response of the row after",
        ),
        ("if len(rows) == 1:", "if False:", "a row alone is compared with itself"),
        ("if model.training else self._not_repeated(rows)", "", "repeated rows count in z0"),
        ('self.accelerator.reduce(sums, "sum")', "sums", "each process has a z0 of its own"),
        ("(counted / rows)", "1", "a batch of repeated rows is added"),
        ("value * shares[kind], 0.0", "value, 0.0", "means over batches, not responses"),
        ('{"chosen": share, "rejected": 1 - share}', '{"chosen": share}', "NaN of no response"),
        ("found[name] = mean / of_kind", "found[name] = mean", "shares are not divided out"),
        ("list(prompt), room, self.bos", "list(prompt)[:room], room, self.bos", "the end is cut"),
        ("max(1, self.max_length", "max(0, self.max_length", "no prompt before a response"),
    ),
    *_in(
        "fusedpo/trainers/methods/responses.py",
        "trainers/test_responses.py -k 'not raises and not apo_zero and not resuming'",
        ("if size < 2 and", "if size < 1 and", "batches of one"),
        ('"label": name == "chosen"', '"label": True', "every response of a pair is desirable"),
        (
            'for name in ("chosen", "rejected")\n        for row in rows',
            'for row in rows\n        for name in ("chosen", "rejected")',
            "responses to one prompt beside each other",
        ),
    ),
    *_in(
        "fusedpo/trainers/self_augmented.py",
        "trainers/test_self_augmented.py",
        (
            'if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):',
            "if True:",
            "the average follows at steps that a scaler skips",
        ),
        (
            'if "loss" not in logs:\n            return',
            "if not logs:\n            return",
            "what training makes is logged with evaluation",
        ),
        ("[*self._ahead, *self._again]", "[*self._again, *self._ahead]", "saved in another order"),
        (
            "if self._again and self._again[0][0] == asked:",
            "if self._again:",
            "batches of other rows",
        ),
        (
            "            self._again.clear()\n            pairs",
            "            pairs",
            "stale pairs come late",
        ),
        (
            "def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:\n        self.dataset.trained()",
            "def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:\n        pass",
            "batches of accumulation are trained on again",
        ),
        (
            'total if name == "segment/identical" else total / args.world_size',
            "total / args.world_size",
            "a count is averaged",
            "trainers/test_self_augmented.py",
        ),
        (
            "        state.log_history[-1].update(found)",
            "        pass",
            "the history lacks statistics",
        ),
        (
            "        self.dataset.restart()\n        if state",
            "        if state",
            "a second training begins with old batches",
        ),
        ("and Path(named).name == _name(state)", "", "an argument left over is taken"),
        (
            "        self.restart()\n        pairs = iter",
            "        pairs = iter",
            "batches twice after loading",
        ),
        (
            "if source.rank != args.process_index:",
            "if source.rank > args.process_index:",
            "a wrong rank is taken",
        ),
        ("if batches != of_source:", "if batches < of_source:", "files of two saves"),
    ),
    *_in(
        "fusedpo/trainers/methods/base.py",
        "trainers/test_methods.py -k 'settings or collated or may_take or every_process or reward or demonstration or mistake'",
        (
            "if about.default is None or any(row.get(name) is not None for row in rows)",
            "if about.default is None",
            "optional columns are dropped",
        ),
    ),
    *_in(
        "fusedpo/trainers/methods/semantic.py",
        "trainers/test_methods.py -k 'settings or collated or may_take or every_process or reward or demonstration or mistake'",
        (
            "all(row.get(semantic.SIMILARITY) is None for row in rows)",
            "not any(row.get(semantic.SIMILARITY) for row in rows)",
            "a similarity of 0 is replaced",
        ),
    ),
    *_in(
        "fusedpo/trainers/methods/self_augmented.py",
        "trainers/test_methods.py -k 'settings or collated or may_take or every_process or reward or demonstration or mistake'",
        (
            "settings, seed=args.seed + 1, sample_every=1",
            "settings, sample_every=1",
            "held-out pairs are training pairs' twins",
        ),
        ("min(_GENERATED, len(held_out) - start)", "_GENERATED", "more held-out pairs than rows"),
        (
            'isinstance(loss, MarginLoss) and loss.gradient_structure.unit == "margin"',
            "isinstance(loss, MarginLoss)",
            "averages lose tokens",
        ),
        ("max_length=max(lengths)", "max_length=min(lengths)", "responses are cut"),
        (
            'for name in ("self_augmented", "ahead")',
            'for name in ("self_augmented",)',
            "half a checkpoint is whole",
            "test_files.py trainers/test_methods.py",
        ),
        (
            "return recipe.Settings(**own, **others)",
            "return recipe.Settings(**others)",
            "settings ignored",
        ),
        (
            "self.settings(max_length=max(lengths), seed=args.seed)",
            "self.settings(max_length=max(lengths))",
            "the run's seed ignored",
        ),
        (
            "trainer.add_callback(SelfAugmentedCallback(dataset, ref_model=trainer.ref_model))",
            "trainer.add_callback(SelfAugmentedCallback(dataset))",
            "a reference that stays",
        ),
    ),
    *_in(
        "fusedpo/trainers/methods/two_contexts.py",
        "trainers/test_methods.py -k 'settings or collated or may_take or every_process or reward or demonstration or mistake'",
        (
            'ShortToLongCollator(pad, both=options["loss"].both)',
            "ShortToLongCollator(pad)",
            "no fourth role",
        ),
    ),
    *_in(
        "fusedpo/trainers/methods/sampled.py",
        "trainers/test_methods.py -k 'settings or collated or may_take or every_process or reward or demonstration or mistake'",
        ('list(row["chosen_ids"])', 'list(row["prompt_ids"])', "rewards for repeating the prompt"),
        ("            updates=self.updates,\n", "", "updates ignored"),
        ("            temperature=self.temperature,\n", "", "temperature ignored"),
        (
            'f"samples-{rank}.safetensors").is_file() for rank in range(processes)',
            'f"samples-{rank}.safetensors").is_file() for rank in range(1)',
            "samples of one process will do",
            "test_files.py trainers/test_methods.py",
        ),
    ),
    *_in(
        "fusedpo/trainers/checkpoints.py",
        "trainers/test_run.py test_files.py",
        (
            "if by[path] == processes and",
            "if by[path] >= processes and",
            "another number of processes goes on",
        ),
        (
            "key=lambda p: -int(steps[p])",
            "key=lambda p: steps[p], reverse=True",
            "checkpoint-9 is newer than checkpoint-10",
        ),
        ("return zipfile.is_zipfile(path)", "return True", "a file that was cut off is whole"),
        (
            "return sorted((p for p in found if steps[p].isdecimal())",
            "return sorted((p for p in found)",
            "a person's folder ends the run",
        ),
    ),
    *_in(
        "fusedpo/trainers/output.py",
        "trainers/test_run.py test_files.py",
        (
            "    except BaseException:\n        if replaced",
            "    except Exception:\n        if replaced",
            "an interruption loses the earlier output",
        ),
    ),
    *_in(
        "fusedpo/trainers/inputs.py",
        "trainers/test_run.py test_files.py",
        ("    random.Random(job.seed).shuffle(train)\n", "", "the first rows are held out"),
        (
            "return train[size:], train[:size]",
            "return train, train[:size]",
            "trained on held out rows",
        ),
        ("min(job.max_length, limit)", "job.max_length", "longer than the model can"),
        (
            "max(1, round(job.eval_fraction * rows))",
            "round(job.eval_fraction * rows)",
            "nothing is held out",
        ),
    ),
    *_in(
        "fusedpo/trainers/run.py",
        "trainers/test_run.py test_files.py",
        ('entry["step"] == step and any', "any", "an evaluation before the end is the last"),
    ),
    *_in(
        "fusedpo/trainers/arguments.py",
        "trainers/test_run.py test_files.py",
        (
            "math.ceil(job.warmup * steps)",
            "math.floor(job.warmup * steps)",
            "a step less of warmup",
        ),
        (
            "(batch_size * processes.count())",
            "batch_size",
            "epochs of several processes",
            "trainers/test_run.py",
        ),
        (
            "math.ceil(steps / job.evaluations)",
            "math.floor(steps / job.evaluations)",
            "more evaluations, or one a step",
        ),
        ('        "seed": job.seed,\n', "", "the order of rows has another seed"),
        (
            '"eval_on_start": not job.resume',
            '"eval_on_start": True',
            "evaluates again when resumed",
        ),
        ('if half and job.dtype == "float32" else', "if half else", "autocast over half precision"),
        (
            "(job.epochs or job.defaults.epochs) * epoch",
            "job.defaults.epochs * epoch",
            "--epochs ignored",
        ),
    ),
    *_in(
        "fusedpo/trainers/progress.py",
        "trainers/test_progress.py",
        (
            "total=state.max_steps, completed=state.global_step",
            "total=state.max_steps",
            "a resumed bar begins at 0",
        ),
        ('if "loss" in logs:', 'if "loss" not in logs:', "no training loss shown"),
    ),
    *_in(
        "fusedpo/trainers/trl/groups.py",
        "trainers/test_trl_losses.py",
        (
            "tokens * share / self.args.steps_per_generation",
            "tokens * share",
            "means over tokens too small",
        ),
        (
            'counts["num_items"] = ids.shape[0] * share',
            'counts["num_items"] = ids.shape[0]',
            "accumulated losses are added",
        ),
        (
            'self.current_gradient_accumulation_steps if mode == "train" else 1',
            "self.current_gradient_accumulation_steps",
            "evaluation is divided",
        ),
        (
            'mask * inputs["tool_mask"] if "tool_mask" in inputs else mask',
            "mask",
            "tokens of tools are trained on",
            "trainers/test_trl_losses.py -k 'those_of_the_roles or comes_with_samples'",
        ),
        (
            'if loss.entropy_bonus:\n                counts["num_tokens"] = scored.sum().clamp(min=1) * share',
            'if loss.entropy_bonus:\n                counts["num_tokens"] = scored.sum().clamp(min=1)',
            "the entropy is accumulated",
        ),
    ),
    *_in(
        "fusedpo/trainers/trl/configs.py",
        "trainers/test_trl_losses.py",
        (
            "kl_weight=loss.kl_weight or self.beta",
            "kl_weight=self.beta",
            "a kl_weight of one's own is lost",
        ),
    ),
    *_in(
        "fusedpo/trainers/trl/pairs.py",
        "trainers/test_trl_losses.py",
        (
            'torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])',
            'torch.cat([inputs["ref_rejected_logps"], inputs["ref_chosen_logps"]])',
            "references swapped",
        ),
        (
            'if mode == "train":\n            tokens',
            "if mode:\n            tokens",
            "tokens of evaluation are counted as trained on",
            "trainers/test_trl_losses.py -k of_their_own",
        ),
        (
            "note_metrics(self, mode, found",
            'note_metrics(self, "train", found',
            "evaluation in the training's record",
            "trainers/test_trl_losses.py -k of_their_own",
        ),
    ),
    *_in(
        "fusedpo/trainers/trl/collator.py",
        "trainers/test_trl_losses.py",
        (
            "(self.roles - 2) * len(rows)",
            "len(rows)",
            "no fourth role",
            "trainers/test_trl_losses.py -k 'those_of_the_roles or comes_with_samples'",
        ),
    ),
)

_RECIPES = (
    *_in(
        "fusedpo/files.py",
        "recipes/test_self_augmented.py",
        (
            "zlib.crc32(name.encode(), value)",
            'zlib.crc32(b"", value)',
            "names can be swapped in a file",
        ),
        ("os.fsync(file.fileno())", "file.flush()", "a file that a power cut empties"),
        (
            "os.replace(unfinished, path)",
            "path.unlink(missing_ok=True)\n        os.replace(unfinished, path)",
            "a moment without a file",
        ),
    ),
    *_in(
        "fusedpo/recipes/self_augmented/source.py",
        "recipes/test_self_augmented.py",
        (
            "[self.settings.seed, self.rank, around]",
            "[self.settings.seed, around]",
            "ranks take rows in one order",
        ),
        (
            "SeedSequence([settings.seed, rank])",
            "SeedSequence([settings.seed])",
            "ranks write the same",
        ),
        {
            "old": "room = self.settings.max_length - len(prompt) - length",
            "new": "room = self.settings.max_length - len(prompt)",
            "breaks": "sequences too long",
            "equivalent": "responses are cut to max_length, so that a start is never so late",
        },
        ("+= start / len(response)", "+= start / len(rejected)", "a share of something else"),
        ("if updates != updates_of_first:", "if updates < updates_of_first:", "files of two saves"),
        ("({} if self.rank else weights)", "weights", "every rank saves the average"),
        (
            "seed=int(self._rng.integers(2**31))",
            "seed=self.settings.seed",
            "the same noise in every batch",
        ),
        ("+= len(response) > room", "+= len(response) >= room", "a response that fits is counted"),
        (
            'self._totals["eos"] += self.eos_token_id in segment',
            'self._totals["eos"] += self.eos_token_id in rejected',
            "ends of the response are counted",
        ),
    ),
    *_in(
        "fusedpo/recipes/self_augmented/segments.py",
        "recipes/test_self_augmented.py",
        ("response_length - 3 - length", "response_length - 2 - length", "a start too late"),
    ),
    *_in(
        "fusedpo/recipes/self_augmented/average.py",
        "recipes/test_self_augmented.py",
        ("        self.updates += 1\n", "", "updates are not counted"),
        (
            "            else:\n                own.copy_(other)",
            "            else:\n                pass",
            "buffers of the start",
        ),
        ("if name in kept}", "}", "buffers that are not saved are"),
    ),
    *_in(
        "fusedpo/data/sampling.py",
        "recipes/test_self_augmented.py",
        ("        top_p=settings.top_p,\n", "", "top_p ignored"),
        ("        top_k=settings.top_k,\n", "", "top_k ignored"),
        ("        temperature=settings.temperature,\n", "", "temperature ignored"),
        ("model.generation_config = config", "pass", "the model's own generation config"),
        (
            "with evaluating(model), _configured(model, config), ",
            "with _configured(model, config), ",
            "samples with dropout",
        ),
    ),
    *_in(
        "fusedpo/recipes/self_augmented/loop.py",
        "recipes/test_self_augmented.py",
        (
            "optimizer.step()\n        source.after_step(model)\n        history",
            "source.after_step(model)\n        optimizer.step()\n        history",
            "the average is a step behind",
        ),
    ),
    *_in(
        "fusedpo/recipes/self_augmented/prefix.py",
        "recipes/test_self_augmented.py",
        (
            "scored = there & (targets != ignore_index) & (columns > 0)",
            "scored = there & (targets != ignore_index)",
            "a first token counts as scored",
        ),
    ),
    *_in(
        "fusedpo/recipes/self_augmented/buffer.py",
        "recipes/test_self_augmented.py",
        (
            "if counts.dtype != torch.int64 or counts.shape != (len(rows),) or (counts < 0).any():",
            "if counts.dtype != torch.int64 or counts.shape != (len(rows),):",
            "counts below 0 are taken",
            "test_files.py",
        ),
        (
            "if ((lengths < 0) | (lengths > len(tokens))).any():",
            "if (lengths > len(tokens)).any():",
            "lengths below 0 are taken",
            "recipes/test_self_augmented.py",
        ),
    ),
    *_in(
        "fusedpo/recipes/semantic/similarity.py",
        "recipes/test_semantic.py",
        (
            "(left * right).sum(-1).clip(0.0, 1.0)",
            "abs((left * right).sum(-1)).clip(0.0, 1.0)",
            "opposites are alike",
        ),
        (
            "    cosines[[a == b for a, b in zip(lefts, rights, strict=True)]] = 1.0\n",
            "",
            "equal texts differ by rounding",
        ),
    ),
    *_in(
        "fusedpo/recipes/semantic/encoders.py",
        "recipes/test_semantic.py",
        ("(1 + math.log(count))", "count", "frequent pieces count too much"),
        (
            "[path.relative_to(folder).as_posix(), content",
            "[content",
            "a file's name is no part of the model",
        ),
        (
            "if not words:\n            return []\n        line = f\" {' '.join(words)} \"",
            "line = f\" {' '.join(words)} \"",
            "a text of nothing has a vector",
        ),
    ),
    *_in(
        "fusedpo/recipes/short_to_long/contexts.py",
        "recipes/test_short_to_long.py",
        (
            "            misses = 0\n        elif",
            "        elif",
            "eight misses in all, not in a row",
        ),
        (
            "own_place or i < short_distractors",
            "own_place or i <= short_distractors",
            "a distractor too many",
        ),
        ("[round(depth * others)]", "[int(depth * others)]", "depth rounded down"),
        ("        limit = min(limit, max_length)\n", "        pass\n", "longer than max_length"),
        (
            "own = set(relevant)\n    pool = [passage for passage in distractors if passage not in own]",
            "pool = list(distractors)",
            "a relevant passage twice",
        ),
        ("if total <= limit or len", "if total < limit or len", "a context that fits is cut"),
    ),
    *_in(
        "fusedpo/recipes/short_to_long/tokenizing.py",
        "recipes/test_short_to_long.py",
        (
            "length = len(long_prompt) + max",
            "length = len(prompt) + max",
            "long rows that do not fit",
        ),
        (
            '["input_ids"][:1] == [bos] else []',
            '["input_ids"] else []',
            "a start that the tokenizer does not write",
        ),
    ),
    *_in(
        "fusedpo/recipes/short_to_long/needles.py",
        "recipes/test_short_to_long.py",
        (
            "not in other.text and other.continuation != needle.continuation",
            "not in other.text",
            "rejected may equal chosen",
        ),
        ("seed=chooser.getrandbits(64)", "seed=seed", "every row is mixed alike"),
        (
            "found.setdefault(opening, _Excerpt(opening, continuation, text[:stop]))",
            "found[opening] = _Excerpt(opening, continuation, text[:stop])",
            "the last of passages that open alike",
        ),
        ("text not in contexts.short]", "text]", "rejected stands in the short context"),
    ),
    *_in(
        "fusedpo/recipes/short_to_long/collator.py",
        "recipes/test_short_to_long.py",
        (
            "for row in labels[:, 1:].tolist()]",
            "for row in labels.tolist()]",
            "a first token counts as scored",
        ),
    ),
    *_in(
        "fusedpo/recipes/groups.py",
        "recipes/test_groups.py",
        ("return apart.masked_fill(alike, 0.0)", "return apart", "rounding blown up"),
        (
            '"rewards": given.float()',
            '"rewards": group_advantages(given, group_size)',
            "advantages logged as rewards",
            "recipes/test_groups.py trainers/test_groups.py",
        ),
        ("_LEAST_SPREAD = 1e-6", "_LEAST_SPREAD = 1e-2", "small differences count less"),
    ),
    *_in(
        "fusedpo/recipes/stdlib_pairs.py",
        "recipes/test_stdlib_pairs.py",
        (
            "random.Random(seed).shuffle(modules)",
            "random.Random(0).shuffle(modules)",
            "another seed, the same split",
        ),
        (
            "modules = sorted({passage.module for passage in passages})",
            "modules = list({passage.module for passage in passages})",
            "a split that changes with the process",
        ),
        ('sorted(root.rglob("*.py"))', 'root.rglob("*.py")', "an order that is the disk's"),
        (
            "max(1, round(fraction * len(modules)))",
            "round(fraction * len(modules))",
            "nothing held out",
        ),
        ("if end > len(text):", "if False:", "a response that is cut short"),
        ("if _LEFT_OUT.intersection(relative.parts):", "if False:", "tests are taken too"),
        ("tie_word_embeddings=tied,", "tie_word_embeddings=True,", "tied ignored"),
    ),
)

# the small ones, and what others say of metrics
_OF_LOSSES = " ".join(
    f"losses/test_{name}.py"
    for name in [
        "alphapo",
        "aot",
        "apo",
        "bco",
        "cispo",
        "cpo",
        "dapo",
        "discopop",
        "dpo",
        "dr_grpo",
        "exo",
        "gmpo",
        "grpo",
        "gspo",
        "ipo",
        "kto",
        "luspo",
        "metrics",
        "modifiers",
        "names",
        "nca",
        "orpo",
        "reinforce",
        "robust_dpo",
        "semantic_sppo",
        "sft",
        "short_to_long",
        "simpo",
        "slic",
        "soft_adaptive",
        "soft_sequence",
        "sppo",
        "vespo",
    ]
)
_OF_LOSSES += " test_objective.py test_policy.py"
_OF_LOSSES += " -k 'metrics or logs or not (test_objective or test_policy)'"

_LOSSES = (
    *_in(
        "fusedpo/losses/preference.py",
        _OF_LOSSES,
        (
            "(of_chosen > of_rejected).double().mean()",
            "(of_chosen >= of_rejected).double().mean()",
            "equal rewards are right",
        ),
        (
            '"logps/rejected": self.logged_logp(rejected).mean()',
            '"logps/rejected": rejected.logp.mean()',
            "sums for means",
            "test_objective.py -k 'metrics or simpo_logs'",
        ),
    ),
    *_in(
        "fusedpo/losses/preference.py",
        "losses/test_forwarding.py losses/test_simpo.py losses/test_shared.py",
        (
            'if structure.unit != "one":',
            "if False:",
            "a cross-entropy without a factor of its own",
        ),
        (
            'return replace(structure, scope="batch") if self.weights_tokens else structure',
            "return structure",
            "one unit for tokens that count unequally",
        ),
        (
            'return GradientStructure("pair", 1, "mean_margin" if of_means else "margin")',
            'return GradientStructure("pair", 1, "margin")',
            "sums for means",
        ),
    ),
    *_in(
        "fusedpo/losses/policy.py",
        "losses/test_forwarding.py",
        (
            'replace(structure, scope="batch") if self.entropy_bonus or beside else structure',
            'replace(structure, scope="batch") if self.entropy_bonus else structure',
            "a KL term in the factor of its sequence",
        ),
    ),
    *_in(
        "fusedpo/losses/forwarding.py",
        "losses/test_forwarding.py losses/test_modifiers.py",
        (
            "if name not in interface() or name in vars(cls):",
            "if name not in interface():",
            "what a composite says itself is overwritten",
        ),
    ),
    *_in(
        "fusedpo/losses/loss.py",
        _OF_LOSSES,
        (
            "return torch.full_like(which, no, dtype=torch.float64).masked_fill(which, yes)",
            "return torch.where(which, yes, no).double()",
            "hyperparameters in fp32",
            "losses/test_kto.py",
        ),
    ),
    *_in(
        "fusedpo/losses/policy.py",
        _OF_LOSSES,
        (
            "(ratio < 1 - self.epsilon_low) & (t.advantage < 0)",
            "(ratio < 1 - self.epsilon_low) & (t.advantage > 0)",
            "clipped where it is not",
        ),
        (
            "share = t.average if by_token else t.average_of_sequences",
            "share = t.average",
            "shares of tokens for responses",
            "losses/test_gspo.py losses/test_luspo.py test_policy.py -k 'metrics or gspo or luspo'",
        ),
        ("share((low | high).double())", "share((low & high).double())", "nothing is clipped"),
        (
            "epsilon_high: float = hyperparameter(0.2",
            "epsilon_high: float = hyperparameter(0.28",
            "another default",
            "losses/test_names.py losses/test_grpo.py",
        ),
    ),
    *_in(
        "fusedpo/losses/mixture.py",
        _OF_LOSSES,
        (
            "for loss in reversed(self.losses)",
            "for loss in self.losses",
            "rewards of the last loss",
        ),
        (
            "sum(weight * loss.nll_weight for weight",
            "sum(loss.nll_weight for weight",
            "cross-entropy without its weight",
        ),
        (
            'weight * part_of(loss, "of_states"',
            'part_of(loss, "of_states"',
            "repulsion without its weight",
        ),
        (
            'if "batch" in scopes:',
            "if False:",
            "a gradient known too early",
        ),
    ),
    *_in(
        "fusedpo/losses/modifiers.py",
        _OF_LOSSES,
        (
            'if structure.scope != "sequence":',
            "if True:",
            "a weight that is not known yet",
        ),
        (
            "return weight * self.base.token_weight(position, shortest)",
            "return weight",
            "desensitized once",
        ),
        (
            "self.base.alignment_reward(self.seen(s))",
            "self.base.alignment_reward(s)",
            "rewards of another divergence are aligned",
        ),
        (
            '        0.5, "weight of the tokens beyond"',
            '        1.0, "weight of the tokens beyond"',
            "another default",
        ),
    ),
    *_in(
        "fusedpo/losses/kto.py",
        _OF_LOSSES,
        (
            'found["kl"] = inputs["kl"].to(reward.dtype).mean().clamp(min=0)',
            'found["kl"] = inputs["kl"].to(reward.dtype).mean()',
            "a logged KL below 0",
        ),
        (
            '"logps/rejected": mean(logp, ~desirable)',
            '"logps/rejected": mean(reward, ~desirable)',
            "rewards for log-probabilities",
        ),
        (
            ".to(a.dtype).mean().clamp(min=0)",
            ".to(a.dtype).clamp(min=0).mean()",
            "a mean of limited numbers",
        ),
        (
            "torch.where(which, values, 0.0).sum() / which.sum()",
            "torch.where(which, values, 0.0).mean()",
            "means over all",
        ),
    ),
    *_in(
        "fusedpo/losses/cispo.py",
        _OF_LOSSES,
        (
            "capped = (t.ratio > self.epsilon_high) & (t.advantage > 0)",
            "capped = t.ratio > self.epsilon_high",
            "a share of all signs",
        ),
        ("hyperparameter(5.0", "hyperparameter(1.28", "another default"),
    ),
    *_in(
        "fusedpo/losses/vespo.py",
        "losses/test_vespo.py",
        (
            "log_w = log_w.clamp(_LEAST, RATIO_LIMIT)",
            "log_w = log_w.clamp(max=RATIO_LIMIT)",
            "weights of unlikely responses",
        ),
        (
            "weight.log().clamp(_LEAST, RATIO_LIMIT)",
            "weight.log()",
            "log 0",
        ),
        (
            "t.delta.detach().clamp(-RATIO_LIMIT, RATIO_LIMIT)",
            "t.delta.detach().clamp(max=RATIO_LIMIT)",
            "one token decides",
        ),
        ("k = pick(t.advantage >= 0,", "k = pick(t.advantage > 0,", "the other power at 0"),
    ),
    *_in(
        "fusedpo/losses/short_to_long.py",
        _OF_LOSSES,
        ("gap.abs().mean()", "gap.mean().abs()", "gaps that cancel"),
        (
            "self.base.reward(responses[2]).mean()",
            "self.base.reward(responses[0]).mean()",
            "the short one logged as the long",
        ),
        (
            "self._apart(self.base.alignment_reward, short, long)",
            "self._apart(self.base.reward, short, long)",
            "another reward aligned",
        ),
        (
            "alpha: float = hyperparameter(1.0",
            "alpha: float = hyperparameter(0.1",
            "another default",
        ),
    ),
    *_in(
        "fusedpo/losses/semantic_sppo.py",
        _OF_LOSSES,
        (
            '"targets/rejected": self.target("rejected"',
            '"targets/rejected": self.target("chosen"',
            "the wrong target logged",
        ),
        (
            '(1.0 - inputs["similarity"]) * (rate - 0.5)',
            'inputs["similarity"] * (rate - 0.5)',
            "softened the other way",
        ),
        ("_LEAST_NORM**2", "_LEAST_NORM", "small states have no direction"),
    ),
    *_in(
        "fusedpo/losses/orpo.py",
        _OF_LOSSES,
        (
            '"log_odds_ratio": -neg_log_sigmoid(gap).mean()',
            '"log_odds_ratio": neg_log_sigmoid(gap).mean()',
            "the sign of a metric",
        ),
        (
            '"log_odds_chosen": gap.mean()',
            '"log_odds_chosen": self.alignment_reward(responses[0]).mean()',
            "another metric",
        ),
        ("mean = s.mean.clamp(max=_LARGEST)", "mean = s.mean", "infinite odds"),
    ),
    *_in(
        "fusedpo/losses/simpo.py",
        _OF_LOSSES,
        (
            "gamma: float = hyperparameter(0.5",
            "gamma: float = hyperparameter(1.0",
            "another default",
        ),
    ),
    *_in(
        "fusedpo/losses/dapo.py",
        "losses/test_names.py losses/test_grpo.py",
        ("hyperparameter(0.28", "hyperparameter(0.2", "another default"),
    ),
    *_in(
        "fusedpo/losses/soft_adaptive.py",
        _OF_LOSSES,
        ("hyperparameter(1.05", "hyperparameter(1.0", "another default"),
    ),
    *_in(
        "fusedpo/losses/ipo.py",
        _OF_LOSSES,
        (
            "average: bool = hyperparameter(True",
            "average: bool = hyperparameter(False",
            "another default",
        ),
    ),
    *_in(
        "fusedpo/losses/sppo.py",
        _OF_LOSSES,
        (
            '"the rejected response\'s", 0.0, 0.0, 1.0',
            '"the rejected response\'s", 1.0, 0.0, 1.0',
            "another default",
        ),
    ),
    *_in(
        "fusedpo/losses/alphapo.py",
        _OF_LOSSES,
        (
            "(-self.alpha * s.mean).clamp(max=MAP_LIMIT)",
            "(-self.alpha * s.mean)",
            "infinite rewards",
        ),
        (
            "alpha: float = hyperparameter(0.25",
            "alpha: float = hyperparameter(-0.25",
            "another default",
        ),
    ),
    *_in(
        "fusedpo/losses/dr_grpo.py",
        _OF_LOSSES,
        ("        3000,", "        1024,", "another default"),
    ),
    *_in(
        "fusedpo/losses/gspo.py",
        _OF_LOSSES,
        ("hyperparameter(4e-4", "hyperparameter(3e-4", "another default"),
    ),
    *_in(
        "fusedpo/losses/aot.py",
        _OF_LOSSES,
        ("inverse_temperature(0.01)", "inverse_temperature()", "another default"),
    ),
    *_in(
        "fusedpo/losses/exo.py",
        _OF_LOSSES,
    ),
    *_in(
        "fusedpo/losses/discopop.py",
        _OF_LOSSES,
        ("tau: float = hyperparameter(0.05", "tau: float = hyperparameter(0.5", "another default"),
    ),
    *_in(
        "fusedpo/losses/gates.py",
        _OF_LOSSES,
        ("delta.clamp(max=RATIO_LIMIT).exp()", "delta.exp()", "infinite ratios"),
        (
            "none = (bound == 0) & ~delta.isnan()",
            "none = torch.zeros_like(bound, dtype=torch.bool)",
            "a gradient at an advantage of 0",
        ),
        ("MAP_LIMIT = 80.0", "MAP_LIMIT = 8.0", "large weights are cut"),
    ),
    *_in(
        "fusedpo/losses/__init__.py",
        _OF_LOSSES,
        ('"sppohard": ("sppo", {}, 2.0)', '"sppohard": ("sppo", {}, 1.0)', "TRL's factor"),
        (
            '"bnpo": ("dapo", {"epsilon_high": 0.2}, 1.0)',
            '"bnpo": ("dapo", {}, 1.0)',
            "another clip",
        ),
        ('{"paired": False}', '{"paired": True}', "the paired loss for the unpaired"),
    ),
)

_CORE = (
    *_in(
        "fusedpo/objective/preference.py",
        "test_objective.py losses/test_metrics.py -k 'not triton and (metrics or of_its_states)'",
        (
            "of_states.mean()",
            "of_states.sum() / self.denominator",
            "the states' loss over the step",
        ),
        (
            "].sum() / tokens\n",
            "].sum() / self.nll_denominator\n",
            "the logged cross-entropy over the step",
        ),
        (
            "per_example.detach() + of_states.detach()",
            "per_example.detach()",
            "per_example without the states' part",
        ),
        (
            "self._chosen(logprob) / self.nll_denominator",
            "self._chosen(logprob) / self.denominator",
            "cross-entropy over pairs",
        ),
    ),
    *_in(
        "fusedpo/objective/policy.py",
        "test_policy.py losses/test_metrics.py -k 'not triton and (metrics or digits)'",
        (
            "torch.expm1(-t.delta.clamp(min=-20)) + t.delta",
            "torch.expm1(t.delta.clamp(max=20)) - t.delta",
            "the KL the other way round",
        ),
        ("t.average(t.ratio)", "t.average_of_sequences(t.ratio)", "a mean over responses"),
        ("-t.delta.clamp(min=-20)", "-t.delta", "an infinite metric"),
        (
            "t.average(self.loss.kl(t, self.reference))",
            "t.average(self.loss.kl_weight * self.loss.kl(t, self.reference))",
            "the logged KL times its weight",
        ),
        (
            't.average(stats["entropy"].double())',
            'stats["entropy"].double().sum()',
            "a sum of entropies",
        ),
    ),
    *_in(
        "fusedpo/objective/arguments.py",
        "test_objective.py test_policy.py -k 'not triton and (digits or above_zero or below_zero or the_default or denominator or nothing_sampled)'",
        (
            "loss.entropy_bonus / tokens if",
            "loss.entropy_bonus / items if",
            "entropy over responses",
        ),
        (
            "return value.detach().double()",
            "return value.detach().float()",
            "counts rounded to fp32",
        ),
        ("replace(_FINITE, low=0.0)", "_FINITE", "weights below 0"),
        (
            "checks.positive(argument, value.item())",
            "checks.number(argument, value.item())",
            "a denominator of 0",
        ),
        ("counts is None else max(1, sum(counts))", "counts is None else sum(counts)", "0 / 0"),
        (
            "values.detach().double()[layout.sequences.index]",
            "values.detach().float()[layout.sequences.index]",
            "advantages in fp32",
        ),
        (
            "value = inputs.get(name, about.default)",
            "value = inputs.get(name) or about.default",
            "0 is replaced by the default",
        ),
    ),
    *_in(
        "fusedpo/objective/layout.py",
        "test_objective.py test_policy.py -k 'not triton and (digits or above_zero or below_zero or the_default or denominator or nothing_sampled)'",
        {
            "old": "order = torch.argsort(index % examples * roles + index // examples, stable=True)",
            "new": "order = torch.argsort(index % examples, stable=True)",
            "breaks": "an example's rows in another order",
            "equivalent": "rows come by role, and the sort is stable",
        },
    ),
    *_in(
        "fusedpo/losses/scores.py",
        "test_policy.py losses/test_metrics.py -k 'not triton and (metrics or digits)'",
        (
            "means.sum() / max(1, self.sequences.count)",
            "means.sum() / (self.sequences.lengths > 0).sum()",
            "empty responses do not count",
        ),
        (
            "return self.ratio / self.length",
            "return self.ratio",
            "sums for means",
            "losses/test_dpo.py losses/test_ipo.py",
        ),
    ),
    *_in(
        "fusedpo/objective/reference.py",
        "test_objective.py -k 'reference and not fused_loss and not naive_program'",
        (
            "if head.vocab < layout.batch.head.vocab:",
            "if head.vocab != layout.batch.head.vocab:",
            "a larger vocabulary is refused",
        ),
        (
            "bias = None if policy.bias is None else policy.bias.detach()",
            "bias = None",
            "the reference without the bias",
        ),
        {
            "old": ", like=policy_plan",
            "new": "",
            "breaks": "policy and reference are planned apart",
            "tests": "test_policy.py -k equal_policies",
        },
        (
            "rows.gather(reference.logprobs.double())",
            "rows.gather(reference.logprobs.half())",
            "a reference in half precision",
        ),
        (
            "    logprobs, hidden = arguments.ref_logprobs, arguments.ref_hidden\n    if (logprobs is None) == (hidden is None):",
            "    logprobs, hidden = arguments.ref_logprobs, arguments.ref_hidden\n    if logprobs is None and hidden is None:",
            "two references are taken",
            "test_checks.py -k 'reference or ref_'",
        ),
    ),
    *_in(
        "fusedpo/objective/device_checks.py",
        "test_checks.py",
        (
            "~((temperature > 0) & temperature.isfinite())",
            "~((temperature >= 0) & temperature.isfinite())",
            "a temperature of 0",
        ),
        (
            "(borders[0] != 0) | (borders[-1] != positions)",
            "(borders[-1] != positions)",
            "a first sequence without its start",
        ),
        ("(0 if empty else 1)", "0", "sequences without tokens"),
    ),
    *_in(
        "fusedpo/checks.py",
        "test_checks.py",
        ("if not -math.inf < found < math.inf:", "if abs(found) == math.inf:", "NaN is a number"),
        (
            "if not low <= (value := number(argument, value)) < high:",
            "if not low <= (value := number(argument, value)) <= high:",
            "the end is within",
            "test_checks.py losses/test_names.py losses/test_robust_dpo.py losses/test_exo.py",
        ),
        ("cutoff=0.5)", "cutoff=0.95)", "no near matches", "test_checks.py losses/test_names.py"),
        (
            "abs(labels.shape[-1] - expected[-1]) == 1",
            "labels.shape[-1] - expected[-1] == 1",
            "no remedy for labels that are short",
        ),
        (
            "if isinstance(value, bool) or not isinstance(value, Real):",
            "if not isinstance(value, Real):",
            "True is a number",
        ),
        ("pass {prefix}weight.T", "pass {prefix}weight", "a remedy that is none"),
    ),
    *_in(
        "fusedpo/head.py",
        "test_head.py test_checks.py -k 'head or logit_scale or softcap'",
        (
            "self.softcap * torch.tanh(z / self.softcap)",
            "self.softcap * torch.tanh(self.logit_scale * z / self.softcap)",
            "the scale before the cap",
        ),
        ('checks.positive("logit_scale", self.logit_scale)', "pass", "a scale of 0"),
    ),
    *_in(
        "fusedpo/labels.py",
        "trainers/test_transformers.py -k 'since_the_last or next_rows or no_part'",
        ("(cu_seqlens[1:] - 1)", "cu_seqlens[:-1]", "labels cross borders"),
    ),
    *_in(
        "fusedpo/model_head/contexts.py",
        "test_fused_head.py",
        (
            "            torch.clear_autocast_cache()\n",
            "            pass\n",
            "weights without gradients under autocast",
        ),
        (
            "                    buffer.copy_(before)",
            "                    pass",
            "the experiment changes buffers",
        ),
        (
            "with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):",
            "with torch.no_grad():",
            "the experiment draws random numbers",
        ),
    ),
    *_in(
        "fusedpo/model_head/experiment.py",
        "test_fused_head.py",
        (
            "bound = 8 * max(eps, probe.eps) + 1e-5",
            "bound = 8 * max(eps, probe.eps) + 1e-1",
            "another head is taken",
            "test_fused_head.py -k 'almost or longer or long_way or experts'",
        ),
    ),
    *_in(
        "fusedpo/model_head/modules.py",
        "test_fused_head.py",
        ("or module.merged:", "or False:", "merged adapters count twice"),
    ),
    *_in(
        "fusedpo/model_head/score.py",
        "test_fused_head.py",
        (
            "-(logp.exp() * logp.clamp(min=-1e4)).sum(-1)",
            "-(logp.exp() * logp).sum(-1)",
            "NaN for tokens that are ruled out",
        ),
        (
            "return mean * head.logit_scale",
            "return mean",
            "the mean logit without the scale",
            "lazy/test_idioms.py lazy/test_traps.py lazy/test_models.py",
        ),
        (
            "mean = mean + head.bias.mean(dtype=full)",
            "pass",
            "the mean logit without the bias",
            "lazy/test_idioms.py lazy/test_traps.py lazy/test_models.py",
        ),
    ),
    *_in(
        "fusedpo/model_head/forward.py",
        "test_fused_head.py",
        (
            "clone.original = types.MethodType(self.original.__func__, model)",
            "pass",
            "a copy runs the other's forward",
        ),
        (
            "clone.model = model",
            "clone.model = self.model",
            "a copy runs the other's weights",
        ),
        (
            'getattr(output, "aux_loss", None)\n\n    def run',
            "None\n\n    def run",
            "no auxiliary loss from logits",
            "test_fused_head.py -k 'almost or longer or long_way or experts'",
        ),
    ),
    *_in(
        "fusedpo/model_head/cap_and_scale.py",
        "test_fused_head.py",
        (
            "weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]",
            "weight = weight[: self.vocab]",
            "a bias that is too long",
            "test_fused_head.py -k 'almost or longer or long_way or experts'",
        ),
    ),
    *_in(
        "fusedpo/losses/modifiers.py",
        "test_liger_shaped.py",
        (
            "None if s.ref_logp is None else s.ref_logp / s.length",
            "s.ref_logp",
            "a sum beside means",
        ),
    ),
    *_in(
        "fusedpo/liger/pairs.py",
        "test_liger_shaped.py",
        {
            "old": "loss = loss + self.alpha * nll",
            "new": "loss = loss + nll",
            "breaks": "alpha ignored",
            "equivalent": "other labels of the cross-entropy are ORPO's alone, whose alpha is 1",
        },
    ),
    *_in(
        "fusedpo/liger/kto.py",
        "test_liger_shaped.py",
        (
            'if kl is not None and self.loss_type == "kto":',
            "if kl is not None:",
            "kl where it plays no part",
        ),
    ),
    *_in(
        "fusedpo/liger/grpo.py",
        "test_liger_shaped.py",
        ("ids.clamp(min=-1)", "ids", "a wrong id is ignored"),
        (
            '"kl_weight": self.beta if self.use_ref_model else 0.0',
            '"kl_weight": self.beta',
            "a reference that is not there",
        ),
    ),
    *_in(
        "fusedpo/distributed.py",
        "distributed/test_sequences.py",
        (
            "own = count.detach().double().reshape(()).clone()",
            "own = count.detach().float().double().reshape(()).clone()",
            "counts rounded to fp32",
            "distributed/test_sequences.py -k 'denominators or count'",
        ),
        (
            "dtype=torch.float64, device=device)\n    if not together",
            "dtype=torch.float32, device=device).double()\n    if not together",
            "counts rounded to fp32",
            "distributed/test_sequences.py -k 'denominators or count'",
        ),
        (
            "return own / dist.get_world_size(group)",
            "return own",
            "a sum for a mean",
            "distributed/test_sequences.py -k 'denominators or count'",
        ),
    ),
    *_in(
        "fusedpo/sizes.py",
        "test_plan.py",
        ("        if size < 1024:", "        if size <= 1024:", "1024 B"),
        ("if not 1 <= size < float", "if not 0 <= size < float", "a budget of nothing"),
        (
            'if device == "cpu" or memory is None:',
            "if memory is None:",
            "a CPU's budget by its memory",
        ),
    ),
    *_in(
        "fusedpo/engine/plan.py",
        "test_plan.py",
        (
            'return "tokens" if by_tokens else',
            'return "vocabulary" if by_tokens else',
            "the cut is misnamed",
        ),
        (
            "return type(self), (str(self), self.least)",
            "return type(self), (str(self),)",
            "an error that cannot be pickled",
        ),
    ),
    *_in(
        "fusedpo/engine/planner.py",
        "test_plan.py",
        (
            "if _total(each) <= allowed]",
            "if _total(each) < allowed]",
            "the least budget is too small",
        ),
        (
            "fewest = _least(ways, p, allowed, told=told)",
            "fewest = min(map(_total, candidates))",
            "the least budget brings a tile that holds more",
        ),
    ),
    *_in(
        "fusedpo/footprint.py",
        "test_footprint.py test_plan_command.py -k 'not what_is_predicted and not the_examples'",
        ("2 * (1 + 4 / 256)", "2", "states of 8 bits without their scales"),
        ("how).values()) <= memory", "how).values()) < memory", "a step that just fits"),
        ("+ 16 * shape.hidden", "", "norms in fp32"),
        (
            "work.loss.needs_reference and not work.frozen",
            "work.loss.needs_reference",
            "a reference for LoRA",
        ),
        ("gathered=self.context > 0,", "gathered=False,", "gathered rows not counted"),
    ),
)

_PROGRAMS = (
    *_in(
        "benchmarks/compare.py",
        "test_compare.py -k 'not memory and not fails'",
        (
            "(self.labels[:, 1:] != IGNORE_INDEX).sum()",
            "(self.labels != IGNORE_INDEX).sum()",
            "a first token counts as scored",
        ),
        (
            "(gradient - fused_gradient).abs().amax() / scale",
            "(gradient - fused_gradient).abs().mean() / scale",
            "a mean for the largest",
        ),
        (
            "batch.rows([0, len(batch.labels) // 2])",
            "batch.rows([0, 1])",
            "a pair of two chosen ones",
        ),
        (
            "return self.labels[:, 1:].numel() * len(self.head.weight) * 4",
            "return self.labels[:, 1:].numel() * len(self.head.weight) * 2",
            "half of the logits",
        ),
        ("max(self.hidden_gap, self.weight_gap)", "self.hidden_gap", "the larger gap is not shown"),
    ),
    *_in(
        "fusedpo/machine.py",
        "test_machine.py",
        (
            "max(1, math.ceil(int(quota) / int(period)))",
            "int(quota) // int(period)",
            "half a core is none",
        ),
        ("known[:2][-1]", "known[0]", "the CPU before a GPU"),
        ("for d in reversed(known)", "for d in known", "the last GPU is the one meant"),
        (
            'if not (ROOT / ".git").exists():',
            "if False:",
            "the commit of somebody else's repository",
        ),
        (
            "None if torch.version.hip else f",
            "f",
            "a compute capability of AMD's",
        ),
        (
            "if name.startswith(_PREFIXES) or name in _VARIABLES",
            "if name",
            "secrets in a bug report",
        ),
        ("(name, *_ALSO.get(name, ()))", "(name,)", "Triton by another name is missing"),
    ),
    *_in(
        "fusedpo/commands/env.py",
        "test_machine.py",
        ('if found["dirty"] else', 'if not found["dirty"] else', "changes of a clean checkout"),
    ),
    *_in(
        "fusedpo/commands/doctor.py",
        "test_doctor.py",
        (
            "    return min(failed, 1)\n\n\ndef advice",
            "    return 0\n\n\ndef advice",
            "a failure exits with 0",
        ),
        ('"ok": not failed}', '"ok": True}', "a failure is well"),
        ("1.25 * float((rounded", "125 * float((rounded", "wrong gradients pass"),
        ("bound, floor = 2e-5,", "bound, floor = 2e-1,", "wrong log-probabilities pass"),
        ("bound, floor = 1e-11, 1e-12", "bound, floor = 1e-11, 2.0", "no gradient at all passes"),
        ("(math.isnan(one[1]), one[1])", "one[1]", "a NaN is not the worst"),
        ("with full_precision():", "if True:", "the naive program in TF32 is the measure"),
        ("threads * processes > cores", "threads * processes >= cores", "all cores are too many"),
        ("1 < threads < 5", "1 < threads <= 5", "five threads are few"),
        ("max(1, cores // processes)", "cores // processes", "no thread at all"),
    ),
    *_in(
        "fusedpo/commands/plan.py",
        "test_plan_command.py",
        (
            'device.type == "cpu" or given.dtype == "float64"',
            'device.type == "cpu"',
            "kernels for float64",
        ),
        ("min(cost.needed or 0 for", "max(cost.needed or 0 for", "more than the least budget"),
        (
            'cost["products"] < products:',
            'cost["products"] <= products:',
            "a route as dear is called cheaper",
        ),
        ("replace(work, tokens=fits or 1)", "work", "the breakdown of other lengths"),
        (
            '"tokens": (1, 10**9)',
            '"tokens": (0, 10**9)',
            "no tokens",
        ),
    ),
    *_in(
        "fusedpo/commands/train.py",
        "test_cli.py -k 'not demo'",
    ),
    *_in(
        "fusedpo/trainers/evaluation.py",
        "test_evaluate.py",
        ("return BASE if below else None", "return None", "an adapter is compared with itself"),
        ("if split or held_out", "if held_out", "rows of training are evaluated on"),
    ),
    *_in(
        "fusedpo/cli.py",
        "test_cli.py -k 'not demo'",
        (
            "if processes.is_first():\n            super",
            "if True:\n            super",
            "every process prints its help",
            "test_cli.py -k prints_help",
        ),
    ),
    *_in(
        "fusedpo/report.py",
        "test_report.py",
        ("if before < at <= step]", "if before <= at <= step]", "a loss in two means"),
        (
            "for step, values in sorted(held_out.items())",
            "for step, values in held_out.items()",
            "evaluations in another order",
        ),
        (
            '"loss" in entry:',
            '"loss" in entry and "epoch" in entry:',
            "losses without an epoch are lost",
        ),
        ('name not in ("step", "epoch")', 'name != "step"', "a mean of epochs"),
        (
            "found[name] = sum(values) / len(values)",
            "found[name] = sum(values) / len(entries)",
            "means over entries without it",
        ),
    ),
    *_in(
        "fusedpo/tables.py",
        "test_tables.py",
        ('cell.lstrip("-")[0].isdigit()', "cell[0].isdigit()", "negative numbers to the left"),
        (
            "cell.rjust(width) if number else cell.ljust(width)",
            "cell.ljust(width)",
            "numbers to the left",
        ),
        ("else _WIDTH_OF_A_FILE", "else 80", "numbers are cut"),
        ("lines if any(columns) else rows", "lines", "a line of no names"),
    ),
    *_in(
        "fusedpo/catalogue.py",
        "test_tables.py",
        ("if about.default is not None]", "]", "what is needed is called optional"),
        (
            '"3 to 4" if loss.gradient_structure.scope == "batch" else "3"',
            '"3"',
            "too few products",
        ),
        ("if not f.kw_only", "", "options of all losses"),
    ),
    *_in(
        "fusedpo/engine/backend.py",
        "test_backend.py",
        ("_LEAST_TRITON = (3, 6)", "_LEAST_TRITON = (3, 7)", "a Triton that will do is refused"),
        ("if hidden.dtype != torch.float64:", "if True:", "a warning about float64"),
        ("@functools.cache\ndef _warn_once", "def _warn_once", "a warning at every call"),
    ),
    *_in(
        "fusedpo/engine/routes/base.py",
        "test_autograd.py test_objective.py -k 'twice or again or kept'",
        (
            "if not graph_is_kept():\n            return self.held.pop(name)",
            "if True:\n            return self.held.pop(name)",
            "what waits is given up though the graph is kept",
        ),
    ),
    *_in(
        "fusedpo/engine/routes/hybrid.py",
        "test_plan.py",
        (
            "max(0, min(left // row, most) // n * n)",
            "max(0, min(left // row, most))",
            "row blocks of the forward that are cut anew",
        ),
    ),
    *_in(
        "fusedpo/engine/routes/one_pass.py",
        "test_autograd.py test_objective.py -k 'twice or again or kept'",
        (
            "in_place = weight is None or t.weight.dtype == t.acc",
            "in_place = weight is not None and t.weight.dtype == t.acc",
            "a head's bias scaled twice",
        ),
    ),
    *_in(
        "fusedpo/engine/workspace.py",
        "test_workspace.py",
        ("if total > declared:", "if size > declared:", "parts that are not added up"),
        ("other[0] == name and other[1] != part", "other[1] != part", "other buffers are counted"),
        ("self._views[key] = {}", "self._views.setdefault(key, {})", "memory that was given up"),
        ("form = (name, part), (dtype, *shape)", "form = (name, part), shape", "another dtype"),
    ),
    *_in(
        "kernels/tail_terms.py",
        "kernels/test_tail.py",
        (
            "slope = tl.where(x >= 1.0, 0.0, -1.0)",
            "slope = tl.where(x > 1.0, 0.0, -1.0)",
            "the hinge's slope at its corner",
        ),
    ),
)

_LAZY = (
    *_in(
        "fusedpo/lazy/source.py",
        "lazy/test_idioms.py lazy/test_traps.py lazy/test_models.py lazy/test_transformers.py",
        ("names |= {*also.weights}", "", "a pass for each statistic"),
        (
            "earlier.rows & (labels == earlier.labels)",
            "earlier.rows",
            "another label's number",
        ),
        (
            "earlier.rows & (labels == earlier.labels)",
            "labels == earlier.labels",
            "rows that were not scored",
        ),
        ("rows = rows & ~here", "pass", "rows that are scored again"),
        ("in others:", "in others[:0]:", "what a second pass has scored"),
        (
            '(earlier.differentiable or not grad or names <= {"entropy"})',
            "True",
            "no gradient after a pass without one",
        ),
        (
            "Head(weight, bias, logits.softcap, logits.scale)",
            "Head(weight, bias, None, logits.scale)",
            "statistics without the soft cap",
        ),
        (
            "self.versions != _versions(self.hidden, weight, bias)",
            "False",
            "numbers of weights that have changed",
        ),
        ("source.hooks = self.hooks", "", "repeated rows without the wrappers' hooks"),
        (
            'if name != "entropy":\n            return value',
            "if name:\n            return value",
            "an entropy without its gradient",
        ),
    ),
    *_in(
        "fusedpo/lazy/gradients.py",
        "lazy/test_idioms.py lazy/test_traps.py",
        ("of_bias += dz.sum(0)", "of_bias = dz.sum(0)", "the bias's gradient of the last chunk"),
        {
            "old": "of_hidden.index_add_(0, part, ",
            "new": "of_hidden.index_copy_(0, part, ",
            "breaks": "the gradient of a row that comes twice",
            "equivalent": "no row does: repeated rows are a source of their own",
        },
        ("g = g.movedim(recipe.axis, -1).reshape", "g = g.reshape", "axes of a gradient"),
        (
            "torch.where(scored.rows & (g != 0), 0, NO_LABEL)",
            "torch.where(scored.rows, NO_LABEL, 0)",
            "the entropy's gradient of other rows",
        ),
    ),
    *_in(
        "fusedpo/lazy/statistics.py",
        "lazy/test_idioms.py",
        (
            'Combination(expression, labels, {"logprob": 1.0, "logsumexp": 1.0})',
            'Combination(expression, labels, {"logprob": 1.0})',
            "a log-probability for a logit",
        ),
        (
            'Combination(of_p, None, {"logsumexp": 1.0, "entropy": -1.0})',
            'Combination(of_p, None, {"logsumexp": 1.0, "entropy": 1.0})',
            "the entropy's sign",
        ),
        ("combined.times(1 / vocab)", "combined", "a sum for a mean"),
    ),
    *_in(
        "fusedpo/lazy/expressions.py",
        "lazy/test_idioms.py lazy/test_traps.py lazy/test_models.py",
        (
            "return Logits(softcap=1 / expression.scale, scale=expression.scale)",
            "return Logits(softcap=1 / expression.scale)",
            "a soft cap without its scale",
        ),
        ("and self.scale == other.scale", "", "logits at another temperature"),
        ("value = value / divisor.to(z.dtype)[:, None]", "", "no temperature of the rows"),
    ),
    *_in(
        "fusedpo/lazy/arithmetic.py",
        "lazy/test_idioms.py lazy/test_traps.py",
        (
            "keep = kept(lazy, other != 0)",
            "keep = kept(lazy, other == other)",
            "rows that a mask leaves out are scored",
        ),
        ("if root.memory.has_entries():", "if False:", "views of one entry miss a change"),
        (
            "rows = RowValues(tuple((index, 1 / values) for index, values in rows.pieces))",
            "pass",
            "a factor for a divisor",
        ),
        (
            "if func.__name__ in _TURNED:\n        a, b = b, a",
            "",
            "operands the other way about",
        ),
    ),
    *_in(
        "fusedpo/lazy/masks.py",
        "lazy/test_idioms.py",
        ("keep = kept(lazy, ~mask)", "keep = kept(lazy, mask)", "what is filled is scored"),
    ),
    *_in(
        "fusedpo/lazy/registry.py",
        "lazy/test_idioms.py lazy/test_traps.py lazy/test_chains.py",
        (
            "recipe.grad and torch.is_grad_enabled() if grad is None else grad",
            "recipe.grad if grad is None else grad",
            "a gradient under no_grad",
        ),
        (
            "if index.dim() and index.numel() > 1 and index.unique().numel() < index.numel():",
            "if False:",
            "rows that come twice share a label",
        ),
    ),
    *_in(
        "fusedpo/lazy/operations.py",
        "lazy/test_models.py lazy/test_traps.py test_lazy_in_trainers.py",
        ("if (name, place) not in _reported:", "if True:", "a warning at every step"),
        (
            "if not real_memory and any(t.moved for t in _lazy(args, kwargs)):",
            "if False:",
            "no gradient through somebody's own function",
        ),
    ),
    *_in(
        "fusedpo/lazy/install.py",
        "lazy/test_models.py",
        ("hidden.dim() > 2 and hidden.shape[-2] == 1", "False", "lazy logits in generation"),
        {
            "old": "if head.module is not self.module:",
            "new": "if False:",
            "breaks": "adapters that are off",
            "equivalent": "the layer below has the same weight; only its hooks would not run",
        },
        (
            "original = current.original if isinstance(current, LazyHead) else current",
            "original = current",
            "lazy logits that cannot be undone",
        ),
    ),
    *_in(
        "fusedpo/lazy/everywhere.py",
        "lazy/test_everywhere.py -k 'not program'",
        ("if self._model_class.post_init is self._installed:", "if False:", "it is never undone"),
        ("self._install = None", "pass", "what was removed first stays"),
    ),
)

_COLUMNS = (
    *_in(
        "fusedpo/engine/by_columns.py",
        "compact/test_audit.py compact/test_records.py -m 'not slow'",
        (
            "hidden[slice(*r)].addmm_(lost[slice(*r), None], others[i, None])",
            "pass",
            "what the hidden gradient leaves out is lost",
        ),
        (
            "hidden[slice(*r)].addmm_(lost[slice(*r), None], others[i, None])",
            "hidden[slice(*r)].addmm_(-lost[slice(*r), None], others[i, None])",
            "dropped mass of the wrong sign",
        ),
        (
            ".addmm_(directions, pull)",
            ".addmm_(0.0 * directions, pull)",
            "what the head's gradient leaves out is lost",
        ),
        (
            "hidden.addmm_(lacking, directions.T)",
            "hidden.addmm_(-lacking, directions.T)",
            "main directions are moved the wrong way",
        ),
        (
            "return t.some_weight_rows(columns, out)",
            "return out.copy_(t.weight[: columns.shape[0]])",
            "weight rows of another chunk",
        ),
        ("hidden_grad[rows] = of_rows", "pass", "a slab's hidden gradient is not written"),
        (
            "for columns in _chunks(t, of_hidden):",
            "for columns in _chunks(t, of_hidden[:-1]):",
            "a kept column is not done",
        ),
        (
            "lost = row_sums.clone()",
            "lost = -row_sums",
            "sums of a row of the wrong sign, which are 0 but for softcap and slices",
            "compact/test_options.py distributed/test_compact.py -k 'softcap or slices'",
        ),
        (
            'left[:count] = kept.directions("hidden", c).mul_(t.gain)',
            'left[:count] = kept.directions("hidden", c)',
            "shares of columns without their gain, divided by it",
            "compact/test_audit.py -k as_on_a_gpu",
        ),
    ),
    *_in(
        "fusedpo/vocab_shards.py",
        "distributed/test_compact.py",
        ("whole = values.contiguous()", "whole = values", "memory between rows is added up"),
    ),
    *_in(
        "fusedpo/engine/row_order.py",
        "compact/test_row_order.py",
        ("(rows < t.count and rows % slab)", "False", "a slab crosses a row block"),
        (
            "for start, stop in t.row_blocks():",
            "for start, stop in [(0, t.count)]:",
            "rows leave it",
        ),
        ("(slabs + 1) // 2 * slab", "(stop - start) // 2", "halves that cut a slab"),
        (".argsort(stable=True)]", ".argsort(stable=True).argsort()]", "the inverse of an order"),
        ("own - first", "own - first - start", "features of other rows"),
        (".nan_to_num_(0.0, 0.0, 0.0)", "", "a row that is no number spoils the order of others"),
        ("t.shard.of_first(order)", "order", "ranks cut their slabs of other rows"),
    ),
    *_in(
        "fusedpo/engine/hidden_gradient.py",
        "compact/test_row_order.py",
        (
            "out[:, start:stop].index_copy_(0, order, part)",
            "out[:, start:stop].copy_(part[order])",
            "an order that is applied again rather than undone",
        ),
        (
            "rest = products if sums is None else sums.row_products[slice(*r)]",
            "rest = products",
            "products of an earlier shift",
            "compact/test_promise.py compact/test_options.py -m 'not slow'",
        ),
    ),
    *_in(
        "fusedpo/engine/tiles.py",
        "compact/test_row_order.py",
        ("rows, self.targets[order]", "rows, self.targets", "labels of other rows"),
        (
            "scale[order] if isinstance(scale, Tensor) else scale",
            "scale",
            "temperatures of other rows",
        ),
    ),
    *_in(
        "fusedpo/engine/routes/compact.py",
        "compact/test_records.py",
        (
            "            # not beside those that take their place\n            del out, whole, head\n",
            "",
            "a breached gradient beside the one in its place",
            "compact/test_bytes.py",
        ),
        (
            'allowed = {name: record.allowed(name) for name in ("hidden", "head")}',
            'allowed = {name: 1e9 for name in ("hidden", "head")}',
            "nothing is aimed at",
        ),
        (
            "        t.shard.add_up(parts)\n",
            "        pass\n",
            "records of a slice of the vocabulary",
            "distributed/test_compact.py",
        ),
        ("g=b.g[order]", "g=b.g", "upstream gradients of other rows", "compact/test_row_order.py"),
        (
            '"aim": None if exact else (allowed, capacities)',
            '"aim": (allowed, capacities)',
            "by a plan that was given, no call is exact after a breach",
            "compact/test_capacities.py",
        ),
        (
            "Cost(products, forward, backward, _beside(p, count))",
            "Cost(products, forward, backward)",
            "it is taken where it does not pay",
            "compact/test_options.py -k pay",
        ),
        (
            "{name: values[order] for name",
            "{name: values for name",
            "statistics of other rows",
            "compact/test_row_order.py",
        ),
        (
            "write_rows(t.reordered(order), out,",
            "write_rows(t, out,",
            "gradients at the positions of other rows",
            "compact/test_row_order.py",
        ),
    ),
    *_in(
        "fusedpo/engine/columns.py",
        "compact/test_promise.py compact/test_audit.py compact/test_options.py -m 'not slow'",
        ("torch.where(here, torch.inf, 0.0)", "torch.zeros_like(here)", "targets are not kept"),
        ("return rest.div_(self._lost[gradient][:, None])", "return rest", "not normalised"),
        (
            "needed[name] = torch.maximum(needed[name], _count(keep, rest).amax())",
            "needed[name] = _count(keep, rest).amax()",
            "the last slabs tell how many columns are needed",
            "compact/test_records.py -k learned",
        ),
        (
            "left_out[name] += torch.sum(rest, 0, out=memory[0])",
            "left_out[name] = torch.sum(rest, 0)",
            "the last slabs tell what is left out",
            "compact/test_records.py -k learned",
        ),
        (
            "of_slabs = _by_slabs(t, scaled * sizes, 0.0).amax(1)",
            "of_slabs = _by_slabs(t, scaled, 0.0).amax(1)",
            "a long row counts as any other",
            "compact/test_promise.py -k long",
        ),
        (
            "gain = unit_gain(largest(missed))",
            "gain = 1.0",
            "of a small gradient nothing matters",
            "compact/test_promise.py -k 'scale or certain'",
        ),
        (
            "rest.masked_fill_(self._kept[gradient][:, columns], 0.0)",
            "pass",
            "kept columns stand in the direction too",
        ),
        (
            "(self.counts[name].sum() for name",
            "(self._kept[name].sum() for name",
            "to be counted, all flags become numbers of 8 bytes",
            "compact/test_bytes.py",
        ),
    ),
    *_in(
        "fusedpo/engine/entries.py",
        "compact/test_promise.py compact/test_audit.py -m 'not slow'",
        (
            "return torch.where(columns[at] == targets, at, -1)",
            "return torch.full_like(at, -1)",
            "no target among kept columns",
        ),
        (
            "return torch.where(columns[at] == targets, at, -1)",
            "return at",
            "a target in the column next to it",
        ),
    ),
    *_in(
        "fusedpo/engine/column_sums.py",
        "compact/test_promise.py compact/test_options.py -m 'not slow'",
        (
            "self.row_products[rows] -= of_targets.mul_(own[rows, None])",
            "pass",
            "targets are not in the sums",
        ),
        (
            "min(FINISHED_ROWS, t.plan.rows, most)",
            "FINISHED_ROWS",
            "more rows than a tile has",
            "compact/test_generated.py",
        ),
        (
            "within = self._by_slabs[slice(*r)] - r[0]",
            "within = torch.arange(r[1] - r[0])",
            "sums of the rows of other slabs",
            "compact/test_row_order.py",
        ),
        (
            "values if self._order is None else values[:, self._order]",
            "values",
            "sums brought to the statistics of other rows",
            "compact/test_row_order.py",
        ),
        (
            "in (self.row_products, self.row_sizes):",
            "in (self.row_sizes,):",
            "products of other rows",
            "compact/test_row_order.py",
        ),
        (
            "in (self.row_products, self.row_sizes):",
            "in (self.row_products,):",
            "sizes of other rows",
            "compact/test_row_order.py",
        ),
    ),
    *_in(
        "fusedpo/engine/audit.py",
        "compact/test_audit.py compact/test_records.py compact/test_promise.py -m 'not slow'",
        (
            "return torch.where(whole.isfinite(), relative, torch.nan).amax().sqrt()",
            "return 0.0 * relative.amax()",
            "it always says 0",
        ),
        (
            "torch.where(whole.isfinite(), relative, torch.nan)",
            "relative",
            "what is not finite passes",
        ),
        (
            "wrong = _difference(t, exact, hidden, sample.chosen)",
            "wrong = exact - hidden[: len(exact)]",
            "other rows",
        ),
        (
            "dtype=torch.float64) + 0.5",
            "dtype=torch.float64) + 0.01",
            "a sample of where each step begins",
            "compact/test_audit.py -k sample",
        ),
        (
            "            r[0] > 0,\n",
            "            False,\n",
            "columns are audited by the last block of rows",
            "compact/test_records.py -k learned",
        ),
        (
            "return cls(chosen, factors.masked_fill_(again, 0.0))",
            "return cls(chosen, torch.ones_like(share))",
            "a sample counts for itself",
        ),
    ),
    *_in(
        "fusedpo/engine/tolerance.py",
        "compact/test_records.py compact/test_promise.py -m 'not slow'",
        ("self.breaches += not within", "pass", "breaches are not counted"),
        ("min(1.0, seen.share / growth)", "seen.share / growth", "a share above 1"),
        (
            "self._breached |= not self.note(",
            "self._breached |= not not self.note(",
            "a breach that was seen later is let be",
            "compact/test_capacities.py",
        ),
        (
            "self._breached |= not self.note(",
            "self._breached = not self.note(",
            "the last backward of a step speaks for all",
            "compact/test_capacities.py",
        ),
        (
            "if arrived is not None and self.together:",
            "if False:",
            "each rank reads what has arrived at it",
            "compact/test_capacities.py",
        ),
        (
            "records = _records.setdefault(ranks, {})",
            "records = _records.setdefault(None, {})",
            "a rank's own calls change what all decide by",
            "distributed/test_compact.py -k alone",
        ),
        (
            "    with _lock:\n        records",
            "    if True:\n        records",
            "threads lose each other's records",
            "compact/test_records.py -k threads",
        ),
        (
            "self.skipped, self._went_exactly = 0, False",
            "self.skipped = 0",
            "a call that was exact is shown in the place of a later backward",
            "compact/test_records.py",
        ),
        (
            "self._went_exactly = True",
            "pass",
            "an exact call is shown as the last by columns",
            "compact/test_records.py",
        ),
        (
            "if seen.rows and not any(map(math.isnan, seen.errors.values())):",
            "if not any(map(math.isnan, seen.errors.values())):",
            "a gradient of zeros is learned",
            "compact/test_records.py",
        ),
        (
            "if seen.rows and not any(map(math.isnan, seen.errors.values())):",
            "if seen.rows:",
            "NaN is learned",
            "compact/test_records.py",
        ),
        (
            "part = max(_LEAST_PART, part / 2)",
            "part = 1 / 16",
            "capacities fall",
            "compact/test_capacities.py",
        ),
        (
            "within = all(error <= self.tolerance for error in seen.errors.values())",
            "within = not any(error > self.tolerance for error in seen.errors.values())",
            "NaN is within",
        ),
        (
            "            if not math.isfinite(error):\n                continue\n",
            "",
            "an error beyond its range is learned",
        ),
        (
            "found = max(min(_GUESSED_COHERENCE[name], self.coherence[name]) / 4, floor)",
            "found = self.coherence[name]",
            "a record that keeps everything does so for good",
        ),
        ("rested = self.skipped >= _PATIENCE", "rested = False", "never again"),
        (
            "max(found, self.coherence[name] ** (2 / 3) * found ** (1 / 3))",
            "self.coherence[name]",
            "no learning",
        ),
    ),
    *_in(
        "fusedpo/engine/head_gradient.py",
        "compact/test_records.py",
        (
            "weighted(t, rows, coefficient(r), len(only))",
            "weighted(t, rows, coefficient(r), len(only) + 1)",
            "a breach finds weighted rows where they are not declared",
        ),
    ),
    *_in(
        "fusedpo/engine/autograd.py",
        "compact/test_records.py -k made_again",
        (
            "if call.tolerance:",
            "if False:",
            "a call made again may save what another route does",
        ),
    ),
    *_in(
        "fusedpo/engine/planner.py",
        "compact/test_records.py",
        (
            "        tolerance=_tolerance(p, route),\n",
            "",
            "a plan for another tolerance brings it along",
        ),
    ),
    *_in(
        "fusedpo/engine/compiled.py",
        "test_gradient_tolerance.py -k in_a_graph",
        ("        record.skip()\n", "", "the exact calls of graphs are not counted"),
    ),
    *_in(
        "fusedpo/engine/score.py",
        "compact/test_records.py",
        (
            'if batch.tolerance and options["needs"] and chosen.route != "compact":',
            "if False:",
            "an exact plan that is given is not shown",
        ),
        (
            'if not batch.tolerance or not options["needs"]:',
            'if not options["needs"]:',
            "exact calls push records out",
        ),
        (
            'if not batch.tolerance or not options["needs"]:',
            "if not batch.tolerance:",
            "a reference takes the place of the exact call that is due",
            "compact/test_capacities.py",
        ),
    ),
)

FAULTS: tuple[Fault, ...] = (*_TRAINERS, *_RECIPES, *_LOSSES, *_CORE, *_PROGRAMS, *_LAZY, *_COLUMNS)
