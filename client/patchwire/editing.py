"""Edits that stay: interventions and changed weights that ride along with every later trace of an edited model.

The block under `model.edit()` is recorded once, for a prompt that stands for any other, and what was recorded is
recorded again in every invoke of the edited model's traces, before anything else there. Nothing changes on the server:
other proxies of the same model, and other people, see the model as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.fx
from torch.fx.node import map_arg

from patchwire import graph as g
from patchwire.errors import GraphError, here, with_code
from patchwire.proxy import Value
from patchwire.recording import Recorder
from patchwire.session import current_session
from patchwire.sites import Address
from patchwire.tracing import Trace

if TYPE_CHECKING:
    from patchwire.model import Model

_TOKENS = 64
_NOWHERE = Address("output")


class Edit:
    """What a block under `model.edit()` has recorded."""

    def __init__(self, recorder: Recorder, *, prompt_only: bool) -> None:
        """
        Args:
            recorder: With one trace of one invoke.
            prompt_only: Whether it is for the prompt's pass of a generation only.

        Raises:
            GraphError: something was saved or kept.
        """
        if recorder.kept:
            raise GraphError(
                "What stays with a model cannot keep a value: it belongs to no run.",
                hint="Keep it in a trace of the edited model.",
                lines=[with_code(line) for *_, line in recorder.kept[:1] if line is not None],
            )
        if recorder.saved:
            raise GraphError(
                "What stays with a model cannot be saved: it belongs to no run.",
                hint="Save it in a trace of the edited model.",
                lines=[with_code(line) for *_, line in recorder.saved[:1] if line is not None],
            )
        self._request = recorder.finish()
        self._prompt_only = prompt_only

    def into(self, recorder: Recorder, trace: int, invoke: int) -> None:
        """Record it again in an invoke, for the prompt's pass and, in a generation, every other.

        Raises:
            ShapeError, SiteError: it does not fit the prompt.
        """
        generation = recorder.request.traces[trace].generation
        steps = range(generation.max_new_tokens if generation and not self._prompt_only else 1)
        shared: dict[torch.fx.Node, torch.fx.Node] = {}
        for step in steps:
            self._step(recorder, g.Site(trace, invoke, _NOWHERE, step, open=step > 0), shared)

    def _step(self, recorder: Recorder, place: g.Site, shared: dict[torch.fx.Node, torch.fx.Node]) -> None:
        """Record it again for one step of an invoke. What needs no site is `shared` by all steps."""
        made = dict(shared)

        def value(node: torch.fx.Node) -> Value:
            return Value(recorder, made[node])

        for node in self._request.fx.nodes:
            if node in made:
                continue
            match node.target:
                case target if target is g.read:
                    made[node] = recorder.read(replace(place, address=node.args[0].address)).node
                case target if target is g.write:
                    recorder.assign(replace(place, address=node.args[0].address), value(node.args[1]))
                case target if target is g.assign:
                    if place.invoke == 0 and place.step == 0:  # weights are those of the whole trace
                        recorder.assign_parameter(place.trace, node.args[1], value(node.args[2]))
                case target if target is g.parameter:
                    made[node] = recorder.parameter(place.trace, node.args[1]).node
                case target if target is g.constant:
                    constant = self._request.constants[node.args[0]]
                    kept = isinstance(constant, g.KeptTensor)
                    made[node] = recorder.on_server(constant).node if kept else recorder.argument(constant)
                case target if target is g.token_ids:
                    made[node] = recorder.token_ids(place.trace, place.invoke).node
                case target:
                    args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
                    args = (place.trace, *args[1:]) if target is g.apply else args
                    made[node] = recorder.again(node, args, kwargs)
            if node.meta["after"] is None and node in made:
                shared[node] = made[node]


class Editing(Trace):
    """The block under `model.edit()`: a trace that is not sent."""

    def __init__(self, model: Model, given: Any, *, prompt_only: bool) -> None:
        super().__init__(model._original, [[0] * model._longest(_TOKENS)] if given is None else given)
        self._edited = model._with_edits()
        self._prompt_only = prompt_only

    def __enter__(self) -> Model:  # type: ignore[override]
        if current_session() is not None:
            raise GraphError("A model is edited outside of sessions.", hint="Edit it before.", lines=here())
        super().__enter__()
        return self._edited

    def _graph(self) -> None:
        self._edited._edits.append(Edit(self._recorder, prompt_only=self._prompt_only))
