# `make run` and `make test` do their whole set-up; both can be repeated.
# The first of these that is a Python 3.11 to 3.13 creates the environment; PYTHON=/path/to/python selects another. Guild's
# last release does not start on 3.14, which removed ast.Num and ast.Str.
PYTHON ?= python3.13 python3.12 python3.11 python3
VENV := .venv
BIN := $(VENV)/bin
# Runs are kept where Guild looks for them when called in this folder.
export GUILD_HOME ?= $(CURDIR)/.guild
# As in guild.yml: waiting OpenMP threads soon sleep; otherwise a shared machine would bring the tests to a standstill.
export GOMP_SPINCOUNT ?= 5000

.PHONY: run test data lock clean

# The published experiment at its default flags; on the simulated table if the real one cannot be downloaded.
run: $(VENV)/.run-ready
	@# A failed download prints why and is not fatal: the simulated table needs none.
	@$(BIN)/python -m datasets.download || true
	@if [ -f data/dataset.xlsx ]; then $(BIN)/guild run main --yes; \
	else echo "Running on the SIMULATED table instead (dataset=demo); its results say nothing about real grasslands."; \
	  $(BIN)/guild run main dataset=demo --yes; fi

data: $(VENV)/.run-ready
	@$(BIN)/python -m datasets.download

test: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Guild 0.9.0 warns about pkg_resources at every start; the option in its launcher silences this warning alone.
$(VENV)/.run-ready: requirements.txt requirements.lock
	@# A command may exist and not run, like the shims of pyenv; a venv without pip was begun without ensurepip.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { bare=; \
	  for python in $(PYTHON); do \
	    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue; \
	    $$python -c 'import ensurepip, venv' 2>/dev/null && exec $$python -m venv --clear $(VENV); \
	    bare=$$python; \
	  done; \
	  if [ "$$bare" ]; then echo "$$bare cannot make an environment: on Debian and Ubuntu, apt-get install python3-venv."; \
	  else echo "Python 3.11, 3.12 or 3.13 is needed, and none of these is one: $(PYTHON)." \
	    "On Debian 12, 13 or Ubuntu 24.04: apt-get install python3 python3-venv."; fi >&2; exit 1; }
	@echo "Installing packages into $(VENV); this takes some minutes..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c requirements.lock
	@sed -i '1s|\(python[0-9.]*\)$$|\1 -Wignore:pkg_resources:UserWarning|' $(BIN)/guild
	@mkdir -p $(GUILD_HOME)
	@touch $@

$(VENV)/.test-ready: $(VENV)/.run-ready requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt -c requirements.lock
	@touch $@

# Resolve requirements.txt and requirements-test.txt again, for every Python from 3.11 on.
lock: $(VENV)/.test-ready
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-emit-index-url --no-emit-find-links \
	  requirements.txt requirements-test.txt --output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
