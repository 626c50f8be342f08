"""Memory of a device or a host as a distribution: tensors that are uncertain, and causes on top of them of
which only bounds are published."""

from dataclasses import dataclass

import numpy as np

from mopsim.intervals.spread import Spread

SHARES = tuple((i + 0.5) / 64 for i in range(64))
"""Of the causes on top: as likely one share of their bound as another, since no more is known."""


@dataclass(frozen=True)
class Memory:
    """Bytes: tensors x measured / predicted, and up to `above` on top."""

    tensors: float
    above: float
    error: Spread

    def below(self, limit: float) -> float:
        """Probability that no more than `limit` bytes are needed."""
        if not self.tensors:
            return float(np.mean([share * self.above <= limit for share in SHARES]))
        return float(np.mean([self._tensors_below(limit - share * self.above) for share in SHARES]))

    def _tensors_below(self, limit: float) -> float:
        return self.error.below(limit / self.tensors) if limit > 0 else 0.0

    def quantile(self, probability: float) -> float:
        """Bytes that are enough with this probability."""
        low, high = 0.0, self.tensors * float(np.exp(self.error.quantile(0.9999))) + self.above
        while high - low > max(1.0, 1e-6 * high):
            middle = (low + high) / 2
            low, high = (low, middle) if self.below(middle) >= probability else (middle, high)
        return high
