# make train EPOCHS=300, make test: they set up all they need. PYTHON=python3 uses an environment of your own.
EPOCHS ?= 300
DATA ?= auto
RUN ?= runs/pegasus
SEED ?= 0
ARGS ?=
OUT ?= pegasus.png

VENV := .venv
ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

TRAIN = $(PYTHON) train.py --resume --data $(DATA) --epochs $(EPOCHS) --seed $(SEED)

.PHONY: help build train paper sample test lint clean distclean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14
	@echo "variables: EPOCHS=$(EPOCHS) DATA=$(DATA) RUN=$(RUN) SEED=$(SEED) OUT=$(OUT) ARGS= PYTHON="

$(VENV)/.ready: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

build: $(READY)  ## virtual environment, packages and extension

train: build  ## train in RUN, or go on with the run there
	$(TRAIN) --run $(RUN) $(ARGS)

paper: RUN = runs/paper
paper: build  ## the paper's recipe, exactly, in runs/paper
	$(TRAIN) --run $(RUN) --arch mlp --likelihood mse --latent 128 --schedule constant --lr 1e-3 \
	  --batch-size 128 --beta 1 --no-flip $(ARGS)

sample: build  ## draw a sheet from the run in RUN to OUT
	$(PYTHON) sample.py $(RUN)/last.pt $(OUT) $(ARGS)

test: build  ## all tests
	$(PYTHON) -m pytest

lint: build  ## ruff
	$(PYTHON) -m ruff check .

clean:  ## what a build leaves
	rm -rf build *.egg-info *.so .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__

distclean: clean  ## also the virtual environment; runs and data stay
	rm -rf $(VENV)
