"""The tokens that MTP modules look up and predict: those after a rank's positions."""

import torch
from torch import Tensor

from mopexec.data.dataset import IGNORED
from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group


def with_following(tokens: Tensor, targets: Tensor, depth: int, group: Group) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, s] of this rank's positions and of the `depth` after them, [B, s + depth];
    IGNORED beyond the sequence's end. group: of the ranks that share the sequence.
    """
    if not depth:
        return tokens, targets
    both = torch.cat((tokens, targets))
    seq = tokens.shape[1]
    ends = both.new_full((len(both), depth), IGNORED)
    if group.size > 1:
        everyone = both.new_empty((group.size, len(both), seq))
        collectives.all_gather_single(everyone.view(-1, seq), both, group.handle)
        whole = torch.cat((*everyone.unbind(0), ends), dim=1)
        ends = whole[:, (group.place + 1) * seq : (group.place + 1) * seq + depth]
    tokens, targets = torch.cat((both, ends), dim=1).chunk(2)
    return tokens, targets


def next_tokens(tokens: Tensor, targets: Tensor) -> Tensor:
    """The token after each position but the last, [B, n - 1] of tokens and targets [B, n], whether or not it
    counts in the loss; 0 where neither says it, as nothing that counts comes after.
    """
    following = tokens[:, 1:]
    return torch.where(following < 0, targets[:, :-1], following).clamp_(min=0)
