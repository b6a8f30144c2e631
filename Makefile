# Two commands, each complete on a fresh machine:
#
#     make run      a model answers            make run PROMPT="Tell me a joke" MODEL=smollm2 ARGS="--temp 0"
#     make test     all tests pass             make test ARGS="-k catalog"
#
# and for developers `make check`: formatting, lint, types and tests.

PROMPT = Why is the sky blue?
MODEL = smollm2
ARGS =

VENV = .venv
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11) or sys.maxsize < 2**32)' 2>/dev/null \
    && echo $$python && break; done)

# The shell gets these as variables, character by character: a prompt may hold quotes and dollars.
override PROMPT := $(value PROMPT)
export PROMPT MODEL

.DELETE_ON_ERROR:
.PHONY: run test check clean

run: $(VENV)/.installed
	@$(VENV)/bin/edgeq run -m "$$MODEL" -p "$$PROMPT" $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV)

# The folder is made anew if Python or pip is missing in it: a half-made one is of no use.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "edgeq needs a 64-bit Python 3.11 or newer; none of python3.13, python3.12," \
	    "python3.11, python3 is one. Name yours: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments." \
	    "On Debian, Ubuntu and Raspberry Pi OS: sudo apt install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version), once" >&2
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: EXTRAS =
$(VENV)/.installed-test: EXTRAS = [test]
$(VENV)/.installed-dev: EXTRAS = [dev]
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing edgeq$(EXTRAS) into $(VENV), once" >&2
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --editable '.$(EXTRAS)'
	@touch $@
