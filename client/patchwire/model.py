"""The proxy of a model: its modules by raw path and by canonical name, the same on every architecture.

`model.transformer.h[5].attn.c_proj.output` is what a hook on that module of GPT-2 sees; `model.layers[5].mixer.output`
is the same value on GPT-2 and its counterpart on Mamba. A proxy holds no weights: outside a block it can be printed
and asked for names and shapes, inside a block its sites can be read and written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patchwire import canonical, display, sites
from patchwire import graph as g
from patchwire.connection import Connection
from patchwire.errors import GraphError, InputError, SiteError, here
from patchwire.inputs import ModelTokenizer, to_invoke
from patchwire.listing import Listing, listing
from patchwire.loops import BatchPrompt
from patchwire.proxy import Value
from patchwire.scanning import Scan
from patchwire.selecting import Selected
from patchwire.session import Session
from patchwire.sided import NoSuchIndex, NoSuchName, Sided
from patchwire.sites import OUTPUT, SOURCE, Address, Catalogue, Inside, Leaf, Parameter, spell
from patchwire.source import Source
from patchwire.tracing import Generation, Trace, current, recording
from patchwire.v1 import model_pb2

if TYPE_CHECKING:
    import torch

    from patchwire.activations import Batch
    from patchwire.editing import Edit, Editing


class Module(Sided):
    """A module of the model: `model.layers[5].mixer`.

    Inside a block:

    - `module.output`, `module.input`: the value that it returns, and its first argument. Reading gives a value,
      assigning replaces it, and an in-place edit of the value is a write too. Where that is a tuple or mapping,
      index it: `attn.output[0]`.
    - `module.inputs`: all arguments, `inputs[0]` the positional and `inputs[1]` the named ones.
    - `module(value)`: the module, applied to a value.
    - `module.weight`: a parameter, as a value.
    - `module.source`: the operations inside its forward.
    """

    _model: Model

    def __init__(self, model: Model, name: str) -> None:
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_name", name)

    # --- the tree -----------------------------------------------------------------------------------------------------

    @property
    def _catalogue(self) -> Catalogue:
        return self._model.catalogue

    @property
    def path(self) -> str:
        """Its raw path in the model; for a list of canonical names, such as `layers`, that name."""
        raw = self._catalogue.raw(self._name)
        return self._name if raw is None else raw

    def _child(self, name: str) -> str | None:
        """The name of what `.name` or `[name]` stands for: a canonical name, else a raw child."""
        full = f"{self._name}.{name}" if self._name else name
        if full in self._catalogue.names or full in self._catalogue.prefixes:
            return full
        return full if self._catalogue.raw(full) is not None else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        named = self._catalogue.named(f"{self._name}.{name}" if self._name else name)
        if named is not None and named.value is not None:
            return self._read(Address(named.name))
        if named is not None and not named.is_module:
            return canonical.read(self._model, named)
        child = self._child(name)
        if child is not None:
            return self._model._at(child)
        return self._parameter(name)

    def _parameter(self, name: str) -> Value | Parameter:
        raw = self._catalogue.raw(self._name)
        full = f"{self._name}.{name}" if self._name else name
        if raw is None or not any(each.name == name for each in self._catalogue.modules[raw].parameters):
            # An AttributeError, so that `hasattr` and tab completion work.
            raise NoSuchName(
                f"`{spell(full)}` is not in {self._model.name}.", hint=self._catalogue.suggestion(full), lines=here()
            )
        if not recording():
            return self._catalogue.parameter(full)
        scope = current(spell(full), self._model)
        return scope.recorder.parameter(scope.trace, full)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("output", "input"):
            object.__setattr__(self, name, value)
            return
        full = f"{self._name}.{name}" if self._name else name
        named = self._catalogue.named(full)
        if named is not None and named.value is not None:
            self._write(Address(full), value)
        elif named is not None and not named.is_module:
            canonical.assign(self._model, named, value)
        elif isinstance(self._child(name) or self._parameter(name), (Value, Parameter)):
            scope = current(spell(full), self._model)
            scope.recorder.assign_parameter(scope.trace, full, value)
        else:
            raise SiteError(
                f"`{spell(full)}` cannot be assigned: only values and weights can, not modules.",
                hint=f"Write `{spell(full)}.output = …` inside a block.",
                lines=here(),
            )

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        keys = self._indices()
        if not keys:
            raise SiteError(
                f"`{spell(self._name)}` is not a list of modules.",
                hint=f"Write `{spell(self._name)}.output` for what it returns; lists are such as `model.layers[0]`.",
                lines=here(),
            )
        if not -len(keys) <= index < len(keys):
            raise NoSuchIndex(
                f"`{spell(self._name)}[{index}]` does not exist.",
                hint=f"`{spell(self._name)}` has the indices 0 to {len(keys) - 1}.",
                lines=here(),
            )
        return self._model._at(f"{self._name}.{keys[index]}")

    def _indices(self) -> list[str]:
        return self._catalogue.indices(self._name)

    def __len__(self) -> int:
        return len(self._indices())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Module]:
        for key in self._indices():
            yield self._model._at(f"{self._name}.{key}")

    def __dir__(self) -> list[str]:
        raw = self._catalogue.raw(self._name)
        below = self._catalogue.prefixes.get(self._name, [])
        children = self._catalogue.children.get(raw, []) if raw is not None else []
        parameters = [each.name for each in self._catalogue.modules[raw].parameters] if raw is not None else []
        return sorted({*super().__dir__(), *(each for each in (*below, *children, *parameters) if not each.isdigit())})

    # --- values -------------------------------------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """What happens inside the module's forward: every call and every assignment is a site (see `source.Source`).

        A child that is itself called "source" is at `model.module("….source")`.
        """
        return Source(self._model, f"{self._name}.{SOURCE}" if self._name else SOURCE)

    def skip(self, value: Any) -> None:
        """Leave the module out: `value` is what it returns instead, and nothing in it can be read.

        Args:
            value: A value or tensor of the shape and dtype of its output; a tuple of them for a tuple, None for an item
                that stays as it is.

        Raises:
            ShapeError: it has another shape or dtype.
            OrderError: it exists only later in the forward pass.
        """
        scope = current(f"{spell(self._name)}.skip(…)", self._model)
        scope.recorder.skip(scope.site(self._address(OUTPUT)), self.path, value, lambda: self._assign(OUTPUT, value))

    def _side(self, side: str) -> Any:
        named = self._catalogue.named(self._address(side).name)
        return super()._side(side) if named is None or named.is_module else canonical.read(self._model, named)

    def _assign(self, side: str, value: Any) -> None:
        named = self._catalogue.named(self._address(side).name)
        if named is None or named.is_module:
            super()._assign(side, value)
        else:
            canonical.assign(self._model, named, value)

    def _leaves(self, side: str) -> tuple[Leaf, ...]:
        try:
            module = self._catalogue.module(self._name)
        except SiteError as error:
            raise SiteError(error.message, hint=error.hint, lines=here()) from None
        leaves = module.side(side)
        if leaves:
            return leaves
        address = self._address(side)
        if not module.calls:
            raise SiteError(
                f"`{address.spelled}` never exists: a forward pass does not call this module.",
                hint="Print the model: it says which modules are not called.",
                lines=here(),
            )
        raise SiteError(
            f"`{address.spelled}` is not a tensor and has none in it.",
            hint="Print the model: it says what each module returns.",
            lines=here(),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        scope = current(f"{spell(self._name)}(…)", self._model)
        self._leaves(OUTPUT)
        return scope.recorder.apply(scope.trace, self._name, args, kwargs)

    # --- looks --------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return display.text(self._catalogue, self._name)

    def _repr_html_(self) -> str:
        return display.html(self._catalogue, self._name)


class Model(Module):
    """A model on a server.

    Attributes:
        name: What the server calls it.
        connection: The connection to the server.
        catalogue: Its modules and sites.
        tokenizer: Its tokenizer, for finding positions: `encode`, `decode`, `tokens`.
        config: Its configuration, as the JSON of Hugging Face says it.
        summary: Its class, size, dtype and device.
        fingerprint: SHA-256 of its module tree, as hexadecimal digits.
        progress: Whether to show progress bars.
    """

    name: str
    connection: Connection
    catalogue: Catalogue
    tokenizer: ModelTokenizer
    config: dict[str, Any]
    summary: model_pb2.ModelSummary
    fingerprint: str
    progress: bool
    _original: Model
    _edits: list[Edit]

    def __init__(
        self, connection: Connection, description: model_pb2.ModelDescription, *, progress: bool = True
    ) -> None:

        name = description.summary.name
        put = object.__setattr__
        put(self, "_model", self)
        put(self, "_name", "")
        put(self, "name", name)
        put(self, "connection", connection)
        catalogue = Catalogue.from_proto(
            name, description.modules, description.names, description.missing, description.found_by
        )
        sources: dict[Inside, sites.Source] = {}

        def learn(inside: Inside) -> sites.Source:
            found = sites.Source.from_proto(connection.describe_source(name, *inside))
            if (found.module, found.path) != inside:
                raise GraphError(
                    "The server described another function than was asked for.",
                    hint="Compare `patchwire doctor` here and there.",
                    lines=here(),
                )
            sources[inside] = found
            return found

        put(self, "catalogue", replace(catalogue, learn=learn, sources=sources))
        put(self, "tokenizer", ModelTokenizer(description.tokenizer_json, self._texts))
        put(self, "config", json.loads(description.config_json or "{}"))
        put(self, "summary", description.summary)
        put(self, "fingerprint", description.fingerprint.hex())
        put(self, "progress", progress)
        put(self, "_description", description)
        put(self, "_original", self)
        put(self, "_edits", [])

    @property
    def num_layers(self) -> int:
        """How many layers `model.layers` has."""
        return self.catalogue.num_layers

    @property
    def vocab_size(self) -> int:
        """How many token ids there are, from 0 on; 0 if that is not known."""
        return int(self._description.vocabulary)

    @property
    def sites(self) -> Listing:
        """Its canonical names as a table: dimensions, where each is in this model, and what can be written.

        `patchwire.verify(model)` checks them.
        """
        return listing(self.catalogue)

    def trace(self, given: Any = None, *, blocking: bool = True, exact: bool = False) -> Trace:
        """A block that records one call of the model.

        Args:
            given: A text, a list of texts, a list of token ids or of such lists, a tensor of token ids `[seq]` or
                `[batch, seq]`, chat messages (dicts with "role" and "content"), or a tokenizer's mapping with
                "input_ids" and "attention_mask", or with "inputs_embeds", a tensor or value `[batch, seq, width]` that
                goes on in the place of embedded tokens. Left out if the block opens `trace.invoke(…)`s.
            blocking: Whether to wait for the saved values at the end of the block. If not, the block only submits its
                request, and `trace.job` is the job: it runs on the server by itself, and can be fetched later, from
                another program too.
            exact: Whether each invoke runs in a pass of its own (two that write values of each other share one). Else
                invokes share passes, and those with the same prompt share rows until one of them is changed, wherever
                the numbers are the same up to rounding.

        `async with` does the same as `with`, and lets the event loop go on while it waits.

        Texts of different lengths end together, as in a batch padded on the left, so that `[:, -1]` is everyone's last
        token; positions before a shorter text hold NaN, and `trace.mask()` says which.

        Example:
            >>> with model.trace("The Eiffel Tower is in the city of"):
            ...     hidden = model.layers[5].output.save()
            ...     model.layers[10].mixer.output[:, -1] = 0
            ...     logits = model.logits.save()
            >>> hidden.shape
            torch.Size([1, 10, 768])
        """
        return Trace(self, given, blocking=blocking, exact=exact)

    def generate(
        self,
        given: Any = None,
        *,
        max_new_tokens: int = 20,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stream: bool | Callable[[list[int]], None] = False,
        blocking: bool = True,
    ) -> Generation:
        """A block that records one generation: the model goes on after a prompt, and may be intervened in at each step.

        Args:
            given: A prompt, as for `trace`; several must have the same length. Left out if the block opens
                `gen.invoke(…)`s. Embeddings show as tokens 0 in the output.
            max_new_tokens: How many tokens at most; it ends earlier after the model's token for the end of a text.
            min_new_tokens: No such token before so many.
            do_sample: Draw tokens at random; the likeliest is taken otherwise.
            temperature: Divides the logits before they are drawn from.
            top_k: Draw only from so many of the likeliest; 0 for all.
            top_p: Draw only from the likeliest whose probabilities add up to this.
            repetition_penalty: Divides the logits of tokens that occurred already.
            seed: Row i of an invoke draws with a generator seeded with this plus i, whatever else runs.
            stream: Print the text as it is made, or give the new token ids (one for each row) to a function.
            blocking: As for `trace`.

        Step 0 is the pass over the prompt; step n the pass over the n-th new token alone, what comes before it being
        cached.

        Example:
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as gen:
            ...     hidden = []
            ...     for step in gen.all():
            ...         model.layers[5].mixer.output[:, -1] = 0
            ...         hidden.append(model.layers[8].output[:, -1].save())
            ...     tokens = gen.output.save()
        """
        options = g.Generation(
            max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, seed
        )
        try:
            options.check()
        except InputError as error:
            raise InputError(error.message, hint=error.hint, lines=here()) from None
        return Generation(self, given, options, stream, blocking=blocking)

    def edit(self, given: Any = None, *, prompt_only: bool = False) -> Editing:
        """A block whose interventions and changed weights stay with the model that it gives.

        Args:
            given: A prompt to record the block for, if it needs one of a certain length; its interventions are recorded
                again for the prompts of every trace.
            prompt_only: Whether they are left out of a generation's later passes, which have one token.

        Nothing changes on the server: this proxy, and other people, see the model as it was.

        Example:
            >>> with model.edit() as steered:
            ...     model.layers[5].output[:] += direction
            ...     model.layers[7].mlp.output_projection.weight += torch.outer(u, v)
            >>> with steered.trace("The Eiffel Tower is in"):
            ...     logits = model.logits.save()
        """
        from patchwire.editing import Editing

        return Editing(self, given, prompt_only=prompt_only)

    def _with_edits(self) -> Model:
        """Another proxy of the same model, with the edits of this one."""
        edited = object.__new__(type(self))
        for name, value in self.__dict__.items():
            object.__setattr__(edited, name, value)
        object.__setattr__(edited, "_model", edited)
        object.__setattr__(edited, "_edits", list(self._edits))
        return edited

    def _longest(self, length: int) -> int:
        """A length, or the longest that a prompt may have."""
        return min(length, self._description.max_positions or length)

    def session(self, *, blocking: bool = True, exact: bool = False) -> Session:
        """A block of many traces that are sent as one request, between which values stay on the server.

        Traces of one model that need nothing of each other too early share a pass.

        Args:
            blocking: As for `trace`, of the whole session.
            exact: As for `trace`, for each of its traces.
        """
        return Session(self.connection, progress=self.progress, blocking=blocking, exact=exact, model=self)

    def scan(self, given: Any = None) -> Scan:
        """A block that is recorded and checked as by `trace`, and not run: shapes and dtypes only.

        Args:
            given: A prompt, as for `trace`.

        Example:
            >>> with model.scan("The Eiffel Tower is in the city of") as scan:
            ...     hidden = model.layers[5].output.save()
            >>> hidden.shape
            torch.Size([1, 10, 768])
            >>> print(scan)
        """
        return Scan(self, given)

    def activations(
        self,
        dataset: Iterable[Any],
        sites: Sequence[str] | Callable[[Model], Mapping[str, Value]],
        *,
        batch_size: int = 16,
        path: str | Path | None = None,
        start: int = 0,
        dtype: torch.dtype | None = None,
        shard_bytes: int = 256 << 20,
    ) -> Iterator[Batch]:
        """Go through a data set, and bring the activations of every prompt, a batch at a time.

        Args:
            dataset: Prompts, each as for `trace`: texts, or token ids. Any iterable.
            sites: Addresses, `["layers.5.output", "layers.*.mixer.output"]`, or a function of the model that reads
                sites for one prompt, as in a block, edits included, and returns values by name.
            batch_size: How many prompts a request has.
            path: A directory to keep them in. If it has a store, it is gone on with where that stopped.
            start: The first prompt to run, by its position.
            dtype: Send, and keep, tensors in this element type.
            shard_bytes: From how many bytes on a file of the store is written; a crash loses at most as much.

        Returns:
            An iterator of (indices, values): a range of positions, and by site a list with the tensor of each prompt,
            as for that prompt alone: no padding, and at addresses no dimension for rows. While the program works with
            one batch the next one runs; two are in memory at most, and what waits for its shard.

        Raises:
            SiteError, GraphError: a site is not there, or the function is wrong.
            InputError: an item is not one prompt.
            StoreError: the store is damaged, or of another model, other sites or other prompts.

        Example:
            >>> for indices, values in model.activations(texts, ["layers.5.output"], path="activations"):
            ...     pass
            >>> patchwire.activations.open("activations")["layers.5.output"][17].shape
            torch.Size([10, 768])
        """
        # It needs safetensors, which nothing else here does.
        from patchwire import activations

        options: dict[str, Any] = {"path": path, "start": start, "dtype": dtype, "shard_bytes": shard_bytes}
        return activations.stream(self, dataset, sites, batch_size=batch_size, **options)

    def module(self, path: str) -> Module:
        """The module of a path, for names that Python cannot spell or that this class uses itself.

        Raises:
            SiteError: there is none.
        """
        self.catalogue.module(path)
        return self._at(path)

    def _selected(self, selected: Selected) -> Value:
        """The value of something that was selected."""
        if isinstance(selected, Address):
            return self._read(selected)
        found: Value = canonical.read(self, selected)
        return found

    def _at(self, name: str) -> Module:
        """The proxy of a module, by a name that exists."""
        return Module(self, name)

    def tokenize(self, given: Any) -> list[list[int]]:
        """The token ids of each row of a prompt, as `trace` would run it."""
        return [list(row) for row in self._rows(given).rows]

    def _invoke(self, given: Any) -> tuple[g.Invoke, Any]:
        """The rows of a prompt, and their embeddings if it gives these instead of tokens."""
        embeddings = None
        if isinstance(given, BatchPrompt):
            batches = given.rows(self.name, lambda batch: self._rows(batch).rows)
            return g.Invoke(batches[0], batches), None
        if isinstance(given, Mapping) and given.get("inputs_embeds") is not None:
            given, embeddings = self._embedded(given)
        return self._rows(given), embeddings

    def _embedded(self, given: Mapping[str, Any]) -> tuple[list[list[int]], Any]:
        embeddings = given["inputs_embeds"]
        if len(given) > 1 or not isinstance(embeddings, (Tensor, Value)) or embeddings.ndim not in (2, 3):
            raise InputError(
                "Embeddings are a tensor or value [seq, width] or [batch, seq, width], with nothing beside them.",
                hint="Give rows of other lengths invokes of their own: `with trace.invoke({'inputs_embeds': …}):`.",
                lines=here(),
            )
        if "embed" not in self.catalogue.names:
            raise InputError(f"Where {self.name} embeds its tokens is not known.", hint="Give token ids.", lines=here())
        embeddings = embeddings if embeddings.ndim == 3 else embeddings.unsqueeze(0)
        # The tokens do not matter: what they are embedded as is replaced.
        return [[0] * embeddings.shape[1]] * embeddings.shape[0], embeddings

    def _rows(self, given: Any) -> g.Invoke:
        return to_invoke(
            given,
            texts_to_ids=self.tokenizer.prompts,
            messages_to_ids=lambda messages: self.connection.tokenize(self.name, messages=list(messages)),  # type: ignore[arg-type]
            vocabulary=self.vocab_size,
            max_positions=self._description.max_positions,
        )

    def _texts(self, texts: Any) -> list[list[int]]:
        if not self._description.tokenizes_text:
            raise InputError(f"{self.name} has no tokenizer.", hint="Give token ids.", lines=here())
        return self.connection.tokenize(self.name, texts=list(texts))
