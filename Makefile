# Commands of the workspace. Each first creates the environment if it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-newest test-random lab docs papers check format bench export figures hooks clean-env help

help:                    ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

demo: $(READY)           ## a small fingerprint experiment with its result table and figures
	$(BIN)/gcode_ml run fingerprint --name demo --replace --config nbs/experiments/fingerprint.demo.yaml

test: $(READY)           ## export in sync, notebooks clean, every notebook and every test executed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-newest: ## tests that need torchvision and timm, with the newest PyTorch, in a separate environment (several GB)
	$(PYTHON) -m venv .venv-newest
	grep -vE '^(torch|torchvision)==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check torch torchvision
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-newest/constraints.txt -e '.[vision,export]' pytest psutil
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest tests/newest

lab: $(READY)            ## JupyterLab; notebooks are cleaned when they are saved
	$(BIN)/jupyter lab --config=.jupyter/jupyter_server_config.py --LabApp.default_url=/lab/tree/nbs

docs: $(READY)           ## the site, in _docs
	$(BIN)/python nbs/_site.py

papers: $(READY)         ## every paper as HTML and PDF in _papers, its numbers computed from papers/*/results
	$(BIN)/gcode_ml paper

check: $(READY)          ## quick checks: format and lint, export, clean notebooks, import rules, style
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_sync.py tests/test_imports.py tests/test_style.py

bench: $(READY)          ## benchmarks against alternatives, in bench/results.json; on an idle machine
	OMP_NUM_THREADS=1 $(BIN)/python -m bench

export: $(READY)         ## after editing notebooks: export the package and clean the notebooks
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean && for n in papers/*/paper.ipynb; do $(BIN)/nbdev-clean --fname $$n; done

figures: $(READY)        ## execute the pages in a kernel and keep their outputs for the site
	for n in $$(git ls-files 'nbs/*.ipynb' | grep -v /experiments/); do GCODE_ML_DATA= OMP_NUM_THREADS=1 $(BIN)/jupyter execute --inplace $$n || exit 1; done; $(BIN)/nbdev-clean

format: $(READY)         ## ruff formats and fixes what it can
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format .

test-random: $(READY)    ## the whole suite in random order, N times (5)
	for i in $$(seq $(or $(N),5)); do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --random-order || exit 1; done

hooks: $(READY)          ## nbdev's merge and diff drivers, git blame without mechanical commits, ruff before each commit
	git config --local blame.ignoreRevsFile .git-blame-ignore-revs
	$(BIN)/pre-commit install
	git config --local include.path ../.gitconfig
	git config --local merge.jupyternotebook.driver '$(BIN)/nbdev-merge %O %A %B %P'
	git config --local diff.jupyternotebook.command $(BIN)/nbdev-diff-driver

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' || { echo "gcode_ml needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean-env:               ## remove the environment
	rm -rf $(VENV)
