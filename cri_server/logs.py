# SPDX-License-Identifier: Apache-2.0
"""Logging: structlog to stderr, for people or as JSON, with pod, container and rpc as fields."""

import logging
import sys
from typing import Literal

import structlog

_METHODS = ("debug", "info", "warning", "error", "exception")


class _Logger(structlog.make_filtering_bound_logger(0)):  # type: ignore[misc]
    """The class of every logger; `set_level` gives it the methods of its level."""


def configure(level: str, style: Literal["console", "json"]) -> None:
    """Set up structlog for the process."""
    set_level(level)
    render: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if style == "json" else []),
            render,
        ],
        wrapper_class=_Logger,
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def set_level(level: str) -> None:
    """Log from now on what is at `level` or above; a line below it costs nothing."""
    number = logging.getLevelNamesMapping()[level.upper()]
    filtering = structlog.make_filtering_bound_logger(number)
    for name in _METHODS:
        setattr(_Logger, name, getattr(filtering, name))
