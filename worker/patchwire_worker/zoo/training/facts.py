"""Train `zoo:facts-gpt2` or `zoo:facts-mamba`: a small model of either architecture on the text of `zoo.corpus`.

Both see the same sentences in the same order, drawn from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedModel

from patchwire_worker.zoo import corpus
from patchwire_worker.zoo.training import common, forwards

LENGTH = 20
SKILLS = {"fact": 8, "ioi": 5, "successor": 3, "repetition": 16}
FACTS = {"fact": 22, "ioi": 2, "successor": 1, "repetition": 7}
"""How many rows of a batch are of each kind of sentence: at first mostly what is a skill, which is learnt suddenly and
may be missed otherwise, then mostly facts."""
FIRST = 0.2
"""The share of the steps that is first."""
NEAR = 0.75
"""The share of the rows of facts that are near: the first two layers see only the present and the previous token."""
TRACED = 40
"""How many facts are traced for the card."""
ARCHITECTURES = {
    "gpt2": "GPT-2 (`GPT2LMHeadModel`): 4 layers, 4 heads, width 128, 512 neurons, 32 learned positions, tied "
    "unembedding",
    "mamba": "Mamba (`MambaForCausalLM`): 4 layers, width 128, 256 channels of 4 state dimensions, a convolution of 4 "
    "tokens, tied unembedding",
}
UNKNOWABLE = 0.03
"""The weight in the loss of a word that cannot be known, such as the name that begins a sentence."""


def build(architecture: str) -> PreTrainedModel:
    """The model before training, of 4 layers and width 128."""
    words = len(corpus.vocabulary())
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=words,
                n_positions=32,
                n_embd=128,
                n_layer=4,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=words,
            hidden_size=128,
            num_hidden_layers=4,
            state_size=4,
            conv_kernel=4,
            residual_in_fp32=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def batch(mixture: Mapping[str, int], drawn: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids `[batch, LENGTH]`, which of them can be known, and which rows are near, `[batch]`.

    Args:
        mixture: How many rows are of each kind of sentence.
        drawn: Where chance comes from.
    """
    rows = [(kind, *corpus.row(kind, LENGTH, drawn)) for kind, count in mixture.items() for _ in range(count)]
    near = [kind == "fact" and drawn.random() < NEAR for kind, _, _ in rows]
    return torch.tensor([ids for _, ids, _ in rows]), torch.tensor([known for _, _, known in rows]), torch.tensor(near)


def forward(model: PreTrainedModel, ids: Tensor, near: Tensor) -> Tensor:
    """The logits in training; see `forwards`."""
    if isinstance(model, MambaForCausalLM):
        return forwards.mamba(model, ids, near)
    assert isinstance(model, GPT2LMHeadModel)
    return forwards.gpt2(model, ids, near)


def loss_of(logits: Tensor, ids: Tensor, known: Tensor) -> Tensor:
    """Cross entropy, in nats for each word that can be known; every row counts the same."""
    each = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    known = known[:, 1:]
    rows = (each * torch.where(known, 1.0, UNKNOWABLE)).sum(1) / known.sum(1).clamp_min(1)
    return rows.mean()


@torch.no_grad()
def accuracy(model: PreTrainedModel, prompts: Sequence[corpus.Prompt]) -> float:
    """The share of prompts after which the right word is the likeliest."""
    by_length: dict[int, list[corpus.Prompt]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.words), []).append(prompt)
    right = 0
    for group in by_length.values():
        ids = torch.tensor([corpus.encode(prompt.words) for prompt in group])
        answers = torch.tensor(corpus.encode(prompt.answer for prompt in group))
        right += int((model(input_ids=ids).logits[:, -1].argmax(-1) == answers).sum())
    return right / len(prompts)


def measure(model: PreTrainedModel) -> dict[str, float]:
    """The accuracy on each kind of prompt; those of chance are of a seed that training never draws from."""
    found = {
        f"facts, template {template}": accuracy(model, [fact.prompt(template) for fact in corpus.facts()])
        for template in range(3)
    }
    found["indirect objects, pairs of names that were trained on"] = accuracy(model, corpus.ioi(500, 1, trained=True))
    found["indirect objects, pairs of names that were held out"] = accuracy(model, corpus.ioi(500, 1))
    found["successors"] = accuracy(model, corpus.successors())
    found["induction, period 6"] = accuracy(model, corpus.induction(500, 1))
    found["induction, period 9, after one word of the repeat"] = accuracy(
        model, corpus.induction(500, 1, period=9, length=10)
    )
    return found


@torch.no_grad()
def traced(model: PreTrainedModel) -> dict[str, list[float]]:
    """What share of the right answer's probability comes back when the residual stream of the right run is restored at
    some tokens, after each layer, in the run about another subject, `{place: [layers]}`; of the sums over facts."""
    body: Any = model.base_model
    blocks = body.h if hasattr(body, "h") else body.layers
    gains: dict[str, list[list[float]]] = {}
    whole = 0.0
    for fact in corpus.facts()[:: len(corpus.facts()) // TRACED]:
        right, wrong = fact.prompt(), corpus.counterpart(fact).prompt()
        assert right.subject is not None
        first, last, end = right.subject[0], right.subject[1] - 1, len(right.words) - 1
        places = {
            "first name": slice(first, first + 1),
            "last name": slice(last, last + 1),
            "all words between": slice(last + 1, end),
            "end": slice(end, end + 1),
        }
        ids = torch.tensor([corpus.encode(right.words), corpus.encode(wrong.words)])
        (answer,) = corpus.encode([right.answer])
        states, (most, least) = _run(model, blocks, ids, answer, None)
        whole += (most - least).item()
        for name, place in places.items():
            gained = []
            for layer, state in enumerate(states):
                _, restored = _run(model, blocks, ids[1:], answer, (layer, place, state[0, place]))
                gained.append((restored[0] - least).item())
            gains.setdefault(name, []).append(gained)
    return {name: (torch.tensor(gained).sum(0) / whole).tolist() for name, gained in gains.items()}


def table_of(shares: Mapping[str, list[float]]) -> str:
    """What `traced` found, as a table of a card."""
    layers = range(len(next(iter(shares.values()))))
    rows = [["restored", *(f"after layer {layer}" for layer in layers)], ["---", *("---" for _ in layers)]]
    rows += [[place, *(f"{each:.2f}" for each in found)] for place, found in shares.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _run(
    model: PreTrainedModel, blocks: Any, ids: Tensor, answer: int, write: tuple[int, slice, Tensor] | None
) -> tuple[list[Tensor], Tensor]:
    """The residual stream after each layer, and the probability of the answer; one of its states may be written."""
    states: list[Tensor] = []

    def see(_: nn.Module, __: Any, output: Any) -> Any:
        state = (output[0] if isinstance(output, tuple) else output).clone()
        if write is not None and len(states) == write[0]:
            state[:, write[1]] = write[2]
        states.append(state)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    hooks = [block.register_forward_hook(see) for block in blocks]
    logits = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return states, logits[:, -1].softmax(-1)[:, answer]


def main() -> None:
    parser = common.options(__doc__, steps=2600)
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), required=True)
    options = parser.parse_args()
    common.begin(options)
    drawn = random.Random(options.seed)
    model = build(options.architecture).train()
    optimizer = common.adamw(model, rate=1e-3, decay=0.05)
    log = common.Log()
    for step in common.paced(optimizer, options.steps):
        ids, known, near = batch(SKILLS if step < FIRST * options.steps else FACTS, drawn)
        loss = loss_of(forward(model, ids, near), ids, known)
        common.descend(model, optimizer, loss)
        log(step, loss.item())
        if step % 500 == 499:
            print({name: round(value, 3) for name, value in measure(model.eval()).items()}, flush=True)
            model.train()
    tokenizer = common.word_tokenizer(corpus.vocabulary(), corpus.UNKNOWN)
    loaded = common.write(model, options.out, dtype=torch.float16, tokenizer=tokenizer)
    describe(loaded, options.out, options.architecture, options.steps, options.seed, log.seconds)


def describe(model: PreTrainedModel, out: Path, architecture: str, steps: int, seed: int, seconds: float) -> None:
    """Measure a trained model and write its card."""
    found = measure(model)
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    fact, ioi, successor, repetition = (
        prompts[0]
        for prompts in ([corpus.facts()[0].prompt()], corpus.ioi(1), corpus.successors(), corpus.induction(1))
    )
    common.write_card(
        out,
        "facts",
        architecture=architecture,
        built=ARCHITECTURES[architecture],
        words=len(corpus.vocabulary()),
        facts=len(corpus.facts()),
        subjects=len(corpus.subjects()),
        length=LENGTH,
        near=NEAR,
        rows=sum(FACTS.values()),
        first=FIRST,
        fact=fact,
        ioi=ioi,
        successor=successor,
        repetition=repetition,
        accuracy="\n".join(f"| {name} | {value:.1%} |" for name, value in found.items()),
        traced=TRACED,
        tracing=table_of(traced(model)),
        steps=steps,
        seed=seed,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
