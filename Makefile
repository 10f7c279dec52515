# Every target sets up what it needs: git, make and Python >= 3.11 are enough.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
WHEELS := $(if $(wildcard wheelhouse/*.whl),--no-index --find-links wheelhouse,)

.PHONY: demo test fast check up repro study bench soak docs clean wheelhouse

demo: .venv/ready ; formulary demo
test: .venv/dev ; deploy/debian.sh ; OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile $(ARGS)
fast: .venv/dev ; OMP_NUM_THREADS=1 python -m pytest -q -n 2 tests/unit tests/house
check: .venv/dev
	ruff format --check . && ruff check . && mypy && lint-imports --no-cache && python -m pytest -q tests/house
up: .venv/ready ; formulary up
repro: .venv/ready ; dvc repro
study: .venv/ready ; dvc repro training/pipelines/study/dvc.yaml
bench: .venv/bench
	mkdir -p build/bench
	for one in serving overload volumes trial training monitoring console ledger gate_drift test_set_budget alarms estimation; do \
		python benchmarks/$$one.py $(ARGS) --json build/bench/$$one.json || exit 1; done
soak: .venv/dev ; FORMULARY_SOAK=1 python -m pytest -q tests/faults tests/data/test_importing.py tests/unit/imaging
docs: .venv/dev ; mkdocs build --strict --site-dir site
wheelhouse: .venv/ready ; pip wheel --wheel-dir wheelhouse -r requirements.lock -r requirements-dev.lock -r requirements-scale.lock -r requirements-bench.lock pip
clean: .venv/ready ; formulary clean --yes

.venv/bin/python:
	$(PYTHON) -m venv .venv
.venv/ready: .venv/bin/python requirements.lock pyproject.toml
	.venv/bin/python -m pip install $(WHEELS) --disable-pip-version-check --progress-bar on -q -r requirements.lock
	.venv/bin/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation --editable .
	touch $@
.venv/dev: .venv/ready requirements-dev.lock
	.venv/bin/python -m pip install $(WHEELS) --disable-pip-version-check -q -r requirements.lock -r requirements-dev.lock
	touch $@
.venv/bench: .venv/dev requirements-bench.lock
	.venv/bin/python -m pip install $(WHEELS) --disable-pip-version-check -q -r requirements.lock -r requirements-dev.lock -r requirements-bench.lock
	touch $@
