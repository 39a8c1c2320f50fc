"""Admission: from the message of a request to a graph that may run.

Every input is hostile until it has come through here: sizes, references, operations, token ids, sites, shapes and the
order of sites are checked, all without touching a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.fx
from torch import Tensor

from patchwire import graph as g
from patchwire.checking import Checker, fake_of, leaf_of
from patchwire.errors import GraphError, InputError, LimitError, ModelNotFoundError, PatchwireError, nearest
from patchwire.sites import Catalogue, Leaf
from patchwire.v1 import graph_pb2
from patchwire_worker.config import Limits
from patchwire_worker.kept import KeptStore
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.store import TensorStore

_MOST_SAVED = 1 << 20
"""How many values a loop may save."""


@dataclass(frozen=True)
class Admitted:
    """A graph that may run."""

    graph: g.Graph
    """The graph; its constants are tensors."""
    models: Sequence[HostedModel]
    """The model that each trace calls."""
    checker: Checker
    """What checked it, for the nodes whose shapes are only known while it runs."""
    positions: Mapping[torch.fx.Node, int]
    """Each node's place in the request."""
    bodies: Mapping[int, Admitted] = field(default_factory=dict)
    """The bodies of its loops, by the position of each in the graph's traces."""

    @property
    def all_models(self) -> set[HostedModel]:
        """The models that it calls, in its loops too."""
        return set(self.models).union(*(each.models for each in self.bodies.values()))


class Admission:
    """Checks requests against the models and limits of a server."""

    def __init__(self, models: Mapping[str, HostedModel], limits: Limits, store: TensorStore, kept: KeptStore) -> None:
        self.models = models
        self.limits = limits
        self.store = store
        self.kept = kept

    def model(self, name: str) -> HostedModel:
        """The model of a name.

        Raises:
            ModelNotFoundError: there is none.
        """
        found = self.models.get(name)
        if found is None:
            near = nearest(name, self.models) or list(self.models)
            raise ModelNotFoundError(
                f"The server has no model `{name[:200]}`.", hint=f"It has {', '.join(f'`{each}`' for each in near)}."
            )
        return found

    def check_nodes(self, message: graph_pb2.Graph) -> None:
        """Refuse a graph of too many nodes or traces, before anything looks at each of them.

        Raises:
            LimitError: these are too many.
        """
        self._check_traces(len(message.traces))
        nodes = len(message.nodes) + sum(len(trace.loop.body.nodes) for trace in message.traces)
        if nodes > self.limits.nodes:
            raise LimitError(
                f"The graph has {nodes:,} nodes; the server takes {self.limits.nodes:,}.",
                hint="Split it into several traces.",
            )

    def admit(self, message: graph_pb2.Graph, *, until: float = math.inf) -> Admitted:
        """The graph of a message.

        Raises:
            PatchwireError: of the kind of what is wrong with it.
            TookLongError: it could not be checked until then, as `time.monotonic` tells it.
        """
        self.check_nodes(message)
        if not message.traces:
            raise GraphError("The graph has no trace.")
        self._count_rows([*message.traces, *(each for trace in message.traces for each in trace.loop.body.traces)])
        models = [self.model(trace.model) for trace in message.traces]
        for trace, model in zip(message.traces, models, strict=True):
            if not trace.HasField("loop"):
                self._check_rows(trace, [[row.ids for row in each.rows] for each in trace.invokes], model)
        graph = g.graph_from_proto(message, constant_bytes=self.limits.constant_bytes)
        admitted = self._checked(graph, models, until)
        return replace(
            admitted,
            bodies={
                node.args[0]: self._body(graph.loops[node.args[0]], node, models[node.args[0]], until)
                for node in graph.fx.find_nodes(op="call_function", target=g.loop)
            },
        )

    def _body(self, loop: g.Loop, node: torch.fx.Node, home: HostedModel, until: float) -> Admitted:
        """The body of a loop that a node runs, on a model's queue."""
        if loop.count > self.limits.iterations:
            raise at(
                node,
                LimitError(
                    f"A loop of {loop.count:,} iterations is too long; the server runs {self.limits.iterations:,}.",
                    hint="Keep what it comes to, and go on from there in another request.",
                ),
            )
        body = loop.body
        models = [self.model(trace.model) for trace in body.traces]
        for trace, model in zip(body.traces, models, strict=True):
            changing, tokens = any(each.batches for each in trace.invokes), 0
            for iteration in range(loop.count if changing else 1):
                invokes = [each.at(iteration).rows for each in trace.invokes]
                tokens += self._check_rows(trace, invokes, model)
            tokens *= 1 if changing else loop.count
            if tokens > self.limits.loop_tokens:
                raise at(
                    node,
                    LimitError(
                        f"A loop's iterations have {tokens:,} tokens; the server takes {self.limits.loop_tokens:,}.",
                        hint="Split it over several requests.",
                    ),
                )
        body.outside = [fake_of(each) for each in node.args[1]]  # type: ignore[union-attr, arg-type]
        if any(isinstance(each, tuple) for each in body.outside):
            error = GraphError(
                "A tuple cannot be given to a loop as one value.", hint="Give it each of its items: `value[0]`."
            )
            raise at(node, error)
        extremes = loop.extremes
        admitted = self._checked(body, models or [home], until, times=1 if len(extremes) > 1 else loop.count)
        for iteration in extremes[1:]:
            Checker(body.at(iteration), self._catalogue, value_bytes=self.limits.value_bytes, until=until).all()
        saves = sum(each.target in (g.save, g.log) for each in body.fx.nodes)
        if saves * loop.count > _MOST_SAVED:
            raise at(
                node,
                LimitError(
                    f"A loop saves and logs {saves * loop.count:,} values; the server sends {_MOST_SAVED:,}.",
                    hint="Carry a tensor, and save what it ends as.",
                ),
            )
        return admitted

    def _checked(self, graph: g.Graph, models: Sequence[HostedModel], until: float, times: int = 1) -> Admitted:
        """A graph that is found to be in order; it runs so many times."""
        self._look_up_constants(graph)
        for each in graph.traces:
            if each.generation is not None:
                each.generation.check()
        checker = Checker(graph, self._catalogue, value_bytes=self.limits.value_bytes, until=until)
        checker.all()
        nodes = graph.nodes
        self._check_results(nodes, times)
        self._check_kept(nodes)
        self._check_writes(nodes)
        checker.until = math.inf
        return Admitted(graph, models, checker, {node: index for index, node in enumerate(nodes)})

    def _catalogue(self, name: str) -> Catalogue:
        return self.model(name).catalogue

    def _check_traces(self, traces: int) -> None:
        if traces > self.limits.nodes:
            raise LimitError(
                f"The graph has {traces:,} traces; the server takes {self.limits.nodes:,}.",
                hint="Split it into several requests.",
            )

    def _count_rows(self, all_traces: Sequence[graph_pb2.Trace]) -> None:
        """Refuse more traces, invokes and rows than the limits allow, before anything looks at each of them."""
        self._check_traces(len(all_traces))
        rows = 0
        # A row has a token at least, and a trace that is good for anything an operation.
        most = self.limits.tokens + self.limits.nodes
        for trace in all_traces:
            rows += len(trace.invokes)
            if rows <= most:
                rows += sum(max(len(invoke.rows) - 1, 0) + len(invoke.batches) for invoke in trace.invokes)
            if rows <= most:
                rows += sum(len(batch.rows) for invoke in trace.invokes for batch in invoke.batches)
            if rows > most:
                raise LimitError(
                    f"The traces have more than {most:,} rows; the server takes no more.",
                    hint="Split them over several requests.",
                )

    def _check_rows(
        self, trace: graph_pb2.Trace | g.Trace, invokes: Sequence[Sequence[Sequence[int]]], model: HostedModel
    ) -> int:
        """Check the rows of each invoke of a trace; how many tokens they have."""
        rows = [row for invoke in invokes for row in invoke]
        if not invokes or not all(invokes):
            raise InputError("A trace has no rows.")
        longest = max(map(len, rows))
        if min(map(len, rows)) == 0:
            raise InputError("A row has no tokens.")
        if model.max_positions and longest > model.max_positions:
            raise InputError(f"A row has {longest} tokens; {model.name} takes {model.max_positions}.")
        if len(rows) * longest > self.limits.tokens:
            raise LimitError(
                f"The rows have {len(rows) * longest:,} tokens; the server takes {self.limits.tokens:,}.",
                hint="Split them over several traces.",
            )
        if any(min(row) < 0 or max(row) >= model.vocabulary for row in rows):
            raise InputError(f"Token ids go from 0 to {model.vocabulary - 1}.")
        new = 0
        if trace.generation is not None and (isinstance(trace, g.Trace) or trace.HasField("generation")):
            new = trace.generation.max_new_tokens
            self._check_generation(new, invokes, model, rows)
        if not model.pads and any(len(set(map(len, invoke))) > 1 for invoke in invokes):
            raise InputError(
                f"{model.name} is not causal: its rows cannot be padded.",
                hint="Give it prompts of one length, or one trace for each.",
            )
        return len(rows) * (longest + new)

    def _check_generation(
        self,
        new: int,
        invokes: Sequence[Sequence[Sequence[int]]],
        model: HostedModel,
        rows: Sequence[Sequence[int]],
    ) -> None:
        longest = max(map(len, rows))
        if any(len(set(map(len, invoke))) > 1 for invoke in invokes):
            raise InputError(
                "The prompts of one generation have the same length.",
                hint="Give prompts of other lengths invokes of their own: `with trace.invoke(prompt):`.",
            )
        if model.max_positions and longest + new > model.max_positions:
            raise InputError(
                f"{longest} tokens and {new} new ones are too many; {model.name} takes {model.max_positions}."
            )
        if len(rows) * (longest + new) > self.limits.tokens:
            raise LimitError(
                f"The rows would have {len(rows) * (longest + new):,} tokens; the server takes {self.limits.tokens:,}.",
                hint="Generate fewer tokens, or for fewer prompts at once.",
            )

    def _look_up_constants(self, graph: g.Graph) -> None:
        names = [each for each in graph.constants if isinstance(each, bytes)]
        if names:
            found = dict(zip(names, self.store.get(names), strict=True))
            graph.constants = [found[each] if isinstance(each, bytes) else each for each in graph.constants]
        for node in graph.fx.find_nodes(op="call_function", target=g.constant):
            constant = graph.constants[node.args[0]]
            if isinstance(constant, g.KeptTensor):
                try:
                    graph.constants[node.args[0]] = self.kept.get(constant.handle)
                except GraphError as error:
                    raise at(node, error) from None

    def _check_kept(self, nodes: list[torch.fx.Node]) -> None:
        for node in nodes:
            seconds = node.args[1] if node.target is g.keep else 1.0
            if not 0 < seconds <= self.limits.kept_seconds:  # type: ignore[operator]
                error = LimitError(
                    f"A value cannot be kept for {seconds:g} seconds; the server keeps it for "
                    f"{self.limits.kept_seconds:g} at most.",
                    hint="Ask for less: `value.keep(seconds=…)`.",
                )
                raise at(node, error)

    def _check_results(self, nodes: list[torch.fx.Node], times: int) -> None:
        total = saved_bytes(nodes) * times
        if total > self.limits.result_bytes:
            raise LimitError(
                f"The saved values have {total:,} bytes; the server sends {self.limits.result_bytes:,}.",
                hint="Save less of each (`value[:, -1].save()`), or narrower (`.save(dtype=torch.bfloat16)`).",
            )

    @staticmethod
    def _check_writes(nodes: list[torch.fx.Node]) -> None:
        written: set[tuple[int, int, int, Leaf]] = set()
        for node in nodes:
            if node.target is g.write:
                site = node.args[0]
                assert isinstance(site, g.Site)
                place = (site.trace, site.invoke, site.step, leaf_of(node))
                if place in written:
                    raise at(node, GraphError(f"`{site}` is written twice."))
                written.add(place)


def saved_bytes(nodes: list[torch.fx.Node]) -> int:
    """Bytes of the saved values, as far as their shapes are known."""
    total = 0
    for node in nodes:
        if node.target is g.save:
            fake = fake_of(node.args[0])  # type: ignore[arg-type]
            if isinstance(fake, Tensor):
                total += fake.numel() * (node.args[1] or fake.dtype).itemsize  # type: ignore[union-attr]
    return total


def at(node: torch.fx.Node, error: PatchwireError) -> PatchwireError:
    """The same error, at the line that a node came from."""
    line = g.line_of(node)
    return error if line is None or error.lines else type(error)(error.message, hint=error.hint, lines=[line])
