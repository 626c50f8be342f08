"""What torch's selective checkpoints keep of an eager layer."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.partitioners import get_default_op_list
from torch._higher_order_ops import inductor_compiled_code
from torch.nn import functional
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from mopexec.distributed.tiers import Platform
from tests.sim.toys import small

TOKENS = 256
MODEL = small(qk_norm="head")
MM = torch.ops.aten.mm.default
SAVED = {op.default for op in get_default_op_list().compute_intensive_ops} | {inductor_compiled_code}


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As a kernel whose backward reads queries, keys, values, its output and a number a row and head."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Layer(nn.Module):
    """A dense layer of torchtitan: one product for queries, keys and values, whose parts are copied."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        model, heads = MODEL, (MODEL.num_attention_heads, *2 * (MODEL.num_key_value_heads,))
        wide, inner = model.num_attention_heads * model.head_dim, model.intermediate_size
        self.heads, self.attention = heads, attention
        self.norms = nn.ModuleList(nn.RMSNorm(model.hidden_size) for _ in range(2))
        self.head_norms = nn.ModuleList(nn.RMSNorm(model.head_dim) for _ in range(2))
        shapes = ((sum(heads) * model.head_dim, model.hidden_size), (model.hidden_size, wide))
        shapes += (*2 * ((inner, model.hidden_size),), (model.hidden_size, inner))
        self.qkv, self.o, self.w1, self.w3, self.w2 = (nn.Linear(k, n, bias=False) for n, k in shapes)

    def forward(self, x: Tensor) -> Tensor:
        joint = self.qkv(self.norms[0](x)).view(TOKENS, -1, MODEL.head_dim)
        q, k, v = (part.contiguous() for part in joint.split(self.heads, 1))
        q, k = (norm(part) * 0.5 for norm, part in zip(self.head_norms, (q, k), strict=True))
        o = self.attention(*(part.transpose(0, 1).unsqueeze(0) for part in (q, k, v)))
        x = x + self.o(o.squeeze(0).transpose(0, 1).reshape(TOKENS, -1))
        h = self.norms[1](x)
        return x + self.w2(functional.silu(self.w1(h)) * self.w3(h))


def kept(platform: Platform, whole: bool) -> int:
    """Bytes that a checkpoint of TorchTitan's SelectiveAC policy keeps beside its input."""
    torch._inductor.config.cpp.vec_isa_ok = False  # as in tests/exec/compiled_worker.py
    torch._dynamo.reset()
    attention = torch.compile(attended, options={"wrap_inductor_compiled_regions": whole})
    layer, stored = Layer(attention).bfloat16(), list[Any]()

    def contexts() -> Any:
        seen = defaultdict[bool, int](int)

        def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
            seen[ctx.is_recompute] += func is MM
            left = func not in SAVED or (func is MM and seen[ctx.is_recompute] % 2 == 0)
            ways = checkpoint.CheckpointPolicy
            return ways.PREFER_RECOMPUTE if left else ways.MUST_SAVE

        found = checkpoint.create_selective_checkpoint_contexts(policy)
        stored.append(found[0].storage)
        return found

    for _ in range(2):  # the first compiles
        x = torch.randn(TOKENS, MODEL.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        out = checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=contexts, early_stop=False)
    entries = [entry for calls in stored[1].values() for entry in calls.values()]
    values = [one.get_val(True) for one in tree_leaves(entries) if hasattr(one, "get_val")]
    storages = [one.untyped_storage() for one in values if isinstance(one, Tensor)]
    size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    out.sum().backward()
    return size
