"""What a patching sweep costs: every layer and token of SmolLM2-135M, one state of a clean run into a corrupt one.

- `raw`: PyTorch hooks on the same model here, 60 patched rows in each batch, after one pass for the clean states;
- `nnsight`: its batched invokes on the same model here, 60 in each trace, after one trace for the clean states;
- `patchwire`: one trace over the wire to a server in this process, the clean run included.

All of them give the last token's logits, of which five are kept.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from measuring import alternate, report
from nnsight import NNsight
from transformers import AutoModelForCausalLM

import patchwire
from patchwire import demo

CLEAN, CORRUPT = "The Eiffel Tower is located in the city of", "The Colosseum is located in the city of"
ROUNDS = int(os.environ.get("ROUNDS", "3"))
ROWS = 60
KEPT = 5


def raw(model: torch.nn.Module, clean: torch.Tensor, corrupt: torch.Tensor) -> torch.Tensor:
    layers = model.model.layers
    states: list[torch.Tensor] = []
    handles = [each.register_forward_hook(lambda _, __, output: states.append(output.clone())) for each in layers]
    with torch.no_grad():
        model(clean, use_cache=False, logits_to_keep=1)
    for each in handles:
        each.remove()
    cells = [(layer, token) for layer in range(len(layers)) for token in range(clean.shape[1])]
    found = []
    for start in range(0, len(cells), ROWS):
        part = cells[start : start + ROWS]

        def patch(at: int, part: list[tuple[int, int]] = part) -> object:
            def hook(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
                for row, (layer, token) in enumerate(part):
                    if layer == at:
                        output[row, token] = states[layer][0, token]
                return output

            return hook

        handles = [layers[at].register_forward_hook(patch(at)) for at in {layer for layer, _ in part}]
        with torch.no_grad():
            logits = model(corrupt.expand(len(part), -1), use_cache=False, logits_to_keep=1).logits
        found.append(logits[:, -1, :KEPT])
        for each in handles:
            each.remove()
    return torch.cat(found)


@torch.no_grad()
def with_nnsight(model: torch.nn.Module, clean: torch.Tensor, corrupt: torch.Tensor) -> torch.Tensor:
    envoy = NNsight(model)
    count = len(model.model.layers)
    with envoy.trace(clean, use_cache=False):
        states = []
        for layer in range(count):
            states.append(envoy.model.layers[layer].output.save())
        states.save()
    cells = [(layer, token) for layer in range(count) for token in range(clean.shape[1])]
    found = []
    for start in range(0, len(cells), ROWS):
        part = cells[start : start + ROWS]
        ids = corrupt.expand(len(part), -1)
        with envoy.trace(ids, use_cache=False, logits_to_keep=1):
            for row, (layer, token) in enumerate(part):
                envoy.model.layers[layer].output[row, token] = states[layer][0, token]
            logits = envoy.lm_head.output[:, -1, :KEPT].save()
        found.append(logits)
    return torch.cat(found)


def over_the_wire(model: patchwire.Model, clean: torch.Tensor, corrupt: torch.Tensor) -> torch.Tensor:
    found = []
    with model.trace() as trace:
        with trace.invoke(clean):
            states = [layer.output for layer in model.layers]
        for layer, state in zip(model.layers, states, strict=True):
            for token in range(clean.shape[1]):
                with trace.invoke(corrupt):
                    layer.output[:, token] = state[:, token]
                    found.append(model.logits[:, -1, :KEPT].save())
    return torch.cat([each.value for each in found])


def main() -> None:
    weights = demo.weights()
    plain = AutoModelForCausalLM.from_pretrained(
        str(weights.parent), gguf_file=weights.name, dtype=torch.float32
    ).eval()
    model = patchwire.local(str(weights), progress=False)
    clean, corrupt = (model.tokenizer.encode(each) for each in (CLEAN, CORRUPT))
    length = min(len(clean), len(corrupt))
    ids = tuple(torch.tensor([each[-length:]]) for each in (clean, corrupt))
    expected = raw(plain, *ids)
    torch.testing.assert_close(over_the_wire(model, *ids), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(with_nnsight(plain, *ids), expected, rtol=0, atol=1e-3)
    cases = {
        "raw": lambda: raw(plain, *ids),
        "nnsight": lambda: with_nnsight(plain, *ids),
        "patchwire": lambda: over_the_wire(model, *ids),
    }
    seconds = alternate(cases, rounds=ROUNDS, warm_up=1)
    report(
        "sweep",
        cells=len(expected),
        raw_s=round(seconds["raw"], 2),
        patchwire_to_raw=round(seconds["patchwire"] / seconds["raw"], 3),
        nnsight_to_patchwire=round(seconds["nnsight"] / seconds["patchwire"], 2),
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
