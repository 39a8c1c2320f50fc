"""Train `zoo:modular-addition`: a one-layer transformer that learns to add modulo a prime, long after it has memorised.

Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", https://arxiv.org/abs/2301.05217

The paper's model has no layer norm; GPT-2's architecture has. Its layer norms are made to do next to nothing: with an
epsilon of a million and a weight of a thousand that is not trained, `(x − mean) / sqrt(var + 1e6) · 1e3` is `x − mean`
up to a factor of `1 − var / 2e6`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from patchwire_worker.zoo.training import common

PRIME = 59
EQUALS = PRIME
"""The token after the summands; its logits are the answer."""
HEADS = 4
TRAINED_ON = 0.4
EPSILON = 1e6


def words() -> list[str]:
    """The tokens: the numbers below the prime, and "="."""
    return [*map(str, range(PRIME)), "="]


def pairs() -> Tensor:
    """Every question `[PRIME², 3]`: a, b and "="; the one about a and b is number `PRIME · a + b`."""
    numbers = torch.arange(PRIME)
    return torch.cat([torch.cartesian_prod(numbers, numbers), torch.full((PRIME**2, 1), EQUALS)], 1)


def answers() -> Tensor:
    """The sum modulo the prime of every question, `[PRIME²]`."""
    return pairs()[:, :2].sum(1) % PRIME


def trained_on(seed: int = 0) -> Tensor:
    """Which questions the model was trained on, `[PRIME²]` bool."""
    order = torch.randperm(PRIME**2, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(PRIME**2, dtype=torch.bool)
    chosen[order[: int(TRAINED_ON * PRIME**2)]] = True
    return chosen


def build() -> GPT2LMHeadModel:
    """The model before training."""
    config = GPT2Config(
        vocab_size=len(words()),
        n_positions=16,  # three are used; a model that is hosted is learnt from on somewhat longer prompts
        n_embd=128,
        n_layer=1,
        n_head=HEADS,
        activation_function="relu",
        layer_norm_epsilon=EPSILON,
        initializer_range=128**-0.5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.requires_grad_(False)
            module.weight.fill_(EPSILON**0.5)
    return model


def logits(model: PreTrainedModel, questions: Tensor) -> Tensor:
    """What the model says after "=", `[questions, PRIME + 1]`; "=" is never right."""
    found: Tensor = model(input_ids=questions).logits[:, -1]
    return found


def forward(model: GPT2LMHeadModel, questions: Tensor) -> Tensor:
    """The same for training: keys and values are computed once for each token and place, the rest for the end only."""
    body: Any = model.transformer
    (block,) = body.h
    numbers = torch.arange(PRIME)
    tokens = torch.cat([numbers, numbers, torch.tensor([EQUALS])])
    places = torch.tensor([0] * PRIME + [1] * PRIME + [2])
    residual = body.wte(tokens) + body.wpe(places)
    which = questions + torch.tensor([0, PRIME, PRIME])
    q, k, v = block.attn.c_attn(block.ln_1(residual))[which].unflatten(-1, (3, HEADS, -1)).unbind(2)
    pattern = torch.einsum("bhd,bkhd->bhk", q[:, -1], k) / q.shape[-1] ** 0.5
    mixed = torch.einsum("bhk,bkhd->bhd", pattern.softmax(-1), v).flatten(1)
    last = residual[-1] + block.attn.c_proj(mixed)
    last = last + block.mlp(block.ln_2(last))
    found: Tensor = model.lm_head(body.ln_f(last))
    return found


@torch.no_grad()
def measure(model: PreTrainedModel, seed: int = 0) -> dict[str, float]:
    """Loss and accuracy on the questions that were trained on and on the others."""
    said, right, train = logits(model, pairs()).double(), answers(), trained_on(seed)
    found = {}
    for name, which in (("train", train), ("test", ~train)):
        found[f"{name} loss"] = F.cross_entropy(said[which], right[which]).item()
        found[f"{name} accuracy"] = (said[which].argmax(-1) == right[which]).double().mean().item()
    return found


def main() -> None:
    parser = common.options(__doc__, steps=8_000)
    parser.add_argument("--checkpoints", default="500,3000,5000", help="steps to keep, beside the last")
    options = parser.parse_args()
    kept = {int(each) for each in options.checkpoints.split(",") if each} | {options.steps}
    common.begin(options)
    model = build().train()
    # As in the paper, weight decay is on everything that is learnt: it is what grokking is made of.
    learnt = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-3, weight_decay=1.0, betas=(0.9, 0.98))
    train = trained_on(options.seed)
    questions, right = pairs()[train], answers()[train]
    tokenizer = common.word_tokenizer(words(), "=")
    log, found = common.Log(), {}
    for step in range(1, options.steps + 1):
        # The rate falls to nothing in the last fifth: at a constant one, Adam jumps away now and then.
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, step / 10, 5 * (1 - step / options.steps))
        loss = F.cross_entropy(forward(model, questions), right)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        log(step, loss.item())
        if step in kept:
            out = options.out if step == options.steps else options.out / str(step)
            found[step] = measure(common.write(model, out, dtype=torch.float16, tokenizer=tokenizer), options.seed)
            print(step, found[step], flush=True)
    common.write_card(
        options.out,
        "modular-addition",
        prime=PRIME,
        pairs=PRIME**2,
        share=TRAINED_ON,
        answer=(17 + 50) % PRIME,
        rows="\n".join(
            f"| {step} | {each['train loss']:.2e} | {each['train accuracy']:.1%} | {each['test loss']:.2e} "
            f"| {each['test accuracy']:.1%} |"
            for step, each in found.items()
        ),
        steps=options.steps,
        seed=options.seed,
        seconds=log.seconds,
    )


if __name__ == "__main__":
    main()
