# Every command there is. Variables: DEVICE=cuda13|cuda12|tpu for setup; SUBJECT, RUN, VIDEO, AUDIO, OUT, EXPERIMENT, PRESET, PROCESSES, ARGS.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEVICE ?= cpu
SUBJECT ?= data/subject
RUN ?= runs/subject
PRESET ?= quick
PROCESSES ?= logical
ARGS ?=

.PHONY: setup demo test test-device test-all lint format bench bench-steps doctor preprocess extract train sweep synthesize evaluate view export clean

setup:  ## creates .venv and installs everything; DEVICE adds the accelerator's JAX plugin
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt $(if $(filter-out cpu,$(DEVICE)),"jax[$(DEVICE)]")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/uajax doctor

demo:  ## a procedural person from nothing to a talking video in demo/, on any CPU
	$(BIN)/uajax demo --out demo

test:  ## a process for every core, four at most; PROCESSES=0 runs all in this one
	$(BIN)/python -m pytest -n $(PROCESSES) --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not device and not slow" $(ARGS)

test-device:  ## the kernels and the official code's values on the accelerator at hand
	JAX_PLATFORMS= $(BIN)/python -m pytest -m "device or golden" $(ARGS)

test-all:
	$(BIN)/python -m pytest $(ARGS)

lint:
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format:
	$(BIN)/ruff check --fix .

bench:  ## the splatting kernels, beside gsplat where it is installed
	$(BIN)/python -m kernels.splat.bench $(ARGS)

bench-steps:  ## training steps and drawn frames
	$(BIN)/python -m uajax.train.bench $(ARGS)

doctor:
	$(BIN)/uajax doctor

preprocess:  ## VIDEO=me.mp4 SUBJECT=data/me
	$(BIN)/uajax preprocess $(VIDEO) --out $(SUBJECT) $(ARGS)

extract:
	$(BIN)/uajax extract $(SUBJECT) $(ARGS)

train:  ## SUBJECT=data/me RUN=runs/me PRESET=quick|paper, or EXPERIMENT=experiments/x.py; one of two hosts: ARGS="--batch 2 --coordinator HOST:PORT --processes 2 --process 0"
	$(BIN)/uajax train $(SUBJECT) --workdir $(RUN) $(if $(EXPERIMENT),--experiment $(EXPERIMENT),--preset $(PRESET)) $(ARGS)

sweep:  ## EXPERIMENT=experiments/rates.py SUBJECT="data/me data/you" ARGS="--search optuna --trials 30"; pip install -r requirements-sweep.txt
	$(BIN)/uajax sweep $(EXPERIMENT) $(SUBJECT) $(ARGS)

synthesize:  ## RUN=runs/me AUDIO=speech.wav OUT=talk.mp4
	$(BIN)/uajax synthesize $(RUN) --audio $(AUDIO) --out $(OUT) $(ARGS)

evaluate:
	$(BIN)/uajax evaluate $(RUN) $(ARGS)

view:  ## RUN=runs/me ARGS="--audio speech.wav"; pip install -r requirements-view.txt
	$(BIN)/uajax view $(RUN) $(ARGS)

export:  ## RUN=runs/me OUT=me.npz ARGS="--format npz"
	$(BIN)/uajax export $(RUN) --out $(OUT) $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
