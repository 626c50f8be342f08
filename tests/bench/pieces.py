"""How many pieces a checkpoint has and what they cost: `pieces.py OUT` writes OUT/pieces.md and pieces.json.

The layout of every rank of a plan is made on meta tensors, without process groups; torch's own planner checks
that the pieces of all ranks cover every parameter once. CPU seconds are a process's, whatever else runs.
"""

import gc
import math
import pickle
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from msgspec.structs import replace
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save

from mopexec.distributed import mesh as meshes
from mopexec.distributed.tiers import Platform
from mopexec.flat.contents import layer_contents, outer_contents
from mopexec.flat.state import by_parameter
from mopexec.flat.units import Unit
from mopexec.model import Transformer
from mopexec.modules.slices import block_of, part_of, pieces
from mopexec.modules.zero1 import buffers_of
from mopexec.run.checkpoint_reader import read
from mopexec.run.shards import ParameterPieces, Piece, Place
from mopsim import strategies
from mopsim.common import io
from mopsim.common.io import write_text
from mopsim.spec import layout
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy

MODEL, WORLD, KINDS = "qwen3_30b_a3b", 64, 3
META = Platform(torch.device("meta"), fake=True)
PLANNED = "fully_shard, TP2 EP8"
Held = dict[str, ParameterPieces]


def _mesh(strategy: Strategy, rank: int) -> meshes.Mesh:
    """A rank's mesh without process groups."""
    alone = SimpleNamespace(get_rank=lambda: rank, get_world_size=lambda: strategy.world_size)
    with (
        mock.patch.object(meshes, "dist", alone),
        mock.patch.object(meshes._MeshGroups, "_handle", return_value=None),
    ):
        return meshes.build_mesh(strategy, META)


def _flat(spec: ModelSpec, strategy: Strategy, mesh: meshes.Mesh) -> Iterator[Held]:
    dense = (mesh.dense_shard, mesh.dense_replicas)
    rows = layout.interval(spec.vocab_size, strategy.vocabulary.vocab_parallel, mesh.ring.place)
    outer = outer_contents(spec, rows).values()
    units = [(one, dense if one.rows is None else (mesh.ring_shard, mesh.alone)) for one in outer]
    for layer in range(spec.num_hidden_layers):
        own, experts = layer_contents(spec, layer, strategy.experts.expert_parallel, mesh.experts.place)
        units.append((own, dense))
        if experts is not None:
            units.append((experts, (mesh.expert_shard, mesh.expert_replicas)))
    for contents, groups in units:
        unit = Unit(contents, *groups, strategy.precision, META)
        yield by_parameter(unit, unit.params)


def _fully_sharded(spec: ModelSpec, strategy: Strategy, mesh: meshes.Mesh) -> Iterator[Held]:
    for name, shape in _shapes(spec).items():
        block, dim, group = block_of(name, shape, mesh), 0, mesh.dense_shard
        if block.kind == "experts":
            dim, group = layout.even_dim(block.size, strategy.experts.expert_fsdp), mesh.expert_shard
        part = part_of(block, dim, group)
        yield {name: pieces(part, torch.empty(part.size, device="meta"))}


def _split(spec: ModelSpec, strategy: Strategy, mesh: meshes.Mesh) -> Iterator[Held]:
    blocks = {name: block_of(name, shape, mesh) for name, shape in _shapes(spec).items()}
    strategy = load_stack("mopexec-split").resolve(replace(strategy, stack="mopexec-split"))
    network: Any = SimpleNamespace(blocks=blocks, model=SimpleNamespace(unreached=list))
    for buffer in buffers_of(network, strategy.precision, mesh, META).all:
        yield {name: buffer.pieces(name, buffer.part(buffer.values)) for name in buffer.blocks}


def _shapes(spec: ModelSpec) -> dict[str, Place]:
    return {name: tuple(p.shape) for name, p in _network(spec).items()}


_made: dict[str, dict[str, torch.Tensor]] = {}


def _network(spec: ModelSpec) -> dict[str, torch.Tensor]:
    if spec.name not in _made:
        _made[spec.name] = dict(Transformer(spec, torch.bfloat16, "meta").named_parameters())
    return _made[spec.name]


Layout = Callable[[ModelSpec, Strategy, meshes.Mesh], Iterator[Held]]
fsdp2, megatron = strategies.fsdp2, strategies.megatron
CASES: dict[str, tuple[Layout, Strategy]] = {
    "flat_units, EP8": (_flat, strategies.mop(WORLD, expert_parallel=8)),
    "flat_units, EP8, ring loss over 8": (_flat, strategies.mop(WORLD, expert_parallel=8, vocab_parallel=8)),
} | {
    f"{runtime}, {label}": (of, make(WORLD, expert_parallel=8, **degrees))
    for runtime, of, make in (
        ("fully_shard", _fully_sharded, fsdp2), ("split_modules", _split, megatron),
    )
    for label, degrees in {
        "EP8": {}, "TP2 EP8": {"tensor_parallel": 2}, "TP4 EP8": {"tensor_parallel": 4},
        "TP2 EP8 ETP2": {"tensor_parallel": 2, "expert_tensor_parallel": 2},
    }.items()
}  # fmt: skip


def intervals(held: ParameterPieces) -> int:
    """Pieces of the flat order (format 2) of the same memory."""
    found, end = 0, -1
    for first, values in held.pieces.items():
        size, whole = tuple(values.shape), held.whole
        cut = max((dim for dim in range(len(whole)) if size[dim] != whole[dim]), default=0)
        runs = math.prod(size[:cut]) if values.is_contiguous() else size[0] * math.prod(size[1:cut])
        last = [at + count - 1 for at, count in zip(first, size, strict=True)]
        found += runs - (_place(first, whole) == end)
        end = _place(last, whole) + 1
    return found


def _place(element: Any, shape: Place) -> int:
    place = 0
    for at, count in zip(element, shape, strict=True):
        place = place * count + at
    return place


def _counted(held: Mapping[str, ParameterPieces]) -> tuple[int, int]:
    return sum(map(intervals, held.values())), sum(len(own.pieces) for own in held.values())


def _layout(name: str) -> list[Held]:
    """By rank, what it holds of each parameter."""
    of, strategy = CASES[name]
    spec = load_model(MODEL)
    ranks = range(WORLD)
    return [{k: v for some in of(spec, strategy, _mesh(strategy, r)) for k, v in some.items()} for r in ranks]


def plan_cost(ranks: list[Held], *, flat: bool = False) -> dict[str, float]:
    """What planning costs: CPU seconds of a rank's own plan (median), of all plans through pickle to the rank
    that joins them, and of the join; bytes of the plans and of the tensors' part of `.metadata`.
    """
    gc.collect()
    gc.freeze()  # a rank has no layout but its own
    own: list[float] = []
    plans: list[SavePlan] = []
    for held in ranks:
        begin = time.process_time()
        state = {
            f"{name}.{kind}": pieces.in_flat_order() if flat else pieces
            for kind in range(KINDS)
            for name, pieces in held.items()
        }
        plans.append(create_default_local_save_plan(state, is_coordinator=False))
        own.append(time.process_time() - begin)
    begin = time.process_time()
    sent = [pickle.dumps(plan) for plan in plans]
    plans = [pickle.loads(plan) for plan in sent]
    travel, begin = time.process_time() - begin, time.process_time()
    joined, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    return {
        "pieces": sum(len(plan.items) for plan in joined),
        "own_seconds": statistics.median(own),
        "travel_seconds": travel,
        "join_seconds": time.process_time() - begin,
        "plan_bytes": sum(map(len, sent)),
        "metadata_bytes": len(pickle.dumps(metadata)),
    }


def file_cost(folder: Path, *, flat: bool) -> dict[str, float]:
    """CPU seconds to write and to read the halves of an output projection under TP2, and bytes of it."""
    block = torch.rand(2, 2048, 2048)
    halves = [Piece((0, 2048 * half), values) for half, values in enumerate(block)]
    held = ParameterPieces.of(halves, (2048, 4096), block)
    state = {"o_proj": held.in_flat_order() if flat else held}
    begin = time.process_time()
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    written, begin = time.process_time() - begin, time.process_time()
    expected = block.clone()
    block.zero_()
    read(folder, state, alone=True)
    seconds = time.process_time() - begin
    assert torch.equal(block, expected)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"write_seconds": written, "read_seconds": seconds, "bytes": size}


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    layouts: dict[str, dict[str, float]] = {}
    for name in CASES:
        ranks = _layout(name)
        counts = [_counted(held) for held in ranks]
        before, after = (KINDS * sum(count) for count in zip(*counts, strict=True))
        layouts[name] = {"intervals": before, "boxes": after, **plan_cost(ranks)}
        print(name, layouts[name], flush=True)
    plans = {"boxes": layouts[PLANNED], "intervals": plan_cost(_layout(PLANNED), flat=True)}
    files = {}
    for way in ("intervals", "boxes"):
        folder = Path(tempfile.mkdtemp(prefix="mop-pieces-"))
        try:
            files[way] = file_cost(folder, flat=way == "intervals")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    found = {"layouts": layouts, "plans": plans, "files": files}
    io.write_json(str(out / "pieces.json"), found)
    write_text(out / "pieces.md", report(found))


def report(found: dict[str, Any]) -> str:
    rows = "".join(
        f"| {name} | {of['intervals']:,} | {of['boxes']:,} | {of['pieces']:,} "
        f"| {of['own_seconds'] * 1e3:.0f} | {of['travel_seconds']:.1f} | {of['join_seconds']:.1f} |\n"
        for name, of in found["layouts"].items()
    )
    ways = "".join(
        f"| {way} | {plan['pieces']:,} | {plan['own_seconds'] * 1e3:.0f} | {plan['travel_seconds']:.1f} "
        f"| {plan['join_seconds']:.1f} | {plan['plan_bytes'] / 1e6:.0f} | {plan['metadata_bytes'] / 1e6:.1f} "
        f"| {file['write_seconds']:.2f} | {file['read_seconds']:.2f} | {file['bytes'] / 1e6:.1f} |\n"
        for way in ("intervals", "boxes")
        for plan, file in ((found["plans"][way], found["files"][way]),)
    )
    return (
        "# Pieces of a checkpoint\n\n"
        f"`PYTHONPATH=. python tests/bench/pieces.py reports/executor`: what {WORLD} ranks hold of values "
        f"and both moments of {MODEL}. Intervals of the flat order (format 2) and boxes (format 3), on all "
        "ranks; then, of boxes, those that are written, as replicas are once, and CPU seconds of planning: "
        "of a rank's own plan (ms), of all ranks' plans through pickle, of their join on one rank, which "
        "checks that they cover every parameter once.\n\n"
        "| runtime and degrees | intervals | boxes | boxes written | own plan, ms | pickle, s | join, s |\n"
        "|---|---|---|---|---|---|---|\n" + rows + "\n"
        f"The same plan ({PLANNED}) both ways; and CPU seconds to write and read the two halves of an output "
        "projection, [2048, 4096] in fp32, cut in its inner dimension, from and to one process.\n\n"
        "| | written | own plan, ms | pickle, s | join, s | plans, MB | their metadata, MB "
        "| write, s | read, s | files, MB |\n|---|---|---|---|---|---|---|---|---|---|\n" + ways
    )


if __name__ == "__main__":
    main()
