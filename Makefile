# make demo: install, then distil a small model on this machine.  make test: the test suite.  make help: all targets.
# The first of these that runs; the suite is run on 3.11.
PYTHON ?= $(or $(shell for p in python3.11 python3.12 python3.13; do $$p -c '' 2>/dev/null && echo $$p && break; done),python3.11)
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

.PHONY: help setup demo demo-text study study-rewards test test-full faults bench bench-full lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 15

setup: $(VENV)/.installed-$(EXTRA)  ## create the environment in .venv (EXTRA=gpu for a machine with NVIDIA GPUs)

# The pinned lists are complete and are installed without the resolver. torch's CPU build comes from the configured package
# index, or from PyTorch's own index if that has none.
$(VENV)/.installed-cpu: requirements/cpu.txt requirements/dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned dependencies into $(VENV) (a few minutes, about 3.5 GB) ..."
	@$(PIP) install --no-deps -r requirements/cpu.txt 2>/dev/null \
	  || $(PIP) install --no-deps --extra-index-url $(TORCH_CPU_INDEX) -r requirements/cpu.txt
	@$(PIP) install --no-deps -r requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
	@echo "Installed. Next: make demo, or with models of yours: . $(VENV)/bin/activate && opd init --help"

$(VENV)/.installed-gpu: requirements/gpu.txt requirements/dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned dependencies with CUDA builds into $(VENV) (several GB) ..."
	@$(PIP) install --no-deps -r requirements/gpu.txt
	@$(PIP) install --no-deps -r requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
	@echo "Installed. Next: make demo, or with models of yours: . $(VENV)/bin/activate && opd init --help"

demo: setup  ## distil a small model on this machine's CPU; about two minutes on two idle cores with AVX-512
	@$(BIN)/opd run configs/demo.yaml --name demo

demo-text: setup  ## SmolLM2-135M teaches itself without four of its 30 layers; about ten minutes of CPU time
	@test -e smollm2/student-26/config.json || $(BIN)/python benchmarks/smollm2.py smollm2
	@$(BIN)/opd run configs/demo-text.yaml --name demo-text
	@$(BIN)/python benchmarks/demo_text.py demo-text

study: setup  ## compare the methods over seeds (configs/study.yaml); can be stopped and continued
	@$(BIN)/opd study configs/study.yaml

study-rewards: setup  ## compare rewards and token credit over seeds (configs/study-rewards.yaml); can be stopped and continued
	@$(BIN)/opd study configs/study-rewards.yaml

test: setup  ## the test suite in two processes, without the long tests
	@$(BIN)/python -m pytest -n 2

test-full: setup  ## the test suite with the long tests; needs Chromium and PostgreSQL (Debian: apt-get install chromium postgresql)
	@$(PIP) install --no-deps -r requirements/lm-eval.txt -r requirements/remote.txt -r requirements/s3-server.txt
	@$(BIN)/python -m pytest -m "not faults"

faults: setup  ## all fault tests in full (docs/reliability.md); takes hours, can be stopped and continued
	@$(BIN)/python -m pytest -m "faults or promise"; code=$$?; \
	  $(BIN)/python tests/support/fault_table.py docs/reliability.md; exit $$code

bench: setup  ## measure speed and memory, and write the table of docs/performance.md; about 20 minutes on two idle cores
	@$(BIN)/python benchmarks/bench.py

bench-full: setup  ## the same with the long ones (hours): PAIR and TRL are folders, see benchmarks/bench.py --help
	@$(BIN)/python benchmarks/bench.py --full --pair $(PAIR) --trl $(TRL)

lint: setup  ## style, types and import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

clean:  ## remove the environment; keeps the store
	rm -rf $(VENV) build *.egg-info
