"""Every benchmark: Patchwire and the libraries that its users know, the same tasks in the same run.

Each library has a process (`contender.py`) in an environment of its own, which `make bench` has made. Machines differ
and are busy in different ways, so nothing is compared across runs: the libraries take turns, A B A B, only one works at
a time, and all have the same weights, inputs, numerics and threads. What a library computes is compared with plain
hooks first. Then the scripts `bench_*.py` run, for what is measured inside one process.

Each result is printed as a line of JSON, and all of them are written to `results/`. From the environment:

- `ROUNDS`: how often every library has its turn (5);
- `TASKS`: only these, as `read,sweep,one_read`: names of `tasks.TASKS` or of scripts without `bench_`;
- `LIBRARIES`: only these, beside `raw`;
- `OMP_NUM_THREADS`: threads of each library; as many as there are cores if not given;
- `OMP_WAIT_POLICY`: `passive` where others use the machine too: threads that spin while they wait for one that is not
  running make everything many times slower, and some libraries more than others;
- `CHECKPOINTS`: a directory with other checkpoints of the same names, for trying things out.

A run with fewer tasks, libraries or rounds is written to a file that git ignores. `python docs/figures.py` makes the
README's tables from the others.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import torch
from safetensors.torch import load_file
from tasks import MATMUL, MATMUL_REPEATS, MATMUL_ROWS, PLANNING, RAW, SMOLLM2, TASKS, Task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results"
LIBRARIES = (RAW, *PLANNING, "nnsight", "transformer_lens", "pyvene")
ROUNDS = 5
TURN_SECONDS, TURN_TIMES = 0.5, 10
"""A turn does a quick task several times: about so long, and at most so often."""
WARM_UP, WARM_SECONDS = 2, 2.0
"""A task is done so many times more before it is timed, unless it took so long when its numbers were checked."""

Line = dict[str, Any]


class Process:
    """A library's process."""

    def __init__(self, library: str, threads: int) -> None:
        self.library = library
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        python = sys.executable
        if library not in (RAW, *PLANNING):
            python = str(ROOT / ".venv-bench" / library / "bin" / "python")
            environment.pop("PYTHONPATH", None)
            if not Path(python).exists():
                raise SystemExit(f"{library} has no environment yet: run `make bench`.")
        command = [python, str(HERE / "contender.py"), library]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def tell(self, do: str, **told: Any) -> Line:
        """Have it do something, and wait for the answer.

        Raises:
            RuntimeError: it failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"do": do, **told}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer: Line = json.loads(line) if line else {"error": "its process has ended"}
        if "error" in answer:
            raise RuntimeError(f"{self.library}: {do} {told}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Run:
    """One run of the benchmarks."""

    def __init__(self, tasks: Sequence[str], libraries: Sequence[str], rounds: int, threads: int, root: Path) -> None:
        """
        Args:
            tasks: Names of `TASKS`.
            libraries: Names of `LIBRARIES`; `raw` is one of them.
            rounds: How often each has its turn.
            threads: How many threads each may use.
            root: The directory of the checkpoints.
        """
        self._tasks = tasks
        self._libraries = libraries
        self._rounds = rounds
        self._threads = threads
        self._root = root
        self.versions: dict[str, dict[str, str]] = {}

    def lines(self) -> Iterable[Line]:
        """The results, as they come."""
        processes = [Process(library, self._threads) for library in self._libraries]
        try:
            for model in dict.fromkeys(TASKS[name].model for name in self._tasks):
                able: dict[str, list[Process]] = {name: [] for name in self._tasks if TASKS[name].model == model}
                for process in processes:
                    answer = process.tell("load", root=str(self._root), model=model)
                    if answer["threads"] != self._threads:
                        raise RuntimeError(f"{process.library} has {answer['threads']} threads, not {self._threads}")
                    self.versions[process.library] = answer["versions"]
                    for name in able.keys() & answer["tasks"]:
                        able[name].append(process)
                for name in able:
                    beside = [each for each in able if TASKS[each].beside == name]
                    if TASKS[name].beside not in able:
                        yield from self._of_tasks({each: able[each] for each in (name, *beside)})
        finally:
            for process in processes:
                process.close()

    def _of_tasks(self, tasks: Mapping[str, Sequence[Process]]) -> Iterable[Line]:
        """The lines of tasks that have their turns in the same rounds."""
        differences: dict[str, dict[str, float]] = {}
        seconds: dict[str, dict[str, list[float]]] = {}
        times: dict[tuple[str, str], int] = {}
        products: list[float] = []
        for name, processes in tasks.items():
            differences[name], first = self._checked(name, processes)
            seconds[name] = {library: [first[library]] if TASKS[name].slow else [] for library in first}
            for each in processes:
                times[name, each.library] = self._times(name, each, first[each.library])
        for _ in range(0 if any(TASKS[name].slow for name in tasks) else self._rounds):
            for name, processes in tasks.items():
                for each in processes:
                    turn = each.tell("run", task=name, times=times[name, each.library])
                    seconds[name][each.library] += turn["seconds"]
                if TASKS[name].sweep:
                    products += processes[0].tell("run", task=MATMUL, times=WARM_UP)["seconds"]
        for name, processes in tasks.items():
            yield from self._lines(name, processes, differences[name], seconds[name], products)

    def _lines(
        self,
        name: str,
        processes: Sequence[Process],
        differences: Mapping[str, float],
        seconds: Mapping[str, Sequence[float]],
        products: Sequence[float],
    ) -> Iterable[Line]:
        task = TASKS[name]
        medians = {library: statistics.median(each) for library, each in seconds.items()}
        for library, median in medians.items():
            line: Line = {
                "task": name,
                "says": task.says,
                "library": library,
                "seconds": median,
                "runs": len(seconds[library]),
                "to_raw": round(median / medians[RAW], 3),
                "difference": differences[library],
            }
            if task.requests:
                line["requests"] = task.requests
            if products and library in PLANNING:
                planned = next(each for each in processes if each.library == library).tell("plan", task=name)
                line |= self._bound(planned["flops"], median, statistics.median(products))
            yield line

    def _bound(self, flops: float, seconds: float, products: float) -> Line:
        """How long so many operations take at least, and what share that is of how long they took.

        Args:
            flops: The operations.
            seconds: How long they took.
            products: How long the matrix products of `MATMUL` took.
        """
        config = json.loads((self._root / SMOLLM2 / "config.json").read_text())
        weights = 3 * config["hidden_size"] * config["intermediate_size"]
        rate = 2.0 * weights * MATMUL_ROWS * MATMUL_REPEATS / products
        line = {"gflop": round(flops / 1e9), "gflops": round(rate / 1e9, 1), "bound_seconds": flops / rate}
        return line | {"share_of_bound": round(flops / rate / seconds, 3)}

    def _times(self, name: str, process: Process, first: float) -> int:
        """How often a turn does a task, of which the first time took so long; warms up, if that was not long enough."""
        if first > WARM_SECONDS:
            return 1
        warm = process.tell("run", task=name, times=WARM_UP)["seconds"]
        return max(1, min(TURN_TIMES, int(TURN_SECONDS / min(warm))))

    def _checked(self, name: str, processes: Sequence[Process]) -> tuple[dict[str, float], dict[str, float]]:
        """By how much each one's numbers differ from those of plain hooks, and how long they took.

        Raises:
            RuntimeError: by too much.
        """
        expected: dict[str, torch.Tensor] = {}
        differences: dict[str, float] = {}
        first: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as directory:
            for process in processes:
                file = f"{directory}/{process.library}"
                (first[process.library],) = process.tell("run", task=name, numbers=file)["seconds"]
                numbers = load_file(file)
                expected = expected or numbers  # plain hooks are the first
                who = f"{process.library}: {name}"
                differences[process.library] = _difference(who, TASKS[name], numbers, expected)
        return differences, first


def _difference(
    who: str, task: Task, numbers: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> float:
    shapes = [{key: tuple(each.shape) for key, each in one.items()} for one in (numbers, expected)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"{who} gives {shapes[0]}, and plain hooks give {shapes[1]}")
    difference = max(float((numbers[key].double() - expected[key].double()).abs().max()) for key in expected)
    largest = max(float(each.abs().max()) for each in expected.values()) if task.relative else 1.0
    if not difference <= task.tolerance * largest:
        raise RuntimeError(f"{who} differs from plain hooks by {difference}")
    return difference


def scripts(names: Sequence[str], threads: int) -> Iterable[Line]:
    """The lines that scripts print."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for name in names:
        command = [sys.executable, str(HERE / f"bench_{name}.py")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        for line in done.stdout.splitlines():
            yield {"script": name, **json.loads(line)}


def chosen(variable: str, all_of_them: Sequence[str]) -> list[str]:
    """Those that an environment variable names; all if it names none.

    Raises:
        SystemExit: it names one that is not there.
    """
    names = [each for each in os.environ.get(variable, "").split(",") if each]
    if unknown := [each for each in names if each not in all_of_them]:
        raise SystemExit(f"{variable} names {', '.join(unknown)}; there are {', '.join(all_of_them)}.")
    return [each for each in all_of_them if not names or each in names]


def main() -> None:
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    rounds = int(os.environ.get("ROUNDS") or ROUNDS)
    own = sorted(each.stem.removeprefix("bench_") for each in HERE.glob("bench_*.py"))
    names = chosen("TASKS", [*TASKS, *own])
    libraries = chosen("LIBRARIES", LIBRARIES)
    libraries = libraries if RAW in libraries else [RAW, *libraries]
    root = checkpoints.directory()

    lines: list[Line] = []

    def report(each: Iterable[Line]) -> None:
        for line in each:
            lines.append(line)
            print(json.dumps(line), flush=True)

    run = Run([each for each in names if each in TASKS], libraries, rounds, threads, root)
    report(run.lines())
    report(scripts([each for each in names if each in own], threads))
    other = "CHECKPOINTS" in os.environ
    whole = not other and len(names) == len(TASKS) + len(own) and len(libraries) == len(LIBRARIES) and rounds >= ROUNDS
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": "cpu",
        "cores": os.cpu_count(),
        "threads": threads,
        "rounds": rounds,
        "python": platform.python_version(),
        "dtype": "float32",
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "versions": run.versions,
    }
    file = RESULTS / f"cpu-{os.cpu_count()}-cores{'' if whole else '.local'}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(each) + "\n" for each in [{"run": about}, *lines]))
    print(f"Written to {file.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
