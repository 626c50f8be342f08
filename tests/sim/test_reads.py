"""What the host reads of gradients before they are reduced."""

import msgspec
import pytest

from mopsim.program import lower
from mopsim.program.update_host import BUCKET
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Overlap
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron

replace = msgspec.structs.replace
MODEL, JOB = load_model("llama3_8b"), TrainSpec(seq_len=4096, global_batch=32)


@pytest.mark.parametrize("tensor", [1, 8], ids=["reduced", "alone"])
@pytest.mark.parametrize("early", [True, False])
def test_norms_of_gradients_are_waited_for_by_bucket_before_they_are_reduced(
    early: bool, tensor: int
) -> None:
    """All gradients are read once, and answers waited for where a bucket is full; by a data-parallel rank
    that is alone too, which reduces none."""
    core = load_stack("megatron-core")
    strategy = megatron(8, tensor_parallel=tensor, overlap=Overlap(grad_reduce=early, param_gather=True))
    strategy = replace(strategy, stack="megatron-core")
    found = {}
    for read in (True, False):
        stack = replace(core, host=replace(core.host, grads_read=read))
        found[read] = lower(MODEL, strategy, JOB, 8, stack, compose=False).programs[0].ops
    norms = [op for op in found[True] if op.name == "whole gradients"]
    assert all(op.awaited == (op.work[0].launches > 1) for op in norms)
    width, size = 4.0, sum(op.work[0].bytes for op in norms)
    buckets = [op.work[0].launches // 6 for op in norms]
    if early:
        assert len(norms) > MODEL.num_hidden_layers
        assert sum(buckets) == pytest.approx(size / width / BUCKET, abs=1)
    else:
        assert buckets == [1]
    reduced = [op for op in found[True] if op.name == "reduce gradients"]
    assert bool(reduced) == (tensor == 1)
    after = [op for op in found[True] if op.name == "scaled gradients"]
    assert len(after) == len(norms) * (tensor == 1)
    read, scaled = ({op.index for op in some} for some in (norms, after))
    assert all(read & set(op.deps) for op in after)
    assert all(scaled & set(op.deps) for op in reduced)
    assert len(found[True]) - len(found[False]) == len(norms)
