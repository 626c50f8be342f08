"""Loads of a fresh softmax router in a run's first steps, by KempnerForge's modules at a part of their width.

    python reports/routing/fresh_router.py --source CHECKOUT --text FOLDER [FOLDER ...] --out FILE

CHECKOUT is github.com/KempnerInstitute/KempnerForge at 8604e30 (its benchmarks/moe_packed is of that day), a
FOLDER holds prose (*.md, *.rst, *.txt). Depth, router, losses, schedule and AdamW are the benchmark's. Width,
FFN and heads are a part of it; so that activations and what a step changes of them are as at the full width,
weights but the embedding start wider by the root of that part and learn faster by the part (arXiv
2203.03466). Norms in bf16 near 1 move by no step of 3e-4 and are frozen. Packed experts start without the
residual scale, as its init_weights knows `down_proj.weight` and not `down_w`.
"""

import argparse
import json
import math
import random
import sys
from itertools import chain
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F

FULL, LAYERS, STEPS, WARMUP, RATE, VOCAB = 2048, 24, 20, 5, 3e-4, 8192


def tokens_of(folders: list[str], size: int = 4_000_000) -> torch.Tensor:
    """Four million characters of prose in a vocabulary of their own."""
    found_in = [Path(folder).rglob(f"*.{kind}") for folder in folders for kind in ("md", "rst", "txt")]
    files = [p for p in sorted(set(chain(*found_in))) if 3_000 < p.stat().st_size < 400_000]
    random.Random(0).shuffle(files)
    texts, found = [], 0
    for path in files:
        if found >= size:
            break
        texts.append(path.read_text(errors="ignore"))
        found += len(texts[-1])
    coder = tokenizers.Tokenizer(tokenizers.models.BPE())
    coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet)
    coder.train_from_iterator(texts, trainer)
    return torch.tensor([each for text in texts for each in coder.encode(text).ids])


def routed(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """MoEMLP._local_forward without its copies by mask."""
    order = indices.reshape(-1).argsort(stable=True)
    counts = indices.reshape(-1).bincount(minlength=self.num_experts).tolist()
    at, share = order // indices.shape[1], weights.reshape(-1).index_select(0, order)
    parts = [self.experts[i](rows) for i, rows in enumerate(x.index_select(0, at).split(counts))]
    return torch.zeros_like(x).index_add(0, at, torch.cat(parts) * share.unsqueeze(-1))


def fresh(width: int, experts: int, packed: bool, seq: int):
    """The network, and AdamW for it."""
    from kempnerforge.config.schema import ModelConfig
    from kempnerforge.model import moe
    from kempnerforge.model.transformer import Transformer

    moe.MoEMLP._local_forward = routed
    part = FULL / width
    net = Transformer(
        ModelConfig(
            dim=width, n_layers=LAYERS, n_heads=max(width // 32, 4), n_kv_heads=max(width // 128, 1),
            vocab_size=VOCAB, ffn_hidden_dim=width * 7 // 2, max_seq_len=seq, rope_theta=500000.0,
            num_experts=experts, moe_top_k=2, moe_frequency=1, moe_router="softmax_topk",
            moe_aux_loss_weight=0.01,
        )
    )  # fmt: skip
    table, hidden = [], []
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.dim() < 2:
                weight.requires_grad_(False)
            elif "embedding" in name:
                table.append(weight)
            else:
                weight.mul_(math.sqrt(part))
                if packed and name.endswith("down_proj.weight"):
                    weight.mul_(math.sqrt(2 * LAYERS))
                hidden.append(weight)
    groups = [{"params": table, "lr": RATE}, {"params": hidden, "lr": RATE * part}]
    return net, torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)


def loads(
    ids: torch.Tensor, width: int, experts: int, packed: bool, seed: int, seq: int = 1024
) -> list[list[float]]:
    """Shares of all routes, the busiest expert first, mean of the layers, of each step."""
    torch.manual_seed(seed)
    net, adam = fresh(width, experts, packed, seq)
    base = [group["lr"] for group in adam.param_groups]
    found = []
    for step in range(STEPS):
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        for group, rate in zip(adam.param_groups, base, strict=True):
            group["lr"] = rate * (step / WARMUP if step < WARMUP else decay)
        at = int(torch.randint(0, len(ids) - seq - 1, (1,)))
        logits = net(ids[at : at + seq][None])
        loss = F.cross_entropy(logits[0], ids[at + 1 : at + seq + 1]) + 0.01 * net.get_moe_aux_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w for w in net.parameters() if w.grad is not None], 1.0)
        adam.step()
        adam.zero_grad()
        share = torch.stack(list(net.get_expert_counts().values())) / (2 * seq)
        found.append(share.sort(1, descending=True).values.mean(0).tolist())
    return found


def asked(about: str | None, *paths: str, **usual: int | list[int]) -> argparse.Namespace:
    """--text and --out, these paths, and whole numbers (where they are usually a list, some of them)."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--text", nargs="+", required=True)
    for path in ("out", *paths):
        parser.add_argument(f"--{path}", required=True)
    for name, value in usual.items():
        some = {"nargs": "+"} if isinstance(value, list) else {}
        parser.add_argument(f"--{name}", type=int, default=value, **some)
    torch.set_num_threads(1)
    return parser.parse_args()


def written(out: str) -> list[dict[str, object]]:
    """The runs of a file, none where it is not there."""
    return json.loads(Path(out).read_text()) if Path(out).exists() else []


def write(out: str, runs: list[dict[str, object]]) -> None:
    """A run each line."""
    Path(out).write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")


def main() -> None:
    options = asked(__doc__, "source", width=128, seed=42)
    sys.path.insert(0, options.source)
    ids = tokens_of(options.text)
    runs = written(options.out)
    for experts in (8, 16):
        for packed in (False, True):
            steps = loads(ids, options.width, experts, packed, options.seed)
            last = torch.tensor(steps[-10:]).mean(0).tolist()
            runs.append(
                {
                    "experts": experts, "packed": packed, "width": options.width, "seed": options.seed,
                    "busiest_by_step": [round(one[0], 4) for one in steps],
                    "shares_of_steps_11_to_20": [round(one, 4) for one in last],
                }
            )  # fmt: skip
            write(options.out, runs)
            print(runs[-1], flush=True)


if __name__ == "__main__":
    main()
