# SPDX-License-Identifier: Apache-2.0
"""The command `cri-server`: arguments, configuration, then one of its commands."""

import argparse
import asyncio
import dataclasses
import os
import resource
import sys
from pathlib import Path

from cri_server import config, logs
from shim import process

DEFAULT_CONFIG = Path("/etc/cri-server/config.toml")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        settings = _settings(arguments)
    except (config.ConfigError, OSError) as e:
        return _refuse(e)
    try:
        status: int = arguments.run(settings, arguments)
    except config.ConfigError as e:  # what only the host could tell
        return _refuse(e)
    return status


def _refuse(error: Exception) -> int:
    print(f"cri-server: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cri-server", description="A CRI v1 container runtime.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve the CRI on a unix socket")
    serve.set_defaults(run=_serve)
    check = commands.add_parser(
        "check", help="tell what this host can and cannot do, and the remedy"
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_check)
    explain = commands.add_parser(
        "explain", help="tell where each part of a container or a pod came from"
    )
    _explain_arguments(explain)
    reset = commands.add_parser("reset", help="end all pods and the server, remove what it kept")
    _reset_arguments(reset)
    image = commands.add_parser("image", aliases=["images"], help="import and tag images")
    for command in (serve, check, explain, reset, *_image_commands(image)):
        _common(command)
    return parser


def _reset_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="how long a container may take to end (default: 30)",
    )
    parser.add_argument(
        "--force", action="store_true", help="also while a kubelet is connected to the server"
    )
    parser.set_defaults(run=_reset)


def _seconds(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return int(text)


def _image_commands(parser: argparse.ArgumentParser) -> tuple[argparse.ArgumentParser, ...]:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    load = commands.add_parser(
        "import", help="bring images here from an OCI or docker archive, through the server"
    )
    load.add_argument("file", metavar="FILE", help="the archive, compressed or not; - for stdin")
    load.add_argument("--name", default="", help="what its one image shall be called")
    load.set_defaults(run=_import)
    tag = commands.add_parser("tag", help="give an image that is here another name")
    tag.add_argument("image", metavar="IMAGE", help="a name or an id")
    tag.add_argument("name", metavar="NAME")
    tag.set_defaults(run=_tag)
    return load, tag


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "wanted",
        metavar="ID|NAME",
        help="the beginning of an id, [NAMESPACE/]POD, or [[NAMESPACE/]POD/]CONTAINER",
    )
    parser.add_argument(
        "prefix",
        metavar="PART",
        nargs="?",
        default="",
        help="only the parts that begin so, one line each: process.env, linux.n",
    )
    parser.add_argument("--diff", action="store_true", help="only what was asked for and not given")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_explain)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, help=f"TOML file (default: {DEFAULT_CONFIG}, if it exists)"
    )
    parser.add_argument("--listen", help="unix:///path of the socket")
    parser.add_argument("--root", type=Path, help="directory of what outlives a reboot")
    parser.add_argument("--state", type=Path, help="directory of what does not")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", choices=("console", "json"))


def _settings(arguments: argparse.Namespace) -> config.Config:
    """Read the file; what the command line says wins."""
    if arguments.config is not None and not arguments.config.exists():
        raise config.ConfigError(f"{arguments.config}: no such file")
    settings = config.load(arguments.config or DEFAULT_CONFIG)
    names = ("listen", "root", "state", "log_level", "log_format")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    return dataclasses.replace(settings, server=dataclasses.replace(settings.server, **given))


def _serve(settings: config.Config, arguments: argparse.Namespace) -> int:
    from cri_server import server  # grpc takes 70 ms to import; --help and check do not need it

    logs.configure(settings.server.log_level, settings.server.log_format)
    os.umask(0o022)
    process.keep_descriptors()
    _raise_file_limit()
    asyncio.run(server.serve(settings, lambda: _settings(arguments)))
    return 0


def _check(settings: config.Config, arguments: argparse.Namespace) -> int:
    from cri_server import check

    return asyncio.run(check.run(settings, as_json=arguments.json))


def _explain(settings: config.Config, arguments: argparse.Namespace) -> int:
    from cri_server import explain

    return explain.run(
        settings,
        arguments.wanted,
        prefix=arguments.prefix,
        diff=arguments.diff,
        as_json=arguments.json,
    )


def _reset(settings: config.Config, arguments: argparse.Namespace) -> int:
    from cri_server import reset

    return reset.run(settings, grace=arguments.grace, force=arguments.force)


def _import(settings: config.Config, arguments: argparse.Namespace) -> int:
    from cri_server import imagefiles

    return imagefiles.load(settings, arguments.file, arguments.name)


def _tag(settings: config.Config, arguments: argparse.Namespace) -> int:
    from cri_server import imagefiles

    return imagefiles.tag(settings, arguments.image, arguments.name)


def _raise_file_limit() -> None:
    """Take all the descriptors that we may have: each pod costs a few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _version() -> str:
    from importlib import metadata

    return f"cri-server {metadata.version('cri-server')}"


if __name__ == "__main__":
    sys.exit(main())
