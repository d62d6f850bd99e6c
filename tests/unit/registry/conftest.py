# SPDX-License-Identifier: Apache-2.0
"""A registry, a mirror, and a client with little patience."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cri_server.images import reference, registry
from tests.fakes import registry as fake
from tests.fakes.pulling import QUICK, name, write_hosts


@pytest.fixture
def there() -> Iterator[fake.Registry]:
    """Return a running registry."""
    with fake.run() as running:
        yield running


@pytest.fixture
def mirror() -> Iterator[fake.Registry]:
    """Return another running registry."""
    with fake.run() as running:
        yield running


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[registry.Client]:
    """Return a client that reads hosts.toml files below `tmp_path`, with little patience."""
    made = registry.Client([tmp_path], limits=QUICK)
    yield made
    made.close()


@pytest.fixture
def via_mirror(tmp_path: Path, there: fake.Registry, mirror: fake.Registry) -> reference.Reference:
    """Return a name for which `mirror` is asked before `there`."""
    write_hosts(tmp_path, there.address, f'[host."http://{mirror.address}"]\n')
    return name(there)
