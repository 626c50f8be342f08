"""The FSDP2 baseline equals the single-device model: loss, gradients and weights, with clipping active."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace

import mopexec
from mopexec.modules import fsdp_internals
from mopexec.run.supported import check_supported
from mopsim.common.errors import SpecError
from mopsim.strategies import fsdp2
from tests import plans
from tests.exec import fsdp_worker
from tests.exec.spawn import pool
from tests.exec.split_plans import MODEL, plan_of

Results = dict[str, dict[str, float]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Rank 0's results of every case."""
    return run(request.param, tmp_path_factory.mktemp("fsdp"))


def run(world: int, folder: Path, *, cuda: bool = False) -> Results:
    found: Results = pool(world, cuda=cuda).run("tests.exec.fsdp_worker", "run_cases", world, folder)[0]
    return found


def check_parity(case: dict[str, float], tolerance: float) -> None:
    assert max(case["loss"], case["norm"], case["gradients"], case["parameters"]) <= tolerance
    assert case["balance"] == 0.0


def test_every_mechanism_equals_the_single_device_model_in_float64(results: Results) -> None:
    for name, case in results.items():
        if name not in ("everything_float32", "bfloat16", "resumed"):
            check_parity(case, 1e-9)


def test_everything_on_eight_ranks_equals_the_single_device_model(tmp_path: Path) -> None:
    (case,) = run(8, tmp_path).values()
    check_parity(case, 1e-9)


def test_everything_together_equals_the_single_device_model_in_float32(results: Results) -> None:
    if "everything_float32" in results:
        check_parity(results["everything_float32"], 1e-4)


def test_bfloat16_follows_the_single_device_loss(results: Results) -> None:
    if "bfloat16" in results:
        assert results["bfloat16"]["loss"] < 1e-2


def test_offload_leaves_no_state_on_the_device(results: Results) -> None:
    case = results.get("everything")
    if case is None:
        return
    buffers = case["resident.params"]  # the routers' balance biases and loads
    assert buffers == 2 * 2 * fsdp_worker.MODEL.num_local_experts * 4
    assert not {"resident.grads", "resident.optimizer", "resident.gathered"} & case.keys()
    assert case["host.optimizer"] >= 2 * case["host.params"]


def test_boundaries_on_the_host_take_one_layer_input_each(results: Results) -> None:
    model, case = fsdp_worker.MODEL, results.get("boundaries_on_host")
    if case is not None:
        assert (
            case["host.boundaries"] == model.num_hidden_layers * 2 * fsdp_worker.SEQ * model.hidden_size * 8
        )


def test_a_checkpoint_resumes_exactly(results: Results) -> None:
    if "resumed" in results:
        assert results["resumed"]["parameters"] == 0.0


@pytest.mark.parametrize(
    ("part", "fields", "field"),
    [
        ("experts", {"chunk_tokens": 64}, "experts.chunk_tokens"),
        ("experts", {"balance": "least_loaded"}, "experts.balance"),
        ("dense", {"param_tier": "host"}, "dense.param_tier"),
        ("dense", {"chunk_tokens": 8}, "dense.chunk_tokens"),
        ("vocabulary", {"loss": "ring"}, "vocabulary.loss"),
        ("optimizer", {"state_tier": "host"}, "optimizer.update_on"),
        ("activations", {"recompute": "selective", "modules": ("layernorm",)}, "activations.modules"),
        ("activations", {"recompute": "none", "layer_inputs": "host"}, "activations.layer_inputs"),
        ("precision", {"grad": "bfloat16"}, "precision.grad"),
        ("precision", {"moments": "bfloat16"}, "precision.moments"),
        ("precision", {"matmul": "fp8"}, "precision.matmul"),
    ],
)
def test_what_is_not_run_is_refused_by_name(part: str, fields: dict[str, object], field: str) -> None:
    plain = fsdp_worker.cases(2)["zero2"][0]
    plan = fsdp_worker.plan_of(plans.changed(plain, **{part: fields}), "learned")
    with pytest.raises(SpecError, match=rf"^strategy\.{field}: "):
        check_supported(plan)


@pytest.mark.parametrize(
    ("sizes", "degrees"),
    [
        ({"shared_expert_intermediate_size": 6}, {"dense": {"tensor_parallel": 4}}),
        ({"intermediate_size": 6}, {"dense": {"tensor_parallel": 4}}),
        ({"moe_intermediate_size": 6}, {"experts": {"expert_tensor_parallel": 4, "expert_fsdp": 1}}),
    ],
)
def test_every_rank_has_something_to_shard(
    sizes: dict[str, int], degrees: dict[str, dict[str, object]]
) -> None:
    model = replace(MODEL, num_key_value_heads=4, intermediate_size=24, shared_expert_intermediate_size=8)
    plan = plan_of(plans.changed(fsdp2(4, tensor_parallel=4), **degrees), model)
    check_supported(plan)
    with pytest.raises(SpecError, match=f"leaves the last rank no columns of {next(iter(sizes))} 6"):
        check_supported(replace(plan, model=replace(model, **sizes)))


def test_torch_2_11_has_one_group_of_a_module() -> None:
    def groups(**state: Any) -> list[Any]:
        module: Any = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(**state))
        return fsdp_internals._groups(module)

    assert groups(_fsdp_param_groups=["a", "b"], _fsdp_param_group="not asked") == ["a", "b"]
    assert groups(_fsdp_param_group="a") == ["a"]
    assert groups(_fsdp_param_group=None) == []


PRIVATE = re.compile(
    r"_fully_shard\b|_get_fsdp_state|_fsdp_param_groups|fsdp_params|_lazy_init|_set_unshard_async_op"
    r"|gradient_divide_factor|wait_for_unshard|_sharded_param_data|_unsharded_param"
)


def test_one_file_reaches_into_fsdp() -> None:
    files = Path(mopexec.__file__).parent.rglob("*.py")
    found = {path.name for path in files if PRIVATE.search(path.read_text(encoding="utf-8"))}
    assert found == {"fsdp_internals.py"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_parity_on_gpus(tmp_path: Path) -> None:
    """NCCL on as many of this machine's GPUs as the cases know; parity uses the math attention kernel."""
    world = max(count for count in (1, 2, 4) if count <= torch.cuda.device_count())
    for name, case in run(world, tmp_path, cuda=True).items():
        if name == "bfloat16":
            assert case["loss"] < 1e-2
        elif name != "resumed":
            check_parity(case, 1e-4 if name == "everything_float32" else 1e-9)
