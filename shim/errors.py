# SPDX-License-Identifier: Apache-2.0
"""What can go wrong in a shim, with the gRPC code number that travels in a ttrpc status.

ShimError
├── InvalidArgument      3
├── DeadlineExceeded     4
├── NotFound             5
├── ResourceExhausted    8   a bound was reached, or this process lacks descriptors or memory
├── FailedPrecondition   9
├── Unimplemented       12
├── Internal            13   our bug, or a runtime that failed without saying why
└── Unavailable         14   the connection is gone
"""

import errno

_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class ShimError(Exception):
    """A failure with a code; `from_code` gives the class that belongs to a number."""

    code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgument(ShimError):
    code = 3


class DeadlineExceeded(ShimError):
    code = 4


class NotFound(ShimError):
    code = 5


class ResourceExhausted(ShimError):
    code = 8


class FailedPrecondition(ShimError):
    code = 9


class Unimplemented(ShimError):
    code = 12


class Internal(ShimError):
    code = 13


class Unavailable(ShimError):
    code = 14


_BY_CODE = {cls.code: cls for cls in ShimError.__subclasses__()}


def from_code(code: int, message: str) -> ShimError:
    """Return the error that a ttrpc status with this code and message stands for."""
    return _BY_CODE.get(code, ShimError)(message)


def of_the_other(error: OSError, who: str) -> ShimError:
    """Return what a failed system call tells of the process at the other end.

    Unavailable: it is gone. What says nothing about it is not that: ResourceExhausted when we
    lack something ourselves, DeadlineExceeded when its queue is full.
    """
    if error.errno in _SHORT:
        return ResourceExhausted(f"{who}: not asked: {error.strerror}")
    if error.errno == errno.EAGAIN:  # see connect(2)
        return DeadlineExceeded(f"{who}: its queue is full")
    return Unavailable(f"{who}: {error}")
