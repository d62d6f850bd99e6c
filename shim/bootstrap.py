# SPDX-License-Identifier: Apache-2.0
"""What a shim is told when it is made: values that travel as JSON from the server through the zygote.

A shim keeps them for its life; they are not read again. Unknown keys are ignored, so that a zygote and
a server of neighbouring versions understand each other.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class HandlerSpec:
    """One runtime handler: `kind` "oci" is a command line, "shim" a containerd-shim-*-v2 binary."""

    name: str
    path: str  # of the executable
    root: str  # where it keeps its own state: runc --root
    kind: str = "oci"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrap:
    """All that a new shim knows."""

    pod_id: str
    pod_dir: str  # absolute; the pod's state directory, which holds the shim's socket
    handler: HandlerSpec
    features: Mapping[str, Any] = field(default_factory=dict)  # `runc features`, {} when not known

    def to_json(self) -> bytes:
        """Return the wire form."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Bootstrap":
        """Parse the wire form. Raises ValueError."""
        fields = json.loads(data)
        try:
            handler = HandlerSpec(**_known(HandlerSpec, fields["handler"]))
            return cls(**{**_known(cls, fields), "handler": handler})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a bootstrap: {error}") from error


def _known(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    return {key: value for key, value in fields.items() if key in names}
