# Each target works on a fresh clone: it makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check hosts lint docs bench paper clean

quickstart: $(VENV)/installed
	$(BIN)/untrigger quickstart --out runs/quickstart

# One thread a test process: two threads beside another busy process are many times slower than one.
test check: export OMP_NUM_THREADS = 1
# Some tests start processes: without bytecode each would compile the host libraries anew, which takes half a minute.
unexport PYTHONDONTWRITEBYTECODE

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Real hosts, plain and defended, each in an environment of its own under build/hosts (docs/hosts.md).
HOSTS := trl ms_swift axolotl llama_factory
hosts:
	missed=; for host in $(HOSTS); do $(PYTHON) tests/hosts/$$host.py || missed="$$missed $$host"; done; \
	test -z "$$missed" || { echo "missed:$$missed"; exit 1; }

# The site, build/site, of the pages as they lie in the repository: so a link is the same link here and there.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md NOTICE docs results/*.md examples plans src/untrigger/embedded/*/README.md \
	src/untrigger/schemas
docs: $(VENV)/installed-docs
	rm -rf build/pages && mkdir -p build/pages
	tar cf - $(PAGES) | tar xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What a step costs under each defense: minutes.
bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/step_cost.py --json results/step_cost.json

# What the paper compares: runs the cells that results/paper.jsonl lacks, WORKERS at a time; all of them take hours on
# two cores. Give the same command again after a kill.
WORKERS ?= 1
paper: $(VENV)/installed-dev
	$(BIN)/untrigger bench plans/paper.yaml --out results/paper --jobs $(WORKERS)
	$(BIN)/untrigger report results/paper --out results/paper.jsonl
	$(BIN)/untrigger report results/paper.jsonl --out results/paper.json
	$(BIN)/untrigger report results/paper.jsonl --out results/paper.md
	$(BIN)/untrigger report results/paper.jsonl --out runs/paper.html

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[captions]"
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[captions,dev,pandas,ray,report,trl]"
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) runs build dist
