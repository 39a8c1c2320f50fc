"""What test files share: one server with the core architectures, started once, and the same models here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import catalogue
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchwire
import tiny
from serving import Server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-error", action="store_true", help="fail if an error of docs/errors.md is never raised")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--every-error"):
        config.pluginmanager.register(EveryError())


NOT_HERE = {
    "The device has no memory for … rows of … tokens.": "only an accelerator says that its memory is used up",
    "The device has no memory for this operation.": "the same",
    "The device has no memory for this gradient.": "the same",
    "A saved or logged value never came into being.": "only a defect of ours would leave one out",
}
"""Errors that no request to a sound server on a machine without an accelerator can raise, and why."""


class EveryError:
    """Notes every error of Patchwire that a run of the tests meets, and compares with the catalogue at the end."""

    def __init__(self) -> None:
        self.met: dict[tuple[str, str], bool] = {}
        """Whether the error of a kind and message named a line, once at least."""
        original = patchwire.PatchwireError.__init__

        def init(error: patchwire.PatchwireError, message: str, *, hint: str = "", lines: Any = ()) -> None:
            original(error, message, hint=hint, lines=lines)
            key = (type(error).__name__, message)
            self.met[key] = self.met.get(key, False) or bool(error.lines)

        patchwire.PatchwireError.__init__ = init  # type: ignore[method-assign]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for title, entries in self.missing().items():
            if entries:
                terminalreporter.section(title)
            for each in entries:
                terminalreporter.line(f"{each.kind} ({each.room}): {each.message}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if any(self.missing().values()) and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @functools.cache  # noqa: B019
    def missing(self) -> dict[str, list[catalogue.Entry]]:
        seen = {entry: [named for key, named in self.met.items() if key[0] == entry.kind and entry.matches(key[1])]
                for entry in catalogue.entries() if entry.message not in NOT_HERE}  # fmt: skip
        return {
            "errors of docs/errors.md that no test raises": [each for each, found in seen.items() if not found],
            "errors of a block that never name a line": [
                each for each, found in seen.items() if found and each.in_a_block and not any(found)
            ],
        }


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The server computes with one thread: so does the reference, to the last bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The directory of each checkpoint that the shared server has."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: str(tiny.save(name, root / name)) for name in tiny.SERVED}


@pytest.fixture(scope="session")
def server(checkpoints: dict[str, str]) -> Iterator[Server]:
    """A server, in another process, with the core architectures and odd ones. Tests must leave it alive."""
    with Server(checkpoints) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[patchwire.Client]:
    """A connection to that server."""
    with patchwire.connect(server.address, progress=False) as client:
        yield client


@pytest.fixture(scope="session")
def served(client: patchwire.Client) -> dict[str, patchwire.Model]:
    """The proxy of each model of that server, by name."""
    return {name: client.model(name) for name in tiny.SERVED}


@pytest.fixture(scope="session")
def facts() -> Iterator[patchwire.Model]:
    """The proxy of the zoo's GPT-2 that knows facts."""
    with (
        Server({"facts-gpt2": "zoo:facts-gpt2"}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield client.model("facts-gpt2")


@pytest.fixture(scope="session")
def references(checkpoints: dict[str, str]) -> dict[str, PreTrainedModel]:
    """The same models as plain Hugging Face modules in this process."""
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        for name, path in checkpoints.items()
    }
