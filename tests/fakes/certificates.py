# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests: self-signed, so that the certificate is its own authority, or signed by
such a one."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Two PEM files."""

    certificate: Path
    key: Path

    def server(self, *, demand: Path | None = None) -> ssl.SSLContext:
        """Return a server's context; with `demand` clients must show a certificate of that CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        if demand:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(demand)
        return context


def make(
    folder: Path, name: str, *alternatives: str, authority: Certificate | None = None
) -> Certificate:
    """Make a certificate for names such as `DNS:registry.test` or `IP:127.0.0.1`."""
    made = Certificate(certificate=folder / f"{name}.pem", key=folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", f"subjectAltName={','.join(alternatives)}"]
    if authority:
        command += ["-CA", str(authority.certificate), "-CAkey", str(authority.key)]
    command += ["-keyout", str(made.key), "-out", str(made.certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return made
