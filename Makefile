# Everything that a developer, CI or a first visitor runs. `make` alone starts the server.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OURS := server.py config.py background.py processes.py handlers protocol services sandbox tools bench
ARGS ?=
MINUTES ?= 30

.PHONY: serve test check corpus bench soak clean

serve: $(VENV)/serve
	$(BIN)/python server.py $(ARGS)

test: $(VENV)/develop
	@tools/install_redis.sh
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict $(OURS)

corpus: $(VENV)/develop
	$(BIN)/python tools/corpus.py $(ARGS)

bench: $(VENV)/develop
	$(BIN)/python -m bench.cold $(ARGS)

soak: $(VENV)/develop
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

$(VENV)/bin/python:
	$(PYTHON) tools/make_venv.py $(VENV)

$(VENV)/serve: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/develop: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/serve

clean:
	rm -rf $(VENV)
