# The project's errands. `make quickstart` and `make test` do their own set-up: nothing has to be installed before them.

# For `make gpu` on a host without network, where no .venv can be made.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

# Processes that share the tests, each with one thread: a test seldom keeps two cores busy.
WORKERS ?= 2

.PHONY: help setup quickstart test soak check format gpu bench bench-step bench-loss bench-update bench-profile bench-loaders \
	bench-convert
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   set up, then train and judge a small model on real images, on whatever this machine has"
	@echo "make test         set up, then run all tests"
	@echo "make soak         kill a run of two processes 1,000 times, or for two hours, and compare it with an undisturbed one"
	@echo "make check        set up, then lint, formatting, types, architecture"
	@echo "make format       set up, then rewrite the code in the house's format"
	@echo "make gpu IMAGES=FOLDER   the tests that need a GPU, then the benchmarks, with PYTHON ($(PYTHON)) as it is"
	@echo "make bench        time the parts of the quickstart's step, on its data, with PYTHON as it is"
	@echo "make bench-step   our step beside a plain port of the authors' and beside the networks alone"
	@echo "make bench-loss   the relational loss, fused and in pieces, beside its definition"
	@echo "make bench-update optimizer and teacher's update beside what moving their bytes takes"
	@echo "make bench-profile IMAGES=FOLDER   profiles of a ResNet-50 at 224 pixels, its images from FFCV, DALI and memory"
	@echo "make bench-loaders IMAGES=FOLDER   what our loaders cost beside others', on a folder of images or a .tar of one"
	@echo "make bench-convert IMAGES=FOLDER   what our conversions cost beside tar, decoding and FFCV's writer, likewise"
	@echo "make setup        only the set-up: .venv with PYTHON, if given, or a Python 3.12 or 3.11 that is found"

setup:
	@bash tools/setup.sh

quickstart: setup
	@.venv/bin/python launch.py quickstart

test: setup
	@.venv/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

soak:
	@PYTHONPATH=. $(PYTHON) tests/soak.py $(OPTIONS)

check: setup
	@.venv/bin/python -m ruff check --quiet .
	@.venv/bin/python -m ruff format --check --quiet . || { echo "not in the house's format; type: make format"; exit 1; }
	@.venv/bin/python -m mypy --no-error-summary
	@.venv/bin/python -m pytest -q tests/test_architecture.py

format: setup
	@.venv/bin/python -m ruff check --fix --quiet .
	@.venv/bin/python -m ruff format .

# pytest ends with 5 when it selects no test
gpu:
	@$(PYTHON) -m pytest -q -rs -m gpu || { code=$$?; \
		[ $$code -ne 5 ] || echo "make gpu: no test in tests/ is marked gpu, so nothing was run"; exit $$code; }
	@if [ -d runs/quickstart/data ]; then $(MAKE) --no-print-directory bench; \
		else echo "make gpu: no benchmark of the quickstart without its data: make quickstart makes it"; fi
	@$(MAKE) --no-print-directory bench-loss bench-update bench-step
	@if [ -d "$(IMAGES)" ]; then $(MAKE) --no-print-directory bench-profile; \
		else echo "make gpu: no profiles without a folder of images: make gpu IMAGES=FOLDER"; fi
	@if [ -n "$(IMAGES)" ]; then $(MAKE) --no-print-directory bench-loaders; \
		else echo "make gpu: no benchmark of the loaders without images: make gpu IMAGES=FOLDER, or a .tar of one"; fi

bench:
	@$(PYTHON) -m tools.bench configs/quickstart.yaml --out runs/bench

bench-step:
	@$(PYTHON) -m tools.bench_step --out runs/bench $(OPTIONS)

bench-loss:
	@$(PYTHON) -m tools.bench_loss --out runs/bench $(OPTIONS)

bench-update:
	@$(PYTHON) -m tools.bench_update configs/imagenet_resnet50_200ep_paper.yaml --out runs/bench $(OPTIONS)

# Each image is listed COPIES times, so that a small sample makes epochs of a length at which a loader runs evenly.
COPIES ?= 25
WITH = optim.batch_size=256 optim.warmup_epochs=0 $(OPTIONS) --out runs/bench/profile
SHARDS = runs/bench/profile/shards
BETON = runs/bench/profile/ffcv/train.beton
bench-profile:
	@[ -d "$(IMAGES)" ] || { echo "make bench-profile: say which images: make bench-profile IMAGES=FOLDER"; exit 2; }
	@rm -rf runs/bench/profile && mkdir -p runs/bench/profile/files
	@for i in $$(seq $(COPIES)); do cp -rs "$(abspath $(IMAGES))" runs/bench/profile/files/$$i || exit; done
	@$(PYTHON) launch.py convert runs/bench/profile/files runs/bench/profile/ffcv --to ffcv --max-side 500
	@$(PYTHON) launch.py convert runs/bench/profile/files $(SHARDS) --to webdataset
	@$(PYTHON) launch.py profile configs/imagenet_resnet50_200ep_fast.yaml "data.source={name: ffcv, train: $(BETON)}" $(WITH)-ffcv
	@$(PYTHON) launch.py profile configs/imagenet_resnet50_200ep_fast.yaml "data.source={name: dali, train: $(SHARDS)/train}" $(WITH)-dali
	@$(PYTHON) launch.py profile configs/imagenet_resnet50_200ep_fast.yaml "data.source={name: resident, train: $(BETON)}" $(WITH)-resident

bench-loaders:
	@[ -n "$(IMAGES)" ] || { echo "make bench-loaders: say which images: make bench-loaders IMAGES=FOLDER, or a .tar of one"; exit 2; }
	@$(PYTHON) -m tools.bench_loaders "$(IMAGES)" $(OPTIONS)

bench-convert:
	@[ -n "$(IMAGES)" ] || { echo "make bench-convert: say which images: make bench-convert IMAGES=FOLDER, or a .tar of one"; exit 2; }
	@$(PYTHON) -m tools.bench_convert "$(IMAGES)" $(OPTIONS)
