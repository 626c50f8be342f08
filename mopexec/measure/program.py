"""The ops of a step in the order in which they were played, for comparison with another program's."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from mopexec.measure.scope import NOW
from mopexec.measure.torch_dispatch import EagerMode, plain_types, tensors_in

_Op = tuple[str, str, str, tuple[str, ...], tuple[str, ...], int]


class PlayedOps(EagerMode):
    """Writes down every op below autograd while entered; what is alike is written once.

    Entered after a tracker it sees the ops that this counts, before it does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places: dict[_Op, int] = {}
        self._order: list[int] = []
        self._built = 0

    def begin_step(self) -> None:
        """What was played so far built the state."""
        self._built = len(self._order)

    def to_json(self) -> dict[str, Any]:
        """The keys of `mopexec dry-run --program`.

        ops: each distinct op once: its name in torch, component and phase, tensors in and out as
        dtype[dimensions], FLOP where torch has a formula for it, else 0, and how often it was played. order:
        what was played, by place in `ops`; the first num_build_ops of it built the state, the others are one
        step.
        """
        counts = [0] * len(self._places)
        for place in self._order:
            counts[place] += 1
        names = ("op", "component", "phase", "inputs", "outputs", "flops")
        return {
            "num_ops": len(self._order),
            "num_build_ops": self._built,
            "ops": [
                dict(zip(names, op, strict=True)) | {"count": count}
                for op, count in zip(self._places, counts, strict=True)
            ],
            "order": self._order,
        }

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if not plain_types(types):
            return NotImplemented
        if NOW.uncounted:
            return func(*args, **(kwargs or {}))
        given = (*args, *kwargs.values()) if kwargs else args
        inputs = _tensors(given)
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        flops = int(count(*args, **(kwargs or {}), out_val=result)) if count else 0
        op = (str(func), NOW.component, NOW.phase, inputs, _tensors((result,)), flops)
        self._order.append(self._places.setdefault(op, len(self._places)))
        return result


def _tensors(values: Any) -> tuple[str, ...]:
    return tuple(_shape(one) for one in tensors_in(values))


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"
