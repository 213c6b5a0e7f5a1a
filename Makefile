# Each target makes its environment, .venv, itself when it is missing; plain `make` lists the targets.
MIN     := $(shell sed -n 's/^min_python *= *//p' settings.ini)
PYTHON  ?= python3 python3.13 python3.12 python3.11
# Which pair of torch and torchvision: the tested one of constraints.txt, or with TORCH=oldest the least that settings.ini allows
TORCH   ?= tested
VENV    := $(if $(filter oldest,$(TORCH)),.venv-oldest,.venv)
PAIR    := $(if $(filter oldest,$(TORCH)),$(VENV)/oldest.txt,constraints.txt)
BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PAIR) --editable
RUN     := $(VENV)/.installed
LITE    := $(VENV)/.installed-lite
DEV     := $(VENV)/.installed-dev
FAILED  := { echo "pip could not install it, for the reason above. It needs a network, or an index that it reaches: PIP_INDEX_URL"; \
	echo "or PIP_FIND_LINKS. The next make tries again."; exit 1; }
DECLARE := settings.ini setup.py pyproject.toml $(PAIR)
QUARTO  := 1.6.42

.PHONY: help demo test docs playground export readme bench lab clean quarto quarto-version
.DELETE_ON_ERROR:
$(if $(filter-out tested oldest,$(TORCH)),$(error TORCH is `tested` or `oldest`, not `$(TORCH)`))

help:
	@echo "make demo     install what running needs; first detections at once, then minutes of learning: a page in demo/"
	@echo "              DATA=folder: on your own images; DEMO='--minutes 2': options"
	@echo "make test     install the dev extra, then everything that CI checks; TORCH=oldest: with the oldest torch"
	@echo "make export   notebooks -> deqdet/*.py and README.md, and clean the notebooks"
	@echo "make docs     the documentation site into _docs/ (needs Quarto)"
	@echo "make playground   the files of the page on which a detector runs in the browser, minutes (needs npm)"
	@echo "make bench    how fast it is, a quarter of an hour on two cores: JSON into bench/"
	@echo "make lab      JupyterLab on the notebooks"
	@echo "make clean    remove what the other targets wrote, environments and training runs excepted"

# The interpreter: the first of $(PYTHON) that is new enough.
$(BIN)/python:
	@[ -w . ] || { echo "$(CURDIR) cannot be written to, and $(VENV) goes there: copy the folder, and run make in the copy."; exit 1; }
	@for p in $(PYTHON); do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN)".split("."))))' 2>/dev/null; \
	  then echo "Making $(VENV) with $$($$p --version)"; $$p -m venv $(VENV) && exit; \
	    rm -rf $(VENV); echo "$$p could not make it: its venv module (python3-venv on Debian and Ubuntu) is needed."; exit 1; fi; \
	done; \
	echo "deqdet needs Python $(MIN) or newer; none of these is: $(PYTHON)."; \
	echo "Install one, or name it: make PYTHON=/path/to/python3 ..."; exit 1

.venv-oldest/oldest.txt: settings.ini | $(BIN)/python
	@sed -n 's/^requirements.*torch>=\([0-9.]*\) torchvision>=\([0-9.]*\).*/torch==\1 torchvision==\2/p' settings.ini | tr ' ' '\n' > $@

$(RUN): $(DECLARE) | $(BIN)/python
	@echo "Installing deqdet and what it runs on (a few minutes and about 6 GB the first time)"
	@$(INSTALL) . || $(FAILED)
	@touch $@

$(LITE): $(DECLARE) | $(BIN)/python
	@echo "Installing deqdet, what it runs on, and weights of a small network (a few minutes and about 6 GB the first time)"
	@$(INSTALL) '.[lite]' || $(FAILED)
	@touch $(RUN) $@

$(DEV): $(DECLARE) | $(BIN)/python
	@echo "Installing deqdet with its dev extra (a few minutes and about 6 GB the first time)"
	@$(INSTALL) '.[dev]' || $(FAILED)
	@touch $(RUN) $(LITE) $@

# The main job; `make demo DATA=folder` does it on your own images; options as in `make demo DEMO='--minutes 2'`
demo: $(LITE)
	@$(BIN)/deqdet_demo --out demo $(if $(DATA),--data '$(DATA)') $(DEMO)

test: $(DEV)
	@$(BIN)/python tests/run.py

export: $(DEV)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tests/readme.py

readme: $(DEV)
	$(BIN)/python tests/readme.py

# README.md is written first, so that nbdev-docs finds it newer than index.ipynb and leaves it alone.
docs: quarto $(DEV)
	-$(BIN)/python -W ignore benchmarks/playground.py nbs/playground
	$(BIN)/nbdev-export
	$(BIN)/python tests/readme.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-docs
	@echo "The site is in _docs/: open _docs/index.html"

# What the page "Playground" loads: a detector in three parts, and the runtime of the browser, by npm. It writes what is missing.
playground: $(DEV)
	@$(BIN)/python -W ignore benchmarks/playground.py nbs/playground

quarto:
	@command -v quarto >/dev/null || { \
	  echo "Quarto is not installed, and 'make docs' needs it. Get version $(QUARTO) from https://quarto.org/docs/download/"; \
	  echo "and run 'make docs' again. 'make test' checks the input of the docs without it."; exit 1; }

quarto-version:
	@echo $(QUARTO)

# What measures speed; the other scripts there train for hours. BENCH="step train" runs two of them.
BENCH := step train inference growth solver sqr loader evaluate
bench: $(RUN)
	@for f in $(BENCH); do $(BIN)/python -W ignore benchmarks/$$f.py --threads 2 --out bench/$$f.json || exit 1; done

# Options as in `make lab LAB=--no-browser`
lab: $(DEV)
	$(BIN)/jupyter lab --notebook-dir=nbs $(LAB)

clean:
	rm -rf _proc _docs demo bench build dist *.egg-info .pytest_cache nbs/nbdev.yml
	rm -f $(foreach o,onnx json png wasm mjs,nbs/playground/*.$(o))
	find nbs deqdet tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
