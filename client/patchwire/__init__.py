"""Patchwire: causal experiments inside language models that live somewhere else.

import patchwire

model = patchwire.connect("gpu-box:50051").model("gpt2")    # on a server
model = patchwire.local("path-or-hub-id")                    # or on this machine, the same way

with model.trace("The Eiffel Tower is in the city of"):
    hidden = model.layers[5].output.save()                   # read
    model.layers[10].mixer.output[:, -1] = 0                 # ablate
    logits = model.logits.save()
logits[0, -1].argmax()                                       # a saved value now behaves as its tensor
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from patchwire.errors import (
    AuthenticationError,
    BranchError,
    BusyError,
    CancelledError,
    ConnectionFailedError,
    ConnectionLostError,
    ExecutionError,
    GraphError,
    InputError,
    JobError,
    LimitError,
    MissingTensorsError,
    ModelNotFoundError,
    OperationError,
    OrderError,
    PatchwireError,
    PatchwireWarning,
    ShapeError,
    SiteError,
    StoreError,
    TimeoutError,
    VersionError,
)
from patchwire.version import VERSION as __version__

if TYPE_CHECKING:
    from patchwire import activations, methods, optim, random
    from patchwire.client import Client, connect, local
    from patchwire.comparing import Comparison, compare
    from patchwire.conditions import cond
    from patchwire.connection import TLS
    from patchwire.jobs import Job, JobStatus
    from patchwire.kept import Kept
    from patchwire.loops import Batches, Loop
    from patchwire.model import Model, Module
    from patchwire.plans import Plan
    from patchwire.proxy import Structure, Value, grad
    from patchwire.results import Stats
    from patchwire.scanning import Scan
    from patchwire.session import Session
    from patchwire.tracing import Generation, Trace
    from patchwire.verifying import Verification, verify

_HOMES = {
    "TLS": "connection",
    "Batches": "loops",
    "Client": "client",
    "Comparison": "comparing",
    "Generation": "tracing",
    "Job": "jobs",
    "JobStatus": "jobs",
    "Kept": "kept",
    "Loop": "loops",
    "Model": "model",
    "Module": "model",
    "Plan": "plans",
    "Scan": "scanning",
    "Session": "session",
    "Stats": "results",
    "Structure": "proxy",
    "Trace": "tracing",
    "Value": "proxy",
    "compare": "comparing",
    "cond": "conditions",
    "connect": "client",
    "grad": "proxy",
    "knockout": "flow",
    "local": "client",
    "verify": "verifying",
    "Verification": "verifying",
}
"""Where the names live that need torch, which takes seconds to import: they are looked up when they are first used."""


_ROOMS = ("activations", "methods", "optim", "random")
"""Modules that are looked up in the same way: `patchwire.random.normal(…)` needs no import of its own."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"patchwire.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'patchwire' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"patchwire.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def save(values: Any) -> Any:
    """Save every value in a list, tuple or mapping of them: `patchwire.save(value.topk(3))`.

    Returns:
        The same containers; after the block, the values in them behave as their tensors.
    """
    # Not looked up as the others are: where nnsight is imported, every object has a `save`, modules too.
    from patchwire.proxy import save_all

    return save_all(values)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "TLS",
    "AuthenticationError",
    "Batches",
    "BranchError",
    "BusyError",
    "CancelledError",
    "Client",
    "Comparison",
    "ConnectionFailedError",
    "ConnectionLostError",
    "ExecutionError",
    "Generation",
    "GraphError",
    "InputError",
    "Job",
    "JobError",
    "JobStatus",
    "Kept",
    "LimitError",
    "Loop",
    "MissingTensorsError",
    "Model",
    "ModelNotFoundError",
    "Module",
    "OperationError",
    "OrderError",
    "PatchwireError",
    "PatchwireWarning",
    "Plan",
    "Scan",
    "Session",
    "ShapeError",
    "SiteError",
    "Stats",
    "StoreError",
    "Structure",
    "TimeoutError",
    "Trace",
    "Value",
    "Verification",
    "VersionError",
    "__version__",
    "activations",
    "compare",
    "cond",
    "connect",
    "grad",
    "knockout",
    "local",
    "methods",
    "optim",
    "random",
    "save",
    "verify",
]
