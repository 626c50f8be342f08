"""Logits that torch's pipelines keep for their caller (Stack.stage_outputs)."""

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.loss import logit_elements
from mopsim.program.stage import Stage
from mopsim.program.workload import Work


def merged(context: Context, issue: Builder, stage: Stage, played: int) -> int:
    """All microbatches' outputs are put together once the last backward is over. played: of the microbatches;
    returns bytes of the others' logits."""
    if context.stack.stage_outputs != "returned" or not stage.is_last or stage.parts == 1:
        return 0
    count, size = context.training.num_microbatches(context.strategy), logit_elements(context) * context.b
    work, whole = (Work("memory_bound", bytes=2.0 * count * size),), count * size
    memory = (("logits", whole), ("logits", -whole))
    issue.add("outputs merged", "compute", "vocabulary", "backward", work, issue.tail(), memory)
    return (count - played) * size
