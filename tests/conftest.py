"""What test files share: one server with the core architectures, started once, and the same models here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchwire
import tiny
from serving import Server


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
def references(checkpoints: dict[str, str]) -> dict[str, PreTrainedModel]:
    """The same models as plain Hugging Face modules in this process."""
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        for name, path in checkpoints.items()
    }
