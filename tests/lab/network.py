# SPDX-License-Identifier: Apache-2.0
"""A pod network of one's own: a bridge with port mappings, that nothing else on the host uses.

The bridge plugin makes its bridge and the masquerading rules at the first pod and never takes the
bridge away; `remove` does. Names and addresses come from the process id, so that two runs at a time
do not meet.
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path("/var/lib/cni/results")  # libcni's default place
LEASES = Path("/var/lib/cni/networks")  # host-local's default place


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """`name` names the CNI network and its bridge (at most 15 characters), `subnet` is its /16."""

    name: str
    subnet: str

    def conflist(self) -> dict[str, Any]:
        """Return the CNI configuration: bridge with masquerading, and portmap."""
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": self.subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": self.name, "isGateway": True, "ipMasq": True}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        plugins = [{**bridge, "hairpinMode": True, "ipam": ipam}, portmap]
        return {"cniVersion": "1.0.0", "name": self.name, "plugins": plugins}

    def write(self, folder: Path) -> Path:
        """Write the configuration into `folder` and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "10-bridge.conflist").write_text(json.dumps(self.conflist(), indent=2))
        return folder

    def remove(self) -> None:
        """Take away what the plugins leave by design."""
        remove(bridge=self.name, name=self.name)


def remove(*, bridge: str, name: str) -> None:
    """Take away a bridge, and host-local's (by now empty) folder for the network called `name`."""
    if Path("/sys/class/net", bridge).exists():
        ip = shutil.which("ip") or "/usr/sbin/ip"
        subprocess.run([ip, "link", "delete", bridge], check=True)
    shutil.rmtree(LEASES / name, ignore_errors=True)


def own(prefix: str) -> Network:
    """Return a network for this process: `prefix` (at most 7 characters) and the process id in its
    name.
    """
    pid = os.getpid()
    return Network(name=f"{prefix}{pid}", subnet=f"10.{100 + pid % 100}.0.0/16")
