"""Scans: a block that is recorded and checked in full, and not run.

Everything that can be known without numbers is: whether the sites exist, whether shapes and orders fit, and the shape
and dtype of every value. Neither the graph nor a prompt is sent; a scan costs no forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx

from patchwire import display
from patchwire import graph as g
from patchwire.checking import describe, fake_of
from patchwire.errors import GraphError, PatchwireError, here, with_code
from patchwire.session import current_session
from patchwire.tracing import Trace


class Scan(Trace):
    """A trace that runs nothing. After the block, values know their `shape` and `dtype`, and have no numbers.

    Printed, it is the module tree with symbolic shapes, and what the block reads, writes and saves there.
    """

    graph: g.Graph | None = None
    """What was recorded; None until the block has ended."""

    def __enter__(self) -> Scan:
        if current_session() is not None:
            raise GraphError("A scan stands outside of sessions.", hint="Scan before the session.", lines=here())
        super().__enter__()
        self._recorder.scanned = True
        return self

    def _graph(self) -> None:
        self.graph = self._recorder.finish()

    def check(self) -> None:
        """Have the server check the recorded graph, as it would before a run: against its own limits, too.

        Raises:
            GraphError: the block has not ended.
            PatchwireError: what a run would be refused with.
        """
        if self.graph is None:
            raise GraphError(
                "There is nothing to check yet.", hint="Write `scan.check()` after the block.", lines=here()
            )
        try:
            self._model.connection.check(self.graph)
        except PatchwireError as found:
            raise found.with_traceback(None) from None

    @property
    def tree(self) -> str:
        """The module tree with symbolic shapes: batch and seq stand for rows and tokens."""
        return display.text(self._model.catalogue)

    def __repr__(self) -> str:
        return "\n".join([self.tree, *self._notes()])

    def _repr_html_(self) -> str:
        return display.html(self._model.catalogue) + display.lines_html(self._notes())

    def _notes(self) -> Iterator[str]:
        rows = self.tokens
        if rows:
            yield f"\nbatch = {len(rows)}, seq = {max(map(len, rows))}"
        for node in self.graph.fx.nodes if self.graph else ():
            if node.target in _KINDS:
                yield _note(node)


_KINDS = {g.read: "read", g.write: "write", g.save: "save", g.keep: "keep", g.log: "log"}


def _note(node: torch.fx.Node) -> str:
    line = g.line_of(node)
    about = node.all_input_nodes
    looks = "" if node.target is g.log else describe(fake_of(about[0] if about else node))
    site = str(node.args[0]) if isinstance(node.args[0], g.Site) else ""
    parts = (f"{_KINDS[node.target]:<5}", site, looks, str(with_code(line)).strip() if line else "")  # type: ignore[index]
    return "  ".join(part for part in parts if part)
