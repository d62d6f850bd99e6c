# SPDX-License-Identifier: Apache-2.0
"""Hostile images, attempts to run them, and the canary on the host that tells whether one has
bitten.

    attack.make(tars.symlink("dev", attack.canary.path), user="0")   busybox and one more layer
    attack.attempt(reference, "cat /x")                              refused, or run to its end
    attack.check()                                                   nobody bit, read, hung, stayed

An attempt that is refused must be refused by a clear code, in one line. While the attack stands a
thread asks for Version without a pause, as the kubelet's health check does.
"""

import contextlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from cri_server.pb import api_pb2 as api
from tests.fakes import kubelet
from tests.lab import image, registry, server, tars, waiting

PATIENCE = waiting.patient(1.0)  # seconds that a Version may take, whatever else goes on
REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_BITE = """#!/bin/sh
touch {folder}/bitten
"""


class Canary:
    """A folder of the host that nobody may read or change.

    `token` holds a random word, `ptmx` is what a runtime deletes through a bad /dev, `bite` is a
    program that leaves a mark when it is run, `fifo` blocks who opens it, `passwd` makes mallory
    root.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.word = folder, f"canary-{os.urandom(12).hex()}"
        folder.mkdir(mode=0o755)
        self.token = folder / "token"
        self.token.write_text(self.word)
        (folder / "ptmx").write_text(self.word)
        (folder / "passwd").write_text("mallory:x:0:0::/:/bin/sh\n")
        self.bite = folder / "bite"
        self.program = _BITE.format(folder=folder).encode()
        self.bite.write_bytes(self.program)
        self.bite.chmod(0o755)
        os.mkfifo(folder / "fifo")
        (folder / "folder").mkdir()
        for path in (self.token, folder / "ptmx", folder / "passwd", self.bite):
            os.utime(path, (1, 1))  # so old that any reading moves the time of access (relatime)
        self._before = self._look()

    @property
    def path(self) -> str:
        return os.fspath(self.folder)

    def changes(self) -> list[str]:
        """Return what is not as it was."""
        now = self._look()
        return [f"{k}: {self._before.get(k)} -> {now.get(k)}" for k in sorted(now | self._before)
                if now.get(k) != self._before.get(k)]  # fmt: skip

    def forgive_empty_folders(self) -> None:
        """Take new, empty folders away, and only those: what is in one stays a change."""
        for path in sorted(self._paths(), reverse=True):
            if os.fspath(path) not in self._before and stat.S_ISDIR(path.lstat().st_mode):
                with contextlib.suppress(OSError):
                    path.rmdir()
        old = self._before[self.path]
        if _facts(self.folder)[:-2] == old[:-2]:  # nothing is left of them but the time
            os.utime(self.folder, ns=(self.folder.stat().st_atime_ns, old[-2][0]))

    def _look(self) -> dict[str, Any]:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        here = [line.split()[4] for line in mounts if self.path in line]
        return {"mounts": here, **{os.fspath(p): _facts(p) for p in self._paths()}}

    def _paths(self) -> Iterator[Path]:
        yield self.folder
        yield from sorted(self.folder.rglob("*"))


def _facts(path: Path) -> tuple[Any, ...]:
    st = path.lstat()
    times = (st.st_mtime_ns, st.st_atime_ns if stat.S_ISREG(st.st_mode) else 0)
    attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    return st.st_mode, st.st_uid, st.st_gid, st.st_nlink, st.st_size, times, attributes


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of an attempt: refused with a `code`, or a `container` that ended."""

    code: grpc.StatusCode | None = None
    message: str = ""
    container: str = ""
    exit_code: int = 0
    lines: Sequence[str] = ()
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Attack:
    """One test's images and containers, in a pod of its own that is made when it is needed."""

    def __init__(
        self,
        client: kubelet.Kubelet,
        site: server.Site,
        where: registry.Registry,
        folder: Path,
        layers: Sequence[bytes],
    ) -> None:
        self.kubelet, self.site = client, site
        self.canary = Canary(folder / "canary")
        self.pod_config, self.handler = client.pod_config(), ""
        self._registry, self._layers = where, layers
        self._pod: kubelet.Pod | None = None
        self._containers: list[str] = []
        self._said: list[str] = []
        self._count = 0
        self._watch = _Watch(site.endpoint)
        self._logged = site.log.stat().st_size

    @property
    def pod(self) -> kubelet.Pod:
        if self._pod is None:
            self._pod = self.kubelet.run_pod(self.pod_config, handler=self.handler)
        return self._pod

    def make(self, *entries: bytes, layers: Sequence[bytes] = (), **config: Any) -> str:
        """Push busybox with one layer of `entries`, pull it and return its reference."""
        more = [tars.archive(*entries)] if entries else []
        defaults = {"Env": [image.PATH], "Cmd": ["sh"]}
        made = image.image([*self._layers, *layers, *more], {**defaults, **config})
        return self.pull(made)

    def pull(self, made: image.Image) -> str:
        """Push an image under a name of its own, pull it and return its reference."""
        self._count += 1
        name = f"hostile/{self.canary.word[7:]}-{self._count}"
        reference = self._registry.push(made, name)
        self.kubelet.pull(reference)
        return reference

    def attempt(self, reference: str, script: str = "", **fields: Any) -> Outcome:
        """Create and start a container that runs `script` to its end; a refusal is an outcome."""
        self._count += 1
        command = fields.pop("command", ["/bin/sh", "-c", script] if script else [])
        name = fields.pop("name", f"c{self._count}")
        pod = fields.pop("pod", None) or self.pod
        config = self.kubelet.container_config(reference, command, name=name, **fields)
        try:
            container = self.kubelet.create(pod, config)
        except grpc.RpcError as e:
            return self._refused(e)
        self._containers.append(container)
        spec = self.spec(container)
        try:
            self.kubelet.start(container)
        except grpc.RpcError as e:
            return self._refused(e, started=True)
        status = self.kubelet.wait_exit(container)
        lines = [line.text for line in self.kubelet.log(container)]
        self._said += lines
        return Outcome(container=container, exit_code=status.exit_code, lines=lines, spec=spec)

    def keep(self, reference: str, *command: str, **fields: Any) -> str:
        """Create and start a container that stays; returns its id."""
        self._count += 1
        name = f"c{self._count}"
        command = command or ("sleep", "86400")
        container = self.kubelet.run(self.pod, reference, command, name=name, **fields)
        self._containers.append(container)
        return container

    def inside(self, container: str, script: str) -> str:
        """Return what a shell in a running container says."""
        answer = self.kubelet.exec_sync(container, ["/bin/sh", "-c", script], timeout=20)
        text = (answer.stdout + answer.stderr).decode(errors="replace")
        self._said.append(text)
        return text

    def spec(self, container: str) -> dict[str, Any]:
        """Return the config.json that the OCI runtime gets."""
        path = self.site.state / "containers" / container / "config.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def check(self) -> None:
        """Fail if the attack has done any harm; removes its containers."""
        self._watch.end()
        for container in self._containers:
            self.kubelet.remove(container)
        changes = self.canary.changes()
        assert not changes, changes
        assert not self._watch.slow, f"Version took longer than {PATIENCE:g} s"
        for word in (self.canary.word, server.SECRET):
            assert word not in "\n".join(self._said)
            assert word not in self._new_log()
        assert self._residue() == []

    def _new_log(self) -> str:
        with self.site.log.open("rb") as log:
            log.seek(self._logged)
            return log.read().decode(errors="replace")

    def _residue(self) -> list[str]:
        """Return bundles, writable layers and mounts of containers that are gone."""
        places = (self.site.state / "containers", self.site.root / "writable")
        found = [os.fspath(p) for place in places if place.is_dir() for p in place.iterdir()]
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return found + [m for m in mounts if m.startswith(os.fspath(places[0]))]

    def _refused(self, error: grpc.RpcError, *, started: bool = False) -> Outcome:
        code, message = error.code(), error.details() or ""
        assert started or code in REFUSALS, f"{code}: {message}"
        assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, message
        assert "\n" not in message
        assert len(message) < 3000
        self._said.append(message)
        return Outcome(code=code, message=message)


class _Watch:
    """Asks a server for Version all the time; `slow` when it was late twice in a row."""

    def __init__(self, endpoint: str) -> None:
        self.slow = False
        self._endpoint, self._over = endpoint, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with kubelet.Kubelet(self._endpoint) as client:
            while not self._over.wait(0.05):
                self.slow |= not (_answers(client) or _answers(client))


def _answers(client: kubelet.Kubelet) -> bool:
    try:
        client.runtime.Version(api.VersionRequest(), timeout=PATIENCE)
    except grpc.RpcError:
        return False
    return True


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if "VmRSS" in line) << 10


def fifo(name: str) -> bytes:
    """Return a layer's entry that blocks who opens it."""
    return tars.header(name, b"6")


def device(name: str, major: int, minor: int) -> bytes:
    """Return a layer's entry that is a character device."""
    return tars.header(name, b"3", mode=0o666, device=(major, minor))


Make = Callable[[Canary], Sequence[bytes]]
