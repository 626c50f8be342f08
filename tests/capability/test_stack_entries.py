"""An entry of a stack is played on some job, or refused on all; never ignored."""

from dataclasses import replace

from msgspec import structs

from mopsim.engine import simulate
from mopsim.spec.capability import ROWS, Job
from mopsim.spec.stack import Hides, Kernels, Sharding, StateDTypes
from mopsim.spec.strategy import Activations, Overlap
from mopsim.strategies import fsdp2, megatron
from tests.capability.jobs import refusal, variants
from tests.capability.test_simulator import HARDWARE, JOBS, outcome, program

ON = (
    "mop", "fsdp2", "mop, latent", "fsdp2, offloaded", "fsdp2, gathered keys", "megatron, selective",
    "megatron, fp8", "megatron, state updated on the host",
)  # fmt: skip
FIRST = ("left", "biased", "experts again", "clamped", "narrow")
"""Jobs on which act the entries with the most values: they are not tried on all."""
ELSEWHERE = {
    "stack.host.queues",  # jobs this small wait for the host, not for links: tests/sim/test_links.py
    "stack.communication_share",  # jobs this small wait for the host, not for the SMs
    "stack.sharding.reductions",  # of ZeRO-2 and 3 without FSDP: tests/sim/test_flat_update.py
    "stack.kernels.logits_cut",  # of a loss on a wide copy (loss upcast): tests/sim/test_memory.py
    "stack.host.orders_documents",  # of documents that are exchanged: tests/sim/test_packed_host.py
    "stack.recompute.unlisted",  # of recipes beside named kernels: tests/sim/test_layers_in_bf16.py
    "stack.recompute.kept_inputs",  # of a kept kernel of its own: tests/parity/test_selective_checkpoints.py
    "stack.recompute.sums",  # of named kept products on tensor ranks: tests/sim/test_kept_activations.py
    "stack.sharding.one_pool",  # of blocks that stay reserved: tests/sim/test_upper.py
    "stack.sharding.abreast",  # without it such a strategy is no job: tests/sim/test_side_by_side.py
    "stack.sharding.expert_dim",  # of experts that ranks split within: tests/parity/test_drawn_memory.py
    "stack.sharding.optional",  # without it a strategy below ZeRO-2 is no job at all
    "stack.sharding.reuse_distance",  # of networks below it, or wide ones: tests/sim/test_reuse.py
    "stack.sharding.host_room",  # of ZeRO-1's gradients on the host: tests/sim/test_flat_update.py
    "stack.sharding.searched",  # of gradients on the device in bf16: tests/sim/test_flat_update.py
    "stack.sharding.update_group",  # of wide copies of narrow gradients: tests/sim/test_flat_update.py
}
"""Entries that act on no job here."""


def test_an_entry_of_a_stack_is_played_on_some_job_or_refused_on_all() -> None:
    """Played: other programs, or another time or memory of the same ones. Every value of an entry that the
    table says is read is tried on the first job that has it, and on further ones until it acts: first of
    all the programs are compared, and then what is left is played."""
    more, found = left_to_the_stack(), dict[str, set[str]]()
    tried = {**{name: more[name] for name in FIRST}, **{name: JOBS[name] for name in ON}, **more}
    read = {path for path in ROWS if path.startswith("stack.") and ROWS[path].cells["simulator"].reads}
    for name, job in tried.items():
        left = {path for path in read - ELSEWHERE if found.get(path, {"same"}) == {"same"}}
        base, before = program(job), set(found)
        for variant in variants(name, job, ("stack",), left):
            seen = found.setdefault(variant.path, set())
            if variant.path not in before or seen == {"same"}:
                seen.add(outcome(variant, base))
    ignored = {path for path, seen in found.items() if seen == {"same"}}
    for name, job in tried.items():
        step = played(job) if ignored else None
        for variant in variants(name, job, ("stack",), frozenset(ignored)):
            if refusal(variant, "simulator") is None and played(variant.job) != step:
                ignored.discard(variant.path)
    assert not ignored, ignored


def left_to_the_stack() -> dict[str, Job]:
    """Jobs by name that leave to their stack what a strategy may: dtypes and overlap; what selective
    recomputation runs again, under tensor parallelism and without; when layer inputs come back from the host;
    where experts' biases are added and sinks applied, and how a clamped gate is made; experts over tensor
    ranks, and norms, run again; products in 8 bits; narrow moments and parameters on the host; tensor ranks
    that split rows of two sequences or, with MTP, hold all rows, and two readers of each; sends of an
    interleaved pipeline; gradients as narrow as the products; FSDP's groups without copies; rows that
    HybridEP brings; heads' norms; a weight that embedding and head share; layers that are turns of a loop,
    and experts of a fixed room; rotary embeddings by torch; values that are narrower than keys; attention
    scores that are kept; compiled layers in copies; two sequences whose rows a scan takes, and two of packed
    documents whose queries and keys are normed and rotated.
    """
    job, linear = JOBS["megatron"], JOBS["megatron, linear"]
    names = ("param", "reduce", "grad", "moments", "master")
    precision = structs.replace(job.strategy.precision, **dict.fromkeys(names, "stack"))
    overlap = Overlap(**dict.fromkeys(Overlap.__struct_fields__))
    selective = Activations(recompute="selective")
    split = structs.replace(job.strategy, precision=precision, overlap=overlap, activations=selective)
    away = Activations(recompute="full", layer_inputs="host")
    whole = JOBS["fsdp2"]
    again = megatron(8, tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2)
    again = structs.replace(
        again, activations=Activations(recompute="selective", modules=("layernorm", "moe"))
    )
    flat = JOBS["mop"]
    shards = structs.replace(flat.strategy.dense, param_tier="host")
    narrow = structs.replace(megatron(8, expert_parallel=2), precision=precision)
    rows = megatron(8, tensor_parallel=2)
    rows = structs.replace(rows, dense=structs.replace(rows.dense, sequence_parallel=False))
    own = structs.replace(job.software, kernels=Kernels(gate_up="added"))
    further = structs.replace(job.model, num_nextn_predict_layers=1)
    eight = structs.replace(whole.strategy.precision, matmul="fp8")
    hosted = megatron(8, expert_parallel=2)
    by_host = structs.replace(hosted.optimizer, state_tier="host", update_on="host")
    short = structs.replace(hosted.precision, moments="bfloat16")
    hosted = structs.replace(hosted, optimizer=by_host, precision=short)
    return {
        "rows split": replace(job, strategy=megatron(8, tensor_parallel=2, micro_batch=2), stack=own),
        "rows held, MTP": replace(job, model=further, strategy=rows, stack=own),
        "8 bits": replace(whole, strategy=structs.replace(whole.strategy, precision=eight)),
        "moments on the host": replace(job, strategy=hosted),
        "woven": replace(job, strategy=megatron(8, expert_parallel=2, overlap=Overlap(experts=True))),
        "shards on the host": replace(flat, strategy=structs.replace(flat.strategy, dense=shards)),
        "left": replace(job, strategy=split),
        "interleaved": replace(
            job,
            strategy=megatron(8, pipeline_parallel=2, virtual_stages=2),
            stack=structs.replace(job.software, hides=Hides()),
        ),
        "left, whole": replace(whole, strategy=structs.replace(whole.strategy, activations=selective)),
        "inputs on the host": replace(whole, strategy=structs.replace(whole.strategy, activations=away)),
        "clamped": replace(job, model=structs.replace(job.model, swiglu_limit=7.0)),
        "experts again": replace(job, strategy=again),
        "narrow": replace(job, strategy=narrow, stack=structs.replace(job.software, dtypes=StateDTypes())),
        "no copies": replace(whole, stack=structs.replace(whole.software, sharding=Sharding(fsdp=True))),
        "biased": replace(whole, model=structs.replace(whole.model, expert_bias=True, attention_sinks=True)),
        "rows of HybridEP": replace(
            job, strategy=megatron(8, expert_parallel=2, token_dispatcher="hybridep", recompute="none")
        ),
        "one weight": replace(whole, model=structs.replace(whole.model, tie_word_embeddings=True)),
        "norms of heads": replace(job, model=structs.replace(job.model, qk_norm="head")),
        "looped": replace(
            whole,
            stack=structs.replace(
                whole.software,
                kernels=Kernels(expert_capacity=1.0),
                sharding=Sharding(fsdp=True, loop="pipelined"),
            ),
        ),
        "narrow values": replace(
            JOBS["mop, latent"], model=structs.replace(JOBS["mop, latent"].model, v_head_dim=16)
        ),
        "inputs weighed": replace(job, model=structs.replace(job.model, expert_inputs_weighted=True)),
        "one loss": replace(job, stack=structs.replace(job.software, kernels=Kernels(loss="fused"))),
        "autocast": replace(
            job,
            strategy=structs.replace(job.strategy, precision=structs.replace(precision, param="float32")),
            stack=structs.replace(job.software, kernels=Kernels()),
        ),
        "by torch": replace(job, stack=structs.replace(job.software, kernels=Kernels(rotary="halves"))),
        "rows to scan": replace(linear, strategy=structs.replace(linear.strategy, micro_batch=2)),
        "turned apart": replace(
            JOBS["fsdp2, tensor"],
            model=structs.replace(job.model, qk_norm="head"),
            strategy=fsdp2(8, tensor_parallel=2, micro_batch=2),
            training=structs.replace(whole.training, attention_mask="document"),
        ),
        "scores": replace(
            job, stack=structs.replace(job.software, kernels=Kernels(attention={"default": "scores"}))
        ),
        "compiled copies": replace(
            job,
            strategy=megatron(8),
            stack=structs.replace(
                job.software, kernels=Kernels(compiled=True), sharding=Sharding(bucketed=True, bucket=0.0)
            ),
        ),
    }


def played(job: Job) -> tuple[float, int, int, int]:
    """Seconds and bytes of a step, and those of a device that it may have."""
    assert job.training is not None
    result = simulate(job.model, HARDWARE, 1, job.strategy, job.training, stack=job.stack)
    return result.step_time, result.peak_memory, result.host_memory, result.memory_limit
