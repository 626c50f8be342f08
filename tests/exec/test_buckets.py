"""`optimizer.bucket_params`: one rule for every overlap, and advice that holds."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from mopexec.cli import main
from mopexec.run.plans import check_supported, params_of_rank
from mopsim.common import io
from mopsim.common.errors import SpecError
from mopsim.program.context import make_context
from mopsim.spec.layout import MOST_BUCKETS, early_buckets, optimizer_buckets
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.strategies import mop
from tests.exec.split_plans import LATENT, MODEL, plan_of

LARGE = load_model("gpt_oss_20b")


@pytest.mark.parametrize("model", [MODEL, LATENT, LARGE], ids=["grouped", "latent", "large"])
@pytest.mark.parametrize("options", [{}, {"expert_parallel": 2}, {"vocab_parallel": 4, "expert_parallel": 4}])
def test_a_ranks_parameters_are_those_that_are_simulated(model: ModelSpec, options: dict[str, Any]) -> None:
    plan = plan_of(mop(4, **options), model)
    context = make_context(plan.model, plan.strategy, plan.training, 4, plan.stack)
    assert params_of_rank(plan) == sum(unit.shard_numel for unit in context.units())


def test_both_ways_to_cut_have_one_rule() -> None:
    sizes = [3 * MOST_BUCKETS, 2 * MOST_BUCKETS]
    for size, holds in ((4, False), (5, True)):
        for cut in (lambda b: optimizer_buckets(sizes, b), lambda b: early_buckets([[0], [1]], sizes, b)):
            if holds:
                cut(size)
                continue
            with pytest.raises(SpecError, match="5 or more will do"):
                cut(size)


def test_too_small_buckets_are_refused_before_a_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = plan_of(mop(2, expert_parallel=2, optimizer_overlap="backward"), LARGE, clip_norm=0.0)
    least = -(-params_of_rank(plan) // MOST_BUCKETS)
    optimizer = replace(plan.strategy.optimizer, bucket_params=least)
    check_supported(replace(plan, strategy=replace(plan.strategy, optimizer=optimizer)))
    optimizer = replace(optimizer, bucket_params=1)
    io.write_yaml(tmp_path / "plan.yaml", replace(plan, strategy=replace(plan.strategy, optimizer=optimizer)))
    out = ["--data", "python", "--steps", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--plan", str(tmp_path / "plan.yaml"), *out])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "plan.strategy.optimizer.bucket_params: 1 cuts" in told
    assert f"{least} or more will do" in told
    assert not (tmp_path / "run").exists()
