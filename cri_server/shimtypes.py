# SPDX-License-Identifier: Apache-2.0
"""What a `[runtimes.NAME]` may say of a containerd shim: which binary, and which options.

Pure. Names are those of containerd's own configuration, so that a section of it can be carried
over: `runtime_type` io.containerd.NAME.VERSION, and the keys of `options`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

_RUNTIME_TYPE = re.compile(r"[a-z0-9-]+\.[a-z0-9-]+\.([a-z0-9-]+)\.(v[0-9]+)")
_BINARY = re.compile(r"containerd-shim-([a-z0-9]+).*")
_MOST = 1 << 32

Option = bool | int | float | str

# Of runc's shim (containerd.runc.v1.Options); state and cgroup driver are ours to say.
_RUNC: Mapping[str, type] = {
    "BinaryName": str, "NoPivotRoot": bool, "NoNewKeyring": bool, "ShimCgroup": Path,
    "IoUid": int, "IoGid": int, "CriuImagePath": Path, "CriuWorkPath": Path,
}  # fmt: skip
# Of all others (runtimeoptions.v1.Options).
_OTHERS: Mapping[str, type] = {"ConfigPath": Path, "ConfigBody": str, "TypeUrl": str}
_KINDS = {
    bool: "true or false",
    int: "a whole number from 0",
    str: "a text",
    Path: "an absolute path",
}


def binaries(wanted: str) -> tuple[str, ...]:
    """Return the programs that a runtime type, a path or a handler's name may mean, the first that
    is installed counts: runc's shim and kata's are called -v2, those of gVisor and runwasi -v1.
    """
    if found := _RUNTIME_TYPE.fullmatch(wanted):
        return (f"containerd-shim-{found[1]}-{found[2]}",)
    if "/" in wanted or wanted.startswith("containerd-shim-"):
        return (wanted,)
    return (f"containerd-shim-{wanted}-v2", f"containerd-shim-{wanted}-v1")


def program(path: str) -> str:
    """Return what a shim is a shim of, by its file name: "kata" of containerd-shim-kata-qemu-v2."""
    return _BINARY.sub(r"\1", Path(path).name)


def options(dialect: str) -> Mapping[str, type]:
    """Return the options of a shim; of all that there are while its dialect is not known."""
    if not dialect:
        return {**_RUNC, **_OTHERS}
    return _RUNC if dialect == "runc" else _OTHERS


def check(key: str, kind: type, value: Option) -> None:
    """Raise ValueError for a value that an option cannot have."""
    if kind is Path:
        fits = isinstance(value, str) and value.startswith("/")
    elif kind is int:
        fits = type(value) is int and 0 <= value < _MOST
    else:
        fits = type(value) is kind
    if not fits:
        raise ValueError(f"{key}: {value!r} is not {_KINDS[kind]}")


def text(value: Option) -> str:
    """Return an option as our shim is told it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
