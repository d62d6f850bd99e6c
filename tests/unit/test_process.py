# SPDX-License-Identifier: Apache-2.0
"""Starting, identifying, killing and reaping processes."""

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from shim import process
from tests.lab import waiting


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with suppress(OSError):
            os.close(fd)


def said(pipe: tuple[int, int], *argv: str, **how: object) -> str:
    """Run a program with its stdout in the pipe and return what it said."""
    child = process.spawn(argv, stdout=pipe[1], **how)  # type: ignore[arg-type]
    assert process.reap(child) == 0
    return os.read(pipe[0], 65536).decode()


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", -9), ("true", 0)])
def test_reap_tells_codes_from_signals(script: str, code: int) -> None:
    assert process.reap(process.spawn(["sh", "-c", script])) == code


def test_a_child_has_a_session_of_its_own_or_at_least_a_group(pipe: tuple[int, int]) -> None:
    fields = ("cut", "-d ", "-f1,5,6", "/proc/self/stat")
    pid, group, session = map(int, said(pipe, *fields).split())
    assert pid == group == session
    pid, group, session = map(int, said(pipe, *fields, new_session=False).split())
    assert pid == group
    assert session == os.getsid(0)


def test_what_was_inherited_is_not_passed_on() -> None:
    left_open = os.open("/", os.O_RDONLY)
    script = f"""
from shim import process
process.keep_descriptors()
child = process.spawn(["ls", "/proc/self/fd/{left_open}"], stdout=1)
print(process.reap(child))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        pass_fds=[left_open],
        capture_output=True,
        text=True,
        check=True,
    )
    os.close(left_open)
    assert done.stdout == "2\n"  # as ls(1) says that there is no such file


def test_a_child_gets_the_given_descriptors_and_none_of_ours(pipe: tuple[int, int]) -> None:
    ours = process.input_file(b"secret")
    given = process.input_file(b"told")
    script = "readlink /proc/$$/fd/0 /proc/$$/fd/2; cat /proc/$$/fd/40; ls /proc/$$/fd"
    words = said(pipe, "sh", "-c", script, fds={40: given}).split()
    assert words[:2] == ["/dev/null", "/dev/null"]
    assert words[2].startswith("told0")  # the listing begins with descriptor 0
    assert str(ours) not in words
    os.close(ours)
    os.close(given)


def test_descriptors_can_trade_places(pipe: tuple[int, int]) -> None:
    one, two = process.input_file(b"one"), process.input_file(b"two")
    names = [f"/proc/self/fd/{fd}" for fd in (one, two)]
    assert said(pipe, "cat", *names, fds={one: two, two: one}) == "twoone"
    os.close(one)
    os.close(two)


def test_the_environment_is_the_given_one(pipe: tuple[int, int]) -> None:
    assert said(pipe, "env", env={"A": "1", "PATH": "/usr/bin"}).split() == ["A=1", "PATH=/usr/bin"]


def test_the_default_environment_is_small(pipe: tuple[int, int]) -> None:
    names = {line.split("=")[0] for line in said(pipe, "env").splitlines()}
    assert names == set(process.DEFAULT_ENV)


def test_signals_ignored_here_are_not_ignored_there(pipe: tuple[int, int]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        status = said(pipe, "grep", "-E", "SigIgn|SigBlk", "/proc/self/status")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        signal.signal(signal.SIGHUP, before)
    masks = [int(line.split()[1], 16) for line in status.splitlines()]
    assert [mask & 0x7FFFFFFF for mask in masks] == [0, 0]  # glibc has 32 and 33 for itself


def test_what_cannot_be_started_raises_and_leaves_nothing() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        process.spawn(["no-such-program"])
    with pytest.raises(PermissionError):
        process.spawn(["/etc/passwd"])
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_pidfd_tells_the_end() -> None:
    child = process.spawn(["sleep", "0.05"])
    assert select.select([child.pidfd], [], [], 0) == ([], [], [])
    assert select.select([child.pidfd], [], [], 10)[0]
    assert process.reap(child) == 0
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(child.pidfd)


def test_kill_group_reaches_who_left_the_session(pipe: tuple[int, int]) -> None:
    script = "setsid sleep 1000 & echo $! ; exec sleep 1000"
    child = process.spawn(["sh", "-c", script], stdout=pipe[1])
    stray = int(os.read(pipe[0], 20))
    started = process.start_time(stray)
    waiting.until(lambda: os.getsid(stray) == stray, "the stray has left the session")
    process.kill_group(child)
    assert process.reap(child) == -signal.SIGKILL
    waiting.until(lambda: not process.alive(stray, started), "the stray is dead")


def test_alive_knows_a_process_by_its_start_and_not_by_its_number() -> None:
    child = process.spawn(["sleep", "1000"])
    started = process.start_time(child.pid)
    assert process.alive(child.pid, started)
    assert not process.alive(child.pid, started + 1)
    process.kill_group(child)
    select.select([child.pidfd], [], [], 10)
    assert not process.alive(child.pid, started)  # a zombie
    process.reap(child)
    assert not process.alive(child.pid, started)
    with pytest.raises(ProcessLookupError):
        process.start_time(child.pid)


def test_start_time_reads_past_a_name_with_blanks_and_parentheses(pipe: tuple[int, int]) -> None:
    script = "printf 'a) R (b' > /proc/$$/comm; read x"
    child = process.spawn(["sh", "-c", script], stdin=pipe[0])
    waiting.until(lambda: b") R (" in read(child.pid, "comm"), "the name is set")
    assert process.alive(child.pid, process.start_time(child.pid))
    process.kill_group(child)
    process.reap(child)


def read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def test_orphans_are_found_by_arguments_and_variables() -> None:
    mark = os.urandom(8).hex()
    by_words = process.spawn(["sh", "-c", "sleep 1000 & wait", "sh", mark, "two"])
    by_variable = process.spawn(["sleep", "1000"], env={**process.DEFAULT_ENV, "MARK": mark})
    other = process.spawn(["sh", "-c", "sleep 1000", "sh", mark])
    waiting.until(lambda: list(process.descendants(by_words.pid)), "the child has a child")
    below = list(process.descendants(by_words.pid))
    assert process.kill_orphans(mark, "two")
    assert process.reap(by_words) == -signal.SIGKILL
    waiting.until(lambda: not any(map(os.path.exists, map("/proc/{}".format, below))), "gone")
    assert process.kill_orphans(f"MARK={mark}")
    assert process.reap(by_variable) == -signal.SIGKILL
    assert not process.kill_orphans(mark, "two")
    process.kill_group(other)
    process.reap(other)


def test_descendants_are_found_deeper_than_recursion_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_children", lambda pid: [pid + 1] if pid < 3000 else [])
    assert list(process.descendants(1)) == list(range(2, 3001))


def test_who_took_the_number_of_an_orphan_lives() -> None:
    child = process.spawn(["sleep", "1000"])
    born = process.start_time(child.pid)
    process.kill(process.Identity(child.pid, born - 1))
    assert process.alive(child.pid, born)
    process.kill(process.Identity(child.pid, born))
    assert process.reap(child) == -signal.SIGKILL
    process.kill(process.Identity(child.pid, born))


def test_without_descriptors_orphans_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(path: str) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files", path)

    monkeypatch.setattr(os, "listdir", none_left)
    assert process.kill_orphans("none")


def test_the_processes_of_containers_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its cgroup tells; what is around us all does not count."""
    inside, around = "a" * 64, "b" * 64
    child = process.spawn(["sleep", "1000"])
    ids = {str(child.pid): {inside.encode(), around.encode()}}
    monkeypatch.setattr(process, "_cgroup_ids", lambda pid: ids.get(pid, {around.encode()}))

    def found(*words: str) -> bool:
        return child.pid in {each.pid for each in process.candidates(words)}

    assert not found("word")
    assert found(f"HOME=/x/{inside}")
    assert os.getpid() in {each.pid for each in process.candidates(["word"])}
    process.kill_group(child)
    process.reap(child)
