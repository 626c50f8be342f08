"""A runner of one weight per token id, for tests of what surrounds it; fails on request."""

import gc
import os
import signal
import time

import torch
import torch.distributed as dist

from mopexec.run import checkpoint
from mopexec.run.runner import StepResult
from mopsim.common.garbage import USUAL
from tests.patience import HANG


def build(plan, platform, *, routing, seed):
    assert gc.get_threshold() == USUAL, "a command's: tensors in cycles would stay for long"
    return FakeRunner(plan, seed)


class FakeRunner:
    """Environment FAKE: 'slow', or 'kill', 'raise', 'diverge', 'interrupt', 'stall' with ':RANK:STEP' (steps
    from 1), or 'saving' with ':rank:STEP' or ':launcher:STEP': killed once the tensors of a checkpoint are
    written."""

    def __init__(self, plan, seed):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.rand(plan.model.vocab_size, generator=generator, dtype=torch.float64)
        self.moment = torch.zeros_like(self.weight)
        self.tokens = plan.training.global_batch * plan.training.seq_len
        self.lr, self.steps = 0.0, 0

    def set_lr(self, lr):
        self.lr = lr

    def step(self, batches):
        self.steps += 1
        self._misbehave()
        grad, loss = torch.zeros_like(self.weight), torch.zeros((), dtype=torch.float64)
        for batch in batches:
            error = self.weight[batch.tokens] - self.weight[batch.targets] + 0.01 * torch.rand(())
            loss += error.square().sum() / self.tokens
            grad.index_add_(0, batch.tokens.flatten(), 2 * error.flatten() / self.tokens)
        for tensor in (loss, grad):
            dist.all_reduce(tensor)
        self.moment.mul_(0.9).add_(grad)
        self.weight.sub_(self.moment, alpha=1000 * self.lr)
        return StepResult(loss.item(), grad.norm().item())

    def _misbehave(self):
        what, _, where = os.environ.get("FAKE", "").partition(":")
        if what == "slow":
            time.sleep(0.2)
        elif what == "once":  # killed in the first attempt only
            if where == f"{dist.get_rank()}:{self.steps}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        elif what and where == f"{dist.get_rank()}:{self.steps}":
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            if what == "stall":
                time.sleep(2 * HANG)
            if what == "diverge":
                self.weight.fill_(torch.nan)
            if what == "raise":
                raise ValueError("the weights went missing\nand more")

    def state_dict(self):
        what, _, where = os.environ.get("FAKE", "").partition(":")
        if what == "saving" and where.endswith(f":{self.steps}") and dist.get_rank() == 0:
            checkpoint._complete_directory = lambda *_: self._end(where.startswith("rank"))
        return {"weight": self.weight, "moment": self.moment}

    def _end(self, rank):
        os.kill(os.getpid() if rank else os.getppid(), signal.SIGKILL)
        time.sleep(2 * HANG)

    def load_state_dict(self, state):
        self.weight.copy_(state["weight"])
        self.moment.copy_(state["moment"])
