"""A model that a server holds: its weights, its instruments, its tokenizer and all that clients are told about it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import re
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import DynamicCache

from patchwire.errors import GraphError, InputError
from patchwire.graph import Generation, same_storage
from patchwire.sites import INPUT, OUTPUT, Axis, Catalogue, Inside, Location, Order, Source
from patchwire.tensors import dtype_to_proto
from patchwire.v1 import model_pb2
from patchwire_worker.computing import apart
from patchwire_worker.generating import generate
from patchwire_worker.interleaving import INSTEAD, PassInterleaver, SiteMediator, Stopping
from patchwire_worker.models import operations
from patchwire_worker.models.costs import Costs, Size
from patchwire_worker.models.detecting import family_of
from patchwire_worker.models.learning import POSITIONS, Learner, pads
from patchwire_worker.models.loading import Loaded, load
from patchwire_worker.models.metering import meter
from patchwire_worker.models.products import Products
from patchwire_worker.models.remembered import Noting, Past, remember
from patchwire_worker.models.standins import prompts_of
from patchwire_worker.models.texts import choosing_attention

log = logging.getLogger(__name__)

_MAX_SOURCES = 1 << 11
_TOGETHER = 31
"""How many functions are learnt in the same runs as one that is asked for."""
_PASS_BYTES = 1 << 28
"""What a pass may hold on a CPU, where more at once is no faster."""
_OF_FREE = 0.8
"""How much of the memory that a device has left for passes one of them may take."""
_MOST_TOKENS = 1 << 24
_OVERHEAD_TOKENS = {True: 48, False: 256}
"""How many tokens the weights are multiplied with in the time that it takes to read them, on a CPU and elsewhere."""
_LOGITS_TO_KEEP = "num_logits_to_keep"
_POSITIONS = "logits_to_keep"
_PROBE = "The quick brown fox, 3.14! Ünï→cødé\n  two lines"


class HostedModel:
    """A model, instrumented and described.

    Attributes:
        name: What clients call it.
        module: The Hugging Face model.
        catalogue: Its modules and sites.
        trimmed: The modules that see another thing when the logits of some positions alone are computed; None if they
            are always of all.
        narrowed: The modules that see another thing when logits of some entries of the vocabulary alone are computed;
            None if they are always of all.
        pads: Whether rows of different lengths may share a pass.
        overwritten: The tensors (a location and a path in it) that the model changes in place later.
        noted_at: When a pass has noted all that a later one may go on from: what follows changes nothing of it. None if
            its passes cannot note that.
        costs: What passes of any size compute and hold.
        lock: Held while the model runs.
        pass_bytes: How many bytes of activations a pass may hold, before it is split.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.name = loaded.name
        self.module = loaded.module
        self.tokenizer = loaded.tokenizer
        self.device = next(self.module.parameters()).device
        self.config = getattr(self.module, "config", None)
        self.lock = threading.RLock()
        self._slots: list[_Slot] = []
        self._replaced: dict[tuple[nn.Module, str], Tensor] = {}
        self.interleaver = PassInterleaver(self.module)
        self._products = Products(self.module, loaded.matmul)
        self._options = self._call_options()
        self._memory = _Memory(self.module)
        family, detected = family_of(self.module, getattr(self.config, "model_type", ""))
        if 0 < self.max_positions < POSITIONS:
            raise InputError(
                f"{self.name} has {self.max_positions} positions, and is learnt from on {POSITIONS}.",
                hint=f"Build it with {POSITIONS} or more; those that no prompt reaches cost nothing.",
            )
        learner = self._learner = Learner(self.module, self.interleaver, self._options, self.device, self.vocabulary)
        how = "unknown" if family is None else "detected" if detected else "table"
        learnt = learner.catalogue(self.name, family, detected=detected)
        self.catalogue = replace(learnt, found_by=how, learn=self._learn_source)
        self._memory.restore()
        self.interleaver.boundaries = self.catalogue.layers or self.interleaver.boundaries
        self.overwritten = frozenset(learner.overwritten)
        self.entries = learner.entries(self.catalogue)
        head = self.catalogue.raw("lm_head")
        self.trimmed = None if head is None else learner.trimmed(self._head_gives, head)
        few = partial(self._head_gives, None)
        self.narrowed = None if self._head is None or head is None else learner.narrowed(few, head)
        after = learner.after_past(self.catalogue, self.entries)
        self.entries_after_past, self.same_after_past, self.looking_back = after.entries, after.same, after.looking_back
        self.noted_at = _noted_at(self.catalogue) if after.notes else None
        self._memory.restore()
        self.costs = self._metered()
        self.pass_bytes = _pass_bytes(self.device)
        self.pads = pads(self.catalogue) and not _scales_with_length(self.config)
        log.info("%s: %d layers named (%s), %s rows of different lengths", self.name, self.catalogue.num_layers, how,
                 "packs" if self.pads else "does not pack")  # fmt: skip
        lacking: dict[tuple[str, str], list[str]] = {}
        for each, why in self.missing.items():
            word = re.sub(r"^layers\.\d+\.", "", each), re.sub(r"\.\d+\.", ".*.", why)
            lacking.setdefault(word, []).append(each)
        for (each, why), places in lacking.items():
            where = "" if places == [each] else f" in {len(places)} layers"
            log.log(logging.INFO if detected else logging.DEBUG, "%s has no %s%s: %s", self.name, each, where, why)

    @property
    def missing(self) -> Mapping[str, str]:
        """The canonical names that a model of its kind may have and this one lacks, with the reason."""
        return self.catalogue.missing

    def _call_options(self) -> dict[str, Any]:
        """What every call of the model gets besides its tokens: a forward pass needs no cache."""
        return {"use_cache": False} if self._takes("use_cache") else {}

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(type(self.module).forward).parameters

    @cached_property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        embeddings = self.module.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.weight.shape[0])

    @cached_property
    def _head(self) -> nn.Linear | None:
        """What makes logits; None if it is more than a product with weights `[vocabulary, …]`, each row for itself."""
        path = self.catalogue.raw("lm_head")
        head = None if path is None else self.module.get_submodule(path)
        if type(head) is not nn.Linear:
            return None
        plain = all(
            type(each) is nn.Parameter and each.is_floating_point() and each.shape[0] == self.vocabulary
            for each in head.parameters()
        )
        return head if plain else None

    @cached_property
    def max_positions(self) -> int:
        """The longest row that has positions; 0 if any length has."""
        if "dynamic" in _rope_kinds(self.config):
            return 0
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            found = getattr(self.config, name, None)
            if isinstance(found, int) and found > 0:
                return found
        return 0

    @cached_property
    def forked_tokens(self) -> float:
        """How long rows may be that fork: for longer ones a sliding window makes masks that were not learnt from."""
        return min((each for each in self._windows if each >= POSITIONS), default=math.inf)

    @cached_property
    def reused_tokens(self) -> float:
        """How long rows may be that go on from what is remembered: of a sliding window not all is.

        And where position embeddings depend on how long a row is, nothing is remembered as it has to be.
        """
        return 0 if _scales_with_length(self.config) else min(self._windows, default=math.inf)

    @cached_property
    def _windows(self) -> list[int]:
        """The sliding windows of its attention."""
        if self.config is None or not hasattr(self.config.get_text_config(), "num_hidden_layers"):  # nothing is cached
            return []
        windows = [getattr(each, "sliding_window", None) for each in DynamicCache(config=self.config).layers]
        return [each for each in windows if each]

    def layers_before(self, order: Order) -> int | None:
        """How many layers are entered by a moment; None if the head is, too."""
        modules, head = self.catalogue.modules, self.catalogue.raw("lm_head")
        if head is not None and modules[head].side(INPUT) and modules[head].side(INPUT)[0].order <= order:
            return None
        entries = [side[0].order for path in self.catalogue.layers if (side := modules[path].side(INPUT))]
        return bisect_right(entries, order)

    def fits(self, size: Size) -> bool:
        """Whether a pass fits into the memory that it may take."""
        few, columns = size.few, self.costs.few_columns(size.columns)
        held = size.held + self.costs.logits(size.logits * size.seq if few is None else few, columns)
        of_each = None if few is None else -(-few // size.rows)
        half = self._rows_that_fit(size.seq, size.end, of_each, columns, size.stepwise, self.pass_bytes // 2)
        if size.rows <= half and held <= self.pass_bytes // 2:
            return True
        return self._bytes(size.rows, size.seq, size.end, few, columns, size.stepwise) <= self.pass_bytes - held

    def _bytes(
        self, rows: int, seq: int, end: Order, positions: int | None, columns: int | None, stepwise: bool
    ) -> float:
        until = self.layers_before(end)
        return self.costs.bytes(rows, seq, until=until, positions=positions, columns=columns, stepwise=stepwise)

    @lru_cache(maxsize=1 << 12)  # noqa: B019  models stay for as long as their server
    def _rows_that_fit(
        self, seq: int, end: Order, of_each: int | None, columns: int | None, stepwise: bool, into: int
    ) -> int:
        """How many rows of so many tokens fit into so many bytes, to a power of two."""

        def held(rows: int) -> float:
            return self._bytes(rows, seq, end, None if of_each is None else rows * of_each, columns, stepwise)

        rows = 1
        while held(2 * rows) <= into and rows * seq < _MOST_TOKENS:
            rows *= 2
        return rows

    @property
    def overhead_tokens(self) -> int:
        """How many tokens would take the time that a pass takes however few it has: all weights have to be read."""
        return _OVERHEAD_TOKENS[self.device.type == "cpu"]

    def seconds_like(self, rows: int, seq: int, end: int) -> float:
        """What a pass takes, in a unit of its own.

        Args:
            rows: How many rows it has.
            seq: How many tokens each has.
            end: How many modules it enters.
        """
        return (rows * seq + self.overhead_tokens) * end

    def remember(self, tokens: Sequence[int]) -> Past:
        """What the model remembers of tokens, for a pass over later ones."""
        with self.lock, prompts_of(len(tokens)), self._products.on():
            try:
                return remember(self.module, torch.tensor([list(tokens)], device=self.device), self._options)
            finally:
                self._memory.restore()

    def noting(self, rows: Mapping[tuple[int, ...], Mapping[int, int]]) -> Noting | None:
        """What notes what a pass over whole rows remembers of their first tokens; None if this model's cannot.

        Args:
            rows: The tokens, and which row begins with them: of so many rows, this one.
        """
        return Noting(self.config, rows) if rows and self.noted_at else None

    def run(
        self,
        ids: Tensor,
        mediators: Sequence[SiteMediator],
        stopping: Stopping,
        positions: Sequence[tuple[int, int]] | None = None,
        past: Past | Noting | None = None,
        columns: Sequence[int] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        """One forward pass.

        Args:
            ids: Token ids `[batch, seq]`.
            mediators: Who waits where.
            stopping: Ends it early.
            positions: Those whose logits are computed, as rows and positions in them: `[position, 1, vocabulary]`. None
                for all.
            past: What is remembered of the tokens before, or what notes what is remembered of these.
            columns: The entries of the vocabulary whose logits are computed, in their order; None for all.
            exact: Whether it gives what Hugging Face does, to the last bit.
        """
        ids = ids.to(self.device)
        more: dict[str, Any] = {}
        if past is not None:
            more[past.argument] = past
            mediators = [*mediators, *past.mediators()]
        if positions is not None or columns is not None:
            mediators = [*mediators, *self._head_gives(positions, columns)]
        with self.lock:
            try:
                with prompts_of(ids.shape[1]), self._multiplying(exact):
                    self.interleaver.run(
                        lambda: self.module(input_ids=ids, **self._options, **more), {0: mediators}, stopping
                    )
            finally:
                self._memory.restore()

    def _multiplying(self, exact: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if exact else self._products.on()

    def _head_gives(
        self, positions: Sequence[tuple[int, int]] | None = None, columns: Sequence[int] | None = None
    ) -> list[SiteMediator]:
        """What has to happen in a pass, so that the head gives few logits.

        The head's own weights stay as they are: they may be tied to the embeddings, or be in use on another thread.

        Args:
            positions: Those that the head is given, as rows and positions in them; None for all. To the head they are
                rows of one position each.
            columns: The entries of the vocabulary that it multiplies with; None for all.
        """
        path, head, given = self.catalogue.raw("lm_head"), self._head, list[Tensor]()
        assert path is not None, "what is learnt of it is asked first"

        def take(call: tuple[tuple[Tensor, ...], dict[str, Any]]) -> Any:
            (states, *rest), named = call
            if positions is not None:
                rows, places = torch.tensor(positions, device=states.device).unbind(-1)
                states = states[rows, places][:, None]
            if columns is not None:
                given.append(states)
            return (states, *rest), named

        def multiply(_: object) -> Tensor:
            assert head is not None
            rows = torch.tensor(columns, device=head.weight.device)
            bias = None if head.bias is None else head.bias.index_select(0, rows)
            return functional.linear(given.pop(), head.weight.index_select(0, rows), bias)

        taking = SiteMediator(Location(path, INPUT), take)
        return [taking] if columns is None else [taking, SiteMediator(Location(path, INSTEAD), multiply)]

    def _metered(self) -> Costs:
        """What its passes cost."""

        def call(ids: Tensor, stepwise: bool) -> None:
            with prompts_of(ids.shape[1]):
                made = partial(self.module, input_ids=ids, **self._options)
                self.interleaver.run(made, {}, Stopping(), stepwise=stepwise)

        def remember(ids: Tensor) -> object:
            with prompts_of(ids.shape[1]), torch.no_grad():
                result = self.module(input_ids=ids, use_cache=True)
            return next((result[each] for each in ("past_key_values", "cache_params") if each in result), None)

        switches = self.interleaver.steps_are_exact and bool(choosing_attention(self.module))
        own = remember if self._takes("use_cache") else None
        try:
            return meter(self.module, self.catalogue, call, self.device, stepwise=switches, remember=own)
        finally:
            self._memory.restore()

    def _learn_source(self, inside: Inside) -> Source:
        """What is inside a function; learnt once, unless so much else is asked for that it has to go again."""
        with self.lock:
            known = self.catalogue.sources
            if inside in known:
                return known[inside]
            module, path = inside
            caller = self.catalogue.operation(module, path) if path else None
            repeated = caller is not None and caller.runs.axis is Axis.UNKNOWN
            try:
                found, overwritten = operations.learn(self._learner, [inside, *self._alike(inside)], repeated)
            finally:
                self._memory.restore()
            self.overwritten |= overwritten
            while len(known) + len(found) > _MAX_SOURCES:
                del known[next(iter(known))]
            known.update(found)
            return found[inside]

    def _alike(self, inside: Inside) -> list[Inside]:
        """The same function in other layers of the same kind, which somebody will ask for next."""
        (module, path), catalogue = inside, self.catalogue
        own = next((layer for layer in catalogue.layers if f"{module}.".startswith(f"{layer}.")), None)
        if own is None:
            return []
        modules = (layer + module.removeprefix(own) for layer in catalogue.layers if layer != own)
        wanted = catalogue.modules[module].class_name
        found = []
        for each in modules:
            there = catalogue.modules.get(each)
            if there is None or (there.class_name, there.calls) != (wanted, catalogue.modules[module].calls):
                continue
            caller = catalogue.sources.get((each, path[:-1])) if path else None
            operation = caller.operations.get(path[-1]) if caller is not None else None
            if (each, path) not in catalogue.sources and (not path or (operation and not operation.closed)):
                found.append((each, path))
        return found[:_TOGETHER]

    def generate(
        self,
        ids: Tensor,
        options: Generation,
        steps: Mapping[int, Sequence[SiteMediator]],
        stopping: Stopping,
        on_tokens: Callable[[list[int]], None],
        *,
        exact: bool = False,
    ) -> Tensor | None:
        """Generate tokens after token ids `[batch, seq]`.

        Args:
            ids: The prompts, of one length.
            options: How.
            steps: Who waits in which step.
            stopping: Ends it early.
            on_tokens: Told the new token of each row.
            exact: As for `run`.

        Returns:
            All token ids `[batch, seq + new]`, on the CPU; None if a mediator ended it.
        """
        ids = ids.to(self.device)
        # Hugging Face leaves out the logits of all but the prompt's last token, unless it is told not to.
        head = self.catalogue.raw("lm_head")
        looked_at = any(each.location[0] in ("", head) for each in steps.get(0, ()))
        more = {_POSITIONS: 0} if looked_at and self._takes(_POSITIONS) else {}
        try:
            with prompts_of(ids.shape[1]), self._all_logits(looked_at), self._multiplying(exact):
                made = self.interleaver.run(
                    lambda: generate(self.module, ids, options, on_tokens, more), steps, stopping
                )
        finally:
            self._memory.restore()
        return None if made is None else made.to("cpu")

    @contextlib.contextmanager
    def _all_logits(self, wanted: bool) -> Iterator[None]:
        """Have a generation compute the logits of all tokens of the prompt where only the configuration can say so."""
        before = getattr(self.config, _LOGITS_TO_KEEP, None)
        if not wanted or before is None:
            yield
            return
        try:
            setattr(self.config, _LOGITS_TO_KEEP, 0)
            yield
        finally:
            setattr(self.config, _LOGITS_TO_KEEP, before)

    def apply(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply one of its modules, in the middle of a pass or outside of one.

        What the module remembers is afterwards what it was before, not what it was when no pass ran: a pass in whose
        middle this happens may still be using it.
        """
        module = self.module.get_submodule(path)
        with self.lock:
            memory = _Memory(module)
            try:
                result = self.interleaver.call(module, args, kwargs)
                return tree_map_only(Tensor, memory.apart, result)
            finally:
                memory.restore()

    def parameter(self, path: str) -> Tensor:
        """A parameter or buffer of the model's own, by its module's name or path and its own name."""
        owner, _, name = path.rpartition(".")
        module = self.module.get_submodule(self.catalogue.module(owner).path)
        found = self._replaced.get((module, name))
        found = getattr(module, name) if found is None else found
        assert isinstance(found, Tensor)
        return found

    @contextlib.contextmanager
    def weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other weights than the model's own, by their paths; all that are not named are its own.

        What is tied to one of them changes with it, as it does in PyTorch when a weight is changed in place.

        Raises:
            GraphError: two of them are tied to each other, or one is a buffer.
        """
        before, slots = self._replaced, self._slots
        new: dict[int, Tensor] = {}
        for path, tensor in weights.items():
            if new.setdefault(id(self.parameter(path)), tensor) is not tensor:
                raise GraphError(f"`{path}` is tied to another weight that is changed too.", hint="Change one of them.")
        try:
            _restore(slots)
            self._slots = list(self._find(new)) if new else []
            if len({id(own) for _, _, _, own, _ in self._slots}) < len(new):
                raise GraphError(
                    "Only parameters can be changed, and one of these is a buffer.",
                    hint="Write the values that are computed from it.",
                )
            self._replaced = {(module, name): own for module, _, name, own, _ in self._slots}
            for _, table, name, _, tensor in self._slots:
                table[name] = tensor
            yield
        finally:
            _restore(self._slots)
            self._replaced, self._slots = before, slots
            for _, table, name, _, tensor in slots:
                table[name] = tensor

    def _find(self, new: Mapping[int, Tensor]) -> Iterator[_Slot]:
        for module in self.module.modules():
            for name, own in module._parameters.items():
                if own is not None and id(own) in new:
                    yield module, module._parameters, name, own, new[id(own)].to(own.device)

    # --- tokens -------------------------------------------------------------------------------------------------------

    def tokenize_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts.

        Raises:
            InputError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer.", hint="Give token ids.")
        return [list(self.tokenizer(text)["input_ids"]) for text in texts]

    def tokenize_messages(self, messages: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """The token ids of a conversation, up to where the assistant would answer.

        Raises:
            InputError: the model has no chat template, or the template refuses the messages.
        """
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"{self.name} has no chat template.", hint="Give it text.")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are Jinja programs, and raise what they like
            raise InputError(f"The chat template of {self.name} refuses the messages: {error}") from error
        return [list(self.tokenizer(text, add_special_tokens=False)["input_ids"])]

    @cached_property
    def tokenizer_json(self) -> str:
        """The tokenizer for clients; empty if there is none that gives them the very same ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or self.tokenizer is None:
            return ""
        text = str(backend.to_str())
        copy = Tokenizer.from_str(text)
        copy.no_padding()
        copy.no_truncation()
        same = all(copy.encode(probe).ids == list(self.tokenizer(probe)["input_ids"]) for probe in (_PROBE, "", " a"))
        return text if same else ""

    # --- what clients are told ----------------------------------------------------------------------------------------

    @cached_property
    def summary(self) -> model_pb2.ModelSummary:
        """The model in one line."""
        parameters = list(self.module.parameters())
        largest = max(parameters, key=lambda each: each.numel())
        summary = model_pb2.ModelSummary(
            name=self.name,
            architecture=type(self.module).__name__,
            parameters=sum(each.numel() for each in parameters),
            device=str(self.device),
            layers=self.catalogue.num_layers,
        )
        try:
            summary.dtype = dtype_to_proto(largest.dtype)
        except GraphError:  # quantized
            log.info("%s: its weights are %s, which has no name on the wire", self.name, largest.dtype)
        return summary

    @cached_property
    def description(self) -> model_pb2.ModelDescription:
        """The model in full."""
        modules, names = self.catalogue.to_proto()
        return model_pb2.ModelDescription(
            summary=self.summary,
            fingerprint=self._fingerprint(),
            modules=modules,
            names=names,
            config_json=self._config_json(),
            tokenizer_json=self.tokenizer_json,
            tokenizes_text=self.tokenizer is not None,
            tokenizes_messages=bool(getattr(self.tokenizer, "chat_template", None)),
            max_positions=self.max_positions,
            vocabulary=self.vocabulary,
            missing=[model_pb2.Missing(name=name, reason=why) for name, why in self.catalogue.missing.items()],
            found_by=self.catalogue.found_by,
        )

    def _config_json(self) -> str:
        return "{}" if self.config is None else str(self.config.to_json_string(use_diff=False))

    def _fingerprint(self) -> bytes:
        tree = [
            (module.path, module.class_name, [(each.name, each.shape, str(each.dtype)) for each in module.parameters])
            for module in self.catalogue.modules.values()
        ]
        return hashlib.sha256(json.dumps([tree, self._config_json()]).encode()).digest()


def _noted_at(catalogue: Catalogue) -> Order | None:
    """When the last layer has mixed tokens, or has run."""
    name = f"layers.{catalogue.num_layers - 1}"
    last = next((catalogue.names[each] for each in (f"{name}.mixer", name) if each in catalogue.names), None)
    leaves = catalogue.modules[last.module].side(OUTPUT) if last is not None else []
    return leaves[0].order if leaves else None


_Slot = tuple[nn.Module, dict[str, Any], str, Tensor, Tensor]
"""A module, its table of parameters or buffers, a name in it, the model's own tensor and the one in its place."""


def _restore(slots: Sequence[_Slot]) -> None:
    for _, table, name, own, _ in slots:
        table[name] = own


class _Memory:
    """What modules remember between calls (buffers, the length that rotary embeddings have seen, and the states of a
    generation that RecurrentGemma keeps in its modules rather than in a cache).

    Some change it as they run, such as rotary embeddings that stretch with the longest input so far; without this, one
    request would change the numbers of the next.
    """

    _ATTRIBUTES = ("max_seq_len_cached", "conv1d_state", "recurrent_states")

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self._versions = [buffer._version for _, _, buffer, _ in self._buffers]
        self._places = [
            (module, name) for module in model.modules() for name in self._ATTRIBUTES if name in module.__dict__
        ]
        self._attributes = [getattr(module, name) for module, name in self._places]

    def apart(self, tensor: Tensor) -> Tensor:
        """The same tensor, or a copy of it if it lies in what is put back to what it was."""
        return tensor.clone() if any(same_storage(tensor, each) for _, _, each, _ in self._buffers) else tensor

    def restore(self) -> None:
        """Put everything back to what it was."""
        for index, (module, name, buffer, copy) in enumerate(self._buffers):
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            if buffer._version != self._versions[index]:
                with torch.no_grad():
                    buffer.copy_(copy)
                self._versions[index] = buffer._version
        for (module, name), value in zip(self._places, self._attributes, strict=True):
            module.__dict__[name] = value


def _pass_bytes(device: torch.device) -> int:
    """How many bytes of activations a pass may hold at once."""
    return int(torch.cuda.mem_get_info(device)[0] * _OF_FREE) if device.type == "cuda" else _PASS_BYTES


def _scales_with_length(config: Any) -> bool:
    """Whether position embeddings depend on the longest row of a pass, so that a short row is another in company."""
    kinds = _rope_kinds(config)
    return "longrope" in kinds or "dynamic" in kinds


def _rope_kinds(config: Any) -> str:
    """What the configuration says of rotary embeddings, as text: there is one entry, or one for each kind of layer."""
    found = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    return str([each for each in found if each])


class Remembered:
    """What models remember of tokens, for as long as a later pass begins after them.

    Attributes:
        wanted: The tokens that passes begin after, and how many do.
    """

    def __init__(self) -> None:
        self.wanted = Counter[tuple[int, ...]]()
        self._known: dict[tuple[HostedModel, tuple[int, ...]], Past] = {}

    def done(self, tokens: tuple[int, ...]) -> None:
        """A pass that began after tokens is over."""
        self.wanted[tokens] -= 1
        self.wanted = +self.wanted
        for key in [key for key in self._known if key[1] not in self.wanted]:
            del self._known[key]

    def noting(self, model: HostedModel, rows: Mapping[tuple[int, ...], Mapping[int, int]]) -> Noting | None:
        """What notes, in a pass over whole rows, what is wanted of their first tokens; None if there is nothing.

        Args:
            model: The model.
            rows: The token ids of rows, and where each is: of so many rows, this one.
        """
        found = {}
        for whole, places in rows.items():
            wanted = [each for each in self.wanted if each and whole[: len(each)] == each]
            if wanted:
                found[max(wanted, key=len)] = places
        return model.noting(found)

    def note(self, model: HostedModel, noting: Noting) -> None:
        """Keep what a pass has noted."""
        self._known |= {(model, tokens): past for tokens, past in noting.noted().items()}

    def get(self, model: HostedModel, tokens: tuple[int, ...]) -> Past:
        """What a model remembers of tokens; a part of what it does of more, where it is the same."""
        longest = max((each for each in self.wanted if each[: len(tokens)] == tokens), key=len, default=tokens)
        for each in (longest, tokens):
            if (model, each) not in self._known:
                self._known[model, each] = model.remember(each)
            past = self._known[model, each].first(len(tokens)) if each != tokens else self._known[model, each]
            if past is not None:
                return past
        raise AssertionError("what is remembered of all of them is the same")


def host(spec: str | nn.Module, **options: Any) -> HostedModel:
    """Load a model and learn what its sites are.

    Args:
        spec: As for `patchwire_worker.models.loading.load`.
        options: As for it, too.

    Raises:
        ModelNotFoundError: the model cannot be loaded.
    """
    return apart(lambda: HostedModel(load(spec, **options)))
