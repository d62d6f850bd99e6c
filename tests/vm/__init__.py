# SPDX-License-Identifier: Apache-2.0
"""The integration tests inside Debian guests: cgroup v2, systemd as init, AppArmor in the one,
SELinux in the other (`make test-vm`).

    host    image.py     root file system, kernel and initrd, by mmdebstrap; kept in build/vm
            policy.py    SELinux in it: Debian's policy with what it lacks, and labels
            payload.py   a second disk: wheels, tests, deploy/, and room for results
            machine.py   qemu without KVM; the serial console is what one sees; a deadline
            report.py    JUnit files become a table, docs/guest-run.md, and the exit status
    guest   guest.py     pip install, deploy/'s unit, the tests with each cgroup driver, power off

The guest has no network. What it is made from comes by the host's apt and pip, as those are
configured. Nothing stays on the host but build/vm.
"""
