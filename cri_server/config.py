# SPDX-License-Identifier: Apache-2.0
"""The configuration: a TOML file becomes frozen dataclasses, once, at start.

A missing file means the defaults below, which work on a bare host. A key that is not known is
refused together with the nearest one that is; a value that cannot be used is refused with its place
in the file. Every setting is described in docs/configuration.md, and a test compares the two.
"""

import dataclasses
import difflib
import fnmatch
import re
import shutil
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from cri_server import capability, limits, overlayoptions, shimtypes

Dialect = Literal["runc", "crun", "runsc", "youki", "kata", "shim"]
CgroupDriver = Literal["auto", "cgroupfs", "systemd"]
MetricGroup = Literal[
    "cpu", "memory", "network", "disk", "diskIO", "process", "oom", "hugetlb", "pressure", "spec"
]
_DAY = 86400.0
Seconds = Annotated[float, msgspec.Meta(gt=0, le=_DAY)]  # a day: endless waits help nobody
Patience = Annotated[float, msgspec.Meta(ge=0, le=_DAY)]  # 0 is for ever
Count = Annotated[int, msgspec.Meta(ge=1)]

INSTALLED = ("crun", "runc")  # offered where they are installed, and in this order as the default
COPIED = frozenset({"crun", "youki"})  # dialects that copy themselves at each start: shim/sealed.py
# Of a command line and of a containerd shim; "shim" is one of which no more is known.
_DIALECTS = {"oci": ("runc", "crun", "runsc", "youki"), "shim": ("runc", "runsc", "kata", "shim")}
# Those whose sandbox is a kernel in which the containers run.
KERNELS = frozenset({"runsc", "kata"})
TIMEOUT = "timeout"  # the option of every handler
DROP_INS = "conf.d"  # beside the file
# Of a handler, too: values that whoever uses them reads, and that are tried when the file is read.
_READ_LATER: Mapping[str, Callable[[Any], object]] = {
    "default_capabilities": capability.chosen,
    "default_rlimits": limits.rlimits,
    "default_shm_size": limits.size,
    "default_unified": limits.unified,
    "min_memory": limits.size,
    "snapshot_options": overlayoptions.chosen,
}
_ARGUMENT = re.compile(r"--?([a-z][a-z0-9_-]*)(=[^\x00-\x1f\x7f]*)?")
_OURS = frozenset({"root", "log", "log-format", "log-fd", "systemd-cgroup", "bundle", "version"})
_ADDRESS = re.compile(r"([^:\s]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}")  # [::1]:10010
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_CNI_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.(conf|conflist|json)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where the server lives and how it speaks."""

    listen: str = "unix:///run/cri-server/cri-server.sock"
    root: Path = Path("/var/lib/cri-server")
    state: Path = Path("/run/cri-server")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"
    crio_socket: str = ""
    stream_address: str = "127.0.0.1:0"
    stream_idle_timeout: Seconds = 14400.0
    stream_vanished_timeout: Seconds = 120.0
    stream_tls_cert: str = ""
    stream_tls_key: str = ""
    stream_tls_client_ca: str = ""
    exec_abandoned_timeout: Patience = 0.0

    def __post_init__(self) -> None:
        """Refuse what no server can use, also when it comes from the command line."""
        if not self.listen.startswith("unix:///"):
            raise ConfigError(f"listen: {self.listen!r} is not unix:///PATH")
        for name in ("root", "state"):
            _check_absolute(name, getattr(self, name))
        if self.crio_socket:
            _check_absolute("crio_socket", Path(self.crio_socket))
        for name in ("stream_tls_cert", "stream_tls_key", "stream_tls_client_ca"):
            if value := getattr(self, name):
                _check_absolute(name, Path(value))
        if not _ADDRESS.fullmatch(self.stream_address):
            raise ConfigError(f"stream_address: {self.stream_address!r} is not HOST:PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """CNI: where its configuration and plugins are, and how long they may take (seconds)."""

    conf_dir: Path = Path("/etc/cni/net.d")
    bin_dirs: tuple[Path, ...] = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
    cache_dir: Path = Path("/var/lib/cni")
    add_timeout: Seconds = 210.0
    del_timeout: Seconds = 60.0
    status_timeout: Seconds = 10.0
    ip_pref: Literal["cni", "ipv4", "ipv6"] = "cni"


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Pulling and keeping images."""

    registry_config_dirs: tuple[Path, ...] = (
        Path("/etc/containerd/certs.d"),
        Path("/etc/docker/certs.d"),
    )
    pinned: tuple[str, ...] = ()
    max_parallel_downloads: Count = 3
    pull_progress_timeout: Seconds = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Handler:
    """One `[runtimes.NAME]`: an OCI runtime by command line, whose `args` are flags for each call,
    before the verb, or a containerd shim, which takes `options`. A `sandbox` that is not given is
    what the program needs.
    """

    kind: Literal["oci", "shim"] = "oci"
    path: str = ""
    dialect: Literal["", Dialect] = ""
    args: tuple[str, ...] = ()
    options: Mapping[str, shimtypes.Option] = field(default_factory=dict)
    sandbox: Literal["", "namespaces", "container"] = ""
    pod_annotations: tuple[str, ...] = ()  # globs of keys that reach the OCI runtime
    container_annotations: tuple[str, ...] = ()
    privileged_without_host_devices: bool | Literal[""] = ""  # "": with a kernel of the pod's own
    default_capabilities: tuple[str, ...] = capability.DEFAULT  # for capability.chosen()
    default_rlimits: str = limits.DEFAULT  # for limits.rlimits()
    default_shm_size: str = limits.SHM_SIZE  # for limits.size()
    default_pids_limit: Annotated[int, msgspec.Meta(ge=0, le=1 << 22)] = 0  # PID_MAX_LIMIT
    default_unified: Mapping[str, str] = field(default_factory=dict)  # for limits.unified()
    cgroup_writable: bool = False
    min_memory: str = "0"  # for limits.size()
    snapshot_options: tuple[str, ...] = ()  # for overlayoptions.chosen()
    cni_conf_dir: str = ""
    cni_conf_file: str = ""
    seccomp_profile: str = ""
    seccomp_audit: bool = False

    @staticmethod
    def allowed(globs: Collection[str], annotations: Mapping[str, str]) -> dict[str, str]:
        """Return the annotations whose keys match one of the globs; without globs, none."""
        return {
            key: value
            for key, value in annotations.items()
            if any(fnmatch.fnmatchcase(key, glob) for glob in globs)
        }

    def timeout(self, default: float) -> float:
        """Return how many seconds one call of the program may take."""
        return float(self.options.get(TIMEOUT, default))

    @property
    def shim_options(self) -> Mapping[str, str]:
        """What a containerd shim is told, as text."""
        return {k: shimtypes.text(v) for k, v in self.options.items() if k != TIMEOUT}

    @property
    def has_guest_kernel(self) -> bool:
        """Whether the containers of a pod run in a kernel that its sandbox container is."""
        return self.dialect in KERNELS

    @property
    def limits_pods(self) -> bool:
        """Whether limits hold for the whole of a pod alone, as in gVisor."""
        return self.dialect == "runsc"

    @property
    def is_machine(self) -> bool:
        """Whether a pod is a virtual machine, whose runtime takes what it needs of the pod from the
        sandbox's spec.
        """
        return self.dialect == "kata"

    @property
    def uses_host_stack(self) -> bool:
        """Whether the pod's network is that of its namespace on the host: with a guest kernel only
        where runsc is told to pass calls on (`--network=host`; the last one counts).
        """
        flags = (argument.lstrip("-").partition("=") for argument in self.args)
        asked = [value for name, _, value in flags if name == "network"]
        return not self.has_guest_kernel or asked[-1:] == ["host"]

    @property
    def joins_pids(self) -> bool:
        """Whether a container joins the sandbox's PID namespace by its path. runsc makes a new one
        for each path, and has a container that names none in the sandbox's (boot/loader.go).
        """
        return self.dialect != "runsc"

    @property
    def has_sandbox(self) -> bool:
        """Whether each pod has a sandbox container."""
        return self.sandbox == "container" or self.has_guest_kernel

    def __post_init__(self) -> None:
        if "/" in self.path:
            _check_absolute("path", Path(self.path))
        for key in ("cni_conf_dir", "seccomp_profile"):
            if value := getattr(self, key):
                _check_absolute(key, Path(value))
        if self.cni_conf_file and not _CNI_FILE.fullmatch(self.cni_conf_file):
            raise ConfigError(f"cni_conf_file: {self.cni_conf_file[:100]!r} is not NAME.conflist")
        if self.has_guest_kernel and self.sandbox == "namespaces":
            raise ConfigError(f"sandbox: {self.dialect} needs a sandbox container")
        for key in ("default_pids_limit", "default_unified"):
            if self.limits_pods and getattr(self, key):
                raise ConfigError(f"{key}: {self.dialect} cannot limit one container")
        if self.dialect and self.dialect not in _DIALECTS[self.kind]:
            known = ", ".join(_DIALECTS[self.kind])
            raise ConfigError(f"dialect: {self.dialect!r} is none of kind {self.kind} ({known})")
        if self.options:
            self._check_options()
        if self.args and self.kind == "shim":
            raise ConfigError("args: a containerd shim takes none, but options")
        for arg in self.args:
            _check_argument(arg)
        for key, read in _READ_LATER.items():
            try:
                read(getattr(self, key))
            except ValueError as e:
                raise ConfigError(f"{key}: {e}") from e

    def _check_options(self) -> None:
        known = shimtypes.options(self.dialect) if self.kind == "shim" else {}
        _refuse_unknown(self.options, (TIMEOUT, *known), "options")
        timeout = self.options.get(TIMEOUT, 1.0)
        if isinstance(timeout, bool | str) or not 0 < timeout <= _DAY:
            raise ConfigError(f"options: {TIMEOUT}: {timeout!r} is not seconds, at most a day")
        for key in self.options.keys() & known.keys():
            try:
                shimtypes.check(key, known[key], self.options[key])
            except ValueError as e:
                raise ConfigError(f"options: {e}") from e


PLAIN = Handler()


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """What holds for every container, and which handler serves a pod that names none."""

    default: str = ""
    cgroup_driver: CgroupDriver = "auto"
    exec_drain_timeout: Seconds = 2.0
    cdi_spec_dirs: tuple[Path, ...] = (Path("/etc/cdi"), Path("/var/run/cdi"))
    runtime_timeout: Seconds = 120.0
    cgroup_prefix: Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$")] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What ListPodSandboxMetrics tells."""

    groups: tuple[MetricGroup, ...] = get_args(MetricGroup)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole file."""

    server: Server = field(default_factory=Server)
    network: Network = field(default_factory=Network)
    images: Images = field(default_factory=Images)
    runtime: Runtime = field(default_factory=Runtime)
    metrics: Metrics = field(default_factory=Metrics)
    runtimes: Mapping[str, Handler] = field(default_factory=dict)
    drop_ins: Path | None = None  # the folder with more handlers, beside the file


class ConfigError(ValueError):
    """The configuration cannot be used; the message says where and why."""


SECTIONS = {
    "server": Server,
    "network": Network,
    "images": Images,
    "runtime": Runtime,
    "metrics": Metrics,
}


def load(path: Path | None) -> Config:
    """Read `path`; None or a missing file gives the defaults. Raises ConfigError."""
    document: Mapping[str, Any] = {}
    where = str(path)
    try:
        if path is not None:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        where = "defaults"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{where}: {e}") from e
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror}") from e
    folder = path.parent / DROP_INS if path is not None else None
    return with_handlers(
        dataclasses.replace(parse(document, where=where), drop_ins=folder), where=where
    )


def parse(document: Mapping[str, Any], *, where: str = "config") -> Config:
    """Turn a TOML document into a Config, without looking at the host. Raises ConfigError."""
    _refuse_unknown(document, (*SECTIONS, "runtimes"), where)
    sections = {n: _section(document.get(n, {}), k, f"{where}: [{n}]") for n, k in SECTIONS.items()}
    tables = _table(document.get("runtimes", {}), f"{where}: [runtimes]")
    handlers = {n: handler_of(n, table, f"{where}: [runtimes.{n}]") for n, table in tables.items()}
    return Config(**sections, runtimes=handlers)


def with_handlers(config: Config, *, where: str = "config") -> Config:
    """Fill in what the file leaves out: the handlers runc and crun where they are installed, and
    the binary of each by its name. Raises ConfigError.
    """
    installed = {n: Handler() for n in INSTALLED if shutil.which(n)}
    every = {**installed, **config.runtimes}
    runtimes = {n: completed(n, h, f"{where}: [runtimes.{n}]") for n, h in every.items()}
    return dataclasses.replace(config, runtimes=runtimes)


def completed(name: str, handler: Handler, where: str) -> Handler:
    """Return the handler with its program as found and its dialect. Raises ConfigError."""
    wanted = handler.path or name
    if handler.kind == "shim":
        wanted = _installed(shimtypes.binaries(wanted))
        dialect = handler.dialect or _dialect(shimtypes.program(wanted)) or "shim"
    else:
        dialect = handler.dialect or _dialect(Path(wanted).name) or _dialect(name) or "runc"
    try:
        return dataclasses.replace(handler, path=shutil.which(wanted) or wanted, dialect=dialect)
    except ConfigError as e:  # what is wrong only with this program
        raise ConfigError(f"{where}: {e}") from e


def _installed(programs: Sequence[str]) -> str:
    """Return the first that is there, the first of all when none is."""
    return next((p for p in programs if shutil.which(p)), programs[0])


def _dialect(name: str) -> Literal["", Dialect]:
    return next((known for known in get_args(Dialect) if known == name), "")


# -- from TOML to values -------------------------------------------------------------------------


def _section(table: Any, kind: type, where: str) -> Any:
    _refuse_unknown(table, _keys(kind), where)
    try:
        return msgspec.convert(table, kind, dec_hook=_decode)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{where}: {_explain(str(e), kind)}") from e


def handler_of(name: str, table: Any, where: str) -> Handler:
    """Turn one table into a Handler. Raises ConfigError, also for a name that is no file name: a
    folder is called by it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is not a handler name")
    found: Handler = _section(table, Handler, where)
    return found


def _refuse_unknown(table: Any, known: Collection[str], where: str) -> None:
    for key in _table(table, where):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a table")
    return value


def _keys(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind))


def _decode(kind: type, value: object) -> object:
    if kind is not Path or not isinstance(value, str):
        raise ValueError(f"Expected a path, got {value!r}")
    path = Path(value)
    if not path.is_absolute():
        raise ValueError(f"{value!r} is not an absolute path")
    return path


def _check_absolute(name: str, path: Path) -> None:
    if not path.is_absolute():
        raise ConfigError(f"{name}: {str(path)!r} is not an absolute path")


def _check_argument(arg: str) -> None:
    """Refuse what is no flag, and flags that are ours to give."""
    found = _ARGUMENT.fullmatch(arg)
    if found is None:
        raise ConfigError(f"args: {arg[:100]!r} is not --NAME or --NAME=VALUE")
    if found[1] in _OURS:
        raise ConfigError(f"args: {arg[:100]!r}: the server gives --{found[1]} itself")


def _explain(message: str, kind: type) -> str:
    """Turn "reason - at `$.key[0]`" into "key[0]: reason", with the choices where there are any."""
    reason, _, place = message.partition(" - at `$.")
    if not place:
        return reason
    key = place.removesuffix("`")
    hint = get_type_hints(kind).get(key)
    if get_origin(hint) is Literal:
        reason += f" (known: {', '.join(get_args(hint))})"
    return f"{key}: {reason}"
