"""What pictures, pages and traces call the streams of a simulated step, and what they draw."""

from collections.abc import Iterable

from mopsim.program.workload import FABRICS
from mopsim.spec.categories import SPOKEN, WAITS

GROUPS = {
    "tensor": "TP", "sequence": "CP", "experts": "EP", "expert_tensor": "ETP", "expert_ranks": "EP x ETP",
    "vocabulary": "vocab parallel", "world": "all ranks", "stage": "tied embedding", "state": "DP shard",
    "replicas": "DP replicate",
}  # fmt: skip
"""Groups whose collectives have a stream on each network (mopsim.program.workload, COMMUNICATORS)."""
NETWORKS = dict(zip(FABRICS, ("scale-up", "scale-out"), strict=True))
LANES = {
    "compute": "compute",
    **{
        f"{group} {fabric}": f"{name} ({network})"
        for group, name in GROUPS.items()
        for fabric, network in NETWORKS.items()
    },
    "forward_in": "PP receive activations", "forward_out": "PP send activations",
    "backward_in": "PP receive gradients", "backward_out": "PP send gradients",
    "h2d": "copies to device", "d2h": "copies to host", "update": "optimizer update", "host": "host CPU",
    "read": "reads by the host",
}  # fmt: skip
"""By stream, in the order in which they are drawn."""
NAMES = {
    "memory": SPOKEN,
    "components": {kind: LANES[kind] for kind in ("h2d", "d2h")},
    "waits": WAITS,
}
"""Of categories of memory, of components with kinds of what is moved, of what compute waits for: those names
that are not the key's own words."""
EXPLAINED = "scale-up: inside a node or NVLink domain; scale-out: between them"


def lane(stream: str) -> str:
    """'EP (scale-up)' of 'experts scale_up'; of a pipeline on a V with the part: 'PP send gradients 1'."""
    kind = _kind(stream)
    return LANES.get(kind, kind) + stream.removeprefix(kind)


def lanes(streams: Iterable[str]) -> list[str]:
    """Each stream once, in the order in which they are drawn."""
    order = {kind: place for place, kind in enumerate(LANES)}
    return sorted(set(streams), key=lambda one: (order.get(_kind(one), len(order)), one))


def named(key: str, space: str) -> str:
    """What a legend calls it. space: a key of NAMES."""
    return NAMES[space].get(key, key.replace("_", " "))


def explained(streams: Iterable[str]) -> str:
    """What the names of the networks mean, where one is shown."""
    return EXPLAINED if any(one.endswith(FABRICS) for one in streams) else ""


def _kind(stream: str) -> str:
    return stream if stream in LANES else stream.partition(" ")[0]
