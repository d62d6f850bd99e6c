# SPDX-License-Identifier: Apache-2.0
"""The plan of a container: all that is known of it before anything of it is made.

Pure values, put together by `containers` and read by whoever makes a part of the bundle. What a
plan leads to is told by `bundles`.
"""

import dataclasses
from collections.abc import Mapping

from cri_server import podfiles, spec, state
from cri_server.images import store as images
from cri_server.pb import api_pb2 as api


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ContainerPlan:
    """What a bundle is made from. `facts` are the host's for the pod's handler; `target_pid` is
    whose PID namespace is joined, 0 for none; `volumes` are the images that the config's mounts
    name, by id.
    """

    pod: state.Pod
    container: state.Container
    image: images.Image
    facts: spec.HostFacts
    target_pid: int = 0
    volumes: Mapping[str, images.Image] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> api.ContainerConfig:
        return self.container.config

    @property
    def security(self) -> api.LinuxContainerSecurityContext:
        return self.config.linux.security_context

    @property
    def ids(self) -> spec.IdMap | None:
        """What the pod's own user namespace maps."""
        return spec.ids(self.pod.config)

    @property
    def owner(self) -> tuple[int, int]:
        """Uid and gid of the container's root on the host."""
        return podfiles.root_of(self.pod)

    @property
    def labels(self) -> spec.SelinuxLabels:
        """The container's for SELinux."""
        pod = self.pod
        return spec.labels_of_container(self.security, pod.config, pod.selinux_level, self.facts)

    @property
    def pod_labels(self) -> spec.SelinuxLabels:
        """The pod's for SELinux."""
        return spec.labels_of_pod(self.pod.config, self.pod.selinux_level, self.facts)
