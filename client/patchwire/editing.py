"""Edits that stay: interventions and changed weights that ride along with every later trace of an edited model.

The block under `model.edit()` is recorded once, for a prompt that stands for any other, and what was recorded is
recorded again in every invoke of the edited model's traces, before anything else there. Nothing changes on the server:
other proxies of the same model, and other people, see the model as it is.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.fx
from torch.fx.node import map_arg

from patchwire import graph as g
from patchwire.checking import Checker, fake_of
from patchwire.errors import GraphError, PatchwireError, here, with_code
from patchwire.loops import Varying, common_shape
from patchwire.proxy import Value
from patchwire.recording import Recorder
from patchwire.session import current_session
from patchwire.sites import Address
from patchwire.tracing import Trace

if TYPE_CHECKING:
    from patchwire.model import Model

_TOKENS = 64
_NOWHERE = Address("output")


class EditRecorder(Recorder):
    """Records a block for any prompt: a length that depends on the prompt is not a number."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._others: tuple[int, list[dict[torch.fx.Node, Any]]] = (-1, [])

    def argument(self, value: Any) -> Any:
        """What stands in the graph for an argument.

        Raises:
            GraphError: it cannot, or it is a length that depends on the prompt.
        """
        return int(value) if isinstance(value, PromptLength) else super().argument(value)

    def shape(self, value: Value) -> torch.Size:
        """The lengths of a value's dimensions; those that differ between prompts cannot be used as numbers."""
        if value.ready or not self.open:
            return super().shape(value)
        fake, node = value.fake, value.node
        return common_shape([fake, *(each.get(node) for each in self._other_fakes())], PromptLength)

    def _other_fakes(self) -> list[dict[torch.fx.Node, Any]]:
        """The fakes of all nodes for a prompt of one more token, and for one of one more row, if they fit that."""
        nodes = list(self.graph.nodes)
        if self._others[0] != len(nodes):
            found = []
            for tokens, rows in ((1, 0), (0, 1)):
                traces = [replace(each, invokes=[_larger(one, tokens, rows) for one in each.invokes])
                          for each in self.request.traces]  # fmt: skip
                copy = torch.fx.Graph()
                copies: dict[torch.fx.Node, torch.fx.Node] = {}
                for node in nodes:
                    copies[node] = copy.node_copy(node, copies.__getitem__)
                checker = Checker(
                    replace(self.request, traces=traces, fx=copy), self.checker.catalogue,
                    value_bytes=self.checker.value_bytes,
                )  # fmt: skip
                with contextlib.suppress(PatchwireError):  # what does not fit will be refused where it is traced
                    checker.all()
                    found.append({node: fake_of(each) for node, each in copies.items()})
            self._others = len(nodes), found
        return self._others[1]


def _larger(invoke: g.Invoke, tokens: int, rows: int) -> g.Invoke:
    longer = [*invoke.rows[0], *[0] * tokens]
    return g.Invoke((longer,) * (len(invoke.rows) + rows))


class PromptLength(Varying):
    """The length of a dimension that is that of whatever prompt is traced."""

    def _error(self) -> GraphError:
        return GraphError(
            "This length is not known in an edit: it is that of whatever prompt is traced later.",
            hint="Count from the end, `h[:, -1]`, or let the server count: `torch.ones_like(value[..., 0]).sum()`. "
            "An edit for prompts of one length is `model.edit(prompt)`.",
            lines=here(),
        )


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

    def into(self, recorder: Recorder, trace: int, invoke: int, weights: dict[torch.fx.Node, torch.fx.Node]) -> None:
        """Record it again in an invoke, for the prompt's pass and, in a generation, every other.

        Args:
            recorder: Records the trace.
            trace: The trace.
            invoke: The invoke.
            weights: The weights that the trace's first invoke has read for its edits: those of the others are the same,
                and not what the edits have made of them.

        Raises:
            ShapeError, SiteError: it does not fit the prompt.
        """
        generation = recorder.request.traces[trace].generation
        steps = range(generation.max_new_tokens if generation and not self._prompt_only else 1)
        shared = dict(weights)
        for step in steps:
            self._step(recorder, g.Site(trace, invoke, _NOWHERE, step, open=step > 0), shared)
        weights |= {node: made for node, made in shared.items() if node.target is g.parameter}

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

    _any_prompt_class: type[Recorder] = EditRecorder

    def __init__(self, model: Model, given: Any, *, prompt_only: bool) -> None:
        super().__init__(model._original, [[0] * model._longest(_TOKENS)] if given is None else given)
        if given is None:
            self._recorder_class = self._any_prompt_class
        self._edited = model._with_edits()
        self._prompt_only = prompt_only

    def __enter__(self) -> Model:  # type: ignore[override]
        if current_session() is not None:
            raise GraphError("A model is edited outside of sessions.", hint="Edit it before.", lines=here())
        super().__enter__()
        return self._edited

    def _graph(self) -> None:
        self._edited._edits.append(Edit(self._recorder, prompt_only=self._prompt_only))
