"""Timing for the benchmarks: alternating runs, medians, ratios within one run, one JSON line each.

Machines differ and are busy in different ways, so nothing is compared across runs: what is compared runs in turn,
A B A B.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch


def alternate(cases: dict[str, Callable[[], object]], *, rounds: int, warm_up: int = 20) -> dict[str, float]:
    """The median seconds of each case, all cases run in turn."""
    for _ in range(warm_up):
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def report(benchmark: str, **figures: object) -> None:
    """Print one benchmark's result as a line of JSON."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": benchmark, **figures, **machine}), flush=True)
