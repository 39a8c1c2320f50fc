"""What a model remembers of the tokens before, so that a pass over later ones need not compute them again.

That is the cache which it generates tokens with: keys and values of attention, states of convolutions and of SSMs. Here
it is of one row, is given to every row of a pass, and stays what it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from patchwire.sites import INPUT, OUTPUT, Location
from patchwire_worker.interleaving import SiteMediator

_SCAN = "mamba_selective_scan"
"""The function that begins at a state of zero, whatever it is that is remembered."""
ARGUMENTS = ("past_key_values", "cache_params")
"""What models call it."""


class Past(Cache):
    """What a model remembers of the tokens before, the same for as many rows as there are.

    Attributes:
        argument: What the model calls it.
        rows: How many rows the pass has now.
        length: How many tokens it remembers.
    """

    def __init__(
        self, argument: str, layers: Sequence[Any], length: int, scans: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """
        Args:
            argument: What the model calls it.
            layers: What each layer remembers, of one row.
            length: Of how many tokens.
            scans: The modules, by their paths, that scan from a state of zero, each with the number of its layer.
        """
        self.argument = argument
        self._scans = scans
        self.layers: list[Any] = list(layers)
        self.layer_class_to_replicate = None
        self.offloading = False
        self.rows = 1
        self.length = length

    def first(self, length: int) -> Past | None:
        """The same of the first tokens only; None if it does not say what it was after these."""
        layers = []
        for each in self.layers:
            if isinstance(each, LinearAttentionCacheLayerMixin):
                return None
            layer: Any = copy.copy(each)
            if isinstance(each, DynamicLayer) and each.is_initialized:
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
            if isinstance(each, DynamicSlidingWindowLayer):
                layer.cumulative_length = length
            layers.append(layer)
        return Past(self.argument, layers, length)

    def mediators(self) -> list[SiteMediator]:
        """What has to happen in a pass, so that scans go on from the state that is remembered."""
        found = []
        for path, layer in self._scans.items():
            given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def take(call: Any, given: list[Any] = given) -> Any:
                given.append(call)
                return call

            def add(result: Any, given: list[Any] = given, layer: int = layer) -> Any:
                args, kwargs = given.pop()
                more = _carried(self.layers[layer].recurrent_states[0], *args, **kwargs)
                output, *rest = result if isinstance(result, tuple) else (result,)
                output = output + more.to(output.dtype)
                return (output, *rest) if isinstance(result, tuple) else output

            found.append(SiteMediator(Location(path, INPUT, (f"{_SCAN}_0",)), take))
            found.append(SiteMediator(Location(path, OUTPUT, (f"{_SCAN}_0",)), add))
        return found

    def _for_all(self, tensor: Tensor) -> Tensor:
        return tensor.expand(self.rows, *tensor.shape[1:])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens it remembers."""
        return self.length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens before, and these."""
        layer = self.layers[layer_idx]
        keys, values = self._for_all(layer.keys), self._for_all(layer.values)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """What a convolution has seen, and these."""
        return torch.cat([self._for_all(self.layers[layer_idx].conv_states[state_idx]), conv_states], dim=-1)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """What a convolution has seen; a copy."""
        return self._for_all(self.layers[layer_idx].conv_states[state_idx]).clone()

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """The state after these tokens, which nobody asks for any more."""
        return recurrent_states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """The state after the tokens before; a copy."""
        return self._for_all(self.layers[layer_idx].recurrent_states[state_idx]).clone()


class Noting(DynamicCache):
    """Notes what a pass over whole rows remembers of the first tokens of some of them.

    To the model it is empty all the time, so that the pass is what it would be without. Only attention can be noted:
    of a state there is no more than the last.
    """

    def __init__(self, config: Any, rows: Mapping[tuple[int, ...], Mapping[int, int]]) -> None:
        """
        Args:
            config: The model's configuration.
            rows: The tokens, and which row begins with them: of so many rows, this one.
        """
        super().__init__(config=config)
        self.argument = ARGUMENTS[0]
        self._rows = rows
        self._noted = {tokens: DynamicCache(config=config) for tokens in rows}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note keys and values of a layer."""
        for tokens, cache in self._noted.items():
            row = self._rows[tokens][key_states.shape[0]]
            first = (slice(row, row + 1), slice(None), slice(len(tokens)))
            # A later pass needs the numbers alone: not what gradients of this one would keep.
            cache.update(key_states[first].detach(), value_states[first].detach(), layer_idx)
        return key_states, value_states

    def mediators(self) -> list[SiteMediator]:
        """Nothing has to happen in the pass."""
        return []

    def noted(self) -> dict[tuple[int, ...], Past]:
        """What it has noted of which tokens, if all layers have run."""
        return {
            tokens: Past(self.argument, cache.layers, len(tokens))
            for tokens, cache in self._noted.items()
            if cache.layers and all(getattr(layer, "is_initialized", False) for layer in cache.layers)
        }


def same_noted(past: Past, noted: Past, same: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether what was noted is what a model remembers.

    Args:
        past: What it remembers.
        noted: What was noted of the same tokens.
        same: Whether two tensors are the same.
    """
    if [*map(type, past.layers)] != [*map(type, noted.layers)]:
        return False
    kept = [(getattr(one, name), getattr(other, name)) for one, other in zip(past.layers, noted.layers, strict=True)
            for name in ("keys", "values")]  # fmt: skip
    return all(one.shape == other.shape and same(one, other) for one, other in kept)


def argument(module: nn.Module) -> str | None:
    """What a model calls what it remembers; None if it takes nothing of the kind."""
    taken = inspect.signature(type(module).forward).parameters
    return next((each for each in ARGUMENTS if each in taken), None) if "use_cache" in taken else None


@torch.no_grad()
def remember(module: nn.Module, ids: Tensor, options: dict[str, Any]) -> Past:
    """What a model remembers of the tokens `[1, seq]` of a row.

    Raises:
        ValueError: it remembers in a way of its own.
    """
    name = argument(module)
    below = getattr(module, "base_model", module)  # logits would be for nobody
    made = (below if argument(below) == name else module)(input_ids=ids, **{**options, "use_cache": True})
    filled = getattr(made, name) if name else None
    if name is None or not isinstance(filled, Cache):
        raise ValueError(f"{type(module).__name__} remembers in a way of its own")
    return Past(name, filled.layers, ids.shape[1], _scans(module))


def _scans(module: nn.Module) -> dict[str, int]:
    """The modules that call the scan which begins at zero, and the numbers of their layers."""
    return {
        path: each.layer_idx
        for path, each in module.named_modules()
        if isinstance(getattr(each, "layer_idx", None), int)
        and _SCAN in inspect.unwrap(type(each).forward).__code__.co_names
    }


def _carried(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *_: Any,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **__: Any,
) -> Tensor:
    """What a state `[1, channels, states]` before the first token adds to a scan's output `[batch, channels, seq]`.

    The scan is linear in it: at each token it has decayed by `exp(A Δ)` of those until then (Gu & Dao 2023, eq. 2).
    """
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    dt = functional.softplus(dt) if delta_softplus else dt
    decay = torch.exp(A[None, :, None, :] * dt.cumsum(dim=-1)[..., None])
    output = torch.einsum("bdsn,bns->bds", decay * state.to(decay.dtype)[:, :, None, :], C.to(decay.dtype))
    return output if z is None else output * functional.silu(z)
