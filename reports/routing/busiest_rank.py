"""What the busiest rank gets of the routes of `unbalanced_router.json`, over random orders of the experts."""

import json
from pathlib import Path

import numpy as np

ORDERS, SEED = 100_000, 0


def main() -> None:
    draw = np.random.default_rng(SEED)
    runs = json.loads((Path(__file__).parent / "unbalanced_router.json").read_text())
    for run, ranks in ((runs[0], 4), (runs[2], 16)):
        shares = np.array(run["shares_of_steps_91_to_100"])
        orders = draw.permuted(np.tile(shares / shares.sum(), (ORDERS, 1)), axis=1)
        most = orders.reshape(ORDERS, ranks, -1).sum(axis=2).max(axis=1)
        low, half, high = np.quantile(most, (0.05, 0.5, 0.95))
        print(f"{len(shares)} experts on {ranks} ranks: {most.mean():.3f} on average, {half:.3f} in half,")
        print(f"  {low:.3f} to {high:.3f} in nine of ten orders, {most.min():.3f} to {most.max():.3f} in all")


if __name__ == "__main__":
    main()
