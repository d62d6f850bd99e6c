# SPDX-License-Identifier: Apache-2.0
"""What becomes of each field of a pod's and a container's configuration.

`fields.txt` names the test that shows a field honoured, `_refused` holds a request that sets it and
is refused. Every field of the protocol stands in one of them: `tests/unit/test_fields.py` sees to
it, runs the requests, and compares `table` with docs/fields.md. After a change:

    python -m tests.lab.fields > docs/fields.md
"""

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

TESTS = Path(__file__).resolve().parent.parent
MESSAGES = ("PodSandboxConfig", "ContainerConfig")
_BRACES = re.compile(r"\{([^{}]*)\}")
_HEAD = """# What becomes of each field

Every field of PodSandboxConfig and ContainerConfig, with LinuxContainerResources and all else that
is in them. Honoured is what a test shows; refused is what fails with the error that is quoted.
Nothing is ignored. `tests/unit/test_fields.py` walks the protocol, looks for the tests, runs what
is refused, and compares. After a change of `fields.txt` or `fields.py` in tests/lab:

    python -m tests.lab.fields > docs/fields.md
"""


# -- the protocol ----------------------------------------------------------------------------------


def of_protocol() -> list[str]:
    """Return every field, "ContainerConfig.linux.resources.cpu_shares", in the protocol's order."""
    return [
        f"{name}.{field}"
        for name in MESSAGES
        for field in _walk(api.DESCRIPTOR.message_types_by_name[name])
    ]


def _walk(message: Any) -> Iterator[str]:
    for field in message.fields:
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.name == "Int64Value":
            yield field.name
        else:
            yield from (f"{field.name}.{below}" for below in _walk(inner))


# -- the table's data ------------------------------------------------------------------------------


@functools.cache
def honoured() -> Mapping[str, str]:
    """Return the test of each honoured field: "integration/test_pods.py::test_…"."""
    found: dict[str, str] = {}
    message = ""
    for line in (TESTS / "lab/fields.txt").read_text().splitlines():
        if line.startswith(" "):
            pattern, test = line.split()
            found |= dict.fromkeys(_expanded(f"{message}.{pattern}"), test)
        elif line in MESSAGES:
            message = line
    return found


def refused() -> Mapping[str, Callable[[], object]]:
    """Return a request for each refused field, which sets it and is unusual in nothing else."""
    return {field: ask for pattern, ask in _REFUSED.items() for field in _expanded(pattern)}


def _expanded(pattern: str) -> list[str]:
    """Return what a pattern stands for: "a.{b,c}.{d,e}" is a.b.d, a.b.e, a.c.d, a.c.e."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [field for one in found[1].split(",") for field in _expanded(before + one + after)]


# -- what is refused -------------------------------------------------------------------------------


def _pod(**options: Any) -> None:
    spec.validate_sandbox(wishes.pod(options=options), wishes.FACTS)


def _windows_pod() -> None:
    config = wishes.pod(windows=api.WindowsPodSandboxConfig())
    spec.validate_sandbox(config, wishes.FACTS)


def _container(**fields: Any) -> None:
    wishes.validate(wishes.container(**fields))


def _windows_container() -> None:
    _container(windows=api.WindowsContainerConfig())


_OPTIONS = "linux.security_context.namespace_options"
_REFUSED: Mapping[str, Callable[[], object]] = {
    f"PodSandboxConfig.{_OPTIONS}.target_id": lambda: _pod(target_id="f" * 64),
    "PodSandboxConfig.windows.security_context."
    "{run_as_username,credential_spec,host_process}": _windows_pod,
    "PodSandboxConfig.windows.security_context.namespace_options.network": _windows_pod,
    "ContainerConfig.windows.resources."
    "{cpu_shares,cpu_count,cpu_maximum,memory_limit_in_bytes,rootfs_size_in_bytes}": (
        _windows_container
    ),
    "ContainerConfig.windows.resources.affinity_cpus.{cpu_mask,cpu_group}": _windows_container,
    "ContainerConfig.windows.security_context."
    "{run_as_username,credential_spec,host_process}": _windows_container,
}


def refusal(ask: Callable[[], object]) -> str:
    """Return the error that a request is refused with, "" if it is not."""
    try:
        ask()
    except errors.CriError as e:
        return e.message
    return ""


# -- the page --------------------------------------------------------------------------------------


def tests_of(file: str) -> set[str]:
    """Return the names of the test functions in a file below tests/."""
    path = TESTS / file
    if not path.exists():
        return set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.parse(path.read_text()).body
    return {n.name for n in nodes if isinstance(n, functions) and n.name.startswith("test_")}


def table() -> str:
    """Return the text of docs/fields.md."""
    lines = [_HEAD]
    for message in MESSAGES:
        lines += [f"## {message}\n", "| field | |", "|---|---|"]
        fields = [f for f in of_protocol() if f.startswith(f"{message}.")]
        lines += [f"| `{f.removeprefix(f'{message}.')}` | {_outcome(f)} |" for f in fields]
        lines.append("")
    return "\n".join(lines)


def _outcome(field: str) -> str:
    test = honoured().get(field)
    if test is not None:
        file, name = test.split("::")
        return f"honoured: `{name}` in `tests/{file}`"
    return f"refused: `{refusal(refused()[field])}`"


if __name__ == "__main__":
    sys.stdout.write(table())
