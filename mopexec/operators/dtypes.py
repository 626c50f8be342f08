"""The dtype in which sums and exponentials are computed."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and exponentials: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
