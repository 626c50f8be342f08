"""Training state as intervals of flat tensors that no sharding changes, so a checkpoint loads at another
world size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from mopexec.flat.optimizer import FlatAdamW
from mopexec.flat.units import Unit


class FlatShard(Tensor):
    """Interval [start, start + len) of a flat tensor of `total` elements, as torch.distributed.checkpoint's
    protocol.

    A tensor only because the checkpoint code asks for one: use `plain` for values. `size()` is that of the
    whole.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    plain: Tensor
    start: int
    total: int

    @staticmethod
    def of(plain: Tensor, start: int, total: int) -> "FlatShard":
        """The shard whose values are `plain` [n]; loading writes them in place."""
        shard: FlatShard = torch.Tensor._make_subclass(FlatShard, plain)
        shard.plain, shard.start, shard.total = plain, start, total
        return shard

    def size(self, dim: int | None = None) -> Any:
        whole = torch.Size([self.total])
        return whole if dim is None else whole[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        numel = self.plain.numel()
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([numel]))] if numel else []

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.plain)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, _index: MetadataIndex) -> Tensor:
        return self.plain


def state_dict(optimizer: FlatAdamW, balance_bias: Tensor) -> dict[str, Any]:
    """Parameters, master weights and moments by unit; the routers' biases; the number of updates done."""
    optimizer.platform.synchronize()
    found: dict[str, Any] = {"step": torch.tensor(optimizer.step_number), "balance_bias": balance_bias}
    for unit, state in zip(optimizer.units, optimizer.states, strict=True):
        parts = {"param": unit.params, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        if state.master is not None:
            parts["master"] = state.master
        for name, value in parts.items():
            found[f"{unit.contents.key}.{name}"] = _shard(unit, value)
    return found


def load_state_dict(optimizer: FlatAdamW, state: dict[str, Any]) -> None:
    """Take what loading did not fill in place: the step count."""
    optimizer.step_number = int(state["step"])


def _shard(unit: Unit, value: Tensor) -> FlatShard:
    return FlatShard.of(
        value[: unit.valid], unit.contents.global_start + unit.start, unit.contents.global_numel
    )
