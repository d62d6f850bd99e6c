# SPDX-License-Identifier: Apache-2.0
"""Images as CRI shows them."""

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cri_server import imagehost, spec
from cri_server.images import store
from cri_server.pb import api_pb2 as api
from tests.lab import image, pulling

MADE = image.image([], {"Env": ["A=1"], "Entrypoint": ["/x"], "User": "7", "Labels": {"k": "v"}})
RECORD = store.Image(
    id=MADE.id,
    repo_tags=("registry.test/a:1",),
    repo_digests=(f"registry.test/a@{MADE.digest}",),
    size=10,
    config=spec.ImageConfig(),
    platform="linux/amd64",
    layers=("1" * 64, "2" * 64),
    blobs=(MADE.id,),
)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[pulling.Node]:
    made = pulling.Node(tmp_path / "root", tmp_path / "hosts")
    yield made
    await made.close()


@pytest.fixture
def host(node: pulling.Node) -> imagehost.ImageHost:
    return imagehost.ImageHost(
        puller=node.puller,
        image_store=node.images,
        layers=node.layers,
        collector=node.collector,
    )


@pytest.mark.parametrize(
    ("user", "uid"),
    [("1000:1", 1000), ("2147483648", None), ("9" * 5000, None), ("1" * 5000 + ":1", None)],
    ids=["usual", "wide", "long", "long with a group"],
)
async def test_a_number_of_any_length_is_listed(
    node: pulling.Node, host: imagehost.ImageHost, user: str, uid: int | None
) -> None:
    node.images.put(dataclasses.replace(RECORD, config=spec.ImageConfig(user=user)))
    [listed] = host.list(api.ImageFilter())
    found, _ = await host.status(RECORD.id, verbose=False)
    assert found == listed
    assert (listed.uid.value if listed.HasField("uid") else None) == uid
    assert listed.username == ("" if uid else user.partition(":")[0])


async def test_a_pinned_image_says_so(tmp_path: Path, node: pulling.Node) -> None:
    images = store.Store(tmp_path / "pinned", pinned=["registry.test/a:*"])
    host = imagehost.ImageHost(
        puller=node.puller, image_store=images, layers=node.layers, collector=node.collector
    )
    images.put(RECORD)
    images.put(dataclasses.replace(RECORD, id=f"sha256:{'0' * 64}", repo_tags=(), repo_digests=()))
    assert {i.id: i.pinned for i in host.list(api.ImageFilter())} == {
        RECORD.id: True,
        f"sha256:{'0' * 64}": False,
    }


async def test_verbose_shows_the_config_in_containerds_shape(
    node: pulling.Node, host: imagehost.ImageHost
) -> None:
    node.images.write_blob(MADE.id, MADE.config)
    node.images.put(RECORD)
    _, info = await host.status(RECORD.id, verbose=True)
    shown = json.loads(info["info"])
    assert shown == {"chainID": f"sha256:{'2' * 64}", "imageSpec": json.loads(MADE.config)}
    assert shown["imageSpec"]["config"]["Entrypoint"] == ["/x"]


async def test_verbose_without_a_config_is_still_json(
    node: pulling.Node, host: imagehost.ImageHost
) -> None:
    node.images.put(dataclasses.replace(RECORD, layers=()))
    node.images.write_blob(MADE.id, b"spoilt \xff")
    _, info = await host.status(RECORD.id, verbose=True)
    assert json.loads(info["info"]) == {"chainID": "", "imageSpec": None}


async def test_images_and_writable_layers_share_a_file_system(
    node: pulling.Node, host: imagehost.ImageHost
) -> None:
    answer = host.fs_info()
    [of_images], [of_containers] = answer.image_filesystems, answer.container_filesystems
    assert of_images == of_containers
    assert of_images.fs_id.mountpoint == str(node.root)
