# The commands of the README, `make demo` and `make test`, on a machine with nothing prepared.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-browser docs lint clean

demo: .venv/base
	$(BIN)/raekit demo

test: .venv/test
	$(BIN)/python -m pytest

# Needs Chromium (on Debian: apt-get install chromium), or installs its own.
test-browser: .venv-app/ready
	.venv-app/bin/python -m pytest -m browser

# The site, in build/site. A warning is an error.
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "raekit needs Python 3.11 or newer: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Gradio does not accept Pillow 13 yet, so the page has an environment of its own.
.venv-app/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-app
	grep -v '^pillow==' constraints.txt > .venv-app/constraints.txt
	.venv-app/bin/python -m pip install --quiet --constraint .venv-app/constraints.txt --editable '.[app,browser,test]'
	command -v chromium || .venv-app/bin/python -m playwright install chromium
	touch $@

# The API reference is read from the source without importing it, so this environment needs no torch.
.venv-docs/ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-app .venv-docs build dist
