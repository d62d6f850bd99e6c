# SPDX-License-Identifier: Apache-2.0
"""The compiled protocols are, name by name and number by number, the published ones.

The facts (names, numbers and types, extracted from the published protocols) lie beside the
repository in ../shared/facts; where they do not, these tests are skipped and say so.

A message, enum or service is written here the way the facts write it, so a difference reads as a
diff of two lists of lines.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor, descriptor_pb2, descriptor_pool

REPOSITORY = Path(__file__).resolve().parent.parent
FACTS = REPOSITORY.parent / "shared" / "facts"

# The facts are of CRI 0.36.0; from 0.36.2 on this field is bytes, which is the same on the wire.
CORRECTED = {"runtime.v1.KeyValue": {"2 value string": "2 value bytes"}}


def load(name: str) -> dict[str, Any]:
    path = FACTS / name
    if not path.exists():
        pytest.skip(f"no {name} in {FACTS}")
    files: dict[str, Any] = json.loads(path.read_text())
    return files


def import_all(package: str) -> None:
    folder = REPOSITORY / package.replace(".", "/")
    for path in folder.glob("*_pb2.py"):
        importlib.import_module(f"{package}.{path.stem}")


def merged(files: dict[str, Any], kind: str) -> dict[str, Any]:
    """One table of all files' messages, enums or services, by full name."""
    return {full: each for file in files.values() for full, each in file.get(kind, {}).items()}


def type_of(field: descriptor.FieldDescriptor) -> str:
    """Spell a field's type as the facts do: a full name, or the keyword of a scalar."""
    if field.message_type is not None:
        return str(field.message_type.full_name)
    if field.enum_type is not None:
        return str(field.enum_type.full_name)
    return SCALARS[field.type]


SCALARS = {
    getattr(descriptor.FieldDescriptor, f"TYPE_{name.upper()}"): name
    for name in ("double", "int64", "uint64", "int32", "uint32", "bool", "string", "bytes")
}


def line(field: descriptor.FieldDescriptor) -> str:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        kind = f"map<{','.join(type_of(part) for part in entry.fields)}>"
    elif field.is_repeated:
        kind = f"repeated {type_of(field)}"
    elif field.containing_oneof is not None:  # proto3's `optional` is a oneof of one
        kind = f"optional {type_of(field)}"
    else:
        kind = type_of(field)
    deprecated = " deprecated" if field.GetOptions().deprecated else ""
    return f"{field.number} {field.name} {kind}{deprecated}"


def message_lines(message: descriptor.Descriptor) -> list[str]:
    return [line(field) for field in message.fields]


def method_line(method: descriptor.MethodDescriptor) -> str:
    taken = ("stream " if method.client_streaming else "") + method.input_type.full_name
    given = ("stream " if method.server_streaming else "") + method.output_type.full_name
    return f"{method.name} {taken} -> {given}"


def own_messages(message: descriptor.Descriptor) -> list[str]:
    """List the full names of a message and of what is nested in it, map entries left out."""
    nested = [each for each in message.nested_types if not each.GetOptions().map_entry]
    return [message.full_name, *(name for each in nested for name in own_messages(each))]


@pytest.fixture(params=["cri-v1.json", "shim-v2.json"], ids=["cri", "containerd"])
def files(request: pytest.FixtureRequest) -> dict[str, Any]:
    import_all("cri_server.pb" if request.param == "cri-v1.json" else "shim.pb.containerd")
    return load(request.param)


def test_messages_are_those_of_the_facts(files: dict[str, Any]) -> None:
    pool = descriptor_pool.Default()
    expected = {
        full: [CORRECTED.get(full, {}).get(text, text) for text in fields]
        for full, fields in merged(files, "messages").items()
    }
    compiled = {full: message_lines(pool.FindMessageTypeByName(full)) for full in expected}
    assert compiled == expected


def test_enums_are_those_of_the_facts(files: dict[str, Any]) -> None:
    pool = descriptor_pool.Default()
    expected = merged(files, "enums")
    compiled = {
        full: {value.name: value.number for value in pool.FindEnumTypeByName(full).values}
        for full in expected
    }
    assert compiled == expected


def test_services_are_those_of_the_facts(files: dict[str, Any]) -> None:
    pool = descriptor_pool.Default()
    expected = merged(files, "services")
    compiled = {
        full: [method_line(method) for method in pool.FindServiceByName(full).methods]
        for full in expected
    }
    assert compiled == expected


def test_nothing_is_declared_beyond_the_facts(files: dict[str, Any]) -> None:
    pool = descriptor_pool.Default()
    known = merged(files, "messages").keys()
    homes = {pool.FindMessageTypeByName(full).file for full in known}
    declared = {
        name
        for home in homes
        for message in home.message_types_by_name.values()
        for name in own_messages(message)
    }
    assert declared == set(known)


def test_reserved_numbers_stay_reserved() -> None:
    import_all("shim.pb.containerd")
    for full, ranges in merged(load("shim-v2.json"), "reserved").items():
        proto = descriptor_pb2.DescriptorProto()
        descriptor_pool.Default().FindMessageTypeByName(full).CopyToProto(proto)
        assert [[each.start, each.end - 1] for each in proto.reserved_range] == ranges
