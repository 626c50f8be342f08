"""What AdamW decays: all but norms, biases and sinks, wherever a flat shard begins."""

import itertools

import pytest
import torch

from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.flat.contents import layer_contents
from mopexec.flat.units import Unit
from mopexec.model import Transformer
from mopexec.modules.optimizer import Shard, ShardedAdamW
from mopexec.modules.slices import Block
from mopexec.modules.zero1 import make_buffer
from mopexec.operators.adamw import decays, groups, runs
from mopsim.spec.training import TrainSpec
from tests.exec.flat_parity import decay_groups
from tests.exec.test_model import LATENT, spec

CPU = Platform(torch.device("cpu"))
ALL = {
    "qk_norm": "full", "attention_bias": "qkvo", "attention_sinks": True, "ffn_bias": True,
    "expert_bias": True, "router_bias": True, "shared_expert_gate": True,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, ALL, {**LATENT, "num_nextn_predict_layers": 1}])
def test_matrices_decay(changes):
    model = Transformer(spec(**changes), torch.float32)
    expected = decay_groups(model, 0.1)
    found = groups(model.named_parameters(), 0.1)
    for one, other in zip(found, expected, strict=True):
        assert one["weight_decay"] == other["weight_decay"]
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
    assert all(len(one["params"]) for one in found)


def test_runs_cover_a_slice_in_order():
    undecayed = [(2, 4), (4, 5), (9, 12)]
    for start, stop in itertools.combinations(range(14), 2):
        found = list(runs(start, stop, undecayed))
        assert [at for low, high, _ in found for at in range(low, high)] == list(range(start, stop))
        for low, high, on in found:
            assert {any(a <= at < b for a, b in undecayed) for at in range(low, high)} == {not on}


def test_a_units_shards_know_what_does_not_decay():
    """Over the ranks it is what the parameters of the unit that do not decay hold."""
    from mopsim.spec.strategy import Precision

    model = spec(**ALL)
    for contents in layer_contents(model, model.num_hidden_layers - 1, 2, 0):
        places, size = set(), 3
        for place in range(size):
            unit = Unit(
                contents, Group(tuple(range(size)), place, None), Group((place,), 0, None), Precision(), CPU
            )
            places |= {unit.start + at for low, high in unit.undecayed for at in range(low, high)}
        flat = torch.zeros(contents.numel)
        for name, view in contents.views(flat).items():
            view.fill_(not decays(name))
        assert places == set(flat.nonzero().flatten().tolist())


def test_a_buffers_parts_know_what_does_not_decay():
    """Over the ranks it is what the parameters of the buffer that do not decay hold."""
    shapes = {"a.weight": (7, 5), "norm.weight": (9,), "b.weight": (4, 11), "b.bias": (30,), "c.weight": (3,)}
    blocks = {name: Block("whole", shape, (0,) * len(shape), shape) for name, shape in shapes.items()}
    for size in (1, 2, 3, 5):
        places = set()
        for place in range(size):
            groups = None, Group(tuple(range(size)), place, None), Group((place,), 0, None)
            buffer = make_buffer("whole", blocks, groups, (torch.float32,) * 2, CPU, trained=True)
            first = place * buffer.values.numel() // size
            size_of_part = buffer.part(buffer.values).numel()
            assert all(0 <= low < high <= size_of_part for low, high in buffer.undecayed)
            places |= {first + at for low, high in buffer.undecayed for at in range(low, high)}
        kept = torch.zeros_like(buffer.values)
        for name in shapes:
            buffer.view(kept, name).fill_(not decays(name))
        assert places == set(kept.nonzero().flatten().tolist())


def test_a_buffers_shard_decays_where_its_parameters_do():
    """As torch's own, by parameters."""
    training = TrainSpec(seq_len=8, global_batch=1, clip_norm=0.0, learning_rate=0.01, weight_decay=0.3)
    values, grads = torch.randn(2, 10).double().unbind(0)
    mine = values.clone()
    named = {"a.weight": slice(0, 4), "norm.weight": slice(4, 7), "b.weight": slice(7, 10)}
    theirs = {name: torch.nn.Parameter(values[at].clone()) for name, at in named.items()}
    other = torch.optim.AdamW(
        groups(theirs.items(), 0.3), lr=0.01, betas=(training.beta1, training.beta2), eps=training.eps
    )
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        optimizer = ShardedAdamW([Shard("flat", mine, 1, ((4, 7),))], training, CPU, host=False)
        for _ in range(2):
            optimizer.step({"flat": grads.clone()})
            for name, at in named.items():
                theirs[name].grad = grads[at].clone()
            other.step()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(
        mine, torch.cat([one.detach() for one in theirs.values()]), rtol=1e-12, atol=1e-12
    )
