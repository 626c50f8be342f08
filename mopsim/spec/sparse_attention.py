"""Attention to the keys that an indexer chooses: DeepSeek Sparse Attention."""

from typing import Literal

from mopsim.common.errors import Rules
from mopsim.common.io import Spec

_SIZES = ("index_n_heads", "index_head_dim", "index_topk")
_USUAL = {"index_topk_freq": 1, "index_skip_topk_offset": 0, "indexer_loss": "sparse"}


class SparseAttention(Spec, frozen=True, kw_only=True):
    """Latent attention of each token to the keys that an indexer chooses for it (arXiv 2512.02556, 2.1).

    index_n_heads: heads of the indexer. index_head_dim: width of one; all share a key. index_topk: keys that
    a token attends to at most; 0: all before it, and there is no indexer. index_topk_freq: layers that attend
    to the same keys, of which the first has an indexer (GLM-5.2). index_skip_topk_offset: leading layers that
    have one each; the last of them begins such a group. indexer_loss: `sparse`: the indexer learns the
    attention among the keys that it chose. `none`: it does not learn.
    """

    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 0
    indexer_loss: Literal["sparse", "none"] = "sparse"

    def _rules(self) -> Rules:
        none = self.index_topk == 0
        for field in _SIZES:
            yield getattr(self, field) >= 0, field, "must not be negative"
        for field in _SIZES:
            value = getattr(self, field)
            yield not none or value == 0, field, "must be 0 where index_topk is 0: there is no indexer"
            yield none or 1 <= value <= 2**20, field, "must lie between 1 and 2^20 where there is an indexer"
        for field, usual in _USUAL.items() if none else ():
            rule = f"must be {usual!r}, the default, where index_topk is 0: there is no indexer"
            yield getattr(self, field) == usual, field, rule
        yield 1 <= self.index_topk_freq <= 10_000, "index_topk_freq", "must lie between 1 and 10000"
        rule = "must lie between 0 and 10000"
        yield 0 <= self.index_skip_topk_offset <= 10_000, "index_skip_topk_offset", rule

    def chooses(self, layer: int) -> bool:
        """Whether `layer` (from 0) has an indexer, where any has: every index_topk_freq-th from the last
        leading one, and those before it (Megatron-LM, transformer/experimental_attention_variant/dsa.py,
        is_dsa_skip_topk_layer)."""
        after = layer + 1 - max(self.index_skip_topk_offset, 1)
        return after <= 0 or after % self.index_topk_freq == 0
