# SPDX-License-Identifier: Apache-2.0
"""Do something quick inside a network namespace that is pinned, or in a new one.

A namespace belongs to a thread, so the work is done in a thread that enters it and then ends: no
thread of a pool is ever left in a pod's network. Blocks; call it from a thread.
"""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from shim import linux

T = TypeVar("T")


def run(netns: str, work: Callable[[], T]) -> T:
    """Return what `work` returns in the namespace at `netns`, or raise what it raises.

    Raises OSError when there is no namespace.
    """
    return _alone(lambda: _enter(netns), work)


def run_new(work: Callable[[], T]) -> T:
    """Do as `run` in a new namespace, which is gone afterwards unless `work` has pinned it."""
    return _alone(lambda: linux.unshare(linux.CLONE_NEWNET), work)


def _enter(netns: str) -> None:
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.setns(fd, linux.CLONE_NEWNET)
    finally:
        os.close(fd)


def _alone(enter: Callable[[], None], work: Callable[[], T]) -> T:
    done: list[T] = []
    failed: list[BaseException] = []

    def both() -> None:
        try:
            enter()
            done.append(work())
        except BaseException as e:  # the caller's thread raises it
            failed.append(e)

    thread = threading.Thread(target=both, name="inside netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
