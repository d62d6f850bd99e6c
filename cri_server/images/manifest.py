# SPDX-License-Identifier: Apache-2.0
"""The JSON documents of an image: index, manifest, config (OCI image-spec, Docker schema 2). Pure.

A document is what its own bytes say, never what a Content-Type header says: one that could be read
both as an index and as a manifest is refused (GHSA-xmmx-7jpf-fx42). Digests become file names, so
they are checked here. `urls` of descriptors are ignored: layers come from the registry of the image
and from nowhere else.
"""

import hashlib
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from cri_server import errors, spec

MAX_DOCUMENT: Final = 4 << 20  # bytes, as in the peers
MAX_LAYERS: Final = 500  # what overlayfs stacks
MAX_USER: Final = 256  # characters of `User`: two names or numbers, and every list repeats them

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
SCHEMA_1: Final = "application/vnd.docker.distribution.manifest.v1"

_CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_LAYERS = (
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_DIFF_ID = re.compile(r"sha256:[0-9a-f]{64}")
_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
}
T = TypeVar("T")


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A pointer to a blob. Sizes are what the registry promised: a bound, until the writer has
    counted."""

    media_type: str = ""
    digest: str
    size: int
    platform: "Platform | None" = None


class Platform(msgspec.Struct, frozen=True, kw_only=True, rename={"os_version": "os.version"}):
    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = ""

    def runs_on(self, machine: "Platform") -> bool:
        """Say whether this machine can run it; a variant that it lacks is for `choose` to see."""
        return (self.os, self.architecture) == (machine.os, machine.architecture)

    def __str__(self) -> str:
        return "/".join(p for p in (self.os, self.architecture, self.variant) if p)


class Index(msgspec.Struct, frozen=True, kw_only=True):
    manifests: tuple[Descriptor, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest as it is written: Go says null for a list that is empty."""

    config: Descriptor
    layers: tuple[Descriptor, ...] | None = None


class _Process(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    user: str | None = None
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None
    volumes: dict[str, Any] | None = None


class _RootFs(msgspec.Struct, frozen=True, kw_only=True):
    diff_ids: tuple[str, ...] | None = None


class _Config(msgspec.Struct, frozen=True, kw_only=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""
    config: _Process | None = None
    rootfs: _RootFs | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What is used of a config: the process to run, verbatim, and the layers, bottom first."""

    process: spec.ImageConfig
    platform: Platform
    diff_ids: tuple[str, ...]


# ---- reading


def parse(body: bytes) -> Index | Manifest:
    """Read what a reference resolved to; `registry` has checked its type.

    Raises InvalidArgument for everything that is not an image.
    """
    document = _decode(body, dict[str, msgspec.Raw], "manifest")
    keys = {key for key, value in document.items() if bytes(value) != b"null"}
    if "manifests" in keys and ("layers" in keys or "config" in keys):
        raise errors.InvalidArgument("the document is an index and a manifest at once")
    if "manifests" in keys:
        return _checked_index(_decode(body, Index, "index"))
    said = _decode(body, _Manifest, "manifest")
    return _checked_manifest(Manifest(config=said.config, layers=said.layers or ()))


def parse_config(body: bytes, layers: int) -> Config:
    """Read the config of an image with so many layers. Raises InvalidArgument."""
    config = _decode(body, _Config, "config")
    diff_ids = (config.rootfs or _RootFs()).diff_ids or ()
    if len(diff_ids) != layers:
        raise errors.InvalidArgument(
            f"the config has {len(diff_ids)} diff ids, the manifest {layers} layers"
        )
    for diff_id in diff_ids:
        if not _DIFF_ID.fullmatch(diff_id):
            raise errors.InvalidArgument(f"diff id {diff_id[:80]!r} is not a sha256 digest")
    process = _process(config.config)
    if len(process.user) > MAX_USER:
        raise errors.InvalidArgument(
            f"the config's User has {len(process.user)} characters, more than {MAX_USER}"
        )
    platform_ = Platform(os=config.os, architecture=config.architecture, variant=config.variant)
    return Config(process=process, platform=platform_, diff_ids=diff_ids)


def _process(said: _Process | None) -> spec.ImageConfig:
    process = said or _Process()
    return spec.ImageConfig(
        user=process.user or "",
        env=process.env or (),
        entrypoint=process.entrypoint or (),
        cmd=process.cmd or (),
        working_dir=process.working_dir or "",
        stop_signal=process.stop_signal or "",
        labels=process.labels or {},
        volumes=tuple(process.volumes or ()),
    )


def _decode(body: bytes, kind: type[T], name: str) -> T:
    if len(body) > MAX_DOCUMENT:
        raise errors.ResourceExhausted(
            f"the {name} of the image is larger than {MAX_DOCUMENT} bytes"
        )
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        raise errors.InvalidArgument(f"the {name} of the image is malformed: {e}") from e


def _checked_index(index: Index) -> Index:
    for descriptor in index.manifests:
        check(descriptor)
    return index


def _checked_manifest(manifest: Manifest) -> Manifest:
    config, layers = manifest.config, manifest.layers
    if config.media_type and config.media_type not in _CONFIGS:
        raise errors.InvalidArgument(
            f"not a container image: its config is {config.media_type[:100]!r}"
        )
    if len(layers) > MAX_LAYERS:
        raise errors.InvalidArgument(f"{len(layers)} layers are more than {MAX_LAYERS}")
    for descriptor in (config, *layers):
        check(descriptor)
    for layer in layers:
        kind = layer.media_type
        if kind and (not kind.startswith(_LAYERS) or kind.endswith("+encrypted")):
            raise errors.InvalidArgument(f"a layer of type {kind[:100]!r} is not supported")
    if config.size > MAX_DOCUMENT:
        raise errors.ResourceExhausted(f"the config of the image has {config.size} bytes")
    return manifest


def check(descriptor: Descriptor) -> None:
    """Refuse a digest that is none: it becomes a part of paths and URLs (CVE-2024-3727)."""
    if not _DIGEST.fullmatch(descriptor.digest):
        raise errors.InvalidArgument(f"{descriptor.digest[:80]!r} is not a digest")
    if not 0 <= descriptor.size < 1 << 62:
        raise errors.InvalidArgument(f"a blob of {descriptor.size} bytes")


# ---- choosing


def host_platform() -> Platform:
    """Return the platform of this machine, as Go names it."""
    machine = platform.machine()
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform(os="linux", architecture=architecture, variant=variant)


def choose(index: Index, wanted: Platform) -> Descriptor:
    """Return the best manifest for a platform. Raises NotFound, which names those that there are.

    An arm/v7 machine runs v6 and v5 too, the nearest is the best. Attestations (unknown/unknown)
    are no images. One that does not say what it is for is taken when nothing else fits: `platform`
    is optional (OCI image-spec, image-index.md), and the config will tell.
    """
    ranked = [(_rank(d.platform, wanted), d) for d in index.manifests]
    fitting = [(rank, d) for rank, d in ranked if rank is not None]
    fitting = fitting or [(0, d) for d in index.manifests if _may_be_any(d)]
    if not fitting:
        there = {str(d.platform) for d in index.manifests if d.platform}
        names = ", ".join(sorted(there - {"unknown/unknown"})) or "none"
        raise errors.NotFound(f"no image for platform {wanted}; available: {names}"[:1000])
    return min(fitting, key=lambda pair: pair[0])[1]


def _may_be_any(descriptor: Descriptor) -> bool:
    """Say whether an entry is an image that does not say what it is for."""
    kinds = ("", OCI_MANIFEST, DOCKER_MANIFEST)
    return descriptor.platform in (None, Platform()) and descriptor.media_type in kinds


def _rank(offered: Platform | None, wanted: Platform) -> int | None:
    """Return how far from perfect an offer is, None when it does not run here."""
    if offered is None or not offered.runs_on(wanted):
        return None
    default = {"arm": "v7", "arm64": "v8", "amd64": "v1"}.get(wanted.architecture, "")
    theirs, ours = (_level(v or default) for v in (offered.variant, wanted.variant))
    if theirs > ours:
        return None
    return ours - theirs


def _level(variant: str) -> int:
    number = variant.removeprefix("v")
    return int(number) if number.isdecimal() and len(number) < 4 else 0


# ---- keys


def chain(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """Return the hex of the chain id of every layer (OCI image-spec, config.md, "Layer
    ChainID")."""
    ids: list[str] = []
    for diff_id in diff_ids:
        text = f"{ids[-1]} {diff_id}" if ids else diff_id
        ids.append(f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if ids else diff_id)
    return tuple(i.removeprefix("sha256:") for i in ids)
