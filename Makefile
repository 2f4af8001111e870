# Every target sets itself up: a fresh Linux machine with Python >= 3.11, git and make is enough.
# with PYTHON=the interpreter to make .venv from, PIP_ARGS=handed to pip install, ARGS=handed to demo.py, pytest, tune or race.py

PYTHON ?=
PIP_ARGS ?=
ARGS ?=
export PYTHON PIP_ARGS
.DEFAULT_GOAL := help
.PHONY: help demo test check tune bench compiled sanitize wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile
	@sed -n '2s/^# /  /p' Makefile

demo: ## the main job: backends by name, laws against a planted bug, preflight of a real model (2 minutes after set-up)
	@tools/setup test
	.venv/bin/python examples/demo.py $(ARGS)

test: ## every test; on a machine with a GPU, on the GPU too
	@tools/setup test
	.venv/bin/python -m pytest -q -n auto --dist worksteal $(ARGS)

check: ## every guard that reads the source: style, types, layers, spelling
	@tools/setup dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	PYTHONPATH=.namespace .venv/bin/lint-imports
	.venv/bin/codespell

tune: ## measure which launch parameters are fastest on this machine's GPU, once; launches look them up (about 5 minutes)
	@tools/setup test
	.venv/bin/longspan tune $(ARGS)

bench: ## race the kernels beside installed peers on this machine's GPU, draw the results, write README and docs/benchmarks.md
	@tools/setup test
	.venv/bin/python benchmarks/race.py $(ARGS)
	.venv/bin/python benchmarks/plots.py

compiled: ## compile the kernels for every GPU that they are for, without one, and write docs/compiled.md
	@tools/setup test
	.venv/bin/python tools/compiled

sanitize: ## every kernel under compute-sanitizer, on a machine with a GPU and the CUDA toolkit
	@tools/setup test
	.venv/bin/python tools/sanitize

wheel: ## an sdist and, from it, a wheel, in dist/
	@tools/setup dev
	rm -rf dist
	.venv/bin/python -m build --no-isolation
	.venv/bin/check-wheel-contents --toplevel longspan dist/*.whl

clean: ## remove what the other targets made
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
