# SPDX-License-Identifier: Apache-2.0
"""CRI log lines: where they are cut, how they are tagged, and what a full disk does."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim import errors, linux, logfile

LIMIT = logfile.LINE_LIMIT
RECORD = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) ([PF]) (.*)")


def split(*chunks: bytes) -> list[tuple[bytes, bytes]]:
    splitter = logfile.Splitter()
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)]
    return pieces + splitter.finish()


def joined(pieces: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(content + (b"\n" if tag == b"F" else b"") for tag, content in pieces)


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"", []),
        (b"\n", [(b"F", b"")]),
        (b"one\ntwo\n", [(b"F", b"one"), (b"F", b"two")]),
        (b"one\r\ntwo\n", [(b"F", b"one"), (b"F", b"two")]),
        (b"a\rb\n", [(b"F", b"a\rb")]),
        (b"tail", [(b"P", b"tail")]),
        (b"tail\r", [(b"P", b"tail\r")]),
        (b"\x00\xff\n", [(b"F", b"\x00\xff")]),
        (b"x" * LIMIT + b"\n", [(b"F", b"x" * LIMIT)]),
        (b"x" * LIMIT + b"\r\n", [(b"F", b"x" * LIMIT)]),
        (b"x" * (LIMIT + 1) + b"\n", [(b"P", b"x" * LIMIT), (b"F", b"x")]),
        (b"x" * (LIMIT + 1), [(b"P", b"x" * LIMIT), (b"P", b"x")]),
    ],
)
def test_lines_are_tagged(data: bytes, pieces: list[tuple[bytes, bytes]]) -> None:
    assert split(data) == pieces
    assert split(*(data[i : i + 1] for i in range(len(data)))) == pieces


def test_a_carriage_return_at_the_edge_of_a_read_is_dropped() -> None:
    assert split(b"one\r", b"\ntwo\n") == [(b"F", b"one"), (b"F", b"two")]


@pytest.mark.parametrize("letter", ["é", "€", "😀"])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_letter_is_not_torn(letter: str, before: int) -> None:
    text = "x" * before + letter * LIMIT
    pieces = split(text.encode() + b"\n")
    assert "".join(content.decode() for _, content in pieces) == text
    assert all(LIMIT - 4 < len(content) <= LIMIT for tag, content in pieces if tag == b"P")


def test_bytes_that_are_no_letters_are_cut_at_the_limit() -> None:
    assert [len(content) for _, content in split(b"\x80" * (2 * LIMIT) + b"\n")] == [LIMIT, LIMIT]


@given(st.lists(st.sampled_from([b"x", b"\r", b"\n", b"\r\n", "é".encode(), b"y" * 9000])))
def test_where_a_read_ends_makes_no_difference(parts: list[bytes]) -> None:
    assert split(*parts) == split(b"".join(parts))


@given(st.lists(st.sampled_from([b"x", b"\n", "é".encode(), b"y" * 9000])))
def test_nothing_is_lost_nor_too_long(parts: list[bytes]) -> None:
    pieces = split(*parts)
    assert joined(pieces) == b"".join(parts)
    assert all(len(content) <= LIMIT for _, content in pieces)


def test_what_is_held_back_is_bounded() -> None:
    splitter = logfile.Splitter()
    for _ in range(100):
        splitter.feed(b"z" * 65536)
    assert sum(len(content) for _, content in splitter.finish()) <= LIMIT + 1


# -- the file --------------------------------------------------------------------------------------


def test_records_have_a_time_a_stream_and_a_tag(tmp_path: Path) -> None:
    path = tmp_path / "pod" / "c" / "0.log"
    log = logfile.LogFile(os.fspath(path))
    log.write("stdout", b"out\nhalf")
    log.write("stderr", b"err\n")
    log.close()
    found = [RECORD.fullmatch(line) for line in path.read_bytes().splitlines()]
    assert [m and m.groups() for m in found] == [
        (b"stdout", b"F", b"out"),
        (b"stderr", b"F", b"err"),
        (b"stdout", b"P", b"half"),
    ]
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.parent.stat().st_mode & 0o777 == 0o755


def test_times_never_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5_000_000_000, 3_000_000_000, 6_000_000_001])
    monkeypatch.setattr("time.time_ns", lambda: next(clock))
    log = logfile.LogFile(os.fspath(tmp_path / "log"))
    for _ in range(3):
        log.write("stdout", b"x\n")
    log.close()
    times = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert times == [
        "1970-01-01T00:00:05.000000000Z",
        "1970-01-01T00:00:05.000000000Z",
        "1970-01-01T00:00:06.000000001Z",
    ]


def test_an_existing_log_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    log = logfile.LogFile(os.fspath(path))
    log.write("stdout", b"after\n")
    log.close()
    assert path.read_text().startswith("before\n")
    assert path.read_text().endswith("after\n")


def test_a_path_deeper_than_can_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="too deep"):
        logfile.LogFile(f"{tmp_path}{'/a' * 1500}/log")
    assert not list(tmp_path.iterdir())


def test_no_path_discards(tmp_path: Path) -> None:
    log = logfile.LogFile("")
    log.write("stdout", b"x\n")
    log.reopen()
    log.close()
    assert log.dropped == 0


def test_reopen_parts_the_stream_without_loss(tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    log = logfile.LogFile(os.fspath(path))
    log.write("stdout", b"first\nsec")
    path.rename(old)
    log.reopen()
    size = old.stat().st_size
    log.write("stdout", b"ond\n")
    log.close()
    assert old.stat().st_size == size
    assert [line.split(" ", 3)[3] for line in old.read_text().splitlines()] == ["first"]
    assert [line.split(" ", 3)[3] for line in path.read_text().splitlines()] == ["second"]


def test_a_failed_reopen_changes_nothing(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "log", tmp_path / "elsewhere"
    log = logfile.LogFile(os.fspath(path))
    path.rename(tmp_path / "old")
    path.symlink_to(elsewhere)
    with pytest.raises(errors.InvalidArgument, match="cannot open the log"):
        log.reopen()
    log.write("stdout", b"still here\n")
    log.close()
    assert "still here" in (tmp_path / "old").read_text()
    assert not elsewhere.exists()


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "file as parent"])
def test_only_a_plain_file_is_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    match kind:
        case "symlink":
            path.symlink_to(tmp_path / "target")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "file as parent":
            path.touch()
            path = path / "log"
    with pytest.raises(errors.InvalidArgument, match="cannot open the log"):
        logfile.LogFile(os.fspath(path))
    assert not (tmp_path / "target").exists()


@pytest.mark.needs("root")
def test_a_full_disk_drops_whole_records_and_counts_them(tmp_path: Path) -> None:
    linux.mount("tmpfs", tmp_path, "tmpfs", 0, "size=64k")
    try:
        log = logfile.LogFile(os.fspath(tmp_path / "log"))
        for _ in range(100):
            log.write("stdout", b"y" * 999 + b"\n")
        assert log.dropped > 0
        os.truncate(tmp_path / "log", 0)
        log.write("stdout", b"room again\n")
        dropped = log.dropped
        log.close()
        lines = (tmp_path / "log").read_bytes().splitlines()
    finally:
        linux.umount2(tmp_path)
    assert dropped >= 100 - 64
    assert [RECORD.fullmatch(line) is not None for line in lines] == [True]


@pytest.mark.needs("root")
def test_a_disk_that_fills_up_in_a_write_leaves_no_torn_record(tmp_path: Path) -> None:
    linux.mount("tmpfs", tmp_path, "tmpfs", 0, "size=64k")
    try:
        log = logfile.LogFile(os.fspath(tmp_path / "log"))
        log.write("stdout", b"".join(b"%d\n" % number for number in range(5000)))
        written = (tmp_path / "log").read_bytes().splitlines()
        dropped = log.dropped
        log.close()
    finally:
        linux.umount2(tmp_path)
    assert len(written) + dropped == 5000
    found = [RECORD.fullmatch(line) for line in written]
    assert [m and int(m[3]) for m in found] == list(range(len(written)))
