# SPDX-License-Identifier: Apache-2.0
# make setup   everything the others need: Debian packages, .venv, .venv/bin/cri-server   (root, Debian 12 or newer)
# make run     a server on this host with one pod on it; Ctrl-C ends it; ONCE=1 ends after the demonstration
# make test    all tests (docs/testing.md)
# make test-vm the tests in a Debian guest under qemu: cgroup v2, systemd, SELinux (docs/guest-run.md); VM="--help" for a part
# make bench   our server next to Debian's containerd (docs/performance.md); BENCH="--rounds 5 --json" passes options
# make bench-streams   the same for exec and port-forward
# make bench-handlers  a pod of each handler side by side (docs/runtimes.md)
.PHONY: setup run test test-vm bench bench-streams bench-handlers
PYTHON = .venv/bin/python
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

setup:
	@deploy/setup.sh

run: setup
	@$(PYTHON) -m deploy.demo $(if $(filter 1,$(ONCE)),--once)

test: setup
	@deploy/setup.sh shellcheck runsc containerd-shim-runc-v2
	@$(PYTHON) -m tests.lab.init $(PYTHON) -m pytest $(TESTS)

test-vm: setup
	@deploy/setup.sh qemu-system-x86_64 mmdebstrap mkfs.ext4 debugfs
	@$(PYTHON) -m tests.vm $(if $(VM),$(VM),--page)

bench: setup
	@deploy/setup.sh containerd
	@$(PYTHON) -m bench.peers pods $(BENCH)

bench-streams: setup
	@deploy/setup.sh containerd
	@$(PYTHON) -m bench.peers streams $(BENCH)

bench-handlers: setup
	@deploy/setup.sh runsc containerd-shim-runc-v2
	@$(PYTHON) -m bench.handlers $(BENCH)
