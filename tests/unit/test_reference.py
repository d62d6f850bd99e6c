# SPDX-License-Identifier: Apache-2.0
"""Names of images, as docker reads them."""

import string

import hypothesis
import pytest
from hypothesis import strategies as st

from cri_server import errors
from cri_server.images import hosts, reference

HEX = "0123456789abcdef" * 4
SHA256 = f"sha256:{HEX}"
SHA512 = f"sha512:{HEX}{HEX}"

NORMAL = [
    ("a", "docker.io/library/a:latest"),
    ("a:1", "docker.io/library/a:1"),
    ("u/a", "docker.io/u/a:latest"),
    ("u/v/a", "docker.io/u/v/a:latest"),
    ("docker.io/a", "docker.io/library/a:latest"),
    ("docker.io/u/a:Tag_1.0-x", "docker.io/u/a:Tag_1.0-x"),
    ("index.docker.io/a", "docker.io/library/a:latest"),
    ("index.docker.io/u/a", "docker.io/u/a:latest"),
    ("localhost/a", "localhost/a:latest"),
    ("localhost:5000/a:v1", "localhost:5000/a:v1"),
    ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
    ("[::1]:5000/a:v1", "[::1]:5000/a:v1"),
    ("[::ffff:1.2.3.4]/a", "[::ffff:1.2.3.4]/a:latest"),
    ("quay.io/u/a_b__c-d.e---f:x", "quay.io/u/a_b__c-d.e---f:x"),
    ("Upper/a", "Upper/a:latest"),
    ("host:443/a", "host:443/a:latest"),
    (f"a@{SHA256}", f"docker.io/library/a@{SHA256}"),
    (f"a:v1@{SHA256}", f"docker.io/library/a@{SHA256}"),
    (f"quay.io/u/a@{SHA512}", f"quay.io/u/a@{SHA512}"),
    (f"a:{HEX}", f"docker.io/library/a:{HEX}"),
]

MALFORMED = [
    "",
    " ",
    "a ",
    "a\n",
    "/a",
    "a/",
    "a//b",
    "-a",
    "a_",
    "a___b",
    "a..b/c/../d",
    "../a",
    "a/../b",
    "u/A",
    "A",
    "a:",
    "a:-x",
    f"a:{'x' * 129}",
    "a@",
    "a@sha256:",
    f"a@sha256:{HEX[:-1]}",
    f"a@sha256:{HEX.upper()}",
    f"a@md5:{HEX[:32]}",
    f"a@sha256:{HEX}/../../x",
    f"a@{SHA256}@{SHA256}",
    f"@{SHA256}",
    "a@sha256:../../../etc/passwd",
    "host:0/a",
    "host:65536/a",
    "host:x/a",
    "host.:5000/a",
    "[1:2]/a",
    "[1.2.3.4]:5000/a",
    "[::1::]/a",
    "ex_ample.com/a",
    "user@host.example/a",
    "https://host.example/a",
    "host.example/a?ns=b",
    "host.example/a%2fb",
    "hösт.example/a",
    "٣.example/a",
    f"docker.io/{'a/' * 130}a",
    HEX,
    SHA256,
]


@pytest.mark.parametrize(("text", "normal"), NORMAL)
def test_names_have_one_normal_form(text: str, normal: str) -> None:
    assert str(reference.parse(text)) == normal
    assert reference.parse(normal) == reference.parse(str(reference.parse(normal)))


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_name_is_refused_by_name(text: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="invalid image reference") as caught:
        reference.parse(text)
    assert repr(text[:300]) in caught.value.message
    assert "\n" not in caught.value.message


def test_parts_of_a_tagged_name() -> None:
    ref = reference.parse("a")
    assert (ref.domain, ref.path, ref.tag, ref.digest) == ("docker.io", "library/a", "latest", None)
    assert ref.repository == "docker.io/library/a"
    assert ref.tagged == "docker.io/library/a:latest"
    assert ref.canonical(SHA256) == f"docker.io/library/a@{SHA256}"
    assert ref.target == "latest"


def test_a_digest_rules_over_a_tag() -> None:
    ref = reference.parse(f"a:v1@{SHA256}")
    assert (ref.tag, ref.tagged, ref.target) == ("v1", None, SHA256)


def test_a_digest_alone_has_no_tag() -> None:
    ref = reference.parse(f"a@{SHA256}")
    assert (ref.tag, ref.tagged) == (None, None)


@pytest.mark.parametrize("text", [HEX, SHA256])
def test_image_ids_are_told_apart(text: str) -> None:
    assert reference.is_image_id(text)


@pytest.mark.parametrize(
    "text", ["", "a", HEX[:-1], HEX.upper(), SHA512, f"a@{SHA256}", HEX + "\n"]
)
def test_other_texts_are_no_image_ids(text: str) -> None:
    assert not reference.is_image_id(text)


part = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
host = st.sampled_from(["docker.io", "quay.io", "localhost", "localhost:5000", "[::1]:5000"])
tag = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=20)


@hypothesis.given(host, st.lists(part, min_size=2, max_size=4), tag)
def test_what_is_put_together_comes_apart(domain: str, parts: list[str], label: str) -> None:
    ref = reference.parse(f"{domain}/{'/'.join(parts)}:{label}")
    assert (ref.domain, ref.path, ref.tag) == (domain, "/".join(parts), label)
    assert reference.parse(str(ref)) == ref


@hypothesis.given(st.text() | st.text("ab./:@-_%?#[]\\\0\nA0", max_size=40))
def test_any_text_is_refused_or_safe(text: str) -> None:
    try:
        ref = reference.parse(text)
    except errors.InvalidArgument:
        return
    assert str(ref).isascii()
    assert not set(str(ref)) & set(" \\%?#\0\n\r\t")
    assert not {"", ".", ".."} & set(ref.repository.split("/"))
    assert reference.parse(str(ref)).target == ref.target
    assert hosts.load([], ref.domain)
