# make run    sets up what the quickstart needs, then fine-tunes a pretrained model on real images (minutes on a laptop's CPU)
# make run-text does the same with texts: it fine-tunes a pretrained encoder on rated snippets of film reviews
# make test   sets up everything, then lints, type-checks and tests: unit (parts, with real Parquet, S3, Prometheus) and e2e (whole runs on real Ray)
# make long   runs the tests that `make test` skips, as they take minutes each: other projects' servers, benchmarks' own rehearsals, whole compressions
# make dashboards starts Prometheus (and Grafana where it is installed) for the runs on this machine
# make site   builds the documentation's site with search into .build/site
# make faults runs the fault campaign (an hour), and writes benchmarks/results/faults.json
# Both work on a fresh machine with Python >= 3.11; a second call takes seconds.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run run-text test check unit e2e long dashboards site faults debian clean
.DELETE_ON_ERROR:

run: .venv/.quickstart
	$(BIN)/python -m trainer.run --config quickstart

run-text: .venv/.text-quickstart
	$(BIN)/python -m trainer.run --config text-quickstart

test: .venv/.dev debian check unit e2e

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m deploy.metrics_page --check
	$(BIN)/python -m deploy.grafana --check
	$(BIN)/python -m deploy.prometheus --check
	$(BIN)/python -m deploy.kubernetes --check
	$(BIN)/python -m deploy.picture --check

unit: .venv/.dev
	$(BIN)/python -m pytest --ignore=tests/e2e --ignore=tests/golden --numprocesses 2 --dist loadfile

e2e: .venv/.dev
	$(BIN)/python -m pytest tests/e2e tests/golden

long: .venv/.dev debian
	$(BIN)/python -m pytest tests/e2e -m long --long

dashboards: .venv/.quickstart debian
	$(BIN)/python -m deploy.up

site: .venv/.dev
	$(BIN)/python -m deploy.site

faults: .venv/.dev
	$(BIN)/python -m benchmarks.faults --out benchmarks/results/faults.json

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old, 3.11 or newer is needed; use make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.quickstart: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing Python packages (about 7 GB, most of it PyTorch's) into .venv; pip shows each as it comes"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[quickstart]'
	@touch $@

.venv/.text-quickstart: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing Python packages (about 7 GB, most of it PyTorch's) into .venv; pip shows each as it comes"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[text-quickstart]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing Python packages (about 7 GB, most of it PyTorch's) into .venv; pip shows each as it comes"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[quickstart,text-quickstart,lora,timm,hub,onnx,prune,serve,wandb,dev]'
	@touch $@ .venv/.quickstart .venv/.text-quickstart

# Prometheus, Chromium and the full Fashion-MNIST for the tests that use them; those skip with a reason where they cannot be installed.
debian:
	@if command -v prometheus >/dev/null && command -v chromium >/dev/null && [ -d /usr/share/datasets/fashion-mnist ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus chromium dataset-fashion-mnist >/dev/null; \
	else echo "tests that need Debian's prometheus, chromium or dataset-fashion-mnist will skip: run as root: apt-get install prometheus chromium dataset-fashion-mnist"; fi

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
