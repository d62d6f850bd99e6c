# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does: settings, RPCs, functions, messages, links."""

import ast
import dataclasses
import errno
import functools
import os
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from cri_server import __main__, config
from cri_server.pb import api_pb2
from cri_server.services import interceptors
from tests.lab import matrix

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "deploy/README.md", *sorted(DOCS.glob("*.md"))]
SAMPLE = REPOSITORY / "deploy/config.toml"
CLASSES = (REPOSITORY / "deploy/runtimeclasses.yaml").read_text().split("\n---\n")
SECTIONS = {f"[{name}]": kind for name, kind in config.SECTIONS.items()} | {
    "[runtimes.NAME]": config.Handler
}
SERVICES = {"RuntimeService": "runtime.py", "ImageService": "image.py"}

Row = tuple[str, ...]


def tables(page: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a page's tables, each with the heading above it."""
    heading = ""
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| ") and not line.startswith("|--"):
            yield heading, tuple(cell.strip() for cell in line.split("|")[1:-1])


def plain(value: Any) -> Any:
    """Return a default as TOML would give it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


# -- configuration ---------------------------------------------------------------------------------


@functools.cache
def documented() -> dict[tuple[str, str], Row]:
    return {
        (heading, row[0].strip("`")): row
        for heading, row in tables("configuration.md")
        if heading in SECTIONS and row[0] != "key"
    }


def settings() -> list[Any]:
    return [
        pytest.param(heading, field, id=f"{heading} {field.name}")
        for heading, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
    ]


def test_no_setting_is_documented_that_is_not_there() -> None:
    known = {(h, f.name) for h, kind in SECTIONS.items() for f in dataclasses.fields(kind)}

    assert set(documented()) == known


@pytest.mark.parametrize(("heading", "field"), settings())
def test_a_setting_is_documented_with_its_default(
    heading: str, field: "dataclasses.Field[Any]"
) -> None:
    default = getattr(SECTIONS[heading](), field.name)
    _, _, said, meaning = documented()[heading, field.name]

    assert tomllib.loads(f"said = {said.strip('`')}")["said"] == plain(default)
    assert meaning.endswith(".")


@pytest.mark.parametrize(("heading", "field"), settings())
def test_a_setting_is_documented_with_its_choices(
    heading: str, field: "dataclasses.Field[Any]"
) -> None:
    kind = get_type_hints(SECTIONS[heading])[field.name]
    _, said, _, _ = documented()[heading, field.name]

    choices = tuple(filter(None, get_args(kind))) if get_origin(kind) is Literal else ()
    assert tuple(re.findall(r'`"(\w+)"`', said)) == choices


@pytest.mark.parametrize(("heading", "field"), settings())
def test_a_setting_is_read_somewhere(heading: str, field: "dataclasses.Field[Any]") -> None:
    sources = [p for p in (REPOSITORY / "cri_server").rglob("*.py") if p.name != "config.py"]

    assert any(re.search(rf"\.{field.name}\b", p.read_text()) for p in sources)


def test_the_sample_says_every_default_and_nothing_else() -> None:
    sample = tomllib.loads(SAMPLE.read_text())

    assert config.parse(sample) == config.Config()
    for name, kind in config.SECTIONS.items():
        assert set(sample[name]) == {f.name for f in dataclasses.fields(kind)}


def test_the_samples_example_of_a_handler_is_valid() -> None:
    text = re.sub(r"^#(?=\S)", "", SAMPLE.read_text(), flags=re.MULTILINE)
    (handler,) = tomllib.loads(text)["runtimes"].values()

    assert set(handler) == {f.name for f in dataclasses.fields(config.Handler)}
    assert config.parse(tomllib.loads(text)).runtimes


def examples() -> list[str]:
    """Return the pieces of configuration that the pages show: indented, with a section's head."""
    pieces = [
        textwrap.dedent(piece)
        for page in PAGES
        for piece in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", page.read_text(), re.MULTILINE)
    ]
    heads = "|".join((*config.SECTIONS, r"runtimes\.\w+"))
    return [piece for piece in pieces if re.search(rf"^\[({heads})\]$", piece, re.MULTILINE)]


def test_the_examples_of_configurations_are_valid() -> None:
    made = [config.with_handlers(config.parse(tomllib.loads(text))) for text in examples()]

    assert {"runsc", "kata", "strict"} <= {name for settings in made for name in settings.runtimes}


# -- RuntimeClasses --------------------------------------------------------------------------------


def section_above(text: str) -> str:
    """Return the TOML in the comment of a RuntimeClass: what is indented there."""
    return "".join(f"{line}\n" for line in re.findall(r"^#   (.*)$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("text", CLASSES, ids=lambda t: yaml.safe_load(t)["metadata"]["name"])
def test_a_runtime_class_names_a_handler_that_is_there_or_how_to_make_it(text: str) -> None:
    found = yaml.safe_load(text)
    handlers = config.with_handlers(config.parse(tomllib.loads(section_above(text)))).runtimes

    assert (found["apiVersion"], found["kind"]) == ("node.k8s.io/v1", "RuntimeClass")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", found["handler"])  # a DNS label
    assert found["handler"] in {*config.INSTALLED, *handlers}
    assert (found["handler"] in config.INSTALLED) == (section_above(text) == "")


def test_there_is_a_runtime_class_for_each_kind_of_handler() -> None:
    made = config.with_handlers(config.parse(tomllib.loads("\n".join(map(section_above, CLASSES)))))
    dialects = {handler.dialect for handler in made.runtimes.values()}

    assert {"runsc", "kata", "shim"} <= dialects
    assert len({yaml.safe_load(text)["metadata"]["name"] for text in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("handler", sorted(config.KERNELS))
def test_a_kernel_of_the_pods_own_has_an_overhead(handler: str) -> None:
    (found,) = [c for c in map(yaml.safe_load, CLASSES) if c["handler"] == handler]

    assert set(found["overhead"]["podFixed"]) == {"memory", "cpu"}


# -- what each handler can do ----------------------------------------------------------------------


def test_the_table_of_handlers_has_a_row_for_each_of_the_tests() -> None:
    names = definitions(REPOSITORY / "tests/integration" / matrix.MODULE)
    tests = re.findall(r"^test_(\w+)$", "\n".join(names), flags=re.MULTILINE)
    page = (DOCS / "runtimes.md").read_text()
    table = page.partition(matrix.BEGIN)[2].partition(matrix.END)[0]
    rows = re.findall(r"^\| (\w[^|]*) \|", table, flags=re.MULTILINE)

    assert rows == [test.replace("_", " ") for test in tests]  # else: make it as the page says


# -- RPCs ------------------------------------------------------------------------------------------


@functools.cache
def rpcs() -> dict[tuple[str, str], Row]:
    return {
        (heading.removeprefix("runtime.v1."), row[0]): row
        for heading, row in tables("rpcs.md")
        if heading.startswith("runtime.v1.") and row[0] != "RPC"
    }


def methods() -> list[tuple[str, str]]:
    services = api_pb2.DESCRIPTOR.services_by_name
    return [(name, method.name) for name in SERVICES for method in services[name].methods]


def test_the_page_has_the_rpcs_of_the_protocol_in_its_order() -> None:
    assert list(rpcs()) == methods()


@pytest.mark.parametrize(("service", "rpc"), methods())
def test_an_rpc_has_the_status_that_the_code_gives_it(service: str, rpc: str) -> None:
    path = REPOSITORY / "cri_server/services" / SERVICES[service]
    body = definitions(path).get(f"{service}.{rpc}")
    refuses = body is None or "_not_yet(" in ast.unparse(body)

    _, status, function, *_ = rpcs()[service, rpc]
    assert status == ("UNIMPLEMENTED" if refuses else "served")
    assert bool(function) != refuses


@pytest.mark.parametrize(("service", "rpc"), methods())
def test_an_rpc_runs_on_if_the_edge_shields_it(service: str, rpc: str) -> None:
    row = rpcs()[service, rpc]

    assert ("runs on" in " ".join(row[3:])) == (rpc in interceptors.MUTATIONS)


# -- functions -------------------------------------------------------------------------------------


@functools.cache
def definitions(path: Path) -> dict[str, ast.AST]:
    """Return the functions, classes and constants of a module by their qualified names."""
    found: dict[str, ast.AST] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign) and not prefix:
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update({t.id: child for t in targets if isinstance(t, ast.Name)})

    visit(ast.parse(path.read_text()), "")
    return found


def module(name: str) -> Path:
    """Return the file that the pages call by this name: below cri_server unless it says shim."""
    return REPOSITORY / name if name.startswith("shim/") else REPOSITORY / "cri_server" / name


def mentions() -> Iterator[tuple[str, str, str]]:
    """Yield page, file and function for each line of a path and each pair in a sentence."""
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        listed = re.findall(r"^ {4,}([\w/]+\.py) +([\w.]+)", text, flags=re.MULTILINE)
        paired = re.findall(r"`([\w/]+\.py)`,?\s`([\w.]+)`", text)
        yield from ((page.name, file, name) for file, name in (*listed, *paired))


def test_every_function_that_is_named_is_there() -> None:
    found = list(mentions())
    wrong = [m for m in found if not module(m[1]).exists() or m[2] not in definitions(module(m[1]))]

    assert len(found) > 100
    assert wrong == []


# -- messages --------------------------------------------------------------------------------------

# What stands for something else in a message that a page quotes, and what joins its parts.
BLANKS = re.compile(
    r"'[^']*'|\.\.\.|\b[A-Z]\b|\b(?:ADD|DEL|HOST|CONTAINER_\w+)\b|\d+|/\w[\w.-]*|\[.*?\]|: "
)


@functools.cache
def literals() -> str:
    """Return all strings of the sources, adjacent ones joined, a line each."""
    modules = [p for top in ("cri_server", "shim") for p in (REPOSITORY / top).rglob("*.py")]
    trees = [ast.parse(p.read_text()) for p in modules if "pb" not in p.parts]
    return "\n".join(text for tree in trees for text in _strings(tree))


def _strings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):  # one line, with a gap for each value
        yield "\0".join(str(v.value) for v in node.values if isinstance(v, ast.Constant))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from _strings(child)


def messages() -> list[str]:
    rows = [row for heading, row in tables("troubleshooting.md") if heading == "What errors mean"]
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row[0])]


@pytest.mark.parametrize("message", messages())
def test_a_message_is_quoted_as_it_is_said(message: str) -> None:
    system = {*errno.errorcode.values(), *map(os.strerror, errno.errorcode)}
    parts = [part.strip(" ():;,") for part in BLANKS.split(message)]

    assert [p for p in parts if p not in system and p not in literals()] == []


def test_steps_have_the_names_that_the_log_gives_them() -> None:
    _, _, slow = (DOCS / "troubleshooting.md").read_text().partition("\n## Slow\n")
    lines = re.findall(
        r"^    ([a-z ]+?) +total_ms=\S+ steps_ms=(\{.*?\})", slow, flags=re.MULTILINE
    )
    named = {name for operation, steps in lines for name in (operation, *ast.literal_eval(steps))}

    assert len(lines) == 3
    assert named <= set(literals().splitlines())


# -- links, commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())

    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_that_are_named_are_there(page: Path) -> None:
    folders = "deploy|docs|proto|tests|bench|cri_server|shim"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*\w)`", page.read_text()))

    assert [n for n in sorted(named) if not (REPOSITORY / n).exists()] == []


def test_commands_are_written_as_they_are_understood() -> None:
    texts = [page.read_text() for page in PAGES] + [
        (REPOSITORY / "deploy/cri-server.service").read_text()
    ]
    lines = [c for t in texts for c in re.findall(r"bin/cri-server((?: [\w=/.:-]+)+)$", t, re.M)]

    assert lines
    for line in lines:
        __main__._parser().parse_args(line.split())
