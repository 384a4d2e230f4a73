# make demo       one VM's whole life on two real SSH hosts, run by the driver executables
# make test       units, actions, real hosts and guests, bats, linters, types
# make cycle      the lives of VMs, gesture by gesture, on three hosts, for every pair of drivers
# make check      the conformance kit on our drivers, quickly; `make test` has it too
# make check-full the same, thoroughly: thousands of kills and broken dumps.  It takes an hour or more
# make lint       linters and types alone
# make bench      what an action costs with nothing to move; STOCK=DIR beside the drivers of another remotes tree
# make generated  renew what comes from the driver.toml files
#
# System packages that are missing are installed (as root) or named.  TESTS=... runs a part: make test TESTS=tests/bats

PYTHON := /usr/bin/python3
VENV := .venv
CYCLE := tests/test_cycle.py
TESTS := --ignore=$(CYCLE)

demo:
	@tests/packages demo
	@$(PYTHON) tests/demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q $(TESTS)

cycle: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q $(CYCLE)

check: $(VENV)/ready
	PYTHONPATH=lib $(VENV)/bin/python -m madrigal check -j 2

check-full: $(VENV)/ready
	PYTHONPATH=lib $(VENV)/bin/python -m madrigal check -j 2 --profile full --html check.html --json check.json

lint: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q tests/test_linters.py

bench:
	@tests/packages demo
	@$(PYTHON) benchmarks/run $(if $(STOCK),--stock $(STOCK))

generated:
	@PYTHONPATH=lib $(PYTHON) -m madrigal.drivers --write

# Debian has most of it; linters and stubs come from pip.  Without them their tests are skipped, and say so.
$(VENV)/ready: tests/requirements.txt tests/packages
	@tests/packages test
	@$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	@if $(VENV)/bin/python -m pip install -q --disable-pip-version-check -r tests/requirements.txt; then touch $@; \
	else echo "ruff, mypy and stubs cannot be had from pip: what needs them will be skipped"; fi

.PHONY: demo test cycle check check-full lint bench generated
