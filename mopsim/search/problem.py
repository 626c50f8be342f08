"""What a search is asked about, and the codes of a candidate's columns."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from mopsim.program.topology import devices_taken
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import CAST, Dispatcher, DType, Exchange, MatmulDType, UpdateOverlap
from mopsim.spec.tensors import total_params
from mopsim.spec.training import TrainSpec
from mopsim.strategies import STACKS, State

Column = NDArray[np.int64]
Number = TypeVar("Number", int, Column)
Made = TypeVar("Made")
Values = Sequence[int] | Sequence[tuple[int, ...]]
Axes = dict[str | tuple[str, ...], Values]

#: Codes of the `state` column (where the optimizer lives), of the `loss` and of the `exchange` column.
DEVICE, STREAMED, HOST = 0, 1, 2
FULL, CHUNKED, RING = 0, 1, 2
ULYSSES, RINGS, ALL_GATHER = 0, 1, 2

PARTS = 4
"""`boundary_parts` of so many are the layer inputs that go to the host, where they do; `state_parts` of so
many is the optimizer state that does."""

STATES: tuple[State, ...] = ("device", "host_streamed", "host")
EXCHANGES: tuple[Exchange, ...] = ("ulysses", "ring", "all_gather")
DISPATCHERS: tuple[Dispatcher, ...] = ("alltoall", "deepep", "hybridep")
"""Those that are looked for; all but the first send a row once to a rank."""
BESIDE: tuple[UpdateOverlap, ...] = ("none", "next_forward", "backward")
"""What an update runs beside, by the code in the `beside` column."""
NEXT_FORWARD, UNDER_BACKWARD = 1, 2
RECOMPUTED: tuple[tuple[str, ...], ...] = (
    (), ("core_attn",), ("layernorm",), ("moe_act",), ("layernorm", "moe_act"), ("mla_up_proj",), ("mlp",),
    ("mla_up_proj", "mlp"), ("mla_up_proj", "layernorm", "moe_act"), ("moe",), ("mla_up_proj", "moe"),
    ("mlp", "moe"),
)  # fmt: skip
"""Modules that selective recomputation runs again, by the code in the `modules` column: those of the
recipes in recipes.yaml, of a stack's default, and whole experts."""
LEANEST = len(RECOMPUTED)
"""Code of no set: of what keeps least whatever is recomputed, where it is not chosen yet."""

SAVED: tuple[tuple[str, ...], ...] = (
    (), ("attention_core",), ("attention_core", "dispatch", "experts_gate", "experts_up"),
)  # fmt: skip
"""Kernels that full recomputation does not run again, by the code in the `saved` column: attention, whose
output is small for what it takes, and what experts wait for and take."""

DEFAULTS = {
    "micro_batch": 1, "tensor": 1, "pipeline": 1, "virtual_stages": 1, "layout": 0, "sequence": 1,
    "exchange": ULYSSES, "experts": 1, "expert_tensor": 1, "expert_shard": 1, "strided": 0, "dispatcher": 0,
    "vocabulary": 1, "dense_shard": 1, "chunks": 0, "ffn_slices": 1, "loss": FULL, "loss_slices": 1,
    "state": DEVICE, "state_parts": PARTS, "bucket": 100_000_000, "beside": 0, "boundary_host": 0,
    "boundary_parts": PARTS, "recompute": 1, "modules": 0, "saved": 0, "reshard": 1, "offload": 0, "zero": 3,
    "overlap": 0, "in_node": 0,
}  # fmt: skip
"""Columns of a space, and what each is where no axis sets it."""


@lru_cache(maxsize=64)
def worked_out(asked: bytes) -> dict[Any, Any]:
    """Of the problem of this encoding: a sizing and a sweep search it again, with another budget or limit."""
    return {}


@lru_cache(maxsize=4)
def lowered(asked: bytes) -> dict[Any, Any]:
    """Templates of layers where this is all that they depend on beside a candidate's columns: problems of
    other node counts, batches and cards share them. A sizing asks by turns about problems that take other
    parts of a scale-up domain, or another kind of device."""
    return {}


@dataclass(frozen=True)
class Problem:
    """What a strategy is looked for: every input of the search but its options. precision: what products
    compute in; of 8 and 4 bits, beside bfloat16. stack: the software, where it is not the family's own.
    runnable: only what mopexec runs. known: what was worked out, by its name; equal problems share it. made:
    of layers what those of other sizes share too. pieces: of layers and losses what was priced while this one
    is searched.
    """

    model: ModelSpec
    hardware: HardwareProfile
    num_nodes: int
    training: TrainSpec
    precision: MatmulDType = "bfloat16"
    stack: Stack | None = None
    runnable: bool = False
    known: dict[Any, Any] = field(init=False, compare=False, repr=False)
    made: dict[Any, Any] = field(init=False, compare=False, repr=False)
    pieces: dict[Any, Any] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        asked = (
            self.model, self.hardware, self.num_nodes, self.training, self.precision, self.stack,
            self.runnable,
        )  # fmt: skip
        object.__setattr__(self, "known", worked_out(msgspec.msgpack.encode(asked)))
        hardware, training = self.hardware, replace(self.training, global_batch=1)
        device = (hardware.device_kind, hardware.device.architecture)
        layer = (self.model, self.domain, *device, training, self.precision, self.stack)
        object.__setattr__(self, "made", lowered(msgspec.msgpack.encode(layer)))

    def __getstate__(self) -> dict[str, Any]:
        """Without templates and pieces: another process makes again what it asks for."""
        return vars(self) | {"made": {}, "pieces": {}}

    @cached_property
    def total_params(self) -> int:
        return total_params(self.model)

    @property
    def compute(self) -> DType:
        """What is not a product computes in."""
        return "bfloat16" if self.precision in CAST else cast(DType, self.precision)

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.hardware.devices_per_node

    @property
    def domain(self) -> int:
        """Devices of each scale-up domain that the step runs on."""
        return devices_taken(self.world_size, self.hardware.scale_up_size)

    def software(self, family: str) -> Stack:
        """The software of a family's candidates, on the problem's kind of device."""

        def find() -> Stack:
            return (self.stack or load_stack(STACKS[family])).on_kind(self.hardware.device_kind)

        return once(self.known, ("software", family), find)


def once(known: dict[Any, Any], key: Hashable, make: Callable[[], Made]) -> Made:
    """What is known by this key, made where it is not."""
    if key not in known:
        known[key] = make()
    return cast(Made, known[key])


def divisors(value: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return low + [value // d for d in reversed(low) if d * d != value]


def offloaded(layers: int, parts: Column | int) -> Column:
    """Layers whose inputs go to the host, of `parts` of PARTS: rounded down, at least one."""
    return np.maximum(layers * np.asarray(parts, dtype=np.int64) // PARTS, 1)


def tokens(problem: Problem, row: Mapping[str, Number]) -> Number:
    """N, of a row or of a column of them: tokens per rank and microbatch."""
    return problem.training.seq_len * row["micro_batch"] // row["sequence"]
