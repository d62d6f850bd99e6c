# SPDX-License-Identifier: Apache-2.0
"""A small image made from the host's static busybox, and its way into a registry.

Nothing is pulled from anywhere: one layer with busybox under the names of its applets, a few users
and a page for its httpd. The bytes depend on busybox alone, so digests stay the same from run to
run. Pushing is the four requests of the OCI distribution specification; no crash is survived, the
registry is a temporary one.
"""

import functools
import gzip
import hashlib
import http.client
import io
import json
import shutil
import subprocess
import tarfile
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_TYPES = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "link": tarfile.LNKTYPE,
    "symlink": tarfile.SYMTYPE,
    "fifo": tarfile.FIFOTYPE,
}
PASSWD = """root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/false
tester:x:1000:1000:tester:/home/tester:/bin/sh
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = "root:x:0:\nwww-data:x:33:\ntester:x:1000:\nstaff:x:50000:tester\nnobody:x:65534:\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One member of a layer: a folder, a file with `data`, a hard link `to` an earlier one, a
    symlink `to` anywhere, a FIFO.
    """

    name: str
    kind: str = "file"
    data: bytes = b""
    mode: int = 0o644
    to: str = ""
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A manifest and the blobs it names, by digest."""

    manifest: bytes
    config: bytes
    blobs: Mapping[str, bytes] = field(repr=False)

    @property
    def digest(self) -> str:
        """The digest of the manifest, for pulls by digest."""
        return digest(self.manifest)

    @property
    def id(self) -> str:
        """The image id that the CRI shows: the digest of the config."""
        return digest(self.config)


def digest(data: bytes) -> str:
    """Return the `sha256:…` name of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def busybox(*extra: Iterable[Entry], **config: Any) -> Image:
    """Make the test image; each `extra` is one more layer, `config` is laid over its config."""
    layers = [busybox_layer(), *map(tar, extra)]
    return image(layers, {"Env": [PATH], "Cmd": ["sh"], **config})


def image(layers: list[bytes], config: Mapping[str, Any]) -> Image:
    """Make an image of uncompressed tar `layers` and a config object, for linux on amd64."""
    packed = [_packed(layer) for layer in layers]
    config_blob = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "2024-01-01T00:00:00Z",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        }
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _descriptor(CONFIG, config_blob),
        "layers": [_descriptor(LAYER, blob) for blob in packed],
    }
    blobs = {digest(blob): blob for blob in (config_blob, *packed)}
    return Image(manifest=_json(manifest), config=config_blob, blobs=blobs)


@functools.lru_cache(maxsize=4)
def _packed(layer: bytes) -> bytes:
    return gzip.compress(layer, 6, mtime=0)


@functools.cache
def busybox_layer() -> bytes:
    """Return the layer with busybox, uncompressed: what other images stand on."""
    return tar(_busybox_entries())


def tar(entries: Iterable[Entry]) -> bytes:
    """Return the entries as an uncompressed layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            member = tarfile.TarInfo(entry.name)
            member.type, member.mode, member.linkname = _TYPES[entry.kind], entry.mode, entry.to
            member.size = len(entry.data)
            member.uid, member.gid, member.mtime = entry.uid, entry.gid, entry.mtime
            member.pax_headers = {f"SCHILY.xattr.{k}": v for k, v in entry.xattrs.items()}
            archive.addfile(member, io.BytesIO(entry.data))
    return out.getvalue()


def push(what: Image, address: str, name: str, tag: str) -> None:
    """Put an image into the registry at `address` ("host:port", plain HTTP) as `name`:`tag`."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        for blob_digest, blob in what.blobs.items():
            _push_blob(connection, name, blob_digest, blob)
        headers = {"Content-Type": MANIFEST}
        _request(connection, "PUT", f"/v2/{name}/manifests/{tag}", what.manifest, headers)
    finally:
        connection.close()


def _push_blob(
    connection: http.client.HTTPConnection, name: str, digest_: str, blob: bytes
) -> None:
    location = _request(connection, "POST", f"/v2/{name}/blobs/uploads/")
    target = urllib.parse.urlsplit(location)
    path = f"{target.path}?{target.query}&digest={digest_}"
    _request(connection, "PUT", path, blob, {"Content-Type": "application/octet-stream"})


def _request(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> str:
    connection.request(method, path, body, dict(headers or {}))
    answer = connection.getresponse()
    text = answer.read()
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {text[:200]!r}")
    return answer.headers.get("Location", "")


def _busybox_entries() -> Iterable[Entry]:
    program = busybox_path()
    folders = ("bin", "etc", "proc", "sys", "dev", "var", "var/www", "root", "home", "home/tester")
    for name in folders:
        yield Entry(name=name, kind="dir", mode=0o755)
    yield Entry(name="tmp", kind="dir", mode=0o1777)
    yield Entry(name="bin/busybox", data=program.read_bytes(), mode=0o755)
    applets = subprocess.run([program, "--list"], check=True, capture_output=True, text=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            yield Entry(name=f"bin/{applet}", kind="link", to="bin/busybox", mode=0o755)
    yield Entry(name="etc/passwd", data=PASSWD.encode())
    yield Entry(name="etc/group", data=GROUP.encode())
    yield Entry(name="var/www/index.html", data=b"hello from a pod\n")


def busybox_path() -> Path:
    """Return the host's busybox; it must be the static one (Debian's busybox-static)."""
    found = shutil.which("busybox")
    if found is None:
        raise RuntimeError("busybox is not installed (apt-get install busybox-static)")
    return Path(found)


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(blob), "size": len(blob)}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
