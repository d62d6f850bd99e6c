# SPDX-License-Identifier: Apache-2.0
"""`cri-server image import` and `tag`, as an operator runs them, against a running server."""

import gzip
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.fakes.kubelet import Kubelet
from tests.lab import archives, image, server

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(site: server.Site) -> Run:
    """Return a function that runs `cri-server image ...` for the session's server."""

    def call(*arguments: str | Path, stdin: bytes = b"") -> "subprocess.CompletedProcess[str]":
        command = [server.command(), "image", *map(str, arguments)]
        done = subprocess.run(
            [*command, "--config", os.fspath(site.home / "config.toml")],
            input=stdin,
            capture_output=True,
        )
        texts = (done.stdout.decode(), done.stderr.decode())
        return subprocess.CompletedProcess(done.args, done.returncode, *texts)

    return call


@pytest.fixture
def made(request: pytest.FixtureRequest) -> image.Image:
    """Return an image that no other test has."""
    return image.busybox([image.Entry(name="who", data=request.node.name.encode())])


def in_tmp(site: server.Site) -> list[str]:
    return [name for name in os.listdir(site.root / "tmp") if name.startswith("import-")]


def test_a_container_runs_from_an_imported_image_that_no_registry_has(
    kubelet: Kubelet, run: Run, made: image.Image, tmp_path: Path
) -> None:
    archive = archives.layout(tmp_path / "a.tar", ("nowhere.test/imported:1", made))
    done = run("import", archive)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"imported nowhere.test/imported:1 {made.id}\n"
    container = kubelet.run(kubelet.run_pod(), "nowhere.test/imported:1", ("sleep", "99"))
    assert kubelet.exec_sync(container, ["cat", "/who"]).stdout.startswith(b"test_a_container_runs")


@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"]
)
def test_what_comes_from_stdin_may_be_compressed(
    kubelet: Kubelet,
    site: server.Site,
    run: Run,
    made: image.Image,
    tmp_path: Path,
    pack: Callable[[bytes], bytes],
) -> None:
    layers = [image.busybox_layer(), gzip.decompress(list(made.blobs.values())[-1])]
    archive = archives.docker(tmp_path / "a.tar", ["nowhere.test/in:1"], layers, made.config)
    done = run("import", "-", stdin=pack(archive.read_bytes()))
    assert (done.returncode, done.stderr) == (0, "")
    found = kubelet.image_status("nowhere.test/in:1")
    assert found is not None
    assert found.id == made.id
    assert in_tmp(site) == []
    kubelet.remove_image(made.id)


def test_a_compressed_file_is_inflated_and_named(
    kubelet: Kubelet, site: server.Site, run: Run, made: image.Image, tmp_path: Path
) -> None:
    archive = archives.layout(tmp_path / "a.tar", ("", made))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(archive.read_bytes()))
    assert run("import", tmp_path / "a.tar.gz", "--name", "nowhere.test/b").returncode == 0
    found = kubelet.image_status("nowhere.test/b:latest")
    assert found is not None
    assert found.id == made.id
    assert in_tmp(site) == []
    kubelet.remove_image(made.id)


def test_an_image_gets_a_second_name(
    kubelet: Kubelet, run: Run, made: image.Image, tmp_path: Path
) -> None:
    run("import", archives.layout(tmp_path / "a.tar", ("nowhere.test/a:1", made)))
    done = run("tag", made.id, "nowhere.test/other:2")
    assert (done.returncode, done.stderr) == (0, "")
    found = kubelet.image_status(made.id)
    assert found is not None
    assert set(found.repo_tags) == {"nowhere.test/a:1", "nowhere.test/other:2"}
    kubelet.remove_image(made.id)


def test_a_failure_says_what_is_wrong_and_leaves_nothing(
    kubelet: Kubelet, site: server.Site, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    broken = run("import", "-", stdin=gzip.compress(b"x" * 5000)[:-9])
    outcomes = {
        "no such file": run("import", tmp_path / "missing"),
        "is no image archive": run("import", tmp_path / "junk"),
        "cannot decompress gzip": broken,
        "is not here": run("tag", "nowhere.test/nothing", "a:1"),
    }
    for says, done in outcomes.items():
        assert says in done.stderr.lower()
        assert done.returncode == 1
        assert done.stderr.startswith("cri-server: ")
        assert done.stderr.count("\n") == 1
    assert in_tmp(site) == []
