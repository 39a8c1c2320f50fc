"""A second server, with a token and tight limits, and with models that the first one does not have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import patchwire
import tiny
from integration import messages
from patchwire.v1 import service_pb2_grpc
from serving import Server

TOKEN = "correct horse battery staple"
WORDS = ["<unk>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", "fast", "slow"]
WORDS += ["user", "assistant", "system", ":", "hello", "world"]
CHAT = (
    "{% for each in messages %}{{ each['role'] }} : {{ each['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
LIMITS = {
    "nodes": 60,
    "tokens": 40,
    "message_bytes": 200_000,
    "result_bytes": 500_000,
    "value_bytes": 20_000_000,
    "constant_bytes": 400_000,
    "stored_bytes": 500_000,
    "seconds": 5.0,
    "queued": 1,
}


@pytest.fixture(scope="session")
def limits() -> dict[str, Any]:
    """The limits of the strict server."""
    return LIMITS


@pytest.fixture(scope="session")
def token() -> str:
    """The token of the strict server."""
    return TOKEN


def save_chatty(directory: Path) -> Path:
    """A model with a tokenizer of a few words and a chat template."""
    tiny.build("llama").save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = CHAT
    fast.save_pretrained(directory)
    return directory


def save_deep(directory: Path) -> Path:
    """A model of many layers."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=40,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server, in another process, that asks for a token and takes little. Tests must leave it alive."""
    root = tmp_path_factory.mktemp("strict")
    specs = {"chatty": save_chatty(root / "chatty"), "deep": save_deep(root / "deep")}
    with Server(specs, token=TOKEN, limits=LIMITS) as server:
        yield server


@pytest.fixture
def strict_client(strict: Server) -> Iterator[patchwire.Client]:
    """A connection of its own to the strict server."""
    with patchwire.connect(strict.address, token=TOKEN, progress=False) as client:
        yield client


@pytest.fixture(scope="session")
def chatty(strict: Server) -> Iterator[patchwire.Model]:
    """The model with a tokenizer and a chat template."""
    with patchwire.connect(strict.address, token=TOKEN, progress=False) as client:
        yield client.model("chatty")


@pytest.fixture(scope="session")
def deep(strict: Server) -> Iterator[patchwire.Model]:
    """The model of many layers."""
    with patchwire.connect(strict.address, token=TOKEN, progress=False) as client:
        yield client.model("deep")


@pytest.fixture
def stub(server: Server) -> Iterator[service_pb2_grpc.PatchwireServiceStub]:
    """The bare methods of the main server."""
    channel, stub = messages.stub(server.address)
    with channel:
        yield stub


@pytest.fixture
def strict_stub(strict: Server) -> Iterator[service_pb2_grpc.PatchwireServiceStub]:
    """The bare methods of the strict server; `AUTHORIZED` is the metadata that it asks for."""
    channel, stub = messages.stub(strict.address)
    with channel:
        yield stub


@pytest.fixture(scope="session")
def authorized() -> tuple[tuple[str, str], ...]:
    """The metadata that the strict server asks for."""
    return (("authorization", f"Bearer {TOKEN}"),)
