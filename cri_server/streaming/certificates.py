# SPDX-License-Identifier: Apache-2.0
"""The TLS certificate of the streaming server, read again when its files have changed."""

import os
import ssl

import structlog

from cri_server import config

log = structlog.get_logger()


class Certificate:
    """`context` is what a server is given; new connections get the certificate of that moment."""

    def __init__(self, settings: config.Server) -> None:
        self._settings = settings
        self._seen = self._look()
        self._current = self._load()
        self.context = self._current
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        """Called in every handshake (SSLContext.sni_callback), also without a name."""
        seen = self._look()
        if seen != self._seen:
            try:
                self._current = self._load()
                self._seen = seen
            except (OSError, ssl.SSLError) as e:  # half renewed: the old one is good for now
                log.warning("certificate not read again", error=str(e))
        connection.context = self._current

    def _look(self) -> tuple[tuple[int, int], ...]:
        found = []
        for path in filter(None, self._paths()):
            try:
                facts = os.stat(path)
                found.append((facts.st_ino, facts.st_mtime_ns))
            except OSError:
                found.append((0, 0))
        return tuple(found)

    def _paths(self) -> tuple[str, ...]:
        s = self._settings
        return (s.stream_tls_cert, s.stream_tls_key, s.stream_tls_client_ca)

    def _load(self) -> ssl.SSLContext:
        certificate, key, authority = self._paths()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.options |= ssl.OP_NO_TICKET  # every connection shows its certificate
        context.num_tickets = 0
        context.load_cert_chain(certificate, key or None)
        if authority:
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def of(settings: config.Server) -> Certificate | None:
    """Return the configured certificate, None without one. Raises OSError, ssl.SSLError."""
    return Certificate(settings) if settings.stream_tls_cert else None
