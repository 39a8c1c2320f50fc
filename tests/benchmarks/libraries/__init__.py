"""The libraries that are measured, one file each; every file is run in its library's own environment.

Another one is a file here with a `Library` (see `tasks.py`), a list of pinned versions of the same name in
`environments/`, and its name in `LIBRARIES` of `run.py` and of `docs/figures.py`.
"""
