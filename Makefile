# `make reproduce` makes every number of the README; `make test` checks the code. Both make .venv.
PYTHON ?= python3
SCALE ?= mini
JOBS ?= 2
INTO ?= $(SCALE)
NEEDED := Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
RESULTS := results/$(SCALE)
SNAKEMAKE := $(BIN)/snakemake $(if $(filter mini,$(SCALE)),,--configfile workflow/config/$(SCALE).yaml)

# Snakemake and the hub keep caches in the home folder; some machines have none to write in
CACHE := $${XDG_CACHE_HOME:-$$HOME/.cache}
ifneq ($(shell mkdir -p "$(CACHE)" 2> /dev/null && test -w "$(CACHE)" && echo yes),yes)
export XDG_CACHE_HOME := $(CURDIR)/.snakemake/cache
endif

.PHONY: help reproduce data report test test-all campaign gpu-check hosts docs lint schemas lock check reference clean
.DELETE_ON_ERROR:

help:
	@echo "make reproduce   data, training, evaluation, tables, figures, page, report (SCALE=mini, smoke)"
	@echo "make data        only the prepared data"
	@echo "make report      the HTML report of the results that are there"
	@echo "make test        the everyday tests; make test-all: the slow ones too (JOBS=2 side by side)"
	@echo "make campaign    kills, full disks, broken files, ...: what the pipeline survives (40 minutes)"
	@echo "make gpu-check   on a machine with a GPU: its tests, 7B steps, a smoke run; results to commit"
	@echo "make hosts       the library with other releases of transformers, and in others' programs"
	@echo "make docs        the documentation as a site, in site/; no internet needed"
	@echo "make lint        style of Python and Snakemake files"
	@echo "make schemas     JSON schemas of scales and ablations, for editors"
	@echo "make lock        requirements.lock and envs/sts.yaml from what .venv has now"
	@echo "make check       the results held against results/reference/INTO, with a verdict"
	@echo "make reference   the results as results/reference/INTO (the scale's name), small files only"
	@echo "make clean       forget results and prepared data of the scale"

reproduce: .venv/made-from-lock
	$(SNAKEMAKE) --cores all
	@$(MAKE) --no-print-directory report
	@$(BIN)/python -m sts summary --results $(RESULTS)

data: .venv/made-from-lock
	$(SNAKEMAKE) --cores all data

report: .venv/made-from-lock
	$(SNAKEMAKE) --report $(RESULTS)/report.html

test: .venv/made-from-lock
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

test-all: .venv/made-from-lock
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

campaign: .venv/made-from-lock
	$(BIN)/python tests/campaign.py $(ARGS)

gpu-check: .venv/made-from-lock
	$(BIN)/python -m workflow.gpu_check $(ARGS)

hosts: .venv/made-from-lock
	$(BIN)/python -m workflow.hosts $(ARGS)

docs: .venv/made-from-lock
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "read it: $(BIN)/python -m http.server --directory site (the search needs a server)"

lint: .venv/made-from-lock
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check --compact-diff Snakefile workflow
	$(BIN)/snakemake --lint

schemas: .venv/made-from-lock
	$(BIN)/python -m sts.pipeline.config.schemas

.venv/made-from-lock: requirements.lock requirements.hashes
	@command -v $(firstword $(PYTHON)) > /dev/null || { echo "$(PYTHON) was not found; $(NEEDED)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); $(NEEDED)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) has no venv or pip: install them (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install $$(grep '^torch==' requirements.lock)
	$(PIP) install --require-hashes --no-deps -r requirements.hashes
	@touch $@

lock:
	@sed -n '/^#/p' requirements.lock > requirements.part
	$(BIN)/python -m pip freeze --all | sed 's/+cpu$$//' | grep -vE '^(pip|wheel)==' | LC_ALL=C sort -f >> requirements.part
	@mv requirements.part requirements.lock
	@$(PYTHON) -m venv .venv/uv
	@.venv/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	@grep -v -e '^#' -e '^torch==' requirements.lock > requirements.in
	@{ echo '# requirements.lock without torch, which has two builds of a version, with hashes. Made by `make lock`.'; \
	  .venv/uv/bin/uv pip compile --quiet --no-deps --generate-hashes --no-annotate --no-header \
	    --universal requirements.in; } > requirements.part
	@rm requirements.in
	@mv requirements.part requirements.hashes
	@touch .venv/made-from-lock
	@$(MAKE) --no-print-directory envs/sts.yaml

envs/sts.yaml: requirements.lock
	@{ sed '/pip:$$/q' $@; sed -n 's/^[^#]/      - &/p' requirements.lock; } > $@.part
	@mv $@.part $@

# The name of the machine, and the seal over it, are no part of a committed file.
define WITHOUT_HOST
import json, pathlib, sys
for file in map(pathlib.Path, sys.argv[1:]):
    facts = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("host", "seal")}
    file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
endef
export WITHOUT_HOST

check: .venv/made-from-lock
	$(BIN)/python -m sts check --results $(RESULTS) --reference results/reference/$(INTO)

reference:
	rm -rf results/reference/$(INTO)
	mkdir -p results/reference/$(INTO)
	cd $(RESULTS) && find $$(ls -d tables figures bench runs configs tokens.json 2> /dev/null) -type f \
	  -not -name '*.html' \( -not -path 'runs/*' -o -regex 'runs/[^/]*/[^/]*/[^/]*\.json' \
	    -o -path 'runs/*/eval/provenance.json' \) \
	  -exec cp --parents -t ../reference/$(INTO) {} +
	find results/reference/$(INTO) -name provenance.json -exec $(PYTHON) -c "$$WITHOUT_HOST" {} +

clean:
	rm -rf $(RESULTS) data/$(SCALE)
