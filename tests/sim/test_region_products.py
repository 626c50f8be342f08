"""Products of a tensor-parallel region that each copy their input, or sum its gradient, by themselves."""

import msgspec
import pytest

from mopsim.graph.layer import decoder_layer
from mopsim.graph.rewrites.projections import inputs_copied, rows_apart, summed_apart
from mopsim.graph.shapes import Shapes
from tests.sim.toys import small


@pytest.mark.parametrize("rows_split", [False, True])
def test_products_of_their_own_sum_their_own_input_gradients(rows_split: bool) -> None:
    shapes = Shapes(tokens=16, seq_len=32, tensor=2, fused=True, sequence_parallel=rows_split)
    kernels = decoder_layer(small(), shapes, 0).kernels
    found = summed_apart(kernels, {"qkv_proj": 1, "up_proj": 2})
    changed = [
        (old, new) for old, new in zip(kernels, found, strict=True) if msgspec.structs.astuple(old)
        != msgspec.structs.astuple(new)
    ]  # fmt: skip
    if rows_split:
        assert not changed, "the rows of a region are scattered once"
        return
    ((old, new),) = changed
    assert old.component == "dense_ffn"
    assert old.back_bytes
    assert (new.back_bytes, new.back_launches) == (2 * old.back_bytes, 2)


@pytest.mark.parametrize("gathers", [False, True])
def test_products_of_their_own_scatter_their_own_input_gradients(gathers: bool) -> None:
    shapes = Shapes(tokens=16, seq_len=32, tensor=2, fused=True)
    kernels = decoder_layer(small(), shapes, 0).kernels
    found = rows_apart(kernels, {"qkv_proj": 3, "up_proj": 2}, gathers)
    pairs = [(old, new) for old, new in zip(kernels, found, strict=True) if old.kind == "all_gather"]
    assert len(pairs) == 2
    for times, (old, new) in zip((3, 2), pairs, strict=True):
        assert (new.back_bytes, new.back_launches) == (times * old.bytes, times)
        copies = times if gathers else 1
        assert (new.bytes, new.launches) == (copies * old.bytes, copies)
        assert new.writes[0].bytes == copies * old.writes[0].bytes


@pytest.mark.parametrize("rows_split", [False, True])
def test_products_of_their_own_read_and_keep_copies_of_their_input(rows_split: bool) -> None:
    """Paddle's c_identity copies (mp_ops.py), forward for each product, backward behind each sum."""
    shapes = Shapes(tokens=16, seq_len=32, tensor=2, fused=True, sequence_parallel=rows_split)
    kernels = decoder_layer(small(), shapes, 0).kernels
    found = inputs_copied(kernels, {"qkv_proj": 3, "up_proj": 2})
    if rows_split:
        assert found == kernels, "the rows of a region are gathered into tensors of their own"
        return
    rows = shapes.region_tokens * small().hidden_size * shapes.width
    there = {one.writes[0].bytes // rows: one for one in found if one.name.endswith("_copy") and one.writes}
    back = [one for one in found if one.name.endswith("_copy") and not one.writes]
    assert sorted(there) == [2, 3]
    for times, copy in there.items():
        assert (copy.bytes, copy.launches, copy.back_bytes) == (2.0 * times * rows, times, 0.0)
        (product,) = (one for one in found if one.matmuls and copy.writes[0].name in one.saves)
        assert product.reads[0] not in product.saves
    assert [(one.bytes, one.back_bytes) for one in back] == [(0.0, 2.0 * rows)] * 2
