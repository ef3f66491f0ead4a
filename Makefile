# `make run` and `make test` need Python 3.11 or newer with venv, and make; they build .venv themselves.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PROMPT := --ServerApp.kernel_websocket_connection_class=workbench.lab_connection.PromptConnection

.PHONY: run test test-fast lint bench bench-gpu lab browser slurm doctor help

run: .venv/installed  ## train on the embedded clips and walk in their latent space: outputs/demo
	$(BIN)/workbench run params/demo

test: .venv/installed lint  ## ruff, pytest (slow tests too), nbval over the notebooks
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slurm"
	OUT=$$(mktemp -d) && trap 'rm -rf "$$OUT"' EXIT && export WORKBENCH_OUTPUTS=$$OUT && \
		$(BIN)/workbench run params/smoke-layouts --jobs 2 && $(BIN)/workbench run params/smoke-zoo && \
		$(BIN)/python -m pytest \
		--nbval-lax --nbval-current-env --nbval-cell-timeout 600 -p no:cacheprovider notebooks

test-fast: .venv/installed  ## the tests of a few seconds each
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not slurm"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

bench: .venv/installed  ## timings side by side, as tables
	$(BIN)/python -m benchmarks

bench-gpu: .venv/installed  ## timings of full-size steps on a CUDA device, beside plain ones
	$(BIN)/python -m benchmarks.gpu

lab: .venv/installed  ## JupyterLab on this machine, behind a token
	$(BIN)/jupyter lab --ip=127.0.0.1 $(PROMPT) $(AS_ROOT)

browser:  ## Chromium through apt (Debian), where it is missing: tests and timings of the explorer drive it
	@command -v chromium >/dev/null || { command -v apt-get >/dev/null && $(SUDO) apt-get update && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install --yes chromium; } || \
		{ echo "apt has no Chromium here: install it by other means (Ubuntu: snap install chromium), such that the command chromium starts it" >&2; exit 1; }

slurm: .venv/installed  ## Slurm through apt (Debian), where it is missing, and the tests on a cluster of two nodes started here
	@command -v slurmctld >/dev/null && command -v munged >/dev/null || { $(SUDO) apt-get update && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge; }
	$(SUDO) $(BIN)/python -m pytest tests/test_slurm.py

doctor: .venv/installed  ## what is installed, what is missing, what to do
	$(BIN)/workbench doctor

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile

.venv/installed: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11 or newer with venv found: install one (Debian: apt install python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating .venv with $(PYTHON)"; $(PYTHON) -m venv --clear .venv; }
	@echo "installing into .venv: about 2 GB, more with CUDA; goes on where it stopped if interrupted"
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
