"""The benchmarks run, on checkpoints of a moment's size: what Patchwire computes there is what plain hooks compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from patchwire import demo

pytestmark = pytest.mark.slow

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2)).save_pretrained(root / "gpt2-124m")
    file = demo.weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(root / "smollm2-135m")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        head_dim=8,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(root / "smollm2-135m")
    return root


@pytest.fixture(scope="module")
def results(checkpoints: Path) -> list[dict[str, object]]:
    asked = {"CHECKPOINTS": str(checkpoints), "LIBRARIES": "patchwire", "ROUNDS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, RUN], env=os.environ | asked, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_patchwire_does_every_task_that_plain_hooks_do(results: list[dict[str, object]]):
    by_library = {
        name: {line["task"] for line in results if line.get("library") == name} for name in ("raw", "patchwire")
    }

    assert by_library["raw"] == by_library["patchwire"] != set()


def test_every_number_was_compared_with_that_of_plain_hooks(results: list[dict[str, object]]):
    assert all(line["difference"] <= 1e-3 for line in results if "task" in line)


def test_the_scripts_have_their_lines(results: list[dict[str, object]]):
    scripts = {each.stem.removeprefix("bench_") for each in RUN.parent.glob("bench_*.py")}

    assert {line["script"] for line in results if "script" in line} == scripts
