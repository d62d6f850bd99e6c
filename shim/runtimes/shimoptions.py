# SPDX-License-Identifier: Apache-2.0
"""The options of a containerd shim: from the strings of a handler to the message that it unpacks.

runc's shim takes containerd.runc.v1.Options; all others take runtimeoptions.v1.Options, which names
a configuration file of theirs. Keys are spelled as in containerd's own configuration (BinaryName,
ConfigPath). `cri_server.config` knows the same keys.

What nobody has said and a shim must know is added: runsc's, until 2025, refuses a file whose
format is not named (gVisor pkg/shim/v1), and runwasi's learn from a TOML text that cgroups are
systemd's (containerd-shimkit, sandbox/shim/local.rs).
"""

import re
from collections.abc import Mapping

from google.protobuf import any_pb2
from google.protobuf.message import Message

from shim import errors
from shim.pb.containerd import runc_options_pb2, runtime_options_pb2

PREFIX = "shim."  # of the keys that are for the shim; the others are for us
_OF_RUNSC = "io.containerd.runsc.v1.options"
_SYSTEMD = "SystemdCgroup = true\n"


def packed(
    options: Mapping[str, str], *, state: str, owner: tuple[int, int] = (0, 0)
) -> any_pb2.Any | None:
    """Return the options for a shim's Create, None when there are none to give.

    runc keeps its state below `state`, its cgroups are systemd's when the driver is, and its pipes
    belong to `owner`, the root of a user namespace, unless the options say whose they are. Raises
    InvalidArgument for a key or value that the shim does not take.
    """
    wanted = _completed(options)
    if options.get("dialect") == "runc":
        message: Message = runc_options_pb2.Options(
            root=state,
            systemd_cgroup=options.get("cgroup_driver") == "systemd",
            io_uid=owner[0],
            io_gid=owner[1],
        )
    elif wanted:
        message = runtime_options_pb2.Options()
    else:
        return None
    for key, value in wanted.items():
        _set(message, key, value)
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def at_start(options: Mapping[str, str]) -> bool:
    """Say whether a shim needs its options at `start` too: runc's, to join a cgroup, is on its way
    from there (containerd cmd/containerd-shim-runc-v2/manager).
    """
    return options.get("dialect") == "runc" and bool(options.get(f"{PREFIX}ShimCgroup"))


def _completed(options: Mapping[str, str]) -> Mapping[str, str]:
    """Return what is for the shim, with what it must know."""
    wanted = {k.removeprefix(PREFIX): v for k, v in options.items() if k.startswith(PREFIX)}
    dialect, is_systemd = options.get("dialect"), options.get("cgroup_driver") == "systemd"
    if dialect == "runsc" and wanted.get("ConfigPath"):
        return {"TypeUrl": _OF_RUNSC, **wanted}
    if dialect == "shim" and is_systemd and not wanted.keys() & {"ConfigPath", "ConfigBody"}:
        return {"ConfigBody": _SYSTEMD, **wanted}
    return wanted


def _set(message: Message, key: str, value: str) -> None:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    old = getattr(message, name, None)
    try:
        match old:
            case bool():
                setattr(message, name, {"true": True, "false": False}[value.lower()])
            case int():
                setattr(message, name, int(value))
            case bytes():
                setattr(message, name, value.encode())
            case str():
                setattr(message, name, value)
            case _:
                raise errors.InvalidArgument(f"options: this shim takes no {key!r}")
    except (ValueError, KeyError):
        raise errors.InvalidArgument(f"options: {key} = {value!r} does not fit") from None
