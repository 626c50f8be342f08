"""Published Megatron runs: peak memory and step time as measured, each with a tolerance of its own.

SimuMax B200 and A100-PCIe results (Megatron-LM, Transformer Engine), and NVIDIA Megatron-Bridge performance
summaries. Uncalibrated: datasheets and fitted kernel curves only.
"""

import msgspec
import pytest

from mopsim.engine import SimResult, simulate
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Overlap, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.software import changed

GIB = 1024**3


def cut(name: str, layers: int, tensor: int) -> ModelSpec:
    """A network cut in depth, its vocabulary padded to 128 rows a tensor rank as Megatron-LM pads it."""
    model = load_model(name)
    rows = -(-model.vocab_size // (128 * tensor)) * 128 * tensor
    return msgspec.structs.replace(model, num_hidden_layers=layers, vocab_size=rows)


FUSED = changed("megatron-core", kernels={"loss": "fused"})


def low(strategy: Strategy, matmul: str, **changes: object) -> Strategy:
    """bf16 gradients and a low-precision recipe, as Megatron-Bridge recipes have them."""
    precision = msgspec.structs.replace(strategy.precision, matmul=matmul, grad="bfloat16", reduce="bfloat16")
    return msgspec.structs.replace(strategy, precision=precision, **changes)


def measure(
    model: ModelSpec, gpu: str, strategy: Strategy, seq_len: int, batch: int, stack: Stack | None = None
) -> SimResult:
    hardware = load_profile(gpu)
    nodes = -(-strategy.world_size // hardware.devices_per_node)
    return simulate(model, hardware, nodes, strategy, TrainSpec(seq_len=seq_len, global_batch=batch), stack)


B200 = [
    ("llama3_70b", 12, 1, 2, 1, 1, 4096, 16, 66.552, 0.01),
    ("llama3_70b", 12, 2, 1, 1, 1, 4096, 16, 60.68, 0.01),
    ("llama3_70b", 12, 4, 1, 1, 1, 4096, 8, 39.072, 0.01),
    ("llama3_70b", 12, 8, 1, 1, 1, 4096, 4, 28.286, 0.01),
    ("llama3_70b", 12, 2, 1, 4, 1, 32768, 4, 68.428, 0.02),
    ("llama3_70b", 12, 1, 1, 8, 1, 32768, 4, 104.509, 0.02),
    ("llama3_70b", 12, 2, 1, 4, 1, 131072, 4, 112.668, 0.04),
    ("llama3_70b", 12, 1, 1, 8, 1, 131072, 4, 147.988, 0.04),
    ("deepseek_v3_l4", 4, 1, 1, 1, 8, 4096, 32, 104.301, 0.02),
    ("deepseek_v3_l4", 4, 1, 2, 1, 4, 4096, 16, 114.002, 0.02),
]


@pytest.mark.parametrize(("name", "layers", "tp", "pp", "cp", "ep", "seq", "batch", "gib", "within"), B200)
def test_peak_memory_on_b200(
    name: str,
    layers: int,
    tp: int,
    pp: int,
    cp: int,
    ep: int,
    seq: int,
    batch: int,
    gib: float,
    within: float,
) -> None:
    strategy = megatron(8, tensor_parallel=tp, pipeline_parallel=pp, context_parallel=cp, expert_parallel=ep)
    result = measure(cut(name, layers, tp), "b200-sxm-192g", strategy, seq, batch, FUSED)
    assert result.peak_memory / GIB == pytest.approx(gib, rel=within)


@pytest.mark.parametrize(
    ("name", "layers", "tp", "pp", "batch", "gib"),
    [
        ("llama3_70b", 12, 1, 2, 128, 66.52), ("llama3_70b", 12, 2, 1, 128, 60.65),
        ("llama3_70b", 12, 4, 1, 64, 39.04), ("llama3_70b", 12, 8, 1, 32, 28.26),
        ("llama3_8b", 32, 1, 2, 128, 51.34), ("llama3_8b", 32, 2, 1, 128, 43.95),
        ("llama3_8b", 32, 4, 1, 64, 27.62), ("llama3_8b", 32, 8, 1, 32, 19.47),
    ],
)  # fmt: skip
def test_peak_memory_on_a100_pcie(name: str, layers: int, tp: int, pp: int, batch: int, gib: float) -> None:
    strategy = megatron(8, tensor_parallel=tp, pipeline_parallel=pp)
    result = measure(cut(name, layers, tp), "a100-pcie-80g", strategy, 4096, batch, FUSED)
    assert result.peak_memory / GIB == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize(
    ("name", "layers", "tp", "pp", "batch", "seconds"),
    [
        ("llama3_70b", 12, 1, 2, 128, 26.0788), ("llama3_70b", 12, 2, 1, 128, 31.739),
        ("llama3_70b", 12, 4, 1, 64, 21.9725), ("llama3_70b", 12, 8, 1, 32, 23.0197),
        ("llama3_8b", 32, 1, 2, 128, 18.8457), ("llama3_8b", 32, 2, 1, 128, 27.2062),
        ("llama3_8b", 32, 8, 1, 32, 27.5686),
    ],
)  # fmt: skip
def test_step_time_on_a100_pcie(name: str, layers: int, tp: int, pp: int, batch: int, seconds: float) -> None:
    strategy = megatron(8, tensor_parallel=tp, pipeline_parallel=pp)
    result = measure(cut(name, layers, tp), "a100-pcie-80g", strategy, 4096, batch, FUSED)
    assert result.step_time == pytest.approx(seconds, rel=0.15)


def test_step_time_of_llama3_70b_fp8_on_h100() -> None:
    """64 H100, TP 4 x PP 8 x VP 5, 256 sequences of 8192, tp_comm_overlap: 20.0 s on the page of NeMo
    26.02.01."""
    overlap = Overlap(grad_reduce=True, param_gather=True, pipeline=True, tensor=True)
    strategy = low(
        megatron(64, tensor_parallel=4, pipeline_parallel=8, virtual_stages=5, overlap=overlap), "fp8"
    )
    result = measure(cut("llama3_70b", 80, 4), "h100-sxm-80g", strategy, 8192, 256)
    assert result.step_time == pytest.approx(20.0, rel=0.1)


def test_step_time_of_deepseek_v3_on_b200() -> None:
    """256 B200, PP 16 x EP 8, MXFP8, HybridEP, up-projections recomputed, the recipe's layout, batch 4096:
    23.3 s on the page of NeMo 26.04."""
    overlap = Overlap(grad_reduce=True, param_gather=True)
    strategy = megatron(
        256,
        pipeline_parallel=16,
        expert_parallel=8,
        recompute="selective",
        recompute_modules=("mla_up_proj",),
        overlap=overlap,
    )
    strategy = msgspec.structs.replace(
        strategy,
        experts=msgspec.structs.replace(strategy.experts, token_dispatcher="hybridep"),
        pipeline=msgspec.structs.replace(strategy.pipeline, layers=(*[4] * 15, 1)),
    )
    strategy = low(strategy, "mxfp8", stack="megatron-bridge")
    result = measure(load_model("deepseek_v3"), "b200-sxm-192g", strategy, 4096, 4096)
    assert result.step_time == pytest.approx(23.3, rel=0.1)


def test_step_time_of_qwen3_with_hidden_exchanges_on_gb300() -> None:
    """8 GB300, EP 8, MXFP8, HybridEP with expert communication hidden: 5.89 s for 512 sequences of 4096."""
    strategy = low(megatron(8, expert_parallel=8, micro_batch=8, overlap=Overlap(experts=True)), "mxfp8")
    experts = msgspec.structs.replace(strategy.experts, token_dispatcher="hybridep")
    strategy = msgspec.structs.replace(strategy, experts=experts)
    grouped = changed(  # whose kernels bring padded rows
        "megatron-core", kernels={"expert_products": "grouped", "expert_padding": "none"}
    )
    result = measure(cut("qwen3_30b_a3b", 48, 1), "gb300-288g", strategy, 4096, 512, grouped)
    assert result.step_time == pytest.approx(5.89, rel=0.1)
