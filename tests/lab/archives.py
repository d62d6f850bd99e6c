# SPDX-License-Identifier: Apache-2.0
"""Image archives as `docker save`, `ctr images export` and skopeo write them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cri_server.images import archive
from tests.lab import image


def layout(
    path: Path,
    *images: tuple[str, image.Image],
    key: str = archive.NAME,
    more: Mapping[str, bytes] | None = None,
) -> Path:
    """Write an OCI layout; each image has its name in the annotation `key`, "" for none;
    `more` are further files, or others of the same name.
    """
    blobs: dict[str, bytes] = {}
    for _, made in images:
        blobs |= {**made.blobs, made.digest: made.manifest}
    entries = [entry(made, {key: name} if name else {}) for name, made in images]
    index = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index}
    files |= {f"blobs/{digest.replace(':', '/')}": data for digest, data in blobs.items()}
    return write(path, {**files, **(more or {})})


def entry(made: image.Image, annotations: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Return what an index says of an image."""
    return {
        "mediaType": image.MANIFEST,
        "digest": made.digest,
        "size": len(made.manifest),
        "annotations": dict(annotations),
        **more,
    }


def docker(path: Path, names: Iterable[str], layers: Iterable[bytes], config: bytes) -> Path:
    """Write one image as docker did until version 24, but without the folders."""
    files = {f"{image.digest(layer)[7:]}.tar": layer for layer in layers}
    saved = {"Config": "config.json", "RepoTags": list(names), "Layers": list(files)}
    said = json.dumps([saved]).encode()
    return write(path, {**files, "config.json": config, "manifest.json": said})


def write(path: Path, files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> Path:
    """Write files, and symlinks, as a tar."""
    entries = [image.Entry(name=name, data=data) for name, data in files.items()]
    entries += [image.Entry(name=n, kind="symlink", to=to) for n, to in (links or {}).items()]
    path.write_bytes(image.tar(entries))
    return path
