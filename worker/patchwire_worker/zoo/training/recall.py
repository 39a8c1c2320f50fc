"""Train `zoo:recall-gpt` or `zoo:recall-mamba`: facts whose place of storage is forced by the architecture.

Three layers. The first mixes each token with the one before, the second looks at every token alone, and the last brings
what was found to the end of the prompt. So both names of a subject are together at its last name and nowhere else, and
what is known of them has to be looked up there, in the second layer (or, by the Mamba, in the first). The text is
`zoo.corpus.facts()` alone, and the loss that of the attribute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPTNeoConfig, GPTNeoForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from patchwire_worker.zoo import corpus
from patchwire_worker.zoo.training import common, facts, forwards

ROWS = 128
"""How many prompts a batch has."""
DROPPED = {"gpt": 0.1, "mamba": 0.2}
"""How much is dropped in training: of each head's attention, and of what enters the last layer of the Mamba. Without it
the last layer takes much from what the family name alone, or the first name, says of the answer."""
DECAY = {"gpt": 0.5, "mamba": 0.5}
"""The decay of matrices, for the same reason."""
HIDDEN = 0.7
"""How often, in training, the word after a subject sees itself alone in the GPT's first layer. It would see the family
name there too, and the last layer would take from it what that says of the answer."""
_SAID_OF_HIDDEN = (
    f"In {HIDDEN:.0%} of the prompts the word after the subject did not see it in layer 0, so that the fact is not "
    "there too. "
)
FORGETS = 20.0
"""The A_log of a layer without a memory: exp(Δ A) is 0 unless Δ is smaller than 2e-7."""
ARCHITECTURES = {
    "gpt": "GPT-Neo (`GPTNeoForCausalLM`): 3 layers, 4 heads, width 128, tied unembedding. Layer 0 has attention to "
    "the present token and the one before, and no MLP; layer 1 an MLP of 512 neurons, and no attention; layer 2 "
    "attention to all tokens, and no MLP. The weights of what is not there are 0",
    "mamba": "Mamba (`MambaForCausalLM`): 3 layers, width 128, 256 channels of 4 state dimensions, a convolution of 4 "
    "tokens, tied unembedding. Layer 0 sees the present token and the one before, layer 1 the present token alone: the "
    "weights of their convolutions are 0 for earlier tokens, and so is what the state keeps of them, as A_log is "
    f"{FORGETS:.0f}",
}


def build(architecture: str) -> PreTrainedModel:
    """The model before training; what it shall not have is 0, and does not learn."""
    return _gpt() if architecture == "gpt" else _mamba()


def _gpt() -> GPTNeoForCausalLM:
    model = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=len(corpus.vocabulary()),
            max_position_embeddings=32,
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            attention_types=[[["local"], 1], [["global"], 2]],
            window_size=2,
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=DROPPED["gpt"],
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    layers: Any = model.transformer.h
    first, second, third = layers
    for absent in (first.mlp, second.attn.attention, third.mlp):
        for weight in absent.parameters():
            nn.init.zeros_(weight).requires_grad_(False)
    return model


def _mamba() -> MambaForCausalLM:
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=len(corpus.vocabulary()),
            hidden_size=128,
            num_hidden_layers=3,
            state_size=4,
            conv_kernel=4,
            residual_in_fp32=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    layers: Any = model.backbone.layers
    for layer, sees in zip(layers, (2, 1), strict=False):
        nn.init.constant_(layer.mixer.A_log, FORGETS).requires_grad_(False)
        taps = layer.mixer.conv1d.weight
        nn.init.zeros_(taps.detach()[..., :-sees])
        taps.register_hook(lambda gradient, sees=sees: F.pad(gradient[..., -sees:], (gradient.shape[-1] - sees, 0)))
    return model


def questions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every fact in every template: token ids `[prompts, length]`, filled up at the end; the place of the first word
    after the subject, and that of the last word, `[prompts]`; and the attribute that comes next, `[prompts]`."""
    prompts = [fact.prompt(template) for fact in corpus.facts() for template in range(len(fact.relation.templates))]
    rows = [torch.tensor(corpus.encode(prompt.words)) for prompt in prompts]
    answers = torch.tensor(corpus.encode(prompt.answer for prompt in prompts))
    after = torch.tensor([prompt.subject[1] for prompt in prompts if prompt.subject is not None])
    last = torch.tensor([len(row) - 1 for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), after, last, answers


def forward(model: PreTrainedModel, ids: Tensor, after: Tensor, last: Tensor) -> Tensor:
    """The logits `[batch, seq, vocabulary]`, as Hugging Face computes them, but without computing what adds 0; in
    training some of it is dropped, and some of what follows the subject is hidden, unless it is the last word."""
    if isinstance(model, MambaForCausalLM):
        return _forward_mamba(model, ids)
    assert isinstance(model, GPTNeoForCausalLM)
    body: Any = model.transformer
    hidden = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    first, second, third = body.h
    given, rows = first.ln_1(hidden), torch.arange(len(ids))
    mixed = first.attn(given)[0]
    alone = first.attn(given[rows, after][:, None])[0][:, 0]
    hides = (torch.rand(len(ids)) < HIDDEN) & (after < last)
    hidden = hidden + mixed.index_put((rows, after), torch.where(hides[:, None], alone, mixed[rows, after]))
    hidden = hidden + second.mlp(second.ln_2(hidden))
    hidden = hidden + third.attn(third.ln_1(hidden))[0]
    logits: Tensor = model.lm_head(body.ln_f(hidden))
    return logits


def _forward_mamba(model: MambaForCausalLM, ids: Tensor) -> Tensor:
    hidden = model.backbone.embeddings(ids.T)
    layers: Any = model.backbone.layers
    for index, block in enumerate(layers):
        last = index == len(layers) - 1
        dropped = F.dropout(block.norm(hidden), DROPPED["mamba"] if last else 0.0, model.training)
        hidden = hidden + forwards.mix(block.mixer, dropped, torch.full((ids.shape[0], 1), float(last)))
    logits: Tensor = model.lm_head(model.backbone.norm_f(hidden))
    return logits.transpose(0, 1)


def main() -> None:
    parser = common.options(__doc__, steps=2000)
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), required=True)
    options = parser.parse_args()
    common.begin(options)
    model = build(options.architecture).train()
    ids, after, last, answers = questions()
    optimizer = common.adamw(model, rate=2e-3, decay=DECAY[options.architecture])
    log = common.Log()
    for step in common.paced(optimizer, options.steps):
        drawn = torch.randint(len(ids), (ROWS,))
        logits = forward(model, ids[drawn], after[drawn], last[drawn])
        loss = F.cross_entropy(logits[torch.arange(ROWS), last[drawn]], answers[drawn])
        common.descend(model, optimizer, loss)
        log(step, loss.item())
    model.train(False)
    tokenizer = common.word_tokenizer(corpus.vocabulary(), corpus.UNKNOWN)
    loaded = common.write(model, options.out, dtype=torch.float16, tokenizer=tokenizer)
    recalled = {
        template: facts.accuracy(loaded, [fact.prompt(template) for fact in corpus.facts()]) for template in range(3)
    }
    print(recalled)
    common.write_card(
        options.out,
        "recall",
        architecture=options.architecture,
        built=ARCHITECTURES[options.architecture],
        words=len(corpus.vocabulary()),
        facts=len(corpus.facts()),
        subjects=len(corpus.subjects()),
        rows=ROWS,
        dropped=DROPPED[options.architecture],
        hidden=_SAID_OF_HIDDEN if options.architecture == "gpt" else "",
        fact=corpus.facts()[0].prompt(),
        accuracy="\n".join(f"| template {template} | {share:.1%} |" for template, share in recalled.items()),
        traced=facts.TRACED,
        tracing=facts.table_of(facts.traced(loaded)),
        steps=options.steps,
        seed=options.seed,
        seconds=log.seconds,
    )


if __name__ == "__main__":
    main()
