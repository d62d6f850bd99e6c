# SPDX-License-Identifier: Apache-2.0
"""What `cri-server reset` takes for its own is what the server makes below root and state."""

import re
from pathlib import Path

from cri_server import reset

SOURCES = Path(reset.__file__).parent
FOLDER = re.compile(r"\b(root|state|state_dir|_state)\b / \"(\w+)\"")


def made(*names: str) -> set[str]:
    """Return the folders that the sources name below what they call so."""
    found = (FOLDER.findall(p.read_text()) for p in SOURCES.rglob("*.py"))
    return {folder for pairs in found for name, folder in pairs if name in names}


def test_every_folder_below_root_goes() -> None:
    assert made("root") == set(reset.OF_ROOT)


def test_every_folder_below_state_goes() -> None:
    assert made("state", "state_dir", "_state") == set(reset.OF_STATE)
