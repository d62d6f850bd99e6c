# SPDX-License-Identifier: Apache-2.0
"""What a signal makes of a server that runs.

SIGTERM, SIGINT    it ends, its pods do not
SIGHUP             the configuration file is read again: log_level counts at once, for the rest
                   a restart is named; drop-ins need no signal (`reloading`)
SIGUSR1            every task is logged, with where it stands: for a server that seems to hang
"""

import asyncio
import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import structlog

from cri_server import config, logs

log = structlog.get_logger()


def handle(
    stop: asyncio.Event, settings: config.Config, reread: Callable[[], config.Config]
) -> None:
    """Handle them in the running loop; `reread` gives what `settings` would be now."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _read_again, settings, reread)
    loop.add_signal_handler(signal.SIGUSR1, _tell_tasks)


def _read_again(settings: config.Config, reread: Callable[[], config.Config]) -> None:
    try:
        found = reread()
    except (config.ConfigError, OSError) as e:
        log.error("configuration not read again", error=str(e))
        return
    logs.set_level(found.server.log_level)
    changed = [name for name in differences(settings, found) if name != "server.log_level"]
    log.warning(
        "configuration read again", log_level=found.server.log_level, needs_a_restart=changed
    )


def differences(before: config.Config, after: config.Config) -> list[str]:
    """Return the names of what differs, "network.conf_dir" or "runtimes.kata"."""
    one, other = (dataclasses.asdict(c) for c in (before, after))
    return [
        f"{section}.{name}"
        for section in (*config.SECTIONS, "runtimes")
        for name in sorted(one[section].keys() | other[section].keys())
        if one[section].get(name) != other[section].get(name)
    ]


def _tell_tasks() -> None:
    tasks = asyncio.all_tasks()
    log.warning("tasks", number=len(tasks))
    for task in tasks:
        log.warning("task", name=task.get_name(), at=list(places(task.get_coro())))


def places(awaited: object) -> Iterator[str]:
    """Yield where a coroutine stands, then what it waits for, and so on: "pods.py:186 Pods._run".

    Ends at what is no coroutine: a future, another task, a thread.
    """
    while awaited is not None:
        frame = _part(awaited, "frame")
        if frame is not None:
            code = frame.f_code
            yield f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_qualname}"
        awaited = _part(awaited, "await") or _part(awaited, "yieldfrom")


def _part(awaited: object, name: str) -> Any:
    """Return an attribute of a coroutine, a generator, or an asynchronous generator."""
    found = (getattr(awaited, f"{prefix}_{name}", None) for prefix in ("cr", "gi", "ag"))
    return next((part for part in found if part is not None), None)
