# SPDX-License-Identifier: Apache-2.0
"""The process of a container and of an exec: arguments, environment, working directory, limits,
identity.

Pure. The environment is a list in order of first appearance, each name once; what comes later wins.
"""

import re
from collections.abc import Iterable
from typing import cast

from cri_server import errors, limits
from cri_server.pb import api_pb2 as api
from cri_server.spec import annotations, checks, linux, oci, security, types, why

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UMASK = 0o022  # explicit, so that ours does not leak into containers
# Each process's own view: descriptors, root and cwd lead out of the container (CVE-2024-21626).
_PROCESS_LINKS = re.compile(r"/proc/(self|thread-self|[0-9]+)(/.*)?")


def container(wanted: types.ContainerInput) -> oci.Process:
    """Return the container's process."""
    context = wanted.security
    host = wanted.host
    why.cri("process.terminal", "tty")
    why.cri("process.noNewPrivileges", "linux.security_context.no_new_privs")
    process = oci.Process(
        terminal=wanted.config.tty,
        user=user(wanted.user),
        args=args(wanted.config, wanted.image),
        env=env(wanted),
        cwd=cwd(wanted.config, wanted.image),
        capabilities=security.capabilities(context, host=host, defaults=wanted.defaults),
        rlimits=rlimits(wanted),
        noNewPrivileges=context.no_new_privs,
        oomScoreAdj=linux.oom_score_adj(wanted.config.linux.resources, host),
    )
    if profile := security.apparmor(context, host):
        process["apparmorProfile"] = profile
    return process


def user(who: types.User) -> oci.User:
    why.default("process.user.umask", "the usual one, so that the server's own does not leak in")
    return oci.User(uid=who.uid, gid=who.gid, umask=UMASK, additionalGids=list(who.additional_gids))


def args(config: api.ContainerConfig, image: types.ImageConfig) -> list[str]:
    """Return the arguments: command replaces ENTRYPOINT and clears CMD, args replaces CMD."""
    vector: list[str] = []
    _add(vector, config.command, why.cri, "command")
    if not vector:
        _add(vector, _entrypoint(image), why.image, "config.Entrypoint")
    _add(vector, config.args, why.cri, "args")
    if not config.args and not config.command:
        _add(vector, image.cmd, why.image, "config.Cmd")
    if not vector or not vector[0]:
        raise errors.InvalidArgument("command: neither the request nor the image names one")
    return vector


def _entrypoint(image: types.ImageConfig) -> tuple[str, ...]:
    """Return the image's ENTRYPOINT: one empty word is how a Dockerfile takes away its base's."""
    return () if image.entrypoint == ("",) else image.entrypoint


def _add(vector: list[str], words: Iterable[str], source: why.Verb, field: str) -> None:
    for n, word in enumerate(words):
        source(f"process.args[{len(vector)}]", f"{field}[{n}]")
        vector.append(checks.text(word, "command"))


def env(wanted: types.ContainerInput) -> list[str]:
    """Return the environment: the image's, the request's over it, and PATH, TERM, HOSTNAME and HOME
    where neither has them. Images set HOSTNAME for the address to listen on.
    """
    why.default("process.env[PATH]", "where programs are, for an image that does not say")
    merged = {"PATH": DEFAULT_PATH}
    merged.update(image_env(wanted.image))
    if wanted.config.tty and "TERM" not in merged:
        why.default("process.env[TERM]", "config.tty: a terminal has a type")
        merged["TERM"] = "xterm"
    if wanted.hostname and "HOSTNAME" not in merged:
        why.default("process.env[HOSTNAME]", "the pod's host name, as shells and programs expect")
        merged["HOSTNAME"] = wanted.hostname
    merged.update(requested_env(wanted.config))
    if wanted.user.home and "HOME" not in merged:
        why.image("process.env[HOME]", "/etc/passwd", "the user's home there, else /")
        merged["HOME"] = wanted.user.home
    return [f"{name}={value}" for name, value in merged.items()]


def image_env(image: types.ImageConfig) -> Iterable[tuple[str, str]]:
    """Yield the image's variables.

    An entry without "=" is dropped: it must not pull in ours (CVE-2026-57231).
    """
    for n, entry in enumerate(image.env):
        name, equals, value = checks.text(entry, "image Env").partition("=")
        why.image(f"process.env[{name}]", f"config.Env[{n}]")
        if name and equals:
            yield name, value
        else:
            why.default(f"process.env[{name}]", "dropped: it is not NAME=VALUE", asked=entry)


def requested_env(config: api.ContainerConfig) -> Iterable[tuple[str, str]]:
    """Yield the request's variables: bytes in CRI, while the OCI spec carries UTF-8 only."""
    for n, pair in enumerate(config.envs):
        if not pair.key or "=" in pair.key:
            raise errors.InvalidArgument(f"envs: {pair.key[:80]!r} is not a variable's name")
        try:
            value = pair.value.decode("utf-8")
        except UnicodeDecodeError as e:
            raise errors.InvalidArgument(
                f"envs: the value of {pair.key[:80]!r} is not UTF-8"
            ) from e
        why.cri(f"process.env[{pair.key}]", f"envs[{n}]")
        yield checks.text(pair.key, "envs"), checks.text(value, f"envs: {pair.key[:80]}")


def cwd(config: api.ContainerConfig, image: types.ImageConfig) -> str:
    """Return the working directory: the request's, the image's, or "/"; see `check_cwd`."""
    if config.working_dir:
        why.cri("process.cwd", "working_dir")
        return check_cwd(checks.absolute(config.working_dir, "working_dir"))
    if image.working_dir:
        why.image("process.cwd", "config.WorkingDir")
        return check_cwd(checks.absolute(image.working_dir, "image WORKDIR"))
    why.default("process.cwd", "neither the request nor the image names a folder")
    return "/"


def check_cwd(path: str) -> str:
    """Return a normalised path unless it leads through a process's links in /proc."""
    if _PROCESS_LINKS.fullmatch(path):
        raise errors.InvalidArgument(f"working_dir: {path[:200]!r} belongs to a process")
    return path


def rlimits(wanted: types.ContainerInput) -> list[oci.Rlimit]:
    """Return the limits; defaults are lowered to what this host lets us set."""
    ceilings = wanted.host.rlimit_ceilings
    found = []
    for annotation, limit in annotations.rlimits(wanted):
        part = f"process.rlimits[{limit.type}]"
        if annotation:
            why.pod(part, f"annotations[{annotation}]", "let through by the handler")
        elif wanted.defaults.rlimits_key:
            why.handler(part, wanted.defaults.rlimits_key)
        else:
            why.default(part, "for every container, whatever the server's own limits are")
        found.append(_rlimit(limit, ceilings.get(limit.type, limit.hard), part))
    return found


def _rlimit(limit: limits.Rlimit, ceiling: int, part: str) -> oci.Rlimit:
    hard = min(limit.hard, ceiling)
    if hard < limit.hard:
        why.host(part, "nobody may go above this here", asked=limit.hard)
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
