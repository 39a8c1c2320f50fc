"""A checkpoint's own configuration of generation: what it says of logits holds, and it never asks for another loop.

Steps are calls of the model, one for each new token: what adds calls, or makes other results than tokens, would give a
step the values of something else.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import patchwire
import tiny

IDS = tiny.prompt(6)
NEW = 4


@pytest.mark.parametrize(
    "asked",
    [
        {"guidance_scale": 2.0},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_return_sequences": 2},
        {"max_time": 1e-9},
        {"stop_strings": ["a"]},
        {"penalty_alpha": 0.5},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_steps_are_those_of_the_plain_loop(asked: dict[str, Any]) -> None:
    module = tiny.build("gpt2")
    reference = copy.deepcopy(module)
    for name, value in asked.items():
        setattr(module.generation_config, name, value)
    before = module.generation_config.to_dict()
    model = patchwire.local(module, progress=False)

    with model.generate(IDS, max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        embedded = [model.embed.output.save() for _ in gen.iter[0:NEW]]
        tokens = gen.output.save()

    expected = reference.generate(torch.tensor([IDS]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(tokens.value, expected)
    embeddings = reference.get_input_embeddings()(expected)
    assert torch.equal(embedded[0].value, embeddings[:, : len(IDS)])
    for step in range(1, NEW):
        assert torch.equal(embedded[step].value, embeddings[:, len(IDS) + step - 1][:, None])
    assert module.generation_config.to_dict() == before


def test_what_it_says_of_logits_holds() -> None:
    module = tiny.build("gpt2")
    module.generation_config.no_repeat_ngram_size = 2
    reference = copy.deepcopy(module)
    model = patchwire.local(module, progress=False)

    with model.generate(IDS, max_new_tokens=12, min_new_tokens=12) as gen:
        tokens = gen.output.save()

    def generated(by: Any) -> torch.Tensor:
        return by.generate(torch.tensor([IDS]), max_new_tokens=12, min_new_tokens=12, do_sample=False)

    assert torch.equal(tokens.value, generated(reference))
    assert not torch.equal(tokens.value, generated(tiny.build("gpt2")))
