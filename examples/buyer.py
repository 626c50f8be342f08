"""For a buyer: which machine type trains OLMoE (7B parameters) on 1T tokens in 20 days, and at what cost?

Then, at the recommended size, MoP beside the FSDP2 plan that was found there. Half a minute.

    python examples/buyer.py [folder for the report]
"""

import sys

import mopsim

MODEL, SEQ_LEN = "olmoe_1b_7b", "4K"


def main(folder: str) -> None:
    """Print the clusters, compare two families on the cheapest, write the comparison's report."""
    clusters = mopsim.size(
        MODEL,
        ["h200-sxm-141g", "h100-sxm-80g"],
        tokens="1T",
        days=20,
        seq_len=SEQ_LEN,
        families=["fsdp2"],
        max_nodes=4,
        simulations=2,
    )
    print(clusters.table().to_string(index=False))
    print(clusters.headline())
    best = clusters.best
    if best is None:
        raise SystemExit("no cluster of at most 4 nodes will do")
    inputs = best.inputs
    comparison = mopsim.compare(
        MODEL,
        inputs.hardware,
        nodes=inputs.nodes,
        strategies={"mop": "mop", "fsdp2": best.strategy},
        seq_len=SEQ_LEN,
        global_batch=inputs.training.global_batch,
        budget=3,
    )
    print(comparison.headline())
    for path in comparison.write(folder, "python examples/buyer.py"):
        print("written", path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out/buyer")
