"""Where routed rows are computed: at their experts' ranks, or by least-loaded placement (LLEP)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """rows[r]: rows that rank r computes, by expert. moves: (expert, its rank, another rank that computes
    rows of it and so needs its weights)."""

    rows: tuple[dict[int, int], ...]
    moves: tuple[tuple[int, int, int], ...]

    def received(self, rank: int) -> int:
        """Experts whose weights the rank gets from others."""
        return sum(target == rank for _, _, target in self.moves)

    def sent(self, rank: int) -> int:
        """Copies of its own experts' weights that the rank sends."""
        return sum(source == rank for _, source, _ in self.moves)

    def divided(self) -> tuple[int, int]:
        """Experts whose rows several ranks compute, and their pieces."""
        ranks = Counter(expert for rows in self.rows for expert in rows)
        pieces = [count for count in ranks.values() if count > 1]
        return len(pieces), sum(pieces)


def at_home(counts: Sequence[int], degree: int) -> Placement:
    """Every row at the rank that owns its expert. counts: rows of each expert from the whole group."""
    local = len(counts) // degree
    rows = ({e: counts[e] for e in range(r * local, (r + 1) * local) if counts[e]} for r in range(degree))
    return Placement(tuple(rows), ())


def least_loaded(
    counts: Sequence[int], degree: int, capacity: float, min_rows: int, threshold: float
) -> Placement:
    """Least-loaded assignment (arXiv 2601.17111): no rank gets more than `capacity` times the mean load.

    Experts by falling load: its rank takes what it has room for beside its own experts still to come; the
    rest goes, in pieces of at least min_rows rows unless it is the end, to the rank with the least load.
    Where the most loaded rank is below `threshold` times the mean, nothing moves.
    """
    home = at_home(counts, degree)
    pending = [sum(rows.values()) for rows in home.rows]
    mean = sum(pending) / degree
    if max(pending) < threshold * mean:
        return home
    room = max(1, int(capacity * (sum(pending) // degree)))
    local = len(counts) // degree
    rows: tuple[dict[int, int], ...] = tuple({} for _ in range(degree))
    taken = [0] * degree
    moves: list[tuple[int, int, int]] = []
    for expert in sorted((e for e in range(len(counts)) if counts[e]), key=lambda e: -counts[e]):
        owner, rest = expert // local, counts[expert]
        pending[owner] -= rest
        here = min(rest, max(0, room - taken[owner] - pending[owner])) if degree > 1 else rest
        if here:
            rows[owner][expert] = here
            taken[owner] += here
            rest -= here
        while rest:
            others = sorted((r for r in range(degree) if r != owner), key=lambda r: taken[r] + pending[r])
            target, piece = _helper(
                others, [room - t - p for t, p in zip(taken, pending, strict=True)], rest, min_rows
            )
            rows[target][expert] = rows[target].get(expert, 0) + piece
            taken[target] += piece
            rest -= piece
            moves.append((expert, owner, target))
    return Placement(rows, tuple(dict.fromkeys(moves)))


def _helper(others: Sequence[int], room: Sequence[int], rest: int, min_rows: int) -> tuple[int, int]:
    """(rank, rows) of the next piece: the least loaded rank with room for a piece worth a product, or the
    least loaded one."""
    for rank in others:
        piece = min(rest, room[rank])
        if piece > 0 and (piece >= min_rows or piece == rest):
            return rank, piece
    return others[0], rest
