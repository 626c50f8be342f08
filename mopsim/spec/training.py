"""TrainSpec: what is trained on, independent of how it is parallelised."""

from typing import Literal

from msgspec.structs import replace

from mopsim.common.errors import Rules, SpecError, require
from mopsim.common.io import Spec
from mopsim.common.working import near_multiples
from mopsim.spec import documents
from mopsim.spec import routing as profiles
from mopsim.spec.hardware import WIDE_HEAD
from mopsim.spec.layout import MOST_CHUNKS, MOST_MICROBATCHES, ceil_div, num_chunks
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy


class TrainSpec(Spec, frozen=True, kw_only=True):
    """What one optimizer step trains on: `global_batch` sequences of `seq_len` tokens.

    seq_len: tokens of a sequence. global_batch: sequences of a step. routing: how tokens choose experts if no
    router decides (simulation and dry run). "balanced"; "forced": balanced as the program's benchmarks force
    it; "r/h": the first r % of token positions choose experts j mod h for j < top_k; "zipf:s"; or the
    measured share of all routes of each expert (see mopsim.spec.routing). learning_rate: learning rate after
    warm-up. warmup_steps: steps over which the learning rate rises. beta1: AdamW's constant. beta2: AdamW's
    constant. eps: AdamW's constant. weight_decay: AdamW's weight decay, of all parameters except norms,
    biases and sinks. clip_norm: global norm that gradients are clipped to. bias_update_rate: step of the
    router's balance bias. router_aux_loss_coef: weight of the routers' balance loss of each sequence (arXiv
    2412.19437, equation 17): a mean over all tokens, including those that do not count in the loss.
    router_z_loss_coef: weight of the square of the routers' log-sum-exp (arXiv 2202.08906): the same mean.
    mtp_loss_coef: weight of the mean loss of MTP modules; 0.3 is DeepSeek-V3's (arXiv 2412.19437, 4.2).
    attention_mask: "causal": a token attends to all tokens before it in its sequence, of any document.
    "document": each document of a sequence is trained as if it were alone. Positions restart, attention does
    not cross, and a document does not predict the first token of the next. document_tokens: with "document",
    the length of a token's document, averaged over tokens: the sum of the squared lengths over the sum of the
    lengths, at most seq_len, since sequences cut documents. Or MEAN/SPREAD (485/1): mean, and deviation of
    the logarithm, of log-normal document lengths; every sequence length then cuts them. 0: not known, each
    sequence is taken as one document. It is used in simulations. seed: seed of weights and data.
    """

    seq_len: int
    global_batch: int
    routing: profiles.RoutingProfile = "balanced"
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_update_rate: float = 1e-3
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    mtp_loss_coef: float = 0.3
    attention_mask: Literal["causal", "document"] = "causal"
    document_tokens: documents.Documents = 0
    seed: int = 0

    def _rules(self) -> Rules:
        yield self.seq_len >= 1, "seq_len", "must be at least 1"
        yield self.global_batch >= 1, "global_batch", "must be at least 1"
        profiles.check(self.routing)
        for field in ("seq_len", "global_batch"):
            yield getattr(self, field) <= 2**40, field, "must be at most 2^40"
        yield from documents.rules(self.document_tokens, self.seq_len)
        known = self.attention_mask == "document" or self.document_tokens == 0
        yield known, "document_tokens", "needs attention_mask 'document'"
        for field in ("learning_rate", "eps"):
            yield getattr(self, field) > 0, field, "must be positive"
        for field, most in (
            ("learning_rate", 10), ("eps", 1), ("warmup_steps", 2**40), ("weight_decay", 10),
            ("clip_norm", 1e12), ("bias_update_rate", 1), ("router_aux_loss_coef", 1e3),
            ("router_z_loss_coef", 1e3), ("mtp_loss_coef", 1e3), ("seed", 2**62),
        ):  # fmt: skip
            yield 0 <= getattr(self, field) <= most, field, f"must lie between 0 and {most:g}"
        for field in ("beta1", "beta2"):
            yield 0 <= getattr(self, field) < 1, field, "must lie in [0, 1)"

    def check_model(self, model: ModelSpec) -> None:
        """Raise SpecError where the routing does not fit the model's experts."""
        profiles.check_model(self.routing, model)
        self.hold(self._with_model(model), "training.")

    def _with_model(self, model: ModelSpec) -> Rules:
        positions = model.learned_positions
        rule = f"is more than model.learned_positions {positions}"
        yield positions == 0 or self.seq_len <= positions, "seq_len", rule
        further = bool(self.mtp_loss_coef and model.num_nextn_predict_layers)
        rule = "is not trained with MTP modules, which would predict across borders: mtp_loss_coef 0 leaves"
        yield self.attention_mask != "document" or not further, "attention_mask", f"{rule} them"

    def plain_attention(self, model: ModelSpec) -> bool:
        """Whether every query attends to all tokens before it, without sinks and by heads of the usual
        widths: what every flash kernel for GPUs knows."""
        windowed = any(map(model.window, range(model.num_hidden_layers))) or model.attention_chunk_size
        special = windowed or model.attention_sinks or self.attention_mask != "causal"
        return not special and model.head_dim <= WIDE_HEAD

    def check_strategy(self, strategy: Strategy) -> None:
        """Raise SpecError where the batch or the sequence does not divide over the strategy's ranks."""
        per_step = strategy.micro_batch * strategy.data_groups
        if self.global_batch % per_step:
            needed = f"micro_batch {strategy.micro_batch} x data groups {strategy.data_groups}"
            rule, works = f"is not a multiple of {needed}", near_multiples(self.global_batch, per_step)
            raise SpecError("training.global_batch", self.global_batch, f"{rule}{works}")
        self.hold(self._with_batch(strategy), "training.")
        split = strategy.attention.context_parallel
        split *= strategy.dense.tensor_parallel if strategy.dense.sequence_parallel else 1
        if self.seq_len % split:
            works = near_multiples(self.seq_len, split)
            rule = f"is not a multiple of the sequence split {split}{works}"
            raise SpecError("training.seq_len", self.seq_len, rule)
        self._check_chunks(strategy)
        early, rule = strategy.optimizer.overlap == "backward", "needs training.clip_norm 0, not"
        why = "the norm to clip by is known when the backward is over"
        free = not early or not self.clip_norm
        require(free, "strategy.optimizer.overlap", "backward", f"{rule} {self.clip_norm:g}: {why}")

    def _with_batch(self, strategy: Strategy) -> Rules:
        microbatches, pipeline = self.num_microbatches(strategy), strategy.pipeline
        rule = f"makes {microbatches} microbatches, more than {MOST_MICROBATCHES}"
        yield microbatches <= MOST_MICROBATCHES, "global_batch", rule
        rule = (
            f"makes {microbatches} microbatches, not a multiple of pipeline.pipeline_parallel "
            f"{pipeline.pipeline_parallel} as interleaving needs"
        )
        plain = pipeline.virtual_stages == 1 or pipeline.folded
        yield plain or microbatches % pipeline.pipeline_parallel == 0, "global_batch", rule
        least = 2 * pipeline.pipeline_parallel * pipeline.folded
        rule = f"makes {microbatches} microbatches, fewer than the {least} that dualpipe_v needs, two a stage"
        yield microbatches >= least, "global_batch", rule

    def _check_chunks(self, strategy: Strategy) -> None:
        """A chunk is a bound on its tokens: it may be larger than what there is, but not absurdly small."""
        tokens = self.tokens_per_rank(strategy)
        experts = strategy.experts
        for field, size, most in (
            ("dense", strategy.dense.chunk_tokens, tokens),
            ("vocabulary", strategy.vocabulary.chunk_tokens, tokens),
            ("experts", experts.chunk_tokens, experts.max_chunks),
        ):
            chunks = num_chunks(tokens, size, most)
            rule = (
                f"cuts the {tokens} tokens of a rank into {chunks} chunks, more than {MOST_CHUNKS}; "
                f"{ceil_div(tokens, MOST_CHUNKS)} or more will do"
            )
            require(chunks <= MOST_CHUNKS, f"strategy.{field}.chunk_tokens", size, rule)

    def at_length(self, seq_len: int) -> "TrainSpec":
        """The same with sequences of another length, which cut the documents that are longer."""
        return replace(
            self, seq_len=seq_len, document_tokens=documents.at_length(self.document_tokens, seq_len)
        )

    @property
    def own_document(self) -> int:
        """Tokens of the document that a token is in, on average over tokens, where attention does not cross
        it; 0: it sees the whole sequence, or that is not known."""
        return documents.own(self.document_tokens, self.seq_len)

    def num_microbatches(self, strategy: Strategy) -> int:
        """Microbatches that one data group works through in a step."""
        return self.global_batch // (strategy.micro_batch * strategy.data_groups)

    def tokens_per_rank(self, strategy: Strategy) -> int:
        """N: tokens of one microbatch that one rank owns outside tensor-parallel regions."""
        return self.seq_len * strategy.micro_batch // strategy.attention.context_parallel
