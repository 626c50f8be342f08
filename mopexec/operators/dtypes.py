"""Dtypes by name, and the one in which sums and exponentials are computed."""

import torch


def of_name(name: str) -> torch.dtype:
    """The dtype that torch calls `name`, as a plan does."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and exponentials: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
