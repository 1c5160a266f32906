# `make demo` and `make test` need nothing run before them. PYTHON may name an interpreter (3.11 or newer).
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-slow bench-smoke lint format clean

install: $(READY)

$(READY): pyproject.toml setup.py
	@set -e; \
	for p in $(PYTHON) python3 python3.12 python3.11 python3.13; do \
	  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then py=$$p; break; fi; \
	done; \
	if [ -z "$${py:-}" ]; then echo "make: no Python 3.11 or newer with venv found; install one or give PYTHON=/path/to/python3" >&2; exit 2; fi; \
	echo "installing into $(VENV) with $$($$py --version) (a few GB, one to five minutes)"; \
	[ -x $(BIN)/python ] || $$py -m venv $(VENV); \
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[all]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/fastidc demo

# Up to four processes with one thread each: most tests are too small for more, and threads of several processes fight.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder

bench-smoke: $(READY)
	PYTHONPATH=.:kernels $(BIN)/python -m bench all --smoke --cpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info runs
