"""Layers whose mixer is linear attention: a state for each head instead of keys and values of all tokens."""

from typing import Literal

from mopsim.common.errors import Rules
from mopsim.common.io import Spec

_SIZES = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")


class LinearAttention(Spec, frozen=True, kw_only=True):
    """The mixer of the layers that `ModelSpec.layer_types` calls linear_attention.

    kind: `none`: there are none. `mamba2`: a state-space mixer (arXiv 2405.21060). `gated_delta`: a gated
    delta rule (arXiv 2412.06464), as in Qwen3-Next. num_key_heads: heads of queries and keys; of Mamba-2 the
    groups of B and C. num_value_heads: heads of values, each with a decay of its own. key_head_dim: elements
    of a head of queries or keys; of Mamba-2 the size of the state. value_head_dim: elements of a head of
    values. conv_kernel_dim: tokens of the causal convolution before. chunk: tokens that products take
    together, between which a state is handed on.
    """

    kind: Literal["none", "mamba2", "gated_delta"] = "none"
    num_key_heads: int = 0
    num_value_heads: int = 0
    key_head_dim: int = 0
    value_head_dim: int = 0
    conv_kernel_dim: int = 0
    chunk: int = 0

    def _rules(self) -> Rules:
        none = self.kind == "none"
        for field in (*_SIZES, "chunk"):
            value = getattr(self, field)
            yield not none or value == 0, field, "must be 0 where kind is 'none': no layer has the mixer"
            yield none or 1 <= value <= 2**20, field, f"must lie between 1 and 2^20 with kind {self.kind!r}"
        keys, values = self.num_key_heads, self.num_value_heads
        rule = f"must be a multiple of num_key_heads {keys}"
        yield none or keys < 1 or values % keys == 0, "num_value_heads", rule

    @property
    def keys(self) -> int:
        """Elements of a token's keys, of all heads; its queries have as many."""
        return self.num_key_heads * self.key_head_dim

    @property
    def values(self) -> int:
        """Elements of a token's values, of all heads; its gate and its output have as many."""
        return self.num_value_heads * self.value_head_dim

    @property
    def mixed(self) -> int:
        """Elements of a token that the convolution mixes: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def scalars(self) -> int:
        """Numbers of a token for each head of values: the step, and of a delta rule how much it writes."""
        return self.num_value_heads * (2 if self.kind == "gated_delta" else 1)

    @property
    def projected(self) -> int:
        """Columns of the input projection: gate, what is mixed, and the scalars."""
        return self.values + self.mixed + self.scalars

    @property
    def solves(self) -> int:
        """Kernels for the triangle of a chunk, by which a delta rule writes what keys do not hold yet: its
        inverse, and keys and values taken through it (arXiv 2406.06484)."""
        return 2 if self.kind == "gated_delta" else 0

    @property
    def state(self) -> int:
        """Elements of the states of all heads."""
        return self.values * self.key_head_dim
