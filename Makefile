# Needs Python 3.8 to 3.13 with venv, and make; no root but for test-systemd and test-image. Everything runs in $(VENV), made by deploy/venv.sh when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
ARGS ?=

# Asked for once; "none" where $(PYTHON) is missing, so that help and clean still work.
VERSION := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null || echo none)
PINS := deploy/constraints/$(VERSION).txt
STAMP := $(VENV)/.made-for-$(VERSION)
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo run test test-browser test-device test-systemd test-image check bench-elpv bench-nicv2 bench-vitlr bench-stream bench-serving bench-codec bench-prune bench-int8 bench-unknown bench-drift clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=$(PYTHON) names the Python, VENV=$(VENV) the environment, OUT=$(OUT) the results, ARGS= further arguments."

demo: $(STAMP) ## teach it real photographs, ask it, kill it, ask it again; writes a plot
	@$(RUN) benchmarks/demo.py --work-dir $(OUT)/demo $(ARGS)

run: $(STAMP) backbone ## serve in the foreground on 127.0.0.1:8420
	@$(RUN) -m latentd serve $(ARGS)

test: $(STAMP) backbone ## run the tests
	@$(RUN) -m pytest -m "not (browser or device or systemd or image)" $(ARGS)

test-browser: $(STAMP) backbone ## run the tests of the page in chromium
	@$(RUN) -m pytest -m browser $(ARGS)

test-device: $(STAMP) backbone ## run the tests that need a GPU; without one each says why it was skipped
	@$(RUN) -m pytest -m device $(ARGS)

test-systemd: $(STAMP) ## run the tests of the service under a real systemd, in a container; as root
	@$(RUN) -m pytest -m systemd $(ARGS)

test-image: $(STAMP) ## build the container image on a Debian root and run it; as root
	@$(RUN) -m pytest -m image $(ARGS)

check: $(STAMP) ## lint, format and types; the Dockerfile too
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy
	@$(VENV)/bin/hadolint Dockerfile.l4t

bench-elpv: $(STAMP) backbone ## accuracy on the ELPV solar cells, over HTTP
	@$(RUN) benchmarks/elpv.py --out $(OUT)/elpv.json $(ARGS)

bench-nicv2: $(STAMP) ## accuracy on a stream of new objects, one video at a time
	@$(RUN) benchmarks/nicv2.py $(ARGS)

bench-vitlr: $(STAMP) ## the same stream with the blocks above the split learning too
	@$(RUN) benchmarks/vitlr.py --out $(OUT)/vitlr.json $(ARGS)

bench-stream: $(STAMP) backbone ## the same stream over HTTP, as fast as a daemon with its defaults takes it
	@$(RUN) benchmarks/stream.py --out $(OUT)/stream.json $(ARGS)

bench-serving: $(STAMP) backbone ## latency and throughput against the bare engine
	@$(RUN) benchmarks/serving.py --out $(OUT)/serving.json $(ARGS)

bench-codec: $(STAMP) backbone ## what each codec loses, its bytes, and its time beside a training step
	@$(RUN) benchmarks/codec.py --out $(OUT)/codec.json $(ARGS)

bench-prune: $(STAMP) backbone ## accuracy and latency against the share of attention heads removed
	@$(RUN) benchmarks/prune.py --out $(OUT)/prune.json $(ARGS)

bench-int8: $(STAMP) backbone ## speed and accuracy of the INT8 frozen stage against the float one
	@$(RUN) benchmarks/int8.py --out $(OUT)/int8.json $(ARGS)

bench-unknown: $(STAMP) backbone ## what was never taught, told from what was
	@$(RUN) benchmarks/unknown.py --out $(OUT)/unknown.json $(ARGS)

bench-drift: $(STAMP) backbone ## false alarms of drift, and how soon a class that changed is found
	@$(RUN) benchmarks/drift.py --out $(OUT)/drift.json $(ARGS)

clean: ## remove the environment, results and caches; never the state or the weights
	rm -rf $(VENV) $(OUT) build daemon/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find daemon benchmarks tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: environment backbone
environment: $(STAMP)

backbone: $(STAMP)
	@$(RUN) -m latentd backbone pull

$(STAMP): pyproject.toml $(PINS)
	@sh deploy/venv.sh "$(PYTHON)" "$(VENV)" "$(PINS)"
	@touch $@

deploy/constraints/%.txt:
	@echo "latentd needs Python 3.8 to 3.13, which PYTHON=$(PYTHON) is not. Name another: make PYTHON=python3.12 ..." >&2; exit 1
