"""All machines: choose the curves of each, fit them once, assemble the profiles."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from hardware_profiles.data.fit import assemble, attention, collectives, matmul, pcie
from hardware_profiles.data.fit.assemble import Entry, MachineFits
from hardware_profiles.data.fit.attention import AttentionFit
from hardware_profiles.data.fit.collectives import CollectiveFit, OverNodes
from hardware_profiles.data.fit.dispatch import fit_dispatch
from hardware_profiles.data.fit.dispatch import rows as dispatch_rows
from hardware_profiles.data.fit.matmul import MatmulFit
from hardware_profiles.data.fit.networks import TABLE, network
from hardware_profiles.data.fit.rows_in_node import CARDS, RoundsFit, fit_rounds
from hardware_profiles.data.fit.rows_in_node import TABLE as ROWS_IN_NODE
from hardware_profiles.data.fit.tables import Residuals, read_csv, round_to
from mopsim.common.errors import MopError
from mopsim.common.io import parse_yaml, read_text
from mopsim.common.units import UNITS
from mopsim.spec.hardware import COLLECTIVES, HardwareProfile, Tag

_NONE = Residuals(0, 0.0, 0.0, 0.0)


def _assumed(efficiency: float, half: float, floor: float) -> MatmulFit:
    return MatmulFit(efficiency, half, half, half, floor, _NONE, _NONE)


#: Matmul curves of the cards nobody measured by shape: (curve, where the efficiency comes from).
ASSUMED_MATMUL = {
    "mi300x": (
        _assumed(0.51, 100.0, 5e-6),
        "best of a shape search 668 of 1307 TFLOP/s; sizes at half rate assumed",
    ),
    "amd": (_assumed(0.51, 100.0, 5e-6), "sizes at half rate as MI300X, assumed"),
    "rtx4090": (_assumed(0.90, 80.0, 3e-6), "a small, power-unlimited part runs near its peak; assumed"),
}
ASSUMED_ATTENTION = {
    "a100": AttentionFit(
        0.64, 0.54, 500.0, _NONE, "FlashAttention-2 (arXiv 2307.08691, A100), read from its figures"
    ),
    "ada": AttentionFit(0.70, 0.55, 500.0, _NONE, "FlashAttention-2 on Ada, assumed"),
}
#: gemm table -> the machine whose attention curve its cards take where they have none of their own.
ATTENTION_OF = {"h100_sxm": "h200-sxm-141g", "b300_sxm": "gb300-288g", "assumed:amd": "mi300x-192g"}
#: bf16 card -> the card whose best fp8 product is compared with its best bf16 product.
FP8_MEASURED = {
    "h100_sxm": "h100-sxm-80g",
    "h200_sxm": "h100-sxm-80g",
    "b200_sxm": "b200-sxm-192g",
    "gb200": "gb200-186g",
}


class Fitter:
    """The tables, read once; every fit is made once and kept."""

    def __init__(self, gemm: Path, nccl: Path, components: Path, machines: Path) -> None:
        self._gemm = read_csv(gemm, ("gpu", "m", "n", "k", "latency_s"))
        self._nccl = read_csv(nccl, ("gpu", "op", "num_gpus", "message_elements_or_bytes", "latency_s"))
        self._nccl += pcie.rows()
        self._components = read_csv(components, ("component", "system", "gpu", "params", "value"))
        data = parse_yaml(read_text(machines), str(machines))
        if not isinstance(data, dict) or not {"hosts", "machines"} <= set(data):
            raise MopError(f"{machines}: must have the fields hosts and machines")
        self.hosts: dict[str, Entry] = _whole(data["hosts"])
        self.networks: dict[str, Entry] = data.get("networks", {})
        self.machines: dict[str, Entry] = _whole(data["machines"])
        self.report: dict[str, str] = {}
        self._in_node: dict[tuple[str, ...], RoundsFit] = {}
        self._matmul: dict[str, tuple[MatmulFit, float]] = {}
        self._nodes: dict[str, dict[str, CollectiveFit]] = {}

    def profiles(self) -> list[HardwareProfile]:
        """Every machine of machines.yaml, fitted; `report` then holds the residuals by curve."""
        return [self._profile(name, machine) for name, machine in self.machines.items()]

    def _profile(self, name: str, machine: Entry) -> HardwareProfile:
        host = self.hosts.get(machine["host"])
        if host is None:
            raise MopError(f"machines.{name}.host: {machine['host']!r} is not one of {', '.join(self.hosts)}")
        return assemble.profile(name, self._bridged(machine), host, self._fits(name, machine))

    def _fits(self, name: str, machine: Entry) -> MachineFits:
        curves = machine["curves"]
        card = machine.get("like", name)
        fit, tag, source = self._dense(card, machine)
        bandwidth, bandwidth_tag, bandwidth_source = self._bandwidth(machine)
        grouped = self._grouped(curves["grouped"], card) if "grouped" in curves else None
        held = curves.get("attention_held", fit.held)
        shapes, shape_tag = self._attention(card, curves["gemm"], held)
        node, node_tag, node_source = self._collectives(name, machine)
        ratios = self._fp8(curves["gemm"])
        ratios |= {dtype: (ratio, why) for dtype, (ratio, why) in machine.get("ratios", {}).items()}
        derived = tuple(machine.get("rates", {}).get("derived", ()))
        over = self.over_nodes(machine["network"]) if "network" in machine else None
        floor_tag: Tag = "assumed" if str(curves["gemm"]).startswith("assumed:") else tag
        return MachineFits(
            fit, tag, source, floor_tag, ratios, grouped, bandwidth, bandwidth_tag, bandwidth_source,
            shapes, shape_tag, node, node_tag, node_source, derived, over,
            self._rounds(machine),
        )  # fmt: skip

    def _table(self, gpu: str) -> tuple[MatmulFit, float]:
        """The matmul fit and the streaming bandwidth of one GPU of the gemm table."""
        if gpu not in self._matmul:
            rows = [row for row in self._gemm if row["gpu"] == gpu]
            if not rows:
                raise MopError(f"machines: curves.gemm {gpu!r} is not a gpu of the gemm table")
            owner = self._owner(gpu)
            bandwidth = matmul.streaming_bandwidth(rows)
            fit = matmul.fit_matmul(rows, _si(owner["peaks"]["bfloat16"]), bandwidth)
            self._matmul[gpu] = fit, bandwidth
            self.report[f"matmul {gpu}"] = f"all {fit.residuals}; above 100 GFLOP {fit.residuals_large}"
        return self._matmul[gpu]

    def matmul_fit(self, gpu: str) -> MatmulFit:
        """The fit of one GPU of the gemm table."""
        return self._table(gpu)[0]

    def _micro(self, machine: Entry) -> tuple[MatmulFit, float, Tag, str]:
        """The curve of a machine's microbenchmark, or an assumed one: fit, bandwidth, tag, source."""
        gpu = str(machine["curves"]["gemm"])
        if gpu.startswith("assumed:"):
            fit, why = ASSUMED_MATMUL[gpu.removeprefix("assumed:")]
            return fit, self._bandwidth(machine)[0], "assumed", why
        fit, bandwidth = self._table(gpu)
        source = f"fitted to the {gpu} rows of gemm_bf16.csv (aiconfigurator system tables)"
        return fit, bandwidth, "measured", source

    def _dense(self, name: str, machine: Entry) -> tuple[MatmulFit, Tag, str]:
        curves = machine["curves"]
        fit, _, tag, source = self._micro(machine)
        if "table" in curves:
            rows = self._library(curves["table"])
            efficiency, residuals = matmul.table_efficiency(rows, fit, _si(machine["peaks"]["bfloat16"]))
            self.report[f"matmul {name}, its own table"] = str(residuals)
            fit = replace(fit, efficiency=efficiency, residuals_large=residuals, held=1.0)
            tag = "measured"
            source = f"efficiency from the {curves['table']} table of components.csv, shape {source}"
        if "held" in curves:
            return self._held(curves["held"], name, fit, source)
        if "held_rate" in curves:
            held = replace(fit, held=float(curves["held_rate"]), held_wide=fit.held)
            return held, curves.get("held_tag", "assumed"), f"{source}; held: {curves['held_why']}"
        return fit, tag, source

    def _held(self, owner: str, name: str, fit: MatmulFit, source: str) -> tuple[MatmulFit, Tag, str]:
        """A microbenchmark's curve, bounded by what the owner of a sweep of training's products holds in it;
        on other cards of the architecture by the same share of their own microbenchmark."""
        other = self.machines[owner]
        micro, bandwidth, _, _ = self._micro(other)
        peak = _si(other["peaks"]["bfloat16"])
        held, residuals = matmul.held_rate(self._library(owner), micro, peak, bandwidth)
        self.report[f"matmul {owner}, a sweep of training's products"] = str(residuals)
        share = held / micro.efficiency
        why = f"{source}; held: {share:.3f} of it, as {owner} in a sweep of training's products"
        tag: Tag = "measured" if owner == name else "assumed"
        return replace(fit, held=round_to(fit.efficiency * share)), tag, why

    def _library(self, gpu: str) -> list[dict[str, str]]:
        """A card's dense products by a library, of no search for the best shape."""
        rows = [row for row in self._of("gemm", gpu) if row["system"].startswith("library")]
        return [row for row in rows if "grouped" not in row["params"]]

    def _owner(self, gpu: str) -> Entry:
        """The machine that a GPU of the measured tables is."""
        if _OWNER.get(gpu) not in self.machines:
            raise MopError(f"machines: no machine is the {gpu!r} of the measured tables")
        return self.machines[_OWNER[gpu]]

    def _card(self, machine: Entry) -> Entry:
        """The entry that a machine is `like`, or itself."""
        return self.machines.get(machine.get("like", ""), machine)

    def _of(self, component: str, gpu: str) -> list[dict[str, str]]:
        return [row for row in self._components if row["component"] == component and row["gpu"] == gpu]

    def _bandwidth(self, machine: Entry) -> tuple[float, Tag, str]:
        """What kernels reach of the memory bandwidth: the fraction of the table's own card, or 0.85."""
        datasheet, gpu = _si(machine["memory_bandwidth"]), str(machine["curves"]["gemm"])
        value, unit, _, where = machine["memory_bandwidth"]
        sheet = f"{value} {unit} ({where})"
        if "bandwidth_share" in machine:
            share, given, why = machine["bandwidth_share"]
            return float(share) * datasheet, given, f"{share} of {sheet}: {why}"
        if gpu.startswith("assumed:"):
            return 0.85 * datasheet, "assumed", f"0.85 of {sheet}"
        _, streaming = self._table(gpu)
        owner = self._owner(gpu)
        fraction = streaming / _si(owner["memory_bandwidth"])
        tag: Tag = "measured" if self._card(machine) is owner else "assumed"
        return (
            fraction * datasheet,
            tag,
            f"{fraction:.3f} of {sheet}: skinny products of the {gpu} rows of gemm_bf16.csv",
        )

    def _grouped(self, owner: str, name: str) -> tuple[float, float, Tag, str]:
        """Grouped products of the machine that has a table of them, against its dense ones."""
        machine = self.machines[owner]
        dense, _, _ = self._dense(owner, machine)
        rows = [row for row in self._of("gemm", owner) if "grouped" in row["params"]]
        peak = _si(machine["peaks"]["bfloat16"])
        fit = matmul.fit_grouped(rows, dense, peak, self._bandwidth(machine)[0])
        self.report[f"grouped matmul {owner}"] = str(fit.residuals)
        if "grouped_share" in self.machines[name]:
            own, why = self.machines[name]["grouped_share"]
            return float(own), fit.m_half, "measured", str(why)
        share = min(1.0, fit.efficiency / dense.efficiency)
        source = f"grouped products of {owner}, forward and gradients of inputs (components.csv)"
        return share, fit.m_half, "measured" if owner == name else "assumed", source

    def _rounds(self, machine: Entry) -> tuple[RoundsFit, Tag, str] | None:
        """Of kernels that send rows a few at a time: those of the architecture's cards that were timed."""
        cards = CARDS.get(machine["architecture"])
        if cards is None:
            return None
        if cards not in self._in_node:
            fit = self._in_node[cards] = fit_rounds(cards)
            others = "; ".join(f"{page} by the others {errors}" for page, errors in fit.others.items())
            self.report[f"rounds {', '.join(cards)}"] = f"all {fit.residuals}; {others}"
        fit = self._in_node[cards]
        tag: Tag = "measured" if self._card(machine) in map(self._owner, cards) else "assumed"
        source = f"fitted to the {' and '.join(cards)} rows of {ROWS_IN_NODE.name}, {fit.residuals}"
        return fit, tag, source

    def _fp8(self, gpu: str) -> dict[str, tuple[float, str]]:
        if gpu not in FP8_MEASURED:
            return {}
        best = matmul.best_rates(self._components, FP8_MEASURED[gpu])
        owner = self.machines[FP8_MEASURED[gpu]]["peaks"]
        ratio = best["fp8"] / _si(owner["fp8"]) / (best["bf16"] / _si(owner["bfloat16"]))
        ratio = round(min(ratio, 1.0), 3)
        source = f"{ratio} of the bf16 efficiency, by the best fp8 and bf16 products of {FP8_MEASURED[gpu]}"
        return {"fp8": (ratio, source)}

    @cached_property
    def _attention_fits(self) -> dict[str, AttentionFit]:
        """By machine (heads of 128) and machine_wide."""
        rows = [row for row in self._components if row["component"] == "attention_kernel"]
        peaks = {name: _si(machine["peaks"]["bfloat16"]) for name, machine in self.machines.items()}
        b200, h200 = "b200-sxm-192g", "h200-sxm-141g"
        fits = {
            b200: attention.fit_blackwell(rows, peaks[b200], wide=False),
            f"{b200}_wide": attention.fit_blackwell(rows, peaks[b200], wide=True),
            h200: attention.fit_cudnn(rows, h200, peaks[h200], ""),
            f"{h200}_wide": attention.fit_hopper(rows, peaks[h200]),
        }
        for name in ("gb200-186g", "gb300-288g"):
            for heads in ("", "narrow", "wide"):
                key = f"{name}_{heads}" if heads else name
                fits[key] = attention.fit_cudnn(rows, name, peaks[name], heads)
        fits |= attention.fit_aiter(rows, peaks)
        fits[f"{b200}_narrow"] = fits["gb200-186g_narrow"]
        fits[f"{h200}_narrow"] = replace(
            attention.fit_cudnn(rows, h200, peaks[h200], "narrow"),
            backward=round_to(fits[h200].backward * attention.NARROW_BACKWARD),
        )
        self.report |= {f"attention {name}": str(fit.residuals) for name, fit in fits.items()}
        return fits

    def _attention(self, name: str, gpu: str, held: float) -> tuple[dict[str, AttentionFit], Tag]:
        """The curves of a machine by class of heads: its own, or those of the card of its architecture that
        was measured, as far as power lets them. held: share of the peak at which it does, that of products
        unless machines.yaml has another."""
        fits = self._attention_fits
        owner = name if name in fits else ATTENTION_OF.get(gpu, "")
        if not owner:
            family = "a100" if gpu.startswith("a100") else "ada"
            return {"": ASSUMED_ATTENTION[family]}, "assumed"
        keys = {heads: f"{owner}_{heads}" if heads else owner for heads in ("", "narrow", "wide")}
        found = {heads: fits[key] for heads, key in keys.items() if key in fits}
        found = {heads: replace(fit, held=held) for heads, fit in found.items()}
        return found, "measured" if owner == name else "assumed"

    def node(self, gpu: str) -> dict[str, CollectiveFit]:
        """Those inside a node of one GPU of the NCCL tables."""
        if gpu not in self._nodes:
            owner = self._owner(gpu)
            rows, peak = self._timed(gpu), _si(owner["scale_up"])
            over_pcie = "ranks" in owner["curves"]
            fits = pcie.fit_pcie(rows, peak, owner) if over_pcie else collectives.fit_node(rows, peak)
            self._nodes[gpu] = fits
            for op, fit in fits.items():
                if fit.residuals.rows:
                    self.report[f"{op} {gpu}"] = f"all {fit.residuals}; above 1 MB {fit.residuals_large}"
        return self._nodes[gpu]

    def _timed(self, gpu: str) -> list[dict[str, str]]:
        return [row for row in self._nccl if row["gpu"] == gpu]

    def _bridged(self, machine: Entry) -> Entry:
        """With how much faster groups under one bridge are, where the collectives' table says it."""
        bridges = machine.get("bridges")
        if bridges is None or "faster" in bridges:
            return machine
        wanted = machine["curves"]["collectives"]
        peak = _si(machine["scale_up"])
        times = pcie.faster(self._timed(wanted), peak, self.node(wanted), bridges["devices"])
        return {**machine, "bridges": {**bridges, "faster": times}}

    def over_nodes(self, name: str) -> OverNodes:
        """The curves of a network's NICs."""
        rows = read_csv(TABLE, ("network", "op", "num_gpus", "size_bytes", "seconds"))
        found = network(name, self.networks, rows)
        sent_once = fit_dispatch(name, dispatch_rows())
        if sent_once:
            found = found.with_dispatch(*sent_once)
        for op, fit in found.fits.items():
            if found.tags[op] == "measured":
                self.report[f"{op} {name}"] = f"all {fit.residuals}; above 1 MB {fit.residuals_large}"
        return found

    def _collectives(self, name: str, machine: Entry) -> tuple[dict[str, CollectiveFit], Tag, str]:
        curves = machine["curves"]
        wanted = curves["collectives"]
        if wanted == "given":
            given = machine["given"]
            fits = {op: _plain(v[0] * 1e-6, v[1] * 1e9) for op, v in given.items() if op != "source"}
            return fits, "assumed", str(given["source"])
        if wanted == "mesh":
            return self._mesh(name, machine)
        node = self.node(wanted)
        published = any("source_ref" in row for row in self._timed(wanted))
        table = pcie.TABLE.name if published else "nccl_single_node.csv (aiconfigurator system tables)"
        source = f"fitted to the {wanted} rows of {table}"
        if "bandwidth_scale" in curves:
            scale = float(curves["bandwidth_scale"])
            scaled = {op: _scaled(fit, scale) for op, fit in node.items()}
            return scaled, "assumed", f"{source}, bandwidth times {scale}: {curves['bandwidth_why']}"
        tag: Tag = "measured" if self._card(machine) is self._owner(wanted) else "assumed"
        return node, tag, source + pcie.words(machine)

    def _mesh(self, name: str, machine: Entry) -> tuple[dict[str, CollectiveFit], Tag, str]:
        """RCCL over all links of a mesh: delays and the size at half rate of the all-reduce that was timed by
        size, on other cards too; the rate of each op in 8 GiB as `rates` has it (GB/s; 0: of the timings)."""
        given = machine["rates"]
        owner = given["timed"]
        peak = _si(self.machines[owner]["scale_up"])
        timed = collectives.fit_timed(self._of("all_reduce", owner), peak)
        self.report[f"all_reduce {owner}"] = f"all {timed.residuals}; above 1 MB {timed.residuals_large}"
        rates = {op: float(rate) * 1e9 for op, rate in given.items() if op in COLLECTIVES}
        ranks = machine["devices_per_node"]
        fits = {
            op: collectives.at_length(op, ranks, 2.0**33, rate, timed) if rate else timed
            for op, rate in rates.items()
        }
        fits["send_recv"] = _plain(1e-5, rates["send_recv"], half=timed.bytes_half)
        return fits, "measured" if owner == name else "assumed", str(given["source"])


#: Which machine each GPU of the tables is.
_OWNER = {
    "a100_sxm": "a100-sxm-80g", "h100_sxm": "h100-sxm-80g", "h200_sxm": "h200-sxm-141g",
    "b200_sxm": "b200-sxm-192g", "b300_sxm": "b300-sxm-288g", "gb200": "gb200-186g", "gb300": "gb300-288g",
    "l40s": "l40s-48g", "rtx4090": "rtx4090-24g",
}  # fmt: skip


def _whole(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Entries with what those that they are `like` have and they do not."""
    return {name: {**entries.get(entry.get("like", ""), {}), **entry} for name, entry in entries.items()}


def _si(listed: list[float | str]) -> float:
    return float(listed[0]) * UNITS[str(listed[1])]


def _plain(latency: float, bandwidth: float, per_rank: float = 0.0, half: float = 0.0) -> CollectiveFit:
    return CollectiveFit(latency, per_rank, bandwidth, half, _NONE, _NONE)


def _scaled(fit: CollectiveFit, scale: float) -> CollectiveFit:
    return CollectiveFit(
        fit.latency,
        fit.latency_per_rank,
        fit.bandwidth * scale,
        fit.bytes_half,
        fit.residuals,
        fit.residuals_large,
    )
