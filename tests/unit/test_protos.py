"""The proto files keep the rules of buf's categories STANDARD and COMMENTS, and the installed stubs are made from them.

The rules are those of buf.yaml, checked here on protoc's own description of the files, so that nothing but the dev
extra is needed. protoc itself refuses what is not a protocol at all: a field number used twice, a reserved one used.
"""

import importlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    SourceCodeInfo,
)
from grpc_tools import protoc

PROTOS = Path(__file__).parents[2] / "protos"
FILES = sorted(file.relative_to(PROTOS).as_posix() for file in PROTOS.rglob("*.proto"))

LOWER_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
UPPER_SNAKE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
PASCAL = re.compile(r"[A-Z][A-Za-z0-9]*")


@dataclass(frozen=True)
class Element:
    """Something that a proto file declares: its full name for messages, and the comment in front of it."""

    kind: str
    name: str
    comment: str

    @property
    def short_name(self) -> str:
        return self.name.rsplit(".", 1)[-1]


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    """What protoc makes of protos/ now, by file name."""
    out = tmp_path_factory.mktemp("protoc") / "set.binpb"
    code = protoc.main(
        ["protoc", f"--proto_path={PROTOS}", "--include_source_info", f"--descriptor_set_out={out}", *FILES]
    )
    assert code == 0, "protoc refuses the files; its message is on stderr"
    return {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}


def messages(file: FileDescriptorProto) -> Iterator[DescriptorProto]:
    """The messages of a file, nested ones included; not those that protoc makes up for maps."""
    waiting = list(file.message_type)
    while waiting:
        message = waiting.pop(0)
        if not message.options.map_entry:
            yield message
            waiting.extend(message.nested_type)


def enums(file: FileDescriptorProto) -> Iterator[EnumDescriptorProto]:
    yield from file.enum_type
    for message in messages(file):
        yield from message.enum_type


def elements(file: FileDescriptorProto) -> Iterator[Element]:
    """Everything in a file that must have a comment."""
    comments = {tuple(location.path): leading_comment(location) for location in file.source_code_info.location}

    def element(kind: str, name: str, path: tuple[int, ...]) -> Element:
        return Element(kind, name, comments.get(path, ""))

    # The numbers in a path are those of descriptor.proto's own fields.
    def of_enum(enum: EnumDescriptorProto, scope: str, path: tuple[int, ...]) -> Iterator[Element]:
        name = f"{scope}.{enum.name}"
        yield element("enum", name, path)
        for i, value in enumerate(enum.value):
            yield element("enum value", f"{name}.{value.name}", (*path, 2, i))

    def of_message(message: DescriptorProto, scope: str, path: tuple[int, ...]) -> Iterator[Element]:
        if message.options.map_entry:
            return
        name = f"{scope}.{message.name}"
        yield element("message", name, path)
        for i, field in enumerate(message.field):
            yield element("field", f"{name}.{field.name}", (*path, 2, i))
        synthetic = {field.oneof_index for field in message.field if field.proto3_optional}
        for i, oneof in enumerate(message.oneof_decl):
            if i not in synthetic:
                yield element("oneof", f"{name}.{oneof.name}", (*path, 8, i))
        for i, nested in enumerate(message.nested_type):
            yield from of_message(nested, name, (*path, 3, i))
        for i, enum in enumerate(message.enum_type):
            yield from of_enum(enum, name, (*path, 4, i))

    for i, message in enumerate(file.message_type):
        yield from of_message(message, file.package, (4, i))
    for i, enum in enumerate(file.enum_type):
        yield from of_enum(enum, file.package, (5, i))
    for i, service in enumerate(file.service):
        yield element("service", f"{file.package}.{service.name}", (6, i))
        for j, rpc in enumerate(service.method):
            yield element("rpc", f"{file.package}.{service.name}.{rpc.name}", (6, i, 2, j))


def leading_comment(location: SourceCodeInfo.Location) -> str:
    return location.leading_comments.strip()


def misnamed(file: FileDescriptorProto, kinds: Sequence[str], rule: re.Pattern[str]) -> list[str]:
    return [e.name for e in elements(file) if e.kind in kinds and not rule.fullmatch(e.short_name)]


def upper_snake(pascal: str) -> str:
    """`ErrorKind` -> `ERROR_KIND`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", pascal).upper()


def without_names_for_json(file: FileDescriptorProto) -> FileDescriptorProto:
    """A copy that has only what the stubs have: no comments, and no JSON names that are protoc's own."""
    copy = FileDescriptorProto()
    copy.CopyFrom(file)
    copy.ClearField("source_code_info")
    waiting = list(copy.message_type)
    while waiting:
        message = waiting.pop()
        for field in message.field:
            field.ClearField("json_name")
        waiting.extend(message.nested_type)
    return copy


@pytest.mark.parametrize("name", FILES)
class TestEachFile:
    def test_declares_the_versioned_package_of_its_folder(self, protocol, name):
        package = protocol[name].package

        assert package == Path(name).parent.as_posix().replace("/", ".")
        assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*\.v[1-9]\d*((alpha|beta)[1-9]\d*)?", package)

    def test_is_proto3_and_its_name_is_lower_snake_case(self, protocol, name):
        assert protocol[name].syntax == "proto3"
        assert LOWER_SNAKE.fullmatch(Path(name).stem)

    def test_imports_nothing_publicly(self, protocol, name):
        assert not protocol[name].public_dependency

    def test_comments_everything_it_declares(self, protocol, name):
        silent = [f"{e.kind} {e.name}" for e in elements(protocol[name]) if not e.comment]

        assert not silent, f"no comment in front of: {', '.join(silent)}"

    def test_names_messages_enums_services_and_rpcs_in_pascal_case(self, protocol, name):
        assert not misnamed(protocol[name], ["message", "enum", "service", "rpc"], PASCAL)

    def test_names_fields_and_oneofs_in_lower_snake_case(self, protocol, name):
        assert not misnamed(protocol[name], ["field", "oneof"], LOWER_SNAKE)

    def test_names_enum_values_in_upper_snake_case_after_their_enum(self, protocol, name):
        assert not misnamed(protocol[name], ["enum value"], UPPER_SNAKE)
        assert not [
            value.name
            for enum in enums(protocol[name])
            for value in enum.value
            if not value.name.startswith(f"{upper_snake(enum.name)}_")
        ]

    def test_starts_enums_with_an_unspecified_zero_and_gives_no_value_two_names(self, protocol, name):
        for enum in enums(protocol[name]):
            assert (enum.value[0].name, enum.value[0].number) == (f"{upper_snake(enum.name)}_UNSPECIFIED", 0)
            assert not enum.options.allow_alias

    def test_ends_the_names_of_services_in_service(self, protocol, name):
        assert all(service.name.endswith("Service") for service in protocol[name].service)

    def test_names_requests_and_responses_after_their_rpc(self, protocol, name):
        for service in protocol[name].service:
            for rpc in service.method:
                names = [f".{protocol[name].package}.{prefix}{rpc.name}" for prefix in ("", service.name)]

                assert rpc.input_type in [f"{rpc_name}Request" for rpc_name in names]
                assert rpc.output_type in [f"{rpc_name}Response" for rpc_name in names]

    def test_has_up_to_date_stubs(self, protocol, name):
        module = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
        installed = FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)

        assert without_names_for_json(installed) == without_names_for_json(protocol[name]), (
            f"the stubs are not those of {name} as it is now: run `make test`, or `pip install -e .` by hand"
        )


def test_no_message_is_the_request_or_response_of_two_rpcs(protocol):
    uses = Counter(
        message
        for file in protocol.values()
        for service in file.service
        for rpc in service.method
        for message in (rpc.input_type, rpc.output_type)
    )

    assert not [message for message, count in uses.items() if count > 1]


def test_stubs_of_deleted_files_are_gone():
    package = Path(importlib.import_module("patchwire.v1").__file__).parent

    assert {file.name.removesuffix("_pb2.py") for file in package.glob("*_pb2.py")} == {Path(f).stem for f in FILES}


def test_every_stub_has_its_types():
    package = Path(importlib.import_module("patchwire.v1").__file__).parent
    stubs = list(package.glob("*_pb2*.py"))

    assert stubs
    assert not [stub.name for stub in stubs if not stub.with_suffix(".pyi").exists()]
