# SPDX-License-Identifier: Apache-2.0
"""Compile every .proto of this folder: `python proto/generate.py [OUT]`, by default in place.

Each source folder is mounted on the Python package that its output belongs to (protoc's
`-Ivirtual=disk`), so the generated imports are right as they leave protoc and nothing is edited
afterwards. The stubs come from mypy-protobuf, because those of protoc itself do not pass
`mypy --strict`.

The generated files refuse to be imported under an older grpcio or protobuf than the generator's:
the pin of grpcio-tools in pyproject.toml decides the floors of the two dependencies there.

Nothing here is needed at run time. tests/test_style.py runs it in a temporary folder and compares.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
# Any, Timestamp and Empty as grpcio-tools brings them, so that no copy of the machine's is used.
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One folder of .proto files and the package that its modules land in."""

    source: str
    package: str
    grpc: bool = False

    def virtual_names(self) -> list[str]:
        return sorted(
            f"{self.package}/{path.name}" for path in (HERE / self.source).glob("*.proto")
        )


# Only cri_server speaks gRPC; the shim's two protocols travel over ttrpc and need messages alone.
UNITS = (
    Unit(source="cri/v1", package="cri_server/pb", grpc=True),
    Unit(source="shim/v1", package="shim/pb"),
    Unit(source="containerd", package="shim/pb/containerd"),
)


def main(out: Path) -> int:
    """Compile all units below `out`; return protoc's exit code."""
    return next((code for code in (compile_unit(unit, out) for unit in UNITS) if code), 0)


def compile_unit(unit: Unit, out: Path) -> int:
    package = out / unit.package
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    stubs = ["mypy", "mypy_grpc"] if unit.grpc else ["mypy"]
    outputs = [*stubs, "python", "grpc_python"] if unit.grpc else [*stubs, "python"]
    beside = Path(sys.executable).parent
    arguments = [
        *(f"--plugin=protoc-gen-{name}={beside / f'protoc-gen-{name}'}" for name in stubs),
        f"-I{unit.package}={HERE / unit.source}",
        f"-I{WELL_KNOWN}",
        *(
            f"--{name}_out=quiet:{out}" if name in stubs else f"--{name}_out={out}"
            for name in outputs
        ),
    ]
    return int(protoc.main(["protoc", *arguments, *unit.virtual_names()]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent))
