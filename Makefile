# SPDX-License-Identifier: Apache-2.0
# make setup   everything the others need: Debian packages, .venv, .venv/bin/cri-server   (root, Debian 12 or newer)
# make run     a server on this host with one pod on it; Ctrl-C ends it; ONCE=1 ends after the demonstration
# make test    all tests (docs/testing.md)
# make bench   our server next to Debian's containerd (docs/performance.md); BENCH="--rounds 5 --json" passes options
.PHONY: setup run test bench
PYTHON = .venv/bin/python
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

setup:
	@deploy/setup.sh

run: setup
	@$(PYTHON) -m deploy.demo $(if $(filter 1,$(ONCE)),--once)

test: setup
	@$(PYTHON) -m tests.lab.init $(PYTHON) -m pytest $(TESTS)

bench: setup
	@deploy/setup.sh containerd
	@$(PYTHON) -m bench.peers $(BENCH)
