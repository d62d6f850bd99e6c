# SPDX-License-Identifier: Apache-2.0
"""A tiny x86-64 program that makes system calls and prints what the kernel answered.

It looks at a seccomp filter from the inside: no C library stands between, and the 32-bit entry
(int 0x80) is there too.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_BASE = 0x400000  # below 4 GiB: 32-bit calls can point at it
_HEADERS = 64 + 56
# for each call of the table:  load number and arguments; syscall or int 0x80; store the answer
# write(1, table, size); exit(0)
_CODE = bytes.fromhex(
    "49bc887766554433221141bd44332211498b442408498b7c2410498b742418498b5424204d8b542428"
    "49833c240075040f05eb084889fb4889f1cd80498904244983c43041ffcd75c7"
    "b801000000bf0100000048be8877665544332211ba443322110f05b83c00000031ff0f05"
)
_ADDRESS, _NUMBER = bytes.fromhex("8877665544332211"), bytes.fromhex("44332211")


@dataclass(frozen=True, slots=True)
class Call:
    """A call by number; `legacy` enters by int 0x80, where numbers are those of i386."""

    number: int
    arguments: tuple[int, ...] = ()
    legacy: bool = False


def program(calls: Sequence[Call]) -> bytes:
    """Return an ELF executable that makes the calls in order."""
    table = b"".join(_row(call) for call in calls)
    address = _BASE + _HEADERS + len(_CODE)
    code = _CODE.replace(_ADDRESS, struct.pack("<Q", address))
    code = code.replace(_NUMBER, struct.pack("<I", len(calls)), 1)
    code = code.replace(_NUMBER, struct.pack("<I", len(table)), 1)
    size = _HEADERS + len(code) + len(table)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, size, size, 0x1000)
    return ident + header + segment + code + table


def _row(call: Call) -> bytes:
    arguments = (*call.arguments, 0, 0, 0, 0)[:4]
    return struct.pack("<6Q", int(call.legacy), call.number, *arguments)


def answers(output: bytes) -> list[int]:
    """Return what each call answered: a result, or the negative error number."""
    return [struct.unpack_from("<i", output, offset)[0] for offset in range(0, len(output), 48)]
