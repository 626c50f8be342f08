"""Seconds of collectives for a whole space at once: mopsim.cost.communication over columns of numbers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mopsim.cost.communication import reached, sent_once
from mopsim.program.topology import devices_taken
from mopsim.spec.hardware import CollectiveCurve, HardwareProfile

Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Message:
    """A collective that each rank takes part in `times` times a step.

    size: bytes of the full buffer. ranks: of the group, each `stride` ranks after the one before. choices: of
    an all-to-all that sends a row once to a domain and once to a rank, the experts that it is meant for, of
    so many `experts`, in some groups or one after the other (`limit`, `consecutive`, see `reached`); 0: a row
    for each.
    """

    kind: str
    size: Reals
    ranks: Reals
    times: Reals | float
    stride: Reals | float = 1.0
    choices: Reals | float = 0.0
    experts: int = 0
    limit: tuple[int, int] = (1, 1)
    consecutive: bool = False


@dataclass(frozen=True)
class Wires:
    """The fabrics of a job of so many ranks."""

    hardware: HardwareProfile
    world_size: int

    @property
    def domain(self) -> int:
        """Ranks of a scale-up domain that the job runs on."""
        return devices_taken(self.world_size, self.hardware.scale_up_size)

    def seconds(self, message: Message) -> tuple[Reals, Reals]:
        """Seconds in which a message keeps (scale-up, scale-out) busy: one of the two."""
        n = np.asarray(message.ranks)
        if not np.any(n > 1):
            return np.zeros_like(n), np.zeros_like(n)
        intra = np.minimum(n, np.maximum(np.ceil(self.domain / np.maximum(message.stride, 1)), 1))
        times = np.where(n > 1, message.times, 0.0) * self.scale(message.kind)
        inside = intra >= n
        wire = self._wire(message.kind, message.size, n) * _distinct(n, message)
        up = times * self._inside(message.kind, n, wire)
        if inside.all():
            return up, np.zeros_like(up)
        return np.where(inside, up, 0), np.where(inside, 0, times * self._across(message, n, intra))

    def scale(self, kind: str) -> float:
        """What calibration multiplies a kind of work by; 0 where a negative overhead could undo any of it."""
        correction = self.hardware.corrections.get(kind)
        if correction is None:
            return 1.0
        return correction.scale if correction.overhead >= 0 else 0.0

    @staticmethod
    def _wire(kind: str, size: Reals, ranks: Reals) -> Reals:
        """Bytes that a rank sends to the others of its group."""
        if kind == "send_recv":
            return size
        return np.asarray((2.0 if kind == "all_reduce" else 1.0) * size * (ranks - 1) / np.maximum(ranks, 1))

    def _inside(self, kind: str, ranks: Reals, wire: Reals) -> Reals:
        curve, share = self.hardware.scale_up.collectives[kind], self.hardware.peer_share
        if kind == "send_recv":
            return _curve(curve, np.ones_like(ranks), wire / share)
        bridges = self.hardware.scale_up.bridges
        faster = bridges.faster.get(kind, 1.0) if bridges else 1.0  # at best under one bridge
        return _curve(curve, ranks, wire / np.clip((ranks - 1) * share, 1e-9, 1.0) / faster)

    def _across(self, message: Message, n: Reals, intra: Reals) -> Reals:
        """Of a group over several domains: over the NICs, and inside the domains at the same time."""
        kind, domains = message.kind, n / intra
        curve = self.hardware.scale_out.collectives[kind]
        crossing = self._crossing(kind, domains)
        if kind == "send_recv":
            return _curve(curve, np.ones_like(n), message.size * crossing)
        if kind == "all_to_all":
            outside = message.size * (n - intra) / n * _distinct(domains, message)
            within = message.size * (intra - 1) / n * _distinct(n, message)
            wire, once = outside * crossing, np.asarray(message.choices) > 0
            slow = np.where(
                once, _curve(sent_once(self.hardware.scale_out), domains, wire), _curve(curve, n, wire)
            )
        else:
            outside = self._wire(kind, message.size / intra, domains if kind == "all_reduce" else n)
            within = self._wire(kind, message.size, intra)
            slow = _curve(curve, domains, outside * crossing)
        return np.maximum(slow, np.where(intra > 1, self._inside(kind, intra, within), 0.0))

    def _crossing(self, kind: str, domains: Reals) -> Reals:
        """How many times as long bytes between domains take for the spine's sake."""
        fabric = self.hardware.scale_out
        leaf = fabric.domains_per_leaf
        share = (
            (domains - leaf) / np.maximum(domains - 1, 1)
            if kind == "all_to_all"
            else np.full_like(domains, 1 / leaf)
        )
        return np.where(domains <= leaf, 1.0, np.maximum(1.0, fabric.oversubscription * share))


def _distinct(places: Reals, message: Message) -> Reals:
    """Rows sent to places, of those that would be sent once for each of a row's choices of one."""
    if not np.any(message.choices):
        return np.ones(1)
    many, at = np.unique(places, return_inverse=True)
    found = places
    for choices in np.unique(message.choices):
        sent = many * reached(many, choices, message.experts, message.limit, message.consecutive)
        once = sent / choices if choices else np.ones(len(many))
        found = np.where(message.choices == choices, once[at], found)
    return found


def _curve(curve: CollectiveCurve, ranks: Reals, wire: Reals) -> Reals:
    """latency + ranks x latency_per_rank + wire / (bandwidth x efficiency(wire)), see CollectiveCurve."""
    wire = np.maximum(wire, 1e-9)
    moved = wire * (1 + (curve.bytes_half / wire) ** curve.ramp)
    return np.asarray(curve.latency.si + ranks * curve.latency_per_rank.si + moved / curve.bandwidth.si)
