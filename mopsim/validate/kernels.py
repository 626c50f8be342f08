"""Components that are one kernel or one collective: products, attention, all-to-all. Priced by
`mopsim.cost`."""

from msgspec.structs import replace

from mopsim.common.units import DTYPE_BYTES
from mopsim.cost import seconds
from mopsim.cost.communication import reached
from mopsim.cost.compute import for_heads
from mopsim.program.workload import CommGroup, Work
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.presets import load_model
from mopsim.validate.component import Component
from mopsim.validate.tables import UnsupportedError

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "fp8", "fp32": "float32"}
ATTENTION_PRODUCTS = {"forward": 2, "backward": 5}
"""Products of sequence x sequence: QK and PV forward, five backward (FlashAttention-2, arXiv 2307.08691)."""


def _dtype(component: Component) -> str:
    name = component.text("precision").lower().split(" ")[0]
    if name not in DTYPES:
        raise UnsupportedError("precision", f"{name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def gemm(component: Component, hardware: HardwareProfile) -> float:
    """Seconds, or FLOP/s, of one product or of the products of `ng` experts in one launch."""
    upper = "M" in component.params
    m, n, k = (float(component.count(name.upper() if upper else name)) for name in ("m", "n", "k"))
    grouped = component.one_of("op", "matmul", "grouped matmul") == "grouped matmul"
    count = float(component.count("ng")) if grouped else 1.0
    work = Work(
        "grouped_matmul" if grouped else "matmul", m=m, n=n, k=k, count=count, dtype=_dtype(component)
    )
    if component.one_of("accumulate", "false", "true") == "true":
        work = _summed(component, work)
    time = seconds(work, _unheld(hardware) if component.does("short") else hardware)
    return time if component.metric == "latency_s" else 2 * m * n * k * count / time


def _summed(component: Component, work: Work) -> Work:
    """A product that adds a weight gradient to a buffer. Of experts the rows, which it sums over, are m."""
    buffer = "main_grad_dtype" if component.states("main_grad_dtype") else "out_dtype"
    moved = 2 * DTYPE_BYTES[DTYPES[component.one_of(buffer, "fp32", "bf16")]]
    if work.kind == "grouped_matmul":
        work = replace(work, m=work.n, n=work.k, k=work.m)
    return replace(work, gradient=moved)


def _unheld(hardware: HardwareProfile) -> HardwareProfile:
    """The profile of a card whose products power does not hold, as long as there are few of them."""
    curves = tuple(replace(curve, held=1.0) for curve in hardware.device.matmul)
    return replace(hardware, device=replace(hardware.device, matmul=curves))


def attention(component: Component, hardware: HardwareProfile) -> float:
    """Seconds, or FLOP/s in the source's own counting: full attention, both halves of the mask, where its
    rates say so.

    The B200 table prints up to 1.2 of the peak, so it counts what the causal mask skips; the others are
    taken as they are.
    """
    passes = component.one_of("pass_", "", "forward", "backward") or component.one_of(
        "op", "attention forward", "attention backward"
    )
    backward = passes.endswith("backward")
    seq = component.count("seq_len")
    heads = component.number("heads") if "heads" in component.params else component.number("head_num")
    width = (component.number("qk_head_dim") + component.number("v_head_dim")) / 2
    batch = component.number("batch") if component.states("batch") else 1.0
    products = ATTENTION_PRODUCTS["backward" if backward else "forward"]
    full = products * 2.0 * batch * heads * float(seq) ** 2 * width
    masked = component.does("counts_half")
    work = Work(
        "attention", flops=full / 2 if masked else full, seq=seq, backward=backward, dtype=_dtype(component)
    )
    time = seconds(work, for_heads(hardware, component.count("qk_head_dim")))
    return time if component.metric == "latency_s" else full / time


def all_to_all(component: Component, hardware: HardwareProfile) -> float:
    """Seconds of an exchange among `ep` ranks, or bytes/s of its slowest link."""
    ranks = component.count("ep")
    choices = component.count("top_k") if component.does("deduplicated") else 0
    experts = component.count("num_experts") if "num_experts" in component.params else 0
    group = CommGroup(ranks, min(ranks, hardware.scale_up_size), choices, experts, limit=_limit(component))
    if "bytes_per_rank" in component.params:
        size = component.number("bytes_per_rank")
    else:
        dispatched = component.one_of("op", "combine", "dispatch") == "dispatch"
        width = 1.0 if dispatched and component.text("precision").startswith("fp8") else 2.0
        rows = component.number("tokens_per_rank") * component.number("top_k")
        size = rows * component.number("hidden") * width
    time = seconds(Work("all_to_all", bytes=size, group=group), hardware)
    if component.metric == "latency_s":
        return time
    places = ranks if component.one_of("link", "rdma", "nvlink") == "nvlink" else ranks // group.intra
    once = size / component.number("top_k")
    return once * places * float(reached(places, choices, experts, group.limit)) / time


def _limit(component: Component) -> tuple[int, int]:
    """(n_group, topk_group) of the router that chose the rows' experts, where it is a known network's."""
    if not component.router:
        return 1, 1
    model = load_model(component.router)
    has = model.hidden_size, model.num_local_experts, model.num_experts_per_tok
    same = has == tuple(component.number(name) for name in ("hidden", "num_experts", "top_k"))
    return (model.n_group, model.topk_group) if same else (1, 1)
