# Everything that a developer, CI or a first visitor runs. `make` alone starts the server.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OURS := server.py config.py background.py processes.py handlers protocol services sandbox tools bench
KOFFI := sandbox/child/node_modules/.package-lock.json
ARGS ?=
MINUTES ?= 30

.PHONY: serve test check corpus bench soak clean

serve: $(VENV)/serve $(KOFFI)
	$(BIN)/python server.py $(ARGS)

test: $(VENV)/develop $(KOFFI)
	@tools/install_redis.sh
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict $(OURS)

corpus: $(VENV)/develop $(KOFFI)
	$(BIN)/python tools/corpus.py $(ARGS)

bench: $(VENV)/develop $(KOFFI)
	$(BIN)/python -m bench.cold $(ARGS)

soak: $(VENV)/develop $(KOFFI)
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

$(VENV)/bin/python:
	$(PYTHON) tools/make_venv.py $(VENV)

$(VENV)/serve: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/develop: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/serve

# With koffi, node can be forked. Without it, which is no reason not to start, node is started ahead.
$(KOFFI): sandbox/child/package-lock.json | $(VENV)/serve
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/npm ci --prefix sandbox/child --ignore-scripts --no-audit --no-fund --silent \
	    && touch $@ || echo "koffi could not be installed: node will be started ahead, not forked"

clean:
	rm -rf $(VENV) sandbox/child/node_modules
