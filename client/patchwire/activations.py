"""Activations of a data set: streamed batch by batch, and kept in a store of safetensors files.

    for indices, values in model.activations(texts, ["layers.5.output"], path="acts"):
        values["layers.5.output"][0]        # of prompt indices[0]: [seq, width], no padding

    store = patchwire.activations.open("acts")
    store["layers.5.output"][17]            # of prompt 17, read from the disk now

While the program works with one batch, the next one runs, and no more: two batches exist at most, here and there.

A store is a directory: shards, each of some consecutive prompts, and an index that says which there are. Both are
written under another name and then renamed, a shard before the index that names it, so that whatever is found there is
whole. Who goes on with a store is asked to give what it was begun with: model, sites and prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchwire import graph as g
from patchwire import selecting, tensors
from patchwire.background import Cancellation
from patchwire.errors import GraphError, InputError, PatchwireWarning, SiteError, StoreError, here
from patchwire.proxy import Value
from patchwire.results import Progress, Results
from patchwire.scanning import Scan
from patchwire.session import current_session
from patchwire.sites import Address, Axis
from patchwire.tracing import Trace

if TYPE_CHECKING:
    from patchwire.model import Model

Read = Callable[[Any], Mapping[str, Value]]
"""A function of the model that reads sites inside a block, and returns values by names of its choice."""
Ids = list[int]

SHARD_BYTES = 256 << 20
"""From how many bytes on a shard is written."""

_FORMAT = "patchwire.activations/1"
_INDEX = "index.json"
_OPEN_SHARDS = 8


class Batch(NamedTuple):
    """What one request brought."""

    indices: range
    """The positions of its prompts in the data set."""
    values: dict[str, list[Tensor]]
    """By site, the tensor of each prompt, without padding and without a dimension for rows."""


def stream(
    model: Model,
    dataset: Iterable[Any],
    sites: Sequence[str] | Read,
    *,
    batch_size: int = 16,
    path: str | Path | None = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[Batch]:
    """What `model.activations` does; see there."""
    if current_session() is not None:
        raise GraphError("Activations are streamed by requests of their own.", hint="Do it outside.", lines=here())
    if isinstance(dataset, str):
        raise InputError("A text is not a data set.", hint="Give a list of texts: `[text]`.", lines=here())
    if isinstance(dataset, Mapping):  # a tokenizer's batch would go through its names
        raise InputError(
            f"A {type(dataset).__name__} is not a data set.",
            hint="Give a list of texts, or of lists of token ids without padding.",
            lines=here(),
        )
    if batch_size < 1 or start < 0:
        raise InputError(
            f"There are no batches of {batch_size} prompts from prompt {start} on.",
            hint="`batch_size` is 1 or more, `start` 0 or more.",
            lines=here(),
        )
    read = _reader(model, sites, dtype)
    prompts = _prompts(model, iter(dataset), batch_size, start)
    first = next(prompts, None)
    if first is None:
        raise InputError(
            f"The data set has no prompt {start}.", hint="Give it some prompts, or another `start`.", lines=here()
        )
    ids = _chained(first, prompts)
    writer = None
    if path is not None:
        begun = _Index(model.name, model.fingerprint, _recipe(model, read, first), start=start, stop=start)
        writer = _Writer(Path(path), begun, ids, shard_bytes)
    position = start if writer is None else writer.index.stop
    if writer is not None:
        more = next(ids, None)
        if more is not None:
            ids = _chained(more, ids)
        else:
            told = (
                f"{path} has all of these prompts already, so nothing runs: read it with "
                f'`patchwire.activations.open("{path}")`, or give another path.'
            )
            warnings.warn(PatchwireWarning(told), stacklevel=3)
    total = len(dataset) if isinstance(dataset, Sized) else None
    return _batches(model, ids, read, batch_size, writer, position, total)


# --- asking -----------------------------------------------------------------------------------------------------------


def _reader(model: Model, sites: Sequence[str] | Read, dtype: torch.dtype | None) -> Read:
    """What saves the sites in a block, for the rows of one prompt."""
    if callable(sites):
        ask: Read = sites
    elif not sites:
        raise InputError("No site was named.", hint='Name some: `["layers.5.output"]`.', lines=here())
    else:
        try:
            selected = selecting.of_addresses(model.catalogue, [sites] if isinstance(sites, str) else sites)
        except SiteError as error:
            raise SiteError(error.message, hint=error.hint, lines=here()) from None
        has_rows = {name: _has_rows(model, each) for name, each in selected.items()}

        def ask(model: Model) -> Mapping[str, Value]:
            values = {name: model._selected(each) for name, each in selected.items()}
            return {name: value[0] if has_rows[name] else value for name, value in values.items()}  # type: ignore[index]

    def read(model: Model) -> dict[str, Value]:
        values = ask(model)
        if (
            not isinstance(values, Mapping)
            or not values
            or not all(isinstance(each, Value) for each in values.values())
        ):
            raise GraphError(
                "The function of the sites has to return values by name.",
                hint='Write `lambda model: {"resid": model.layers[5].output[0]}`.',
                lines=here(),
            )
        return {str(name): value.save(dtype=dtype) for name, value in values.items()}

    return read


def _has_rows(model: Model, selected: selecting.Selected) -> bool:
    if isinstance(selected, Address):
        shape = model.catalogue.leaf(selected).shape
        return bool(shape) and shape[0].axis is Axis.BATCH
    return selected.dims.startswith("batch ")


def _prompts(model: Model, items: Iterator[Any], size: int, start: int) -> Iterator[Ids]:
    """The token ids of each prompt from one on, tokenized some at a time."""
    index = sum(1 for _ in islice(items, start))
    while some := list(islice(items, size)):
        if all(isinstance(each, str) for each in some):
            some = model.tokenizer.batch(some)
        for item in some:
            try:
                rows = model.tokenize(item)
            except InputError as error:
                raise InputError(
                    f"Item {index} of the data set: {error.message}", hint=error.hint, lines=here()
                ) from None
            if len(rows) != 1:
                raise InputError(
                    f"Item {index} of the data set is {len(rows)} prompts.", hint="An item is one prompt.", lines=here()
                )
            yield rows[0]
            index += 1


def _chained(first: Ids, rest: Iterator[Ids]) -> Iterator[Ids]:
    yield first
    yield from rest


class _Pending(Trace):
    """A trace whose run goes on while the program does something else."""

    def __init__(self, model: Model, ids: list[Ids], read: Read, pool: ThreadPoolExecutor) -> None:
        super().__init__(model)
        self._pool = pool
        self.ids = ids
        self._values: list[Mapping[str, Value]] = []
        with self:
            for each in ids:
                with self.invoke(each):
                    self._values.append(read(model))

    def _run(self, graph: g.Graph, cancellation: Cancellation) -> None:
        self._future: Future[Results] = self._pool.submit(
            self._model.connection.run, graph, Progress(False), cancellation
        )

    def result(self) -> dict[str, list[Tensor]]:
        """By site, the tensor of each prompt."""
        self._settle(self._future.result())
        names = self._values[0].keys()
        if any(each.keys() != names for each in self._values):
            raise GraphError(
                "The function of the sites returned other names for other prompts.",
                hint="Return values by the same names for every prompt.",
                lines=here(),
            )
        return {name: [each[name].value for each in self._values] for name in names}


def _batches(
    model: Model,
    ids: Iterator[Ids],
    read: Read,
    size: int,
    writer: _Writer | None,
    position: int,
    total: int | None,
) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="activations")
    bar = RichProgress(
        TextColumn("activations"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not model.progress,
    )

    def ask() -> _Pending | Exception | None:
        """The next request, on its way; what is wrong with it is said when its turn has come."""
        try:
            some = list(islice(ids, size))
            return _Pending(model, some, read, pool) if some else None
        except Exception as error:
            return error

    task = bar.add_task("activations", total=total, completed=position)
    try:
        bar.start()
        pending = ask()
        while pending is not None:
            if isinstance(pending, Exception):
                raise pending
            batch = Batch(range(position, position + len(pending.ids)), pending.result())
            position = batch.indices.stop
            if writer is not None:
                writer.add(pending.ids, batch)
            pending = ask()
            bar.update(task, completed=position)
            yield batch
            del batch  # before the next one comes
    finally:
        # Whoever leaves early does not wait for the request that is on its way.
        pool.shutdown(wait=False, cancel_futures=True)
        bar.stop()
        if writer is not None:
            writer.flush()


def _recipe(model: Model, read: Read, ids: Ids) -> str:
    """A digest of what the sites ask for: the graph that they make of a prompt, whatever the lines are."""
    with Scan(model) as scan, scan.invoke(ids):
        names = list(read(model))
    assert scan.graph is not None
    message = g.graph_to_proto(g.Graph([], scan.graph.fx, []))
    digest = hashlib.sha256(json.dumps(names).encode())
    for node in message.nodes:
        node.line = 0
        digest.update(node.SerializeToString(deterministic=True))
    for constant in scan.graph.constants:
        match constant:
            case bytes():
                digest.update(constant)
            case g.KeptTensor():
                digest.update(constant.handle)
            case _:
                digest.update(tensors.digest(constant))
    return digest.hexdigest()


# --- stores -----------------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """Consecutive prompts in one file: `values/SITE`, all of them flat, and `shapes/SITE`, `[prompts, dimensions]`."""

    start: int
    stop: int
    bytes: int


@dataclass
class _Index:
    """What a store holds, and what it was begun with."""

    model: str
    fingerprint: str
    recipe: str
    """What the sites ask for."""
    start: int
    """The first prompt's position in the data set."""
    stop: int
    """How far it got."""
    prompts: str = ""
    """The digest of all prompts until there."""
    sites: dict[str, str] = field(default_factory=dict)
    """The dtype of each site's tensors: "float32"."""
    shards: list[_Shard] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it."""

        def write(file: Path) -> None:
            file.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1))

        _put(path / _INDEX, write)

    @classmethod
    def load(cls, path: Path) -> _Index:
        """Read it, and see whether the shards are there.

        Raises:
            StoreError: there is no store, or a damaged one.
        """
        try:
            found = json.loads((path / _INDEX).read_text())
            if found.pop("format") != _FORMAT:
                raise StoreError(f"{path} is a store of another version.", hint="Write a new one.", lines=here())
            index = cls(**{**found, "shards": [_Shard(**each) for each in found["shards"]]})
            ends = [index.start, *(each.stop for each in index.shards)]
            whole = [each.start for each in index.shards] == ends[:-1] and index.stop == ends[-1]
        except FileNotFoundError:
            hint = "`model.activations(…, path=…)` writes one."
            raise StoreError(f"There is no store of activations at {path}.", hint=hint, lines=here()) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _damaged(path, f"its {_INDEX} cannot be read") from None
        if not whole:
            raise _damaged(path, "its shards do not follow each other")
        for number, shard in enumerate(index.shards):
            file = _shard_file(path, number)
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise _damaged(path, f"{file.name} is missing or has another size")
        return index


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"The store at {path} is damaged: {why}.", hint="Delete it, and write a new one.", lines=here())


def _shard_file(path: Path, number: int) -> Path:
    return path / f"shard-{number:05}.safetensors"


def _put(file: Path, write: Callable[[Path], None]) -> None:
    """Write a file that is there as a whole or not at all, even after a crash."""
    partial = file.with_name(f"{file.name}.partial")
    write(partial)
    _sync(partial, os.O_RDWR)
    os.replace(partial, file)
    if os.name == "posix":  # elsewhere a directory cannot be opened
        _sync(file.parent, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Writer:
    """Adds to a store."""

    def __init__(self, path: Path, begun: _Index, ids: Iterator[Ids], shard_bytes: int) -> None:
        """
        Args:
            path: The directory; made if there is none.
            begun: What the store is begun with, or was.
            ids: The prompts from its start on; those that it has are taken from them.
            shard_bytes: From how many bytes on a shard is written.

        Raises:
            StoreError: there is a store of something else, or something else.
        """
        self.path = path
        self._shard_bytes = shard_bytes
        self._waiting: list[Batch] = []
        self._bytes = 0
        self._digest = hashlib.sha256()
        begun.prompts = self._digest.hexdigest()
        if not (path / _INDEX).exists():
            if path.exists() and (not path.is_dir() or _foreign(path)):
                raise StoreError(
                    f"{path} is not a store of activations, and not empty.", hint="Give another path.", lines=here()
                )
            path.mkdir(parents=True, exist_ok=True)
            begun.save(path)
        self.index = _Index.load(path)
        for what, found, given in (
            ("model", self.index.model, begun.model),
            ("model's module tree", self.index.fingerprint, begun.fingerprint),
            ("`start`", self.index.start, begun.start),
        ):
            if found != given:
                raise self._other(f"its {what} is {found}, not {given}")
        self._skip(ids)
        if not self.index.shards:
            self.index = begun  # it holds nothing yet
        elif self.index.recipe != begun.recipe:
            raise self._other(
                f"it was begun with other sites ({', '.join(self.index.sites)}), another dtype or another function"
            )

    def _other(self, why: str) -> StoreError:
        return StoreError(
            f"The store at {self.path} is of something else: {why}.",
            hint="Give another path, or go on with what it was begun with.",
            lines=here(),
        )

    def _skip(self, ids: Iterator[Ids]) -> None:
        """Take the prompts that the store has."""
        wanted = self.index.stop - self.index.start
        for each in islice(ids, wanted):
            self._add_to_digest(each)
        if self._digest.hexdigest() != self.index.prompts:
            raise self._other(f"its {wanted} prompts are not the first of this data set")

    def _add_to_digest(self, ids: Ids) -> None:
        self._digest.update(len(ids).to_bytes(8, "little"))
        self._digest.update(torch.tensor(ids, dtype=torch.int64).numpy().tobytes())

    def add(self, ids: list[Ids], batch: Batch) -> None:
        """Take a batch; it is written when there is enough for a shard."""
        if self.index.sites and batch.values.keys() != self.index.sites.keys():
            raise self._other(f"its sites are {', '.join(self.index.sites)}, not {', '.join(batch.values)}")
        for name, values in batch.values.items():
            kept = self.index.sites.setdefault(name, str(values[0].dtype).removeprefix("torch."))
            if any(str(each.dtype) != f"torch.{kept}" or each.is_complex() for each in values):
                raise StoreError(
                    f"A store holds one real dtype of each site; `{name}` is {kept} and {values[0].dtype}.",
                    hint="Convert it in the function of the sites.",
                    lines=here(),
                )
            if len({each.ndim for each in values}) > 1:
                raise StoreError(
                    f"The tensors of `{name}` differ in their number of dimensions.",
                    hint="Return values with the same number of dimensions for every prompt.",
                    lines=here(),
                )
        self._waiting.append(batch)
        for each in ids:
            self._add_to_digest(each)
        self._bytes += sum(each.nbytes for values in batch.values.values() for each in values)
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard, and then the index that names it."""
        if not self._waiting:
            return
        content: dict[str, Tensor] = {}
        for name in self.index.sites:
            values = [each for batch in self._waiting for each in batch.values[name]]
            content[f"values/{name}"] = torch.cat([each.reshape(-1) for each in values])
            shapes = torch.tensor([list(each.shape) for each in values], dtype=torch.int64)
            content[f"shapes/{name}"] = shapes.reshape(len(values), values[0].ndim)
        file = _shard_file(self.path, len(self.index.shards))
        _put(file, lambda partial: save_file(content, partial))
        start, stop = self._waiting[0].indices.start, self._waiting[-1].indices.stop
        self.index.shards.append(_Shard(start, stop, file.stat().st_size))
        self.index.stop, self.index.prompts = stop, self._digest.hexdigest()
        self.index.save(self.path)
        self._waiting, self._bytes = [], 0


def _foreign(path: Path) -> bool:
    """Whether there is anything that a store did not begin with."""
    return any(each.name != f"{_INDEX}.partial" for each in path.iterdir())


def open(path: str | Path) -> Store:
    """A store, for reading; tensors are read from the disk when they are asked for.

    Raises:
        StoreError: there is no store, or a damaged one.
    """
    return Store(Path(path))


class Store(Mapping[str, "Column"]):
    """The activations in a store, by site.

    Attributes:
        path: Where it is.
        model: The name of the model.
        fingerprint: That of the model's module tree.
        indices: The positions of its prompts in the data set.
    """

    def __init__(self, path: Path) -> None:
        self._index = _Index.load(path)
        self.path = path
        self.model = self._index.model
        self.fingerprint = self._index.fingerprint
        self.indices = range(self._index.start, self._index.stop)
        self._shard = lru_cache(_OPEN_SHARDS)(self._opened)

    def __getitem__(self, site: str) -> Column:
        if site not in self._index.sites:
            raise KeyError(f"{site!r} is not in the store; it has {', '.join(map(repr, self._index.sites))}")
        return Column(self, site, getattr(torch, self._index.sites[site]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.sites)

    def __len__(self) -> int:
        return len(self._index.sites)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} {dtype}" for site, dtype in self._index.sites.items())
        return f"<store of {self.model}: {len(self.indices)} prompts from {self.indices.start} on, {sites}>"

    def _opened(self, number: int) -> tuple[Any, dict[str, tuple[Tensor, list[int]]]]:
        """A shard's file, and of each site the shape of every prompt's tensor and where each begins."""
        try:
            file = safe_open(_shard_file(self.path, number), framework="pt")
            places = {}
            for site in self._index.sites:
                shapes: Tensor = file.get_tensor(f"shapes/{site}")  # type: ignore[no-untyped-call]
                places[site] = (shapes, list(accumulate(shapes.prod(1).tolist(), initial=0)))
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, f"{_shard_file(self.path, number).name} cannot be read ({error})") from None
        return file, places

    def _tensor(self, site: str, index: int) -> Tensor:
        shards = self._index.shards
        number = bisect_right(shards, index, key=lambda each: each.start) - 1
        file, places = self._shard(number)
        shapes, begins = places[site]
        row = index - shards[number].start
        flat: Tensor = file.get_slice(f"values/{site}")[begins[row] : begins[row + 1]]
        return flat.reshape(shapes[row].tolist())


class Column(Sequence[Tensor]):
    """The tensors of one site, by the prompt's position in the data set.

    Attributes:
        site: The site.
        dtype: The element type.
    """

    def __init__(self, store: Store, site: str, dtype: torch.dtype) -> None:
        self._store = store
        self.site = site
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self._store.indices)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._store._tensor(self.site, index) for index in self._store.indices)

    def __getitem__(self, index: Any) -> Any:
        """The tensor of one prompt, or those of a slice of prompts."""
        indices = self._store.indices
        if isinstance(index, slice):
            chosen = range(*index.indices(indices.stop))
            return [self[each] for each in chosen if each >= indices.start]
        found = index if index >= 0 else indices.stop + index
        if found not in indices:
            raise IndexError(f"prompt {index} is not in the store, which has {indices.start} to {indices.stop - 1}")
        return self._store._tensor(self.site, found)

    def __repr__(self) -> str:
        return f"<{self.site}: {len(self)} tensors, {str(self.dtype).removeprefix('torch.')}>"
