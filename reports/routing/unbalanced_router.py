"""Loads of a router that nothing balances, in a run's first hundred steps, by GPT-OSS's layers at a part of
their width.

    python reports/routing/unbalanced_router.py --text FOLDER [FOLDER ...] --experts 32 --layers 12 --out FILE

Megatron-Bridge's GPT-OSS has moe_router_load_balancing_type "none". Router (a bias, the four highest logits,
their softmax), experts' gate, starts (0.02, outputs over the root of twice 24 layers), AdamW, clipping and
schedule (warm-up of 40 steps to 3e-4, a cosine to 3e-5) are those of its verification cards. Width, depth,
heads and tokens of a step are a part; weights and rates are scaled as fresh_router.py says.
"""

import math

import torch
import torch.nn.functional as F
from fresh_router import VOCAB, asked, tokens_of, write, written
from torch import Tensor, nn

FULL, DEPTH, TOP, HEAD, STEPS, WARMUP = 2880, 24, 4, 32, 100, 40
RATE, LEAST, START = 3e-4, 3e-5, 0.02


class Layer(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()

        def start(*sizes: int, out: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*sizes) * START * math.sqrt(FULL / width) / out)

        last = math.sqrt(2 * DEPTH)
        self.qkv, self.out = start(width, 3 * width), start(width, width, out=last)
        self.router, self.bias = start(width, experts), nn.Parameter(torch.zeros(experts))
        self.up, self.down = start(experts, width, 2 * width), start(experts, width, width, out=last)
        self.counts = torch.zeros(experts)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        n, width = x.shape
        parts = (norm(x) @ self.qkv).chunk(3, -1)
        q, k, v = (part.view(n, -1, HEAD).transpose(0, 1)[None] for part in parts)
        rows = F.scaled_dot_product_attention(turned(q, *turn), turned(k, *turn), v, is_causal=True)
        x = x + rows[0].transpose(0, 1).reshape(n, width) @ self.out
        h = norm(x)
        top, choice = (h @ self.router + self.bias).topk(TOP, -1)
        order = choice.reshape(-1).argsort(stable=True)
        self.counts = choice.reshape(-1).bincount(minlength=len(self.bias))
        found = []
        sent = h[order // TOP].split(self.counts.tolist())
        for given, up, down in zip(sent, self.up.unbind(), self.down.unbind(), strict=True):
            gate, other = (given @ up).chunk(2, -1)
            found.append((gate * torch.sigmoid(1.702 * gate) * (other + 1)) @ down)
        weighed = torch.cat(found) * top.softmax(-1).reshape(-1)[order, None]
        return x + torch.zeros_like(h).index_add(0, order // TOP, weighed)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def loads(ids: Tensor, width: int, layers: int, experts: int, seed: int, seq: int) -> list[list[float]]:
    """Shares of all routes, the busiest expert first, mean of the layers, of each step."""
    torch.manual_seed(seed)
    net = nn.ModuleList(Layer(width, experts) for _ in range(layers))
    table = nn.Parameter(torch.randn(VOCAB, width) * START)
    head = nn.Parameter(torch.randn(width, VOCAB) * START * math.sqrt(FULL / width))
    wide = [table, *(one for one in net.parameters() if one.dim() < 2)]
    hidden = [head, *(one for one in net.parameters() if one.dim() > 1)]
    adam = torch.optim.AdamW(
        [{"params": wide, "of": 1.0}, {"params": hidden, "of": FULL / width}],
        betas=(0.9, 0.95), weight_decay=0.0,
    )  # fmt: skip
    angles = torch.arange(seq)[:, None] * 150000.0 ** (-torch.arange(HEAD // 2) / (HEAD // 2))[None]
    turn, found = (angles.cos(), angles.sin()), []
    for step in range(STEPS):
        falling = 1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))
        rate = RATE * (step + 1) / WARMUP if step < WARMUP else LEAST + (RATE - LEAST) * falling / 2
        for group in adam.param_groups:
            group["lr"] = rate * group["of"]
        at = int(torch.randint(0, len(ids) - seq - 1, (1,)))
        x = table[ids[at : at + seq]]
        for layer in net:
            x = layer(x, turn)
        F.cross_entropy(norm(x) @ head, ids[at + 1 : at + seq + 1]).backward()
        torch.nn.utils.clip_grad_norm_([*wide, *hidden], 1.0)
        adam.step()
        adam.zero_grad()
        share = torch.stack([layer.counts for layer in net]) / (TOP * seq)
        found.append(share.sort(1, descending=True).values.mean(0).tolist())
    return found


def main() -> None:
    options = asked(__doc__, experts=32, layers=12, width=192, seq=1024, seed=1)
    size = {name: getattr(options, name) for name in ("width", "layers", "experts", "seed", "seq")}
    steps = loads(tokens_of(options.text, 2_000_000), **size)
    last = torch.tensor(steps[-10:]).mean(0).tolist()
    runs = written(options.out)
    runs.append(size | {"shares_of_steps_91_to_100": [round(one, 4) for one in last]})
    write(options.out, runs)


if __name__ == "__main__":
    main()
