# SPDX-License-Identifier: Apache-2.0
"""A scheduler for `async def` on one epoll: what a shim has instead of asyncio, at a third of the
memory.

    run(main)  ──►  ready queue ──► task runs until it waits ──► fd │ timer │ event │ other task
                        ▲                                          │
                        └──────────────── wake ────────────────────┘

Rules. A task waits for one thing at a time and its registration goes when the wait ends, however it
ends. Two tasks that wait for the same direction of one descriptor are a bug and get RuntimeError.
`cancel` raises `Cancelled` once, at the wait the task is in or the next one it comes to; waiting in
a `finally` works. An error that ends a task goes to whoever joins it, else to `on_task_error`; it
never ends the loop. There is one loop per process, none in a thread, and nothing of it survives the
process.
"""

import collections
import contextlib
import errno
import heapq
import os
import select
import sys
import time
import types
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from shim import process

T = TypeVar("T")

_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT
_HANGUP = select.EPOLLRDHUP
_LONGEST = 86400.0  # seconds: epoll refuses waits of more than 24 days
_BROKEN = select.EPOLLHUP | select.EPOLLERR


class Cancelled(BaseException):
    """Raised inside a task that was cancelled. Clean up and let it pass."""

    def __init__(self, scope: "timeout | None" = None) -> None:
        super().__init__()
        self.scope = scope


class Task(Generic[T]):
    """A running coroutine. Made by `spawn`; public: name, done, result, cancel, join."""

    __slots__ = ("_abort", "_coro", "_error", "_joiners", "_pending", "_value", "cancelled", "name")

    def __init__(self, coro: Coroutine[Any, Any, T], name: str) -> None:
        self.name = name
        self.cancelled = False
        self._coro: Coroutine[Any, Any, T] | None = coro
        self._abort: Callable[[], None] | None = None
        self._pending: list[Cancelled] = []
        self._joiners: list[Task[Any]] = []
        self._error: BaseException | None = None
        self._value: T | None = None

    @property
    def done(self) -> bool:
        """Whether the coroutine has ended."""
        return self._coro is None

    def result(self) -> T:
        """Return what the coroutine returned, or raise what it raised. Only when done."""
        if not self.done:
            raise RuntimeError(f"task {self.name} has not ended")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def cancel(self) -> None:
        """Ask the task to end; returns at once. Nothing happens when it is done."""
        if not self.done and not self.cancelled:
            self.cancelled = True
            _interrupt(self, Cancelled())

    async def join(self) -> T:
        """Wait for the end and return the result. Cancelling the waiter leaves the task alone."""
        if not self.done:
            me = _loop().current
            self._joiners.append(me)
            await _suspend(lambda: self._joiners.remove(me))
        return self.result()


class _Timer:
    __slots__ = ("callback", "deadline")

    def __init__(self, deadline: float, callback: Callable[[], None]) -> None:
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback

    def __lt__(self, other: "_Timer") -> bool:
        return self.deadline < other.deadline


class _Loop:
    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.ready: collections.deque[tuple[Task[Any], BaseException | None]] = collections.deque()
        self.waiters: dict[int, dict[int, Task[Any]]] = {}
        self.timers: list[_Timer] = []
        self.dead_timers = 0
        self.tasks: set[Task[Any]] = set()
        self.current: Task[Any]

    def turn(self) -> None:
        """Look at the descriptors and the clock, then run what is ready now, once each."""
        for fd, events in self._poll():
            self.fire(fd, events)
        moment = time.monotonic()
        while self.timers and self.timers[0].deadline <= moment:
            timer = heapq.heappop(self.timers)
            callback, timer.callback = timer.callback, None
            if callback is None:
                self.dead_timers -= 1
            else:
                callback()
        for _ in range(len(self.ready)):
            task, error = self.ready.popleft()
            self.step(task, error)

    def _poll(self) -> list[tuple[int, int]]:
        if self.ready:
            wait = 0.0
        elif self.timers:
            wait = min(max(0.0, self.timers[0].deadline - time.monotonic()), _LONGEST)
        else:
            wait = -1
        return self.epoll.poll(wait)

    def step(self, task: Task[Any], error: BaseException | None) -> None:
        coro = task._coro
        if coro is None:
            return
        self.current = task
        task._abort = None
        try:
            if error is None:
                coro.send(None)
            else:
                coro.throw(error)
        except StopIteration as stop:
            task._value = stop.value
            self._finish(task)
        except BaseException as failure:
            task._error = failure
            self._finish(task)

    def _finish(self, task: Task[Any]) -> None:
        task._coro = None
        self.tasks.discard(task)
        if task._joiners:
            for joiner in task._joiners:
                _wake(joiner)
            task._joiners.clear()
        elif task._error is not None and not isinstance(task._error, Cancelled):
            on_task_error(task.name, task._error)

    def register(self, fd: int, event: int, task: Task[Any]) -> None:
        slots = self.waiters.get(fd)
        if slots is None:
            self.epoll.register(fd, event)
            self.waiters[fd] = {event: task}
        elif event in slots:
            raise RuntimeError(f"{slots[event].name} and {task.name} both wait for descriptor {fd}")
        else:
            slots[event] = task
            self._modify(fd, slots)

    def forget(self, fd: int, event: int) -> None:
        slots = self.waiters.get(fd, {})
        slots.pop(event, None)
        self._modify(fd, slots)

    def _modify(self, fd: int, slots: Mapping[int, object]) -> None:
        if slots:
            self.epoll.modify(fd, sum(slots))
            return
        self.waiters.pop(fd, None)
        with contextlib.suppress(OSError):  # already closed
            self.epoll.unregister(fd)

    def fire(self, fd: int, events: int) -> None:
        slots = self.waiters.get(fd, {})
        for event in [e for e in slots if events & (e | _BROKEN)]:
            _wake(slots.pop(event))
        self._modify(fd, slots)

    def add_timer(self, deadline: float, callback: Callable[[], None]) -> _Timer:
        timer = _Timer(deadline, callback)
        heapq.heappush(self.timers, timer)
        return timer

    def drop_timer(self, timer: _Timer) -> None:
        """Forget a timer; the heap is rebuilt when most of it is dead."""
        if timer.callback is None:
            return
        timer.callback = None
        self.dead_timers += 1
        if self.dead_timers > 32 and self.dead_timers * 2 > len(self.timers):
            self.timers = [t for t in self.timers if t.callback is not None]
            heapq.heapify(self.timers)
            self.dead_timers = 0


_running: _Loop | None = None


def _loop() -> _Loop:
    if _running is None:
        raise RuntimeError("no loop is running")
    return _running


def _print_error(name: str, error: BaseException) -> None:
    print(f"task {name} failed: {error!r}", file=sys.stderr)


on_task_error: Callable[[str, BaseException], None] = _print_error


def set_error_hook(hook: Callable[[str, BaseException], None]) -> None:
    """Choose who is told the name and the error of a task that fails with nobody waiting."""
    global on_task_error
    on_task_error = hook


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, then cancel every other task and wait for theirs."""
    global _running
    if _running is not None:
        main.close()
        raise RuntimeError("a loop is running already")
    _running = loop = _Loop()
    try:
        task = spawn(main, name="main")
        task._joiners = [task]  # its error is raised below and not for the hook
        while not task.done:
            loop.turn()
        for other in list(loop.tasks):
            other.cancel()
        while loop.tasks:
            loop.turn()
        return task.result()
    finally:
        loop.epoll.close()
        _running = None


def spawn(coro: Coroutine[Any, Any, T], *, name: str = "task") -> Task[T]:
    """Start a coroutine beside the current one; it begins to run when the current one waits."""
    loop = _loop()
    task = Task(coro, name)
    loop.tasks.add(task)
    loop.ready.append((task, None))
    return task


def after_fork() -> None:
    """Give the child of a fork an epoll of its own: it goes on with this loop, its parent too.

    Descriptors that a task waits for must be open in the child.
    """
    loop = _loop()
    loop.epoll.close()
    loop.epoll = select.epoll()
    for fd, slots in loop.waiters.items():
        loop.epoll.register(fd, sum(slots))


def now() -> float:
    """Return the seconds of the monotonic clock that every deadline here refers to."""
    return time.monotonic()


# ---- waiting


@types.coroutine
def _suspend(abort: Callable[[], None]) -> Generator[None, None, None]:
    """Give up control until woken; `abort` undoes the registration when the task is cancelled."""
    task = _loop().current
    if task._pending:
        abort()
        raise task._pending.pop(0)
    task._abort = abort
    yield


def _wake(task: Task[Any], error: BaseException | None = None) -> None:
    task._abort = None
    _loop().ready.append((task, error))


def _interrupt(task: Task[Any], error: Cancelled) -> None:
    """Raise in a waiting task now, in any other at its next wait."""
    if task._abort is None:
        task._pending.append(error)
    else:
        task._abort()
        _wake(task, error)


async def readable(fd: int) -> None:
    """Wait until `fd` has something to read, has ended, or (a pidfd) its process has ended.

    A regular file is always ready. Raises OSError EBADF when `close` closes it meanwhile.
    """
    await _ready(fd, _READ)


async def writable(fd: int) -> None:
    """Wait until `fd` takes data or is broken. Raises OSError EBADF as `readable` does."""
    await _ready(fd, _WRITE)


async def hung_up(fd: int) -> None:
    """Wait until the other end of a socket or pipe is gone, whatever is still to be read."""
    await _ready(fd, _HANGUP)


async def _ready(fd: int, event: int) -> None:
    loop = _loop()
    try:
        loop.register(fd, event, loop.current)
    except PermissionError:  # epoll_ctl(2): the file does not know readiness
        await sleep(0)
        return
    await _suspend(lambda: loop.forget(fd, event))


def close(fd: int) -> None:
    """Close a descriptor; a task waiting for it gets OSError EBADF, not an endless wait."""
    loop = _loop()
    slots = loop.waiters.get(fd, {})
    for task in slots.values():
        _wake(task, OSError(errno.EBADF, "descriptor closed while waiting"))
    slots.clear()
    loop._modify(fd, slots)
    os.close(fd)


async def sleep(seconds: float) -> None:
    """Wait; 0 lets every other ready task run once."""
    loop = _loop()
    task = loop.current
    if seconds <= 0:
        entry = (task, None)
        loop.ready.append(entry)
        await _suspend(lambda: loop.ready.remove(entry))
        return
    timer = loop.add_timer(now() + seconds, lambda: _wake(task))
    await _suspend(lambda: loop.drop_timer(timer))


class Event:
    """A flag that tasks wait for; any number may. `clear` makes it usable again."""

    __slots__ = ("_set", "_waiters")

    def __init__(self) -> None:
        self._set = False
        self._waiters: list[Task[Any]] = []

    def is_set(self) -> bool:
        """Return the flag."""
        return self._set

    def set(self) -> None:
        """Raise the flag and wake everybody who waits."""
        self._set = True
        for task in self._waiters:
            _wake(task)
        self._waiters.clear()

    def clear(self) -> None:
        """Lower the flag."""
        self._set = False

    async def wait(self) -> None:
        """Wait until the flag is up; return at once when it is."""
        if self._set:
            return
        task = _loop().current
        self._waiters.append(task)
        await _suspend(lambda: self._waiters.remove(task))


class Lock:
    """Mutual exclusion, first come first served: `async with lock:`."""

    __slots__ = ("_held", "_waiters")

    def __init__(self) -> None:
        self._held = False
        self._waiters: collections.deque[Task[Any]] = collections.deque()

    async def __aenter__(self) -> None:
        if not self._held:
            self._held = True
            return
        task = _loop().current
        self._waiters.append(task)
        await _suspend(lambda: self._waiters.remove(task))

    async def __aexit__(self, *_: object) -> None:
        if self._waiters:
            _wake(self._waiters.popleft())  # the lock changes hands without being free
        else:
            self._held = False


class timeout:  # noqa: N801 - reads as a verb at the call
    """`async with timeout(seconds):` raises TimeoutError when it takes longer; None: never."""

    __slots__ = ("_cleaning", "_seconds", "_task", "_timer")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._cleaning = False
        self._timer: _Timer | None = None
        self._task: Task[Any] | None = None

    async def __aenter__(self) -> None:
        if self._seconds is None:
            return
        loop = _loop()
        task = self._task = loop.current
        self._cleaning = task.cancelled  # a limit of its clean-up, which must work
        self._timer = loop.add_timer(
            now() + self._seconds, lambda: _interrupt(task, Cancelled(self))
        )

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._timer is None or self._task is None:
            return
        task, timer = self._task, self._timer
        self._task = self._timer = None
        _loop().drop_timer(timer)
        task._pending = [p for p in task._pending if p.scope is not self]
        if isinstance(error, Cancelled) and error.scope is self:
            if task.cancelled and not self._cleaning:  # both at once: that it is cancelled counts
                task._pending = [p for p in task._pending if p.scope is not None]
                raise Cancelled
            raise TimeoutError(f"not done in {self._seconds} s")


# ---- running a program to its end

_timeout = timeout
_DRAIN_SECONDS = 2.0
_KILL_SECONDS = 5.0
_CHUNK = 65536


class Finished(NamedTuple):
    """How a program ended; `returncode` is -n when signal n killed it; output cut at the limit."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes


async def run_command(
    argv: Sequence[str],
    *,
    stdin: bytes | int = b"",
    stdout: int | None = None,
    stderr: int | None = None,
    timeout: float | None,
    env: Mapping[str, str] | None = None,
    fds: Mapping[int, int] | None = None,
    max_output: int = 1 << 20,
    program: str = "",
) -> Finished:
    """Run a program and collect what it says. A stream given as a descriptor is passed on instead.

    Output beyond `max_output` bytes per stream is read and dropped. After `timeout` seconds (None:
    never), or when cancelled, the process group is killed and reaped; the former raises
    TimeoutError, which names the command. Raises OSError when the program cannot be started; a code
    other than 0 is the caller's business.
    """
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        source = stdin if isinstance(stdin, int) else _input(stdin, theirs)
        out = _Output(stdout, max_output, ours, theirs)
        err = _Output(stderr, max_output, ours, theirs)
        child = process.spawn(
            argv, env=env, stdin=source, stdout=out.child_fd, stderr=err.child_fd, fds=fds,
            program=program,
        )  # fmt: skip
        ours.pop_all()  # from here on the outputs close themselves
    out.start()
    err.start()
    try:
        returncode = await _wait_end(child, timeout, argv)
        await _drain(out, err)
    finally:
        out.stop()
        err.stop()
    return Finished(
        argv=tuple(argv), returncode=returncode, stdout=bytes(out.data), stderr=bytes(err.data)
    )


def _input(data: bytes, owner: contextlib.ExitStack) -> int | None:
    if not data:
        return None
    fd = process.input_file(data)
    owner.callback(os.close, fd)
    return fd


class _Output:
    """One output stream of a program: a pipe with a task that reads, or a descriptor passed on."""

    def __init__(
        self,
        given: int | None,
        limit: int,
        ours: contextlib.ExitStack,
        theirs: contextlib.ExitStack,
    ) -> None:
        self.data = bytearray()
        self.task: Task[None] | None = None
        self._limit = limit
        self._read_fd = -1
        self.child_fd = given
        if given is None:
            self._read_fd, self.child_fd = os.pipe()
            ours.callback(os.close, self._read_fd)
            theirs.callback(os.close, self.child_fd)

    def start(self) -> None:
        """Begin to read."""
        if self._read_fd >= 0:
            self.task = spawn(self._collect(), name="output")

    async def _collect(self) -> None:
        try:
            while True:
                await readable(self._read_fd)
                chunk = os.read(self._read_fd, _CHUNK)
                if not chunk:
                    return
                self.data += chunk[: self._limit - len(self.data)]
        finally:
            close(self._read_fd)

    def stop(self) -> None:
        """Stop reading, if that has not ended."""
        if self.task is not None:
            self.task.cancel()


async def _wait_end(child: process.Child, seconds: float | None, argv: Sequence[str]) -> int:
    try:
        async with _timeout(seconds):
            await readable(child.pidfd)
    except BaseException as error:
        await _destroy(child)
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"not done in {seconds} s: {' '.join(argv)}") from None
        raise
    return process.reap(child)


async def _destroy(child: process.Child) -> None:
    """Kill and reap; a process that the kernel does not let go is left to a task of its own."""
    process.kill_group(child)
    reaper = spawn(_reap(child), name="reap")
    with contextlib.suppress(TimeoutError):
        async with _timeout(_KILL_SECONDS):
            await reaper.join()


async def _reap(child: process.Child) -> int:
    await readable(child.pidfd)
    return process.reap(child)


async def _drain(*outputs: _Output) -> None:
    """Read to the end, but not for ever: a daemon that the program left may hold the pipes."""
    with contextlib.suppress(TimeoutError):
        async with _timeout(_DRAIN_SECONDS):
            for output in outputs:
                if output.task is not None:
                    await output.task.join()
