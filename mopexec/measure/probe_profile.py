"""From the ranks' raw timings to the parts of a HardwareProfile."""

import datetime
import re
import statistics
from collections.abc import Iterable

import torch
from msgspec.structs import replace

from mopexec.measure import probe_machine
from mopexec.measure.probe_collectives import wire_bytes
from mopexec.measure.probe_compute import ATTENTION_DTYPE
from mopexec.measure.probe_fit import LineFit, fit_attention, fit_line, fit_matmul, split_latency
from mopexec.measure.probe_machine import Gpu
from mopexec.measure.probe_ranks import Raw
from mopexec.measure.probe_timing import Sample
from mopsim.common.units import DTYPE_BYTES, GIB
from mopsim.spec.hardware import (
    COLLECTIVES,
    AttentionCurve,
    CollectiveCurve,
    Device,
    Fabric,
    HardwareProfile,
    Host,
    MatmulCurve,
    Quantity,
    Rounds,
    Tag,
)
from mopsim.spec.new_card import assumed_rounds
from mopsim.spec.profiles import list_profiles, load_profile

RANK_MEMORY = GIB // 2
"""Bytes of one rank's interpreter, torch and communication buffers on a CPU."""


def build_profile(raws: list[Raw], device_type: str, ranks: int) -> HardwareProfile:
    """The profile fitted to what the ranks measured; a quantity is the median over ranks."""
    gpu = probe_machine.gpu(0) if device_type == "cuda" else None
    model = gpu.name if gpu else probe_machine.cpu_model()
    parts = _Parts(raws, device_type, ranks, model, gpu)
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    device, host, fabric = parts.device(), parts.host(), parts.fabric()
    return HardwareProfile(
        name=f"{slug}-{ranks}x",
        device_kind="cuda" if gpu else "cpu",
        devices_per_node=ranks,
        scale_up_size=ranks,
        device=device,
        host=host,
        scale_up=replace(fabric, rounds=parts.rounds(device.architecture)),
        scale_out=fabric,
        communication_share=round(statistics.median(raw.share[0] for raw in raws), 3),
        notes=parts.notes(),
    )


def _merge(samples: Iterable[Sample]) -> Sample:
    """One Sample for all ranks: median seconds, largest spread."""
    every = list(samples)
    seconds, spread = statistics.median(s.seconds for s in every), max(s.spread for s in every)
    return Sample(seconds, spread, sum(s.repeats for s in every))


class _Parts:
    """Fits each part of the profile; keeps the fits' errors for the notes."""

    def __init__(self, raws: list[Raw], device_type: str, ranks: int, model: str, gpu: Gpu | None) -> None:
        self.raws, self.first, self.device_type, self.ranks, self.gpu = raws, raws[0], device_type, ranks, gpu
        today = datetime.date.today().isoformat()
        self.source = f"mopexec probe on {model}, torch {torch.__version__}, {today}"
        self.memory = fit_line(self._traffic())
        self.errors: dict[str, float] = {"memory": self.memory.error}

    def _traffic(self) -> list[tuple[float, float]]:
        """(mean bytes, mean seconds) of the operators at each size: their mix, as a step runs it."""
        names = list(dict.fromkeys(name for name, _ in self.first.traffic))
        keys = [[key for key in self.first.traffic if key[0] == name] for name in names]
        return [
            (
                statistics.fmean(size for _, size in mix),
                statistics.fmean(_merge(raw.traffic[key] for raw in self.raws).seconds for key in mix),
            )
            for mix in zip(*keys, strict=True)
        ]

    def quantity(self, value: float, unit: str, tag: Tag = "measured", note: str = "") -> Quantity:
        return Quantity(value=float(f"{value:.5g}"), unit=unit, tag=tag, source=f"{self.source}{note}")

    def device(self) -> Device:
        curves = tuple(self.matmul(dtype) for dtype in self.first.matmul)
        peak = next(c.peak.si for c in curves if c.dtype == ATTENTION_DTYPE[self.device_type])
        memory, reserved, why = self._memory()
        power = self.gpu.power if self.gpu else None
        return Device(
            architecture=probe_machine.architecture(torch.device(self.device_type, 0)),
            memory=self.quantity(memory / GIB, "GiB"),
            reserved=self.quantity(reserved / GIB, "GiB", "assumed", why),
            memory_bandwidth=self.quantity(self.memory.bandwidth / 1e9, "GB/s"),
            launch_overhead=self.quantity(_merge(raw.launch for raw in self.raws).seconds * 1e6, "us"),
            matmul=curves,
            attention=self.attention(peak),
            adam_rate=self.quantity(1e-6 / _merge(raw.device_adam for raw in self.raws).seconds, "Mparams/s"),
            power=self.quantity(power, "W", "datasheet", ": NVML's power limit") if power else None,
        )

    def matmul(self, dtype: str) -> MatmulCurve:
        shapes = self.first.matmul[dtype]
        seconds = {shape: [_merge(raw.matmul[dtype][shape] for raw in self.raws).seconds] for shape in shapes}
        fit = fit_matmul(seconds, self.memory.bandwidth, DTYPE_BYTES[dtype])
        self.errors[f"matmul {dtype}"] = fit.error
        known = probe_machine.dense_peak(self.gpu.name, dtype) if self.gpu else None
        peak = max(known, fit.best) if known else max(fit.rate, fit.best)
        tag: Tag = "datasheet" if known else "measured"
        note = ": the card's dense peak" if known else ": asymptote or best shape, whichever is higher"
        return MatmulCurve(
            dtype=dtype,
            peak=Quantity(value=peak / 1e9, unit="GFLOP/s", tag=tag, source=self.source + note),
            efficiency=min(fit.rate / peak, 1.0),
            m_half=round(fit.m_half, 2),
            n_half=round(fit.n_half, 2),
            k_half=round(fit.k_half, 2),
            tag="measured",
            source=self.source,
        )

    def attention(self, peak: float) -> AttentionCurve:
        """Both directions as fractions of the matmul peak of the dtype that was timed."""
        sides = [
            {
                length: (flops, _merge(getattr(raw.attention, side)[length][1] for raw in self.raws).seconds)
                for length, (flops, _) in getattr(self.first.attention, side).items()
            }
            for side in ("forward", "backward")
        ]
        fit = fit_attention(*sides)
        self.errors["attention"] = fit.error
        return AttentionCurve(
            forward=min(fit.forward / peak, 1.0),
            backward=min(fit.backward / peak, 1.0),
            seq_half=round(fit.seq_half, 2),
            tag="measured",
            source=self.source,
        )

    def _memory(self) -> tuple[float, float, str]:
        """(bytes of device memory per rank, bytes reserved of it, why)."""
        if self.gpu:
            return self.gpu.memory, min(2 * GIB, self.gpu.memory * 0.1), ": CUDA context and NCCL buffers"
        share = probe_machine.machine_memory() / self.ranks
        why = ": half is the host tier, the same memory here, and 0.5 GiB a rank's own"
        return share, share / 2 + min(RANK_MEMORY, share * 0.1), why

    def host(self) -> Host:
        part = 0.9 if self.gpu else 0.5
        note = f": {100 * part:.0f} % of the RAM" + ("" if self.gpu else ", the rest is the device tier")
        h2d, d2h = self._link("h2d"), self._link("d2h")
        return Host(
            memory=self.quantity(probe_machine.machine_memory() / GIB * part, "GiB", note=note),
            memory_bandwidth=self.quantity(self._host_bandwidth() / 1e9, "GB/s", note=": all ranks together"),
            link_h2d=self.quantity(h2d.bandwidth / 1e9, "GB/s"),
            link_d2h=self.quantity(d2h.bandwidth / 1e9, "GB/s"),
            link_latency=self.quantity((h2d.latency + d2h.latency) / 2 * 1e6, "us"),
            adam_rate=self.quantity(1e-6 / _merge(raw.host_adam for raw in self.raws).seconds, "Mparams/s"),
            cores=len(probe_machine.usable_cores()),
        )

    def _link(self, side: str) -> LineFit:
        sizes = [size for kind, size in self.first.copies if kind == side]
        fit = fit_line((size, _merge(raw.copies[side, size] for raw in self.raws).seconds) for size in sizes)
        self.errors[side] = fit.error
        return fit

    def _host_bandwidth(self) -> float:
        """Bytes/s of the node's DRAM: all ranks copying at once; a CPU both reads and writes it."""
        size, ways = max(size for _, size in self.first.copies), 1 if self.gpu else 2
        return sum(ways * size / raw.copies["h2d", size].seconds for raw in self.raws[: self.ranks])

    def fabric(self) -> Fabric:
        if not self.first.collectives:
            return self._assumed_fabric()
        curves = {kind: self._collective(kind) for kind in COLLECTIVES}
        peak = max(curve.bandwidth.si for curve in curves.values())
        return Fabric(
            peak=self.quantity(peak / 1e9, "GB/s", note=": the fastest collective"), collectives=curves
        )

    def rounds(self, architecture: str) -> Rounds | None:
        """No probe times kernels that send a few rows at a time: those of a known card."""
        return assumed_rounds([load_profile(name) for name in list_profiles()], architecture)

    def _collective(self, kind: str) -> CollectiveCurve:
        fits = {ranks: self._line(kind, ranks) for ranks in sorted(self.first.collectives)}
        fixed, per_rank, told_apart = split_latency({ranks: fit.latency for ranks, fit in fits.items()})
        if kind == "send_recv":  # a hop involves two ranks whatever the group: all of it is fixed cost
            fixed, per_rank, told_apart = fits[max(fits)].latency, 0.0, True
        tag: Tag = "measured" if told_apart else "assumed"
        note = "" if told_apart else ": one group size was measured, half is ascribed to the ranks"
        return CollectiveCurve(
            latency=self.quantity(fixed * 1e6, "us", tag, note),
            latency_per_rank=self.quantity(per_rank * 1e6, "us", tag, note),
            bandwidth=self.quantity(fits[max(fits)].bandwidth / 1e9, "GB/s"),
        )

    def _line(self, kind: str, ranks: int) -> LineFit:
        members = [raw.collectives[ranks] for raw in self.raws if ranks in raw.collectives]
        sizes = [size for name, size in members[0] if name == kind]
        points = [
            (wire_bytes(kind, size, ranks), _merge(member[kind, size] for member in members).seconds)
            for size in sizes
        ]
        fit = fit_line(points)
        self.errors[f"{kind} x{ranks}"] = fit.error
        return fit

    def _assumed_fabric(self) -> Fabric:
        """One GPU has no peer to time: collectives would pass through the host's link."""
        link = min(self._link(side).bandwidth for side in ("h2d", "d2h"))
        note = ": no second GPU to measure with; the bandwidth is the host link's"
        peak = self.quantity(link / 1e9, "GB/s", "assumed", note)
        curve = CollectiveCurve(
            latency=self.quantity(20.0, "us", "assumed", note),
            latency_per_rank=self.quantity(2.0, "us", "assumed", note),
            bandwidth=peak,
        )
        return Fabric(peak=peak, collectives=dict.fromkeys(COLLECTIVES, curve))

    def notes(self) -> str:
        """Noise (90th percentile / low quantile, median over cases) and the fits' median relative errors."""
        noise = {
            "matmul": [
                s.spread for raw in self.raws for samples in raw.matmul.values() for s in samples.values()
            ],
            "memory": [s.spread for raw in self.raws for s in raw.traffic.values()],
            "launch": [raw.launch.spread for raw in self.raws],
            "collectives": [
                s.spread for raw in self.raws for group in raw.collectives.values() for s in group.values()
            ],
            "overlap (max - min)": [raw.share[1] for raw in self.raws if raw.collectives],
        }
        spread = ", ".join(
            f"{name} {statistics.median(values):.2f}" for name, values in noise.items() if values
        )
        errors = ", ".join(f"{name} {100 * error:.0f} %" for name, error in self.errors.items())
        where = "scale_out is a copy of scale_up: one node was measured"
        return f"noise (p90 / low): {spread}. median error of the curves: {errors}. {where}."
