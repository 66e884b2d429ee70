# Everything from a fresh clone: each target sets up .venv first, and does nothing that is already done.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1
export CHROMIUM ?= chromium

.PHONY: demo test lint unit notebooks book site browser lab clean .venv

demo: .venv
	$(BIN)/sipit-lite demo

test: browser lint unit notebooks site

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

# The pages and the printed book in a browser of the system.
site: browser book
	$(BIN)/jupyter-book build book --config _config.yml --path-output . --builder custom --custom-builder singlehtml -W -n --keep-going
	$(BIN)/python -m pytest -o addopts= -n 2 --dist loadfile tests/site

# Asked first, since it would be missed last.
browser:
	@command -v "$(CHROMIUM)" > /dev/null || { echo "got no browser '$(CHROMIUM)'; expected a Chromium, as by: apt-get install chromium; or name yours: make $(MAKECMDGOALS) CHROMIUM=google-chrome" >&2; exit 1; }

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
