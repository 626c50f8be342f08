"""Scaling of rotary frequencies."""

from typing import Literal

from mopsim.common.errors import Rules
from mopsim.common.io import Spec


class RopeScaling(Spec, frozen=True, kw_only=True):
    """Scaling of rotary frequencies, in the keys of Hugging Face's `rope_scaling`. They change numbers, no
    shapes.

    rope_type: `default`: no scaling. `yarn`: YaRN (arXiv 2309.00071), which interpolates low frequencies and
    keeps high ones. `llama3`: Llama 3.1's, the same with other bounds. factor: how much longer sequences may
    be than original_max_position_embeddings. original_max_position_embeddings: tokens of a sequence in the
    first training. beta_fast: YaRN keeps a frequency that makes more turns than this within that length.
    beta_slow: YaRN interpolates a frequency that makes fewer turns. truncate: YaRN's bounds are rounded to
    whole pairs of elements. mscale: weight of the length in the size of the rotated vectors (YaRN in
    DeepSeek's configs); 0: YaRN's own rule. mscale_all_dim: the same in the scale of the softmax.
    low_freq_factor: Llama 3.1 interpolates a frequency that makes fewer turns. high_freq_factor: Llama 3.1
    keeps a frequency that makes more turns.
    """

    rope_type: Literal["default", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def _rules(self) -> Rules:
        for field, low, high in (
            ("factor", 1.0, 1e6), ("original_max_position_embeddings", 0, 2**40), ("beta_fast", 1e-3, 1e6),
            ("beta_slow", 1e-3, 1e6), ("mscale", 0.0, 100.0), ("mscale_all_dim", 0.0, 100.0),
            ("low_freq_factor", 1e-3, 1e6), ("high_freq_factor", 1e-3, 1e6),
        ):  # fmt: skip
            yield low <= getattr(self, field) <= high, field, f"must lie between {low:g} and {high:g}"
        known = self.rope_type == "default" or self.original_max_position_embeddings >= 1
        rule = f"must be at least 1 with rope_type {self.rope_type!r}"
        yield known, "original_max_position_embeddings", rule
        rule = f"must be below high_freq_factor {self.high_freq_factor:g}"
        yield self.low_freq_factor < self.high_freq_factor, "low_freq_factor", rule
