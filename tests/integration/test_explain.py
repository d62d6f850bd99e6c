# SPDX-License-Identifier: Apache-2.0
"""`cri-server explain`: where each part of a real container's config.json came from."""

import json
from pathlib import Path

import pytest

from cri_server import origins
from tests.fakes.kubelet import Kubelet, Pod
from tests.integration.conftest import SLEEP
from tests.lab import server

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]


def rows(bundle: Path) -> dict[str, origins.Row]:
    document = json.loads((bundle / "config.json").read_text())
    return {row.part: row for row in origins.rows(document, origins.read(bundle))}


def test_each_part_of_a_real_config_json_has_an_origin(
    kubelet: Kubelet, pod: Pod, pulled: str, site: server.Site
) -> None:
    container = kubelet.create(pod, kubelet.container_config(pulled, SLEEP))
    for bundle in (site.state / "containers" / container, site.state / "pods" / pod.id / "sandbox"):
        if bundle.exists():
            assert [part for part, row in rows(bundle).items() if not row.notes] == []
