# SPDX-License-Identifier: Apache-2.0
"""SELinux for the guest: Debian's policy with its `container` module, deploy/'s, and labels.

Debian builds its reference policy without the module that knows containers (container_t), and ships
that module's source. It is compiled in the image as deploy/README.md says. The root file system is
then labelled as a whole; a host without SELinux will do, and mkfs.ext4 copies the labels.
"""

import os
import shutil
import subprocess
from pathlib import Path

from tests.vm import image, payload

PACKAGES = (
    "selinux-policy-default", "selinux-policy-dev", "selinux-policy-src", "policycoreutils",
    "selinux-utils", "semodule-utils", "checkpolicy", "zstd",
)  # fmt: skip
PARAMETERS = "security=selinux selinux=1 enforcing=1"
OURS = payload.REPOSITORY / "deploy" / "selinux"
# Whoever installs and deploys is an administrator, and may start tests as a container engine.
_DOMAIN = "[Service]\nSELinuxContext=system_u:system_r:unconfined_t:s0\n"
_TESTS = "(allow unconfined_t container_engine_t (process (transition)))\n"
_DROP_IN = "etc/systemd/system/tests.service.d/selinux.conf"
_WHERE = "root/policy"
_SCRIPT = """\
set -e
cd /root/policy
tar --zstd -xf /usr/src/selinux-policy-src.tar.zst
cp selinux-policy-src/policy/modules/services/container.te .
cp selinux-policy-src/policy/modules/services/container.fc .
rm -r selinux-policy-src
make -f /usr/share/selinux/devel/Makefile NAME=default container.pp cri_server.pp
semodule -n -s default -i container.pp cri_server.pp tests.cil
cd / && rm -r /root/policy
sed -i 's/^SELINUX=.*/SELINUX=enforcing/' /etc/selinux/config
"""
# setfiles labels nothing on a host whose kernel has no SELinux.
_LABEL = """\
import os, selinux
labels = selinux.selabel_open(selinux.SELABEL_CTX_FILE, None, 0)
paths = ["/"]
for folder, folders, files in os.walk("/"):
    paths += [os.path.join(folder, name) for name in folders + files]
for path in paths:
    try:
        label = selinux.selabel_lookup_raw(labels, path, os.lstat(path).st_mode)[1]
    except FileNotFoundError:
        continue
    os.setxattr(path, "security.selinux", label.encode() + b"\\0", follow_symlinks=False)
"""


def furnish(root: Path) -> None:
    """Give a root folder the policy, and every file in it its label. Raises CalledProcessError."""
    (root / _DROP_IN).parent.mkdir()
    (root / _DROP_IN).write_text(_DOMAIN)
    (root / _WHERE).mkdir()
    (root / _WHERE / "tests.cil").write_text(_TESTS)
    for name in ("cri_server.te", "cri_server.fc"):
        shutil.copy(OURS / name, root / _WHERE)
    _run(root, "sh", "-c", _SCRIPT)
    _run(root, "python3", "-c", _LABEL)


def kind() -> image.Kind:
    """Return a guest whose kernel enforces SELinux."""
    ours = (file.read_text() for file in sorted(OURS.iterdir()))
    return image.Kind(
        parameters=PARAMETERS,
        packages=PACKAGES,
        furnish=furnish,
        recipe=(_DOMAIN, _TESTS, _SCRIPT, _LABEL, *ours),
    )


def _run(root: Path, *command: str) -> None:
    subprocess.run(["chroot", os.fspath(root), *command], check=True)
