"""Seconds of collectives and host transfers."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import binom

from mopsim.cost.compute import RATES
from mopsim.program.workload import CommGroup, Work
from mopsim.spec.hardware import COLLECTIVES, CollectiveCurve, Fabric, HardwareProfile

CHANNEL: dict[str, float] = RATES["channel"]["per_second"]
"""Bytes a second that a block of a collective moves over links of a scale-up domain, by architecture."""


def _seconds(curve: CollectiveCurve, ranks: float, wire: float) -> float:
    """latency + ranks * latency_per_rank + wire / (bandwidth * efficiency(wire)), see CollectiveCurve."""
    return curve.latency.si + ranks * curve.latency_per_rank.si + curve.moved(wire) / curve.bandwidth.si


def _inside(kind: str, profile: HardwareProfile, ranks: int, wire: float, block: int = 0) -> float:
    """Seconds in a domain, over those of a device's links that lead to the group; send_recv: to one peer.
    block: see Group."""
    curve = profile.scale_up.collectives[kind]
    if kind == "send_recv":
        return _seconds(curve, 1, wire / profile.peer_share)
    share = min(1.0, (ranks - 1) * profile.peer_share) * _bridged(kind, profile, ranks, block)
    return _seconds(curve, ranks, wire / share)


def _bridged(kind: str, profile: HardwareProfile, ranks: int, block: int) -> float:
    """Of a domain's bandwidth, what a group of so many ranks has for its place under the host bridges. Groups
    over several bridges cross all at once, each with its part of the link between them."""
    bridges = profile.scale_up.bridges
    if bridges is None or not block:
        return 1.0
    if block <= bridges.devices:
        return bridges.faster.get(kind, 1.0)
    crossing = profile.scale_up_size / ranks
    return min(1.0, bridges.link.si / crossing / profile.scale_up.collectives[kind].bandwidth.si)


def _crossing(kind: str, fabric: Fabric, domains: float) -> float:
    """How many times as long bytes between `domains` neighbouring domains take for the spine's sake.

    All-to-all: every NIC sends (domains - leaf) / (domains - 1) of its bytes to other leaves, which share
    1 / oversubscription of the leaf's bandwidth. Rings and sends to a neighbour: one domain of a leaf sends
    outside.
    """
    leaf = fabric.domains_per_leaf
    if domains <= leaf:
        return 1.0
    share = (domains - leaf) / (domains - 1) if kind == "all_to_all" else 1 / leaf
    return max(1.0, fabric.oversubscription * share)


def collective(work: Work, profile: HardwareProfile) -> float:
    """A collective over `bytes` (the full buffer of one rank) in a group, hierarchical where it spans
    scale-up domains.

    Gathers and scattered sums run in rings of all ranks, the only way that NCCL has for them over several
    domains without in-network sums: (n - 1) / n of the buffer enters a domain, by each rank's NIC 1/intra of
    it (NVIDIA/nccl 5067397, src/graph/tuning.cc). All-reduces: 1/intra of what the domains lack, by trees.
    Inside of a domain it goes on at the same time; the slower half counts. All-to-all: the part for ranks of
    the same domain goes over scale_up, the rest over NICs.
    """
    return max(work.launches, 1) * max(_parts(work, profile))


def use(work: Work, profile: HardwareProfile) -> tuple[float, float]:
    """What a collective takes of the rate of (scale-up, scale-out) while it runs alone: all of the outermost
    that it crosses, unless few blocks bound it (Work.channels); of scale-up beside NICs as much as it moves
    there."""
    if work.kind not in COLLECTIVES or work.group.size <= 1:
        return 0.0, 0.0
    inside, outside, blocks = _parts(work, profile)
    moved = max(inside, outside)
    longest = moved if work.group.choices else max(moved, blocks)
    up, out = (inside, moved) if outside else (moved, 0.0)
    return (up / longest, out / longest) if longest else (0.0, 0.0)


def _parts(work: Work, profile: HardwareProfile) -> tuple[float, float, float]:
    """Seconds of one launch of a collective inside of a domain, over NICs, and by its blocks, which go on at
    the same time."""
    n, size = work.group.size, work.bytes / max(work.launches, 1)
    if n <= 1:
        return 0.0, 0.0, 0.0
    intra = work.group.intra
    domains = n / intra
    out = profile.scale_out.collectives[work.kind]
    crossing = _crossing(work.kind, profile.scale_out, domains)
    factor = 2.0 if work.kind == "all_reduce" else 1.0
    if work.kind == "send_recv":
        if intra == n:
            return _inside(work.kind, profile, n, size), 0.0, 0.0
        return 0.0, _seconds(out, 1, size * crossing), 0.0
    if work.group.choices:
        return _deduplicated(work, profile, size / work.group.choices)
    if intra == n:
        wire = factor * size * (n - 1) / n
        within = _inside(work.kind, profile, n, wire, work.group.block)
        return within, 0.0, _in_channels(work, profile, wire)
    if work.kind == "all_to_all":
        inside, outside = size * (intra - 1) / n, size * (n - intra) / n
    else:
        inside = factor * size * (intra - 1) / intra
        members = domains if work.kind == "all_reduce" else n
        outside = factor * size / intra * (members - 1) / members
    slow = _seconds(out, domains if work.kind != "all_to_all" else n, outside * crossing)
    block = work.group.block
    within = _inside(work.kind, profile, intra, inside, block) if intra > 1 else 0.0
    return within, slow, _in_channels(work, profile, factor * size * (n - 1) / n)


def _in_channels(work: Work, profile: HardwareProfile, wire: float) -> float:
    """Seconds in which the blocks of a collective move what goes through a device, where they are limited and
    their rate was measured; trees of all-reduces between domains are taken for rings."""
    rate = CHANNEL.get(profile.device.architecture)
    return wire / (work.channels * rate) if work.channels and rate else 0.0


def reached(
    places: float | NDArray[np.float64], choices: float | NDArray[np.float64], experts: float,
    limit: tuple[int, int] = (1, 1), consecutive: bool = False,
) -> NDArray[np.float64]:  # fmt: skip
    """Share of rows that go to one of equal `places`, ranks or domains: those that chose an expert there.

    choices: k of a row, of the busiest rank not always whole. experts: E, in equal parts of e = E / n on n
    places. The choices are different experts, so C(E - e, k) / C(E, k) of the rows have none among e
    (hypergeometric), and no row where fewer than k are elsewhere. 0: not known, (1 - 1/n)^k have none.
    limit: (G, g), each row chooses among the experts of g of G groups (DeepSeek-V3, arXiv 2412.19437, 2.1.2),
    each g as often: a place has experts of m = e G / E groups, of which j are among them with probability
    C(m, j) C(G - m, g - j) / C(G, g), of one where m < 1. So it is where places and groups nest; else it is
    some 3 % off.
    consecutive: a row chooses k experts one after the other, the first of row i being i k modulo E: the first
    lies on every multiple of gcd(k, e) in a place alike, so that 1 + (k - gcd(k, e)) / e places are met.
    """
    if consecutive and experts:
        held = np.asarray(experts / np.asarray(places), dtype=np.float64)
        step = np.gcd(np.rint(choices).astype(np.int64), np.maximum(held, 1).astype(np.int64))
        met = 1 + np.maximum(choices - step, 0) / np.maximum(held, 1)
        return np.asarray(np.minimum(met / places, 1.0))
    groups, chosen = limit
    if not experts:
        return np.asarray(1 - (1 - 1 / places) ** choices)
    held = experts / np.asarray(places, dtype=np.float64)
    if groups <= chosen:
        return 1 - _missed(held, experts, choices)
    size, found = experts / groups, np.zeros_like(held)
    pool, many = size * chosen, np.maximum(held / size, 1.0)
    for some in range(1, chosen + 1):
        often = binom(many, some) * binom(groups - many, chosen - some) / binom(groups, chosen)
        found = found + often * (1 - _missed(np.minimum(held, size) * some, pool, choices))
    return np.asarray(found)


@lru_cache(maxsize=4096)
def _met(places: float, choices: float, experts: float, limit: tuple[int, int], consecutive: bool) -> float:
    """`reached` of one number of places: layers and plans ask for the same ones again."""
    return float(reached(places, choices, experts, limit, consecutive))


def _missed(
    held: NDArray[np.float64], experts: float, choices: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Share of rows that chose none of `held` among so many experts."""
    possible = np.asarray(choices < experts - held + 1)
    ways = np.where(possible, binom(experts, choices), 1.0)
    return np.asarray(np.where(possible, binom(experts - held, choices) / ways, 0.0))


def sent_once(fabric: Fabric) -> CollectiveCurve:
    """The curve over NICs of exchanges of rows that go once to a domain: of kernels made for it where those
    were timed."""
    return fabric.collectives.get("dispatch", fabric.collectives["all_to_all"])


def _deduplicated(work: Work, profile: HardwareProfile, once: float) -> tuple[float, float, float]:
    """All-to-all of rows that go once to a domain, and on to each rank of it that wants them, once, as
    `_parts` has it.

    once: bytes of all rows of a rank. The hops inside the domains and those over NICs are pipelined; the
    slower counts.
    """
    n, intra = work.group.size, work.group.intra
    choices = work.group.choices, work.group.experts, work.group.limit, work.group.consecutive
    domains = n / intra
    out = sent_once(profile.scale_out)
    wanted = once * (n - 1) * _met(n, *choices)
    if intra == n:
        rows = once * n * _met(n, *choices) / max(work.group.row, 1)
        return _inside("all_to_all", profile, n, wanted), 0.0, _in_rounds(work.group, profile, rows)
    sent = once * (domains - 1) * _met(domains, *choices)
    outside = _seconds(out, domains, sent * _crossing("all_to_all", profile.scale_out, domains))
    inside = wanted * (intra - 1) / intra
    return _inside("all_to_all", profile, intra, inside) if intra > 1 else 0.0, outside, 0.0


def _in_rounds(group: CommGroup, profile: HardwareProfile, rows: float) -> float:
    """Seconds in which a rank receives so many rows, its own among them, by channels each of which sends
    every peer a chunk at a time, which a channel of the peer reads once it is whole."""
    rounds = profile.scale_up.rounds
    if rounds is None or not group.chunk or not rows:
        return 0.0
    peers = group.size * group.channels
    chunk = min(group.chunk, rows / peers)
    each = group.row / rounds.copy.si + (rounds.row.si if rounds.row else 0.0)
    sent = rows / (peers * chunk) * rounds.wait.si + rows / group.channels * each
    if rounds.link:
        sent = max(sent, rows * group.row * (group.size - 1) / group.size / rounds.link.si)
    return sent * (1 + peers * chunk / rows)


def transfer(work: Work, profile: HardwareProfile) -> float:
    """A copy over the host link."""
    rate = host_rate(work.kind, profile, duplex=work.duplex)
    return work.launches * profile.host.link_latency.si + work.bytes / rate


def host_rate(kind: str, profile: HardwareProfile, *, duplex: bool = False) -> float:
    """Bytes a second of a device's copies up (h2d) or down (d2h) the host link, which `link_sharing` devices
    use at once; bounded by the device's share of host DRAM, of which a copy the other way at the same time
    (duplex) takes half."""
    host, share = profile.host, profile.host_memory_share
    link = host.link_h2d.si if kind == "h2d" else host.link_d2h.si
    return min(link / host.link_sharing, share / 2 if duplex else share)
