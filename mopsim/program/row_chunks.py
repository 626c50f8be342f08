"""How many rows DeepEP's kernels send to a peer of a node at a time, and over how many channels."""

from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack

CHANNELS = 10
"""Of 20 SMs (deep_ep.Buffer.num_sms), a pair each."""
CHUNKS = {2: (24, 10), 4: (6, 9), 8: (6, 4)}
"""Rows of a dispatch and of a combine, by ranks (DeepEP 92fe2de, deep_ep/buffer.py, get_dispatch_config and
get_combine_config)."""
LONG_CHANNELS, LONG = 12, (32, 16)
"""The best of a sweep for rows of 2,048 on B200 (NousResearch's torchtitan of November 2025,
scripts/deepep/torchtitan_deepep_tune)."""


def row_chunks(model: ModelSpec, stack: Stack, ranks: int) -> dict[str, float]:
    """Of a group in one node: rows of a chunk in the mean over a dispatch and a combine, of which a pass has
    one each, channels and the bytes of a row (CommGroup's fields)."""
    how = stack.kernels.sent_rows
    sizes = LONG if how == "long_chunks" else CHUNKS.get(ranks)
    if how == "whole" or sizes is None:
        return {}
    mean = 2 / sum(1 / size for size in sizes)
    channels = LONG_CHANNELS if how == "long_chunks" else CHANNELS
    return {"chunk": mean, "channels": channels, "row": 2 * model.hidden_size}
