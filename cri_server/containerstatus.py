# SPDX-License-Identifier: Apache-2.0
"""How the record of a container looks to CRI: as an item of a list, and as a status. Pure."""

from cri_server import spec, state, updates
from cri_server.pb import api_pb2 as api


def visible(container: state.Container) -> bool:
    """Tell whether anybody may know of a container: once it is made, or has failed to."""
    return container.complete or bool(container.finished_at)


def matches(container: state.Container, selector: api.ContainerFilter) -> bool:
    """Tell whether a visible container matches every part of a filter; ids may be cut short."""
    if not visible(container) or not container.id.startswith(selector.id):
        return False
    if not container.pod_id.startswith(selector.pod_sandbox_id):
        return False
    if selector.HasField("state") and selector.state.state != container.state:
        return False
    labels = container.config.labels
    return all(labels.get(k) == v for k, v in selector.label_selector.items())


def item(container: state.Container) -> api.Container:
    """Return what a list shows."""
    return api.Container(
        id=container.id,
        pod_sandbox_id=container.pod_id,
        metadata=container.config.metadata,
        image=container.config.image,
        image_ref=container.image_id,
        image_id=container.image_id,
        state=container.state,
        created_at=container.created_at,
        labels=container.config.labels,
        annotations=container.config.annotations,
    )


def status(container: state.Container) -> api.ContainerStatus:
    """Return all that is known, with the limits that are in force."""
    wanted = container.config
    return api.ContainerStatus(
        id=container.id,
        metadata=wanted.metadata,
        state=container.state,
        created_at=container.created_at,
        started_at=container.started_at,
        finished_at=container.finished_at,
        exit_code=container.exit_code,
        image=_image_spec(container),
        image_ref=container.image_ref,
        image_id=container.image_id,
        reason=container.reason,
        message=container.message,
        labels=wanted.labels,
        annotations=wanted.annotations,
        mounts=wanted.mounts,
        log_path=container.log_path,
        resources=api.ContainerResources(linux=updates.in_force(container)),
        user=_user(container),
        stop_signal=spec.stop_signal_value(container.stop_signal),
    )


def _image_spec(container: state.Container) -> api.ImageSpec:
    asked = container.config.image
    return api.ImageSpec(
        image=container.image_name,
        annotations=asked.annotations,
        user_specified_image=asked.user_specified_image,
        runtime_handler=asked.runtime_handler,
        image_ref=asked.image_ref,
    )


def _user(container: state.Container) -> api.ContainerUser:
    return api.ContainerUser(
        linux=api.LinuxContainerUser(
            uid=container.uid, gid=container.gid, supplemental_groups=container.groups
        )
    )
