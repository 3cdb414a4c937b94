# make setup [DETECTRON2=source] | demo [DEMO_ARGS="--axis seed=0,1,2"] | test [TEST_ARGS=...] | lint | format
PYTHON ?= python3
DETECTRON2 ?= wheel
VENV_PYTHON := .venv/bin/python

.PHONY: setup demo test lint format

setup:
	@$(PYTHON) tools/setup_environment.py --detectron2 $(DETECTRON2)

demo: setup
	@$(VENV_PYTHON) -m wsl_d2 demo $(DEMO_ARGS)

test: setup
	$(VENV_PYTHON) -m pytest $(TEST_ARGS)

lint: setup
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy wsl_d2

format: setup
	$(VENV_PYTHON) -m ruff format .
	$(VENV_PYTHON) -m ruff check --fix .
