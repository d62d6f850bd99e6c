# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, sorted by what the caller can do about it.

    CriError                     (code)
    ├── InvalidArgument          the request can never work; the message names the field
    ├── NotFound                 no such object
    ├── FailedPrecondition       right request, wrong state
    ├── Unavailable              try again later: starting up, network not ready
    ├── DeadlineExceeded         time ran out; what was started was ended
    ├── ResourceExhausted        a bound of ours was reached
    ├── Unimplemented            not served (yet)
    ├── Internal                 our bug, or the host failed us
    └── Unknown                  code UNKNOWN, which the kubelet wants for the prefixed texts below
        ├── RegistryUnavailable         "RegistryUnavailable: ..."
        └── SignatureValidationFailed   "SignatureValidationFailed: ..."

The class attribute `code` is the name of a gRPC status code as a string: only `services` knows gRPC
and turns it into one. Messages are shown to users in Kubernetes events: short, first words first,
no secrets, no line breaks. The kubelet strips the status of a failed pull only when its code is
UNKNOWN.
"""


class CriError(Exception):
    """The base; never raised itself."""

    code = "UNKNOWN"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgument(CriError):
    code = "INVALID_ARGUMENT"


class NotFound(CriError):
    code = "NOT_FOUND"


class FailedPrecondition(CriError):
    code = "FAILED_PRECONDITION"


class Unavailable(CriError):
    code = "UNAVAILABLE"


class DeadlineExceeded(CriError):
    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(CriError):
    code = "RESOURCE_EXHAUSTED"


class Unimplemented(CriError):
    code = "UNIMPLEMENTED"


class Internal(CriError):
    code = "INTERNAL"


class Unknown(CriError):
    code = "UNKNOWN"


class RegistryUnavailable(Unknown):
    def __init__(self, message: str) -> None:
        super().__init__(f"RegistryUnavailable: {message}")


class SignatureValidationFailed(Unknown):
    def __init__(self, message: str) -> None:
        super().__init__(f"SignatureValidationFailed: {message}")
