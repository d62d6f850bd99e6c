# SPDX-License-Identifier: Apache-2.0
"""The configuration: a TOML file becomes frozen dataclasses, once, at start.

A missing file means the defaults below, which work on a bare host. A key that is not known is
refused together with the nearest one that is; a value of the wrong type is refused with its place
in the file. Every setting is described in docs/configuration.md.
"""

import dataclasses
import difflib
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from cri_server import errors

CgroupDriver = Literal["auto", "cgroupfs", "systemd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where the server lives and how it speaks."""

    listen: str = "unix:///run/cri-server/cri-server.sock"
    root: Path = Path("/var/lib/cri-server")
    state: Path = Path("/run/cri-server")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """CNI: where its configuration and plugins are, and how long they may take (seconds)."""

    conf_dir: Path = Path("/etc/cni/net.d")
    bin_dirs: tuple[Path, ...] = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
    cache_dir: Path = Path("/var/lib/cni")
    add_timeout: float = 210.0
    del_timeout: float = 60.0
    status_timeout: float = 10.0
    ip_pref: Literal["cni", "ipv4", "ipv6"] = "cni"


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Pulling and keeping images."""

    registry_config_dirs: tuple[Path, ...] = (
        Path("/etc/containerd/certs.d"),
        Path("/etc/docker/certs.d"),
    )
    pinned: tuple[str, ...] = ()
    max_parallel_downloads: int = 3
    pull_progress_timeout: float = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Handler:
    """One `[runtimes.NAME]`: an OCI runtime by command line."""

    kind: Literal["oci"] = "oci"
    path: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    pod_annotations: tuple[str, ...] = ()
    container_annotations: tuple[str, ...] = ()
    sandbox: Literal["namespaces", "container"] = "namespaces"


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """What holds for every container, and which handler serves a pod that names none."""

    default: str = "runc"
    cgroup_driver: CgroupDriver = "auto"
    exec_drain_timeout: float = 2.0
    runtime_timeout: float = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole file."""

    server: Server = field(default_factory=Server)
    network: Network = field(default_factory=Network)
    images: Images = field(default_factory=Images)
    runtime: Runtime = field(default_factory=Runtime)
    runtimes: Mapping[str, Handler] = field(default_factory=dict)

    def handler(self, name: str) -> Handler:
        """Return the handler called `name`, the default one for "" (CRI
        RunPodSandbox.runtime_handler).

        Raises InvalidArgument for a name that is not configured.
        """
        found = self.runtimes.get(name or self.runtime.default)
        if found is None:
            known = ", ".join(sorted(self.runtimes))
            raise errors.InvalidArgument(
                f"runtime_handler {name!r} is not configured (known: {known})"
            )
        return found


class ConfigError(Exception):
    """The file cannot be used; the message says where and why."""


def load(path: Path | None) -> Config:
    """Read `path`; None or a missing file gives the defaults. Raises ConfigError."""
    if path is None or not path.exists():
        return with_handlers(Config())
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {e}") from e
    return with_handlers(parse(document, where=str(path)))


def parse(document: Mapping[str, Any], *, where: str = "config") -> Config:
    """Turn a TOML document into a Config, without looking at the host. Raises ConfigError."""
    _refuse_unknown(document, Config, where)
    for name in ("server", "network", "images", "runtime"):
        kind = type(getattr(Config(), name))
        _refuse_unknown(document.get(name, {}), kind, f"{where}: [{name}]")
    for name, table in document.get("runtimes", {}).items():
        _refuse_unknown(table, Handler, f"{where}: [runtimes.{name}]")
    try:
        return msgspec.convert(document, Config, dec_hook=_decode)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{where}: {e}") from e


def with_handlers(config: Config) -> Config:
    """Fill in what a handler leaves out: its binary by its name, and the default handlers.

    Without any `[runtimes.NAME]` every runtime of runc and crun that is installed is offered; the
    default is the configured one if it is there, else the first of crun and runc.
    """
    runtimes = dict(config.runtimes) or {n: Handler() for n in ("runc", "crun") if shutil.which(n)}
    runtimes = {n: _with_path(n, h) for n, h in runtimes.items()}
    default = config.runtime.default
    if default not in runtimes:
        default = next((n for n in ("crun", "runc", *runtimes) if n in runtimes), default)
    runtime = dataclasses.replace(config.runtime, default=default)
    return dataclasses.replace(config, runtimes=runtimes, runtime=runtime)


def _with_path(name: str, handler: Handler) -> Handler:
    return dataclasses.replace(handler, path=handler.path or shutil.which(name) or name)


def _refuse_unknown(table: Mapping[str, Any], kind: type, where: str) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table")
    known = [f.name for f in dataclasses.fields(kind)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")


def _decode(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind} from {type(value)}")
