# SPDX-License-Identifier: Apache-2.0
"""The OCI runtime spec, by pure functions of CRI messages, image configs and host facts.

    validate_sandbox, validate_container    refuse what can never work, before anything is done
    container                               the config.json of a container
    sandbox                                 the config.json of a sandbox container
    process                                 the process of an exec
    resources, merged, restored             the limits of a container, and of an update
    sysctls, pid_mode, user_request, …      what pods and containers must know of a request before
    they can ask for a spec

Every field of PodSandboxConfig and ContainerConfig is either honoured or refused with an
InvalidArgument that names it.
"""

from cri_server import capability, errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import (
    annotations,
    cdi,
    cdifile,
    checks,
    devices,
    imagevolumes,
    linux,
    mounts,
    oci,
    pod,
    processes,
    seccomp,
    security,
    selinux,
    signals,
    types,
    updates,
    userns,
    why,
)
from cri_server.spec.types import (
    ContainerInput,
    Defaults,
    DeviceNode,
    ExecInput,
    HostFacts,
    IdMap,
    ImageConfig,
    Injection,
    Node,
    PodFiles,
    SandboxInput,
    SelinuxPolicy,
    User,
    UserRequest,
)

__all__ = [
    "CAPABILITIES",
    "IMAGE_OPTIONS",
    "LIMITS",
    "ContainerInput",
    "Defaults",
    "DeviceNode",
    "ExecInput",
    "HostFacts",
    "IdMap",
    "ImageConfig",
    "Injection",
    "Labels",
    "Node",
    "PodFiles",
    "Resources",
    "SandboxInput",
    "SelinuxPolicy",
    "User",
    "UserRequest",
    "apparmor_profile",
    "asked_level",
    "capability_names",
    "cdi_requests",
    "cdifile",
    "check_container_annotations",
    "check_pod_annotations",
    "check_pod_update",
    "check_sentry_sysctls",
    "check_update",
    "check_user",
    "container",
    "device_requests",
    "explained",
    "id_mapped",
    "ids",
    "image_mounts",
    "image_volumes",
    "labels_of_container",
    "labels_of_pod",
    "merged",
    "oom_score_adj",
    "own_ipc",
    "pid_mode",
    "process",
    "resources",
    "resources_at_start",
    "restored",
    "sandbox",
    "seccomp_path",
    "shm_size",
    "source_key",
    "stop_signal",
    "stop_signal_value",
    "sysctls",
    "user_request",
    "validate_container",
    "validate_sandbox",
    "why",
    "with_volumes",
]

CAPABILITIES = capability.ALL
IMAGE_OPTIONS = imagevolumes.OPTIONS
LIMITS = oci.LIMITS
Resources = oci.Resources
validate_sandbox = pod.validate
sandbox = pod.sandbox
sysctls = pod.sysctls
check_sentry_sysctls = pod.check_sentry_sysctls
pid_mode = pod.pid_mode
own_ipc = pod.own_ipc
ids = userns.ids
id_mapped = userns.mapped
check_user = userns.check_user
process = processes.exec_process
resources = linux.resources
resources_at_start = linux.at_start
oom_score_adj = linux.oom_score_adj
merged = updates.merged
check_update = updates.check
check_pod_annotations = annotations.check_pod
check_container_annotations = annotations.check_container
shm_size = annotations.shm_size
check_pod_update = updates.check_pod
restored = updates.restored
user_request = security.user_request
apparmor_profile = security.apparmor
seccomp_path = security.seccomp_path
SelinuxLabels = selinux.SelinuxLabels
asked_level = selinux.asked_level
labels_of_pod = selinux.of_sandbox
labels_of_container = selinux.of_container
capability_names = security.capability_names
device_requests = devices.requests
cdi_requests = cdi.requests
image_mounts = imagevolumes.requests
source_key = imagevolumes.key
explained = imagevolumes.explained
image_volumes = mounts.image_volumes
with_volumes = mounts.with_volumes
stop_signal = signals.stop_signal
stop_signal_value = signals.stop_signal_value


def container(wanted: types.ContainerInput) -> oci.Spec:
    """Return the spec of a container. Its seccomp part is shared between calls: do not change it.

    Raises InvalidArgument as `validate_container` does, and for a Localhost seccomp file that holds
    no profile.
    """
    main = processes.container(wanted)
    why.default(
        "ociVersion", "the oldest that has all we use: crun 1.8 of Debian 12 knows no newer"
    )
    why.image("root.path", "rootfs.diff_ids", "its layers, below a writable one")
    why.cri("root.readonly", "linux.security_context.readonly_rootfs")
    document = oci.Spec(
        ociVersion=oci.VERSION,
        process=main,
        root=oci.Root(path=wanted.rootfs, readonly=wanted.security.readonly_rootfs),
        mounts=mounts.mounts(wanted),
        annotations=_annotations(wanted),
        linux=linux.linux(wanted, main["capabilities"]["bounding"]),
    )
    if wanted.cdi is not None:
        cdi.inject(document, wanted.cdi, wanted)
    level = wanted.selinux_level
    selinux.label(
        document, selinux.of_container(wanted.security, wanted.sandbox, level, wanted.host)
    )
    return document


def _annotations(wanted: types.ContainerInput) -> dict[str, str]:
    image = wanted.config.image
    return {
        **wanted.annotations,
        **pod.annotations("container", wanted.pod_id, wanted.sandbox),
        **pod.scope_annotations(wanted.cgroups_path),
        **pod.noted_annotations(
            {
                "io.kubernetes.cri.container-name": wanted.config.metadata.name,
                "io.kubernetes.cri.image-name": image.user_specified_image or image.image,
            }
        ),
    }


def validate_container(
    config: api.ContainerConfig,
    sandbox_config: api.PodSandboxConfig,
    host: types.HostFacts,
    *,
    image: types.ImageConfig,
) -> None:
    """Refuse a container that can never be made as asked.

    Raises InvalidArgument; the message names the field.

    What only a look at the host or the image's files can tell is left to `sources` and `rootfs`.
    """
    _check_names(config)
    context = config.linux.security_context
    security.check_privileged(context, sandbox_config)
    held = security.capabilities(context, host=host, defaults=types.Defaults())
    security.user_request(config, image)
    security.apparmor(context, host)
    selinux.check(context.selinux_options)
    _check_seccomp(context, held, host)
    pod.check_namespaces(config, sandbox_config)
    mounts.check(config, host)
    mounts.image_volumes(config, image)
    devices.requests(config)
    cdi.requests(config)
    linux.resources(config.linux.resources, host)
    linux.oom_score_adj(config.linux.resources, host)
    linux.paths(context)
    _check_process(config, image)
    signals.stop_signal(config, image)


def _check_names(config: api.ContainerConfig) -> None:
    if not config.metadata.name:
        raise errors.InvalidArgument("config.metadata.name is missing")
    checks.line(config.metadata.name, "metadata.name")
    if not config.image.image:
        raise errors.InvalidArgument("config.image.image is missing")
    checks.unsupported(config.HasField("windows"), "windows", "this is Linux")


def _check_seccomp(
    context: api.LinuxContainerSecurityContext, held: oci.Capabilities, host: types.HostFacts
) -> None:
    any_profile = {"defaultAction": seccomp.ERRNO}  # the file is read later
    security.seccomp_profile(
        context,
        held=held["bounding"],
        host=host,
        localhost=any_profile,
        defaults=types.Defaults(),
    )


def _check_process(config: api.ContainerConfig, image: types.ImageConfig) -> None:
    processes.args(config, image)
    processes.cwd(config, image)
    for variables in (processes.image_env(image), processes.requested_env(config)):
        dict(variables)
