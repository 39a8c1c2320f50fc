"""Patchwire: `patchwire serve` in a process of its own, and a client over the wire."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tasks import KEPT, NEW_TOKENS, REQUESTS, USERS, Inputs, Request, Result
from torch import Tensor

import patchwire


class Library:
    """See `tasks.Library`."""

    packages = ("patchwire", "torch", "transformers", "grpcio")
    options: Sequence[str] = ()
    """What the server is told besides."""

    def __init__(self, directory: Path, inputs: Inputs) -> None:
        serve = [sys.executable, "-m", "patchwire", "serve", f"model={directory}", "--port", "0", "--device", "cpu"]
        self.server = subprocess.Popen([*serve, *self.options], stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        first = self.server.stdout.readline()
        if not first.startswith("Serving on "):
            raise RuntimeError(f"the server did not start: {first}")
        self.address = first.split()[-1]
        self.model = self.connect()
        self.inputs = inputs
        self.users: list[patchwire.Model] = []

    def connect(self) -> patchwire.Model:
        return patchwire.connect(self.address, progress=False).model()

    def tasks(self) -> Mapping[str, Callable[[], Result]]:
        return {
            "read": self.read,
            "read_all": self.read_all,
            "sweep": self.sweep,
            "sweep_one_by_one": self.sweep_one_by_one,
            "heads": self.heads,
            "attribution": self.attribution,
            "generation": self.generation,
            "users": self.users_at_once,
            "users_one_by_one": self.users_one_by_one,
        }

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()

    def read(self) -> Tensor:
        with self.model.trace(self.inputs.short):
            hidden = self.model.layers[-1].output.save()
        return hidden.value

    def read_all(self) -> list[Tensor]:
        with self.model.trace(self.inputs.long):
            states = [layer.output.save() for layer in self.model.layers]
        return [each.value for each in states]

    def sweep(self) -> Tensor:
        with self.model.trace() as trace:
            found = self.swept(trace)
        return torch.cat([each.value for each in found])

    def swept(self, trace: patchwire.Trace) -> list[patchwire.Value]:
        model, found = self.model, []
        with trace.invoke(self.inputs.clean):
            states = [layer.output for layer in model.layers]
        for layer, state in zip(model.layers, states, strict=True):
            for token in range(self.inputs.clean.shape[1]):
                with trace.invoke(self.inputs.corrupt):
                    layer.output[:, token] = state[:, token]
                    found.append(model.logits[:, -1, :KEPT].save())
        return found

    def sweep_one_by_one(self) -> Tensor:
        model, found = self.model, []
        with model.trace(self.inputs.clean):
            states = [layer.output.keep(seconds=600) for layer in model.layers]
        for layer, state in zip(model.layers, states, strict=True):
            for token in range(self.inputs.clean.shape[1]):
                with model.trace(self.inputs.corrupt):
                    layer.output[:, token] = state[:, token]
                    found.append(model.logits[:, -1, :KEPT].save())
        for each in states:
            each.forget()
        return torch.cat([each.value for each in found])

    def heads(self) -> Tensor:
        with self.model.trace() as trace:
            found = self.swept_by_head(trace)
        return torch.cat([each.value for each in found])

    def swept_by_head(self, trace: patchwire.Trace) -> list[patchwire.Value]:
        model, found = self.model, []
        with trace.invoke(self.inputs.clean):
            values = [layer.attn.z for layer in model.layers]
        for layer, value in zip(model.layers, values, strict=True):
            for head in range(model.config["num_attention_heads"]):
                with trace.invoke(self.inputs.corrupt):
                    layer.attn.z[:, :, head] = value[:, :, head]
                    found.append(model.logits[:, -1, :KEPT].save())
        return found

    def planned(self, task: str) -> float:
        with self.model.trace() as trace:
            {"sweep": self.swept, "heads": self.swept_by_head}[task](trace)
            return trace.plan().flops

    def attribution(self) -> Tensor:
        model = self.model
        right, wrong = self.inputs.answers
        with model.session():
            with model.trace(self.inputs.clean):
                clean = [layer.output for layer in model.layers]
            with model.trace(self.inputs.corrupt):
                states = [layer.output for layer in model.layers]
                logits = model.logits[0, -1]
                gradients = patchwire.grad(logits[right] - logits[wrong], states)
                found = [
                    ((one - other) * gradient).sum(-1).save()
                    for one, other, gradient in zip(clean, states, gradients, strict=True)
                ]
        return torch.cat([each.value for each in found])

    def generation(self) -> Tensor:
        model = self.model
        with model.generate(self.inputs.prompt, max_new_tokens=NEW_TOKENS) as gen:
            for _ in gen.all():
                model.layers[self.inputs.steered_layer].output[:] += self.inputs.steering
            tokens = gen.output.save()
        return tokens.value

    def users_one_by_one(self) -> list[Tensor]:
        return [ask(self.model, request) for request in self.inputs.requests * REQUESTS]

    def users_at_once(self) -> list[Tensor]:
        if not self.users:
            self.users = [self.connect() for _ in range(USERS)]

        def turn(model: patchwire.Model, request: Request) -> list[Tensor]:
            return [ask(model, request) for _ in range(REQUESTS)]

        with ThreadPoolExecutor(USERS) as pool:
            answers = list(pool.map(turn, self.users, self.inputs.requests))
        return [answers[user][turn] for turn in range(REQUESTS) for user in range(USERS)]


def ask(model: patchwire.Model, request: Request) -> Tensor:
    """The answer to one request: `[1, vocabulary]`."""
    with model.trace(request.ids):
        model.layers[request.layer].mixer.output[:, -1] = 0
        logits = model.logits[:, -1].save()
    return logits.value
