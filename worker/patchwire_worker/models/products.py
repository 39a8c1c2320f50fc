"""Products with weights, by the faster of PyTorch's two libraries for them.

PyTorch multiplies float32 matrices on a CPU with MKL, which uses the wide instructions (AVX-512) of Intel's processors
only. oneDNN, which PyTorch brings as well, uses them on AMD's too, and there it is twice as fast, with the weights as
they lie in memory and errors of the same order. So during a pass, linear layers have a forward that calls it; the last
bits of what they give are others. A pass that is to be exact computes what Hugging Face does, to the last bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from patchwire.errors import ModelNotFoundError

AUTO, PYTORCH, ONEDNN = "auto", "pytorch", "onednn"
MATMULS = (AUTO, PYTORCH, ONEDNN)
_CPUINFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def is_faster() -> bool:
    """Whether oneDNN is the faster one here: on a processor that has wide instructions, and is not Intel's."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    amd = _CPUINFO.is_file() and "AuthenticAMD" in _CPUINFO.read_text()
    return is_there() and wide and amd and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def is_there() -> bool:
    """Whether this PyTorch has oneDNN."""
    return bool(torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))  # type: ignore[no-untyped-call]


def check(matmul: str) -> None:
    """Refuse what a server cannot be told.

    Raises:
        ModelNotFoundError: it is none of `MATMULS`, or this PyTorch lacks it.
    """
    if matmul not in MATMULS:
        raise ModelNotFoundError(f"`{matmul}` is no matmul.", hint=f"Write one of {', '.join(MATMULS)}.")
    if matmul == ONEDNN and not is_there():
        raise ModelNotFoundError("This PyTorch has no oneDNN.", hint=f'Write "{AUTO}".')


class Products:
    """The products of a model, while a pass runs."""

    def __init__(self, model: nn.Module, matmul: str) -> None:
        """
        Args:
            model: The model.
            matmul: One of `MATMULS`.
        """
        self._thread: int | None = None
        self._forwards = [
            (each.__dict__, MethodType(self._forward(type(each)), each))
            for each in model.modules()
            if type(each) in _WEIGHTS
            and "forward" not in each.__dict__
            and (matmul == ONEDNN or (matmul == AUTO and is_faster()))
        ]

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Have them computed by oneDNN, on this thread: on another one a model may be somebody else's."""
        self._thread = threading.get_ident()
        for slots, forward in self._forwards:
            slots["forward"] = forward
        try:
            yield
        finally:
            for slots, _ in self._forwards:
                slots.pop("forward", None)
            self._thread = None

    def _forward(self, kind: type[nn.Module]) -> Callable[[Any, Tensor], Tensor]:
        """The forward of one kind of module."""
        usual, weights = kind.forward, _WEIGHTS[kind]

        def forward(module: Any, *given: Tensor, **named: Tensor) -> Tensor:
            weight, bias = weights(module), module.bias
            own = threading.get_ident() == self._thread and len(given) == 1 and not named
            result: Tensor
            if own and _fits(given[0], weight, bias):
                result = _product(given[0], weight, bias)
            else:
                result = usual(module, *given, **named)
            return result

        return forward


class _Differentiable(torch.autograd.Function):
    """The product of a matrix, where gradients are wanted: they are products too, and so are gradients of these."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(weight, rows if of_weight else None)
        return _multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight, rows) = gradients, ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        fits = _fits(gradient, weight.t(), None)
        return (
            (_product if fits else functional.linear)(gradient, weight.t()) if of_rows else None,
            gradient.t() @ rows if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """States `[…, in]` times weights `[out, in]`."""
    rows = states.flatten(0, -2)
    count = rows.shape[0]
    more = _rounded(count) - count
    rows = functional.pad(rows, (0, 0, 0, more)) if more else rows.contiguous()
    given = (rows, weight) if bias is None else (rows, weight, bias)
    result: Tensor
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        result = _Differentiable.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    else:
        result = _multiply(rows, weight, bias)
    return result[:count].view(states.shape[:-1] + weight.shape[:1])


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def _rounded(count: int) -> int:
    """How many rows are computed, with some of zeros: at most an eighth more.

    oneDNN makes code for each number of rows (0.6 MiB, in 0.6 ms) and keeps it: prompts are of any length, and this way
    there are eight numbers between one power of two and the next.
    """
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


def _fits(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN can multiply them: plain float32 on the CPU.

    What else is wrong with them PyTorch says better; and of a bias that is not contiguous, oneDNN would take others.
    """
    given = (states, weight) if bias is None else (states, weight, bias)
    if not all(type(each) in _PLAIN and each.is_cpu and each.dtype is _DTYPE for each in given):
        return False
    if bias is not None and (not bias.is_contiguous() or bias.shape != weight.shape[:1]):
        return False
    return states.dim() > 1 and weight.dim() == _MATRIX and states.shape[-1] == weight.shape[-1] and states.numel() > 0


_PLAIN = frozenset({Tensor, nn.Parameter})
_DTYPE = torch.float32
_MATRIX = 2
_WEIGHTS: Mapping[type[nn.Module], Callable[[Any], Tensor]] = {
    nn.Linear: lambda module: module.weight,
    Conv1D: lambda module: module.weight.t(),
}
"""The weights `[out, in]` of each kind of module that is a product with them."""
