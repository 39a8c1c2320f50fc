"""Train `zoo:induction-2l`: two layers of attention and nothing else, on random tokens that repeat.

Olsson et al. (2022), "In-context Learning and Induction Heads", https://arxiv.org/abs/2209.11895

The architecture is GPT-2's. Its MLP cannot be left out, so it has one neuron whose output weights are zero and stay so:
what it adds to the residual stream is exactly zero. The period of a repetition changes from row to row, so that no
position tells where to look: a token has to find where it stood before.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from patchwire_worker.zoo.training import common

BEGIN = "<begin>"
WORDS = (BEGIN, *(consonant + vowel + "n" for consonant in "bdfgklmnprstvz" for vowel in "aeiou"))[:65]
"""The first begins every row; the 64 others repeat."""
LENGTH = 104
PERIODS = (8, 28)
BATCH = 16
HEADS = 4


def repeated(period: int, length: int, drawn: random.Random) -> list[int]:
    """Token ids: the beginning, then `period` random tokens over and over."""
    block = drawn.choices(range(1, len(WORDS)), k=period)
    return [0, *(block[index % period] for index in range(length - 1))]


def build(layers: int = 2) -> GPT2LMHeadModel:
    """The model before training."""
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=LENGTH,
        n_embd=64,
        n_layer=layers,
        n_head=HEADS,
        n_inner=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.requires_grad_(False)
        if ".mlp.c_proj." in name:
            parameter.zero_()
    return model


def batch(drawn: random.Random, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids `[size, length]`, and which of them can be known from those before."""
    periods = [drawn.randint(*PERIODS) for _ in range(size)]
    ids = torch.tensor([repeated(period, length, drawn) for period in periods])
    return ids, torch.arange(length) > torch.tensor(periods)[:, None]


def loss_of(model: PreTrainedModel, ids: Tensor, known: Tensor) -> Tensor:
    """Cross entropy of the tokens that can be known, in nats."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1][known[:, 1:]], ids[:, 1:][known[:, 1:]])


@torch.no_grad()
def measure(model: PreTrainedModel) -> dict[str, float]:
    """Loss and accuracy on repeats, and how the heads of each layer attend, over 25 random tokens that come four times:
    to the tokens that came after the present one before (prefix matching), and to the previous one. The means of the
    weakest and the strongest head."""
    drawn = random.Random(1)
    ids, known = batch(drawn, 64, LENGTH)
    right = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    found = {"loss": loss_of(model, ids, known).item(), "accuracy": right[known[:, 1:]].double().mean().item()}
    period, length = 25, 101
    rows = torch.tensor([[0, *(drawn.sample(range(1, len(WORDS)), period) * 4)] for _ in range(10)])
    model.set_attn_implementation("eager")
    attentions = model(input_ids=rows, output_attentions=True).attentions
    query, key = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    after = (key > 1) & (key <= query) & ((query - key + 1) % period == 0)
    for layer, attention in enumerate(attentions):
        scores = (attention * after).sum(-1)[..., period + 1 :].mean((0, 2))
        previous = attention.diagonal(-1, -2, -1).mean((0, 2))
        found[f"prefix {layer} largest"] = scores.max().item()
        found[f"prefix {layer} smallest"] = scores.min().item()
        found[f"previous {layer} largest"] = previous.max().item()
    return found


def main() -> None:
    options = common.options(__doc__, steps=3000).parse_args()
    common.begin(options)
    drawn = random.Random(options.seed)
    model = build().train()
    optimizer = common.adamw(model, rate=3e-3, decay=0.01)
    log = common.Log()
    for step in common.paced(optimizer, options.steps):
        loss = loss_of(model, *batch(drawn, BATCH, LENGTH))
        common.descend(model, optimizer, loss)
        log(step, loss.item())
    loaded = common.write(model, options.out, tokenizer=common.word_tokenizer(WORDS, BEGIN))
    found = measure(loaded)
    print(found)
    common.write_card(
        options.out,
        "induction-2l",
        words=WORDS,
        length=LENGTH,
        periods=PERIODS,
        batch=BATCH,
        found=found,
        steps=options.steps,
        seed=options.seed,
        seconds=log.seconds,
    )


if __name__ == "__main__":
    main()
