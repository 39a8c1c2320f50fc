"""Build hook: the protocol's message classes and stubs are made from `protos/` whenever the package is installed.

They are written next to the hand-written code, in `client/patchwire/v1/`, for wheels and editable installs alike, and
are not committed. Each proto file yields `x_pb2.py` and `x_pb2.pyi` (protoc), `x_pb2_grpc.py` (grpcio-tools) and
`x_pb2_grpc.pyi` (mypy-protobuf).
"""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface[Any]):
    """Runs protoc before a wheel is put together; source distributions carry only the proto files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the stubs. `version` is hatch's word for standard or editable; both need them."""
        generate(protos=Path(self.root, "protos"), out=Path(self.root, "client"))


def generate(*, protos: Path, out: Path) -> None:
    """Replace the stubs under `out` by those of the files under `protos`.

    Raises:
        RuntimeError: protoc refused a file; its own message is on stderr.
    """
    import grpc_tools
    from grpc_tools import protoc

    for stale in Path(out, "patchwire").rglob("*_pb2*.py*"):
        if stale.parent.name != "__pycache__":
            stale.unlink()

    arguments = [
        "protoc",
        f"--proto_path={protos}",
        f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        f"--plugin=protoc-gen-mypy_grpc={find_program('protoc-gen-mypy_grpc')}",
        f"--mypy_grpc_out=quiet:{out}",
        *sorted(str(file) for file in protos.rglob("*.proto")),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc refused the files under {protos}")


def find_program(name: str) -> str:
    """The path of a program installed beside this Python, or anywhere on PATH.

    Raises:
        RuntimeError: there is none.
    """
    beside = sysconfig.get_path("scripts")
    program = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if program is None:
        raise RuntimeError(f"{name} is not installed: the packages of [build-system] in pyproject.toml have it")
    return program
