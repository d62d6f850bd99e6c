# SPDX-License-Identifier: Apache-2.0
"""Mounts whose source is an image (CRI Mount.image, KEP-4639): what may be asked for.

Pure. That the image is there, its mount and the sub path are `cri_server.imagevolumes`. The kubelet
gives a pod the reason ImageVolumeMountFailed when an error *begins* with that word (behaviour.md
§2.4), so whatever can go wrong with such a mount goes through `explained`.
"""

import contextlib
from collections.abc import Iterator

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks

PREFIX = "ImageVolumeMountFailed"
# Executing is allowed, as containerd, CRI-O and critest have it now. The author of the data is not
# always the author of the container: set-id programs and device nodes of the one are not for the
# other.
OPTIONS = ("nosuid", "nodev")


def requests(config: api.ContainerConfig) -> list[api.Mount]:
    """Return the mounts that ask for an image."""
    return [m for m in config.mounts if m.HasField("image")]


def key(mount: api.Mount) -> str:
    """Return what the source of a mount is known by: its host path, which begins with "/", or image
    and sub path, which do not.
    """
    if mount.HasField("image"):
        return f"image {mount.image.image} {mount.image_sub_path}"
    return mount.host_path


@contextlib.contextmanager
def explained(container_path: str) -> Iterator[None]:
    """Let every error of the block begin with PREFIX and the mount's target."""
    where = f"{PREFIX}: mount {container_path[:200]!r}"
    try:
        yield
    except errors.CriError as e:
        raise type(e)(f"{where}: {e.message}") from e
    except OSError as e:
        raise errors.Internal(f"{where}: {e.strerror}") from e


def explained_where_image(mount: api.Mount) -> contextlib.AbstractContextManager[None]:
    """Do as `explained` for the mount of an image, nothing for others."""
    if mount.HasField("image"):
        return explained(mount.container_path)
    return contextlib.nullcontext()


def check(mount: api.Mount) -> None:
    """Refuse an image volume that can never be; InvalidArgument names the field.

    That it must be readonly is containerd's rule, and critest's: to mount it read-only against the
    request would be silence.
    """
    checks.unsupported(bool(mount.host_path), "host_path", "must be empty beside image")
    checks.unsupported(not mount.image.image, "image.image", "is empty")
    checks.unsupported(not mount.readonly, "readonly", "an image is mounted read-only alone")
    private = mount.propagation == api.MountPropagation.PROPAGATION_PRIVATE
    checks.unsupported(not private, "propagation", "an image has no mounts to pass on")
    _check_sub_path(mount.image_sub_path)


def _check_sub_path(path: str) -> None:
    """Refuse what no pod can ask for (core/v1 VolumeMount.subPath: relative, without "..")."""
    checks.text(path, "image_sub_path")
    outside = path.startswith("/") or ".." in path.split("/")
    checks.unsupported(outside, "image_sub_path", f"{path[:200]!r} is not a path in the image")
