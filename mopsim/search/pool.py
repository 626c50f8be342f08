"""The candidates of a family that the bounds let through, and what simulations teach of them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopsim.search.axes import FOLLOWERS
from mopsim.search.bound import Bounds
from mopsim.search.facts import SpaceFacts, surely
from mopsim.search.guess import guess, likely
from mopsim.search.hosts import surely_on_host
from mopsim.search.learn import ALL, Effects, Memory, Places, Rise, Slower, Times, codes, found_at
from mopsim.search.pieces import Pieces
from mopsim.search.problem import DEVICE, Column, once
from mopsim.search.refined import Refined, alike
from mopsim.search.seeds import published, textbook
from mopsim.search.space import Space
from mopsim.search.wires import Reals

#: Columns that one decision sets together: neighbours differ in one group.
_TOGETHER = {
    "expert_shard": "experts",
    "expert_tensor": "experts",
    "boundary_parts": "boundary_host",
    "layout": "virtual_stages",
    "modules": "recompute",
    "saved": "recompute",
    "bucket": "state",
    "beside": "state",
    "state_parts": "state",
    "offload": "state",
    "loss_slices": "loss",
}
#: Columns that decide how large transients are beside the tokens of a rank.
_TRANSIENT = ("chunks", "ffn_slices", "loss_slices", "recompute", "modules", "saved")
_SHARDS = ("tensor", "experts", "expert_tensor", "dense_shard", "expert_shard")
"""Columns that decide the pinned blocks of a host, which are powers of two."""
MOST = 400_000
"""Candidates that a pool holds: three in four of the best guesses, one in four the leanest of the others."""
TURNS, AT_ONCE = 8, 4
"""How often, where there is one to choose, and for how many of the best expected candidates, bounds are
refined before one is chosen: at some 10 ms for each."""
TOGETHER = 64
"""Groups of candidates whose bounds are refined together: what is common to all is done once."""
SAMPLE = 4_000
"""Values that a sample of many has."""
FEW = 4
"""Where not one in so many candidates counts, what is asked of each is found of those alone."""
STEP = 1 / 256
"""Part of a peak of which so many whole ones are counted where communicators come on top of it."""
ROUGH = 0.15
"""Part of the memory by which what is expected without refined bounds may be wrong."""
HOPE, KNOWN_HOPE = 0.03, 0.003
"""Part by which a value of a column that was never simulated is taken to be faster than known, where bounds
are rough and where they are refined."""


class Expected(NamedTuple):
    """Of a candidate: its step time, whether it fits, and the share that it needs of what memory there is."""

    seconds: float
    fits: bool
    share: float


@dataclass
class Pool:
    """Candidates in order of their guessed time. A position counts in that order; `rows[position]` is a
    row of the space. seeds: positions of textbook layouts, tried first; published: those of recipes,
    whatever memory they are expected to need. rest: lower bounds of the times of those beyond MOST.
    alike: those that share their layers, which are refined together; refined: whether each one's bounds are;
    over: whether they say that it does not fit; enough: times its peak that a device must have at least, and
    confidence that is asked for;
    wires: times its peak for communicators, of those refined; sure_host: bytes that the host must have at
    least, where they were asked for.
    rise, slower: what refinements teach of the memory and of the time of others; host_rise: what simulations
    teach of memory on the host; turns: of refinements; shares: what `surely` says, by what is on top; known:
    what is expected of all candidates, until more is learned."""

    space: Space
    rows: Column
    time: Reals
    host: Reals
    memory: Memory
    rise: Rise
    slower: Slower
    times: Times
    seeds: list[int]
    taken: NDArray[np.bool_]
    host_rise: Rise
    rest: Reals
    published: frozenset[int]
    pieces: Pieces
    given: SpaceFacts
    group: Column
    alike: list[Column]
    refined: NDArray[np.bool_]
    over: NDArray[np.bool_]
    sure_host: Reals
    wires: Reals
    enough: float = 1.0
    confidence: float = 0.0
    turns: int = 0
    shares: dict[float, float] = field(default_factory=dict)
    known: dict[Hashable, Any] = field(default_factory=dict)

    @staticmethod
    def of(space: Space, bounds: Bounds, keep: Column) -> "Pool":
        """The rows `keep` of a space; equal guesses in order of memory."""
        likely = np.maximum(guess(space.take(keep)), bounds.time[keep])
        order = np.lexsort((bounds.device[keep], likely))
        order, rest = _most(order, bounds.device[keep] + bounds.gathered[keep])
        rows, likely, beyond = keep[order], likely[order], bounds.time[keep[rest]]
        kept = space.take(rows)
        each = kept.tokens() / kept.columns["tensor"].astype(np.float64)
        parts = np.stack([bounds.gathered[rows], each, bounds.parts["boundaries"][rows]])
        kinds, shards = (
            codes((kept.columns[name] for name in names), len(kept)) for names in (_TRANSIENT, _SHARDS)
        )
        memory = Memory(bounds.device[rows], parts, kinds)
        simulated = Effects.of(kept.columns.values())
        times, slower = Times(likely, simulated), Slower(simulated.unseen_yet())
        taken = np.zeros(len(rows), dtype=np.bool_)
        seeds, recipes = textbook(kept, likely), frozenset(published(kept, likely))
        time, host = bounds.time[rows], bounds.host[rows]
        return Pool(
            space, rows, time, host, memory, Rise(kinds), slower, times, seeds, taken,
            Rise(shards, min), beyond, recipes, Pieces(space), SpaceFacts.of(kept), *alike(kept),
            np.zeros_like(taken), np.zeros_like(taken), np.full(len(rows), np.nan), np.zeros(len(rows)),
        )  # fmt: skip

    def refine(self, *positions: int) -> int:
        """Refine the bounds of candidates and of those that share their layers; returns of how many groups
        these were not."""
        groups: dict[int, int] = {}
        for position in positions:
            if not self.refined[position]:
                groups.setdefault(int(self.group[position]), position)
        every = [(position, self.alike[group]) for group, position in groups.items()]
        for start in range(0, len(every), TOGETHER):
            some = every[start : start + TOGETHER]
            for _, mine in some:
                self.refined[mine] = True
            closer, kept = Refined.of(self.pieces, self.given, [self.rows[mine] for _, mine in some])
            if closer is not None:
                self._refined([some[at] for at in kept], closer)
            self.known.clear()
        return len(every)

    def _refined(self, groups: Sequence[tuple[int, Column]], closer: Refined) -> None:
        """Note the bounds of groups, each with the position that was asked for."""
        limit = self.space.machine.memory_limit()
        rows = np.concatenate([mine for _, mine in groups])
        self.time[rows] = np.maximum(self.time[rows], closer.time())
        before = [float(self.memory.bound[position]) for position, _ in groups]
        self.memory.bound[rows] = np.maximum(self.memory.bound[rows], closer.device_memory()[0])
        close = np.maximum(likely(closer), self.time[rows])
        slower = np.split(close / self.times.guess[rows], np.cumsum([len(mine) for _, mine in groups[:-1]]))
        self.times.guess[rows] = close
        for (position, _), times, rose in zip(groups, slower, before, strict=True):
            self.slower.learn(position, float(np.median(times)))
            self.rise.learn(position, float(self.memory.bound[position] / max(rose, 1.0)))
        if self.enough > 1:
            shares = np.floor(closer.communicators() / np.maximum(self.memory.bound[rows], 1.0) / STEP)
            every, place = np.unique(shares, return_inverse=True)
            more = [self._surely(STEP * float(share)) - self.enough for share in every]
            self.wires[rows] = np.array(more)[place.reshape(-1)]
        self.over[rows] |= ~self.taken[rows] & (self.memory.bound[rows] > limit)
        self.taken[rows] |= self.over[rows]

    def _surely(self, on_top: float) -> float:
        return once(self.shares, on_top, lambda: surely(self.space, on_top, self.confidence))

    def best(self, score: Callable[[], Reals], turns: float, *, briefly: bool = False) -> int | None:
        """The place of the least score under infinity among those whose bounds are refined: those of the best
        are on the way there, which may change the scores. briefly: None where `turns` of that leave none."""
        while True:
            now, turns, self.turns = score(), turns - 1, self.turns + 1
            place = int(np.argmin(now))
            if self.refined[place] or not np.isfinite(now[place]):
                return place if np.isfinite(now[place]) else None
            if turns < 0:
                known = np.where(self.refined, now, np.inf)
                place = int(np.argmin(known))
                if briefly or np.isfinite(known[place]):
                    return place if np.isfinite(known[place]) else None
            self.refine(*_lowest(now, AT_ONCE).tolist())

    def learn(self, position: int, peak_memory: int, host_memory: int, step_time: float) -> None:
        """Note what a simulated candidate took."""
        self.known.clear()
        self.memory.learn(position, peak_memory)
        self.times.learn(position, step_time)
        if self.host[position] > 0:
            self.host_rise.learn(position, host_memory / float(self.host[position]))

    def expected(self, at: Places = ALL, *, hopeful: bool = False) -> Reals:
        """Step time of candidates, seconds. hopeful: optimistic where a value was never simulated."""
        known, rough = (KNOWN_HOPE, HOPE) if hopeful else (0.0, 0.0)

        def find(at: Places) -> Reals:
            far = self.times.factor(rough, at) * self.slower.expected(at)
            factor = np.where(self.refined[at], self.times.factor(known, at), far)
            return np.asarray(self.times.guess[at] * factor)

        return found_at(self.known, hopeful, at, find)

    def room(self, at: Places = ALL) -> tuple[NDArray[np.bool_], Reals]:
        """Of candidates: whether each is expected to fit, with some slack where its bounds are not refined;
        its expected share of what there is."""
        share, rough = found_at(self.known, "room", at, self._room)
        return rough <= 1, share

    def _room(self, at: Places) -> Reals:
        """(Expected shares; the same with the slack)."""
        limit, refined = self.space.machine.memory_limit(), self.refined[at]
        share = self.memory.expected(np.where(refined, 1.0, self.rise.expected(at)), at)
        share /= limit
        hardware = self.space.problem.hardware
        needed = self.host[at] * self.host_rise.expected(at) / max(hardware.host_limit(), 1)
        enough = self.memory.bound[at] * (self.enough + self.wires[at]) / limit
        np.maximum(needed, enough, out=needed)
        rough = share * np.where(refined, 1.0, 1 / (1 + ROUGH))
        found = np.empty((2, len(share)))
        np.maximum(needed, share, out=found[0])
        np.maximum(needed, rough, out=found[1])
        return found

    def one(self, position: int) -> Expected:
        """What is expected of one candidate."""
        at = np.array([position])
        (fits,), (share,) = self.room(at)
        return Expected(float(self.expected(at)[0]), bool(fits), float(share))

    def hoped(self, may: NDArray[np.bool_]) -> Reals:
        """Expected seconds of the candidates that `may` and are expected to fit, infinite of others."""
        return _of(may & ~self.taken, lambda at: np.where(self.room(at)[0], self.expected(at), np.inf))

    def next(
        self, below: float, turns: float = TURNS, *, hoped: float = np.inf, slack: float = 0.0
    ) -> int | None:
        """The untaken candidate of the least expected time whose bound is under `below` seconds; where none
        is expected to fit, the leanest. hoped: or None where none is hoped to take less, seconds; slack: part
        of the memory by which it may be expected not to fit."""

        def score() -> Reals:
            usable = ~self.taken & (self.time < below)

            def each(at: Places) -> Reals:
                fits, share = self.room(at)
                likely = fits | (share <= 1 + slack)
                if not (np.isfinite(hoped) or (likely & usable[at]).any()):
                    return share
                time = self.expected(at, hopeful=True)
                return np.where(likely & (time < hoped), time, np.inf)

            return _of(usable, each)

        return self.best(score, turns, briefly=bool(np.isfinite(hoped)))

    def least(self, below: float) -> int | None:
        """The candidate of the least bound under `below` seconds."""
        time = np.where(self.taken, np.inf, self.time)
        position = int(np.argmin(time))
        return position if time[position] < below else None

    def rough(self, below: float, enough: float) -> list[tuple[float, int]]:
        """(Bound, position) of the least of each group whose bounds are not refined, where it is under
        `below` seconds. What surely needs more than the device has, `enough` times its peak, is taken out
        before, and, where it is more than its peak, what surely needs more of the host."""
        limit, more = self.space.machine.memory_limit(), self.wires if enough > 1 else 0.0
        unsure = self.memory.bound * (enough + more) > limit
        if enough > 1:
            asked = np.flatnonzero(~unsure & ~self.taken & (self.time < below) & np.isnan(self.sure_host))
            self.sure_host[asked] = surely_on_host(self.pieces, self.given, self.rows[asked])
            unsure |= self.short
        unsure &= ~self.taken
        self.over |= unsure
        self.taken |= unsure
        open_ = np.flatnonzero(~self.taken & ~self.refined & (self.time < below))
        open_ = open_[np.argsort(self.time[open_], kind="stable")]
        first = open_[np.unique(self.group[open_], return_index=True)[1]]
        return list(zip(self.time[first].tolist(), first.tolist(), strict=True))

    @property
    def short(self) -> NDArray[np.bool_]:
        """Which surely need more of the host than there is, of those of which it was asked."""
        return np.asarray(self.sure_host > self.space.problem.hardware.host_limit())

    def neighbours(self, position: int) -> Column:
        """Positions one decision away from `position`."""
        groups = self._differs(position)
        if not groups:
            return np.zeros(0, dtype=np.int64)
        count = np.sum(np.stack(list(groups.values())), axis=0)
        return np.flatnonzero(count == 1).astype(np.int64)

    def lighter(self, position: int) -> list[int]:
        """Positions of the same plan with nothing on the host, then with a part of what it keeps there."""
        differs, nowhere = self._differs(position), np.zeros_like(self.taken)
        states, inputs = (~differs.pop(name, nowhere) for name in ("state", "boundary_host"))
        same = ~np.logical_or.reduce([nowhere, *differs.values()])
        columns = self.space.columns
        on_device, kept = columns["state"][self.rows] == DEVICE, columns["boundary_host"][self.rows] == 0
        found = (same & on_device & kept, same & states & kept, same & on_device & inputs)
        places = dict.fromkeys(int(np.argmax(one)) for one in found if one.any())
        return [place for place in places if place != position]

    def _differs(self, position: int) -> dict[str, NDArray[np.bool_]]:
        """By decision: which candidates decide otherwise than the one at `position`."""
        names, effects = list(self.space.columns), self.times.effects
        groups: dict[str, NDArray[np.bool_]] = {}
        followers = {name for name, one in FOLLOWERS.items() if self.space.family in one.families}
        for place, column in zip(effects.which, effects.codes, strict=True):
            name = names[place]
            if name in followers:
                continue
            group = _TOGETHER.get(name, name)
            differs = column != column[position]
            groups[group] = groups[group] | differs if group in groups else differs
        return groups


def _of(may: NDArray[np.bool_], find: Callable[[Places], Reals]) -> Reals:
    """Something of the candidates that `may`, infinite of others. Of few it is found of these alone."""
    at = np.flatnonzero(may)
    if FEW * len(at) > len(may):
        return np.where(may, find(ALL), np.inf)
    found = np.full(len(may), np.inf)
    found[at] = find(at)
    return found


def _lowest(values: Reals, count: int) -> Column:
    """Places of the `count` lowest of many values, but infinite ones. What a sample of them says is too high
    is not sorted."""
    at = np.flatnonzero(np.isfinite(values))
    finite = values[at]
    enough = np.sort(finite[:: max(1, len(finite) // SAMPLE)])[: count + 1]
    low = np.flatnonzero(finite <= enough[-1])
    return np.asarray(at[low[np.argsort(finite[low], kind="stable")[:count]]])


def _most(order: Column, memory: Reals) -> tuple[Column, Column]:
    """(MOST places of an order, in it; the others). memory: that each place is expected to need."""
    if len(order) <= MOST:
        return order, order[:0]
    first, others = order[: MOST * 3 // 4], order[MOST * 3 // 4 :]
    lean = np.zeros(len(others), dtype=np.bool_)
    lean[np.argsort(memory[others], kind="stable")[: MOST - len(first)]] = True
    return np.concatenate([first, others[lean]]), others[~lean]
