"""Loads of torchtitan's fresh router of Llama 4, which sends a token to one expert, in a benchmark's steps.

    python reports/routing/top_one_router.py --source CHECKOUT --text FOLDER [FOLDER ...] --out FILE

CHECKOUT is github.com/pytorch/torchtitan of October 2025 (d880de214), a FOLDER holds prose. Layers, router,
bias of experts, AdamW and schedule are those of its llama4_17bx16e.toml, in two layers, as torchao's table of
2025-10-13 has them; width and scaling as in fresh_router.py.
"""

import math
import sys
from types import ModuleType
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from fresh_router import VOCAB, asked, tokens_of, write

FULL, LAYERS, EXPERTS, STEPS, RATE = 5120, 2, 16, 200, 4e-3


def borrow(checkout: str) -> None:
    """Make the modules of torchtitan's network importable, without what its packages import to train it."""
    names = ("", ".models", ".experiments", ".experiments.llama4", ".experiments.llama4.model", ".tools")
    for name in names:
        package = sys.modules[f"torchtitan{name}"] = ModuleType(f"torchtitan{name}")
        package.__path__ = [checkout + "/torchtitan" + name.replace(".", "/")]
    stubs = (
        "config", "components", "components.tokenizer", "tools.logging", "tools.utils", "distributed",
        "distributed.expert_parallel", "protocols", "protocols.model", "protocols.train_spec",
        "protocols.state_dict_adapter",
    )  # fmt: skip
    counted = torch.histc
    torch.histc = lambda values, **names: counted(values.float(), **names).long()  # a CPU counts no integers
    for name in stubs:
        sys.modules[f"torchtitan.{name}"] = MagicMock(BaseModelArgs=object, ModelProtocol=object)


def fresh(width: int, seq: int):
    """The network, and AdamW for it."""
    from torchtitan.experiments.llama4.model.args import TransformerModelArgs
    from torchtitan.experiments.llama4.model.model import Transformer
    from torchtitan.models.moe import MoEArgs

    net = Transformer(
        TransformerModelArgs(
            dim=width, n_layers=LAYERS, n_heads=width // 32, n_kv_heads=max(width // 160, 1),
            vocab_size=VOCAB, ffn_dim_multiplier=1.2, multiple_of=width * 2 // 5, rope_theta=500000.0,
            max_seq_len=seq, interleave_moe_layer_step=1,
            moe_args=MoEArgs(num_experts=EXPERTS, use_grouped_mm=False),
        )
    )  # fmt: skip
    net.init_weights(buffer_device=torch.device("cpu"))
    part, table, hidden = FULL / width, [], []
    for name, weight in net.named_parameters():
        (table if weight.dim() < 2 or "embeddings" in name else hidden).append(weight)
    with torch.no_grad():
        for weight in hidden:
            if weight is not net.output.weight:  # starts by the root of the width
                weight.mul_(math.sqrt(part))
    groups = [{"params": table, "lr": RATE}, {"params": hidden, "lr": RATE * part}]
    return net, torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.1)


def loads(ids: torch.Tensor, width: int, seed: int, rows: int = 1, seq: int = 512) -> list[list[float]]:
    """Shares of all routes, the busiest expert first, mean of the layers, of each step."""
    torch.manual_seed(seed)
    net, adam = fresh(width, seq)
    base = [group["lr"] for group in adam.param_groups]
    moes = [layer.moe for layer in net.layers.values()]
    found = []
    for step in range(STEPS):
        for group, rate in zip(adam.param_groups, base, strict=True):
            group["lr"] = rate * (step + 1) / STEPS  # 600 steps of warm-up are cut to all
        at = torch.randint(0, len(ids) - seq - 1, (rows,)).tolist()
        tokens = torch.stack([ids[i : i + seq + 1] for i in at])
        loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        shares = []
        with torch.no_grad():
            for moe in moes:
                count = moe.tokens_per_expert
                delta = moe.load_balance_coeff * torch.sign(count.mean() - count)
                moe.expert_bias.add_(delta - delta.mean())
                shares.append((count / count.sum()).sort(descending=True).values)
                count.zero_()
        adam.step()
        adam.zero_grad()
        found.append(torch.stack(shares).mean(0).tolist())
    return found


def main() -> None:
    options = asked(__doc__, "source", width=320, seeds=[42, 43])
    borrow(options.source)
    ids = tokens_of(options.text)
    runs = []
    for seed in options.seeds:
        steps = loads(ids, options.width, seed)
        mean = torch.tensor(steps[10:]).mean(0).tolist()
        busiest = [round(sum(one[0] for one in steps[i : i + 10]) / 10, 3) for i in range(0, STEPS, 10)]
        runs.append({"width": options.width, "seed": seed, "busiest_by_ten_steps": busiest,
                     "shares_of_steps_11_to_200": [round(one, 4) for one in mean]})  # fmt: skip
        write(options.out, runs)
        print(runs[-1], flush=True)


if __name__ == "__main__":
    main()
