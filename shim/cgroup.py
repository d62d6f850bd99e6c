# SPDX-License-Identifier: Apache-2.0
"""The cgroup of a container as a shim needs it: kill what is in it, count OOM kills, split off a
part for an exec.

The directories are given (one per v1 controller, one for v2); the OCI runtime makes and removes
them. A tree is killed by `cgroup.kill` (Linux 5.14, v2) or by freezing, killing and thawing (v1),
so that nothing can fork its way out. Nothing is remembered: after a crash the next owner of the
directories can do the same again.
"""

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator, Mapping

from shim import loop

_UNIFIED = ""
_TRIES = 50
_PAUSE = 0.01
# Removed, also while it was open; and deeper than paths go, where nobody can look.
_GONE = (errno.ENOENT, errno.ENODEV, errno.ENAMETOOLONG)


class Cgroup:
    """Controller names ("" for v2) to absolute directories. Missing directories count as empty.

    `controller` is the one of the hierarchy in which trees are killed and parts are made.
    """

    def __init__(self, directories: Mapping[str, str]) -> None:
        self.directories = dict(directories)
        self.controller = _tree_controller(self.directories)

    def processes(self) -> list[int]:
        """Return the pids in the group and below it. Zombies are not among them.

        Raises OSError when it cannot be seen: that nobody is there is only said when it is so.
        """
        root = self.directories.get(self.controller)
        return [pid for directory in _tree(root) for pid in _pids(directory)] if root else []

    def kill(self) -> bool:
        """Kill everything inside, once; return whether there was something to kill."""
        if not self._populated():
            return False
        if self.controller == _UNIFIED and self._write("cgroup.kill", "1"):
            return True
        with self._frozen():
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return True

    def _populated(self) -> bool:
        """Say whether there are processes; v2 knows, whatever is below. Raises OSError when it
        cannot be seen.
        """
        if _UNIFIED in self.directories and self.controller == _UNIFIED:
            with contextlib.suppress(OSError), open(self._file("cgroup.events")) as file:
                return "populated 1" in file.read()
        return bool(self.processes())

    async def kill_all(self) -> bool:
        """Kill until nothing is left, half a second at most; return whether that is seen."""
        for _ in range(_TRIES):
            with contextlib.suppress(OSError):
                if not self.kill():
                    return True
            await loop.sleep(_PAUSE)
        return False

    def thaw(self) -> None:
        """Let a paused group run: a frozen process handles no signal, on v1 not even SIGKILL."""
        if self.controller == "freezer":
            self._write("freezer.state", "THAWED")
        elif _UNIFIED in self.directories:
            self._write("cgroup.freeze", "0")

    def part(self, name: str) -> "Cgroup":
        """Return the group `name` below this one, of the hierarchy that trees are killed in."""
        if self.controller not in self.directories:
            return Cgroup({})
        return Cgroup({self.controller: os.path.join(self.directories[self.controller], name)})

    def create(self) -> str:
        """Make the directories; return the controller that they are of. Raises OSError."""
        for directory in self.directories.values():
            os.makedirs(directory, exist_ok=True)
        return self.controller

    def remove(self) -> bool:
        """Remove the directories with all below; return whether they are gone. Processes inside
        prevent it.
        """
        for root in self.directories.values():
            for directory in reversed([*_tree(root, onerror=lambda _: None)]):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        return not any(map(os.path.exists, self.directories.values()))

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        if self.controller != "freezer":
            yield
            return
        self._write("freezer.state", "FROZEN")
        try:
            yield
        finally:
            self.thaw()

    def _file(self, name: str) -> str:
        return os.path.join(self.directories[self.controller], name)

    def _write(self, name: str, value: str) -> bool:
        try:
            with open(self._file(name), "w") as file:
                file.write(value)
        except OSError:
            return False
        return True


def _tree_controller(directories: Mapping[str, str]) -> str:
    """Choose the hierarchy to kill in: freezer on v1 and hybrid, where v2 may hold nothing of the
    container.
    """
    for name in ("freezer", _UNIFIED, "pids", "memory"):
        if name in directories:
            return name
    return next(iter(directories), _UNIFIED)


def _pids(directory: str, name: str = "cgroup.procs") -> list[int]:
    try:
        with open(os.path.join(directory, name), "rb") as file:
            return [pid for pid in map(int, file.read().split()) if pid]
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP and name != "cgroup.threads":  # a threaded group of v2
            return _pids(directory, "cgroup.threads")
        _unless_gone(error)
        return []


def _tree(root: str, *, onerror: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """Yield a directory and all below it, parents first. As os.walk, which goes as deep as Python's
    recursion before 3.12: a container may nest its groups deeper.
    """
    left = [root]
    while left:
        directory = left.pop()
        yield directory
        try:
            with os.scandir(directory) as entries:
                left += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            (onerror or _unless_gone)(error)


def _unless_gone(error: OSError) -> None:
    if error.errno not in _GONE:
        raise error
