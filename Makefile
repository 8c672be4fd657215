# make demo: install, then distil a small model on this machine.  make test: the test suite.  make help: the rest.
PYTHON ?= python3.11
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

.PHONY: help setup demo study test test-full faults lint clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.installed-$(EXTRA)  ## make the environment (EXTRA=gpu for a machine with NVIDIA GPUs)

# Pinned and complete lists are installed without the resolver; torch's CPU build comes from where pip is set up to look,
# and from PyTorch's own index where that has none.
$(VENV)/.installed-cpu: requirements/cpu.txt requirements/dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned dependencies into $(VENV) (a few minutes, about 3.5 GB) ..."
	@$(PIP) install --no-deps -r requirements/cpu.txt 2>/dev/null \
	  || $(PIP) install --no-deps --extra-index-url $(TORCH_CPU_INDEX) -r requirements/cpu.txt
	@$(PIP) install --no-deps -r requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-gpu: requirements/dev.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing vllm, torch (CUDA) and the rest into $(VENV) ..."
	@$(PIP) install --upgrade "setuptools>=77"
	@$(PIP) install --no-build-isolation -e ".[gpu]"
	@$(PIP) install --no-deps -r requirements/dev.txt
	@touch $@

demo: setup  ## a real distillation on this machine's CPU, about 8 minutes
	@$(BIN)/opd run configs/quickstart.yaml --name demo

study: setup  ## compare the methods over seeds (configs/study.yaml); run again, it goes on where it was
	@$(BIN)/opd study configs/study.yaml

test: setup  ## the test suite
	@$(BIN)/python -m pytest

test-full: setup  ## the long tests too
	@$(BIN)/python -m pytest -m "not faults"

faults: setup  ## the fault tests in full, hours; stopped and started again it goes on (docs/reliability.md)
	@$(BIN)/python -m pytest -m "faults or promise"; code=$$?; \
	  $(BIN)/python tests/support/fault_table.py docs/reliability.md; exit $$code

lint: setup  ## style, types and who imports whom
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

clean:  ## remove the environment (never the store)
	rm -rf $(VENV) build *.egg-info
