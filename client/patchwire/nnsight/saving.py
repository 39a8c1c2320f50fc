"""`save`, also as a method of Python's own containers and numbers, as nnsight has it.

Python's own types are closed to assignments, so their tables of methods are written to, once, when this is imported. A
method that was there before (nnsight's own, if it is imported too) still answers outside of Patchwire's blocks.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Any

from torch import Tensor

from patchwire.errors import GraphError, here
from patchwire.nnsight.values import TensorRecorder
from patchwire.proxy import Value
from patchwire.session import current_session
from patchwire.tracing import scope_now

_CONTAINERS = (list, dict, tuple, set, frozenset)
_PLAIN = (int, float)


def save(value: Any) -> Any:
    """Ask for a value, or for everything that a container holds when the block ends.

    Args:
        value: A value; a list, dict, tuple or set of values; or anything else, which is here already.

    Returns:
        The same object; after the block, the values that it is or holds are tensors.

    Raises:
        GraphError: this is outside of a block.
    """
    if isinstance(value, Value):
        return value.save()
    recorder = _recorder()
    if recorder is None:
        raise GraphError(
            "Something is saved inside a block only.", hint="Move the line into `with model.trace(…):`.", lines=here()
        )
    if isinstance(value, _CONTAINERS):
        recorder.containers.append(value)
    return value


def _recorder() -> TensorRecorder | None:
    scope, session = scope_now(), current_session()
    if scope is not None:
        recorder = scope.recorder
    elif session is not None and session.request is not None:
        recorder = session.request.recorder
    else:
        return None
    return recorder if isinstance(recorder, TensorRecorder) else None


def _mount(kind: type) -> None:
    former = getattr(kind, "save", None)

    def method(self: Any) -> Any:
        """Keep this after the block."""
        if former is not None and _recorder() is None:
            return former(self)
        return save(self)

    method.__name__ = "save"
    (methods,) = gc.get_referents(kind.__dict__)
    methods["save"] = method
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))


for _kind in (*_CONTAINERS, *_PLAIN, Tensor):
    _mount(_kind)
