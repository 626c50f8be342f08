"""Running ops on meta tensors fast: an op met before on the same shapes needs no shape function, whichever
step met it.

Many of torch's shape functions are Python and take a millisecond; a step at full scale has a million ops.
"""

from typing import Any

import torch
from torch import Tensor

from mopexec.measure.torch_dispatch import returns_alias, writes

_Output = tuple[torch.Size, tuple[int, ...], torch.dtype]
IN_PLACE, CACHED, NOTHING, RUN = "", "cached", "nothing", "run"
UNSAFE_VIEW = "aten::_unsafe_view"
_UNCACHED = frozenset(("aten::resize_", "aten::resize_as_", "aten::set_", UNSAFE_VIEW))
"""Ops on storage that is there; of the last the schema does not say so."""
_SAID = ("aten", "mop")
"""Namespaces of ops whose schemas say what their results are."""
_FILLED = (*_SAID, "fsdp")
"""And of ops that write to tensors which are there, if they return nothing."""
MOST = 100_000
"""Results that are known at a time."""
_HOW: dict[Any, str] = {}
_OUTPUTS: dict[Any, _Output | list[_Output]] = {}


class ShapeCache:
    """Called instead of an op on meta tensors. Ops that write into an argument just return it."""

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        how = _HOW.get(func)
        if how is None:
            how = _HOW[func] = how_run(func)
        if how == IN_PLACE:
            return args[0]
        if how == NOTHING:
            return None
        if how == RUN:
            return func(*args, **kwargs) if kwargs else func(*args)
        if how != CACHED:
            return kwargs[how]
        key = (func, key_of(args), key_of(tuple(kwargs.items())) if kwargs else None)
        known = _OUTPUTS.get(key)
        if known is None:
            result = func(*args, **kwargs) if kwargs else func(*args)
            self._remember(key, result)
            return result
        if isinstance(known, list):
            return tuple(_make(output) for output in known)
        return _make(known)

    def _remember(self, key: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            keep(_OUTPUTS, key, _output(result))
        elif isinstance(result, tuple) and all(isinstance(value, Tensor) for value in result):
            keep(_OUTPUTS, key, [_output(value) for value in result])


def keep(outputs: dict[Any, Any], key: Any, found: Any) -> None:
    """Remember a result beside MOST others at most."""
    if len(outputs) >= MOST:
        outputs.clear()
    outputs[key] = found


def how_run(func: Any) -> str:
    """In place: the first argument is the only result. Cached: fresh tensors that depend on shapes alone.
    Nothing: no result, and all that is written is there.

    Otherwise the name of the keyword (`out`) whose tensor is the result; it is taken to have the right shape.
    """
    returns, mutates = func._schema.returns, writes(func)
    if func.namespace in _FILLED and mutates and not returns:
        return NOTHING
    if func.namespace not in _SAID or func._schema.name in _UNCACHED:
        return RUN
    fresh = all(str(value.type) == "Tensor" and value.alias_info is None for value in returns)
    if not mutates or func.namespace == "mop":
        return CACHED if fresh and returns and not returns_alias(func) else RUN
    written = [
        arg for arg in func._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write
    ]
    if len(returns) != 1 or len(written) != 1 or str(written[0].type) != "Tensor":
        return RUN
    return (
        str(written[0].name)
        if written[0].kwarg_only
        else IN_PLACE
        if written[0].name == func._schema.arguments[0].name
        else RUN
    )


def key_of(value: Any) -> Any:
    """What an output's shape can depend on. Numbers carry their type: 1, 1.0 and True promote differently."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple([key_of(item) for item in value])
    return value.__class__, value


def _output(tensor: Tensor) -> _Output:
    return tensor.shape, tensor.stride(), tensor.dtype


def _make(output: _Output) -> Tensor:
    return torch.empty_strided(output[0], output[1], dtype=output[2], device="meta")
