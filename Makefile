# make demo                        train a tiny model through all four stages on the sample corpus
# make demo CORPUS=path/to/folder  the same on your own files (any format that pedgpt reads)
# make chat                        talk to the model that the demo trained
# make serve                       the same in the browser, and for OpenAI's clients
# make test                        lint, types and tests, on two cores; JOBS=4 takes four
# make docs                        the API reference, from the docstrings, in build/api/index.html
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
CORPUS ?= recipes/sample_corpus
RUN    ?= $(if $(filter recipes/sample_corpus,$(CORPUS)),runs/demo,runs/$(notdir $(abspath $(CORPUS))))
bin    := $(VENV)/bin

.PHONY: demo chat serve trained test docs format clean

demo: $(VENV)/.demo
	PATH="$(abspath $(bin)):$$PATH" CORPUS="$(CORPUS)" RUN="$(RUN)" bash recipes/pipeline.sh

chat: trained $(VENV)/.demo
	$(bin)/python recipes/chat.py --adapter "$(RUN)/experts/adapter"

serve: trained $(VENV)/.serve
	$(bin)/python recipes/serve.py --adapters "$(RUN)/experts/adapter"

trained:
	$(if $(shell test -f "$(RUN)/experts/adapter/adapter_config.json" && echo yes),@:,$(error there is no trained model in $(RUN) yet; run "make demo$(if $(filter command line,$(origin CORPUS)), CORPUS=$(CORPUS))" first))

# mypy takes one core for most of a minute, so it runs while the tests start, and its messages come at the end.
test: $(VENV)/.test
	$(bin)/ruff check .
	$(bin)/ruff format --check pedgpt recipes
	$(bin)/mypy > $(VENV)/mypy.log 2>&1 & types=$$!; trap "kill $$types" INT; \
	$(bin)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types || tests=1; cat $(VENV)/mypy.log; exit $$tests

docs: $(VENV)/.test
	$(bin)/python -m pdoc pedgpt '!pedgpt.__main__' --output-directory build/api

format: $(VENV)/.test
	$(bin)/ruff check --fix .
	$(bin)/ruff format pedgpt recipes

clean:
	rm -rf $(VENV) runs build *.egg-info

# A marker for each set of extras, remade when the dependencies change.
$(VENV)/.demo: pyproject.toml constraints.txt | $(bin)/python
	$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[eval,plot]"
	touch $@

$(VENV)/.serve: $(VENV)/.demo
	$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[serve]"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(bin)/python
	$(bin)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/.demo

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pedgpt needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
