"""The scale-out network of a cluster as a bill: ports, tiers, switches, optics. A folded Clos (fat tree)."""

import math
from dataclasses import dataclass

from mopsim.common.errors import MopError
from mopsim.size.assumptions import Assumptions
from mopsim.spec.hardware import HardwareProfile


@dataclass(frozen=True)
class Network:
    """ports: of NICs, at the switches' rate. tiers: 0 where one domain holds all. links: cables of two ends.
    price: dollars of switches and optics. power: watts of the switches."""

    ports: int
    tiers: int
    switches: int
    links: int
    oversubscription: float
    price: float
    power: float


def network(hardware: HardwareProfile, nodes: int, a: Assumptions) -> Network:
    """The smallest fat tree of `nodes`: switches of r ports reach r NIC ports in one tier, r^2/2 in two,
    r^3/4 in three, with an oversubscription o at the leaves (o of 1 + o of a leaf's ports lead down).

    Raises MopError beyond three tiers.
    """
    radix, over = int(a.switch_ports), hardware.scale_out.oversubscription
    rate = hardware.devices_per_node * hardware.scale_out.peak.si
    ports = nodes * max(1, math.ceil(rate / a.port_rate - 1e-9))
    if nodes * hardware.devices_per_node <= hardware.scale_up_size:
        return Network(0, 0, 0, 0, over, 0.0, 0.0)
    down = max(1, int(radix * over / (1 + over)))
    if ports <= radix:
        tiers, switches, links = 1, 1, ports
    else:
        leaves = math.ceil(ports / down)
        up = leaves * (radix - down)
        if leaves <= radix:
            tiers, switches, links = 2, leaves + math.ceil(up / radix), ports + up
        elif leaves <= radix * radix // 2:
            tiers = 3
            switches = leaves + math.ceil(up / (radix // 2)) + math.ceil(up / radix)
            links = ports + 2 * up
        else:
            raise MopError(f"--assume switch_ports: {radix} are too few for {ports:,} ports in three tiers")
    price = switches * a.switch_price + 2 * links * a.optics_price
    return Network(ports, tiers, switches, links, over, price, switches * a.switch_power)
