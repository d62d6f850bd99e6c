# SPDX-License-Identifier: Apache-2.0
"""How an exec ended, as the error stream tells it.

Version 4 and later of the remote command protocol: a Kubernetes Status object in JSON, always.
Before: a line of text, and only for a failure (behaviour.md §3).
"""

import msgspec


def success(version: int) -> bytes:
    """Return what says that all went well."""
    return _json({"metadata": {}, "status": "Success"}) if version >= 4 else b""


def exited(code: int, version: int) -> bytes:
    """Return what says that the command ended by itself, with this exit code."""
    if code == 0:
        return success(version)
    message = f"command terminated with non-zero exit code: {code}"
    if version < 4:
        return message.encode()
    cause = {"reason": "ExitCode", "message": str(code)}
    return _json(
        {
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": "NonZeroExitCode",
            "details": {"causes": [cause]},
        }
    )


def failure(message: str, version: int) -> bytes:
    """Return what says that the command could not be run, or not to its end."""
    if version < 4:
        return message.encode()
    return _json(
        {
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": "InternalError",
            "details": {"causes": [{"message": message}]},
            "code": 500,
        }
    )


def _json(document: dict[str, object]) -> bytes:
    return msgspec.json.encode(document)
