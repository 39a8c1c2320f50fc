"""Generation: Hugging Face's own loop, with every choice that it makes stated, and randomness from given seeds.

Each row has a generator of its own, so that what is drawn for it does not depend on who shares the call. Hugging Face's
sampling draws from one generator for everybody; so its loop is told to take the likeliest token, and the drawing is a
last step of its processing of logits, which leaves one token to take.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from patchwire.graph import Generation

_MASKED = float("-inf")
_OF_OTHER_LOOPS = """
    assistant_confidence_threshold assistant_early_exit dola_layers guidance_scale max_time num_return_sequences
    output_attentions output_hidden_states output_logits output_scores penalty_alpha prompt_lookup_num_tokens
    return_dict_in_generate stop_strings
"""
"""What a checkpoint may ask of Hugging Face's loop that makes it another one: calls of the model that are no steps, and
results that are no tokens."""


class _Draw(LogitsProcessor):
    """Draws one token for each row and masks all others."""

    def __init__(self, options: Generation, rows: int) -> None:
        self._generators = [torch.Generator().manual_seed(options.seed + row) for row in range(rows)]
        self._warpers = LogitsProcessorList()
        if options.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k:
            self._warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(options.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # On the CPU, where generators give the same numbers whatever the model runs on.
        warped = self._warpers(input_ids, scores)  # type: ignore[arg-type]
        chances = warped.float().softmax(-1).cpu()
        drawn = [torch.multinomial(row, 1, generator=each) for row, each in zip(chances, self._generators, strict=True)]
        return torch.full_like(scores, _MASKED).scatter(1, torch.stack(drawn).to(scores.device), 0.0)


class _Tell(StoppingCriteria):
    """Tells the new token of each row, and stops nothing."""

    def __init__(self, on_tokens: Callable[[list[int]], None]) -> None:
        self._on_tokens = on_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._on_tokens(input_ids[:, -1].tolist())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _plain_loop(module: nn.Module) -> Iterator[None]:
    """Have the checkpoint's own configuration ask for no other loop; what it says of logits holds."""
    own = module.generation_config
    module.generation_config = copy.copy(own)
    try:
        for name in _OF_OTHER_LOOPS.split():
            setattr(module.generation_config, name, None)
        yield
    finally:
        module.generation_config = own


def generate(
    module: nn.Module,
    ids: Tensor,
    options: Generation,
    on_tokens: Callable[[list[int]], None],
    arguments: Mapping[str, Any],
) -> Tensor:
    """Token ids `[batch, seq + new]` that a model goes on with after `ids` `[batch, seq]`.

    A row that has ended is filled up with the token that pads, or with the one that ends.
    """
    own = module.generation_config
    ends = own.eos_token_id  # type: ignore[union-attr]
    end = ends[0] if isinstance(ends, list) else ends
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens or None,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=options.repetition_penalty,
        eos_token_id=ends,
        bos_token_id=own.bos_token_id,  # type: ignore[union-attr]
        pad_token_id=end if own.pad_token_id is None else own.pad_token_id,  # type: ignore[union-attr]
        use_cache=True,
    )
    processors = LogitsProcessorList([_Draw(options, ids.shape[0])] if options.do_sample else [])
    with _plain_loop(module):
        made = module.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Tell(on_tokens)]),
            **arguments,
        )
    assert isinstance(made, Tensor)
    return made
