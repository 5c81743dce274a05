# make demo: the main job, end to end.  make test: the tests.  make check: lint, format, types, imports.
# Each creates .venv once and reuses it until pyproject.toml or constraints.txt changes.
# Options: PYTHON=python3.12 (which Python makes .venv), ARGS="..." (passed on to the demo or to pytest).

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
PROJECT := pyproject.toml constraints.txt

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/kanformer demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find kanformer scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no '$(PYTHON)' here; install Python 3.10 or newer, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1), kanformer needs Python 3.10 or newer; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "error: '$(PYTHON)' has no venv or ensurepip; install it (Debian, Ubuntu: apt install python3-venv) and run make again"; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-demo: EXTRAS := demo
$(VENV)/.installed-test: EXTRAS := demo,test
$(VENV)/.installed-dev: EXTRAS := dev
$(VENV)/.installed-%: $(PROJECT) | $(VENV)/.created
	@echo "installing kanformer[$(EXTRAS)] into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) -e ".[$(EXTRAS)]"
	@touch $@
