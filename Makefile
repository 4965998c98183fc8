# make train EPOCHS=300, make test: they set up all they need. PYTHON=python3 uses an environment of your own.
EPOCHS ?=
DATA ?= auto
RUN ?= runs/pegasus
SEED ?=
ARGS ?=
OUT ?= pegasus.png

VENV := .venv
ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
# made anew where its Python is gone, or another one than it was made for
HAS_TORCH = import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))
ifneq ($(wildcard $(READY)),)
ifneq ($(shell $(PYTHON) -c '$(HAS_TORCH)' 2> /dev/null && echo yes),yes)
$(shell rm -f $(READY))
endif
endif
endif

# where EPOCHS and SEED are not given, a run that is there keeps its own
TRAIN = "$(PYTHON)" train.py --resume --data "$(DATA)" $(if $(EPOCHS),--epochs "$(EPOCHS)") $(if $(SEED),--seed "$(SEED)")

FUZZ ?= 100000
KILLS ?= 30
FLIPS ?= 200

.PHONY: help build train paper sample demo evaluate study test faults fuzz soak lint sanitize cuda-check package-check arm-check clean distclean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14
	@echo "variables: EPOCHS=$(or $(EPOCHS),300) DATA=$(DATA) RUN=$(RUN) SEED=$(or $(SEED),0) OUT=$(OUT) ARGS= PYTHON="

$(VENV)/.ready: requirements.txt requirements-dev.txt
	@echo "torch and other packages are installed into $(VENV): a minute or more"
	python3 -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

build: $(READY)  ## virtual environment, packages and extensions
	@"$(PYTHON)" setup.py -q build_ext --inplace

train: build  ## train in RUN, or go on with the run there
	$(TRAIN) --run "$(RUN)" $(ARGS)

ifeq ($(origin RUN),file)
paper: RUN = runs/paper
endif
paper: build  ## the paper in one command: its recipe in runs/paper, its figures, the best picture, P(x)
	$(TRAIN) --run "$(RUN)" --arch mlp --likelihood mse --latent 128 --schedule constant --lr 1e-3 \
	  --batch-size 128 --beta 1 --no-flip --no-center $(ARGS)
	@"$(PYTHON)" -m pegasus.paper "$(RUN)"

CHECKPOINT = $(RUN)/last.pt
ifeq ($(origin RUN),file)  # before there is a run: the checkpoint that comes along
CHECKPOINT = $(if $(shell test -e "$(RUN)/last.pt" && echo yes),$(RUN)/last.pt,pegasus.pt)
endif
# drawing is quick without the extension: none is built for it
DRAW = "$(PYTHON)" sample.py "$(CHECKPOINT)"
sample: $(READY)  ## draw a sheet from the run in RUN, by default from pegasus.pt before there is one, to OUT
	$(DRAW) "$(OUT)" $(ARGS)

# pegasus.pt alone decides what these pictures are
demo: CHECKPOINT = pegasus.pt
demo: $(READY)  ## draw a sheet, the best eight, white ones and a walk from pegasus.pt, to demo/
	@mkdir -p demo
	$(DRAW) demo/pegasus.png
	$(DRAW) demo/best.png --best 8
	$(DRAW) demo/white.png --coat white
	$(DRAW) demo/walk.gif --mode walk

evaluate: build  ## how probable the run in RUN finds photographs, how its pictures compare with them
	"$(PYTHON)" -m pegasus.evaluate "$(RUN)/last.pt" $(ARGS)

study: build  ## the paper's model and each piece, three runs each, into docs/study.md: hours; resumes
	"$(PYTHON)" -m pegasus.study --data "$(DATA)" $(ARGS)

test: build  ## all tests, on up to four cores
	"$(PYTHON)" tests/run.py

faults: build  ## 30 kills, 200 flipped bytes, full disks, bad servers: the long form of what `make test` does in short
	KILLS=$(KILLS) FLIPS=$(FLIPS) "$(PYTHON)" -m pytest -rP tests/test_faults.py tests/test_damage.py \
	  tests/test_guard.py tests/test_download.py

fuzz: build  ## 100,000 inputs each for batches, checkpoints, their pickles and command lines; installs atheris
	"$(PYTHON)" -m pip install --quiet --disable-pip-version-check -r requirements-fuzz.txt
	for target in batch checkpoint pickle command; do \
	  "$(PYTHON)" tests/fuzz.py $$target -runs=$(FUZZ) -verbosity=0 -print_final_stats=1 || exit 1; done

soak: build  ## 2,000 epochs on 500 pictures: memory and open files stay what they were
	"$(PYTHON)" tests/soak.py

lint: build  ## ruff
	"$(PYTHON)" -m ruff check .

# Tests of both extensions, built under ASan + UBSan, then the CUDA source, verbatim, on the CPU. The tests run on copies
# in a folder of their own, so that no other build can be the one that is imported. Leaks are the interpreter's own and
# not looked for. ThreadSanitizer finds a missing barrier of the CUDA source.
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
sanitize: build  ## the kernels, and the op's CUDA source on the CPU, under ASan and UBSan
	mkdir -p build/sanitize
	rm -rf build/sanitize/csrc build/sanitize/tests build/sanitize/pegasus
	cp -r *.py csrc pegasus tests build/sanitize
	python=$$(command -v "$(PYTHON)"); python=$$(cd $$(dirname "$$python") && pwd)/$$(basename "$$python"); \
	cd build/sanitize && \
	PEGASUS_FLAGS="$(SANITIZE)" PEGASUS_CUDA=0 "$$python" setup.py -q build_ext --inplace && \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  "$$python" -m pytest -q -c /dev/null --rootdir=. -p no:cacheprovider \
	  tests/test_op.py tests/test_reparam.py tests/test_accelerate.py tests/test_refusals.py tests/test_bits.py
	tests/cuda_on_cpu/run.sh address,undefined build/cuda_on_cpu
	tests/cuda_on_cpu/run.sh thread build/cuda_on_cpu_threads

cuda-check: build  ## the CUDA source compiles for every architecture, and no kernel spills
	"$(PYTHON)" tests/cuda_check.py

package-check:  ## the op, packed and installed elsewhere, passes its tests
	tests/package.sh

arm-check:  ## the op and the step's kernels give the same bits on a 64-bit ARM, under qemu
	tests/aarch64/run.sh build/aarch64

clean:  ## remove what a build leaves
	rm -rf build *.egg-info *.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean  ## also the virtual environment; runs and data stay
	rm -rf $(VENV)
