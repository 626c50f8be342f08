"""Bounds know what torch's FSDP2 holds of shards that it sums over replicas too."""

from dataclasses import replace

import numpy as np
import pytest

from mopsim.search import SearchResult
from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.footprint import Footprint
from mopsim.search.simulating import run_row
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from tests.sim.spaces import candidates
from tests.sim.test_search import problem


def test_what_is_held_of_replicated_shards_is_bounded() -> None:
    """In 12 rows of the space; of shards on the host nothing else but activations is on the device."""
    job = TrainSpec(seq_len=32, global_batch=16)
    asked = replace(problem(0), num_nodes=2, training=job, stack=load_stack("mopexec-fsdp2"))
    space, _ = candidates(asked, "fsdp2")
    facts = SpaceFacts.of(space)
    held = Footprint(space, facts).of_replicas
    rows = np.flatnonzero((held > 0) & (space.columns["offload"] == 1))
    seen = []
    for row in rows[:: len(rows) // 12].tolist():
        found = run_row(space, row, SearchResult(asked.model), count=False)
        bound = Bounder(space.part(row, row + 1), facts).all().device[0]
        if found is not None:
            assert held[row] <= bound <= found.peak_memory
            seen.append(found.memory_by_category.get("grads", 0) / held[row])
    assert len(seen) > 6
    assert max(seen) == pytest.approx(1, rel=0.02), "where the peak is at the end of a backward"
