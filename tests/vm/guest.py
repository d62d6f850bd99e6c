# SPDX-License-Identifier: Apache-2.0
"""What happens in the guest: install as deploy/README.md says, then the tests with each cgroup
driver.

Run by systemd with the guest's own Python, from the payload disk, as root; standard library only.
Results are JUnit files and facts.json in /payload/results. A step that fails ends the run; failing
tests do not.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PAYLOAD = Path("/payload")
RESULTS = PAYLOAD / "results"
SOURCES = PAYLOAD / "src"
HOME = Path("/opt/cri-server")
PYTHON = os.fspath(HOME / "bin/python")
PATIENCE = "6"  # by which deadlines are multiplied
WAIT = """\
from tests.fakes import kubelet
from tests.lab import waiting
served = lambda: kubelet.is_ready("unix:///run/cri-server/cri-server.sock")
waiting.until(served, "the unit serves", seconds=60)
"""


def main() -> None:
    """Do all of it, in order."""
    order = json.loads((PAYLOAD / "order.json").read_text())
    times: dict[str, float] = {}
    write("facts", facts())
    for name, step in (("install", install), ("deploy", deploy)):
        begin = time.monotonic()
        step(order)
        times[name] = time.monotonic() - begin
        print(f"{name}: {times[name]:.0f} s", flush=True)
    write("times", times)
    for run in order["runs"]:
        pytest(**run)


def journals() -> None:
    for name, which in (("journal", "--unit=cri-server"), ("kernel", "--dmesg")):
        journal = subprocess.run(["journalctl", "--no-pager", which], capture_output=True)
        (RESULTS / name).write_bytes(journal.stdout)


def facts() -> dict[str, Any]:
    """Tell what this guest is, as it says itself."""
    return {
        "system": said("sh", "-c", '. /etc/os-release; echo "$PRETTY_NAME"'),
        "kernel": os.uname().release,
        "cgroup file system": said("stat", "-fc", "%T", "/sys/fs/cgroup"),
        "cgroup controllers": Path("/sys/fs/cgroup/cgroup.controllers").read_text().strip(),
        "init": said("systemctl", "--version").partition("\n")[0],
        "security modules": Path("/sys/kernel/security/lsm").read_text().strip(),
        "runc": said("runc", "--version").partition("\n")[0],
        "crun": said("crun", "--version").partition("\n")[0],
        "python": said("python3", "--version"),
        "kernel parameters": security(Path("/proc/cmdline").read_text()),
        "booted": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def security(parameters: str) -> str:
    """Return those of the kernel's parameters that have to do with security modules."""
    names = ("security", "apparmor", "selinux", "enforcing")
    return " ".join(word for word in parameters.split() if word.partition("=")[0] in names)


def install(order: dict[str, Any]) -> None:
    """Install our wheel, and beside it what the tests need, without any index."""
    subprocess.run(["python3", "-m", "venv", HOME], check=True)
    pip = [PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-compile"]
    subprocess.run([*pip, "-f", f"{PAYLOAD}/wheels", "cri-server", *order["tools"]], check=True)
    if shutil.which("restorecon"):
        subprocess.run(["restorecon", "-R", HOME], check=True)


def deploy(_order: dict[str, Any]) -> None:
    """Put deploy/'s files where its README says, start the unit, and wait until it serves."""
    for name, place in (
        ("config.toml", "/etc/cri-server/config.toml"),
        ("cri-server.service", "/etc/systemd/system/cri-server.service"),
        ("10-bridge.conflist", "/etc/cni/net.d/10-bridge.conflist"),
    ):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCES / "deploy" / name, place)
    subprocess.run([HOME / "bin/cri-server", "check"], check=False)
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    subprocess.run(["systemctl", "enable", "--now", "cri-server"], check=True)
    patient = {**os.environ, "CRI_TESTS_PATIENCE": PATIENCE}
    subprocess.run([PYTHON, "-c", WAIT], cwd=SOURCES, env=patient, check=True)


def pytest(*, name: str, tests: list[str], driver: str, domain: str, env: dict[str, str]) -> None:
    """Run tests; what they say goes to the console and into a file, their result into JUnit.

    `domain` is that of SELinux, for the tests and the servers that they start; "" for ours.
    """
    print(f"== {name}: {' '.join(tests)}", flush=True)
    command = [PYTHON, "-m", "pytest", "-v", "--tb=short", "--color=no"]
    command += ["-o", "faulthandler_timeout=600", "-o", "junit_family=xunit1"]
    command += ["-p", "no:cacheprovider", f"--junitxml={RESULTS}/{name}.xml", *tests]
    context = ["runcon", f"system_u:system_r:{domain}:s0"] if domain else []
    logs = RESULTS / f"logs-{name}"
    variables = {
        **os.environ,
        **env,
        "CRI_TESTS_CGROUP_DRIVER": driver,
        "CRI_TESTS_LOGS": os.fspath(logs),
        "CRI_TESTS_PATIENCE": PATIENCE,
        "COLUMNS": "150",
    }
    with (RESULTS / f"{name}.log").open("wb") as log:
        run = subprocess.Popen(
            [*context, *command],
            cwd=SOURCES,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert run.stdout is not None
        for line in run.stdout:
            log.write(line)
            print(line.decode(errors="replace").rstrip()[:150], flush=True)
        (RESULTS / f"{name}.status").write_text(str(run.wait()))
    os.sync()  # the guest may be killed in the run after this one


def write(name: str, value: object) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(value, indent=1))


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    try:
        main()
    finally:
        journals()
