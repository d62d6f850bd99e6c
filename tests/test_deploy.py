# SPDX-License-Identifier: Apache-2.0
"""What is in deploy/ beside the server: scripts, units, the node image for kind and minikube.

The scripts run for real, on a folder in place of / (DESTDIR). What kind and minikube call, and what
their files may say, is from their sources: kind's pkg/cluster/nodeutils/util.go and
pkg/apis/config/v1alpha4/types.go, minikube's pkg/minikube/cruntime/containerd.go.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from cri_server import __main__, config
from tests import test_wheel

REPOSITORY = Path(__file__).resolve().parent.parent
DEPLOY, NODE = REPOSITORY / "deploy", REPOSITORY / "deploy/node"
SCRIPTS = [*DEPLOY.glob("*.sh"), *NODE.glob("*.sh"), NODE / "ctr", NODE / "containerd"]
SOCKET = "unix:///run/containerd/containerd.sock"  # what kind writes into kubeadm's configuration
UNITS = "etc/systemd/system"
Done = subprocess.CompletedProcess[str]


def run(*command: str | Path, env: dict[str, str] | None = None, check: bool = True) -> Done:
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# ---- scripts


@pytest.mark.needs("shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    done = run("shellcheck", *SCRIPTS, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_can_be_executed(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the checkout: pip builds beside the sources."""
    target = tmp_path / "tree"
    target.mkdir()
    test_wheel.copy_sources(target)
    shutil.copytree(DEPLOY, target / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Return a folder for a host, whose program's environment finds our dependencies here."""
    program = tmp_path / "host/opt/cri-server"
    run(sys.executable, "-m", "venv", program)
    site = next((program / "lib").glob("python3.*/site-packages"))
    shutil.rmtree(site / "setuptools", ignore_errors=True)  # Debian 12's is too old for us
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "host"


def install(tree: Path, host: Path, *arguments: str, check: bool = True) -> Done:
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    env = {"DESTDIR": os.fspath(host), **offline}
    return run(tree / "deploy/install.sh", "--no-packages", *arguments, env=env, check=check)


def files(folder: Path) -> set[str]:
    """Return what is in a folder, but for the program's own environment."""
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())
    return {name for name in found if not re.match(r"opt/cri-server/(?!replaced)", name)}


INSTALLED = {f"{UNITS}/cri-server.service", "etc/cri-server/config.toml", "etc/crictl.yaml"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.needs("root")
def test_install_upgrade_and_uninstall(tree: Path, host: Path) -> None:
    install(tree, host)
    assert files(host) == INSTALLED
    told = run(host / "opt/cri-server/bin/cri-server", "--version")
    assert told.stdout.startswith("cri-server ")
    settings = host / "etc/cri-server/config.toml"
    settings.write_text(
        f'[server]\nroot = "{host}/root"\nstate = "{host}/run"\nlisten = "unix://{host}/sock"\n'
    )
    (host / UNITS / "cri-server.service").write_text("an older version's\n")
    again = install(tree, host)
    assert "config.toml is there: left as it is" in again.stdout
    assert settings.read_text().startswith("[server]")
    unit = (DEPLOY / "cri-server.service").read_text()
    assert (host / UNITS / "cri-server.service").read_text() == unit
    run(tree / "deploy/uninstall.sh", "--purge", env={"DESTDIR": os.fspath(host)})
    assert [p for p in host.rglob("*") if not p.is_dir()] == []


@pytest.mark.needs("root")
def test_install_refuses_what_it_does_not_know(tree: Path, tmp_path: Path) -> None:
    for wrong in (["--what"], ["--from"], ["--from", "/no/such.whl"]):
        done = install(tree, tmp_path / "host", *wrong, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("install: ")
    assert not (tmp_path / "host").exists()


# ---- kind-config.yaml, the recipe


CLUSTER = {
    "kind", "apiVersion", "name", "nodes", "networking", "featureGates", "runtimeConfig",
    "kubeadmConfigPatches", "kubeadmConfigPatchesJSON6902", "containerdConfigPatches",
    "containerdConfigPatchesJSON6902",
}  # fmt: skip
OF_NODE = {
    "role", "image", "labels", "extraMounts", "extraPortMappings", "kubeadmConfigPatches",
    "kubeadmConfigPatchesJSON6902",
}  # fmt: skip


def test_kind_understands_its_configuration() -> None:
    cluster = yaml.safe_load((REPOSITORY / "kind-config.yaml").read_text())
    assert set(cluster) <= CLUSTER
    assert (cluster["kind"], cluster["apiVersion"]) == ("Cluster", "kind.x-k8s.io/v1alpha4")
    assert re.fullmatch(r"[a-z0-9.-]+", cluster["name"])
    roles = [node["role"] for node in cluster["nodes"]]
    assert set(roles) <= {"control-plane", "worker"}
    assert "control-plane" in roles
    assert all(set(node) <= OF_NODE for node in cluster["nodes"])


def test_the_recipe_builds_the_image_that_the_configuration_names() -> None:
    cluster = yaml.safe_load((REPOSITORY / "kind-config.yaml").read_text())
    recipe = (NODE / "Dockerfile").read_text()
    assert {node["image"] for node in cluster["nodes"]} == {"cri-server/kind-node"}
    assert "docker build -f deploy/node/Dockerfile -t cri-server/kind-node ." in recipe


def test_the_recipe_copies_what_is_there_and_its_context_lets_through() -> None:
    recipe = (NODE / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", recipe, flags=re.MULTILINE)
    sources = {word for line in copied for word in line.split()}
    let = (NODE / "Dockerfile.dockerignore").read_text().splitlines()
    assert {"pyproject.toml", "cri_server", "shim", "deploy"} < sources
    assert [s for s in sources if not (REPOSITORY / s).exists()] == []
    assert {s.split("/")[0] for s in sources} == {line[1:] for line in let if line[0] == "!"}


def test_the_nodes_server_answers_on_containerds_socket() -> None:
    settings = config.parse(tomllib.loads((NODE / "config.toml").read_text()))
    assert settings.server.listen == SOCKET
    assert "test-handler" in settings.runtimes


def test_the_nodes_units_call_what_there_is() -> None:
    text = (NODE / "cri-server-images.service").read_text()
    (line,) = re.findall(r"^ExecStart=/opt/cri-server/bin/cri-server (.*)$", text, re.MULTILINE)
    asked = __main__._parser().parse_args(line.split())
    assert f"ConditionPathExists={asked.file}\n" in text
    assert f"/out/ {Path(asked.file).parent}/" in (NODE / "Dockerfile").read_text()


# ---- taking containerd's place


@pytest.fixture(params=["usr/local/bin", "usr/bin"], ids=["kind", "minikube"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the root of a node image: kind has containerd in one place, minikube in the other."""
    root, place = tmp_path / "image", request.param
    for name in ("containerd", "ctr"):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / name).write_text(f'#!/bin/sh\necho "real {name} $@"\n')
        (root / place / name).chmod(0o755)
    (root / UNITS / "sockets.target.wants").mkdir(parents=True)
    (root / UNITS / "multi-user.target.wants").mkdir()
    (root / UNITS / "containerd.service").write_text("theirs")
    (root / UNITS / "cri-server.service").write_text("from install.sh")
    for link in ("sockets.target.wants/docker.socket", "multi-user.target.wants/kubelet.service"):
        (root / UNITS / link).symlink_to("/lib/systemd/system/x")
    (root / "var/lib/containerd/blobs").mkdir(parents=True)
    return root


def take_place(root: Path) -> None:
    run(NODE / "take-place.sh", env={"DESTDIR": os.fspath(root)})


def test_containerd_makes_way(image: Path) -> None:
    take_place(image)
    take_place(image)  # a second time changes nothing
    units, wants = image / UNITS, image / UNITS / "multi-user.target.wants"
    assert (units / "containerd.service").read_text() == (DEPLOY / "cri-server.service").read_text()
    assert (units / "cri-server.service").resolve() == units / "containerd.service"
    for unit in ("containerd.service", "cri-server-images.service"):
        assert (wants / unit).resolve() == units / unit
    assert (wants / "kubelet.service").is_symlink()
    assert not (units / "sockets.target.wants/docker.socket").is_symlink()
    assert (units / "kubelet.service.d/20-cri-server.conf").exists()
    assert SOCKET in (image / "etc/crictl.yaml").read_text()
    assert not (image / "var/lib/containerd").exists()
    replaced = image / "opt/cri-server/replaced"
    assert run(replaced / "ctr", "x").stdout == "real ctr x\n"


def test_an_image_without_containerd_is_no_node_image(tmp_path: Path) -> None:
    done = run(NODE / "take-place.sh", env={"DESTDIR": os.fspath(tmp_path)}, check=False)
    assert done.returncode == 1
    assert "is it a node image?" in done.stderr


def test_containerd_answers_questions_and_does_not_start(image: Path) -> None:
    take_place(image)
    program = next(image.glob("usr/**/containerd"))
    env = {"CRI_SERVER_REPLACED": os.fspath(image / "opt/cri-server/replaced")}
    assert run(program, "config", "dump", env=env).stdout == "real containerd config dump\n"
    assert run(program, "--version", env=env).stdout == "real containerd --version\n"
    for arguments in ((), ("--config", "/etc/containerd/config.toml")):
        done = run(program, *arguments, env=env, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "cri-server runs in its place" in done.stderr


@pytest.fixture
def bin_(tmp_path: Path) -> Path:
    """Return a folder with a `cri-server` that tells what it was asked, and a crictl."""
    listed = '{"images": [{"id": "sha256:7", "repoTags": ["a:1"], "repoDigests": ["a@sha256:8"]}]}'
    for name, lines in {
        "cri-server": 'echo "$@"; cat',
        "crictl": f"echo \"$@\" >&2; echo '{listed}'",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def ctr(bin_: Path, *arguments: str) -> Done:
    path = f"{bin_}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "CRI_SERVER": os.fspath(bin_ / "cri-server")}
    return subprocess.run(
        [NODE / "ctr", *arguments], env=env, input="<stdin>", capture_output=True, text=True
    )


K8S = "--namespace=k8s.io"
KIND_LOADS = (K8S, "images", "import", "--all-platforms", "--digests", "--snapshotter=overlayfs")
ASKED = {
    "kind load": ((*KIND_LOADS, "-"), "image import -\n<stdin>"),
    "kind load, before 0.20": ((K8S, "images", "import", "-"), "image import -\n<stdin>"),
    "kind load, another tag": (
        (K8S, "images", "tag", "--force", "sha256:7", "docker.io/library/a:2"),
        "image tag sha256:7 docker.io/library/a:2\n<stdin>",
    ),
    "minikube image load": (
        ("-n=k8s.io", "images", "import", "/var/lib/minikube/images/a_1"),
        "image import /var/lib/minikube/images/a_1\n<stdin>",
    ),
    "minikube image tag": (
        ("-n=k8s.io", "images", "tag", "a:1", "b:2"),
        "image tag a:1 b:2\n<stdin>",
    ),
    "minikube's look": (
        ("-n=k8s.io", "images", "ls", "name==a:1"),
        "REF ID\na:1 sha256:7\na@sha256:8 sha256:7\n",
    ),
    "names": (("-n", "k8s.io", "images", "list", "-q"), "a:1\na@sha256:8\n"),
    "readiness": (("info",), "--version\n<stdin>"),
}


@pytest.mark.parametrize("what", ASKED)
def test_ctr_does_what_kind_and_minikube_ask(bin_: Path, what: str) -> None:
    arguments, answer = ASKED[what]
    done = ctr(bin_, *arguments)
    assert (done.returncode, done.stdout) == (0, answer)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-n=k8s.io", "images", "export", "/tmp/a.tar", "a:1"),
        (K8S, "images", "import", "--base-name=x", "-"),
        (K8S, "images", "import"),
        (K8S, "images", "tag", "a:1"),
        ("images",),
        ("containers", "list"),
        (),
    ],
    ids=" ".join,
)
def test_ctr_refuses_the_rest_by_name(bin_: Path, arguments: tuple[str, ...]) -> None:
    done = ctr(bin_, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not served: cri-server runs in containerd's place" in done.stderr
