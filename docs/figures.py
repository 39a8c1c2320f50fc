"""The README's benchmark tables, read from the result files.

`make bench` writes the files, and `python docs/figures.py` the tables between their marks. The test suite checks that
they are up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
PAGE = _ROOT / "README.md"
RESULTS = _ROOT / "tests" / "benchmarks" / "results"
_BEGIN, _END = "<!-- Written by docs/figures.py. -->", "<!-- Until here. -->"

Line = Mapping[str, Any]

LIBRARIES = {
    "raw": "plain hooks",
    "patchwire": "Patchwire",
    "patchwire_pytorch": "Patchwire, `--matmul pytorch`",
    "nnsight": "nnsight",
    "transformer_lens": "TransformerLens",
    "pyvene": "pyvene",
}
"""The columns, and what is above them."""
_OWN = {"patchwire": "", "patchwire_pytorch": " with `--matmul pytorch`"}
"""What a sentence says of ours, and adds."""
_PACKAGES = {"patchwire": "patchwire", "nnsight": "nnsight", "transformer_lens": "transformer-lens", "pyvene": "pyvene"}


def tables(runs: Iterable[Sequence[Line]]) -> str:
    """What the README shows of some runs, each given as the lines of its file."""
    return "\n\n".join(_of_run(lines) for lines in runs) or "No run has been recorded yet."


def _of_run(lines: Sequence[Line]) -> str:
    about, *results = lines
    tasks: dict[str, dict[str, Line]] = {}
    for line in results:
        if "task" in line:
            tasks.setdefault(line["task"], {})[line["library"]] = line
    rows = [_row(by_library) for by_library in tasks.values()]
    header = ["", *LIBRARIES.values()]
    table = ["| " + " | ".join(each) + " |" for each in (header, ["---"] * len(header), *rows)]
    notes = [*_shares(tasks), *_users(tasks), *_scripts(results)]
    return "\n".join([_title(about["run"]), "", *table, "", *(f"- {each}" for each in notes)]).rstrip()


def _title(run: Line) -> str:
    versions = [f"{LIBRARIES[each]} {run['versions'][each][name]}" for each, name in _PACKAGES.items()]
    torch = f"PyTorch {run['versions']['raw']['torch']}, transformers {run['versions']['raw']['transformers']}"
    where = f"{run['device'].upper()}, {run['cores']} cores, {run['threads']} threads, {run['dtype']}"
    return f"**{where}**, {run['date']}: {', '.join(versions)}; {torch}"


def _row(by_library: Mapping[str, Line]) -> list[str]:
    says = next(iter(by_library.values()))["says"]
    return [says, *(_cell(by_library[each]) if each in by_library else "" for each in LIBRARIES)]


def _cell(line: Line) -> str:
    took = _time(line["seconds"])
    return took if line["library"] == "raw" else f"{line['to_raw']:.2f}× ({took})"


def _time(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _shares(tasks: Mapping[str, Mapping[str, Line]]) -> Iterable[str]:
    for by_library in tasks.values():
        lines = [line for each, line in by_library.items() if each in _OWN and "share_of_bound" in line]
        for line in lines[:1]:
            shares = " and ".join(
                f"{each['share_of_bound']:.0%} of what Patchwire takes{_OWN[each['library']]}" for each in lines
            )
            yield (
                f"“{line['says']}”: its plan computes {line['gflop']:.0f} GFLOP, which take "
                f"{_time(line['bound_seconds'])} at {line['gflops']:.0f} GFLOP/s, the rate of PyTorch's large matrix "
                f"products in this run: {shares}."
            )


def _users(tasks: Mapping[str, Mapping[str, Line]]) -> Iterable[str]:
    """Both had their turns in the same rounds."""
    for library, how in _OWN.items():
        together, apart = (tasks.get(task, {}).get(library) for task in ("users", "users_one_by_one"))
        if together and apart:
            yield (
                f"“{together['says']}”: {together['requests'] / together['seconds']:.0f} requests/s{how}, "
                f"{apart['seconds'] / together['seconds']:.2f} times as many as one after the other on the same worker."
            )


def _scripts(results: Iterable[Line]) -> Iterable[str]:
    """What the scripts say, but for what is said of the whole run."""
    for line in results:
        if "script" in line:
            yield _SENTENCES[line["benchmark"]].format_map(line)


_SENTENCES = {
    "around": "A session of 300 traces ({nodes:,} nodes) costs {around_ms:.0f} ms around its passes, {ratio:.0%} of "
    "the {running_ms:.0f} ms that these take: {recording_ms:.0f} ms to record, {encoding_ms:.0f} to encode, "
    "{checking_ms:.0f} to check and {planning_ms:.0f} to plan it.",
    "causal_trace": "`methods.causal_trace`: {cells} cells in {seconds} s, and in {hooks_seconds} s with plain hooks "
    "and one forward pass for each cell: {times_faster} times as fast, largest difference {difference:.0e}.",
    "causal_trace_noise": "The same with ten rows of noise: {cells} cells in {seconds} s, and in {hooks_seconds} s "
    "with one forward pass of ten rows for each: {times_faster} times as fast, largest difference {difference:.0e}.",
    "one_read_worker": "One read of GPT-2 inside the worker, without the wire and with the same products: {ratio:.2f} "
    "times plain hooks.",
    "wire": "A large result arrives at {ratio_into:.0%} of what plain TCP moves here, into memory that the program "
    "gives; at {ratio_one:.0%} as one new tensor, and at {ratio_parts:.0%} as many. gRPC alone, from Python: "
    "{ratio_grpc:.0%}.",
    "stream": "While {gib:.0f} GiB of activations are computed and streamed, the worker's memory grows by "
    "{worker_more_mib} MiB and the client's by {client_more_mib} MiB.",
}
"""What each script has found, by its name."""


def recorded() -> list[list[Line]]:
    """The runs of the result files; those that git ignores are not meant."""
    files = sorted(each for each in RESULTS.glob("*.json") if not each.name.endswith(".local.json"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def page() -> str:
    """The README, with tables of today."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{tables(recorded())}\n\n{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
