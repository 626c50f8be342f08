"""How many rows DeepEP's kernels send to a peer of a node at a time, and over how many channels
(row_chunks.yaml)."""

from statistics import harmonic_mean
from typing import Any

from mopsim.common.shipped import shipped
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack

_SENT: dict[str, dict[str, Any]] = shipped("mopsim.program", "row_chunks.yaml")
CHANNELS: int = _SENT["chunks"]["channels"]
"""Of a group that is given no other."""


def row_chunks(model: ModelSpec, stack: Stack, ranks: int) -> dict[str, float]:
    """Of a group in one node: rows of a chunk in the mean over a dispatch and a combine, of which a pass has
    one each, channels and the bytes of a row (CommGroup's fields); nothing where rows are sent at once."""
    sent = _SENT.get(stack.kernels.sent_rows)
    rows = sent["rows"].get(str(ranks)) if sent else None
    if not sent or not rows:
        return {}
    return {"chunk": harmonic_mean(rows), "channels": sent["channels"], "row": 2 * model.expert_width}
