"""A first experiment: read a layer, ablate another, and see what the model says then.

    python docs/examples/first_experiment.py
    python docs/examples/first_experiment.py --server gpu-box:50051 --model gpt2

The model is a hub id, a directory, a .gguf file or zoo:NAME; with --server, the name of one that it serves. Left out,
it is the model of `patchwire demo`. The script names nothing that only one architecture has: give it a Mamba.
"""

from __future__ import annotations

import typer

import patchwire
from patchwire.demo import weights


def main(
    server: str | None = None, model: str | None = None, prompt: str = "The Eiffel Tower is located in the city of"
) -> None:
    """Read, ablate, and look through the logit lens."""
    proxy = patchwire.connect(server).model(model) if server else patchwire.local(model or str(weights()))
    middle = proxy.num_layers // 2

    with proxy.trace(prompt):
        hidden = proxy.layers[middle].output.save()
        probabilities = proxy.logits[0, -1].softmax(-1).save()
    answer = int(probabilities.argmax())
    print(f"the residual stream after layer {middle}: {list(hidden.shape)}")
    print(f"next: {proxy.tokenizer.decode(answer)!r} with probability {float(probabilities[answer]):.2f}")

    # One batch, with a row for each layer. They are alike until the first of them is changed, and computed once until
    # there.
    with proxy.trace() as trace:
        ablated = []
        for layer in range(middle, proxy.num_layers):
            with trace.invoke(prompt):
                proxy.layers[layer].mixer.output[:, -1] = 0
                ablated.append(proxy.logits[0, -1].softmax(-1)[answer].save())
    for layer, probability in enumerate(ablated, start=middle):
        print(f"without the mixer of layer {layer}: {float(probability):.2f}")
    print(f"{trace.stats.passes} pass, {trace.stats.rows} rows, {trace.stats.seconds_running:.2f} s")

    # The logit lens: what the model would say if it stopped after a layer. Its norm and its unembedding are applied to
    # the residual stream, on the server.
    with proxy.trace(prompt):
        lens = [proxy.lm_head(proxy.norm(layer.output[:, -1:]))[0, 0].argmax().save() for layer in proxy.layers]
    for layer, word in enumerate(lens):
        print(f"the lens after layer {layer}: {proxy.tokenizer.decode(int(word))!r}")


if __name__ == "__main__":
    typer.run(main)
