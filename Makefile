# Four targets, each a few public commands; see README.md.
PYTHON  ?= python3
VENV    ?= .venv
SUITE   ?= mini
SEEDS   ?= 1
CORES   ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
ARGS    ?=
BIN     := $(VENV)/bin
READY   := $(VENV)/ready
# one pipeline at a time; where the system has no flock, Snakemake's own lock does it
LOCK    := $(if $(shell command -v flock),flock -n -E 75 .reports.lock,)
NOLOCK  := $(if $(LOCK),--nolock,)

.PHONY: reports snapshot test lab
.DEFAULT_GOAL := reports

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'wsol_nb needs Python 3.11 or newer, this is ' + sys.version.split()[0] + ': make PYTHON=python3.11 …')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Selective Search; shares a folder with the plain package, so it goes last
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps -c constraints.txt opencv-contrib-python-headless
	@touch $(READY)

reports: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" $(LOCK) $(BIN)/snakemake --cores $(CORES) $(NOLOCK) --rerun-incomplete --keep-going --show-failed-logs \
	    --quiet host progress reason --config suite=$(SUITE) seeds=$(SEEDS) $(if $(ARGS),$(ARGS)) \
	  || { code=$$?; test $$code != 75 || echo "another 'make reports' is running in this folder" >&2; exit $$code; }
	@echo "report: $${WSOL_REPORTS:-reports}/$(SUITE)/index.html"

snapshot: reports
	$(BIN)/python -c "from wsol_nb.reports import snapshot; snapshot('$(SUITE)', $(SEEDS))"

test: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -q tests/test_notebooks.py
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/test_notebooks.py

lab: $(READY)
	$(BIN)/jupyter lab nbs
