"""Expert-tensor parallelism: blocks of rows of each rank gathered over the ranks that split an expert, and
sums of what these make of them scattered back. Each of the two is the backward of the other.
"""

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group


def gather_blocks(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Rows [sizes[place], H] of each rank to [sum(sizes), H] in rank order."""
    most, even = max(sizes), min(sizes) == max(sizes)
    sent = x if even else torch.cat((x, x.new_zeros(most - x.shape[0], x.shape[1])))
    out = x.new_empty(group.size * most, x.shape[1])
    collectives.all_gather_single(out, sent.contiguous(), group.handle)
    if even:
        return out
    return torch.cat([out[place * most : place * most + size] for place, size in enumerate(sizes)])


def scatter_blocks(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """The inverse of `gather_blocks`, of the sum over the ranks' x."""
    most, own = max(sizes), sizes[group.place]
    if min(sizes) < most:
        padded = x.new_zeros(group.size, most, x.shape[1])
        for place, block in enumerate(torch.split(x, sizes)):
            padded[place, : sizes[place]].copy_(block)
        x = padded.flatten(0, 1)
    out = x.new_empty(most, x.shape[1])
    collectives.reduce_scatter_single(out, x.contiguous(), group.handle)
    return out.resize_(own, x.shape[1])  # not a view: FSDP2 hooks the tensor that its module returns
