"""Where is a fact? Causal tracing, with severed runs.

Meng, Bau, Andonian and Belinkov (2022), "Locating and Editing Factual Associations in GPT", section 2.

    python docs/examples/causal_tracing.py
    python docs/examples/causal_tracing.py --server gpu-box:50051 --model gpt2-xl --window 10 \\
        --prompt "The Space Needle is in downtown" --subject "The Space Needle" --answer " Seattle"

Noise on the subject's embeddings makes a model forget what it knows of the subject. Then one state of the undisturbed
run is put back, one (token, layer) at a time. Where the answer comes back, the fact was on its way.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich import print

import patchwire
from patchwire.methods import Result, causal_trace, side_by_side


def experiment(model: patchwire.Model, prompt: str, subject: str, answer: str | None) -> dict[str, Result]:
    """The trace of the residual stream, and what is left of it when MLPs, or mixers, cannot work on what is restored.

    A severed run holds each MLP (or mixer: attention, or the SSM of a Mamba) at the restored token at what it is in the
    corrupted run. What the state does by itself remains; what it does through them is gone. All cells of a trace, each
    of them ten rows of noise, are one request: rows that are alike are computed once, and only the numbers come back.
    """
    traces = {"the residual stream": causal_trace(model, prompt, subject, answer=answer)}
    for name, part in {"MLPs severed": "mlp", "mixers severed": "mixer"}.items():
        if part == "mixer" or hasattr(model.layers[0], "mlp"):
            traces[name] = causal_trace(model, prompt, subject, answer=answer, severed=part)
    return traces


def modules(model: patchwire.Model, prompt: str, subject: str, answer: str | None, window: int) -> dict[str, Result]:
    """What modules add, restored in `window` layers around each at once: one of them alone does little (figure 1)."""
    places = ["mixer", "mlp"] if hasattr(model.layers[0], "mlp") else ["mixer"]
    return {
        f"{place}, {window} layers": causal_trace(model, prompt, subject, answer=answer, at=place, window=window)
        for place in places
    }


def main(
    server: str | None = None,
    model: str = "zoo:facts-gpt2",
    prompt: str = "Ada Barlow lives in the city of",
    subject: str = "Ada Barlow",
    answer: str | None = None,
    window: int = 2,
    out: Path = Path("causal-tracing.png"),
) -> None:
    """Trace a fact; the model is one of --server, or runs in this program."""
    proxy = patchwire.connect(server).model(model) if server else patchwire.local(model)
    found = experiment(proxy, prompt, subject, answer) | modules(proxy, prompt, subject, answer, window)

    # Every result knows the probability of the answer in both runs: the undisturbed one, and the corrupted one.
    trace = found["the residual stream"]
    print(f"The answer's probability: {trace.numbers['source']:.2f}, and with noise {trace.numbers['base']:.2f}.")

    # `effect()` is the indirect effect: by how much a restored state raises it. The zoo's model has two sites, as large
    # GPTs do: an early one at the subject's last token, and a late one at the end. MLPs severed, the early site loses
    # most of its effect in its first layer. Attention counts there too in this model, as it puts the two names
    # together; in GPT-2 XL the paper finds much less of that.
    last = trace.axes[1].marked[-1]
    for name, each in found.items():
        by_layer = each.effect().at(token=last).values.tolist()
        print(f"{name:>22}, at the subject's last token:", *(f"{value:.2f}" for value in by_layer))
    print(trace.effect().table())

    # The figure is made of results, and so can be yours: `trace.save("trace.safetensors")` keeps one, with its prompts,
    # seeds and versions, and `patchwire.methods.load` reads it again.
    figure = side_by_side(
        {name: each.effect() for name, each in found.items()}, title=f"{proxy.name}: what is restored"
    )
    figure.savefig(out, dpi=100)
    print(f"The figure is in {out}.")


if __name__ == "__main__":
    typer.run(main)
