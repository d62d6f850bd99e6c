# SPDX-License-Identifier: Apache-2.0
"""One run of a guest: qemu as our child, its serial console on our output and in a file.

The guest powers itself off. One that has not after the deadline is killed, by pid. The root disk is
never written to: qemu keeps changes in a temporary file of its own. The payload disk is, so that
results can be read from it, also after a kill.
"""

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.vm import image

# In emulation time is what is short: a quarter of it goes to these. The kernel would clear and copy
# pages byte by byte, which a real CPU does at once, walk five levels of page tables for every TLB
# miss, and ask the HPET, a device, what time it is.
CPU = "max,erms=off,fsrm=off,la57=off"
PARAMETERS = (
    "console=ttyS0 root=LABEL=root rw quiet "
    "systemd.unified_cgroup_hierarchy=1 systemd.show_status=0 "
    "random.trust_cpu=on mitigations=off tsc=reliable panic=-1"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """`name` begins its lines on our output. `memory` in MiB; `accelerator` is one of qemu's: tcg
    needs nothing of the host. `cpus`: how many the guest has, and at most what it takes of the
    host's.
    """

    name: str
    root: image.Image
    payload: Path
    memory: int = 4096
    accelerator: str = "tcg"
    cpus: int = 1

    def command(self) -> list[str]:
        """Return the command line of qemu."""
        return [
            "qemu-system-x86_64", "-machine", "q35", "-accel", self.accelerator, "-cpu", CPU,
            "-smp", str(self.cpus), "-m", str(self.memory), "-no-reboot",
            "-nodefaults", "-nographic", "-nic", "none", "-serial", "stdio", "-monitor", "none",
            "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng,rng=rng",
            "-kernel", os.fspath(self.root.kernel), "-initrd", os.fspath(self.root.initrd),
            "-append", f"{PARAMETERS} {self.root.parameters}",
            "-drive", f"file={self.root.disk},if=virtio,format=raw,snapshot=on",
            "-drive", f"file={self.payload},if=virtio,format=raw,cache=unsafe",
        ]  # fmt: skip

    def run(self, console: Path, *, seconds: float, stop: threading.Event) -> bool:
        """Run until the guest powers off; returns False when it had to be killed after
        `seconds`, or because of `stop`.
        """
        ended = threading.Event()
        with console.open("wb") as log, self._started() as qemu:
            watch = threading.Thread(target=self._kill_late, args=(qemu, seconds, stop, ended))
            watch.start()
            try:
                assert qemu.stdout is not None
                for line in qemu.stdout:
                    log.write(line)
                    log.flush()
                    print(f"{self.name:>12} {line.decode(errors='replace').rstrip()}", flush=True)
                return qemu.wait() == 0
            finally:
                ended.set()
                watch.join()
                qemu.kill()

    @staticmethod
    def _kill_late(
        qemu: "subprocess.Popen[bytes]",
        seconds: float,
        stop: threading.Event,
        ended: threading.Event,
    ) -> None:
        deadline = time.monotonic() + seconds
        while not (ended.wait(1) or stop.is_set() or time.monotonic() > deadline):
            pass
        if not ended.is_set():
            qemu.kill()

    def _started(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, and we end it
        )
