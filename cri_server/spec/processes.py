# SPDX-License-Identifier: Apache-2.0
"""The process of a container and of an exec: arguments, environment, working directory, limits,
identity.

Pure. The environment is a list in order of first appearance, each name once; what comes later wins.
"""

import re
from collections.abc import Iterable
from typing import cast

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks, linux, oci, security, types

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UMASK = 0o022  # explicit, so that ours does not leak into containers
# Each process's own view: descriptors, root and cwd lead out of the container (CVE-2024-21626).
_PROCESS_LINKS = re.compile(r"/proc/(self|thread-self|[0-9]+)(/.*)?")


def container(wanted: types.ContainerInput) -> oci.Process:
    """Return the container's process."""
    context = wanted.security
    host = wanted.host
    process = oci.Process(
        terminal=wanted.config.tty,
        user=user(wanted.user),
        args=args(wanted.config, wanted.image),
        env=env(wanted),
        cwd=cwd(wanted.config, wanted.image),
        capabilities=security.capabilities(context, host=host, defaults=wanted.defaults),
        rlimits=rlimits(wanted.defaults.rlimits, host),
        noNewPrivileges=context.no_new_privs,
        oomScoreAdj=linux.oom_score_adj(wanted.config.linux.resources, host),
    )
    if profile := security.apparmor(context, host):
        process["apparmorProfile"] = profile
    return process


def user(who: types.User) -> oci.User:
    return oci.User(uid=who.uid, gid=who.gid, umask=UMASK, additionalGids=list(who.additional_gids))


def args(config: api.ContainerConfig, image: types.ImageConfig) -> list[str]:
    """Return the arguments: command replaces ENTRYPOINT and clears CMD, args replaces CMD."""
    command = list(config.command) or list(image.entrypoint)
    arguments = list(config.args)
    if not arguments and not config.command:
        arguments = list(image.cmd)
    vector = [checks.text(a, "command") for a in (*command, *arguments)]
    if not vector or not vector[0]:
        raise errors.InvalidArgument("command: neither the request nor the image names one")
    return vector


def env(wanted: types.ContainerInput) -> list[str]:
    """Return the environment: PATH, the image's, TERM, HOSTNAME, the request's; HOME if unset."""
    merged = {"PATH": DEFAULT_PATH}
    merged.update(image_env(wanted.image))
    if wanted.config.tty:
        merged.setdefault("TERM", "xterm")
    if wanted.hostname:
        merged["HOSTNAME"] = wanted.hostname
    merged.update(requested_env(wanted.config))
    if wanted.user.home:
        merged.setdefault("HOME", wanted.user.home)
    return [f"{name}={value}" for name, value in merged.items()]


def image_env(image: types.ImageConfig) -> Iterable[tuple[str, str]]:
    """Yield the image's variables.

    An entry without "=" is dropped: it must not pull in ours (CVE-2026-57231).
    """
    for entry in image.env:
        name, equals, value = checks.text(entry, "image Env").partition("=")
        if name and equals:
            yield name, value


def requested_env(config: api.ContainerConfig) -> Iterable[tuple[str, str]]:
    """Yield the request's variables: bytes in CRI, while the OCI spec carries UTF-8 only."""
    for pair in config.envs:
        if not pair.key or "=" in pair.key:
            raise errors.InvalidArgument(f"envs: {pair.key[:80]!r} is not a variable's name")
        try:
            value = pair.value.decode("utf-8")
        except UnicodeDecodeError as e:
            raise errors.InvalidArgument(
                f"envs: the value of {pair.key[:80]!r} is not UTF-8"
            ) from e
        yield checks.text(pair.key, "envs"), checks.text(value, f"envs: {pair.key[:80]}")


def cwd(config: api.ContainerConfig, image: types.ImageConfig) -> str:
    """Return the working directory: the request's, the image's, or "/"; see `check_cwd`."""
    if config.working_dir:
        return check_cwd(checks.absolute(config.working_dir, "working_dir"))
    return check_cwd(checks.absolute(image.working_dir or "/", "image WORKDIR"))


def check_cwd(path: str) -> str:
    """Return a normalised path unless it leads through a process's links in /proc."""
    if _PROCESS_LINKS.fullmatch(path):
        raise errors.InvalidArgument(f"working_dir: {path[:200]!r} belongs to a process")
    return path


def rlimits(limits: Iterable[types.Rlimit], host: types.HostFacts) -> list[oci.Rlimit]:
    """Return the limits, lowered to what this host lets us set."""
    return [_rlimit(limit, host.rlimit_ceilings.get(limit.type, limit.hard)) for limit in limits]


def _rlimit(limit: types.Rlimit, ceiling: int) -> oci.Rlimit:
    hard = min(limit.hard, ceiling)
    return oci.Rlimit(type=limit.type, soft=min(limit.soft, hard), hard=hard)


def exec_process(wanted: types.ExecInput) -> oci.Process:
    """Return the process of an exec: the container's in all but the command and the terminal."""
    if not wanted.cmd or not wanted.cmd[0]:
        raise errors.InvalidArgument("cmd: is empty")
    process = cast("oci.Process", dict(wanted.process))  # it is our own spec, read back
    process["args"] = [checks.text(a, "cmd") for a in wanted.cmd]
    process["terminal"] = wanted.tty
    variables = list(process.get("env", ()))
    if wanted.tty and not any(v.startswith("TERM=") for v in variables):
        variables.append("TERM=xterm")
    process["env"] = variables
    return process
