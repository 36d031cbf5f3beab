# make run    a listening model, its score and its report, from nothing
# make test   the test suite
# make setup  only the environment
# Settings, all optional: PYTHON, TORCH_INDEX, PIP_INDEX_URL or UV_DEFAULT_INDEX, OMNI_STORE, MIRRORS=cn

VENV := .venv
READY := $(VENV)/.ready

.PHONY: run test setup check
run: $(READY)
	$(VENV)/bin/omni run

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest

check: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

setup: $(READY)

$(READY): pyproject.toml infra/constraints.txt infra/setup.sh
	bash infra/setup.sh $(VENV)
	touch $@

$(VENV)/.dev: $(READY)
	bash infra/setup.sh $(VENV) dev,kernels
	touch $@
