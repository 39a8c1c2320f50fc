"""One library in a process of its own, told what to do a line at a time: `python contender.py LIBRARY`.

Each line of the standard input is a JSON object, and so is the answer to it on the standard output:

- `{"do": "load", "root": …, "model": …}` loads a checkpoint of that directory instead of the one before; the answer has
  the library's `tasks`, and the `versions` of its packages;
- `{"do": "plan", "task": …}` asks a library that plans for the `flops` that it says a task takes;
- `{"do": "run", "task": …, "times": …}` does a task so many times; the answer has the `seconds` of each. With
  `"numbers": FILE`, what the task gave is written there, to be compared.

What goes wrong is answered with `{"error": …}`. Whatever a library prints goes to the standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tasks import TASKS, Library, Planning, make_inputs


class Contender:
    """Does what it is told."""

    def __init__(self, library: str) -> None:
        self._library: type[Library] = importlib.import_module(f"libraries.{library}").Library
        self._loaded: Library | None = None

    def load(self, root: str, model: str) -> Mapping[str, Any]:
        self.close()
        loaded = self._library(Path(root) / model, make_inputs(Path(root)))
        self._loaded = loaded
        return {
            "tasks": [name for name in loaded.tasks() if name in TASKS and TASKS[name].model == model],
            "versions": {name: metadata.version(name) for name in loaded.packages},
            "threads": torch.get_num_threads(),
        }

    def plan(self, task: str) -> Mapping[str, Any]:
        assert isinstance(self._loaded, Planning), "it does not plan"
        return {"flops": self._loaded.planned(task)}

    def run(self, task: str, times: int = 1, numbers: str = "") -> Mapping[str, Any]:
        assert self._loaded is not None, "load first"
        work = self._loaded.tasks()[task]
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            result = work()
            seconds.append(time.perf_counter() - start)
        if numbers:
            values = result if isinstance(result, list) else [result]
            save_file({str(n): each.detach().contiguous() for n, each in enumerate(values)}, numbers)
        return {"seconds": seconds}

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = Contender(sys.argv[1])
    try:
        for line in sys.stdin:
            told = json.loads(line)
            try:
                answer = getattr(contender, {"load": "load", "plan": "plan", "run": "run"}[told.pop("do")])(**told)
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        contender.close()


if __name__ == "__main__":
    main()
