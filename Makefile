# Everything from a fresh clone: each target sets up .venv first, and does nothing that is already done.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint unit notebooks book lab clean .venv

demo: .venv
	$(BIN)/sipit-lite demo

test: lint unit notebooks book

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# Two processes of one thread each: small models gain little from threads, and share caches badly.
unit: .venv
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

notebooks: .venv
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o addopts= --nbval --nbval-current-env -n 2 --dist loadscope book

book: .venv
	$(BIN)/jupyter-book build book --config _config.yml --path-output . -W -n --keep-going
	for page in book/*.ipynb book/*.md; do test -s _build/html/$$(basename $${page%.*}).html || exit 1; done

lab: .venv
	$(BIN)/jupyter lab book

clean:
	rm -rf _build build *.egg-info .pytest_cache .ruff_cache .hypothesis sipit-lite-demo.png

.venv: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@
