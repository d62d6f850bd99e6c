# SPDX-License-Identifier: Apache-2.0
"""CreateContainer and RemoveImage at the same moment: who has begun with an image keeps it."""

import concurrent.futures
from collections.abc import Callable

import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet
from tests.integration.conftest import SLEEP
from tests.lab import holding, image, server
from tests.lab.registry import Registry

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry", "busybox"),
    pytest.mark.ours,
]


@pytest.mark.parametrize("as_volume", [False, True], ids=["its image", "a volume's image"])
def test_an_image_removed_while_a_container_is_being_made_keeps_its_layers(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    registry: Registry,
    reference: str,
    as_volume: bool,
) -> None:
    """The image goes after the container was asked for, before its record says what it needs."""
    site = make_site()
    gate = holding.gated(site, site.root / "containers")
    client = client_of(site)
    extra = [image.Entry(name="proof", data=b"here\n")]
    going = client.pull(registry.push(image.busybox(extra), "claims/going"))
    wish = client.container_config(going, SLEEP)
    if as_volume:
        volume = api.Mount(container_path="/v", readonly=True, image=api.ImageSpec(image=going))
        wish = client.container_config(client.pull(reference), SLEEP, mounts=[volume])
    pod = client.run_pod()
    gate.shut()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        creation = pool.submit(lambda: client.create(pod, wish))
        gate.wait()  # the record is about to be written
        client.remove_image(going)
        gate.open()
        container = creation.result()
    client.start(container)
    path = "/v/proof" if as_volume else "/proof"
    assert client.exec_sync(container, ["cat", path]).stdout == b"here\n"
    assert client.image_status(going) is None
