"""The guides of docs/: every block of Python in them runs, one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import patchwire
from serving import Server

THERE = {"127.0.0.1:50051": lambda server: server.address}
"""Where a server is that a guide connects to."""
DOCS = Path(__file__).parents[2] / "docs"
GUIDES = sorted(file for file in DOCS.glob("*.md") if "```python" in file.read_text())


@pytest.fixture(scope="module")
def model() -> patchwire.Model:
    """A small Llama whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({each: index for index, each in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=256, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    return patchwire.local(plain, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer), progress=False)


@pytest.fixture(scope="module")
def zoo() -> Iterator[Server]:
    """A server of one's own, as the guides have it started."""
    with Server({"facts-gpt2": "zoo:facts-gpt2"}) as server:
        yield server


@pytest.mark.parametrize("guide", GUIDES, ids=lambda file: file.stem)
def test_the_blocks_of_a_guide_run(guide: Path, model: patchwire.Model, zoo: Server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    connect = patchwire.connect
    monkeypatch.setattr(patchwire, "connect", lambda address, **options: connect(THERE[address](zoo), **options))
    run(guide, {"model": model})


def test_the_blocks_of_the_readme_about_the_zoo_run():
    run(DOCS.parent / "README.md", {"patchwire": patchwire}, about='("zoo:')


def run(page: Path, names: dict[str, Any], about: str = "") -> None:
    """Run the blocks of a page that are about something, one after the other, in one namespace."""
    text = page.read_text()
    every = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = [each for each in every if about in each[1]]
    assert blocks
    for block in blocks:
        # As many lines before it as in the page, so that an error names the right one.
        code = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(code, str(page), "exec"), names)


def test_the_names_beside_those_of_other_libraries_are_there() -> None:
    model = patchwire.local("zoo:facts-gpt2", progress=False)
    table = (DOCS / "coming-from.md").read_text().partition("## Names")[2].partition("## What differs")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([\w.\[\]]+)`", cell)]
    beside = [name if name.startswith("model.") else f"model.layers[i].attn.{name}" for name in names]

    with model.scan("Ada Barlow lives in the city of"):
        for each in beside:
            assert eval(each, {"model": model, "i": 1}).shape
