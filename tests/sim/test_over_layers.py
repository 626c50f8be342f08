"""What a rank keeps of unevenly routed rows over layers whose busiest ranks are not the same."""

import pytest
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.program import passes
from mopsim.program.over_layers import fewer, fullest
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from mopsim.validate.natural import natural

SHARES = (0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)


def test_layers_share_out_what_one_gives_a_rank() -> None:
    assert fullest(SHARES, 1, 4) == pytest.approx(1.0)
    one, many, more = (fullest(SHARES, 8, layers) for layers in (1, 16, 256))
    assert one == pytest.approx(1.0), "some rank has the most of a single layer"
    assert 1 / 8 / 0.3 < more < many < one
    assert more == pytest.approx(1 / 8 / 0.3, rel=0.15), "over many layers all ranks come near to the mean"


def test_an_expert_with_rows_keeps_some() -> None:
    assert fewer((100, 1, 0), 0.4) == (40, 1, 0)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_only_what_is_kept_is_of_all_layers(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(load_model("qwen3_30b_a3b"), num_hidden_layers=12)
    plan = megatron(world_size=8, expert_parallel=8, recompute=recompute)

    def peak(routing: str | tuple[float, ...]) -> int:
        training = TrainSpec(seq_len=4096, global_batch=8, routing=routing)
        return simulate(model, load_profile("b200-sxm-192g"), 1, plan, training).peak_memory

    loads, even, worst = natural(model.num_local_experts, 8), peak("balanced"), "100/16"
    over_layers, extreme = peak(loads), peak(worst)
    monkeypatch.setattr(passes, "fullest", lambda *_: 1.0)
    assert peak(worst) == extreme
    if recompute == "full":
        assert peak(loads) == over_layers, "a layer at a time is there"
    else:
        assert even < over_layers < even + 0.4 * (peak(loads) - even)
