"""The operations that a graph may contain: one table, reviewed as a whole.

A worker evaluates what is listed here and nothing else. An operation is on the list if it is a pure function of tensors
and plain numbers: it touches no file, no network, no memory that is not its arguments', runs no code given to it, draws
random numbers only from a seed given in the graph, and makes a result whose size follows from its arguments' (sizes are
checked before anything runs).

Four kinds: a *pure* operation makes a new tensor, a *view* may share memory with its first argument, an *in-place* one
changes its first argument, and a *draw* makes a new tensor from a seed and plain numbers alone. Graphs have values, not
memory: a client records an in-place operation as an edited copy (`patchwire.graph.edit`), and what is true of PyTorch's
views stays true.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional

from patchwire import noise

Kind = Literal["pure", "view", "inplace", "draw"]


@dataclass(frozen=True)
class Operation:
    """One entry of the table."""

    name: str
    """Its name on the wire: "operator.add", "torch.softmax", "torch.Tensor.view"."""
    function: Callable[..., Any]
    """What computes it."""
    kind: Kind
    """Whether its result is new, may share memory with its first argument, is that argument, changed, or is drawn."""


_OPERATORS = """
    add sub mul truediv floordiv mod pow matmul neg abs invert and_ or_ xor lshift rshift
    eq ne lt le gt ge
"""
AUGMENTED_ASSIGNMENTS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
"""The operators behind `value += other` and its kin."""
_OPERATORS_INPLACE = f"{' '.join(AUGMENTED_ASSIGNMENTS)} setitem"
_OPERATORS_VIEW = "getitem pos"

_BOTH = """
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all amax amin aminmax angle any argmax
    argmin argsort argwhere asin asinh atan atan2 atanh baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor bmm
    bucketize ceil cholesky clamp clamp_max clamp_min clip clone copysign cos cosh count_nonzero cross
    cummax cummin cumprod cumsum deg2rad det diag diag_embed diff dist div divide dot eq erf erfc erfinv exp exp2
    expm1 fix flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac gather ge gcd greater greater_equal
    gt heaviside histc hypot index_add index_copy index_fill index_put index_select inner inverse isclose isfinite
    isinf isnan isneginf isposinf kthvalue lcm ldexp le lerp less less_equal lgamma log log10 log1p log2 log_softmax
    logaddexp logaddexp2 logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logsumexp lt
    masked_fill masked_scatter masked_select matmul matrix_exp max maximum mean median min minimum mm mode msort mul
    multiply mv nan_to_num nanmean nanmedian nanquantile nansum ne neg negative nextafter nonzero norm not_equal
    outer pinverse pow prod qr quantile rad2deg reciprocal relu remainder renorm repeat_interleave roll rot90 round
    rsqrt scatter scatter_add scatter_reduce searchsorted select_scatter sgn sigmoid sign signbit sin sinc sinh
    slice_scatter slogdet softmax sort sqrt square std sub subtract sum svd take take_along_dim tan tanh tile topk trace
    tril triu true_divide trunc unique var where xlogy
"""
_BOTH_VIEW = """
    broadcast_to chunk conj detach diagonal dsplit flatten hsplit imag movedim moveaxis narrow permute positive
    ravel real reshape resolve_conj select split squeeze
    swapaxes swapdims t tensor_split transpose unbind unflatten unsqueeze vsplit
"""
_TORCH_ONLY = """
    block_diag cat cdist chain_matmul column_stack
    complex concat concatenate cosine_similarity dstack full_like hstack isin kron ones_like polar
    stack std_mean tensordot vander var_mean vstack zeros_like
"""
_TORCH_VIEW = "atleast_1d atleast_2d atleast_3d cartesian_prod einsum meshgrid"
_METHODS_ONLY = "repeat new_full new_ones new_zeros"
_METHODS_VIEW = """
    bfloat16 bool byte contiguous double expand expand_as float half int long reshape_as short sum_to_size to type_as
    unfold view view_as
"""
_METHODS_INPLACE = """
    abs_ add_ addcdiv_ addcmul_ bitwise_and_ bitwise_or_ ceil_ clamp_ clamp_max_ clamp_min_ clip_ copy_ cos_ cumprod_
    cumsum_ div_ divide_ exp_ exp2_ fill_ fill_diagonal_ floor_ floor_divide_ fmod_ index_add_ index_copy_ index_fill_
    index_put_ lerp_ log_ log10_ log1p_ log2_ logical_not_ masked_fill_ masked_scatter_ mul_ multiply_ nan_to_num_ neg_
    pow_ reciprocal_ relu_ remainder_ round_ rsqrt_ scatter_ scatter_add_ scatter_reduce_ sigmoid_ sign_ sin_ sqrt_
    square_ sub_ subtract_ tanh_ tril_ triu_ trunc_ zero_
"""
_PROPERTIES_VIEW = "T mT H mH real imag"
_FUNCTIONAL = """
    celu cosine_similarity cross_entropy elu embedding gelu glu hardsigmoid hardswish hardtanh huber_loss kl_div l1_loss
    layer_norm leaky_relu linear log_softmax logsigmoid mish mse_loss nll_loss normalize one_hot pad pairwise_distance
    relu relu6 rms_norm selu sigmoid silu smooth_l1_loss softmax softmin softplus softshrink softsign tanh
"""
_LINALG = """
    cholesky cond cross det eig eigh eigvals eigvalsh inv matmul matrix_norm matrix_power matrix_rank
    multi_dot norm pinv qr slogdet solve svd svdvals vecdot vector_norm
"""
_LINALG_VIEW = "diagonal"
_FFT = "fft fft2 fftshift ifft ifft2 ifftshift irfft rfft"
_SPECIAL = "entr erf erfc expit expm1 log_softmax logit logsumexp softmax xlog1py xlogy"


DRAWS = "patchwire.random"
"""What the names of draws begin with."""

_SEEDED = "A graph draws random numbers only from a seed that is in it: write {}."
_MASK = "`value * patchwire.random.bernoulli(value, 1 - p, seed=0) / (1 - p)`"
_OTHERS = "what you need with `patchwire.random.normal` or `uniform`, or draw it before the block and use the tensor"
INSTEAD: Mapping[str, str] = {
    name: _SEEDED.format(written)
    for names, written in (
        ("randn_like normal normal_", "`patchwire.random.normal(value, seed=0)`"),
        ("rand_like uniform_", "`patchwire.random.uniform(value, seed=0)`"),
        ("bernoulli bernoulli_", "`patchwire.random.uniform(p, seed=0) < p`"),
        ("randint_like random_", "`patchwire.random.randint(value, low, high, seed=0)`"),
        ("dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout", _MASK),
        ("multinomial poisson exponential_ cauchy_ geometric_ log_normal_ rrelu rrelu_ gumbel_softmax", _OTHERS),
    )
    for name in names.split()
} | {"data": "Edit the value itself: `value[:] = …`."}
"""What to write instead of functions and methods of PyTorch, most of which draw from its global generator."""


class Property:
    """A property of tensors as a function, for the table."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, tensor: torch.Tensor) -> Any:
        return getattr(tensor, self.__name__)


def _table() -> dict[str, Operation]:
    table: dict[str, Operation] = {}

    def add(prefix: str, owner: Any, names: str, kind: Kind) -> None:
        for name in names.split():
            if (function := getattr(owner, name, None)) is not None:
                table[f"{prefix}.{name}"] = Operation(f"{prefix}.{name}", function, kind)

    add("operator", operator, _OPERATORS, "pure")
    add("operator", operator, _OPERATORS_INPLACE, "inplace")
    add("operator", operator, _OPERATORS_VIEW, "view")
    for prefix, owner in (("torch", torch), ("torch.Tensor", torch.Tensor)):
        add(prefix, owner, _BOTH, "pure")
        add(prefix, owner, _BOTH_VIEW, "view")
    add("torch", torch, _TORCH_ONLY, "pure")
    add("torch", torch, _TORCH_VIEW, "view")
    add("torch.Tensor", torch.Tensor, _METHODS_ONLY, "pure")
    add("torch.Tensor", torch.Tensor, _METHODS_VIEW, "view")
    add("torch.Tensor", torch.Tensor, _METHODS_INPLACE, "inplace")
    add("torch.nn.functional", torch.nn.functional, _FUNCTIONAL, "pure")
    add("torch.linalg", torch.linalg, _LINALG, "pure")
    add("torch.linalg", torch.linalg, _LINALG_VIEW, "view")
    add("torch.fft", torch.fft, _FFT, "pure")
    add("torch.special", torch.special, _SPECIAL, "pure")
    for name in _PROPERTIES_VIEW.split():
        table[f"torch.Tensor.{name}"] = Operation(f"torch.Tensor.{name}", Property(name), "view")
    for each in noise.FUNCTIONS:
        table[f"{DRAWS}.{each.__name__}"] = Operation(f"{DRAWS}.{each.__name__}", each, "draw")
    return table


OPERATIONS: Mapping[str, Operation] = _table()
"""Every operation, by its name on the wire."""

VERSION = hashlib.sha256("\n".join(sorted(OPERATIONS)).encode()).hexdigest()[:12]
"""Names the table's content; client and server compare theirs to explain a refused operation."""

DATA_DEPENDENT = frozenset(
    f"{prefix}.{name}"
    for prefix in ("torch", "torch.Tensor")
    for name in ("masked_select", "nonzero", "unique", "argwhere")
) | {"operator.getitem", "torch.where"}
"""Operations whose result's shape depends on values, and is never larger than a small multiple of their arguments'."""

FORBIDDEN_ARGUMENTS = frozenset(
    {"out", "inplace", "max_norm", "device", "pin_memory", "layout", "requires_grad", "generator"}
)
"""Arguments that no operation takes in a graph: they change an argument's memory, or say where a value lives."""


def _forbidden_positions() -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for operation in OPERATIONS.values():
        # Functions written in C take these by name only.
        if isinstance(operation.function, FunctionType):
            names = enumerate(inspect.signature(operation.function).parameters)
            found[operation.name] = {index: name for index, name in names if name in FORBIDDEN_ARGUMENTS}
    return found


_FORBIDDEN_POSITIONS = _forbidden_positions()


def forbidden_argument(operation: Operation, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The name of an argument that the operation takes in PyTorch and not in a graph, given by name or by position."""
    positions = _FORBIDDEN_POSITIONS.get(operation.name, {})
    if not positions and not kwargs and operation.name != "torch.Tensor.to":
        return None
    given = {positions[index]: value for index, value in enumerate(args) if index in positions}
    given |= {name: value for name, value in kwargs.items() if name in FORBIDDEN_ARGUMENTS}
    if operation.name == "torch.Tensor.to" and any(isinstance(value, str) for value in args):
        return "device"
    return next((name for name, value in given.items() if value is not None and value is not False), None)


def _by_function() -> dict[Any, Operation]:
    found: dict[Any, Operation] = {}
    for operation in OPERATIONS.values():
        found.setdefault(operation.function, operation)
    return found


_BY_FUNCTION = _by_function()
_DUNDERS = {
    f"__{name.strip('_')}__": OPERATIONS[f"operator.{name}"]
    for name in f"{_OPERATORS} {_OPERATORS_INPLACE} {_OPERATORS_VIEW}".split()
}


def of_function(function: Callable[..., Any]) -> Operation | None:
    """The operation that a function object is, if it is on the list."""
    try:
        return _BY_FUNCTION.get(function)
    except TypeError:  # an unhashable callable
        return None


def of_method(name: str) -> Operation | None:
    """The operation that a tensor's method, property or operator is, if it is on the list."""
    return OPERATIONS.get(f"torch.Tensor.{name}") or _DUNDERS.get(name)


def methods() -> Iterable[str]:
    """The names of the methods and properties on the list."""
    return [name.rsplit(".", 1)[-1] for name in OPERATIONS if name.startswith("torch.Tensor.")]
