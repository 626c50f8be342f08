"""What the dispatch modes share: telling plain tensors from wrappers, walking arguments, reading schemas."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_PLAIN: dict[type, bool] = {}
_DEVICE = torch.ops.prim.device.default


class EagerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode under which nothing is compiled, by torch's own switch: without it each dispatch goes
    through a wrapper, and the first one imports torch's compiler, which takes a second and more. entered: how
    many are on."""

    entered = 0

    def __enter__(self) -> Self:
        EagerMode.entered += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        EagerMode.entered -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def device_read(func: Any, args: Any) -> torch.device | None:
    """The device of the fake tensor of which `func` reads it, as torch's fake mode tells it; None for another
    op. These reads are dispatched as ops are, and as many as a third of them."""
    if func is not _DEVICE or type(args[0]) is not FakeTensor:
        return None
    inside: bool = args[0].fake_mode.in_kernel_invocation
    return torch.device("meta") if inside else args[0].fake_device


def plain_types(types: Sequence[type]) -> bool:
    """Whether an op works on the storage of its arguments itself; False if a wrapper (DTensor) does it."""
    for kind in types:
        known = _PLAIN.get(kind)
        if known is None:
            own = getattr(kind, "__torch_dispatch__", None)
            known = issubclass(kind, FakeTensor) or own is torch._C._disabled_torch_dispatch_impl
            _PLAIN[kind] = known
        if not known:
            return False
    return True


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors inside a wrapper subclass (DTensor), or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, FakeTensor):
        return [
            inner for name in tensor.__tensor_flatten__()[0] for inner in plain_tensors(getattr(tensor, name))
        ]
    return [tensor]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among an op's arguments or results: bare, in lists, or in lists of lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from tensors_in(value)


@cache
def returns_alias(func: Any) -> bool:
    """Whether every result of an op is a view of, or is, one of its arguments (so it allocates nothing)."""
    return all(value.alias_info is not None for value in func._schema.returns)


@cache
def writes(func: Any) -> bool:
    """Whether an op writes to one of its arguments."""
    return bool(func._schema.is_mutable)
