"""Places of a layer that experiments name: the same words for attention and for an SSM.

`resid` is the residual stream after a layer, `mixer` what its attention or SSM gives, `mlp` what its MLP gives; `scan`
and `gate` are an SSM's own (the output of the selective scan, and what it is multiplied with).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from patchwire.errors import InputError, here
from patchwire.model import Model, Module

Place = str

PLACES: Mapping[Place, Callable[[Module], Any]] = {
    "resid": lambda layer: layer.output,
    "mixer": lambda layer: layer.mixer.output,
    "mlp": lambda layer: layer.mlp.output,
    "scan": lambda layer: layer.mixer.scan,
    "gate": lambda layer: layer.mixer.gate_act,
}
"""By name: the value `[rows, tokens, width]` of a layer."""


def value_of(layer: Module, place: Place) -> Any:
    """The value of a layer at a place, to be read or written at indices.

    Raises:
        InputError: there is no place of that name.
        SiteError: the model has nothing there.
    """
    if place not in PLACES:
        raise InputError(f"There is no place “{place}”; there are {', '.join(PLACES)}.", lines=here())
    return PLACES[place](layer)


def window_around(model: Model, layer: int, size: int) -> range:
    """The layers of a window around one: `[layer - size // 2, layer + (size + 1) // 2)`, clipped.

    Raises:
        InputError: it would have none.
    """
    if size < 1:
        raise InputError(f"A window has at least one layer, not {size}.", lines=here())
    return range(max(0, layer - size // 2), min(model.num_layers, layer + (size + 1) // 2))
