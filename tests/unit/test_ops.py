"""The allow-list: what it must never contain, and that each entry is what the table says it is."""

from __future__ import annotations

import contextlib
import inspect
import operator
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from patchwire import noise, ops
from patchwire.graph import same_storage

OPERATIONS = list(ops.OPERATIONS.values())

# Words that no operation's name may contain, whatever the table says: written down here independently of it.
NEVER = {
    "files": "load save fromfile from_file open read write path mmap untyped_storage storage share",
    "code": "eval exec compile script trace_ jit call apply import map_ hook register vmap func higher dispatch",
    "pickling": "pickle reduce_ex setstate getstate serialize",
    "devices": "cuda cpu xpu mps device pin_memory stream",
    "random numbers": "rand normal bernoulli multinomial dropout uniform exponential poisson seed generator geometric "
    "cauchy shuffle rrelu fractional",
    "Python objects": "item tolist numpy dlpack data_ptr from_blob frombuffer as_tensor attr dict",
    "raw memory": "as_strided set_ resize empty data detach_ requires_grad swap_ share_memory",
    "gradients and modes": "backward autograd grad no_ enable set_default",
}
# Words above that stand inside of harmless names.
HARMLESS = {
    "operator.truediv",
    "torch.normalize",
    "torch.nn.functional.normalize",
    "torch.Tensor.isposinf",
}


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, (tuple, list)) else []


@pytest.mark.parametrize("kind", NEVER)
def test_nothing_on_the_list_has_to_do_with(kind):
    wrong = [
        each.name
        for each in OPERATIONS
        if each.name not in HARMLESS
        and not (kind == "random numbers" and each.kind == "draw")
        and any(re.search(rf"(^|_){word}", each.name.rsplit(".", 1)[1]) for word in NEVER[kind].split())
    ]

    assert not wrong


def test_every_operation_is_the_function_that_its_name_says():
    owners = {
        "operator": operator,
        "torch": torch,
        "torch.Tensor": torch.Tensor,
        "torch.nn.functional": torch.nn.functional,
        "torch.linalg": torch.linalg,
        "torch.fft": torch.fft,
        "torch.special": torch.special,
        "patchwire.random": noise,
    }
    for operation in OPERATIONS:
        owner, _, name = operation.name.rpartition(".")
        assert callable(operation.function)
        if isinstance(operation.function, ops.Property):
            assert not callable(getattr(torch.zeros(2, 2, dtype=torch.complex64), name))
        else:
            assert operation.function is getattr(owners[owner], name)


def test_an_operation_changes_its_argument_if_and_only_if_its_name_says_so():
    names = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"]
    augmented = {f"operator.i{name}" for name in names}
    by_name = {
        each.name
        for each in OPERATIONS
        if each.name in augmented or each.name == "operator.setitem" or re.search(r"[^.]_$", each.name)
    } - {"operator.and_", "operator.or_"}

    assert {each.name for each in OPERATIONS if each.kind == "inplace"} == by_name


def test_no_operation_takes_memory_to_write_to_or_a_device():
    for operation in OPERATIONS:
        for name in ops.FORBIDDEN_ARGUMENTS:
            assert ops.forbidden_argument(operation, (), {name: True}) == name


@pytest.mark.parametrize("argument", ["out", "inplace", "max_norm", "device", "requires_grad", "generator"])
def test_an_argument_that_is_forbidden_by_name_is_forbidden_by_position(argument):
    missed = []
    for operation in OPERATIONS:
        if not inspect.isfunction(operation.function):
            continue
        names = list(inspect.signature(operation.function).parameters)
        if argument in names:
            args = [None] * names.index(argument) + [True]
            if ops.forbidden_argument(operation, args, {}) != argument:
                missed.append(operation.name)

    assert not missed


def test_the_value_that_leaves_a_forbidden_argument_out_is_fine():
    relu = ops.OPERATIONS["torch.nn.functional.relu"]

    assert ops.forbidden_argument(relu, (None,), {"inplace": False}) is None
    assert ops.forbidden_argument(ops.OPERATIONS["torch.norm"], (None,), {"out": None}) is None


def test_a_dtype_may_be_given_to_to_and_a_place_may_not():
    to = ops.OPERATIONS["torch.Tensor.to"]

    assert ops.forbidden_argument(to, (None, torch.float16), {}) is None
    assert ops.forbidden_argument(to, (None, "cuda:0"), {}) == "device"
    assert ops.forbidden_argument(to, (None, "meta"), {}) == "device"


# --- kinds, checked by running ----------------------------------------------------------------------------------------


def real(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5


def ids() -> Tensor:
    return torch.tensor([0, 1, 2, 3])


def mask() -> Tensor:
    return torch.tensor([True, False, True, False])


def square() -> Tensor:
    half = real(4, 4)
    return half @ half.T + 3 * torch.eye(4)


def index_like() -> Tensor:
    return ids().expand(4, 4).contiguous()


# Arguments of many forms: whatever an operation takes of them is used to see what it does to memory.
ARGUMENTS: list[Callable[[], tuple[Any, ...]]] = [
    lambda: (square(),),
    lambda: (real(4, 4), real(4, 4)),
    lambda: (real(4), real(4)),
    lambda: (real(4, 4), 1),
    lambda: (real(4, 4), 0, 0),
    lambda: (real(4, 4), 0, 0, 1),
    lambda: (real(4, 4), 2, 0, 1.0),
    lambda: (real(4, 4), (4, 4)),
    lambda: (real(4, 4), (4, 4), 1.0),
    lambda: (real(4, 4), 0, ids(), real(4, 4)),
    lambda: (real(4, 4), 0, ids()),
    lambda: (real(4, 4), 0, ids(), 1.0),
    lambda: (ids(),),
    lambda: (ids(), ids()),
    lambda: (ids(), 4),
    lambda: (real(4, 4), mask(), 1.0),
    lambda: (real(4, 4), real(4, 4), real(4, 4)),
    lambda: (mask(),),
    lambda: (mask(), mask()),
    lambda: (real(2, 4, 4), real(2, 4, 4)),
    lambda: (real(4, 4), real(2, 4, 4), real(2, 4, 4)),
    lambda: (real(2, 4, 4), real(2, 4, 4), real(2, 4, 4)),
    lambda: (real(4, 4), real(4), real(4)),
    lambda: (real(4), real(4, 4), real(4)),
    lambda: (real(4, 4), real(4)),
    lambda: (torch.complex(real(4, 4), real(4, 4)),),
    lambda: (real(4, 4), 0, index_like()),
    lambda: (real(4, 4), 0, index_like(), real(4, 4)),
    lambda: (real(4, 4), 0, index_like(), real(4, 4), "sum"),
    lambda: ([real(4, 4), real(4, 4)],),
    lambda: (real(4, 4), (1, 0)),
    lambda: (real(4, 4), mask()),
    lambda: (real(4, 4), mask().expand(4, 4)),
    lambda: (real(4, 4), mask().expand(4, 4), real(16)),
    lambda: (real(4, 4), (ids(),), real(4, 4)),
    lambda: ("ij,jk->ik", real(4, 4), real(4, 4)),
    lambda: ("ij->ji", real(4, 4)),
    lambda: (real(4, 4), torch.float64),
    lambda: (real(4, 4), torch.float32),
    lambda: (torch.tensor([[0, 1], [2, 3]]), real(4, 4)),
    lambda: (real(4, 4), [4]),
    lambda: (real(4, 4), ids()),
    lambda: (real(4, 4), 0, (2, 2)),
    lambda: (real(4, 4), 2, 0),
    lambda: (real(4, 4), 0, 2, 2),
    lambda: (real(4, 4), 0, 1, 1.0),
    lambda: (real(4, 8),),
    lambda: (real(4, 4), real(4), 0, 0),
    lambda: (torch.tensor(3.0), real(4)),
    lambda: (real(4, 4, 4), 0),
    lambda: (real(4, 4, 4), 2),
    lambda: (real(4, 4, 4),),
    lambda: (real(3, 3), real(3, 3)),
    lambda: (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.5])),
    lambda: (real(4, 4), slice(0, 2)),
    lambda: (real(4, 4), slice(0, 2), real(2, 4)),
    lambda: (real(4, 4), (1, 1)),
    lambda: (real(4, 4) - 1.0,),
    lambda: (torch.tensor([1.0, float("nan"), float("inf")]),),
    lambda: ((4, 4), 7),
    lambda: ((4, 4), [7, 8, 9, 10], torch.float16, [1, 2, 3, 4]),
    lambda: ((4, 4), 0.5, 7),
    lambda: ((4, 4), 2, 9, 7),
    lambda: (4, 7),
]


def share(ones: list[Tensor], others: list[Tensor]) -> bool:
    return any(same_storage(one, other) for one in ones for other in others)


def forms(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(each.shape, each.dtype) for each in tensors]


def fake(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return type(value)(fake(each) for each in value) if isinstance(value, (tuple, list)) else value


@dataclass
class Run:
    """What an operation did with one set of arguments."""

    changed: list[bool]
    """For each tensor among the arguments."""
    shares: list[bool]
    """For each result, whether it shares memory with an argument."""
    returns_first: bool
    """Whether a result is the first argument itself."""
    forms: list[tuple[torch.Size, torch.dtype]]
    """Of each result."""
    fake_forms: list[tuple[torch.Size, torch.dtype]] | None
    """The same on fakes; None if they cannot tell."""
    fake_shares: list[bool] | None
    """The same on fakes."""


def run(operation: ops.Operation, make: Callable[[], tuple[Any, ...]]) -> Run | None:
    args = make()
    if operation.kind != "draw" and not tensors_in(args):
        return None
    if ops.forbidden_argument(operation, args, {}):
        return None
    given = tensors_in(args)
    copies = [each.clone() for each in given]
    fakes = fake(args)
    given_fakes = tensors_in(fakes)

    def results(value: Any, tensors: list[Tensor]) -> list[Tensor]:
        return tensors[:1] if operation.name == "operator.setitem" else tensors_in(value)

    try:
        found = results(operation.function(*args), given)
    except Exception:  # it does not take these arguments
        return None
    if not found:
        return None
    changed = [not torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in zip(given, copies, strict=True)]
    done = Run(
        changed,
        [share([each], given) for each in found],
        any(each is one for each in found for one in given[:1]),
        forms(found),
        None,
        None,
    )
    with contextlib.suppress(NotImplementedError, RuntimeError):  # it depends on values
        place = {"device": "meta"} if operation.kind == "draw" else {}
        fake_found = results(operation.function(*fakes, **place), given_fakes)
        done.fake_forms = forms(fake_found)
        done.fake_shares = [share([each], given_fakes) for each in fake_found]
    return done


@pytest.fixture(scope="module")
def runs() -> dict[ops.Operation, list[Run]]:
    """What every operation did with the arguments that it takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            operation: [done for make in ARGUMENTS if (done := run(operation, make)) is not None]
            for operation in OPERATIONS
        }


def named(operations: Iterable[ops.Operation]) -> list[str]:
    return [each.name for each in operations]


def test_every_operation_takes_some_of_the_example_arguments(runs):
    assert not named(each for each, done in runs.items() if not done), "add arguments for these to ARGUMENTS"


def test_pure_operations_and_views_change_no_argument(runs):
    assert not named(
        each for each, done in runs.items() if each.kind != "inplace" and any(any(one.changed) for one in done)
    )


def test_the_result_of_a_pure_operation_shares_no_memory_with_its_arguments(runs):
    assert not named(
        each for each, done in runs.items() if each.kind == "pure" and any(any(one.shares) for one in done)
    )


def test_an_in_place_operation_returns_its_first_argument_and_changes_no_other(runs):
    assert not named(
        each
        for each, done in runs.items()
        if each.kind == "inplace" and not all(one.returns_first and not any(one.changed[1:]) for one in done)
    )


# Those that view their argument only if there is nothing to convert.
CONVERSIONS = {"bfloat16", "bool", "byte", "double", "half", "int", "long", "short"}


def test_a_draw_takes_no_tensor_and_makes_a_new_one(runs):
    draws = {each: done for each, done in runs.items() if each.kind == "draw"}

    assert {each.name for each in OPERATIONS if each.name.startswith("patchwire.")} == set(named(draws))
    assert not any(one.changed or any(one.shares) for done in draws.values() for one in done)


@pytest.mark.parametrize("name", [each.name for each in OPERATIONS if each.kind == "draw"])
def test_a_draw_follows_from_its_seed_alone(name):
    operation = ops.OPERATIONS[name]
    state = torch.get_rng_state()
    for make in ARGUMENTS:
        if not tensors_in(make()):
            with contextlib.suppress(ValueError, TypeError):  # arguments of another draw
                assert torch.equal(operation.function(*make()), operation.function(*make()))

    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


def test_a_view_shares_memory_with_an_argument_at_least_sometimes(runs):
    assert not named(
        each
        for each, done in runs.items()
        if each.kind == "view"
        and each.name.rsplit(".", 1)[1] not in CONVERSIONS
        and not any(any(one.shares) for one in done)
    )


@pytest.mark.parametrize("name", sorted(CONVERSIONS))
def test_a_conversion_that_converts_nothing_shares_memory(name):
    convert = ops.OPERATIONS[f"torch.Tensor.{name}"].function
    converted = convert(torch.ones(3))

    assert convert(converted) is converted


def test_fakes_tell_the_shapes_and_dtypes_of_the_real_results(runs):
    assert not named(
        each for each, done in runs.items() if any(one.fake_forms not in (None, one.forms) for one in done)
    )


def test_fakes_tell_which_results_share_memory(runs):
    assert not named(
        each for each, done in runs.items() if any(one.fake_shares not in (None, one.shares) for one in done)
    )


def test_every_operation_can_be_checked_on_fakes_unless_its_size_depends_on_values(runs):
    useless = named(each for each, done in runs.items() if all(one.fake_forms is None for one in done))

    assert set(useless) <= ops.DATA_DEPENDENT, "no graph can use these: their size is never known"


# --- look-ups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.softmax, "torch.softmax"),
        (operator.add, "operator.add"),
        (torch.nn.functional.gelu, "torch.nn.functional.gelu"),
        (torch.Tensor.add_, "torch.Tensor.add_"),
    ],
)
def test_a_function_is_found(function, name):
    assert ops.of_function(function).name == name


@pytest.mark.parametrize("function", [torch.load, torch.rand, eval, print, torch.save, torch.compile, [].append])
def test_a_function_that_is_not_on_the_list_is_not_found(function):
    assert ops.of_function(function) is None


def test_an_unhashable_callable_is_not_found():
    class Odd:
        __hash__ = None

        def __call__(self) -> None: ...

    assert ops.of_function(Odd()) is None


@pytest.mark.parametrize(
    ("method", "name"),
    [("softmax", "torch.Tensor.softmax"), ("__iadd__", "operator.iadd"), ("__getitem__", "operator.getitem")],
)
def test_a_method_or_operator_of_a_tensor_is_found(method, name):
    assert ops.of_method(method).name == name


@pytest.mark.parametrize("method", ["backward", "numpy", "cuda", "set_", "__class__", "__reduce_ex__", "map_"])
def test_a_method_that_is_not_on_the_list_is_not_found(method):
    assert ops.of_method(method) is None


def test_the_version_names_the_content_of_the_table():
    assert re.fullmatch(r"[0-9a-f]{12}", ops.VERSION)
