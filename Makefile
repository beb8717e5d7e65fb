# Every target sets up what it needs: .venv with the package, its dependencies and the tools.
PYTHON ?= python3
BIN := .venv/bin
# two threads of arithmetic: more processes than cores make torch wait for itself
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow faults bench gpu-check gpu-full docs lint format release-check clean

help:  ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## make .venv and install the package into it

# torch and torchvision are resolved in one call, so that they fit each other
.venv/ready: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bioprop needs Python 3.11 or newer: $(PYTHON) is older; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/ready  ## train BP, DTP and L-DRL on real digits and compare them (a minute on 2 cores)
	rm -rf runs/demo
	$(BIN)/bioprop compare --algorithms backprop,dtp,ldrl --network lenet --data digits --seeds 1 --folder runs/demo

test: .venv/ready  ## run the tests
	$(BIN)/python -m pytest -n auto

test-slow: .venv/ready  ## run the tests that take minutes
	$(BIN)/python -m pytest -n auto -m slow

faults: .venv/ready  ## plant faults in a copy of the source and count those that the tests catch (some ten minutes)
	$(BIN)/python -m tests.planted_faults

bench: .venv/ready  ## compare the speed of L-DRL's closed forms with plain autograd and BP (some ten minutes on 2 cores)
	$(BIN)/python -m benchmarks.bench

gpu-check: .venv/ready  ## check and measure on a GPU all that needs one (under four minutes)
	$(BIN)/python -m benchmarks.gpu_check

# IMAGES is a folder of images in the form of CIFAR-10, with train/<class>/ and test/<class>/
IMAGES ?= data/cifar10
gpu-full: .venv/ready  ## compare BP and L-DRL on a GPU: SimpleVGG, 90 epochs, 3 seeds (IMAGES=folder of images)
	$(BIN)/bioprop compare --algorithms backprop,ldrl --network simplevgg --data imagefolder --seeds 3 --epochs 90 \
		--parallel 6 --folder runs/gpu-full -- --data.data_dir $(IMAGES) --data.horizontal_flip true \
		--data.crop_padding 4 --trainer.accelerator gpu

docs: .venv/ready-for-docs  ## build the documentation into build/docs; opens in a browser as build/docs/index.html
	$(BIN)/python -m sphinx -W --keep-going --jobs auto docs build/docs

.venv/ready-for-docs: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

lint: .venv/ready  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready  ## put the code into its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

RELEASE := build/release
release-check: export PYTHONPATH :=
release-check:  ## build sdist and wheel, install the wheel into a fresh environment, compare from an empty folder
	rm -rf $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/venv
	$(RELEASE)/venv/bin/python -m pip install --quiet --disable-pip-version-check build
	$(RELEASE)/venv/bin/python -m build --outdir $(RELEASE)/dist .
	$(RELEASE)/venv/bin/python -m pip install --quiet --disable-pip-version-check $(RELEASE)/dist/*.whl
	mkdir $(RELEASE)/empty
	cd $(RELEASE)/empty && ../venv/bin/bioprop --version && \
		../venv/bin/bioprop compare --network lenet --data digits --seeds 1 --epochs 2 && \
		../venv/bin/bioprop check --model LDRL --model.network LeNet

clean:  ## remove .venv and caches (not runs/)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build src/*.egg-info
