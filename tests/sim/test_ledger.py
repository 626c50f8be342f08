"""The ledger of all moves at once is that of one move after the other."""

from hypothesis import given
from hypothesis import strategies as st

from mopsim.engine.ledger import GATHERED, GRADS, Ledger
from mopsim.program.workload import NUM_DEVICE_SLOTS, SLOTS, Op, deltas

STEPS = st.lists(st.tuples(st.sampled_from(SLOTS), st.integers(-50, 100)), max_size=4).map(tuple)
PHASES = ("forward", "backward", "optimizer")


@given(STEPS, st.lists(st.tuples(STEPS, st.sampled_from(PHASES)), max_size=8), st.data())
def test_all_moves_at_once(
    resident: tuple[tuple[str, int], ...],
    scripts: list[tuple[tuple[tuple[str, int], ...], str]],
    data: st.DataObject,
) -> None:
    ops = [
        Op(place, str(place), "compute", "other", phase, -1, (), (), *deltas(steps))
        for place, (steps, phase) in enumerate(scripts)
    ]
    order = data.draw(st.permutations([op.index for op in ops] * 2))
    moves = [~place if place in order[:at] else place for at, place in enumerate(order)]
    moves = [move for move in moves if move < 0 or ops[move].peak]
    starts = [float(moves.index(op.index)) if op.peak else 0.0 for op in ops]
    ends = [float(moves.index(~op.index)) for op in ops]
    resident = tuple((slot, abs(size)) for slot, size in resident)
    ledger = Ledger(resident, True)
    now, device = list(ledger.now), ledger.peak
    ledger.play(ops, moves, starts, ends)

    high, curve = list(now), [(0.0, tuple(now))]
    by_phase: dict[str, int] = {}
    most, peak_time = device, 0.0
    rest, host = [device - now[GATHERED] - now[GRADS]], [sum(now[NUM_DEVICE_SLOTS:])]
    for at, move in enumerate(moves):
        op = ops[max(move, ~move)]
        for slot, size in op.peak:
            now[slot] += size if move >= 0 else -size
            high[slot] = max(high[slot], now[slot]) if move >= 0 else high[slot]
        for slot, size in op.net if move < 0 else ():
            now[slot] += size
        height = sum(now[:NUM_DEVICE_SLOTS])
        if height > by_phase.get(op.phase, 0):
            by_phase[op.phase] = height
        if op.peak or (op.net and move < 0):
            curve.append((float(at), tuple(now)))
        if move < 0:
            continue
        most, peak_time = (height, float(at)) if height > most else (most, peak_time)
        rest.append(height - now[GATHERED] - now[GRADS])
        host.append(sum(now[NUM_DEVICE_SLOTS:]))
    assert (ledger.now, ledger.high, ledger.curve) == (now, high, curve)
    assert (ledger.peak, ledger.peak_time) == (most, peak_time)
    assert (ledger.rest, ledger.host_peak) == (max(rest), max(host))
    assert list(ledger.by_phase.items()) == list(by_phase.items())
