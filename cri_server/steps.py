# SPDX-License-Identifier: Apache-2.0
"""Where the time of a recipe goes: every step is timed, and one debug line tells them all.

Each step is an audit event too (sys.audit): tests end the server there to see what recovery does.
"""

import contextlib
import sys
import time
from collections.abc import Iterator

import structlog

log = structlog.get_logger()


class Steps:
    """The steps of one operation; `done` writes the line. Times are milliseconds."""

    def __init__(self, operation: str, **fields: str) -> None:
        self._operation = operation
        self._fields = fields
        self._began = time.perf_counter()
        self._times: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the block under `name`, also when it fails."""
        sys.audit("cri_server.step", self._operation, name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._times[name] = round((time.perf_counter() - began) * 1000, 2)

    def done(self) -> None:
        total = round((time.perf_counter() - self._began) * 1000, 2)
        log.debug(self._operation, total_ms=total, steps_ms=self._times, **self._fields)
