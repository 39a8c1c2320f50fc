"""The benchmark tables of the README."""

from __future__ import annotations

import figures

RUN = {
    "run": {
        "date": "2026-01-02",
        "device": "cpu",
        "cores": 2,
        "threads": 2,
        "dtype": "float32",
        "versions": {
            "raw": {"torch": "2", "transformers": "5"},
            "patchwire": {"patchwire": "1.0"},
            "nnsight": {"nnsight": "0.8"},
            "transformer_lens": {"transformer-lens": "4"},
            "pyvene": {"pyvene": "0.1"},
        },
    }
}


def line(task: str, library: str, seconds: float, **others: object) -> figures.Line:
    return {"task": task, "says": f"the {task}", "library": library, "seconds": seconds, "to_raw": seconds, **others}


def test_are_up_to_date():
    assert figures.PAGE.read_text() == figures.page(), "run `python docs/figures.py`"


def test_show_times_beside_plain_hooks_and_leave_a_cell_empty_where_nothing_was_measured():
    shown = figures.tables([[RUN, line("sweep", "raw", 1.0), line("sweep", "patchwire", 0.5)]])

    assert "| the sweep | 1 s | 0.50× (500 ms) |  |  |  |  |" in shown


def test_say_which_share_of_the_time_the_arithmetic_needs():
    shown = line("sweep", "patchwire", 0.5, gflop=120, gflops=300.0, bound_seconds=0.4, share_of_bound=0.8)

    assert "computes 120 GFLOP, which take 400 ms at 300 GFLOP/s" in figures.tables([[RUN, shown]])


def test_say_how_many_times_as_many_requests_are_answered_together():
    lines = [line("users", "patchwire", 0.5, requests=32), line("users_one_by_one", "patchwire", 1.0, requests=32)]

    assert "64 requests/s, 2.00 times as many" in figures.tables([[RUN, *lines]])
