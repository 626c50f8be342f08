"""Buffers of a dispatcher that exchanges experts' rows by kernels of its own, outside torch's allocator."""

from mopsim.program.context import Context
from mopsim.program.row_chunks import CHANNELS
from mopsim.program.side_by_side import abreast
from mopsim.program.workload import CommGroup

PEERS = 8
"""Ranks of a node, of DeepEP."""
RECEIVED = ((8, 256), (64, 288), (128, 560), (160, 720))
"""Tokens that a channel receives of a peer of its node, by ranks (DeepEP, deep_ep/buffer.py,
get_dispatch_config and get_combine_config); 128 from another node."""
BESIDE = 128 * (8 + 4 + 4) + 8
"""Bytes beside a token: experts, weights and scales of 128 at most, and its source (csrc/config.hpp,
get_nvl_buffer_size_hint; get_rdma_buffer_size_hint has each twice, to send and to receive)."""


def buffers(context: Context) -> tuple[CommGroup, int] | None:
    """The group whose exchanges these are, and bytes of a rank; None where NCCL exchanges."""
    group, how = context.groups["experts"], context.strategy.experts
    if not context.model.num_local_experts or group.size == 1 or not how.sends_once:
        return None
    row = context.model.expert_width * 2
    return group, _deepep(group, row) if how.token_dispatcher == "deepep" else _hybridep(context, group, row)


def _hybridep(context: Context, group: CommGroup, row: int) -> int:
    """DeepEP, hybrid-ep 94a9f8f, csrc/hybrid_ep/buffer/intranode.cu: room for the tokens of all ranks, should
    all come to one (max_num_of_tokens), each in bf16 with a weight for every expert of its domain and scales
    by 128; dispatch and combine share it (use_shared_buffer, the default of hybrid_ep_buffer.py)."""
    experts = context.model.num_local_experts * group.intra // group.size
    tokens = context.tokens // abreast(context) * group.size
    return tokens * (row + 4 * experts + 4 * (context.model.expert_width // 128))


def _deepep(group: CommGroup, row: int) -> int:
    nodes, peers = max(1, group.size // PEERS), min(group.size, PEERS)
    received = next((tokens for ranks, tokens in RECEIVED if group.size <= ranks), RECEIVED[-1][1])
    far = 2 * 128 * nodes if nodes > 1 else 0
    return CHANNELS * (peers * received + far) * (row + BESIDE)
