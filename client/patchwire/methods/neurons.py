"""Neurons as memories: what a layer adds is a sum of value vectors, each with a coefficient for every token.

An MLP's output is `Σ m_i v_i + b`: m_i is what neuron i is after the activation, and v_i its row of the output
projection (Geva, Schuster, Berant and Levy 2021, "Transformer Feed-Forward Layers Are Key-Value Memories", section 2).
What an SSM adds has the same form, with a channel of `scan * gate_act` as the neuron. Both are read and set here under
one name, on every architecture that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.model import Model, Module


@dataclass(frozen=True)
class Neurons:
    """The neurons of a layer: where each part of `output = Σ m_i v_i + b` is."""

    coefficients: Callable[[Module], Any]
    """m, `[rows, tokens, neurons]`: what can be read, and set."""
    part: Callable[[Module], Module]
    """The module that has the value vectors, as `W_out` `[neurons, d_model]`, and b, if there is one, as `b_out`."""
    output: Callable[[Module], Any] | None = None
    """What they add up to, `[rows, tokens, d_model]`; None if the coefficients are a factor of m and not m itself."""

    def values(self, layer: Module) -> Any:
        """The value vectors, `[neurons, d_model]`."""
        return self.part(layer).W_out


NEURONS: Mapping[str, Neurons] = {
    "mlp": Neurons(lambda layer: layer.mlp.neurons, lambda layer: layer.mlp, lambda layer: layer.mlp.output),
    "ssm": Neurons(
        lambda layer: layer.ssm.out_proj.input, lambda layer: layer.ssm, lambda layer: layer.ssm.out_proj.output
    ),
    "scan": Neurons(lambda layer: layer.ssm.scan, lambda layer: layer.ssm),
    "gate": Neurons(lambda layer: layer.ssm.gate_act, lambda layer: layer.ssm),
}
"""By name: an MLP's neurons; the channels of an SSM, and of these the two factors."""


def neurons_of(layer: Module, kind: str | None = None) -> tuple[str, Neurons]:
    """The neurons of a layer, and their name.

    Args:
        layer: `model.layers[5]`.
        kind: One of `NEURONS`; "mlp" if left out, or "ssm" of a layer without an MLP.

    Raises:
        InputError: there are none of that name.
    """
    kind = kind or ("mlp" if hasattr(layer, "mlp") else "ssm")
    if kind not in NEURONS:
        raise InputError(f"There are no neurons “{kind}”; there are {', '.join(NEURONS)}.", lines=here())
    return kind, NEURONS[kind]


def layer_of(model: Model, layer: int) -> tuple[int, Module]:
    """A layer by its number, negative ones from the end; and the number from the beginning.

    Raises:
        InputError: there is none.
    """
    if not -model.num_layers <= layer < model.num_layers:
        raise InputError(f"The model has layers 0 to {model.num_layers - 1}, and no {layer}.", lines=here())
    index = layer % model.num_layers
    return index, model.layers[index]


def set_coefficients(
    layer: Module,
    neurons: Sequence[int],
    to: float | Tensor | Any,
    *,
    tokens: int | slice = slice(None),
    kind: str | None = None,
) -> None:
    """In a block of yours, set what some neurons of a layer are after the activation.

    Geva, Caciularu, Wang and Goldberg (2022), "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts
    in the Vocabulary Space", section 6. Their code sets what goes *into* the activation: 3 is nearly the same there,
    as GELU(3) = 2.996, and anything negative is not. Here `m_i` itself is set.

    Args:
        layer: `model.layers[5]`, in a trace, in a step of a generation, or in `model.edit()`.
        neurons: Which of its neurons.
        to: What they become: a number, or one for each neuron, `[neurons]`, or whatever else broadcasts to
            `[rows, tokens, neurons]`; 0 leaves their value vectors out.
        tokens: At which positions; a step of a generation has one.
        kind: As for `neurons_of`.

    Raises:
        InputError: there are no such neurons.
        SiteError: the layer does not have them.

    Example:
        >>> with model.generate("The park was", max_new_tokens=10) as gen:
        ...     for step in gen.all():
        ...         methods.set_coefficients(model.layers[5], [17, 202], 3.0)
        ...     tokens = gen.output.save()
    """
    _, found = neurons_of(layer, kind)
    coefficients = found.coefficients(layer)
    coefficients[:, tokens, chosen_of(neurons, coefficients.shape[-1])] = to


def scale_coefficients(
    layer: Module, neurons: Sequence[int], by: float | Tensor | Any, *, tokens: int | slice = slice(None),
    kind: str | None = None,
) -> None:  # fmt: skip
    """In a block of yours, multiply what some neurons of a layer are after the activation.

    Arguments and errors are those of `set_coefficients`; `by` is a factor, or one for each neuron.

    Example:
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     methods.scale_coefficients(model.layers[5], [17], 2.0, tokens=-1)
        ...     logits = model.logits.save()
    """
    _, found = neurons_of(layer, kind)
    coefficients = found.coefficients(layer)
    coefficients[:, tokens, chosen_of(neurons, coefficients.shape[-1])] *= by


def chosen_of(neurons: Sequence[int], count: int) -> list[int]:
    """The numbers of neurons.

    Raises:
        InputError: there are no such.
    """
    found = [int(each) for each in neurons]
    if not found or not all(0 <= each < count for each in found):
        raise InputError(f"{found} are no neurons of a layer that has 0 to {count - 1}.", lines=here())
    return found
