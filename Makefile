PYTHON ?= python
LINKED = rewards datamodules lightning_modules callbacks configs
QUIET_CPU = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: help dev links lint format typecheck test slow parity floor smoke clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 12

dev:  ## install the package editable, with the tools
	$(PYTHON) -m pip install -e '.[dev]'

links:  ## .typing/vidreason: the package as one tree of links, for tools that cannot follow an editable install
	@mkdir -p .typing/vidreason
	@for name in $(LINKED); do ln -sfn ../../$$name .typing/vidreason/$$name; done
	@for path in src/vidreason/*; do ln -sfn ../../$$path .typing/vidreason/$$(basename $$path); done

lint: links  ## style and the direction of imports
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .
	PYTHONPATH=.typing lint-imports

format:  ## rewrite files in the house style
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

typecheck: links  ## mypy --strict
	$(PYTHON) -m mypy --strict -p vidreason -p tools

test:  ## the fast tier: no network, no GPU
	$(QUIET_CPU) $(PYTHON) -m pytest

slow:  ## what takes longer than that
	$(QUIET_CPU) $(PYTHON) -m pytest -n 0 -m slow  # many start two processes of their own

parity:  ## log-probabilities against vLLM (VIDREASON_VLLM_PYTHON names its Python: tests/parity/make_environment.sh)
	$(QUIET_CPU) $(PYTHON) -m pytest -n 0 -s -m slow tests/parity

floor: links  ## the contract of all model families with the oldest transformers that setup.cfg allows
	$(PYTHON) -m pip install --quiet --no-deps --target build/floor "transformers==$$(sed -n 's/^ *transformers>=\([0-9.]*\).*/\1/p' setup.cfg)"
	PYTHONPATH=build/floor:.typing $(QUIET_CPU) $(PYTHON) -m pytest -n 0 -m "not gpu" -k "not Gemma4" tests/lightning_modules/vlms/test_contract.py

smoke:  ## the whole main job, small
	$(PYTHON) -m vidreason demo --quick --run_dir runs/smoke

clean:  ## what tools leave behind
	rm -rf build dist *.egg-info .typing .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
