"""Pieces of parameters: every cut of a flat order as few boxes, written and read back under any other cut."""

import math
import random
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.flat.state import by_parameter
from mopexec.flat.units import Contents, Unit
from mopexec.modules.slices import Block, part_of, pieces
from mopexec.run import checkpoint_reader
from mopexec.run.shards import ParameterPieces, boxes
from mopexec.run.state import check_format, run_state
from mopsim.common.errors import MopError
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Precision
from mopsim.spec.training import TrainSpec
from tests.plans import plan_of, split

SHAPE = (4, 6, 8)
CPU = Platform(torch.device("cpu"))


def assembled(held: list[ParameterPieces]) -> Tensor:
    """The parameter of all ranks' pieces, each element in one of them."""
    found, times = torch.zeros(held[0].whole), torch.zeros(held[0].whole)
    for own in held:
        for first, values in own.pieces.items():
            box = tuple(slice(at, at + n) for at, n in zip(first, values.shape, strict=True))
            found[box] = values
            times[box] += 1
    assert torch.all(times == 1)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_an_interval_of_a_block_is_few_boxes(seed: int) -> None:
    draw = random.Random(seed)
    size = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
    whole = tuple(n + draw.randint(0, 2) for n in size)
    first = tuple(draw.randint(0, w - n) for w, n in zip(whole, size, strict=True))
    full = torch.arange(float(math.prod(whole))).view(whole)
    flat = full[tuple(slice(at, at + n) for at, n in zip(first, size, strict=True))].flatten()
    cuts = sorted({0, flat.numel(), *(draw.randint(0, flat.numel()) for _ in range(3))})
    for start, stop in pairwise(cuts):
        mine = flat[start:stop]
        found = list(boxes(mine, start, size, first))
        assert len(found) <= 2 * len(size) - 1
        for one in found:
            box = tuple(slice(at, at + n) for at, n in zip(one.first, one.values.shape, strict=True))
            assert torch.equal(full[box], one.values)
        assert sum(one.values.numel() for one in found) == mine.numel()
        for (place,), run in ParameterPieces.of(found, whole, mine).in_flat_order().pieces.items():
            assert torch.equal(full.view(-1)[place : place + run.numel()], run)
            run.zero_()
        assert not mine.any(), "another memory than the buffer's"


def by_module(full: Tensor, tensor: int, shards: int) -> list[ParameterPieces]:
    """Slices of the last dimension, each sharded in its first (FSDP2) as far as it goes."""
    width = SHAPE[2] // tensor
    found = []
    for place in range(tensor):
        block = Block("split", SHAPE, (0, 0, place * width), (*SHAPE[:2], width))
        for shard in range(shards):
            part = part_of(block, 0, Group(tuple(range(shards)), shard, None))
            box = tuple(slice(at, at + n) for at, n in zip(part.start, part.size, strict=True))
            found.append(pieces(part, full[box].contiguous()))
    return found


def by_buffer(full: Tensor, tensor: int, shards: int) -> list[ParameterPieces]:
    """The same slices, each sharded in its flat order (ZeRO-1)."""
    width, found = SHAPE[2] // tensor, []
    for place in range(tensor):
        block = Block("split", SHAPE, (0, 0, place * width), (*SHAPE[:2], width))
        flat = full[..., place * width : (place + 1) * width].flatten()
        size = -(-flat.numel() // shards)
        found += [
            pieces(block, flat[start : start + size].clone(), start) for start in range(0, flat.numel(), size)
        ]
    return found


def by_unit(full: Tensor, spread: int, shards: int) -> list[ParameterPieces]:
    """Experts over `spread` ranks, expert by expert beside another parameter, sharded in that order."""
    local, found = SHAPE[0] // spread, []
    for place in range(spread):
        names = (("bias", (5,)), ("weight", SHAPE[1:]))
        contents = Contents("experts", names, "", local, place * local, SHAPE[0])
        for shard in range(shards):
            group = Group(tuple(range(shards)), shard, None)
            unit = Unit(contents, group, Group((0,), 0, None), FP32, CPU)
            order = torch.cat((torch.full((local, 5), -1.0), full.flatten(1)[unit_rows(contents)]), 1)
            unit.params.zero_()
            unit.params[: unit.valid] = order.flatten()[unit.start : unit.start + unit.valid]
            found.append(by_parameter(unit, unit.params)["weight"])
    return found


def unit_rows(contents: Contents) -> slice:
    return slice(contents.first, contents.first + contents.stack)


FP32 = Precision(compute="float32", param="float32", reduce="float32", grad="float32", master="param")
WAYS = {
    "whole": lambda full: by_module(full, 1, 1),
    "inner slices": lambda full: by_module(full, 2, 1),
    "inner slices, FSDP2 over 3": lambda full: by_module(full, 4, 3),
    "inner slices, ZeRO-1 over 5": lambda full: by_buffer(full, 2, 5),
    "ZeRO-1 over 7": lambda full: by_buffer(full, 1, 7),
    "experts": lambda full: by_unit(full, 2, 1),
    "experts, over 3": lambda full: by_unit(full, 1, 3),
    "experts, over 2": lambda full: by_unit(full, 2, 2),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@pytest.mark.parametrize("flat", [False, True], ids=["boxes", "intervals"])
@pytest.mark.parametrize("written", WAYS)
def test_what_is_written_one_way_is_read_in_every_other(written: str, flat: bool, tmp_path: Path) -> None:
    """intervals: as format 2 has it."""
    full = torch.arange(1.0, math.prod(SHAPE) + 1).view(SHAPE)
    held = WAYS[written](full)
    assert torch.equal(assembled(held), full)
    merged = {first: values for own in held for first, values in own.pieces.items()}
    own = held[0]
    own.pieces = merged
    state = {"weight": own.in_flat_order() if flat else own}
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    for way in WAYS.values():
        found = way(torch.zeros(SHAPE))
        for one in found:
            checkpoint_reader.read(tmp_path, {"weight": one}, alone=True)
        assert torch.equal(assembled(found), full)


def test_experts_of_a_rank_are_one_piece() -> None:
    (own,) = by_unit(torch.rand(SHAPE), 1, 1)
    assert [tuple(values.shape) for values in own.pieces.values()] == [SHAPE]


def test_an_earlier_format_goes_on_and_a_later_is_refused() -> None:
    plan = plan_of(load_model("tiny"), split(1), TrainSpec(seq_len=8, global_batch=2))
    state = run_state(plan, 1, 0, "t")
    check_format(msgspec.structs.replace(state, format=2), Path("c"), "--resume")
    with pytest.raises(MopError, match=r"a later version of mopexec \(format 4, where this one's is 3\)"):
        check_format(msgspec.structs.replace(state, format=4), Path("c"), "--resume")
