# SPDX-License-Identifier: Apache-2.0
"""What the server knows of pods and containers: one record each, one JSON file each.

    <root>/pods/<id>.json            a Pod
    <root>/containers/<id>.json      a Container

A record is a frozen value; a change is a new record that is on disk (temporary file, then rename)
before it can be seen in memory, so a kill at any instruction leaves the old record or the new one.
Only the end of something is believed without: stopping and removing must work on a full disk.
Intent is recorded first: a record whose creation never ended is found by `recovery` and removed.
Files that cannot be read are set aside as `*.broken` and logged; they never keep the server from
starting, which then takes away what they told of (`recovery`). A record of a later version than
ours is not spoilt: with one of those the server does not start, for it would end what runs.

States are derived from what happened (`started_at`, `finished_at`), not stored beside it. There is
no fsync: after a power loss nothing runs any more, and recovery sweeps what is not on record
(design.md §4).
"""

import asyncio
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
from google.protobuf import json_format

from cri_server import locks, names
from cri_server.pb import api_pb2 as api

log = structlog.get_logger()
VERSION = 1
R = TypeVar("R", "Pod", "Container")
# What a file can do to its reader; msgspec's errors are ValueErrors.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, RecursionError, json_format.Error)


class Newer(Exception):
    """A record was written by a later version, which alone can tell what it means."""

    def __init__(self, path: Path, version: int) -> None:
        super().__init__(
            f"{path} is a record of version {version}, and this server knows {VERSION}: start the"
            " later version again, or remove all pods with it first"
        )


class PodState(StrEnum):
    """How far a pod got. Only READY is SANDBOX_READY for CRI; CREATING is not listed at all."""

    CREATING = "creating"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"  # its creation failed, and so did its removal


PodName = tuple[str, str, str, int]
ContainerName = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """A pod sandbox. Times are nanoseconds since the epoch."""

    id: str
    config: api.PodSandboxConfig
    raw: bytes  # the config as it stands in the file
    runtime_handler: str  # as the request said it; "" asks for the default
    handler: str  # the one that serves it
    created_at: int
    boot_id: str
    state: PodState = PodState.CREATING
    ips: tuple[str, ...] = ()
    network: Mapping[str, Any] | None = None  # the CNI result; None: nothing was ever attached
    cgroups_made: tuple[str, ...] = ()  # parents that were not there before this pod
    mark: str = ""  # the empty cgroup that stands for it where it has no sandbox container
    shim_pid: int = 0
    shim_start_time: int = 0  # with the pid: which process; see shim.process.start_time
    pid: int = 0  # the sandbox container's, where there is one
    stopped_at: int = 0
    selinux_level: str = ""  # the pair of categories that is the pod's; "" without SELinux
    overhead: str = ""  # LinuxContainerResources as JSON, after updates; "": as in the config
    resources: str = ""

    @property
    def name(self) -> PodName:
        m = self.config.metadata
        return (m.name, m.namespace, m.uid, m.attempt)

    @property
    def own_network(self) -> bool:
        options = self.config.linux.security_context.namespace_options
        return options.network != api.NamespaceMode.NODE

    @property
    def netns(self) -> str:
        """Where the network namespace is pinned, so that `ip netns` and CNI plugins see it."""
        return f"/run/netns/{self.id}" if self.own_network else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """A container. Times are nanoseconds since the epoch; 0 is "not yet"."""

    id: str
    pod_id: str
    handler: str  # the pod's
    config: api.ContainerConfig
    raw: bytes
    created_at: int
    boot_id: str
    image_id: str
    image_ref: str  # a repo digest, or the id
    image_name: str  # a tag, or what the request said
    layers: tuple[str, ...]
    log_path: str
    stop_signal: int
    complete: bool = False  # CreateContainer came to its end
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    cgroups_path: str = ""
    resources: str = ""  # LinuxContainerResources as JSON, after updates; "": as in the config
    pid: int = 0
    start_time: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""

    @property
    def name(self) -> ContainerName:
        return (self.pod_id, self.config.metadata.name, self.config.metadata.attempt)

    @property
    def state(self) -> "api.ContainerState.ValueType":
        if self.finished_at:
            return api.ContainerState.CONTAINER_EXITED
        if self.started_at:
            return api.ContainerState.CONTAINER_RUNNING
        return api.ContainerState.CONTAINER_CREATED


class Store:
    """All records, in memory and on disk."""

    def __init__(self, root: Path) -> None:
        self._pods_dir, self._containers_dir = root / "pods", root / "containers"
        self._pods: dict[str, Pod] = {}
        self._containers: dict[str, Container] = {}
        self._of_pod: dict[str, dict[str, None]] = {}
        self._changes = locks.Locks()
        self.unreadable: frozenset[str] = frozenset()  # ids of pods whose files were set aside

    # -- pods -------------------------------------------------------------------------------------

    def pod(self, pod_id: str) -> Pod:
        """Return the pod with this id or unique prefix. Raises NotFound, InvalidArgument when
        ambiguous.
        """
        return self._pods[names.resolve(pod_id, self._pods.keys(), "pod sandbox")]

    def pods(self) -> list[Pod]:
        return list(self._pods.values())

    def pod_named(self, name: PodName) -> Pod | None:
        return next((p for p in self._pods.values() if p.name == name), None)

    async def put_pod(self, pod: Pod) -> Pod:
        """Make `pod` the record of its id, on disk and then in memory."""
        await asyncio.to_thread(_write, self._pods_dir / f"{pod.id}.json", _encode(pod))
        self._pods[pod.id] = pod
        self._of_pod.setdefault(pod.id, {})
        return pod

    async def note_pod(self, pod: Pod) -> Pod:
        """Do as `put_pod`, but a full disk does not hinder: for an end, which is found again."""
        try:
            return await self.put_pod(pod)
        except OSError as e:
            log.error("record not written", pod=pod.id, error=str(e))
            self._pods[pod.id] = pod
            return pod

    async def forget_pod(self, pod_id: str) -> None:
        """Drop the record; OK when it is not there."""
        await asyncio.to_thread((self._pods_dir / f"{pod_id}.json").unlink, missing_ok=True)
        self._pods.pop(pod_id, None)
        self._of_pod.pop(pod_id, None)

    def pod_time(self, wanted: api.PodSandboxMetadata) -> int:
        """Return the time for a new pod: now, but after each earlier attempt at it.

        The kubelet takes the newest for the present one, and a clock can be set back (hazards R33).
        """
        name = (wanted.name, wanted.namespace, wanted.uid)
        return _after(p.created_at for p in self._pods.values() if p.name[:3] == name)

    def selinux_levels(self) -> set[str]:
        """Return the levels in use, also those that containers have asked for themselves."""
        options = (c.config.linux.security_context.selinux_options for c in self.containers())
        return {p.selinux_level for p in self._pods.values()} | {o.level for o in options}

    # -- containers -------------------------------------------------------------------------------

    def container(self, container_id: str) -> Container:
        """Return the container with this id or unique prefix. Raises NotFound, InvalidArgument."""
        return self._containers[names.resolve(container_id, self._containers.keys(), "container")]

    def containers(self, pod_id: str | None = None) -> list[Container]:
        """Return all containers, or those of one pod, oldest first."""
        if pod_id is None:
            return list(self._containers.values())
        return [self._containers[i] for i in self._of_pod.get(pod_id, ())]

    def container_time(self, pod_id: str, name: str) -> int:
        """Return the time for a new container, as `pod_time`."""
        return _after(c.created_at for c in self.containers(pod_id) if c.name[1] == name)

    def container_named(self, name: ContainerName) -> Container | None:
        return next((c for c in self.containers(name[0]) if c.name == name), None)

    async def put_container(self, container: Container) -> Container:
        """Make `container` the record of its id, on disk and then in memory."""
        path = self._containers_dir / f"{container.id}.json"
        await asyncio.to_thread(_write, path, _encode(container))
        self._containers[container.id] = container
        self._of_pod.setdefault(container.pod_id, {})[container.id] = None
        return container

    async def note_container(self, container: Container) -> Container:
        """Do as `put_container`, but a full disk does not hinder."""
        try:
            return await self.put_container(container)
        except OSError as e:
            log.error("record not written", container=container.id, error=str(e))
            self._containers[container.id] = container
            return container

    @contextlib.asynccontextmanager
    async def changing(self, container_id: str) -> AsyncIterator[Container]:
        """Give the record as it is now to a block that replaces it, one block at a time.

        For a change of a container that runs, and so may end meanwhile.
        """
        async with self._changes.held(container_id):
            yield self._containers[container_id]

    async def forget_container(self, container: Container) -> None:
        """Drop the record; OK when it is not there."""
        path = self._containers_dir / f"{container.id}.json"
        await asyncio.to_thread(path.unlink, missing_ok=True)
        self._containers.pop(container.id, None)
        self._of_pod.get(container.pod_id, {}).pop(container.id, None)

    # -- start ------------------------------------------------------------------------------------

    def load(self) -> None:
        """Read all records; called once, before anything is served. Raises Newer."""
        for directory in (self._pods_dir, self._containers_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._pods = {p.id: p for p in sorted(_read_all(self._pods_dir, Pod), key=_age)}
        left = [*self._pods_dir.glob("*.broken"), *self._pods_dir.glob("*.json")]
        self.unreadable = frozenset(p.stem for p in left) - self._pods.keys()
        self._of_pod = {i: {} for i in self._pods}
        for container in sorted(_read_all(self._containers_dir, Container), key=_age):
            self._containers[container.id] = container
            self._of_pod.setdefault(container.pod_id, {})[container.id] = None


def new_pod(config: api.PodSandboxConfig, *, runtime_handler: str, handler: str, now: int) -> Pod:
    """Return the first record of a pod: nothing exists yet but the intent."""
    return Pod(
        id=names.new_id(),
        config=config,
        raw=raw_config(config),
        runtime_handler=runtime_handler,
        handler=handler,
        created_at=now,
        boot_id=boot_id(),
    )


def raw_config(config: "api.PodSandboxConfig | api.ContainerConfig") -> bytes:
    """Return the JSON under which a config is stored; environment values are base64 (bytes), enums
    their numbers: CRI 0.37 gives the signals other names.
    """
    document = json_format.MessageToDict(
        config, preserving_proto_field_name=True, use_integers_for_enums=True
    )
    return msgspec.json.encode(document)


def limits(stored: str, config: api.LinuxContainerResources) -> api.LinuxContainerResources:
    """Return the resources that a record's JSON tells, `config` if it was never updated."""
    if not stored:
        return config
    return json_format.Parse(stored, api.LinuxContainerResources(), ignore_unknown_fields=True)


def raw_limits(limits: api.LinuxContainerResources) -> str:
    """Return the JSON that `limits` reads."""
    return json_format.MessageToJson(limits, preserving_proto_field_name=True, indent=None)


@functools.cache
def boot_id() -> str:
    """Return the kernel's id of this boot: pids of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def end(container: Container, told: int) -> int:
    """Return when a container ended, if it was at `told`, 0 for now: never before it began."""
    return max(told or time.time_ns(), container.started_at, container.created_at)


def _after(earlier: Iterable[int]) -> int:
    return max([time.time_ns(), *(moment + 1 for moment in earlier)])


def _age(record: Pod | Container) -> int:
    return record.created_at


def _encode(record: Pod | Container) -> bytes:
    names_of = (f.name for f in dataclasses.fields(record) if f.name not in ("config", "raw"))
    document: dict[str, object] = {"version": VERSION, **{n: getattr(record, n) for n in names_of}}
    document["config"] = msgspec.Raw(record.raw)
    return msgspec.json.encode(document)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # which no removal of the record would find
        raise


def _read_all(directory: Path, kind: type[R]) -> Iterator[R]:
    for leftover in directory.glob("*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()
    for path in sorted(directory.glob("*.json")):
        try:
            yield _decode(path, kind)
        except _UNREADABLE as e:
            log.error("record set aside", path=str(path), error=repr(e))
            _set_aside(path)


def _set_aside(path: Path) -> None:
    try:
        path.rename(path.with_suffix(".broken"))
    except OSError as e:  # it is found again at the next start
        log.error("record not set aside", path=str(path), error=str(e))


def _decode(path: Path, kind: type[R]) -> R:
    document = msgspec.json.decode(path.read_bytes())
    if type(document["version"]) is int and document["version"] > VERSION:
        raise Newer(path, document["version"])
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']} is not {VERSION}")
    if document["id"] != path.stem:
        raise ValueError(f"it is the record of {document['id']!r}")
    message = api.PodSandboxConfig() if kind is Pod else api.ContainerConfig()
    raw = msgspec.json.encode(document["config"])
    json_format.ParseDict(document["config"], message, ignore_unknown_fields=True)
    record = msgspec.convert({**document, "config": message, "raw": raw}, kind)
    _check_numbers(record)
    return record


def _check_numbers(record: Pod | Container) -> None:
    """Raise ValueError for a number that no answer can hold: one spoilt digit would fail lists."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        bits = 31 if field.name == "exit_code" else 63
        if isinstance(value, int) and not -(1 << bits) <= value < 1 << bits:
            raise ValueError(f"{field.name}: {value} cannot be")
