# make demo       one VM's whole life on two real SSH hosts, run by the driver executables
# make test       units, actions, real hosts and guests, bats, linters, types: on all processors, four at most
# make test-long  what takes longer: lives of VMs with every gesture on three hosts for every pair of drivers, crowds,
#                 kills at every change, thousands of random trees of snapshots, more of running guests, faults and
#                 memory under large disks
# make check      the conformance kit on our drivers, quickly; `make test` has it too
# make check-full all that the kit has: 2,000 kills, 10,000 broken dumps, networks, disks and programs that fail
# make thorough   what takes hours: faults at all points of all ways under large disks, and our drivers broken in every way,
#                 which the conformance kit must notice (make test-long has one way for each action)
# make lint       linters and types alone
# make bench      what actions cost and how fast they move images; PART=throughput one part of it (benchmarks/run --help),
#                 STOCK=DIR beside the drivers of another remotes tree; `make bench import` what imports from a web server cost
# make generated  renew what comes from the driver.toml files
#
# System packages that are missing are installed (as root) or named.  TESTS=... runs a part: make test TESTS=tests/test_tm.py

PYTHON := /usr/bin/python3
VENV := .venv
TESTS :=

demo:
	@tests/packages demo
	@$(PYTHON) tests/demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 4 -m "not long and not thorough" $(TESTS)

test-long: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q -n 2 -m "long and not thorough" $(TESTS)

check: $(VENV)/ready
	PYTHONPATH=lib $(VENV)/bin/python -m madrigal check -j 2

# six at a time also on two processors: much of it waits for deadlines
check-full: $(VENV)/ready
	PYTHONPATH=lib $(VENV)/bin/python -m madrigal check -j 6 --profile full --html check.html --json check.json

thorough: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q -m thorough $(TESTS)

lint: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q tests/test_linters.py

bench:
	@tests/packages demo
	@$(PYTHON) benchmarks/$(if $(filter import,$(PART) $(MAKECMDGOALS)),import,run $(PART)) $(if $(STOCK),--stock $(STOCK))

import: bench

generated:
	@PYTHONPATH=lib $(PYTHON) -m madrigal.drivers --write

# Debian has most of it; linters and stubs come from pip.  Without them their tests are skipped, and say so.
$(VENV)/ready: tests/requirements.txt tests/packages
	@tests/packages test
	@$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	@if $(VENV)/bin/python -m pip install -q --disable-pip-version-check -r tests/requirements.txt; then touch $@; \
	else echo "ruff, mypy and stubs cannot be had from pip: what needs them will be skipped"; fi

.PHONY: demo test test-long check check-full thorough lint bench import generated
