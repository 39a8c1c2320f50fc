"""A first experiment: read a layer, ablate another, and see what the model says then.

    python docs/examples/first_experiment.py [MODEL]

MODEL is a hub id, a directory or a .gguf file; left out, it is the model of `patchwire demo`. The script names nothing
that only one architecture has: give it a Mamba.
"""

from __future__ import annotations

import sys

import patchwire
from patchwire.demo import weights
from patchwire.methods import logit_lens

PROMPT = "The Eiffel Tower is located in the city of"

model = patchwire.local(sys.argv[1] if len(sys.argv) > 1 else str(weights()))

middle = model.num_layers // 2

with model.trace(PROMPT):
    hidden = model.layers[middle].output.save()
    probabilities = model.logits[0, -1].softmax(-1).save()

print(f"the residual stream after layer {middle}: {list(hidden.shape)}")
answer = int(probabilities.argmax())
print(f"next: {model.tokenizer.decode(answer)!r} with probability {float(probabilities[answer]):.2f}")

with model.trace() as trace:  # one batch: a row for each layer
    ablated = []
    for layer in range(middle, model.num_layers):
        with trace.invoke(PROMPT):
            model.layers[layer].mixer.output[:, -1] = 0
            ablated.append(model.logits[0, -1].softmax(-1)[answer].save())

for layer, probability in enumerate(ablated, start=middle):
    print(f"without the mixer of layer {layer}: {float(probability):.2f}")
print(f"{trace.stats.passes} pass, {trace.stats.rows} rows, {trace.stats.seconds_running:.2f} s")

lens = logit_lens(model, PROMPT)
for layer, words in zip(lens.layers, lens.words, strict=True):
    print(f"the lens after {layer:>5}: {words[-1][0]!r}")
