"""nnsight's model and modules: Patchwire's, with nnsight's conventions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from patchwire.client import connect, local
from patchwire.connection import TLS
from patchwire.errors import GraphError, InputError, SiteError, here, warn
from patchwire.model import Model, Module
from patchwire.nnsight.attached import Attached
from patchwire.nnsight.cache import ROOT
from patchwire.nnsight.renaming import Aliases, aliases
from patchwire.nnsight.saving import save
from patchwire.nnsight.structures import arguments, assign, plain
from patchwire.nnsight.tokenizing import Tokenizer
from patchwire.nnsight.tracing import Editing, Generator, GeneratorOutput, Scan, TensorSession, Tracer, prompt
from patchwire.proxy import Structure
from patchwire.sided import Sided
from patchwire.sites import INPUT, OUTPUT, SOURCE, spell
from patchwire.source import Operation, Source
from patchwire.tracing import current, move, recording

_HUGGING_FACE_TOP_K = 50
"""From how many tokens `generate(do_sample=True)` draws there if nothing is said."""
_ELSEWHERE = frozenset({"remote", "backend", "pad_token_id", "return_dict_in_generate"})
"""Arguments of a call that mean nothing here."""


class PlainSided(Sided):
    """What has an input and an output, as Python has it: tuples are tuples, and `inputs` is `(args, kwargs)`."""

    @property
    def _items(self) -> int:
        """How many items there are in the tuple that it returns; 0 if it returns none, or that is not known."""
        return 0

    @property
    def output(self) -> Any:
        """What it returns: a value, or a tuple or mapping of values."""
        return plain(self._side(OUTPUT), self._items)

    @output.setter
    def output(self, value: Any) -> None:
        self._set(OUTPUT, value)

    @property
    def input(self) -> Any:
        """Its first argument."""
        return plain(self._side(INPUT))

    @input.setter
    def input(self, value: Any) -> None:
        self._set(INPUT, value)

    @property
    def inputs(self) -> Any:
        """All arguments: `(args, kwargs)`."""
        return plain(super().inputs)

    @inputs.setter
    def inputs(self, value: Any) -> None:
        assign(super().inputs, arguments(value))

    def _set(self, side: str, value: Any) -> None:
        here_now = self._side(side)
        if isinstance(here_now, Structure):
            assign(here_now, value)
        else:
            self._assign(side, value)


class SourceOperation(PlainSided, Operation):
    """A call or an assignment inside a forward."""

    def _inside(self, name: str) -> Source:
        return Operations(self._model, name)


class Operations(Source):
    """The operations inside a forward."""

    def _operation(self, name: str) -> Operation:
        return SourceOperation(self._model, name, self._known)


class Envoy(PlainSided, Module):
    """A module of the model, with nnsight's conventions: tuples are tuples, and `inputs` is `(args, kwargs)`."""

    _model: LanguageModel

    # --- values -------------------------------------------------------------------------------------------------------

    @property
    def _items(self) -> int:
        return self._catalogue.module(self._name).items

    @property
    def source(self) -> Operations:
        """What happens inside the module's forward, every call and every assignment."""
        return Operations(self._model, f"{self._name}.{SOURCE}" if self._name else SOURCE)

    def skip(self, value: Any) -> None:
        """Leave the module out: `value` is what it returns instead."""
        super().skip(value if not isinstance(value, Mapping) else tuple(value.values()))

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """The module, applied to a value; `hook` changes nothing: `output` is that of the forward pass, and what this
        returns is that of this call."""
        return super().__call__(*args, **kwargs)

    def next(self, step: int = 1) -> Envoy:
        """This module; from here on, sites are those of so many steps later."""
        current(f"{spell(self._name)}.next()", self._model)
        move(step)
        return self

    # --- the tree -----------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raw = self._catalogue.raw(self._name)
        target = self._model.aliases.get(raw or "", {}).get(name) if raw is not None else None
        if target is not None:
            return self._model._at(target)
        attached = self._model.attached.get((self._name if raw is None else raw, name))
        if attached is not None:
            return attached
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "inputs":
            object.__setattr__(self, name, value)
        elif isinstance(value, nn.Module):
            if self.find(name) is not None:
                raise SiteError(
                    f"`{spell(self._name)}.{name}` is a part of the model, which is on the server.",
                    hint="Set the module under another name, and assign what it returns to `output`.",
                    lines=here(),
                )
            self._model.attached[self.path, name] = Attached(value, f"{spell(self._name)}.{name}")
        else:
            super().__setattr__(name, value)

    def __getitem__(self, index: int | slice | str) -> Any:
        if isinstance(index, str):
            return getattr(self, index)
        return super().__getitem__(index)

    def find(self, name: str) -> Envoy | None:
        """The module of a name under this one, a number of a list among them; None if there is none."""
        raw = self._catalogue.raw(self._name)
        if raw is not None and name in self._model.aliases.get(raw, {}):
            return self._model._at(self._model.aliases[raw][name])
        child = self._child(name)
        return None if child is None else self._model._at(child)

    def get(self, path: str) -> Any:
        """What is at a path under this module: "transformer.h.0.mlp", "lm_head.output"."""
        found: Any = self
        for part in path.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        return found

    def named_modules(self) -> list[tuple[str, Envoy]]:
        """This module and all under it, with their paths."""
        own = self.path
        return [
            (f"{ROOT}.{path}" if path else ROOT, self._model._at(path))
            for path in self._catalogue.modules
            if not own or path == own or path.startswith(f"{own}.")
        ]

    def modules(self) -> list[Envoy]:
        """This module and all under it."""
        return [module for _, module in self.named_modules()]

    # --- what a torch module has --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The CPU, where values arrive; where the model runs is the worker's business."""
        return torch.device("cpu")

    def to(self, device: Any = None) -> Envoy:
        """This module: where it runs is the worker's business.

        Raises:
            InputError: a dtype is given.
        """
        if isinstance(device, torch.dtype):
            raise InputError(
                "The model's dtype was chosen where it was loaded.",
                hint="Write `save(dtype=…)` for what is sent, or load it in another dtype.",
                lines=here(),
            )
        return self

    cpu = cuda = to

    def eval(self) -> Envoy:
        """This module: models are always served as for evaluation."""
        return self

    def named_parameters(self) -> Iterator[tuple[str, Weight]]:
        """The parameters and buffers of this module and all under it, shared ones under each name.

        They have shapes and dtypes, and no numbers.
        """
        own = f"{self.path}." if self.path else ""
        for _, module in self.named_modules():
            for each in self._catalogue.modules[module.path].parameters:
                name = f"{module.path}.{each.name}" if module.path else each.name
                yield name.removeprefix(own), Weight.of(each.shape, each.dtype)

    def parameters(self) -> Iterator[Weight]:
        """As `named_parameters`, without their names."""
        for _, weight in self.named_parameters():
            yield weight


class Weight(Tensor):
    """A weight on the server: it has a shape, dtype and device, and no numbers here."""

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype) -> Weight:
        """One of a shape and dtype."""
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _KNOWN_OF_WEIGHTS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        if function == _TO and not isinstance(args[0], Weight):  # `mine.to(weight)`: its dtype and device count
            places = [
                each for arg in args[1:] for each in ((arg.device, arg.dtype) if isinstance(arg, Weight) else (arg,))
            ]
            return function(args[0], *places, **(kwargs or {}))
        raise GraphError(
            "The weight's numbers are on the server.",
            hint="Read it inside a block, as a value: `model.lm_head.weight`.",
            lines=here(),
        )

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> NoReturn:
        raise GraphError("The weight's numbers are on the server.", hint="Read it inside a block.", lines=here())

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<weight on the server, {list(self.shape)} {self.dtype}>"


_TO: Any = Tensor.to
_KNOWN_OF_WEIGHTS = frozenset(
    {"__get__", "size", "dim", "numel", "nelement", "element_size", "is_floating_point", "_parse_to"}
)


class Config(dict[str, Any]):
    """The model's configuration, its items also as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"The configuration has no `{name}`; it has {', '.join(sorted(self))}.")


class LanguageModel(Envoy, Model):
    """A language model as nnsight's class of the same name, on a Patchwire server or on this machine.

    Attributes:
        aliases: Other names of modules, by the path where they stand.
        attached: Modules of the user's own, by the path and name where they were set.
        generator: `generator.output`, the text that a generation ends with; `generator.streamer.output`, step by step.
    """

    aliases: Aliases
    attached: dict[tuple[str, str], Attached]
    generator: GeneratorOutput

    def __init__(
        self,
        model: Any,
        *,
        server: str | None = None,
        token: str | None = None,
        tls: bool | TLS = False,
        rename: Mapping[str, str | Sequence[str]] | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device_map: Any = None,
        dispatch: bool | None = None,
        tokenizer: Any = None,
        task: str = "text-generation",
        progress: bool = True,
    ) -> None:
        """
        Args:
            model: With a server, the model's name there; otherwise a hub id, a directory, a `.gguf` file or a loaded
                Hugging Face model.
            server: "host:port"; left out to run the model on this machine.
            token: The server's token, if it asks for one.
            tls: As for `patchwire.connect`.
            rename: Other names of modules: `{"transformer.h": "layers", "mlp": "feed_forward"}`.
            dtype: The element type of the weights; with a server, it must be the one in which they were loaded.
            torch_dtype: The same.
            device_map: Without a server, a device such as "cuda:0"; with one, ignored.
            dispatch: Ignored.
            tokenizer: Without a server, as for `patchwire.local`.
            task: "text-generation".
            progress: Whether to show progress bars.

        Raises:
            ModelNotFoundError: there is no such model.
            InputError: the model is there in another dtype, or the task is another.
        """
        if task != "text-generation":
            raise InputError(f"The task {task!r} is not known here.", hint="Only text-generation is.", lines=here())
        dtype = dtype or torch_dtype
        if server is not None:
            made = connect(server, token=token, tls=tls, progress=progress).model(model)
        else:
            options = {"dtype": dtype, "tokenizer": tokenizer, "device": _device(device_map)}
            made = local(model, progress=progress, **{name: each for name, each in options.items() if each is not None})
        super().__init__(made.connection, made._description, progress=progress)
        put = object.__setattr__
        put(self, "_made", made)  # an embedded server lives as long
        put(self, "attached", {})
        put(self, "generator", GeneratorOutput(self))
        put(self, "config", Config(self.config))
        put(self, "tokenizer", Tokenizer(made._description.tokenizer_json, self._texts, self.config))
        put(self, "dispatched", server is None)
        put(self, "aliases", aliases(rename or {}, self.catalogue, [each for each in dir(Envoy) if each[0] != "_"]))
        self._check_dtype(dtype)

    dispatched: bool
    """Whether the weights are in this process."""

    def _check_dtype(self, wanted: torch.dtype | None) -> None:
        there = next((each.dtype for _, each in self.named_parameters() if each.dtype.is_floating_point), None)
        if wanted is not None and there is not None and wanted is not there:
            raise InputError(f"{self.name} is loaded in {there}, not in {wanted}.", hint="Leave it out.", lines=here())

    def _at(self, name: str) -> Envoy:
        return Envoy(self, name) if name else self

    def module_of(self, which: Any) -> Envoy:
        """The module that is meant: itself, or its path, with or without "model." before it."""
        if isinstance(which, Envoy):
            return which
        path = str(which)
        for each in (path, path.removeprefix(f"{ROOT}.") if path != ROOT else ""):
            found: Envoy | None = self
            for part in each.split(".") if each else ():
                found = found.find(part) if found is not None else None
            if found is not None:
                return found
        raise SiteError(f"`{path}` is not a module of {self.name}.", hint=self.catalogue.suggestion(path), lines=here())

    # --- blocks -------------------------------------------------------------------------------------------------------

    def trace(self, *inputs: Any, **named: Any) -> Tracer:
        """A block that records one call of the model: `with model.trace("…") as tracer:`.

        Args:
            inputs: A prompt; left out if the block opens `tracer.invoke(…)`s.
            named: `input_ids`, `attention_mask`, `inputs_embeds` instead of it; `remote` and `backend` mean nothing.
        """
        return Tracer(self, prompt(inputs, self._meant(named)))

    def scan(self, *inputs: Any, **named: Any) -> Scan:
        """A block that is recorded and checked, and not run: what it saves has shapes and dtypes, and no numbers."""
        return Scan(self, prompt(inputs, self._meant(named)))

    def edit(self, *, inplace: bool = False, **named: Any) -> Editing:  # type: ignore[override]
        """A block whose interventions stay: with the model that it gives, or with this one.

        Args:
            inplace: Whether they stay with this model, until `clear_edits`.
            named: `prompt_only`, as for `Model.edit`; `remote` and `backend` mean nothing.
        """
        kept = {name: value for name, value in named.items() if name not in _ELSEWHERE}
        if unknown := set(kept) - {"prompt_only"}:
            raise InputError(
                f"An edit takes no {', '.join(sorted(unknown))}.",
                hint="It takes `inplace` and `prompt_only`.",
                lines=here(),
            )
        return Editing(self, inplace=inplace, prompt_only=bool(kept.get("prompt_only")))

    def clear_edits(self) -> None:
        """Forget the edits of this model."""
        self._edits.clear()

    @staticmethod
    def _meant(named: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in named.items() if name not in _ELSEWHERE}
        if kept.pop("max_new_tokens", None) is not None:
            warn("A trace is one forward pass: `max_new_tokens` means nothing. Write `model.generate(…)`.")
        return kept

    def generate(
        self,
        *inputs: Any,
        max_new_tokens: int = 20,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stream: bool | Callable[[list[int]], None] = False,
        **named: Any,
    ) -> Generator:
        """A block that records one generation: `with model.generate("…", max_new_tokens=3) as tracer:`.

        The arguments are those of `Model.generate`, whose `top_k` is Hugging Face's 50 here if it is left out.

        Raises:
            InputError: an argument of Hugging Face's `generate` is not among them.
        """
        named = {name: each for name, each in named.items() if name not in _ELSEWHERE}
        top_k = (_HUGGING_FACE_TOP_K if do_sample else 0) if top_k is None else top_k
        made = super().generate(
            prompt(inputs, named),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stream=stream,
        )
        return Generator(self, made._given, made._options, made._stream)

    def session(self, **named: Any) -> TensorSession:
        """A block of many traces that are sent as one request; `remote` means nothing."""
        if unknown := set(named) - _ELSEWHERE:
            raise InputError(f"A session takes no {', '.join(sorted(unknown))}.", hint="Leave it out.", lines=here())
        return TensorSession(self.connection, progress=self.progress)

    def __call__(self, *inputs: Any, hook: bool = False, **named: Any) -> Any:
        """Outside of a block, what the model returns for a prompt, as tensors."""
        if recording():
            return super().__call__(*inputs, hook=hook, **named)
        with self.trace(*inputs, **named):
            returned = save(self.output)
        return returned


def _device(device_map: Any) -> str | None:
    if isinstance(device_map, Mapping):
        device_map = next(iter(device_map.values()), None)
    return None if device_map in (None, "auto") else str(device_map)
